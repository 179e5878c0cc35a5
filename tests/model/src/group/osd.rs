//! An OSD: its maps, peering, activation, recovery, reads. Written after `osd/src/core/osd.rs` and `osd/src/core/pg`.

use super::history;
use super::state::*;
use super::*;

impl Group {
    pub(super) fn osd_steps(&self, steps: &mut Steps<'_>) {
        for o in 0..self.osds {
            self.learn(steps, o);
            match steps.from.osds[o as usize].phase {
                Phase::Idle => {}
                Phase::Member { .. } => self.drop_stray(steps, o),
                Phase::Peering { told } => self.peer(steps, o, told),
                Phase::Activating { plan, done } => self.activate(steps, o, plan, done),
                Phase::Active { plan, writing, reading } => {
                    let quiet = writing.iter().all(Option::is_none);
                    if quiet || !self.keeps(Rule::RecoveryWaitsForWrites) {
                        self.recover(steps, o, plan);
                    }
                    self.read(steps, o, plan, writing, reading);
                }
            }
        }
    }

    fn learn(&self, steps: &mut Steps<'_>, o: u8) {
        let mut s = *steps.from;
        if s.osds[o as usize].map == s.monitors.newest {
            return;
        }
        let (before, began) = (s.interval_of(o), s.is_current(o));
        s.osd(o).map += 1;
        if s.interval_of(o) != before || !began {
            self.enter(&mut s, o);
        }
        steps.push(Action::Learn(o), s);
    }

    /// Begins the interval of the OSD's map: whatever belonged to an earlier one ends. The promise to refuse that is durable
    /// before anybody is asked or answered.
    pub(super) fn enter(&self, s: &mut State, o: u8) {
        let record = *s.record_of(o);
        if !self.keeps(Rule::MissingIsDurable) {
            s.osd(o).missing = None;
        }
        let phase = if !s.is_current(o) {
            Phase::Idle
        } else if record.primary != o {
            Phase::Member { active: false }
        } else if record.acting.count_ones() < self.min_size {
            Phase::Idle
        } else {
            Phase::Peering { told: [None; OSDS] }
        };
        let again = !self.keeps(Rule::RestartsCount) && s.osds[o as usize].activated == s.interval_of(o);
        s.osd(o).phase = match phase {
            // Without the rule nobody tells a restarted member to activate again.
            Phase::Member { .. } if again => Phase::Member { active: true },
            phase => phase,
        };
    }

    /// Invariant 8.
    fn drop_stray(&self, steps: &mut Steps<'_>, o: u8) {
        let s = steps.from;
        let (record, map, osd) = (s.record_of(o), s.map_of(o), &s.osds[o as usize]);
        let needed = has(record.acting, o) || has(map.placed, o);
        let clean = (record.clean && record.activated) || !self.keeps(Rule::StraysStay);
        let stored = osd.activated != 0 || osd.held.version != Version::NONE;
        if stored && !needed && clean {
            let mut s = *s;
            let osd = s.osd(o);
            (osd.activated, osd.held, osd.missing) = (0, Object::default(), None);
            steps.event(Action::DropStray(o), s, Event::StrayDropped);
        }
    }

    fn peer(&self, steps: &mut Steps<'_>, o: u8, told: [Option<Told>; OSDS]) {
        let s = steps.from;
        let interval = s.interval_of(o);
        for member in members(s.known(interval)).filter(|m| *m != o && told[*m as usize].is_none()) {
            let there = s.linked(o, member) && matches!(s.osds[member as usize].phase, Phase::Member { .. });
            // Without the rule it answers before it has left the interval before.
            let early = !self.keeps(Rule::OldIntervalsEnd)
                && s.interval_of(member) < interval
                && has(s.map_of(member).up, member);
            if there || early {
                let mut s = *s;
                let says = s.osds[member as usize].tells();
                let Phase::Peering { told } = &mut s.osd(o).phase else { continue };
                told[member as usize] = Some(says);
                steps.push(Action::Ask { primary: o, member }, s);
            }
        }
        let record = s.monitors.intervals[interval as usize];
        let mut all = told;
        all[o as usize] = Some(s.osds[o as usize].tells());
        let answered = members(record.acting).all(|m| all[m as usize].is_some());
        let covers = |p: u8| {
            let acting = members(s.monitors.intervals[p as usize].acting);
            acting.filter_map(|m| all[m as usize]).any(|t| t.activated >= p)
        };
        let covered = members(record.past).all(covers) || !self.keeps(Rule::Coverage);
        // Invariant 3: any member of an earlier interval is enough for it.
        let knows_less = |p: u8| {
            let acting = members(s.monitors.intervals[p as usize].acting);
            acting.filter_map(|m| all[m as usize]).any(|t| t.activated < p)
        };
        if members(record.past).any(knows_less) {
            let broken = "a member of an interval that may have taken writes does not know of it";
            return steps.with(Action::Choose(o), *s, 0, Some(broken));
        }
        if !answered || !covered {
            return;
        }
        let only_doubt = self.keeps(Rule::OnlyDoubtGoesBack);
        let intervals: Vec<(u8, Set)> =
            members(record.past).map(|p| (p, s.monitors.intervals[p as usize].acting)).collect();
        let only_last = self.keeps(Rule::OnlyTheLastDenies);
        let served = history::Served { intervals: &intervals, only_last };
        let choice = history::choose(&all, self.keeps(Rule::Authority), only_doubt, served, record.acting);
        let Some(choice) = choice else { return };
        let lacking = members(record.acting).filter(|m| {
            let told = all[*m as usize].unwrap_or_default();
            !history::has_it(&told, &choice.needed)
        });
        let lacks = lacking.fold(0, |set, m| set | 1 << m);
        let highest = all.iter().flatten().map(|t| t.activated).max().unwrap_or_default();
        let newest_past = members(record.past).last().unwrap_or_default();
        let mut events = 0;
        for (happened, event) in [
            (choice.forward, Event::RolledForward),
            (choice.back, Event::WentBack),
            (choice.denied && choice.back, Event::Denied),
            (choice.on, Event::WentOn),
            (highest > newest_past && newest_past != 0, Event::HalfActivated),
            (record.past.count_ones() > 1, Event::OldIntervalNeeded),
        ] {
            events |= if happened { event.bit() } else { 0 };
        }
        let mut s = *s;
        s.osd(o).phase = Phase::Activating { plan: Plan { needed: choice.needed, lacks }, done: 0 };
        steps.with(Action::Choose(o), s, events, None);
    }

