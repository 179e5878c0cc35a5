//! `gabion-sim`: the seeded simulator. The real placement-group, store, monitor and decision logic on a simulated
//! network, clock and disk, under faults; every read is checked, and after healing every replica is compared.

mod check;
mod client;
mod disk;
mod faults;
mod monitor;
mod mutants;
mod network;
mod nodes;
mod oracle;
mod plan;
mod rng;
mod snapshots;
mod world;

use gabion_proto::map::Redundancy;
use plan::{Scenario, Tally};
use std::process::ExitCode;
use world::World;

/// Everything must be clean this long after the last fault.
const HEAL_MS: u64 = 120_000;

/// Longer than any pause.
const QUIET_MS: u64 = 10_000;

/// A broken link must be worked around within this time (rule P8).
const LINK_MS: u64 = 30_000;

/// A run is no test of much with fewer operations and faults; it goes on until then, or this much longer.
const OPERATIONS_MIN: u64 = 500;
const FAULTS_MIN: u64 = 10;
const LONGER_MS: u64 = 600_000;

/// Runs one seed, of one kind of pool if it is given.
fn run(seed: u64, pool: Option<Redundancy>, trace: bool) -> Result<Tally, String> {
    let mut rng = rng::Rng::new(seed);
    let plan = match pool {
        Some(redundancy) => plan::Plan::with(redundancy, &mut rng),
        None => plan::Plan::of(&mut rng),
    };
    finish(World::planned(plan, rng, trace))
}

/// `3` is three copies, `4+2` an erasure code.
fn redundancy(text: &str) -> Option<Redundancy> {
    match text.split_once('+') {
        None => Some(Redundancy::Replicated { size: text.parse().ok()? }),
        Some((k, m)) => Some(Redundancy::Erasure { k: k.parse().ok()?, m: m.parse().ok()? }),
    }
}

/// The fault phase, healing, the last reads and the comparison.
fn finish(mut w: World) -> Result<Tally, String> {
    let end = w.now + w.plan.fault_phase_ms;
    w.run_until(end);
    let little = |w: &World| w.tally.client_ops < OPERATIONS_MIN || w.tally.faults < FAULTS_MIN;
    while w.plan.scenario == Scenario::Faults && w.finding.is_none() && little(&w) && w.now < end + LONGER_MS
    {
        let next = w.now + 5_000;
        w.run_until(next);
    }
    let finding = |w: &mut World| match w.finding.take() {
        Some(f) => Err(format!("{f} (at {} ms)", w.now)),
        None => Ok(()),
    };
    finding(&mut w)?;
    if w.plan.scenario == Scenario::OneBrokenLink && w.longest_wait() > LINK_MS {
        return Err(format!("one broken link, and a client has waited {} ms", w.longest_wait()));
    }
    w.heal();
    for c in &mut w.clients {
        c.draining = true;
    }
    let idle = |w: &World| w.clients.iter().all(|c| c.idle());
    let deadline = w.now + HEAL_MS;
    while w.now < deadline && !(w.all_clean() && idle(&w) && w.leftovers() == 0) {
        let next = w.now + 500;
        w.run_until(next);
        finding(&mut w)?;
    }
    if !w.all_clean() {
        return Err(format!("not clean {HEAL_MS} ms after the last fault\n{}", w.describe()));
    }
    if !idle(&w) {
        return Err(format!("operations unanswered {HEAL_MS} ms after the last fault\n{}", w.describe()));
    }
    if w.leftovers() > 0 {
        return Err(format!("{} objects of removed volumes are still there", w.leftovers()));
    }
    scrub_all(&mut w)?;
    read_all(&mut w)?;
    // What the last reads found bad is repaired meanwhile.
    let next = w.now + 5_000;
    w.run_until(next);
    finding(&mut w)?;
    w.compare_replicas()?;
    if let Redundancy::Erasure { m, .. } = w.plan.redundancy
        && !w.plan.rot
    {
        // Every row must decode without any of its shards. With min-size k the group still serves.
        w.may_serve_with_fewest();
        w.tally.degraded_checks += 1;
        for node in w.some_running(m as usize) {
            w.stop(node, false);
        }
        read_all(&mut w)?;
    }
    let redundancy = match w.plan.redundancy {
        Redundancy::Replicated { size } => format!("replicated {size}"),
        Redundancy::Erasure { k, m } => format!("erasure {k}+{m}"),
    };
    *w.tally.by_redundancy.entry(redundancy).or_default() += 1;
    w.tally.reads_checked = w.oracle.reads_checked;
    w.tally.virtual_ms = w.now;
    Ok(w.tally)
}

/// What nobody reads rots; a deep scrub of everything must find it, and what rotted before.
fn scrub_all(w: &mut World) -> Result<(), String> {
    // What was paused when everything healed sleeps on: nobody may be away when only one good copy is left.
    let quiet = w.now + QUIET_MS;
    let deadline = w.now + HEAL_MS;
    while w.now < deadline && (w.now < quiet || !w.all_clean()) {
        let next = w.now + 500;
        w.run_until(next);
        if let Some(f) = w.finding.take() {
            return Err(format!("{f} (at {} ms)", w.now));
        }
    }
    w.nodes[0].disk.rot_under_reads(0);
    w.rot_cold();
    let deadline = w.now + HEAL_MS;
    while w.now < deadline && !w.scrubs_done() {
        let next = w.now + 500;
        w.run_until(next);
        if let Some(f) = w.finding.take() {
            return Err(format!("{f} (at {} ms)", w.now));
        }
    }
    match w.scrubs_done() {
        true => w.nothing_is_damaged(),
        false => Err(format!("scrubs do not end\n{}", w.describe())),
    }
}

