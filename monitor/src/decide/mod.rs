//! Who is dead: leases, down, out, and peers that do not work together. Pure: time is an argument
//! (any clock that does not stop or run backwards; leases rely on nothing else), state is an
//! argument, decisions are commands.
//!
//! Invariants (rule P6): an OSD is declared dead by silence only when the last lease it can hold has
//! certainly run out; a detector that starts, after a restart or on a new leader, assumes that a
//! lease was granted a moment ago; once an OSD's lease has run out, it is not renewed any more.
//! Hints (gossip) never declare anybody dead.
//!
//! # Why no lease outlasts the leader who granted it by more than the next one waits
//!
//! A detector belongs to one term of one leader. Around it hold three rules (`raft::standing`,
//! `grpc::leadership`, `state::requests`):
//!
//! 1. *Proof.* A heartbeat that came in is answered only after a quorum has confirmed, in a round that
//!    began after it came, that this monitor still leads; and after everything that earlier leaders left
//!    in the log has been carried out here.
//! 2. *Wait.* A new term begins with a new detector, made after the leader was elected, which waits a
//!    whole lease and its grace before it relies on silence.
//! 3. *Term.* What a detector decides is agreed on in its own term or has no effect.
//!
//! Let leader A of term a grant a lease to an OSD that sent its request at time s, and let B be elected
//! for a later term at time e.
//!
//! - *A granted while B was elected or later.* By rule 1 some member q of a quorum acknowledged A after s.
//!   The quorum that elected B has a member in common with it, and once that one had voted for B it
//!   acknowledged A no more: so s came before e. The OSD counts its lease from s, so it ends before
//!   e + lease; B's detector was made after e and says *down* after e + lease + grace (rule 2). No clock
//!   of A matters: it may have been paused or cut off for as long as it likes.
//! - *B has the OSD down because A decided so.* A's MarkDown was proposed when no lease that A had granted
//!   was left, nor one of a leader before A (the same argument), and A renews none afterwards. If it was
//!   in the log when B was elected, B carries it out before its first grant (rule 1); if it was not, it
//!   can never be agreed on any more, since B's first entry took its place; and if A leads again later and
//!   proposes it then, it has no effect (rule 3). So nobody grants between that decision and its effect.
//! - *Drift.* Clocks run at rates that differ by less than 1 in 1,000: less than a hundredth of the grace.
//!
//! An OSD that is paused with a lease in hand and goes on afterwards must notice by its own clock, which
//! counts pauses of the machine (CLOCK_BOOTTIME).

pub mod slow;

use crate::state::{Command, MonitorState};
use gabion_proto::ids::*;
use gabion_proto::{limits, pb};
use slow::{Slow, SlowDetector};
use std::collections::BTreeMap;

/// How long a group goes on without a suspect before it tries it again.
pub const SUSPECT_MS: u64 = 60_000;
/// How long a decision may take to be agreed on before it is proposed again.
const PROPOSE_AGAIN_MS: u64 = 1_000;

/// The times that decisions depend on.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Length of a lease, plus what drift and scheduling may add.
    pub lease_ms: u64,
    /// Down for this long means out.
    pub down_out_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            lease_ms: (limits::LEASE + limits::LEASE_GRACE).as_millis() as u64,
            down_out_ms: limits::DOWN_OUT_DEFAULT.as_millis() as u64,
        }
    }
}

/// What the detector is told.
#[derive(Clone, Debug)]
pub enum Event {
    /// Time has passed. Send one several times per second.
    Tick,
    /// A clean stop: nothing is served under its lease any more.
    Goodbye { osd: OsdId, incarnation: Incarnation },
    /// The primary `osd` has waited `age_ms` for `peer` (rule P8), or cannot go on itself: then it is the peer.
    Stuck {
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
        peer: OsdId,
        peer_incarnation: Incarnation,
        age_ms: u64,
    },
}

#[derive(Debug)]
struct Lease {
    incarnation: Incarnation,
    /// No lease that was granted reaches this time.
    ends_ms: u64,
    /// When its end was last proposed; from then on it is not renewed.
    proposed_ms: Option<u64>,
}

/// Decides who is down, out, and left out.
#[derive(Debug)]
pub struct FailureDetector {
    timing: Timing,
    leases: BTreeMap<OsdId, Lease>,
    down_since_ms: BTreeMap<OsdId, u64>,
    suspect_since_ms: BTreeMap<(PgId, OsdId, Incarnation), u64>,
    slow: SlowDetector,
    /// When something last stood against taking a slow OSD out.
    kept_ms: BTreeMap<OsdId, u64>,
}

impl FailureDetector {
    /// A detector that has heard from nobody yet.
    pub fn new(timing: Timing) -> FailureDetector {
        FailureDetector {
            timing,
            leases: BTreeMap::new(),
            down_since_ms: BTreeMap::new(),
            suspect_since_ms: BTreeMap::new(),
            slow: SlowDetector::default(),
            kept_ms: BTreeMap::new(),
        }
    }

    /// Takes in how long operations took, as an OSD that is up as `incarnation` tells.
    pub fn latency(
        &mut self,
        now_ms: u64,
        state: &MonitorState,
        (osd, incarnation): (OsdId, Incarnation),
        window: &pb::LatencyWindow,
    ) {
        self.slow.report(now_ms, state, osd, incarnation, window);
    }

    /// OSDs that answer much slower than the others.
    pub fn slow(&self) -> Vec<Slow> {
        self.slow.slow().collect()
    }

