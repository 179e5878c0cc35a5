//! Requests that may be made again: what was answered is remembered, so that a client that lost the
//! answer gets it on its next try, from whichever monitor leads then.
//!
//! Invariant: of two proposals of one request only the first has an effect. Bounded: the answers of
//! the last [`REQUESTS_REMEMBERED_MAX`] requests; a client must not wait longer with its next try.

use super::{Command, CommandResult, MonitorState, Refusal, Reply, Stamped};
use gabion_proto::limits::REQUESTS_REMEMBERED_MAX;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Answers by request, the oldest first in `order`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answered {
    by_request: BTreeMap<u128, CommandResult>,
    order: VecDeque<u128>,
}

impl Answered {
    fn insert(&mut self, request: u128, answer: CommandResult) {
        if self.by_request.insert(request, answer).is_none() {
            self.order.push_back(request);
        }
        while self.order.len() > REQUESTS_REMEMBERED_MAX {
            let oldest = self.order.pop_front();
            oldest.map(|r| self.by_request.remove(&r));
        }
    }
}

impl MonitorState {
    /// What this request was answered, if it was carried out and is remembered.
    pub fn answer_to(&self, request: u128) -> Option<&CommandResult> {
        self.answered.by_request.get(&request)
    }

    /// Carries out what was agreed on under the leader of `term`.
    pub fn apply_agreed(&mut self, term: u64, stamped: Stamped) -> CommandResult {
        match stamped.command {
            Command::Together(commands) => {
                let each = commands.iter().map(|encoded| match postcard::from_bytes(encoded) {
                    Ok(stamped) => self.apply_one(term, stamped),
                    Err(e) => Err(Refusal::invalid(format!("not a command: {e}"))),
                });
                Ok(Reply::Together(each.collect()))
            }
            _ => self.apply_one(term, stamped),
        }
    }

    fn apply_one(&mut self, term: u64, stamped: Stamped) -> CommandResult {
        let Stamped { unix_ms, request, term: decided, command } = stamped;
        if decided.is_some_and(|d| d != term) {
            return Err(Refusal::aborted("decided under an earlier leader"));
        }
        let Some(request) = request else { return self.apply(unix_ms, command) };
        if let Some(answer) = self.answer_to(request) {
            return answer.clone();
        }
        let answer = self.apply(unix_ms, command);
        self.answered.insert(request, answer.clone());
        answer
    }

    /// Whether `apply_agreed` would change anything but the answers: for tests of replays.
    #[cfg(test)]
    pub(crate) fn without_answers(&self) -> MonitorState {
        MonitorState { answered: Answered::default(), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gabion_proto::ids::*;

    fn stamped(request: Option<u128>, term: Option<u64>, command: Command) -> Stamped {
        Stamped { unix_ms: 0, request, term, command }
    }

    fn session(host: &str) -> Command {
        Command::OpenSession { client: ClientId(0), host: host.into() }
    }

    #[test]
    fn a_request_is_carried_out_once_and_answered_alike() {
        let mut state = MonitorState::default();
        let first = state.apply_agreed(1, stamped(Some(7), None, session("h"))).unwrap();
        let before = state.clone();
        assert_eq!(state.apply_agreed(2, stamped(Some(7), None, session("h"))), Ok(first.clone()));
        assert_eq!(state, before);
        assert_ne!(state.apply_agreed(2, stamped(Some(8), None, session("h"))).unwrap(), first);
        assert_ne!(state.apply_agreed(2, stamped(None, None, session("h"))).unwrap(), first);
    }

    #[test]
    fn a_refusal_is_remembered_too() {
        let mut state = MonitorState::default();
        let remove = || Command::RemoveExport { id: 1 };
        let refused = state.apply_agreed(1, stamped(Some(1), None, remove())).unwrap_err();
        assert_eq!(state.answer_to(1), Some(&Err(refused)));
        assert_eq!(state.without_answers(), MonitorState::default());
    }

    #[test]
    fn commands_that_go_together_have_the_effects_and_answers_of_each_alone() {
        let commands = || {
            vec![
                stamped(Some(1), None, session("h")),
                // Made again before it was answered.
                stamped(Some(1), None, session("h")),
                stamped(None, Some(2), session("i")),
                stamped(None, Some(3), session("i")),
                stamped(None, None, Command::RemoveExport { id: 1 }),
                // Never made.
                Stamped::together(Vec::new()),
            ]
        };
        let mut encoded: Vec<_> = commands().iter().map(|c| postcard::to_stdvec(c).unwrap()).collect();
        encoded.push(vec![0xff]);
        let (mut together, mut apart) = (MonitorState::default(), MonitorState::default());
        let answers = together.apply_agreed(3, Stamped::together(encoded)).unwrap();
        let each: Vec<_> = commands().into_iter().map(|c| apart.apply_one(3, c)).collect();
        let Reply::Together(mut answers) = answers else { panic!("{answers:?}") };
        assert_eq!(answers.pop().unwrap().unwrap_err().kind, crate::state::RefusalKind::Invalid);
        assert_eq!(answers, each);
        assert_eq!(together, apart);
        let kinds: Vec<_> = each.iter().map(|r| r.as_ref().err().map(|e| e.kind)).collect();
        use crate::state::RefusalKind::*;
        assert_eq!(kinds, [None, None, Some(Aborted), None, Some(NotFound), Some(Invalid)]);
        assert_eq!(each[0], each[1]);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_oldest_goes_first() {
        let mut state = MonitorState::default();
        for request in 0..=REQUESTS_REMEMBERED_MAX as u128 {
            state.apply_agreed(1, stamped(Some(request), None, Command::RemoveExport { id: 1 })).unwrap_err();
        }
        assert_eq!(state.answered.by_request.len(), REQUESTS_REMEMBERED_MAX);
        assert_eq!((state.answer_to(0), state.answer_to(1).is_some()), (None, true));
    }

    #[test]
    fn a_decision_of_an_earlier_leader_has_no_effect() {
        let mut state = MonitorState::default();
        let before = state.clone();
        let refused = state.apply_agreed(3, stamped(None, Some(2), session("h"))).unwrap_err();
        assert_eq!((refused.kind, &state), (crate::state::RefusalKind::Aborted, &before));
        state.apply_agreed(3, stamped(None, Some(3), session("h"))).unwrap();
        assert_ne!(state, before);
    }
}
