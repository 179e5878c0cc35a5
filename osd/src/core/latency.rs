//! How long sub-operations take, at the own disk and at each peer, and when a read may be asked for a second time.
//!
//! Samples are whole milliseconds of a clock that knows nothing finer. Their mean is right all the same: where an operation
//! begins within its millisecond is chance, so what rounding takes from one it gives to another. A window is
//! handed to the monitors when it is over; they compare OSDs with each other (`monitor/src/decide/slow.rs`).
//!
//! A read is *hedged*, asked of somebody else as well, once it has waited for three times what 95 of 100 take at the median
//! member. Overload must not grow by that: every read earns a tenth of a hedge, and more than that is spent
//! only on going around an OSD that the monitors call slow, which its peers are not.

use super::Millis;
use gabion_proto::ids::{OsdId, PgId};
use gabion_proto::limits::{LATENCY_PEERS_MAX, LATENCY_WINDOW};
use gabion_proto::pb;
use std::collections::{BTreeMap, BTreeSet};

/// Classes of time: 0, 1, 2 to 3, 4 to 7, ... milliseconds.
const CLASSES: usize = 20;
/// Peers that are measured at a time.
const PEERS_MAX: usize = 1_024;
/// Fewer reads in a window say nothing of what 95 of 100 take.
const READS_MIN: u64 = 8;
/// What is known of a member's reads is forgotten after so many windows without any.
const FORGET_WINDOWS: u64 = 60;
/// Bounds of what a read waits for before it is hedged.
const HEDGE_MIN_MS: Millis = 20;
pub const HEDGE_MAX_MS: Millis = 1_000;
/// While nothing is known.
const HEDGE_FIRST_MS: Millis = 100;
/// So many percent of reads may be hedged, and so many hedges be saved up.
const HEDGE_PERCENT: u64 = 10;
const HEDGES_SAVED: u64 = 32;

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write,
    Read,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: u64,
    sum_ms: u64,
    classes: [u32; CLASSES],
}

impl Sums {
    fn add(&mut self, ms: Millis) {
        self.count += 1;
        self.sum_ms = self.sum_ms.saturating_add(ms);
        let class = (Millis::BITS - ms.leading_zeros()) as usize;
        let class = &mut self.classes[class.min(CLASSES - 1)];
        *class = class.saturating_add(1);
    }

    /// 95 of 100 took less.
    fn p95_ms(&self) -> Millis {
        let mut others = self.count * 5 / 100;
        for (class, n) in self.classes.iter().enumerate().rev() {
            match others.checked_sub(u64::from(*n)) {
                Some(rest) => others = rest,
                None => return 1 << class,
            }
        }
        1
    }

