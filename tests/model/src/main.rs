//! `gabion-model [CONFIGURATION|--long [RULE]]`: searches one configuration, those that every run of the tests searches, or the long ones;
//! with all rules or without one. Tells how many states there are, how deep, what was reached, and the way to what was found.

use gabion_model::configurations::{self, Configuration};
use gabion_model::explore::{Outcome, explore};
use gabion_model::group::Event;
use gabion_model::rules::Rule;
use std::process::ExitCode;
use std::time::Instant;

const STATES_MAX: usize = 120_000_000;

fn tell(name: &str, outcome: &Outcome, since: Instant) {
    println!(
        "{name}: {} states, {} steps, depth {}, at most {} at once, {:.1} s{}",
        outcome.states,
        outcome.transitions,
        outcome.depth,
        outcome.widest,
        since.elapsed().as_secs_f64(),
        if outcome.complete { "" } else { ", NOT COMPLETE" }
    );
    let reached = Event::ALL.iter().filter(|e| outcome.events & e.bit() != 0);
    println!("  reached: {:?}", reached.collect::<Vec<_>>());
    if let Some(found) = &outcome.found {
        println!("{found}");
    }
}

fn search(c: &Configuration) -> bool {
    let start = Instant::now();
    let outcome = explore(&c.group, STATES_MAX);
    tell(c.name, &outcome, start);
    outcome.found.is_none()
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rule = match args.get(1) {
        None => None,
        Some(name) => match Rule::ALL.into_iter().find(|r| r.to_string() == *name) {
            Some(rule) => Some(rule),
            None => {
                println!("no rule is named {name}; there are {:?}", Rule::ALL);
                return ExitCode::FAILURE;
            }
        },
    };
    let chosen: Vec<Configuration> = match args.first() {
        None => configurations::all().into_iter().filter(|c| !c.long).collect(),
        Some(long) if long == "--long" => configurations::all().into_iter().filter(|c| c.long).collect(),
        Some(name) => configurations::all().into_iter().filter(|c| c.name == *name).collect(),
    };
    if chosen.is_empty() {
        let names: Vec<&str> = configurations::all().iter().map(|c| c.name).collect();
        println!("there are the configurations {names:?}");
        return ExitCode::FAILURE;
    }
    let fine = chosen.into_iter().fold(true, |fine, mut c| {
        c.group.without = rule;
        search(&c) && fine
    });
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
