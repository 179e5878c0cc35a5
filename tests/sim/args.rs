//! The simulator's command line.

use crate::mutants;
use crate::plan::{FULL, Form, SHORT, Scenario};
use gabion_osd::core::Rule;
use gabion_proto::map::Redundancy;
use std::num::NonZero;
use std::thread;

const USAGE: &str = "usage: gabion-sim [--seeds N] [--minutes M] [--from S] [--pool COPIES|K+M] [--short | --too-few-members | --scenario NAME] [--jobs N] [--trace | --keep-going]
       gabion-sim --mutants [--rule NAME] [--seeds N] [--jobs N]";
const SEEDS: u64 = 100;

#[derive(Debug, PartialEq, Eq)]
pub enum What {
    Seeds,
    /// Every rule is switched off in turn, or one.
    Mutants(Option<Rule>),
}

#[derive(Debug, PartialEq, Eq)]
pub struct Args {
    pub what: What,
    /// None: as many as there is time for.
    pub seeds: Option<u64>,
    pub minutes: Option<u64>,
    pub from: u64,
    pub pool: Option<Redundancy>,
    pool_text: String,
    pub form: Form,
    /// Instead of random faults: groups of an erasure-coded pool are left with too few members.
    pub too_few_members: bool,
    pub scenario: Scenario,
    scenario_text: &'static str,
    pub jobs: usize,
    pub trace: bool,
    /// Other seeds are run after one with a finding.
    pub keep_going: bool,
}

/// `3` is three copies, `4+2` an erasure code.
pub fn redundancy(text: &str) -> Option<Redundancy> {
    match text.split_once('+') {
        None => Some(Redundancy::Replicated { size: text.parse().ok().filter(|n| (1..=8).contains(n))? }),
        Some((k, m)) => Some(Redundancy::Erasure { k: k.parse().ok()?, m: m.parse().ok()? }),
    }
}

impl Args {
    pub fn parse(words: &[String]) -> Result<Args, String> {
        let mut args = Args {
            what: What::Seeds,
            seeds: None,
            minutes: None,
            from: 1,
            pool: None,
            pool_text: String::new(),
            form: FULL,
            too_few_members: false,
            scenario: Scenario::Faults,
            scenario_text: "",
            jobs: thread::available_parallelism().map_or(1, NonZero::get),
            trace: false,
            keep_going: false,
        };
        let mut only = None;
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value =
                || words.next().map(String::as_str).ok_or_else(|| format!("{word} needs a value\n{USAGE}"));
            let number =
                |text: &str| text.parse::<u64>().map_err(|_| format!("{word} {text}: not a number\n{USAGE}"));
            match word.as_str() {
                "--seeds" => args.seeds = Some(number(value()?)?),
                "--minutes" => args.minutes = Some(number(value()?)?),
                "--from" => args.from = number(value()?)?,
                "--jobs" => args.jobs = (number(value()?)? as usize).clamp(1, 256),
                "--short" => args.form = SHORT,
                "--too-few-members" => (args.too_few_members, args.form) = (true, SHORT),
                "--trace" => (args.trace, args.jobs) = (true, 1),
                "--keep-going" => args.keep_going = true,
                "--mutants" => args.what = What::Mutants(None),
                "--rule" => {
                    let name = value()?;
                    only = Some(mutants::rule(name).ok_or_else(|| format!("there is no rule {name}"))?);
                }
                "--scenario" => {
                    let name = value()?;
                    let known = Scenario::NAMES.into_iter().find(|(known, _)| *known == name);
                    let names = Scenario::NAMES.map(|(known, _)| known).join(", ");
                    (args.scenario_text, args.scenario) =
                        known.ok_or_else(|| format!("--scenario needs one of {names}"))?;
                }
                "--pool" => {
                    args.pool_text = value()?.to_owned();
                    let pool = redundancy(&args.pool_text);
                    args.pool = Some(pool.ok_or("--pool needs a number of copies, or K+M")?);
                }
                _ => return Err(format!("{word} is not known\n{USAGE}")),
            }
        }
        if let What::Mutants(rule) = &mut args.what {
            *rule = only;
        }
        // So many members are lost after so many others were away.
        let spares = matches!(args.pool, Some(Redundancy::Erasure { k, m }) if (1..=k).contains(&m));
        if args.too_few_members && !(spares && args.what == What::Seeds) {
            return Err(format!("--too-few-members needs --pool K+M, with M no more than K\n{USAGE}"));
        }
        if args.seeds.is_none() && args.minutes.is_none() && args.what == What::Seeds {
            args.seeds = Some(SEEDS);
        }
        Ok(args)
    }

    /// The command that runs one of the seeds again.
    pub fn replay(&self, seed: u64) -> String {
        let pool = match self.pool {
            Some(_) => format!(" --pool {}", self.pool_text),
            None => String::new(),
        };
        let kind = match (self.too_few_members, self.form == SHORT) {
            (true, _) => " --too-few-members",
            (false, true) => " --short",
            (false, false) => "",
        };
        let scenario = match self.scenario {
            Scenario::Faults => String::new(),
            _ => format!(" --scenario {}", self.scenario_text),
        };
        format!("cargo xtask sim --seeds 1 --from {seed}{pool}{kind}{scenario}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Args, String> {
        Args::parse(&words.iter().map(|w| w.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn what_is_asked_is_parsed_or_refused() {
        let args = parse(&["--from", "9", "--pool", "4+2", "--short", "--seeds", "5"]).unwrap();
        assert_eq!((args.seeds, args.from, args.form), (Some(5), 9, SHORT));
        assert_eq!(args.replay(9), "cargo xtask sim --seeds 1 --from 9 --pool 4+2 --short");
        let few = parse(&["--pool", "2+1", "--too-few-members"]).unwrap();
        assert_eq!(few.replay(9), "cargo xtask sim --seeds 1 --from 9 --pool 2+1 --too-few-members");
        assert_eq!(parse(&[]).unwrap().seeds, Some(SEEDS));
        assert_eq!(parse(&["--minutes", "3"]).unwrap().seeds, None);
        assert!(parse(&["--keep-going"]).unwrap().keep_going && !few.keep_going);
        let args = parse(&["--scenario", "slow-disk"]).unwrap();
        assert_eq!(args.scenario, Scenario::SlowDisks { all: false });
        assert_eq!(args.replay(9), "cargo xtask sim --seeds 1 --from 9 --scenario slow-disk");
        let mutants = parse(&["--mutants", "--rule", "Lease"]).unwrap();
        assert_eq!(mutants.what, What::Mutants(Some(Rule::Lease)));
        for bad in [
            &["--seeds"][..],
            &["--seeds", "x"],
            &["--pool", "0"],
            &["--seed", "1"],
            &["--rule", "No"],
            &["--too-few-members"],
            &["--too-few-members", "--pool", "3"],
            &["--too-few-members", "--pool", "2+3"],
            &["--scenario", "x"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
