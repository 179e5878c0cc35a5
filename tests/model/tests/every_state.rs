//! Every configuration is searched through all its states, and reaches what it is there for.

use gabion_model::configurations::{Configuration, all};
use gabion_model::explore::explore;
use gabion_model::group::Event;

fn search(c: &Configuration, states_max: usize) -> u64 {
    let outcome = explore(&c.group, states_max);
    println!(
        "{}: {} states, {} steps, depth {}, at most {} at once",
        c.name, outcome.states, outcome.transitions, outcome.depth, outcome.widest
    );
    if let Some(found) = &outcome.found {
        panic!("{}: {found}", c.name);
    }
    assert!(outcome.complete, "{}: more than {states_max} states", c.name);
    for event in c.reaches {
        assert!(outcome.events & event.bit() != 0, "{}: {event:?} is never reached", c.name);
    }
    outcome.events
}

#[test]
fn nothing_that_clients_saw_is_ever_lost() {
    let (long, short): (Vec<_>, Vec<_>) = all().into_iter().partition(|c| c.long);
    let events = short.iter().fold(0, |events, c| events | search(c, 10_000_000));
    // These take many writes.
    let later: Vec<&Event> = long.iter().flat_map(|c| c.reaches).collect();
    let never = Event::ALL.into_iter().filter(|e| events & e.bit() == 0 && !later.contains(&e));
    let never: Vec<_> = never.collect();
    assert!(never.is_empty(), "never reached: {never:?}");
}

#[test]
#[ignore = "takes minutes and gigabytes: see docs/protocol.md"]
fn nothing_is_lost_in_longer_runs() {
    for c in all().into_iter().filter(|c| c.long) {
        search(&c, 400_000_000);
    }
}