    /// Missing map and activation change together (rules P3 and P4).
    fn activate(&self, steps: &mut Steps<'_>, o: u8, plan: Plan, done: Set) {
        let s = steps.from;
        let interval = s.interval_of(o);
        let record = s.monitors.intervals[interval as usize];
        for member in members(record.acting & !done) {
            let phase = s.osds[member as usize].phase;
            let there = member == o || (s.linked(o, member) && matches!(phase, Phase::Member { .. }));
            if !there {
                continue;
            }
            let mut s = *s;
            if phase != (Phase::Member { active: true }) {
                let osd = s.osd(member);
                osd.activated = interval;
                osd.missing = has(plan.lacks, member).then_some(plan.needed);
                if member != o {
                    osd.phase = Phase::Member { active: true };
                }
            }
            s.osd(o).phase = Phase::Activating { plan, done: done | 1 << member };
            steps.push(Action::Activate { primary: o, member }, s);
        }
        let everywhere = done == record.acting || !self.keeps(Rule::ActivationEverywhere);
        let recorded = record.activated || !self.keeps(Rule::ActivationRecorded);
        if everywhere && has(done, o) && recorded {
            let mut s = *s;
            s.osd(o).phase = Phase::Active { plan, writing: [None; BLOCKS], reading: 0 };
            steps.push(Action::GoActive(o), s);
        }
    }

    /// What the object should be is taken from whoever has it, and brought to those who lack it (rule P4).
    fn recover(&self, steps: &mut Steps<'_>, o: u8, plan: Plan) {
        let s = steps.from;
        let settle = |s: &mut State, member: u8| {
            let Phase::Active { plan, .. } = &mut s.osd(o).phase else { return };
            plan.lacks &= !(1 << member);
        };
        if has(plan.lacks, o) {
            for from in members(s.known(s.interval_of(o))).filter(|m| *m != o) {
                let source = &s.osds[from as usize];
                let there = s.linked(o, from) && matches!(source.phase, Phase::Member { .. });
                if there && source.held.version == plan.needed.version {
                    let mut s = *s;
                    let held = source.held;
                    (s.osd(o).held, s.osd(o).missing) = (held, None);
                    settle(&mut s, o);
                    steps.event(Action::Pull { primary: o, from }, s, Event::Recovered);
                }
            }
            return;
        }
        for to in members(plan.lacks) {
            let target = &s.osds[to as usize];
            let wants = target.missing.is_some_and(|n| n.version == plan.needed.version);
            // Without the rule a member may have forgotten what it lacks: then it says that all is well.
            let takes = wants || !self.keeps(Rule::MissingIsDurable);
            if s.linked(o, to) && target.phase == (Phase::Member { active: true }) && takes {
                let mut s = *s;
                let held = s.osds[o as usize].held;
                let member = s.osd(to);
                member.missing = None;
                if self.keeps(Rule::MissingUntilStored) {
                    member.held = held;
                }
                settle(&mut s, to);
                steps.event(Action::Push { primary: o, to }, s, Event::Recovered);
            }
        }
    }

    /// Rules P5 and P6.
    fn read(
        &self,
        steps: &mut Steps<'_>,
        o: u8,
        plan: Plan,
        writing: [Option<Writing>; BLOCKS],
        reading: Set,
    ) {
        let s = steps.from;
        if !self.has_lease(s, o) {
            return;
        }
        let doubt = plan.needed.uncertain.is_some() && plan.lacks != 0 && self.keeps(Rule::DoubtIsHidden);
        let blocked = has(plan.lacks, o) || doubt;
        for block in 0..BLOCKS as u8 {
            if has(reading, block) {
                self.answer_read(steps, Action::EndRead { at: o, block }, o, block);
                continue;
            }
            let waits = writing[block as usize].is_some() && self.keeps(Rule::ReadsWait);
            if blocked || waits || !self.script.iter().any(|(_, b)| *b == block) {
                continue;
            }
            self.answer_read(steps, Action::Read { at: o, block }, o, block);
            if self.slow_reads {
                let mut s = *s;
                if let Phase::Active { reading, .. } = &mut s.osd(o).phase {
                    *reading |= 1 << block;
                }
                steps.push(Action::BeginRead { at: o, block }, s);
            }
        }
    }

    fn answer_read(&self, steps: &mut Steps<'_>, action: Action, o: u8, block: u8) {
        let mut s = *steps.from;
        if let Phase::Active { reading, .. } = &mut s.osd(o).phase {
            *reading &= !(1 << block);
        }
        let value = s.osds[o as usize].held.blocks[block as usize];
        let before = s.registers[block as usize];
        match before.read(value, self.pending(&s, block)) {
            None => steps.with(action, s, 0, Some("no order of the writes explains what a read returned")),
            Some(after) => {
                s.registers[block as usize] = after;
                if s != *steps.from {
                    steps.push(action, s);
                }
            }
        }
    }
}
