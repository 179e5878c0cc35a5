//! The simulator, many seeds at once: a finding ends it with the seed that replays it.

use crate::step;
use anyhow::{Context, Result, bail};

/// Which seeds to run.
#[derive(Debug, PartialEq, Eq)]
pub struct Seeds {
    pub count: u64,
    pub from: u64,
}

impl Seeds {
    /// From `--seeds N [--from S]`.
    pub fn parse(args: &[&str]) -> Result<Seeds> {
        let (mut count, mut from) = (None, 1);
        for pair in args.chunks(2) {
            let [key, value] = pair else { bail!("{} needs a number", pair[0]) };
            let number: u64 = value.parse().with_context(|| format!("{key} {value}: not a number"))?;
            match *key {
                "--seeds" => count = Some(number),
                "--from" => from = number,
                _ => bail!("{key} is not known: --seeds N [--from S]"),
            }
        }
        match count {
            Some(count) if count > 0 => Ok(Seeds { count, from }),
            _ => bail!("--seeds N is needed, at least 1"),
        }
    }
}

/// Builds the simulator the way the tests are built and runs it.
pub fn run(seeds: &Seeds) -> Result<()> {
    let (count, from) = (seeds.count.to_string(), seeds.from.to_string());
    let package = ["run", "--quiet", "--package", "gabion-tests", "--bin", "gabion-sim", "--"];
    let mut command = step::cargo(&package);
    command.args(["--seeds", &count, "--from", &from]);
    step::show(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_parsed_or_refused() {
        assert_eq!(Seeds::parse(&["--seeds", "5"]).unwrap(), Seeds { count: 5, from: 1 });
        let both = Seeds::parse(&["--from", "9", "--seeds", "5"]).unwrap();
        assert_eq!(both, Seeds { count: 5, from: 9 });
        for bad in [&[][..], &["--seeds"], &["--seeds", "0"], &["--seeds", "x"], &["--seed", "1"]] {
            assert!(Seeds::parse(bad).is_err(), "{bad:?}");
        }
    }
}
