//! `gabion-sim`: the seeded simulator. The real placement-group, monitor and decision logic on a simulated
//! network, clock and disk, under faults; every read is checked, and after healing every replica is compared.

mod client;
mod disk;
mod oracle;
mod rng;
mod world;

use std::process::ExitCode;
use world::{Tally, World};

/// Everything must be clean this long after the last fault.
const HEAL_MS: u64 = 120_000;

/// Runs one seed.
fn run(seed: u64, trace: bool) -> Result<Tally, String> {
    let mut w = World::new(seed, trace);
    let end = w.now + w.plan.fault_phase_ms;
    w.run_until(end);
    let finding = |w: &mut World| match w.finding.take() {
        Some(f) => Err(format!("{f} (at {} ms)", w.now)),
        None => Ok(()),
    };
    finding(&mut w)?;
    w.heal();
    for c in &mut w.clients {
        c.draining = true;
    }
    let deadline = w.now + HEAL_MS;
    while w.now < deadline && !(w.all_clean() && w.clients.iter().all(|c| c.idle())) {
        let next = w.now + 500;
        w.run_until(next);
        finding(&mut w)?;
    }
    if !w.all_clean() {
        return Err(format!("not clean {HEAL_MS} ms after the last fault\n{}", w.describe()));
    }
    if !w.clients.iter().all(|c| c.idle()) {
        return Err(format!("operations unanswered {HEAL_MS} ms after the last fault\n{}", w.describe()));
    }
    // Read back everything that was ever written.
    for id in w.oracle.blocks() {
        w.clients[id.volume as usize].final_reads.push(id);
    }
    let deadline = w.now + HEAL_MS;
    while w.now < deadline && !w.clients.iter().all(|c| c.idle()) {
        let next = w.now + 500;
        w.run_until(next);
        finding(&mut w)?;
    }
    if !w.clients.iter().all(|c| c.idle()) {
        return Err(format!("the last reads were not answered\n{}", w.describe()));
    }
    w.compare_replicas()?;
    w.tally.reads_checked = w.oracle.reads_checked;
    w.tally.virtual_ms = w.now;
    Ok(w.tally)
}

fn number(args: &[String], flag: &str, default: u64) -> Result<u64, String> {
    match args.iter().position(|a| a == flag) {
        None => Ok(default),
        Some(i) => args.get(i + 1).and_then(|v| v.parse().ok()).ok_or_else(|| {
            format!("{flag} needs a number; usage: gabion-sim [--seeds N] [--from S] [--trace]")
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
    let trace = args.iter().any(|a| a == "--trace");
    let mut sum = Tally::default();
    for seed in from..from.saturating_add(seeds) {
        match run(seed, trace) {
            Ok(t) => {
                sum.client_ops += t.client_ops;
                sum.reads_checked += t.reads_checked;
                sum.faults += t.faults;
                sum.map_epochs += t.map_epochs;
                sum.virtual_ms += t.virtual_ms;
            }
            Err(finding) => {
                println!("seed {seed}: {finding}\nreplay: cargo xtask sim --seeds 1 --from {seed}");
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
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    #[test]
    fn forty_seeds_without_a_finding() {
        for seed in 1..=40 {
            if let Err(finding) = super::run(seed, false) {
                panic!("seed {seed}: {finding}\nreplay: cargo xtask sim --seeds 1 --from {seed}");
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_run() {
        let a = super::run(7, false).map(|t| format!("{t:?}"));
        let b = super::run(7, false).map(|t| format!("{t:?}"));
        assert_eq!(a, b);
    }
}