    /// Whether the lease of this run of an OSD may be renewed now; call it right before the answer
    /// is sent. The OSD counts the lease from when it asked, which was earlier, so what is
    /// remembered here ends later than what the OSD believes.
    pub fn renew(&mut self, now_ms: u64, state: &MonitorState, osd: OsdId, incarnation: Incarnation) -> bool {
        if state.map.up_osd(osd).is_none_or(|o| o.incarnation != incarnation) {
            return false;
        }
        let ends_ms = now_ms + self.timing.lease_ms;
        let lease = self.leases.entry(osd).or_insert(Lease { incarnation, ends_ms, proposed_ms: None });
        if lease.incarnation != incarnation {
            *lease = Lease { incarnation, ends_ms, proposed_ms: None };
        }
        if lease.proposed_ms.is_some() {
            return false;
        }
        lease.ends_ms = ends_ms;
        true
    }

    /// Takes in an event and answers what should be agreed on. Decisions that did not come about are
    /// answered again later.
    pub fn step(&mut self, now_ms: u64, state: &MonitorState, event: Event) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Tick => {
                self.check_leases(now_ms, state, &mut out);
                self.check_down(now_ms, state, &mut out);
                self.slow.tick(now_ms, state);
                self.check_suspects(now_ms, state, &mut out);
                self.check_slow(now_ms, state, &mut out);
            }
            Event::Goodbye { osd, incarnation } => {
                let current = state.map.up_osd(osd).is_some_and(|o| o.incarnation == incarnation);
                if current {
                    self.leases
                        .insert(osd, Lease { incarnation, ends_ms: now_ms, proposed_ms: Some(now_ms) });
                    out.push(Command::MarkDown { osd, incarnation, reason: "it was stopped".into() });
                }
            }
            Event::Stuck { osd, incarnation, pg, interval, peer, peer_incarnation, age_ms } => {
                let current = state.map.pgs.get(&pg).is_some_and(|r| {
                    r.interval == interval && r.primary == Some(osd) && r.acting.contains(&peer)
                });
                let peer_up = state.map.up_osd(peer).is_some_and(|o| o.incarnation == peer_incarnation);
                if current && peer_up && age_ms >= state.slow_policy.limit_ms {
                    out.push(Command::SuspectPeer { osd, incarnation, pg, interval, peer, peer_incarnation });
                }
            }
        }
        out
    }

    fn check_leases(&mut self, now_ms: u64, state: &MonitorState, out: &mut Vec<Command>) {
        let map = &state.map;
        self.leases.retain(|osd, l| map.up_osd(*osd).is_some_and(|o| o.incarnation == l.incarnation));
        for (osd, info) in map.osds.iter().filter(|(_, info)| info.up) {
            // Not heard from yet: another monitor may have granted a lease until just now.
            let lease = self.leases.entry(*osd).or_insert(Lease {
                incarnation: info.incarnation,
                ends_ms: now_ms + self.timing.lease_ms,
                proposed_ms: None,
            });
            let due = lease.proposed_ms.is_none_or(|p| now_ms >= p + PROPOSE_AGAIN_MS);
            if now_ms >= lease.ends_ms && due {
                lease.proposed_ms = Some(now_ms);
                let reason = "its lease ran out without a sign of life".into();
                out.push(Command::MarkDown { osd: *osd, incarnation: info.incarnation, reason });
            }
        }
    }

    fn check_down(&mut self, now_ms: u64, state: &MonitorState, out: &mut Vec<Command>) {
        let map = &state.map;
        self.down_since_ms.retain(|osd, _| map.osds.get(osd).is_some_and(|o| !o.up && o.in_cluster));
        for (osd, _) in map.osds.iter().filter(|(_, o)| !o.up && o.in_cluster) {
            let since_ms = self.down_since_ms.entry(*osd).or_insert(now_ms);
            if now_ms >= *since_ms + self.timing.down_out_ms {
                out.push(Command::OutOsd { osd: *osd, automatic: true });
            }
        }
    }

    fn check_suspects(&mut self, now_ms: u64, state: &MonitorState, out: &mut Vec<Command>) {
        self.suspect_since_ms
            .retain(|(pg, osd, inc), _| state.suspects.get(pg).is_some_and(|s| s.contains(&(*osd, *inc))));
        for (pg, suspects) in &state.suspects {
            for (peer, incarnation) in suspects {
                let since_ms = self.suspect_since_ms.entry((*pg, *peer, *incarnation)).or_insert(now_ms);
                // While it is slow another try costs clients as long a wait as the last one.
                if now_ms >= *since_ms + SUSPECT_MS && !self.slow.is_slow(*peer, *incarnation) {
                    out.push(Command::ClearSuspect { pg: *pg, peer: *peer, peer_incarnation: *incarnation });
                }
            }
        }
    }

    /// By policy an OSD that stays slow is taken out. The time counts only while nothing stands against it: a rebuild makes slow, too.
    fn check_slow(&mut self, now_ms: u64, state: &MonitorState, out: &mut Vec<Command>) {
        let slow = self.slow();
        self.kept_ms.retain(|osd, _| slow.iter().any(|s| s.osd == *osd));
        let after_ms = state.slow_policy.evict_after_s.saturating_mul(1_000);
        for s in slow {
            if state.evictable(s.osd, s.incarnation).is_err() {
                self.kept_ms.insert(s.osd, now_ms);
            }
            let since_ms = self.kept_ms.get(&s.osd).copied().unwrap_or(0).max(s.since_ms);
            if after_ms > 0 && now_ms >= since_ms.saturating_add(after_ms) && out.is_empty() {
                out.push(Command::EvictSlow { osd: s.osd, incarnation: s.incarnation });
            }
        }
    }
}

#[cfg(test)]
mod tests;
