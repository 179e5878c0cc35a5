//! The monitors: who is up, intervals, activations, attachments. Written after `monitor/src/state` and `monitor/src/grpc`.

use super::state::*;
use super::*;

impl Group {
    pub(super) fn monitor_steps(&self, steps: &mut Steps<'_>) {
        let s = steps.from;
        let map = *s.monitors.map();
        if s.monitors.changes < self.changes && (s.monitors.newest as usize) < MAPS - 1 {
            for o in 0..self.osds {
                if has(map.up, o) {
                    self.change(steps, Action::MarkDown(o), |m| m.up &= !(1 << o), |_| {});
                }
                self.boot(steps, o);
                let (acts, suspect) = (has(s.monitors.interval().acting, o), has(s.monitors.suspects, o));
                if self.suspects && acts && !suspect {
                    self.change(steps, Action::Suspect(o), |_| {}, |x| x.monitors.suspects |= 1 << o);
                }
                if suspect {
                    self.change(steps, Action::ClearSuspect(o), |_| {}, |x| x.monitors.suspects &= !(1 << o));
                }
            }
            if self.moves {
                for from in members(map.placed) {
                    for to in (0..self.osds).filter(|o| !has(map.placed, *o)) {
                        let placed = map.placed & !(1 << from) | 1 << to;
                        self.change(steps, Action::Move { from, to }, |m| m.placed = placed, |_| {});
                    }
                }
            }
        }
        for o in 0..self.osds {
            self.record_activated(steps, o);
            self.record_clean(steps, o);
        }
        self.attach(steps);
    }

    /// A new map, and a new interval if it is one, with each primary that it may have.
    fn change(
        &self,
        steps: &mut Steps<'_>,
        action: Action,
        map: impl Fn(&mut Map),
        other: impl Fn(&mut State),
    ) {
        let mut s = *steps.from;
        other(&mut s);
        s.monitors.changes += 1;
        s.monitors.newest += 1;
        let newest = s.monitors.newest as usize;
        s.monitors.maps[newest] = s.monitors.maps[newest - 1];
        map(&mut s.monitors.maps[newest]);
        // A suspect is one run of an OSD.
        let rebooted = matches!(action, Action::Boot(_));
        let restarted = match action {
            Action::Boot(o) => {
                self.keeps(Rule::RestartsCount) && has(steps.from.monitors.interval().acting, o)
            }
            _ => false,
        };
        let m = s.monitors.maps[newest];
        let acting = m.placed & m.up & !s.monitors.suspects;
        let ended = *s.monitors.interval();
        if acting == ended.acting && !restarted {
            self.finish_change(steps, action, s, rebooted);
            return;
        }
        if m.interval as usize + 1 >= INTERVALS {
            return;
        }
        for primary in members(self.primaries(&s, acting)) {
            let mut s = s;
            self.begin_interval(&mut s, acting, primary);
            self.finish_change(steps, action, s, rebooted);
        }
        if acting == 0 {
            self.begin_interval(&mut s, 0, NOBODY);
            self.finish_change(steps, action, s, rebooted);
        }
    }

    fn finish_change(&self, steps: &mut Steps<'_>, action: Action, mut s: State, rebooted: bool) {
        if let (true, Action::Boot(o)) = (rebooted, action) {
            let newest = s.monitors.newest;
            let osd = s.osd(o);
            (osd.map, osd.phase) = (newest, Phase::Idle);
            self.enter(&mut s, o);
            s.requests.iter_mut().filter(|r| r.is_some_and(|r| r.to == o)).for_each(|r| *r = None);
        }
        steps.push(action, s);
    }

    /// A process starts, whether or not the one before was known to have ended.
    fn boot(&self, steps: &mut Steps<'_>, o: u8) {
        let clear = |x: &mut State| x.monitors.suspects &= !(1 << o);
        self.change(steps, Action::Boot(o), |m| m.up |= 1 << o, clear);
    }

