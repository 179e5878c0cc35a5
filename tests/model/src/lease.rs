//! Leases over clocks that a model can count: an OSD that the monitors call down has no lease any more (rule P6).
//!
//! One OSD asks for leases; leaders are elected one after the other, and an earlier one may not have noticed. Requests and answers take
//! any time or are lost; a leader that is paused goes on later as if nothing had happened. What the monitors agree on is in the log of a
//! quorum: a proposal of an earlier leader is there when the next one is elected, or never will be. Written after
//! `monitor/src/decide`, whose argument it checks. [`crate::group`] builds on the result: an OSD has its lease while it is up.

use crate::explore::{Fingerprint, Model, Step};
use std::fmt;
use std::hash::{Hash, Hasher};

/// Ticks of a lease, by an exact clock.
const LEASE: u8 = 3;
/// What the OSD's clock may add; the monitors wait for longer by this.
const GRACE: u8 = 1;
const LEADERS: usize = 3;
const REQUESTS: usize = 2;

/// A rule that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseRule {
    /// The OSD counts its lease from when it asked.
    FromSending,
    /// The monitors wait for longer than the lease, for the drift of clocks.
    Grace,
    /// A lease is granted after a quorum has confirmed that this monitor still leads.
    Proof,
    /// A new leader waits for as long as a lease before it relies on silence.
    NewLeaderWaits,
    /// What a detector decides has an effect in its own term only.
    OwnTerm,
    /// A lease whose end was proposed is not renewed.
    NoRenewal,
    /// A leader carries out what earlier ones left in the log before it grants anything.
    LogFirst,
}

impl LeaseRule {
    pub const ALL: [LeaseRule; 7] = [
        LeaseRule::FromSending,
        LeaseRule::Grace,
        LeaseRule::Proof,
        LeaseRule::NewLeaderWaits,
        LeaseRule::OwnTerm,
        LeaseRule::NoRenewal,
        LeaseRule::LogFirst,
    ];
}

/// The lease was renewed by a leader that had already lost its office.
pub const LATE_GRANT: u64 = 1;
/// The OSD was called down.
pub const CALLED_DOWN: u64 = 2;
/// A leader found the decision of an earlier one in the log.
pub const INHERITED: u64 = 4;

/// Leases for ever, under up to three leaders.
pub struct Leases {
    pub leaders: u8,
    pub without: Option<LeaseRule>,
}

