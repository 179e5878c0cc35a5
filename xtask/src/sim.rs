//! The simulator, many seeds at once: a finding ends it with the seed that replays it.

use crate::step;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// How long a soak goes on if neither time nor seeds are given.
const SOAK: [&str; 2] = ["--minutes", "10"];

/// Builds the simulator alone and runs it; it knows its own arguments.
pub fn run(args: &[&str]) -> Result<()> {
    let package = ["run", "--quiet", "--package", "gabion-tests", "--bin", "gabion-sim", "--"];
    let mut command = step::cargo(&package);
    command.args(args);
    step::show(command)
}

/// As many seeds as there is time for.
pub fn soak(args: &[&str]) -> Result<()> {
    let bounded = args.iter().any(|a| ["--minutes", "--seeds"].contains(a));
    run(&[&["--keep-going"][..], args, if bounded { &[] } else { &SOAK }].concat())
}

/// Each rule of the core is switched off in turn: the simulator must notice.
pub fn mutants(args: &[&str]) -> Result<()> {
    run(&[&["--mutants"], args].concat())
}

/// Builds the simulator together with all tests, which need the same dependencies with the same
/// features: built alone, many of them would be compiled twice.
pub fn build_with_tests() -> Result<PathBuf> {
    let args = ["build", "--quiet", "--locked", "--workspace", "--bins", "--tests"];
    let mut command = step::cargo(&args);
    command.arg("--message-format=json-render-diagnostics");
    let out = step::output(command)?;
    for message in serde_json::Deserializer::from_slice(&out).into_iter::<Value>() {
        let message = message.context("output of cargo build")?;
        if message["target"]["name"] == "gabion-sim" && message["profile"]["test"] == false {
            let path = message["executable"].as_str().context("gabion-sim is no program")?;
            return Ok(path.into());
        }
    }
    bail!("the workspace has no program gabion-sim")
}

/// Runs a simulator that is built.
pub fn run_binary(simulator: &Path, args: &[&str]) -> Result<()> {
    let mut command = Command::new(simulator);
    command.current_dir(step::top()).args(args);
    step::show(command)
}
