//! `cargo xtask verify`: everything, read-only, every step even when an earlier one failed.
//!
//! The tests come last and the other steps' results before them, so that the test runner's own
//! summary ends the output but for two lines.

use crate::{licences, sim, step};
use anyhow::Result;
use std::process::Command;
use std::time::{Duration, Instant};

/// Seeds of the simulator's smoke run.
const SMOKE: &str = "200";

/// How a step that did not fail ended.
enum Outcome {
    Passed(String),
    Skipped(String),
}

type Step = (&'static str, fn() -> Result<Outcome>);

const STEPS: &[Step] = &[
    ("format", format),
    ("clippy", clippy),
    ("docs", docs),
    ("licences", || licences::run().map(Outcome::Passed)),
    ("advisories", advisories),
    ("simulation", simulation),
    ("ansible", ansible),
];

/// Runs every step and prints a summary.
pub fn run() -> Result<()> {
    let mut report = Report::default();
    for step in STEPS {
        report.run(step);
    }
    println!("\n{}", report.lines.join("\n"));
    report.run(&("tests", tests));
    println!("{}", report.lines.last().map_or("", String::as_str));
    println!("verify: {} passed, {} failed, {} skipped", report.passed, report.failed, report.skipped);
    anyhow::ensure!(report.failed == 0, "verify failed");
    Ok(())
}

#[derive(Default)]
struct Report {
    lines: Vec<String>,
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Report {
    fn run(&mut self, (name, step): &Step) {
        println!("\n== {name}");
        let start = Instant::now();
        let (word, note) = match step() {
            Ok(Outcome::Passed(note)) => {
                self.passed += 1;
                ("passed", note)
            }
            Ok(Outcome::Skipped(note)) => {
                self.skipped += 1;
                ("skipped", note)
            }
            Err(e) => {
                self.failed += 1;
                println!("{name}: {e:#}");
                ("FAILED", String::new())
            }
        };
        self.lines.push(line(name, word, start.elapsed(), &note));
    }
}

fn line(name: &str, word: &str, took: Duration, note: &str) -> String {
    format!("  {name:<12} {word:<8} {:>7.1} s  {note}", took.as_secs_f64()).trim_end().to_string()
}

fn passed() -> Result<Outcome> {
    Ok(Outcome::Passed(String::new()))
}

fn format() -> Result<Outcome> {
    step::show(step::cargo(&["fmt", "--all", "--check"]))?;
    passed()
}

fn clippy() -> Result<Outcome> {
    let args = ["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"];
    step::show(step::cargo(&args))?;
    passed()
}

fn docs() -> Result<Outcome> {
    let mut command = step::cargo(&["doc", "--quiet", "--locked", "--workspace", "--no-deps"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    step::show(command)?;
    passed()
}

fn advisories() -> Result<Outcome> {
    if !step::works(step::cargo(&["deny", "--version"])) {
        return Ok(Outcome::Skipped("cargo-deny is not installed".into()));
    }
    // With no network, what was fetched before is used.
    if !step::works(step::cargo(&["deny", "fetch", "db"])) {
        let known = step::works(step::cargo(&["deny", "--offline", "check", "advisories"]));
        let note = "the advisory database cannot be fetched";
        return Ok(if known {
            Outcome::Passed(format!("{note}; the last one"))
        } else {
            Outcome::Skipped(note.into())
        });
    }
    step::show(step::cargo(&["deny", "check", "advisories"]))?;
    passed()
}

/// Syntax of the playbooks and what they refuse; the machines are `make test-ansible`.
fn ansible() -> Result<Outcome> {
    /// The script's word for "Ansible is not installed".
    const ABSENT: i32 = 77;
    let status = Command::new(step::top().join("tests/ansible/spec.sh")).status()?;
    if status.code() == Some(ABSENT) {
        return Ok(Outcome::Skipped("no ansible-playbook here".into()));
    }
    anyhow::ensure!(status.success(), "tests/ansible/spec.sh ended with {status}");
    passed()
}

fn simulation() -> Result<Outcome> {
    let simulator = sim::build_with_tests()?;
    sim::run_binary(&simulator, &["--short", "--seeds", SMOKE])?;
    Ok(Outcome::Passed(format!("{SMOKE} seeds")))
}

fn tests() -> Result<Outcome> {
    if step::works(step::cargo(&["nextest", "--version"])) {
        step::show(step::cargo(&["nextest", "run", "--locked", "--workspace", "--no-fail-fast"]))?;
        return passed();
    }
    println!("cargo-nextest is not installed: cargo test instead");
    step::show(step::cargo(&["test", "--locked", "--workspace", "--no-fail-fast"]))?;
    Ok(Outcome::Passed("by cargo test".into()))
}