impl Leases {
    fn keeps(&self, rule: LeaseRule) -> bool {
        self.without != Some(rule)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stage {
    Sent,
    /// A quorum has confirmed the leader since it came.
    Confirmed,
    /// The answer is on its way.
    Granted,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Beat {
    sent: u8,
    leader: u8,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Leader {
    /// When the last lease that can exist has run out, as this leader reckons.
    ends: u8,
    proposed: bool,
    /// The log has an earlier leader's decision that was not carried out here.
    behind: bool,
    /// The decision was carried out here.
    knows: bool,
    /// A quorum has its first entry: what earlier leaders proposed and this one does not have is lost.
    settled: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    now: u8,
    /// By the OSD's clock, at worst.
    until: u8,
    beats: [Option<Beat>; REQUESTS],
    leaders: [Leader; LEADERS],
    /// The newest leader.
    term: u8,
    down: bool,
}

/// A step.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    Tick,
    Ask { leader: u8 },
    Confirm { leader: u8 },
    Grant { leader: u8 },
    Receive { sent: u8 },
    Lose,
    Elect { inherits: bool },
    CarryOut,
    Propose { leader: u8 },
    Agree { leader: u8 },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Model for Leases {
    type State = State;
    type Action = Action;

    fn initial(&self) -> State {
        // Granted at the first moment.
        let mut leaders = [Leader::default(); LEADERS];
        leaders[0] = Leader { ends: LEASE + GRACE, settled: true, ..Leader::default() };
        State { now: 0, until: LEASE + GRACE, beats: [None; REQUESTS], leaders, term: 0, down: false }
    }

    fn next(&self, from: &State, out: &mut Vec<Step<State, Action>>) {
        let s = *from;
        let from_sending = self.keeps(LeaseRule::FromSending);
        let mut step = |action, mut state: State, events| {
            // What nobody can make a lease of any more is as good as lost.
            let over = |b: &Beat| from_sending && b.sent + LEASE + GRACE <= state.now;
            state.beats.iter_mut().filter(|b| b.as_ref().is_some_and(over)).for_each(|b| *b = None);
            state.beats.sort_unstable();
            out.push(Step { action, state, events, broken: None });
        };
        step(Action::Tick, State { now: s.now + 1, ..s }, 0);
        let grace = if self.keeps(LeaseRule::Grace) { GRACE } else { 0 };
        for leader in 0..=s.term {
            let l = s.leaders[leader as usize];
            if let Some(free) = s.beats.iter().position(Option::is_none) {
                let mut s = s;
                s.beats[free] = Some(Beat { sent: s.now, leader, stage: Stage::Sent });
                step(Action::Ask { leader }, s, 0);
            }
            if s.now >= l.ends && !l.proposed && !l.behind {
                let mut s = s;
                s.leaders[leader as usize].proposed = true;
                step(Action::Propose { leader }, s, 0);
            }
            if l.proposed && (leader == s.term || !self.keeps(LeaseRule::OwnTerm)) && !s.down {
                let mut s = State { down: true, ..s };
                s.leaders[leader as usize].knows = true;
                step(Action::Agree { leader }, s, CALLED_DOWN);
            }
        }
        for n in 0..REQUESTS {
            let Some(beat) = s.beats[n] else { continue };
            let leader = beat.leader;
            let l = s.leaders[leader as usize];
            let mut lost = s;
            lost.beats[n] = None;
            step(Action::Lose, lost, 0);
            let mut s = s;
            match beat.stage {
                Stage::Sent if leader == s.term || !self.keeps(LeaseRule::Proof) => {
                    s.beats[n] = Some(Beat { stage: Stage::Confirmed, ..beat });
                    s.leaders[leader as usize].settled = true;
                    step(Action::Confirm { leader }, s, 0);
                }
                Stage::Sent => {}
                Stage::Confirmed => {
                    let behind = l.behind && self.keeps(LeaseRule::LogFirst);
                    let ending = l.proposed && self.keeps(LeaseRule::NoRenewal);
                    if !behind && !ending && !l.knows {
                        s.beats[n] = Some(Beat { stage: Stage::Granted, ..beat });
                        s.leaders[leader as usize].ends = s.now + LEASE + grace;
                        let events = if leader < s.term { LATE_GRANT } else { 0 };
                        step(Action::Grant { leader }, s, events);
                    }
                }
                Stage::Granted => {
                    let start = if self.keeps(LeaseRule::FromSending) { beat.sent } else { s.now };
                    s.until = s.until.max(start + LEASE + GRACE);
                    s.beats[n] = None;
                    step(Action::Receive { sent: beat.sent }, s, 0);
                }
            }
        }
        if s.term + 1 < self.leaders {
            let left = s.leaders[s.term as usize];
            let mut newest_first = s.leaders[..=s.term as usize].iter().rev();
            // Decisions of leaders before one that settled are lost.
            let last = newest_first.find(|l| l.proposed || l.behind || l.settled);
            let decided = last.is_some_and(|l| l.proposed || l.behind) && !s.down;
            let kept = s.down || (left.behind && left.settled);
            for inherits in [false, true] {
                if inherits && !decided && !s.down || !inherits && kept {
                    continue;
                }
                let mut s = s;
                s.term += 1;
                let waits = if self.keeps(LeaseRule::NewLeaderWaits) { LEASE + grace } else { 0 };
                s.leaders[s.term as usize] =
                    Leader { ends: s.now + waits, behind: inherits, ..Leader::default() };
                step(Action::Elect { inherits }, s, if inherits { INHERITED } else { 0 });
            }
        }
        if s.leaders[s.term as usize].behind {
            let mut s = s;
            let l = &mut s.leaders[s.term as usize];
            (l.behind, l.knows) = (false, true);
            s.down = true;
            step(Action::CarryOut, s, CALLED_DOWN);
        }
    }

    fn check(&self, s: &State) -> Result<(), &'static str> {
        match s.down && s.now < s.until {
            true => Err("an OSD that is called down has a lease"),
            false => Ok(()),
        }
    }

    /// Only what is left of a time and how long ago something was matter, so there are not more states for more time.
    fn fingerprint(&self, s: &State) -> u64 {
        let mut s = *s;
        s.until = s.until.saturating_sub(s.now);
        s.leaders.iter_mut().for_each(|l| l.ends = l.ends.saturating_sub(s.now));
        s.beats.iter_mut().flatten().for_each(|b| b.sent = (s.now - b.sent).min(2 * LEASE));
        s.now = 0;
        let mut h = Fingerprint::default();
        s.hash(&mut h);
        h.finish()
    }

    fn describe(&self, s: &State) -> String {
        let down = if s.down { ", down" } else { "" };
        format!("tick {}, leader {}, lease until {}{down}", s.now, s.term, s.until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explore::explore;

    const LEASES: Leases = Leases { leaders: 3, without: None };

    #[test]
    fn who_is_called_down_has_no_lease() {
        let all = explore(&LEASES, 3_000_000);
        println!("{} states, {} steps, depth {}", all.states, all.transitions, all.depth);
        assert!(all.found.is_none(), "{}", all.found.unwrap());
        assert!(all.complete && all.states > 10_000);
        assert_eq!(all.events, LATE_GRANT | CALLED_DOWN | INHERITED, "what must be reached");
    }

    #[test]
    fn every_rule_of_leases_is_needed() {
        for rule in LeaseRule::ALL {
            let found = explore(&Leases { without: Some(rule), ..LEASES }, 3_000_000).found;
            let found = found.unwrap_or_else(|| panic!("nobody misses {rule:?}"));
            println!("without {rule:?}, {found}\n");
            assert_eq!(found.property, "an OSD that is called down has a lease");
        }
    }
}
