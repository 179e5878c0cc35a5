//! Clients: holders of the volume, their writes, and what is still on its way. Written after `common/src/client` and `osd/src/server/clients.rs`.

use super::state::*;
use super::*;

impl Group {
    pub(super) fn client_steps(&self, steps: &mut Steps<'_>) {
        let s = steps.from;
        if s.requests.iter().all(Option::is_some) {
            return;
        }
        for op in self.ops() {
            let (holder, n, bit) = (self.holder(op), op as usize - 1, 1 << (op - 1));
            // One that was restarted is gone before its next life opens a session; one that was taken over from may not know.
            let newer = s.monitors.map().holder;
            let gone = holder < newer && self.client(holder) == self.client(newer);
            // A client goes on when it has its answer, or has given up. It never comes back to what it has left behind.
            let left = |o: &u8| {
                let (answered, tries) = (has(s.clients.answered, o - 1), s.clients.sent[*o as usize - 1]);
                answered || (self.gives_up && tries > 0)
            };
            let in_turn = self.ops().filter(|o| self.followers(*o).any(|f| f == op)).all(|o| left(&o));
            let behind = self.followers(op).any(|f| s.clients.sent[f as usize - 1] > 0);
            let over = s.clients.answered & bit != 0 || s.clients.sent[n] >= self.sends;
            if holder > s.monitors.attached || gone || over || !in_turn || behind {
                continue;
            }
            for interval in s.clients.known[holder as usize]..=s.monitors.map().interval {
                self.send(steps, op, interval);
            }
        }
    }

    /// Sends to the primary of an interval that the client may know. A second time only after it has given up its connection.
    fn send(&self, steps: &mut Steps<'_>, op: u8, interval: u8) {
        let mut s = *steps.from;
        let record = s.monitors.intervals[interval as usize];
        let (holder, n) = (self.holder(op) as usize, op as usize - 1);
        if interval == 0 || record.acting == 0 || s.interval_of(record.primary) > interval {
            return;
        }
        let Some(slot) = s.requests.iter().position(Option::is_none) else { return };
        if s.clients.sent[n] > 0 {
            s.clients.connection[holder] += 1;
        }
        let connection = s.clients.connection[holder];
        s.clients.sent[n] += 1;
        s.clients.waits_on[n] = connection;
        s.clients.known[holder] = interval;
        s.requests[slot] = Some(Request { op, to: record.primary, interval, connection });
        let block = self.block(op);
        let pending = self.pending(&s, block);
        s.registers[block as usize] = s.registers[block as usize].pending(pending);
        steps.push(Action::Send { op, to: record.primary, interval }, s);
    }

    /// A client's newer connection is there: what older ones bring is dropped (rule C1).
    pub(super) fn supersede(&self, s: &mut State, request: Request) -> bool {
        if !self.keeps(Rule::Connections) {
            return false;
        }
        let client = self.client(self.holder(request.op));
        let mut dropped = false;
        for slot in &mut s.requests {
            let older = |r: &Request| {
                let same = r.to == request.to && self.client(self.holder(r.op)) == client;
                same && r.connection < request.connection
            };
            if slot.as_ref().is_some_and(older) {
                (*slot, dropped) = (None, true);
            }
        }
        dropped
    }

    /// Operations that are refused whenever they come.
    pub(super) fn tidy_requests(&self, s: &mut State) -> u64 {
        let mut events = 0;
        for n in 0..s.requests.len() {
            let Some(r) = s.requests[n] else { continue };
            let map = *s.map_of(r.to);
            let old = r.interval < map.interval && self.keeps(Rule::OperationEpoch);
            let fenced = self.holder(r.op) < map.holder && self.keeps(Rule::Holder);
            for (refused, event) in [(old, Event::OldOperationRefused), (fenced, Event::FencedRefused)] {
                if refused {
                    events |= event.bit();
                    s.requests[n] = None;
                }
            }
        }
        s.requests.sort_unstable();
        events
    }
}
