//! Positions of erasure-coded groups: who gets one, who is held back, and who may be let go.

use super::tests::{activate, boot, can_be_told, clean, down, pg, report};
use super::*;
use gabion_proto::map::{FailureDomain, PgRecord, Redundancy};
use proptest::prelude::*;

/// A pool 2+1 that serves with all three members only.
fn cluster(osds: u8, pg_count: u32) -> MonitorState {
    let mut state = MonitorState::default();
    state.apply(0, Command::Bootstrap { cluster: ClusterId([9; 16]) }).unwrap();
    for n in 0..osds {
        let (disk, host) = (ClusterId([n + 1; 16]), format!("h{n}"));
        let rack = String::new();
        state.apply(0, Command::AddOsd { disk, host, rack, weight: 0, capacity_bytes: 1 << 40 }).unwrap();
        boot(&mut state, n).unwrap();
    }
    let redundancy = Redundancy::Erasure { k: 2, m: 1 };
    let (name, failure_domain) = ("p".into(), FailureDomain::Host);
    let pool =
        Command::CreatePool { name, redundancy, min_size: 3, failure_domain, pg_count, object_bytes: 0 };
    state.apply(0, pool).unwrap();
    state
}

fn out(state: &mut MonitorState, osd: OsdId) {
    down(state, osd.0);
    state.apply(0, Command::OutOsd { osd, automatic: true }).unwrap();
}

fn filled(state: &mut MonitorState, pg: PgId) -> CommandResult {
    let (osd, incarnation, interval) = report(state, pg);
    state.apply(0, Command::PgFilled { osd, incarnation, pg, interval })
}

fn record(state: &MonitorState) -> &PgRecord {
    &state.map.pgs[&pg(0)]
}

/// The first member went away, the spare one took over; the second is lost, and the first is back. What the group was, and is.
fn held_back() -> (MonitorState, Vec<OsdId>, OsdId) {
    let mut state = cluster(4, 1);
    let was = record(&state).acting.clone();
    let spare = state.map.osds.keys().copied().find(|o| !was.contains(o)).unwrap();
    activate(&mut state, pg(0));
    out(&mut state, was[0]);
    assert_eq!(record(&state).acting, [spare, was[1], was[2]]);
    activate(&mut state, pg(0));
    out(&mut state, was[1]);
    boot(&mut state, was[0].0 as u8).unwrap();
    (state, was, spare)
}

#[test]
fn who_is_held_back_is_let_go_when_the_members_have_everything() {
    let (mut state, was, spare) = held_back();
    assert_eq!(record(&state).up, [spare, was[0], was[2]]);
    assert_eq!(record(&state).acting, [spare, OsdId::NONE, was[2]], "its old shard may be needed");
    assert_eq!(record(&state).held_back().collect::<Vec<_>>(), [was[0]]);

    let begun = record(&state).interval;
    let (osd, incarnation, interval) = report(&state, pg(0));
    let of = |incarnation, interval| Command::PgFilled { osd, incarnation, pg: pg(0), interval };
    for stale in [of(incarnation, Epoch(interval.0 - 1)), of(Incarnation(99), interval)] {
        assert_eq!(state.apply(0, stale).unwrap_err().kind, RefusalKind::Aborted);
    }
    filled(&mut state, pg(0)).unwrap();
    let r = record(&state);
    assert_eq!(r.acting, [spare, was[0], was[2]]);
    assert!(r.interval > begun && !r.activated && !r.clean);
    // Both intervals may have taken writes; of the lost one's shard nobody has more than it had.
    let past: Vec<&[OsdId]> = r.past.iter().map(|p| p.acting.as_slice()).collect();
    assert_eq!(past, [[spare, was[1], was[2]]]);
    assert_eq!(state.apply(0, of(incarnation, interval)).unwrap_err().kind, RefusalKind::Aborted, "again");
    activate(&mut state, pg(0));
    assert_eq!(filled(&mut state, pg(0)).unwrap_err().kind, RefusalKind::Precondition, "it serves");
    clean(&mut state, pg(0));
}

/// It may still serve reads, as the primary of an interval of which it is no member any more.
#[test]
fn who_is_let_go_may_have_been_primary() {
    let (mut state, was, _) = held_back();
    let mut r = record(&state).clone();
    r.past.iter_mut().for_each(|p| p.primary = Some(was[0]));
    state.map.pgs.insert(pg(0), r.into());
    filled(&mut state, pg(0)).unwrap();
    let past = &record(&state).past[0];
    assert!(past.primary == Some(was[0]) && !past.acting.contains(&was[0]));
    assert!(can_be_told(&state));
}

