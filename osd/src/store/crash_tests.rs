//! Power fails at every recorded point of many workloads, and several samples of what was not flushed survive: whatever
//! was acknowledged is there, nothing is half there, and the store goes on.

use super::model::*;
use super::rules::{Rule, without};
use super::sim::{SimDisk, SimStore};
use super::tests::IDENTITY;
use super::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SLOTS: u64 = 96;

/// A disk with a journal so small that it is trimmed all the time.
pub fn small_disk(journal_blocks: u32, seed: u64) -> SimDisk {
    let size = (32 + u64::from(journal_blocks) + SLOTS * 32) * 4096;
    let disk = SimDisk::new(size as usize, seed);
    disk.format_with(IDENTITY, journal_blocks).expect("formats");
    disk
}

/// What a workload did: the model after each transaction.
struct Run {
    disk: SimDisk,
    states: Vec<Model>,
}

fn note(submitted: usize, acknowledged: usize) -> u64 {
    (submitted as u64) << 32 | acknowledged as u64
}

/// Commits, several at a time in flight, on a recording disk.
fn run(seed: u64, steps: usize) -> Run {
    let mut generator = Generator::new(StdRng::seed_from_u64(seed));
    let journal_blocks = [64, 80, 128][seed as usize % 3];
    let disk = small_disk(journal_blocks, seed);
    disk.record();
    let mut store = disk.open().expect("opens");
    let (mut states, mut acknowledged) = (vec![Model::default()], 0);
    let mut tag = 0;
    for _ in 0..steps {
        // (tag, expected results), in order of their start.
        let mut waiting = std::collections::VecDeque::new();
        for _ in 0..generator.rng.random_range(1..4) {
            let (mut txns, mut expected) = (Vec::new(), Vec::new());
            for _ in 0..generator.rng.random_range(1..3) {
                let mut next = states.last().expect("a state").clone();
                let txn = generator.txn(&next);
                let (txn, told) =
                    generator.assembled(&next, &txn, &mut store).unwrap_or_else(|| (txn.clone(), txn));
                expected.push(next.apply(&txn));
                states.push(next);
                txns.push(told);
            }
            tag += 1;
            disk.note(note(states.len() - 1, acknowledged));
            store.start(tag, Work::Commit(txns));
            waiting.push_back((tag, expected));
            if generator.rng.random() {
                store.pump();
            }
        }
        if generator.rng.random_range(0..8) == 0 {
            tag += 1;
            store.start(tag, Work::Settle);
        }
        let mut done = Vec::new();
        while !waiting.is_empty() {
            assert!(store.progress(&mut done), "seed {seed}: nothing moves");
            for (tag, done) in done.drain(..) {
                let Done::Commit(results) = done else { continue };
                let (first, expected) = waiting.pop_front().expect("a commit");
                assert_eq!(first, tag, "answers out of order");
                let found: Vec<_> = results.iter().map(Result::is_ok).collect();
                assert_eq!(found, expected, "seed {seed}: {results:?}");
                acknowledged += expected.len();
                disk.note(note(states.len() - 1, acknowledged));
            }
        }
    }
    let model = states.last().expect("a state");
    assert_eq!(Model::of(&mut store), model.visible(), "seed {seed}");
    Run { disk, states }
}

/// Opens what a crash left; its state must be one of `allowed`. Returns which.
fn recover(disk: &SimDisk, allowed: &[Model], what: &dyn Fn() -> String) -> (SimStore, Model) {
    let mut store = disk.open().unwrap_or_else(|e| panic!("{}: does not open: {e}", what()));
    let found = Model::of(&mut store);
    let matching = allowed.iter().rev().find(|m| m.visible() == found);
    let Some(model) = matching else {
        panic!("{}: holds neither what was acknowledged nor what was under way:\n{found:?}", what())
    };
    assert_eq!(store.usage().objects, model.objects(), "{}", what());
    let mut report = FsckReport::default();
    store.check(false, &mut report);
    assert!(report.is_clean_but_for_strangers(), "{}: {report}", what());
    (store, model.clone())
}

fn read_frozen(disk: &SimDisk, what: &dyn Fn() -> String) -> Model {
    let mut frozen = disk.frozen().unwrap_or_else(|e| panic!("{}: does not open for reading: {e}", what()));
    let found = Model::of(&mut frozen.0);
    drop(frozen);
    let report = disk.fsck(true);
    assert!(report.is_clean_but_for_strangers(), "{}: {report}", what());
    found
}

/// Crashes at every point, and has the tools look at some; returns how many crashes there were.
fn crash_everywhere(seed: u64, steps: usize, samples: u64, tools: bool) -> u64 {
    let Run { disk, states } = run(seed, steps);
    let mut count = 0;
    disk.crashed_at(|at, last, crashed| {
        let (submitted, acknowledged) = last.map_or((0, 0), |n| ((n >> 32) as usize, n as u32 as usize));
        let allowed = &states[acknowledged..=submitted];
        for sample in 0..samples {
            count += 1;
            let crash_seed = seed << 40 ^ (at as u64) << 8 ^ sample;
            let what = || format!("seed {seed}, point {at}, sample {sample}");
            let disk = crashed(crash_seed);
            let again = (at as u64 + sample).is_multiple_of(4);
            // The tools read what a crash left as the daemon will, and find nothing wrong with it.
            let frozen = (again && tools).then(|| read_frozen(&disk, &what));
            let (mut store, mut model) = recover(&disk, allowed, &what);
            if !again {
                continue;
            }
            if let Some(frozen) = frozen {
                assert_eq!(frozen, model.visible(), "{}: for reading only", what());
            }
            // It goes on, and a second crash brings nothing of the first one's lost tail back.
            let mut generator = Generator::resuming(StdRng::seed_from_u64(crash_seed), &model);
            for _ in 0..3 {
                let txn = generator.txn(&model);
                let expected = model.apply(&txn);
                assert_eq!(store.commit(vec![txn])[0].is_ok(), expected, "{}", what());
            }
            let used = store.usage().used_bytes;
            drop(store);
            disk.crash();
            let (store, _) = recover(&disk, std::slice::from_ref(&model), &|| format!("{}, again", what()));
            assert_eq!(store.usage().used_bytes, used, "{}: space is not accounted for", what());
        }
    });
    count
}

