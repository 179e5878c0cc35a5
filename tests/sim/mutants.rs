//! The mutation check: the simulator must notice when the core does not keep one of its rules.

use crate::plan::Plan;
use crate::rng::Rng;
use crate::world::World;
use gabion_osd::core::{Rule, Rules};
use gabion_proto::map::Redundancy;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Seeds within which each rule must be missed.
pub const SEEDS: u64 = 3_000;

fn plan(rng: &mut Rng, rule: Rule) -> Plan {
    if rule == Rule::StuckReports {
        return Plan { rules: Rules::without(rule), ..Plan::with_a_broken_link(rng) };
    }
    let coded = matches!(
        rule,
        Rule::CoverageDecodes | Rule::RollBack | Rule::TwoPhases | Rule::AllShards | Rule::OneVersion
    );
    let plan = match (coded, rng.chance(500)) {
        (false, _) => Plan::of(rng),
        (true, false) => Plan::with(Redundancy::Erasure { k: 2, m: 1 }, rng),
        (true, true) => Plan::with(Redundancy::Erasure { k: 4, m: 2 }, rng),
    };
    Plan { rules: Rules::without(rule), ..plan }
}

/// The first seed that notices, and how.
pub fn noticed(rule: Rule, seeds: u64) -> Option<(u64, String)> {
    (1..=seeds).find_map(|seed| {
        let run = || {
            let mut rng = Rng::new(seed);
            let plan = plan(&mut rng, rule);
            crate::finish(World::planned(plan, rng, false))
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(_)) => None,
            Ok(Err(finding)) => Some((seed, finding.lines().next().unwrap_or_default().to_owned())),
            Err(_) => Some((seed, "a panic".to_owned())),
        }
    })
}

/// Tries every rule; the answer names those that nothing missed.
pub fn check(seeds: u64) -> Result<(), String> {
    let mut missed = Vec::new();
    for rule in Rule::ALL {
        match noticed(rule, seeds) {
            Some((seed, how)) => println!("{rule:?}: seed {seed}: {how}"),
            None => {
                println!("{rule:?}: nothing in {seeds} seeds");
                missed.push(rule);
            }
        }
    }
    if missed.is_empty() { Ok(()) } else { Err(format!("not noticed: {missed:?}")) }
}
