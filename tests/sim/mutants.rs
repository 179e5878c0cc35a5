//! The mutation check: the simulator must notice when the core does not keep one of its rules.

use crate::plan::{Plan, SHORT, Scenario};
use crate::rng::Rng;
use crate::run::Finding;
use crate::world::World;
use gabion_osd::core::{Rule, Rules};
use gabion_proto::map::Redundancy;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Seeds within which each rule must be missed.
pub const SEEDS: u64 = 3_000;

/// The runs that are to miss the rule.
fn plan(rng: &mut Rng, rule: Rule) -> Plan {
    match rule {
        Rule::StuckReports => return Plan::in_scenario(Scenario::OneBrokenLink, None, rng),
        Rule::HedgedReads => return Plan::in_scenario(Scenario::SlowDisks { all: false }, None, rng),
        Rule::RoomForClients => {
            return Plan::in_scenario(Scenario::Rebuild, Some(Redundancy::Replicated { size: 3 }), rng);
        }
        // Too few members of an interval have answered.
        Rule::CoverageDecodes => return Plan::in_scenario(Scenario::StandIns, None, rng),
        // Of shards the version decides.
        Rule::HedgeHolders => {
            return Plan::in_scenario(Scenario::StaleCopies, Some(Redundancy::Replicated { size: 3 }), rng);
        }
        // Disks that are full refuse writes, and others are lost soon after.
        Rule::Fill | Rule::FillWhole | Rule::Refusals => {
            let m = 1 + u32::from(rng.chance(500));
            return Plan::with_too_few_members(Redundancy::Erasure { k: 2 * m, m }, rng);
        }
        _ => {}
    }
    let coded = matches!(
        rule,
        Rule::RollBack | Rule::TwoPhases | Rule::AllShards | Rule::OneVersion | Rule::DeltaNamesBase
    );
    let plan = match (coded, rng.chance(500)) {
        (false, _) => Plan::of(rng, SHORT),
        (true, false) => Plan::with(Redundancy::Erasure { k: 2, m: 1 }, rng, SHORT),
        (true, true) => Plan::with(Redundancy::Erasure { k: 4, m: 2 }, rng, SHORT),
    };
    match rule {
        // Who reads beside the holder sees what a primary without a lease still serves.
        Rule::Lease => Plan { observed: 1_000, ..plan },
        // It must come when its primary is primary once more, and has heard nothing of the client since.
        Rule::OperationEpoch => Plan { overdue: 50, ..plan },
        Rule::Sessions => Plan { lingering: true, ..plan },
        _ => plan,
    }
}

/// What a seed finds with these rules.
fn finding(seed: u64, rule: Rule, rules: Rules) -> Option<Finding> {
    let run = || {
        let mut rng = Rng::new(seed);
        let plan = Plan { rules, ..plan(&mut rng, rule) };
        crate::run::finish(World::planned(plan, rng, false))
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(found) => found.err().map(|finding| finding.lines().next().unwrap_or_default().to_owned()),
        Err(_) => Some("a panic".to_owned()),
    }
}

/// The first seed that notices, and how. An error: none does, or it finds something with every rule kept, too.
pub fn noticed(rule: Rule, seeds: u64) -> Result<(u64, Finding), String> {
    let noticed = (1..=seeds).find_map(|seed| Some((seed, finding(seed, rule, Rules::without(rule))?)));
    let (seed, how) = noticed.ok_or_else(|| format!("{rule:?}: nothing in {seeds} seeds"))?;
    match finding(seed, rule, Rules::default()) {
        Some(also) => Err(format!("{rule:?}: seed {seed}: {how}; and with every rule kept: {also}")),
        None => Ok((seed, how)),
    }
}

/// Tries every rule, or one, several at once; the answer names those that nothing missed.
pub fn check(seeds: u64, jobs: usize, only: Option<Rule>) -> Result<(), String> {
    let rules: Vec<Rule> = Rule::ALL.into_iter().filter(|r| only.is_none_or(|o| o == *r)).collect();
    let next = AtomicUsize::new(0);
    let missed = Mutex::new(Vec::new());
    let work = || {
        while let Some(rule) = rules.get(next.fetch_add(1, Ordering::Relaxed)) {
            match noticed(*rule, seeds) {
                Ok((seed, how)) => println!("{rule:?}: seed {seed}: {how}"),
                Err(why) => {
                    println!("{why}");
                    missed.lock().unwrap_or_else(PoisonError::into_inner).push(*rule);
                }
            }
        }
    };
    thread::scope(|s| (0..jobs.max(1)).for_each(|_| _ = s.spawn(work)));
    let missed = missed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if missed.is_empty() { Ok(()) } else { Err(format!("not noticed: {missed:?}")) }
}

/// The rule of that name.
pub fn rule(name: &str) -> Option<Rule> {
    Rule::ALL.into_iter().find(|r| format!("{r:?}") == name)
}
