//! The simulator, many seeds at once: a finding ends it with the seed that replays it.

use crate::step;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which seeds to run.
#[derive(Debug, PartialEq, Eq)]
pub struct Seeds {
    pub count: u64,
    pub from: u64,
    /// Copies, or K+M; any kind if not given.
    pub pool: Option<String>,
}

impl Seeds {
    /// From `--seeds N [--from S] [--pool COPIES|K+M]`.
    pub fn parse(args: &[&str]) -> Result<Seeds> {
        let (mut count, mut from, mut pool) = (None, 1, None);
        for pair in args.chunks(2) {
            let [key, value] = pair else { bail!("{} needs a number", pair[0]) };
            if *key == "--pool" {
                pool = Some((*value).to_owned());
                continue;
            }
            let number: u64 = value.parse().with_context(|| format!("{key} {value}: not a number"))?;
            match *key {
                "--seeds" => count = Some(number),
                "--from" => from = number,
                _ => bail!("{key} is not known: --seeds N [--from S] [--pool COPIES|K+M]"),
            }
        }
        match count {
            Some(count) if count > 0 => Ok(Seeds { count, from, pool }),
            _ => bail!("--seeds N is needed, at least 1"),
        }
    }
}

impl Seeds {
    fn append_to(&self, command: &mut Command) {
        let (count, from) = (self.count.to_string(), self.from.to_string());
        command.args(["--seeds", &count, "--from", &from]);
        command.args(self.pool.iter().flat_map(|pool| ["--pool", pool]));
    }
}

/// Builds the simulator alone and runs it.
pub fn run(seeds: &Seeds) -> Result<()> {
    let package = ["run", "--quiet", "--package", "gabion-tests", "--bin", "gabion-sim", "--"];
    let mut command = step::cargo(&package);
    seeds.append_to(&mut command);
    step::show(command)
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
pub fn run_binary(simulator: &Path, seeds: &Seeds) -> Result<()> {
    let mut command = Command::new(simulator);
    command.current_dir(step::top());
    seeds.append_to(&mut command);
    step::show(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_parsed_or_refused() {
        assert_eq!(Seeds::parse(&["--seeds", "5"]).unwrap(), Seeds { count: 5, from: 1, pool: None });
        let both = Seeds::parse(&["--from", "9", "--seeds", "5", "--pool", "4+2"]).unwrap();
        assert_eq!(both, Seeds { count: 5, from: 9, pool: Some("4+2".into()) });
        for bad in [&[][..], &["--seeds"], &["--seeds", "0"], &["--seeds", "x"], &["--seed", "1"]] {
            assert!(Seeds::parse(bad).is_err(), "{bad:?}");
        }
    }
}
