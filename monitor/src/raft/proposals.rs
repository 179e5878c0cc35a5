//! Proposals on their way into the log: what waits while a commit is under way goes into one entry (group commit).
//!
//! One synced write and one round to the others cost the same for one command and for a thousand, and after a power cut
//! thousands of groups are reported at once. Each command of an entry is carried out and answered as if it were alone,
//! in the order in which they came.

use super::{ConsensusError, PROPOSE_TIMEOUT, Types, stopped};
use crate::state::{CommandResult, Reply, Stamped};
use gabion_proto::limits::{COMMAND_BYTES_MAX, PROPOSALS_WAITING_MAX};
use openraft::Raft;
use openraft::error::{ClientWriteError, RaftError};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// A commit that takes longer keeps the next one waiting no more: it may be lost with the leadership, and who asks now
/// should hear of that.
const HEAD_START: Duration = Duration::from_millis(300);
/// At most what the encoding adds to commands that go together, and to each of them.
const ENVELOPE_BYTES: usize = 64;
const LENGTH_BYTES: usize = 4;

/// A command of at most [`COMMAND_BYTES_MAX`] that somebody waits for.
pub(super) struct Proposal {
    pub stamped: Stamped,
    /// The same, encoded.
    pub encoded: Vec<u8>,
    pub answer: oneshot::Sender<Result<CommandResult, ConsensusError>>,
}

/// Commits what comes in, in order, until nobody can propose any more.
pub(super) async fn commit_in_turn(raft: Raft<Types>, mut proposals: mpsc::Receiver<Proposal>) {
    let mut waiting = VecDeque::new();
    loop {
        if waiting.is_empty() {
            match proposals.recv().await {
                Some(first) => waiting.push_back(first),
                None => return,
            }
        }
        while waiting.len() < PROPOSALS_WAITING_MAX
            && let Ok(more) = proposals.try_recv()
        {
            waiting.push_back(more);
        }
        let batch = next_entry(&mut waiting);
        if !batch.is_empty() {
            let commit = tokio::spawn(commit(raft.clone(), batch));
            // Beyond that it goes on by itself.
            let _ = tokio::time::timeout(HEAD_START, commit).await;
        }
    }
}

/// As many as one entry holds of those for which somebody still waits.
fn next_entry(waiting: &mut VecDeque<Proposal>) -> Vec<Proposal> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while let Some(next) = waiting.front() {
        if !batch.is_empty() && bytes + next.encoded.len() + ENVELOPE_BYTES > COMMAND_BYTES_MAX {
            break;
        }
        bytes += next.encoded.len() + LENGTH_BYTES;
        batch.extend(waiting.pop_front().filter(|p| !p.answer.is_closed()));
    }
    batch
}

async fn commit(raft: Raft<Types>, batch: Vec<Proposal>) {
    let count = batch.len();
    let (mut commands, answers): (Vec<_>, Vec<_>) =
        batch.into_iter().map(|p| ((p.stamped, p.encoded), p.answer)).unzip();
    let entry = match commands.len() {
        1 => commands.swap_remove(0).0,
        _ => Stamped::together(commands.into_iter().map(|(_, encoded)| encoded).collect()),
    };
    // Who proposed gives up before that.
    let limit = PROPOSE_TIMEOUT + Duration::from_secs(1);
    let Ok(written) = tokio::time::timeout(limit, raft.client_write(entry)).await else { return };
    let results = match written {
        Ok(done) => match done.data {
            Ok(Reply::Together(results)) if results.len() == count => results.into_iter().map(Ok).collect(),
            one if count == 1 => vec![Ok(one)],
            other => vec![Err(stopped(format!("{count} commands have the answer {other:?}"))); count],
        },
        Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
            vec![Err(ConsensusError::NotLeader); count]
        }
        Err(e) => vec![Err(stopped(e)); count],
    };
    for (answer, result) in answers.into_iter().zip(results) {
        // Who does not wait any more needs no answer.
        let _ = answer.send(result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Command;

    fn proposal(bytes: usize) -> (Proposal, oneshot::Receiver<Result<CommandResult, ConsensusError>>) {
        let (answer, waits) = oneshot::channel();
        let command = Command::Announce { text: String::new() };
        let stamped = Stamped { unix_ms: 0, request: None, term: None, command };
        (Proposal { stamped, encoded: vec![0; bytes], answer }, waits)
    }

    #[test]
    fn an_entry_is_no_longer_than_a_command_may_be_and_leaves_out_whom_nobody_waits_for() {
        let half = COMMAND_BYTES_MAX / 2;
        let sizes = [half, half, COMMAND_BYTES_MAX, 10, 20, 30];
        let (mut all, mut waits): (VecDeque<_>, Vec<_>) = sizes.map(proposal).into_iter().unzip();
        drop(waits.remove(4));
        let mut entries = Vec::new();
        while !all.is_empty() {
            entries.push(next_entry(&mut all).iter().map(|p| p.encoded.len()).collect::<Vec<_>>());
        }
        assert_eq!(entries, [vec![half], vec![half], vec![COMMAND_BYTES_MAX], vec![10, 30]]);
    }
}
