//! `gabion-sim`: the seeded simulator. The real placement-group, store, monitor and decision logic on a simulated
//! network, clock and disk, under faults; every read is checked, and after healing every replica is compared.

mod absence;
mod args;
mod check;
mod client;
mod damage;
mod device;
mod disk;
mod faults;
mod filling;
mod monitor;
mod mutants;
mod network;
mod nodes;
mod oracle;
mod plan;
mod rebuild;
mod rng;
mod run;
mod slow;
mod snapshots;
mod stand_ins;
mod tally;
mod undercut;
mod wire;
mod world;

use args::{Args, What};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tally::Report;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How often a long run says where it is.
const PROGRESS: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let args = match Args::parse(&words) {
        Ok(args) => args,
        Err(e) => {
            println!("{e}");
            return ExitCode::from(2);
        }
    };
    match args.what {
        What::Seeds => seeds(&args),
        What::Mutants(only) => match mutants::check(args.seeds.unwrap_or(mutants::SEEDS), args.jobs, only) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                println!("{e}");
                ExitCode::FAILURE
            }
        },
    }
}

/// Runs seeds, several at once, until there were enough, the time is over, or one has a finding; then only if it is to keep going.
fn seeds(args: &Args) -> ExitCode {
    let started = Instant::now();
    let until = args.minutes.map(|m| started + Duration::from_secs(60 * m));
    let (next, stop) = (AtomicU64::new(args.from), AtomicBool::new(false));
    let end = args.seeds.map_or(u64::MAX, |n| args.from.saturating_add(n));
    let sum = Mutex::new((Report::default(), started));
    let failed = Mutex::new(BTreeSet::new());
    let work = || {
        while !stop.load(Ordering::Relaxed) && until.is_none_or(|t| Instant::now() < t) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            let run = || match args.pool {
                Some(pool) if args.too_few_members => run::undercut(seed, pool, args.trace),
                _ => run::run(seed, args.scenario, args.pool, args.form, args.trace),
            };
            let run =
                catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("a panic, see above".into()));
            match run {
                Ok(tally) => {
                    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                    sum.0.add(&tally);
                    if until.is_some() && sum.1.elapsed() >= PROGRESS {
                        sum.1 = Instant::now();
                        println!("{} s: {} seeds", started.elapsed().as_secs(), sum.0.runs());
                    }
                }
                Err(finding) => {
                    stop.fetch_or(!args.keep_going, Ordering::Relaxed);
                    failed.lock().unwrap_or_else(PoisonError::into_inner).insert(seed);
                    println!("seed {seed}: {finding}\nreplay: {}", args.replay(seed));
                }
            }
        }
    };
    thread::scope(|s| (0..args.jobs).for_each(|_| _ = s.spawn(work)));
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    let clean = failed.is_empty();
    if clean || args.keep_going {
        let (report, _) = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.print();
        println!("took {} s", started.elapsed().as_secs());
    }
    if !clean {
        println!("seeds with a finding: {failed:?}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::plan::{FULL, Form, SHORT, Scenario};
    use super::*;
    use gabion_osd::core::{Branch, Rule};
    use std::collections::BTreeMap;

    fn without_a_finding(seeds: std::ops::RangeInclusive<u64>, pool: Option<&str>, form: Form) {
        for seed in seeds {
            let run = run::run(seed, Scenario::Faults, pool.and_then(args::redundancy), form, false);
            let tally = run.unwrap_or_else(|finding| {
                let pool = pool.map(|p| format!(" --pool {p}")).unwrap_or_default();
                let short = if form == SHORT { " --short" } else { "" };
                panic!("seed {seed}: {finding}\nreplay: cargo xtask sim --seeds 1 --from {seed}{pool}{short}")
            });
            assert!(tally.client_ops >= form.operations_min && tally.fault_count() >= form.faults_min);
            assert!(tally.change_count() >= form.map_changes_min && tally.virtual_ms >= form.virtual_ms_min);
        }
    }

    #[test]
    fn forty_seeds_without_a_finding() {
        without_a_finding(1..=40, None, SHORT);
    }

    #[test]
    fn erasure_coded_pools_without_a_finding() {
        without_a_finding(1..=10, Some("2+1"), SHORT);
        without_a_finding(1..=10, Some("4+2"), SHORT);
    }

    /// Storms, and quiet stretches with long absences and scheduled scrubs.
    #[test]
    fn an_hour_without_a_finding() {
        without_a_finding(1..=1, None, FULL);
    }

    fn in_scenario(scenario: Scenario, pools: &[&str], seeds: std::ops::RangeInclusive<u64>) {
        for (pool, seed) in pools.iter().flat_map(|p| seeds.clone().map(move |s| (p, s))) {
            let pool_kind = args::redundancy(pool).unwrap();
            run::run(seed, scenario, Some(pool_kind), SHORT, false)
                .unwrap_or_else(|e| panic!("{scenario:?}, {pool}, seed {seed}: {e}"));
        }
    }

    #[test]
    fn one_broken_link_is_worked_around() {
        in_scenario(Scenario::OneBrokenLink, &["3", "4+2"], 1..=2);
    }

    #[test]
    fn one_slow_disk_is_noticed_and_read_around() {
        in_scenario(Scenario::SlowDisks { all: false }, &["3", "4+2"], 1..=2);
    }

    #[test]
    fn when_all_disks_are_slow_nobody_is_accused() {
        in_scenario(Scenario::SlowDisks { all: true }, &["3", "4+2"], 1..=2);
    }

    /// Every acting member has answered, and that is not enough.
    #[test]
    fn who_stands_in_knows_too_little() {
        in_scenario(Scenario::StandIns, &["2+1", "4+2"], 1..=2);
        println!("{:?}", mutants::noticed(Rule::CoverageDecodes, 30).unwrap());
    }

    /// Ways that only damage leads to, which is repaired in the end.
    #[test]
    fn what_is_damaged_is_found_and_made_whole() {
        let mut taken = BTreeMap::new();
        for (pool, seed) in ["3", "2", "2+1", "4+2"].iter().flat_map(|p| (1..=5).map(move |s| (p, s))) {
            let run = run::run(seed, Scenario::Damage, args::redundancy(pool), SHORT, false);
            let tally = run.unwrap_or_else(|e| panic!("damage, {pool}, seed {seed}: {e}"));
            assert!(tally.fault_count() >= 3, "{pool}, seed {seed}: {:?}", tally.faults);
            taken.extend(tally.branches);
        }
        let ways = [
            Branch::OwnCopyAlone,
            Branch::KeepDamaged,
            Branch::Piecewise,
            Branch::ScrubCloser,
            Branch::ScrubShardWrong,
            Branch::ScrubShardsUnclear,
        ];
        let never: Vec<_> = ways.into_iter().filter(|w| !taken.contains_key(w)).collect();
        assert!(never.is_empty(), "never taken: {never:?}");
    }

    #[test]
    fn reads_do_not_go_around_a_slow_disk_to_stale_copies() {
        in_scenario(Scenario::StaleCopies, &["3", "4+2"], 1..=2);
        println!("{:?}", mutants::noticed(Rule::HedgeHolders, 20).unwrap());
    }

    #[test]
    fn after_a_short_absence_little_is_moved() {
        in_scenario(Scenario::Absence, &["3", "2"], 1..=2);
        println!("{:?}", mutants::noticed(Rule::KeptIsEqual, 20).unwrap());
    }

    /// Beside recovery that takes what it can, the slowest of a hundred operations takes many times as long.
    #[test]
    fn clients_hardly_notice_a_rebuild() {
        println!("{:?}", mutants::noticed(Rule::RoomForClients, 1).unwrap());
    }

    /// Without hedges reads wait for the slow disk.
    #[test]
    fn reads_that_are_not_hedged_are_noticed() {
        println!("{:?}", mutants::noticed(Rule::HedgedReads, 1).unwrap());
    }

    /// Enough shards are left, and disks that could serve are held back: the groups must serve again.
    #[test]
    fn groups_with_too_few_members_serve_again() {
        let mut filled = 0;
        for (pool, seeds) in [("2+1", 1..=6), ("4+2", 1..=3)] {
            for seed in seeds {
                let run = run::undercut(seed, args::redundancy(pool).unwrap(), false);
                let tally = run.unwrap_or_else(|finding| {
                    let replay = format!("--seeds 1 --from {seed} --pool {pool} --too-few-members");
                    panic!("seed {seed}: {finding}\nreplay: cargo xtask sim {replay}")
                });
                filled += tally.work.get(undercut::FILLED).unwrap_or(&0);
            }
        }
        assert!(filled >= 3, "only {filled} groups were left with too few members");
    }

    /// Without the rule a group with too few members waits for ever; and who is let in before they have everything holds the last copy of a shard.
    #[test]
    fn groups_that_are_not_filled_or_too_early_are_noticed() {
        let unfound = "unfound objects";
        for (rule, what) in
            [(Rule::Fill, "UndersizedInactive"), (Rule::FillWhole, unfound), (Rule::Refusals, "min-size is")]
        {
            let (seed, how) = mutants::noticed(rule, 30).unwrap();
            assert!(how.contains(what), "{rule:?}: seed {seed}: {how}");
        }
    }

    /// Without the rule, what a snapshot holds changes under its readers: the shortest of the mutation check.
    #[test]
    fn a_zombie_that_writes_a_frozen_layer_is_noticed() {
        println!("{:?}", mutants::noticed(Rule::FrozenLayers, 30).unwrap());
    }

    /// Without repair, what rots where nobody reads is still bad at the end.
    #[test]
    fn scrubs_that_replace_nothing_are_noticed() {
        println!("{:?}", mutants::noticed(Rule::ScrubRepairs, 5).unwrap());
    }

    #[test]
    #[ignore = "takes minutes: cargo xtask mutants"]
    fn every_rule_is_missed_when_it_is_off() {
        mutants::check(mutants::SEEDS, 2, None).unwrap();
    }

    #[test]
    fn the_same_seed_gives_the_same_run() {
        let a = run::run(7, Scenario::Faults, None, SHORT, false).map(|t| format!("{t:?}"));
        let b = run::run(7, Scenario::Faults, None, SHORT, false).map(|t| format!("{t:?}"));
        assert_eq!(a, b);
    }
}
