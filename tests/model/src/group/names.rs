//! OSDs are alike: a state and the same one with other names for its OSDs are one state. And states in words.

use super::state::*;
use crate::explore::Fingerprint;
use std::fmt::{self, Write};
use std::hash::{Hash, Hasher};

/// The new name of each OSD.
type Names = [u8; OSDS];

const ALL: [Names; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// Equal for states that differ in names only. OSDs are put in the order of what can be said of each alone; only
/// those of which the same can be said are tried in every order.
pub fn fingerprint(s: &State, osds: u8) -> u64 {
    let mut said = [0u64; OSDS];
    for o in 0..osds {
        said[o as usize] = alone(s, o);
    }
    let in_order = |names: &Names| {
        let mut place = [0; OSDS];
        (0..OSDS).for_each(|o| place[names[o] as usize] = said[o]);
        // Without an OSD of that number there is nothing to say: such names stay as they are.
        let kept = (osds as usize..OSDS).all(|o| names[o] as usize == o);
        kept && place[..osds as usize].is_sorted()
    };
    let orders = ALL.iter().filter(|names| in_order(names));
    orders.map(|names| hash(&renamed(s, names))).min().unwrap_or_else(|| hash(s))
}

fn hash(s: &State) -> u64 {
    let mut h = Fingerprint::default();
    s.hash(&mut h);
    h.finish()
}

/// What can be said of an OSD without naming another one.
fn alone(s: &State, o: u8) -> u64 {
    let mut h = Fingerprint::default();
    let osd = &s.osds[o as usize];
    (osd.activated, osd.held, osd.missing, osd.map).hash(&mut h);
    match osd.phase {
        Phase::Idle => h.write_u8(0),
        Phase::Member { active } => h.write_u8(1 + u8::from(active)),
        Phase::Peering { told } => h.write_u8(8 + told.iter().flatten().count() as u8),
        Phase::Activating { plan, done } => (plan.needed, done.count_ones() as u8, 16u8).hash(&mut h),
        Phase::Active { plan, reading, .. } => (plan.needed, reading, 17u8).hash(&mut h),
    }
    for map in &s.monitors.maps {
        h.write_u8(u8::from(has(map.up, o)) | u8::from(has(map.placed, o)) << 1);
    }
    for i in &s.monitors.intervals {
        // A record that was forgotten names nobody.
        h.write_u8(u8::from(has(i.acting, o)) | u8::from(i.acting != 0 && i.primary == o) << 1);
    }
    h.write_u8(u8::from(has(s.monitors.suspects, o)));
    for r in s.requests.iter().flatten().filter(|r| r.to == o) {
        (r.op, r.interval, r.connection).hash(&mut h);
    }
    h.finish()
}

fn renamed(s: &State, names: &Names) -> State {
    if *names == ALL[0] {
        return *s;
    }
    let one = |o: u8| names.get(o as usize).copied().unwrap_or(o);
    let set = |x: Set| (0..OSDS as u8).filter(|o| has(x, *o)).fold(0, |all, o| all | 1 << one(o));
    let mut r = *s;
    for (o, osd) in s.osds.iter().enumerate() {
        let mut osd = *osd;
        match &mut osd.phase {
            Phase::Peering { told } => {
                let mut all = [None; OSDS];
                told.iter().enumerate().for_each(|(o, t)| all[names[o] as usize] = *t);
                *told = all;
            }
            Phase::Activating { plan, done } => (plan.lacks, *done) = (set(plan.lacks), set(*done)),
            Phase::Active { plan, writing, .. } => {
                plan.lacks = set(plan.lacks);
                writing.iter_mut().flatten().for_each(|w| w.acked = set(w.acked));
            }
            Phase::Idle | Phase::Member { .. } => {}
        }
        r.osds[names[o] as usize] = osd;
    }
    for map in &mut r.monitors.maps {
        (map.up, map.placed) = (set(map.up), set(map.placed));
    }
    for i in &mut r.monitors.intervals {
        if i.acting != 0 {
            (i.acting, i.primary) = (set(i.acting), one(i.primary));
        }
    }
    r.monitors.suspects = set(r.monitors.suspects);
    r.requests.iter_mut().flatten().for_each(|q| q.to = one(q.to));
    r.requests.sort_unstable();
    r
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Version::NONE => f.write_str("none"),
            v => write!(f, "{}.{}", v.interval(), v.0 & 15),
        }
    }
}