    /// Intervals that may have written what is needed, newest first.
    fn holders(s: &State) -> impl Iterator<Item = Interval> + '_ {
        let current = *s.monitors.interval();
        let past = members(current.past).collect::<Vec<_>>();
        let past = past.into_iter().rev().map(|p| s.monitors.intervals[p as usize]);
        current.activated.then_some(current).into_iter().chain(past)
    }

    /// Members of the newest interval that has data; its primary, if that one is left.
    fn primaries(&self, s: &State, acting: Set) -> Set {
        let current = s.monitors.interval();
        if acting == current.acting {
            return 1 << current.primary;
        }
        let newest = Group::holders(s).find(|i| i.acting & acting != 0);
        match newest {
            Some(i) if has(acting, i.primary) => 1 << i.primary,
            Some(i) => i.acting & acting,
            None => acting,
        }
    }

    fn begin_interval(&self, s: &mut State, acting: Set, primary: u8) {
        let ended = *s.monitors.interval();
        let number = s.monitors.map().interval;
        let mut past = ended.past;
        if ended.activated {
            if ended.clean {
                past = 0;
            }
            // An earlier interval of the same members adds nothing.
            let same = |p: &u8| s.monitors.intervals[*p as usize].acting == ended.acting;
            past &= !members(past).filter(same).fold(0, |set, p| set | 1 << p);
            past |= 1 << number;
        }
        let (newest, next) = (s.monitors.newest, number + 1);
        s.monitors.maps[newest as usize].interval = next;
        s.monitors.intervals[next as usize] =
            Interval { acting, primary, past, since: newest, activated: false, clean: false };
    }

    /// A compare-and-set on the interval, by its primary (rules P3 and P9).
    fn is_current_primary(s: &State, o: u8) -> bool {
        let map = s.monitors.map();
        s.interval_of(o) == map.interval && s.monitors.interval().primary == o && has(map.up, o)
    }

    fn record_activated(&self, steps: &mut Steps<'_>, o: u8) {
        let s = steps.from;
        let record = *s.monitors.interval();
        let Phase::Activating { done, .. } = s.osds[o as usize].phase else { return };
        let everywhere = done & record.acting == record.acting || !self.keeps(Rule::ActivationEverywhere);
        let ready = everywhere && has(done, o) && Group::is_current_primary(s, o) && !record.activated;
        if !ready || record.acting.count_ones() < self.min_size {
            return;
        }
        // Rule P6: earlier primaries that are up and do not act must know of this interval.
        let mut earlier = members(record.past).map(|p| s.monitors.intervals[p as usize].primary);
        let unaware = earlier.any(|p| {
            let up = p != NOBODY && has(s.monitors.map().up, p) && !has(record.acting, p);
            up && s.osds[p as usize].map < record.since
        });
        if unaware && self.keeps(Rule::EarlierPrimaries) {
            return steps.note(Event::EarlierPrimaryAwaited);
        }
        let mut s = *s;
        let interval = s.monitors.map().interval;
        s.monitors.intervals[interval as usize].activated = true;
        steps.push(Action::RecordActivated(o), s);
    }

    fn record_clean(&self, steps: &mut Steps<'_>, o: u8) {
        let s = steps.from;
        let Phase::Active { plan, .. } = s.osds[o as usize].phase else { return };
        let record = s.monitors.interval();
        let whole = plan.lacks == 0 || !self.keeps(Rule::CleanIsWhole);
        if whole && Group::is_current_primary(s, o) && record.activated && !record.clean {
            let mut s = *s;
            let interval = s.monitors.map().interval;
            let record = &mut s.monitors.intervals[interval as usize];
            (record.clean, record.past) = (true, 0);
            steps.push(Action::RecordClean(o), s);
        }
    }

    /// Rules C1 to C3: the next holder is agreed on, and told when every OSD that is up knows.
    fn attach(&self, steps: &mut Steps<'_>) {
        let s = steps.from;
        let map = *s.monitors.map();
        let last = self.next_holders.len() as u8;
        if map.holder < last && map.holder == s.monitors.attached && (s.monitors.newest as usize) < MAPS - 1 {
            let mut s = *s;
            s.monitors.newest += 1;
            let holder = map.holder + 1;
            s.monitors.maps[s.monitors.newest as usize] = Map { holder, ..map };
            s.clients.known[holder as usize] = map.interval;
            if self.client(holder) == self.client(holder - 1) {
                s.clients.connection[holder as usize] = s.clients.connection[holder as usize - 1] + 1;
            }
            steps.push(Action::Attach(holder), s);
        }
        if map.holder == s.monitors.attached {
            return;
        }
        let holder = map.holder;
        let knows = |o: u8| s.map_of(o).holder >= holder || !self.keeps(Rule::FenceFirst);
        let up = || members(map.up);
        if !up().all(knows) {
            return;
        }
        let drained = up().all(|o| !self.has_older_writes(s, o, holder));
        if !drained && self.keeps(Rule::FenceDrains) {
            return steps.note(Event::FenceAwaited);
        }
        let mut s = *s;
        s.monitors.attached = holder;
        steps.push(Action::Attached(holder), s);
    }
}

/// Forgets maps that everybody has left, and what was recorded of intervals that nobody can ask for.
pub(super) fn tidy(s: &mut State, osds: u8) {
    let m = &mut s.monitors;
    let oldest = s.osds[..osds as usize].iter().map(|o| o.map).min().unwrap_or_default();
    m.maps[..oldest as usize].fill(Map::default());
    let live =
        m.maps[oldest as usize..=m.newest as usize].iter().fold(0u8, |set, map| set | 1 << map.interval);
    let past = members(live).fold(0, |set, i| set | m.intervals[i as usize].past);
    for i in 1..INTERVALS as u8 {
        let record = &mut m.intervals[i as usize];
        match (has(live, i), has(past, i)) {
            (true, _) => {}
            (false, true) => {
                *record = Interval { acting: record.acting, primary: record.primary, ..Interval::default() };
            }
            (false, false) => *record = Interval::default(),
        }
    }
    let first = m.maps[oldest as usize].interval;
    s.clients.known.iter_mut().for_each(|k| *k = (*k).max(first));
}