#[test]
fn a_crash_at_every_point_keeps_what_was_acknowledged() {
    let crashes: u64 = (0..10).map(|seed| crash_everywhere(seed, 14, 3, true)).sum();
    println!("{crashes} crashes");
    assert!(crashes > 4000, "only {crashes} crashes");
}

fn seeds(variable: &str) -> std::ops::Range<u64> {
    let range = std::env::var(variable).unwrap_or_else(|_| "100..200".into());
    let (first, end) = range.split_once("..").expect("first..end");
    first.parse().expect("a number")..end.parse().expect("a number")
}

/// `GABION_CRASH_SEEDS=first..end` chooses the seeds.
#[test]
#[ignore = "minutes; run it with --ignored"]
fn a_crash_at_every_point_of_many_workloads() {
    let mut crashes = 0;
    for seed in seeds("GABION_CRASH_SEEDS") {
        crashes += crash_everywhere(seed, 30, 5, true);
        println!("seed {seed}: {crashes} crashes so far");
    }
}

#[test]
fn random_operations_match_the_model() {
    compare((0..12).map(|seed| (seed, Generator::new(StdRng::seed_from_u64(seed)))));
}

#[test]
fn groups_that_become_more_and_fewer_match_the_model() {
    compare((0..24).map(|seed| (seed, Generator::restless(StdRng::seed_from_u64(seed)))));
}

/// `GABION_MODEL_SEEDS=first..end` chooses the seeds.
#[test]
#[ignore = "minutes; run it with --ignored"]
fn many_random_operations_match_the_model() {
    for seed in seeds("GABION_MODEL_SEEDS") {
        let rng = || StdRng::seed_from_u64(seed);
        compare([Generator::new(rng()), Generator::restless(rng())].map(|g| (seed, g)));
    }
}

fn compare(generators: impl IntoIterator<Item = (u64, Generator)>) {
    for (seed, mut generator) in generators {
        let disk = small_disk([64, 256][seed as usize % 2], seed);
        let (mut store, mut model) = (disk.open().expect("opens"), Model::default());
        for step in 0..120 {
            let what = || format!("seed {seed}, step {step}");
            let txns: Vec<_> = (0..generator.rng.random_range(1..4))
                .map(|_| {
                    let txn = generator.txn(&model);
                    let (txn, told) =
                        generator.assembled(&model, &txn, &mut store).unwrap_or_else(|| (txn.clone(), txn));
                    let expected = model.apply(&txn);
                    (told, expected)
                })
                .collect();
            let (txns, expected): (Vec<_>, Vec<_>) = txns.into_iter().unzip();
            let results = store.commit(txns);
            let found: Vec<_> = results.iter().map(Result::is_ok).collect();
            assert_eq!(found, expected, "{}: {results:?}", what());
            let top = object(generator.rng.random_range(0..3), 1);
            let (first, count) = (generator.rng.random_range(0..100), generator.rng.random_range(1..100));
            let read = store.read(PGS[0], top, &[LayerId(0)], first, count).expect("reads");
            let wanted = model.read(PGS[0], top, &[LayerId(0)], first, count);
            assert_eq!(stamps(&read), wanted, "{}: through layers", what());
            let read = store.read_pending(PGS[0], top, first, count).expect("reads");
            let wanted = model.read_pending(PGS[0], top, first, count);
            assert_eq!(stamps(&read), wanted, "{}: with what is pending", what());
            match generator.rng.random_range(0..24) {
                0 => assert_eq!(store.background(), Ok(false), "{}", what()),
                kind @ 1..3 => {
                    let used = store.usage();
                    drop(store);
                    if kind == 1 {
                        disk.crash();
                    }
                    store = disk.open().expect("opens again");
                    assert_eq!(store.usage(), used, "{}: accounting", what());
                }
                _ => {}
            }
            if step % 10 == 0 {
                assert_eq!(Model::of(&mut store), model.visible(), "{}", what());
            }
        }
        assert_eq!(Model::of(&mut store), model.visible(), "seed {seed}");
    }
}

/// Without a rule the same search must find what the rule prevents.
#[track_caller]
fn is_needed(rule: Rule) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..400).find(|&seed| {
        let search = || without(rule, || crash_everywhere(seed, 12, 4, false));
        std::panic::catch_unwind(search).is_err()
    });
    std::panic::set_hook(hook);
    println!("{rule:?}: seed {found:?}");
    assert!(found.is_some(), "nothing broke without {rule:?}");
}

#[test]
fn every_rule_is_needed() {
    for rule in [
        Rule::FreshSlotsVerified,
        Rule::MarkBeforeWriteBack,
        Rule::FlushBeforeAnswer,
        Rule::SlotReuse,
        Rule::FlushBeforeIndex,
        Rule::IndexBeforeTrim,
        Rule::DiscardIsZero,
        Rule::AnswersInOrder,
        Rule::AppliedOnce,
        Rule::Chain,
    ] {
        is_needed(rule);
    }
}
