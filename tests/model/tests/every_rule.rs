//! Each rule is switched off once, and the search must find what it prevents: the proof that the model bites.

use gabion_model::configurations::where_missed;
use gabion_model::explore::explore;
use gabion_model::group::{Group, Next};
use gabion_model::rules::Rule;

const STATES_MAX: usize = 5_000_000;

#[test]
fn every_rule_is_missed() {
    let mut unmissed = Vec::new();
    for rule in Rule::ALL {
        let Some(group) = where_missed(rule) else { continue };
        let outcome = explore(&Group { without: Some(rule), ..group }, STATES_MAX);
        match outcome.found {
            Some(found) => println!("without {rule} ({} states): {found}\n", outcome.states),
            None => unmissed.push(rule),
        }
    }
    assert!(unmissed.is_empty(), "nobody misses {unmissed:?}");
}

/// What is found is not found with all rules.
#[test]
fn nothing_is_found_there_with_all_rules() {
    for rule in Rule::ALL {
        let Some(group) = where_missed(rule) else { continue };
        let outcome = explore(&group, STATES_MAX);
        assert!(outcome.found.is_none(), "{rule}: {}", outcome.found.unwrap());
        assert!(outcome.complete, "{rule}");
    }
}

/// A take-over need not wait for older writes that are under way, as far as one object's clients can see: operations on the
/// same blocks wait for them, and when their interval ends its successor decides before anybody reads.
#[test]
fn draining_is_not_what_keeps_one_object_right() {
    assert!(where_missed(Rule::FenceDrains).is_none());
    for next_holders in [&[Next::TakeOver], &[Next::Restart]] {
        let without = Some(Rule::FenceDrains);
        let script = &[(0, 0), (1, 0)];
        let group = Group { changes: 1, script, sends: 2, next_holders, without, ..Group::THREE };
        let outcome = explore(&group, STATES_MAX);
        assert!(outcome.found.is_none() && outcome.complete, "{outcome:?}");
    }
}
