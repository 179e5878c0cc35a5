//! Writes: started by the primary, made durable by every acting member, answered. Written after `osd/src/core/pg/{ops,writes,member}.rs`.

use super::state::*;
use super::*;

impl Group {
    pub(super) fn write_steps(&self, steps: &mut Steps<'_>) {
        let s = steps.from;
        for n in 0..MESSAGES {
            if let Some(request) = s.requests[n] {
                self.start(steps, n, request);
            }
        }
        for write in s.sub_writes.iter().flatten() {
            for member in 0..self.osds {
                self.sub_write(steps, *write, member);
            }
        }
        for o in 0..self.osds {
            let Phase::Active { writing, .. } = s.osds[o as usize].phase else { continue };
            // The store finishes in order.
            let next = writing.iter().flatten().filter(|w| !w.own).min_by_key(|w| w.version);
            if let Some(w) = next {
                self.own_durable(steps, o, *w);
            }
            for w in writing.iter().flatten() {
                self.finish(steps, o, *w);
            }
        }
    }

    /// An operation comes to an active primary: epoch, fence, lease, order.
    fn start(&self, steps: &mut Steps<'_>, n: usize, request: Request) {
        let s = steps.from;
        let (o, op) = (request.to, request.op);
        let osd = &s.osds[o as usize];
        let Phase::Active { plan, writing, reading } = osd.phase else { return };
        let interval = s.interval_of(o);
        let block = self.block(op);
        // What is refused for good was taken out already; the rest waits.
        let holder = self.holder(op) == s.map_of(o).holder || !self.keeps(Rule::Holder);
        let timely = request.interval == interval || !self.keeps(Rule::OperationEpoch);
        let ready =
            timely && holder && self.has_lease(s, o) && s.is_current(o) && self.may_write(s, o, &plan);
        // A connection keeps its order.
        let overtakes = s.requests.iter().flatten().any(|r| {
            let same = (r.to, r.connection) == (o, request.connection);
            same && self.followers(r.op).any(|later| later == op)
        });
        if !ready || request.interval > interval || overtakes || writing[block as usize].is_some() {
            return;
        }
        if has(reading, block) && self.keeps(Rule::WritesWaitForReads) {
            return steps.note(Event::WriteWaited);
        }
        let before = writing.iter().flatten().map(|w| w.version).chain([osd.held.version]).max();
        let before = before.unwrap_or_default();
        let version = before.successor(interval);
        let Some(slot) = s.sub_writes.iter().position(Option::is_none) else { return };
        let mut s = *s;
        s.requests[n] = None;
        let superseded = self.supersede(&mut s, request);
        s.sub_writes[slot] = Some(SubWrite { interval, version, before, op });
        if let Phase::Active { plan, writing, .. } = &mut s.osd(o).phase {
            let connection = request.connection;
            // What is to be brought to those who lack it.
            plan.needed.version = if plan.lacks == 0 { plan.needed.version } else { version };
            writing[block as usize] = Some(Writing { op, version, connection, own: false, acked: 0 });
        }
        let events = if superseded { Event::ConnectionSuperseded.bit() } else { 0 };
        steps.with(Action::Start { op, at: o }, s, events, None);
    }

    /// Rule P4: every acting member has the object, or enough of them have, the primary included, and there is no doubt about it.
    fn may_write(&self, s: &State, o: u8, plan: &Plan) -> bool {
        let hold = s.record_of(o).acting & !plan.lacks;
        let enough = hold.count_ones() >= self.min_size || !self.keeps(Rule::EnoughHold);
        plan.lacks == 0 || (has(hold, o) && plan.needed.uncertain.is_none() && enough)
    }

    fn own_durable(&self, steps: &mut Steps<'_>, o: u8, w: Writing) {
        let block = self.block(w.op) as usize;
        let mut s = *steps.from;
        let osd = s.osd(o);
        osd.held.version = w.version;
        osd.held.blocks[block] = w.op;
        if let Phase::Active { writing, .. } = &mut osd.phase {
            writing[block] = Some(Writing { own: true, ..w });
        }
        steps.push(Action::OwnDurable { op: w.op, at: o }, s);
    }

    /// The primary that still waits for the member to have this version.
    fn waits_for(&self, s: &State, write: &SubWrite, member: u8) -> Option<u8> {
        let primary = s.monitors.intervals[write.interval as usize].primary;
        let linked = s.interval_of(member) == write.interval || !self.keeps(Rule::OldIntervalsEnd);
        if primary == NOBODY || primary == member || s.interval_of(primary) != write.interval || !linked {
            return None;
        }
        let Phase::Active { writing, .. } = s.osds[primary as usize].phase else { return None };
        let waits = |w: &Writing| w.version == write.version && w.op == write.op && !has(w.acked, member);
        writing.iter().flatten().any(waits).then_some(primary)
    }