#[test]
fn who_has_the_shard_of_an_empty_position_is_not_let_go() {
    let (mut state, was, spare) = held_back();
    // Of the first position only the first member has anything now.
    down(&mut state, spare.0);
    assert_eq!(record(&state).acting, [OsdId::NONE, OsdId::NONE, was[2]]);
    assert_eq!(filled(&mut state, pg(0)).unwrap_err().kind, RefusalKind::Precondition, "one does not decode");
    let mut state = held_back().0;
    let mut other = record(&state).clone();
    other.acting = vec![OsdId::NONE, was[1], was[2]];
    assert!(!intervals::stand_in_for(&mut other, was[0]));
    assert_eq!(other.place_of(was[0]), Some(0));
    state.apply(0, Command::SetPool { name: "p".into(), min_size: Some(2) }).unwrap();
    assert_eq!(record(&state).acting, [spare, OsdId::NONE, was[2]], "it may serve now, and is not clean");
}

#[test]
fn groups_of_whole_copies_have_no_positions() {
    let mut state = super::tests::cluster(3, 1);
    down(&mut state, 0);
    assert_eq!(filled(&mut state, pg(0)).unwrap_err().kind, RefusalKind::Precondition);
}

#[derive(Clone, Debug)]
enum Step {
    Boot(u8),
    Down(u8),
    Out(u8),
    In(u8),
    Activate(u32),
    Clean(u32),
    Fill(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..6u8).prop_map(Step::Boot),
        2 => (0..6u8).prop_map(Step::Down),
        2 => (0..6u8).prop_map(Step::Out),
        3 => (0..6u8).prop_map(Step::In),
        4 => (0..2u32).prop_map(Step::Activate),
        1 => (0..2u32).prop_map(Step::Clean),
        3 => (0..2u32).prop_map(Step::Fill),
    ];
    proptest::collection::vec(step, 1..80)
}

/// Who has everything that an interval wrote for a position.
type Holders = BTreeMap<(Epoch, usize), BTreeSet<OsdId>>;

fn of(record: &PgRecord) -> impl Iterator<Item = (usize, OsdId)> + '_ {
    record.acting.iter().copied().enumerate().filter(|(_, o)| *o != OsdId::NONE)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// Whatever happens: nobody gets another position while it is the last one to have a shard, and of every interval that took
    /// writes the record names those who have its shards.
    #[test]
    fn no_shard_is_let_go(steps in steps()) {
        let mut state = cluster(6, 2);
        let mut holders: BTreeMap<PgId, Holders> = BTreeMap::new();
        for step in steps {
            let before = state.map.pgs.clone();
            match step {
                Step::Boot(n) => _ = boot(&mut state, n),
                Step::Down(n) if state.map.osds[&OsdId(n.into())].up => down(&mut state, n.into()),
                Step::Down(_) => {}
                Step::Out(n) => _ = state.apply(0, Command::OutOsd { osd: OsdId(n.into()), automatic: false }),
                Step::In(n) => _ = state.apply(0, Command::InOsd { osd: OsdId(n.into()) }),
                Step::Activate(i) | Step::Clean(i) | Step::Fill(i) if state.map.pgs[&pg(i)].primary.is_some() => {
                    let (osd, incarnation, interval) = report(&state, pg(i));
                    let (pg, holders) = (pg(i), holders.entry(pg(i)).or_default());
                    let command = match step {
                        Step::Activate(_) => Command::PgActivated { osd, incarnation, pg, interval },
                        Step::Clean(_) => Command::PgClean { osd, incarnation, pg, interval },
                        _ => Command::PgFilled { osd, incarnation, pg, interval },
                    };
                    if state.apply(0, command).is_ok() {
                        match step {
                            Step::Clean(_) => holders.clear(),
                            // Its members were brought up to date.
                            Step::Fill(_) => for ((_, position), who) in holders.iter_mut() {
                                who.extend(of(&before[&pg]).filter(|(p, _)| p == position).map(|(_, o)| o));
                            },
                            _ => {}
                        }
                        if !matches!(step, Step::Fill(_)) {
                            holders.extend(of(&before[&pg]).map(|(p, o)| ((interval, p), BTreeSet::from([o]))));
                        }
                    }
                }
                _ => {}
            }
            prop_assert!(can_be_told(&state), "{:?}", state.map);
            for (id, record) in &state.map.pgs {
                let holders = holders.entry(*id).or_default();
                for (position, osd) in of(record) {
                    // It keeps one shard.
                    let others = holders.iter_mut().filter(|((_, p), _)| *p != position);
                    others.for_each(|(_, who)| _ = who.remove(&osd));
                }
                prop_assert!(holders.values().all(|who| !who.is_empty()), "{}: {:?}", record.interval, holders);
                let intervals: BTreeSet<Epoch> = holders.keys().map(|(i, _)| *i).collect();
                for interval in intervals {
                    let written = holders.range((interval, 0)..=(interval, usize::MAX));
                    let written: Vec<_> = written.map(|((_, p), who)| (*p, who)).collect();
                    let later = record.past.iter().filter(|p| p.interval >= interval).map(|p| &p.acting);
                    let mut later = later.chain(record.activated.then_some(&record.acting));
                    prop_assert!(
                        later.any(|acting| written.iter().all(|(p, who)| who.contains(&acting[*p]))),
                        "{} is forgotten: {:?}, {:?}", interval, written, record
                    );
                }
            }
        }
    }
}