/// Reads back everything that was ever written.
fn read_all(w: &mut World) -> Result<(), String> {
    for id in w.oracle.blocks() {
        let holder = w.seats[w.volume_of(id.volume)].holder;
        w.clients[holder].final_reads.push(id);
    }
    let idle = |w: &World| w.clients.iter().all(|c| c.idle());
    let deadline = w.now + HEAL_MS;
    while w.now < deadline && !idle(w) {
        let next = w.now + 500;
        w.run_until(next);
        if let Some(f) = w.finding.take() {
            return Err(format!("{f} (at {} ms)", w.now));
        }
    }
    match idle(w) {
        true => Ok(()),
        false => Err(format!("the last reads were not answered\n{}", w.describe())),
    }
}

fn number(args: &[String], flag: &str, default: u64) -> Result<u64, String> {
    match args.iter().position(|a| a == flag) {
        None => Ok(default),
        Some(i) => args.get(i + 1).and_then(|v| v.parse().ok()).ok_or_else(|| {
            format!("{flag} needs a number; usage: gabion-sim [--seeds N] [--from S] [--pool COPIES|K+M] [--trace | --mutants]")
        }),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let parsed = number(&args, "--seeds", 100).and_then(|n| Ok((n, number(&args, "--from", 1)?)));
    let (seeds, from) = match parsed {
        Ok(x) => x,
        Err(e) => {
            println!("{e}");
            return ExitCode::from(2);
        }
    };
    let pool = match args.iter().position(|a| a == "--pool") {
        None => None,
        Some(i) => match args.get(i + 1).and_then(|text| redundancy(text)) {
            Some(pool) => Some(pool),
            None => {
                println!("--pool needs a number of copies, or K+M");
                return ExitCode::from(2);
            }
        },
    };
    let trace = args.iter().any(|a| a == "--trace");
    if args.iter().any(|a| a == "--mutants") {
        return match number(&args, "--seeds", mutants::SEEDS).and_then(mutants::check) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                println!("{e}");
                ExitCode::FAILURE
            }
        };
    }
    let mut sum = Tally { least_ops: u64::MAX, least_faults: u64::MAX, ..Tally::default() };
    for seed in from..from.saturating_add(seeds) {
        match run(seed, pool, trace) {
            Ok(t) => sum.add(&t),
            Err(finding) => {
                let pool = args.iter().skip_while(|a| *a != "--pool").take(2).cloned().collect::<Vec<_>>();
                println!("seed {seed}: {finding}");
                println!("replay: cargo xtask sim --seeds 1 --from {seed} {}", pool.join(" "));
                return ExitCode::FAILURE;
            }
        }
    }
    println!(
        "{seeds} seeds without a finding: {} client operations, {} block reads checked, {} faults, {} map epochs, {:.1} virtual hours",
        sum.client_ops,
        sum.reads_checked,
        sum.faults,
        sum.map_epochs,
        sum.virtual_ms as f64 / 3_600_000.0
    );
    println!("at least {} operations and {} faults each", sum.least_ops, sum.least_faults);
    println!("seeds: {:?}, {} read back without shards", sum.by_redundancy, sum.degraded_checks);
    println!(
        "scrubs: {} passes, {} findings, {} repaired",
        sum.scrubs, sum.scrub_findings, sum.scrub_repaired
    );
    println!("faults: {:?}", sum.by_kind);
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    #[test]
    fn forty_seeds_without_a_finding() {
        for seed in 1..=40 {
            if let Err(finding) = super::run(seed, None, false) {
                panic!("seed {seed}: {finding}\nreplay: cargo xtask sim --seeds 1 --from {seed}");
            }
        }
    }

    #[test]
    fn erasure_coded_pools_without_a_finding() {
        for (pool, seeds) in [("2+1", 1..=10), ("4+2", 1..=10)] {
            for seed in seeds {
                if let Err(finding) = super::run(seed, super::redundancy(pool), false) {
                    panic!(
                        "seed {seed}: {finding}\nreplay: cargo xtask sim --seeds 1 --from {seed} --pool {pool}"
                    );
                }
            }
        }
    }

    #[test]
    fn one_broken_link_is_worked_around() {
        for seed in 1..=4 {
            let mut rng = crate::rng::Rng::new(seed);
            let plan = crate::plan::Plan::with_a_broken_link(&mut rng);
            super::finish(crate::world::World::planned(plan, rng, false))
                .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        }
    }

    /// Without the rule, what a snapshot holds changes under its readers: the shortest of the mutation check.
    #[test]
    fn a_zombie_that_writes_a_frozen_layer_is_noticed() {
        let noticed = crate::mutants::noticed(gabion_osd::core::Rule::FrozenLayers, 30);
        println!("{:?}", noticed.expect("nobody noticed"));
    }

    /// Without repair, what rots where nobody reads is still bad at the end.
    #[test]
    fn scrubs_that_replace_nothing_are_noticed() {
        let noticed = crate::mutants::noticed(gabion_osd::core::Rule::ScrubRepairs, 5);
        println!("{:?}", noticed.expect("nobody noticed"));
    }

    #[test]
    #[ignore = "takes minutes: cargo nextest run -p gabion-tests --run-ignored all every_rule"]
    fn every_rule_is_missed_when_it_is_off() {
        crate::mutants::check(crate::mutants::SEEDS).unwrap();
    }

    #[test]
    fn the_same_seed_gives_the_same_run() {
        let a = super::run(7, None, false).map(|t| format!("{t:?}"));
        let b = super::run(7, None, false).map(|t| format!("{t:?}"));
        assert_eq!(a, b);
    }
}