    /// What a sub-write would do at a member: `None` nothing, else whether it is applied or only acknowledged (rule P2). Who
    /// lacks the object notes that it is at that version now (rule P4).
    fn effect(&self, s: &State, write: &SubWrite, member: u8) -> Option<bool> {
        let record = &s.monitors.intervals[write.interval as usize];
        let osd = &s.osds[member as usize];
        if !has(record.acting, member) || record.primary == member {
            return None;
        }
        // Writes come only to who has activated, from its own interval, between those that its map calls up.
        let active = osd.phase == (Phase::Member { active: true });
        let now = active && s.interval_of(member) == write.interval && s.is_current(member);
        let old = !self.keeps(Rule::OldIntervalsEnd)
            && s.interval_of(member) > write.interval
            && osd.activated >= write.interval;
        if !now && !old {
            return None;
        }
        if let Some(n) = osd.missing {
            let newer = write.version > n.version;
            return (newer || self.waits_for(s, write, member).is_some()).then_some(newer);
        }
        if write.version <= osd.held.version {
            return self.waits_for(s, write, member).map(|_| false);
        }
        (write.before == osd.held.version || !self.keeps(Rule::VersionOrder)).then_some(true)
    }

    fn sub_write(&self, steps: &mut Steps<'_>, write: SubWrite, member: u8) {
        let Some(applies) = self.effect(steps.from, &write, member) else { return };
        let mut s = *steps.from;
        if applies {
            let block = self.block(write.op) as usize;
            let noted = self.keeps(Rule::WritesAreNoted);
            let osd = s.osd(member);
            match &mut osd.missing {
                Some(n) if noted => *n = Needed { version: write.version, uncertain: None },
                Some(_) => {}
                None => {
                    osd.held.version = write.version;
                    osd.held.blocks[block] = write.op;
                }
            }
        }
        if let Some(primary) = self.waits_for(&s, &write, member)
            && let Phase::Active { writing, .. } = &mut s.osd(primary).phase
        {
            let mine = writing.iter_mut().flatten().filter(|w| w.version == write.version);
            mine.for_each(|w| w.acked |= 1 << member);
        }
        steps.push(Action::SubWrite { version: write.version, at: member }, s);
    }

    /// Invariant 1.
    fn finish(&self, steps: &mut Steps<'_>, o: u8, w: Writing) {
        let s = steps.from;
        let acting = s.record_of(o).acting;
        let others = acting & !(1 << o);
        let everywhere = w.acked & others == others || !self.keeps(Rule::EveryMember);
        if !w.own || !everywhere {
            return;
        }
        let block = self.block(w.op) as usize;
        let mut s = *s;
        if let Phase::Active { writing, .. } = &mut s.osd(o).phase {
            writing[block] = None;
        }
        let action = Action::Finish { op: w.op, at: o };
        // Without the lease another primary may have decided already.
        if !self.has_lease(&s, o) {
            return steps.push(action, s);
        }
        let bit = 1 << (w.op - 1);
        let awaited = s.clients.waits_on[w.op as usize - 1] == w.connection && s.clients.answered & bit == 0;
        if awaited {
            s.clients.answered |= bit;
        }
        let degraded = acting.count_ones() < self.placed.count_ones();
        let mut events = Event::Answered.bit();
        let Phase::Active { plan, .. } = s.osds[o as usize].phase else { return };
        let noted = plan.lacks != 0;
        for (happened, event) in
            [(degraded, Event::DegradedWrite), (!awaited, Event::LateTwin), (noted, Event::NotedWrite)]
        {
            events |= if happened { event.bit() } else { 0 };
        }
        let holds = |m: &u8| s.osds[*m as usize].held.version >= w.version;
        if members(acting).filter(holds).count() < self.min_size as usize && self.keeps(Rule::EveryMember) {
            return steps.with(action, s, events, Some("a write was answered that too few members hold"));
        }
        match s.registers[block].answered(w.op) {
            Some(after) => {
                s.registers[block] = after;
                steps.with(action, s, events, None);
            }
            None => steps.with(action, s, events, Some("a write was answered that cannot have taken effect")),
        }
    }

    /// Whether the OSD has writes in flight of a holder before `holder`.
    pub(super) fn has_older_writes(&self, s: &State, o: u8, holder: u8) -> bool {
        let Phase::Active { writing, .. } = s.osds[o as usize].phase else { return false };
        writing.iter().flatten().any(|w| self.holder(w.op) < holder)
    }

    pub(super) fn tidy_sub_writes(&self, s: &mut State) -> u64 {
        let mut events = 0;
        for n in 0..s.sub_writes.len() {
            let Some(write) = s.sub_writes[n] else { continue };
            let acting = s.monitors.intervals[write.interval as usize].acting;
            let may = members(acting).any(|m| self.may_apply(s, &write, m));
            if !may {
                let lost = members(acting).any(|m| s.osds[m as usize].held.version < write.version);
                events |= if lost { Event::SubWriteRefused.bit() } else { 0 };
                s.sub_writes[n] = None;
            }
        }
        s.sub_writes.sort_unstable();
        events
    }

    /// Now or later.
    fn may_apply(&self, s: &State, write: &SubWrite, member: u8) -> bool {
        let record = &s.monitors.intervals[write.interval as usize];
        let osd = &s.osds[member as usize];
        if record.primary == member {
            return false;
        }
        let old = !self.keeps(Rule::OldIntervalsEnd) && s.interval_of(member) > write.interval;
        let now = s.interval_of(member) == write.interval && s.is_current(member);
        let newer = osd.missing.map_or(osd.held.version, |n| n.version) < write.version;
        (now && (newer || self.waits_for(s, write, member).is_some())) || (old && newer)
    }
}