impl fmt::Debug for Needed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.version)?;
        self.uncertain.map_or(Ok(()), |lowest| write!(f, " (uncertain since {lowest:?})"))
    }
}

fn names_of(set: Set) -> String {
    members(set).map(|o| o.to_string()).collect::<Vec<_>>().join("")
}

/// One line.
pub fn describe(s: &State, osds: u8) -> String {
    let mut line = String::new();
    let map = s.monitors.map();
    let _ = write!(line, "map {}: up {{{}}}", s.monitors.newest, names_of(map.up));
    for i in 1..INTERVALS as u8 {
        let r = &s.monitors.intervals[i as usize];
        if r.acting != 0 || i == map.interval {
            let state = if r.clean {
                "clean"
            } else if r.activated {
                "activated"
            } else {
                ""
            };
            let past = if r.past == 0 { String::new() } else { format!(" past {}", names_of(r.past)) };
            let _ = write!(line, " | interval {i} {{{}}} of {} {state}{past}", names_of(r.acting), r.primary);
        }
    }
    for (o, osd) in s.osds[..osds as usize].iter().enumerate() {
        let _ = write!(line, "\n        osd.{o} map {} ", osd.map);
        let _ = match osd.phase {
            Phase::Idle => write!(line, "idle"),
            Phase::Member { active } => write!(line, "{}member", if active { "active " } else { "" }),
            Phase::Peering { told } => {
                let told =
                    told.iter().zip(0..).filter(|(t, _)| t.is_some()).fold(0, |all, (_, o)| all | 1 << o);
                write!(line, "peering, heard {{{}}}", names_of(told))
            }
            Phase::Activating { plan, done } => {
                write!(line, "activating {:?} at {{{}}}", plan.needed, names_of(done))
            }
            Phase::Active { plan, writing, .. } => {
                let _ = write!(line, "active {:?} lacking {{{}}}", plan.needed, names_of(plan.lacks));
                writing
                    .iter()
                    .flatten()
                    .try_for_each(|w| write!(line, ", writes {} as {:?}", w.op, w.version))
            }
        };
        let _ =
            write!(line, "; activated {} has {:?} {:?}", osd.activated, osd.held.version, osd.held.blocks);
        if let Some(n) = osd.missing {
            let _ = write!(line, " misses {n:?}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explore::Model;
    use crate::group::{Group, Next};
    use std::collections::HashSet;

    /// Along many paths: other names, the same fingerprint; and no two states of one path that differ in more share it.
    #[test]
    fn names_do_not_matter_and_everything_else_does() {
        let script = &[(0, 0), (1, 1)];
        let next_holders = &[Next::TakeOver];
        let group = Group { changes: 3, script, sends: 2, next_holders, osds: 3, moves: true, ..Group::TWO };
        let (mut steps, mut choice) = (Vec::new(), 1u64);
        let mut found = 0;
        for _ in 0..300 {
            let mut state = group.initial();
            let (mut seen, mut states) = (HashSet::new(), HashSet::new());
            for _ in 0..60 {
                let all: HashSet<State> = ALL.iter().map(|names| renamed(&state, names)).collect();
                let fingerprints: HashSet<u64> = all.iter().map(|s| fingerprint(s, 3)).collect();
                assert_eq!(fingerprints.len(), 1, "{}", describe(&state, 3));
                if !states.contains(&state) {
                    assert!(seen.insert(fingerprints.into_iter().next()), "{}", describe(&state, 3));
                    states.extend(all);
                }
                found += 1;
                group.next(&state, &mut steps);
                if steps.is_empty() {
                    break;
                }
                choice =
                    choice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state = steps.swap_remove((choice >> 33) as usize % steps.len()).state;
                steps.clear();
            }
        }
        assert!(found > 5_000, "{found} states");
    }
}