    fn figures(&self) -> Option<pb::LatencyFigures> {
        (self.count > 0).then(|| pb::LatencyFigures {
            count: self.count,
            mean_us: self.sum_ms.saturating_mul(1_000) / self.count,
            p95_us: self.p95_ms() * 1_000,
        })
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Peer {
    writes: Sums,
    reads: Sums,
}

/// See the module docs.
#[derive(Clone, Debug)]
pub struct Latencies {
    own: OsdId,
    began: Millis,
    number: u64,
    peers: BTreeMap<OsdId, Peer>,
    last: pb::LatencyWindow,
    /// What 95 of 100 reads of a member take less than, and in which window that was.
    reads_p95_ms: BTreeMap<OsdId, (Millis, u64)>,
    hedge_ms: Millis,
    /// Hundredths of hedges that may be spent.
    savings: u64,
    /// Whom the monitors call slow.
    slow: BTreeSet<OsdId>,
    wake_at: Option<Millis>,
    /// Groups with reads that may be late then; those without cost nothing.
    reading: BTreeSet<PgId>,
}

impl Latencies {
    pub fn new(own: OsdId, now: Millis) -> Latencies {
        Latencies {
            own,
            began: now,
            number: 0,
            peers: BTreeMap::new(),
            last: pb::LatencyWindow::default(),
            reads_p95_ms: BTreeMap::new(),
            hedge_ms: HEDGE_FIRST_MS,
            savings: HEDGES_SAVED * 100,
            slow: BTreeSet::new(),
            wake_at: None,
            reading: BTreeSet::new(),
        }
    }

    /// An operation of `osd`, this one or a peer, has taken so long.
    pub fn took(&mut self, osd: OsdId, kind: Kind, ms: Millis) {
        if self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&osd) {
            return;
        }
        let peer = self.peers.entry(osd).or_default();
        match kind {
            Kind::Write => peer.writes.add(ms),
            Kind::Read => peer.reads.add(ms),
        }
    }

    pub fn elapse(&mut self, now: Millis) {
        let length_ms = now.saturating_sub(self.began);
        if u128::from(length_ms) < LATENCY_WINDOW.as_millis() {
            return;
        }
        (self.began, self.number) = (now, self.number + 1);
        let peers = std::mem::take(&mut self.peers);
        let known = peers.iter().filter(|(_, p)| p.reads.count >= READS_MIN);
        self.reads_p95_ms.extend(known.map(|(osd, p)| (*osd, (p.reads.p95_ms(), self.number))));
        self.reads_p95_ms.retain(|_, (_, window)| *window + FORGET_WINDOWS > self.number);
        self.hedge_ms = self.hedge_after();
        let mut told: Vec<(u64, pb::PeerLatency)> = peers
            .iter()
            .map(|(osd, p)| {
                let (writes, reads) = (p.writes.figures(), p.reads.figures());
                (p.writes.count + p.reads.count, pb::PeerLatency { osd: osd.0, writes, reads })
            })
            .collect();
        told.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
        let peers = told.into_iter().map(|(_, p)| p).take(LATENCY_PEERS_MAX).collect();
        self.last = pb::LatencyWindow { number: self.number, length_ms, peers };
    }

    /// Three times what the median member takes, the faster one of two. The own disk alone is no measure for itself.
    fn hedge_after(&self) -> Millis {
        let mut known: Vec<Millis> = self.reads_p95_ms.values().map(|(ms, _)| *ms).collect();
        known.sort_unstable();
        let peers = self.reads_p95_ms.keys().any(|o| *o != self.own);
        match known.get(known.len().saturating_sub(1) / 2).filter(|_| peers) {
            Some(ms) => (3 * ms).clamp(HEDGE_MIN_MS, HEDGE_MAX_MS),
            None => HEDGE_FIRST_MS,
        }
    }

    /// The last whole window.
    pub fn window(&self) -> &pb::LatencyWindow {
        &self.last
    }

    pub fn set_slow(&mut self, slow: impl IntoIterator<Item = OsdId>) {
        self.slow = slow.into_iter().collect();
    }

    pub fn is_slow(&self, osd: OsdId) -> bool {
        self.slow.contains(&osd)
    }

    /// For ordering members, the fastest first: slow ones last, then by what is known of their reads.
    pub fn rank(&self, osd: OsdId) -> (bool, Millis) {
        (self.is_slow(osd), self.reads_p95_ms.get(&osd).map_or(0, |(ms, _)| *ms))
    }

    /// A read of a group has begun that may be hedged: when that is to be looked at.
    pub fn read_begun(&mut self, pg: PgId, now: Millis) {
        self.savings = (self.savings + HEDGE_PERCENT).min(HEDGES_SAVED * 100);
        self.wake(pg, now + self.hedge_ms);
    }

    /// What a read waits for before it is hedged.
    pub fn hedge_ms(&self) -> Millis {
        self.hedge_ms
    }

    /// Whether one more read may be hedged that waits for `late`; spends it.
    pub fn spend_hedge(&mut self, late: impl IntoIterator<Item = OsdId>) -> bool {
        let mut late = late.into_iter().peekable();
        if late.peek().is_some() && late.all(|o| self.is_slow(o)) {
            return true;
        }
        let left = self.savings.checked_sub(100);
        self.savings = left.unwrap_or(self.savings);
        left.is_some()
    }

    /// Reads of the group are to be looked at then.
    pub fn wake(&mut self, pg: PgId, at: Millis) {
        self.reading.insert(pg);
        self.wake_at = Some(self.wake_at.map_or(at, |w| w.min(at)));
    }

    pub fn wake_at(&self) -> Option<Millis> {
        self.wake_at
    }

    /// Groups whose reads are to be looked at now; those whose time is still to come say so again.
    pub fn take_due(&mut self, now: Millis) -> BTreeSet<PgId> {
        match self.wake_at.take_if(|at| *at <= now) {
            Some(_) => std::mem::take(&mut self.reading),
            None => BTreeSet::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gabion_proto::ids::PoolId;

    const WINDOW_MS: Millis = LATENCY_WINDOW.as_millis() as Millis;
    const PG: PgId = PgId { pool: PoolId(1), index: 0 };

    fn window(l: &mut Latencies, n: u64) -> &pb::LatencyWindow {
        l.elapse(n * WINDOW_MS);
        l.window()
    }

    #[test]
    fn a_window_is_handed_over_when_it_is_over() {
        let mut l = Latencies::new(OsdId(1), 0);
        (0..10).for_each(|_| l.took(OsdId(2), Kind::Write, 3));
        l.elapse(WINDOW_MS - 1);
        assert_eq!(l.window().number, 0);
        let w = window(&mut l, 1).clone();
        assert_eq!((w.number, w.length_ms, w.peers.len()), (1, WINDOW_MS, 1));
        let writes = w.peers[0].writes.unwrap();
        assert_eq!((writes.count, writes.mean_us, writes.p95_us), (10, 3_000, 4_000));
        assert!(w.peers[0].reads.is_none());
        assert_eq!(window(&mut l, 2).peers, []);
    }

    /// Operations of 300 us on a clock of milliseconds.
    #[test]
    fn the_mean_is_finer_than_the_clock() {
        let mut l = Latencies::new(OsdId(1), 0);
        for n in 0..100_000u64 {
            let began_us = n * 777;
            l.took(OsdId(1), Kind::Read, (began_us + 300) / 1_000 - began_us / 1_000);
        }
        let mean = window(&mut l, 1).peers[0].reads.unwrap().mean_us;
        assert!((295..=305).contains(&mean), "{mean}");
    }

    #[test]
    fn ninety_five_of_a_hundred() {
        for (slow, p95) in [(0, 1_000), (4, 1_000), (5, 1_000), (6, 1_024_000), (100, 1_024_000)] {
            let mut l = Latencies::new(OsdId(1), 0);
            (0..100).for_each(|n| l.took(OsdId(1), Kind::Read, if n < slow { 900 } else { 0 }));
            assert_eq!(window(&mut l, 1).peers[0].reads.unwrap().p95_us, p95, "{slow} slow ones");
        }
    }

    #[test]
    fn the_busiest_peers_are_told_of() {
        let mut l = Latencies::new(OsdId(1), 0);
        for osd in 0..400 {
            (0..=osd).for_each(|_| l.took(OsdId(osd), Kind::Write, 1));
        }
        let w = window(&mut l, 1);
        assert_eq!(w.peers.len(), LATENCY_PEERS_MAX);
        assert!(w.peers.iter().all(|p| p.osd >= 400 - LATENCY_PEERS_MAX as u32));
    }

    #[test]
    fn one_slow_member_does_not_make_hedges_later() {
        let mut l = Latencies::new(OsdId(1), 0);
        assert_eq!(l.hedge_ms(), HEDGE_FIRST_MS);
        for n in 1..=6 {
            let ms = if n == 1 { 400 } else { 10 };
            (0..50).for_each(|_| l.took(OsdId(n), Kind::Read, ms));
        }
        window(&mut l, 1);
        assert_eq!(l.hedge_ms(), 3 * 16);
        // What is slow everywhere is no reason to ask twice.
        for n in 1..=6 {
            (0..50).for_each(|_| l.took(OsdId(n), Kind::Read, 400));
        }
        window(&mut l, 2);
        assert_eq!(l.hedge_ms(), HEDGE_MAX_MS);
        for n in 3..=2 + FORGET_WINDOWS {
            window(&mut l, n);
        }
        assert_eq!(l.hedge_ms(), HEDGE_FIRST_MS);
    }

    #[test]
    fn a_tenth_of_reads_is_hedged_and_what_is_slow_is_gone_around() {
        let mut l = Latencies::new(OsdId(1), 0);
        let hedged = |l: &mut Latencies| {
            let one = |_: &u64| {
                l.read_begun(PG, 0);
                l.spend_hedge([OsdId(3)])
            };
            (0..10_000).filter(one).count()
        };
        let first = hedged(&mut l);
        assert!((1_000..=1_000 + HEDGES_SAVED as usize).contains(&first), "{first}");
        assert_eq!(hedged(&mut l), 1_000);
        l.set_slow([OsdId(3)]);
        assert_eq!(hedged(&mut l), 10_000);
        while l.spend_hedge([OsdId(4)]) {}
        assert!(!l.spend_hedge([OsdId(3), OsdId(4)]) && !l.spend_hedge([]));
    }

    #[test]
    fn the_first_deadline_wakes() {
        let mut l = Latencies::new(OsdId(1), 0);
        let other = PgId { index: 9, ..PG };
        l.wake(PG, 50);
        l.wake(other, 70);
        assert!(l.take_due(49).is_empty());
        assert_eq!(l.take_due(50), [PG, other].into());
        assert!(l.take_due(70).is_empty());
    }
}
