//! Who leads, whether there is a quorum, and the proof that it is still so.
//!
//! [`Standing`] is what a monitor believes, a moment ago: good for sending callers to the right place
//! and for health, never for a decision that must not be taken twice. [`Consensus::confirm`] is proof:
//! a quorum has said *after the question was asked* that this monitor leads, and everything that was
//! agreed on before, or is left by earlier leaders, has been carried out here (Raft's read index).
//! Reads of operators and leases of OSDs rest on it and on nothing that a paused process or a stopped
//! clock could get wrong.

use super::network::Shared;
use super::{Consensus, ConsensusError, MonitorNode, Types};
use gabion_common::clock::boottime_ms;
use openraft::error::{CheckIsLeaderError, RaftError};
use openraft::{LogId, Raft, ServerState};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Callers that may wait for a proof.
pub(super) const QUESTIONS_MAX: usize = 4096;
/// Longer than openraft gives the other monitors, and than carrying out what is agreed on takes.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);
const PROOF_TRIES: u32 = 3;
/// A monitor that was not heard from for this long counts as down.
pub(super) const SILENCE_MS: u64 = 3_000;
/// How often silence is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What a monitor believes of the quorum.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// The term in which it leads itself.
    pub leads: Option<u64>,
    pub leader: Option<u64>,
    /// Where the leader is, when that is known and it is another one.
    pub leader_addr: Option<String>,
    /// Where all monitors are, separated by commas.
    pub addrs: String,
    /// It has been in touch with a leader and a quorum within the last seconds.
    pub in_touch: bool,
}

type Proof = Result<Option<LogId<u64>>, RaftError<u64, CheckIsLeaderError<u64, MonitorNode>>>;

/// Somebody waits for a proof; the answer is the term.
pub(super) type Question = oneshot::Sender<Result<u64, ConsensusError>>;

/// openraft waits for the others no longer than for a heartbeat: a busy machine needs another try.
async fn prove(raft: &Raft<Types>) -> Proof {
    let mut tries = 0;
    loop {
        tries += 1;
        match raft.ensure_linearizable().await {
            Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_))) if tries < PROOF_TRIES => {}
            proof => return proof,
        }
    }
}

/// Answers questions in rounds: one proof for everybody who asked before it was begun.
pub(super) async fn answer(raft: Raft<Types>, shared: Arc<Shared>, mut questions: mpsc::Receiver<Question>) {
    let mut waiting = Vec::new();
    while questions.recv_many(&mut waiting, QUESTIONS_MAX).await > 0 {
        let proof = match tokio::time::timeout(CONFIRM_TIMEOUT, prove(&raft)).await {
            // The leader's first entry is of its own term, and no older one is answered here.
            Ok(Ok(Some(log_id))) => Ok(log_id.leader_id.term),
            Ok(Ok(None)) => Err(ConsensusError::NotLeader),
            Ok(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(_)))) => {
                Err(ConsensusError::NotLeader)
            }
            Ok(Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_)))) | Err(_) => {
                let members = raft.server_metrics().borrow().membership_config.clone();
                Err(ConsensusError::NoQuorum(words(&shared, &members.voter_ids().collect())))
            }
            Ok(Err(RaftError::Fatal(e))) => Err(ConsensusError::Stopped(e.to_string())),
        };
        for question in waiting.drain(..) {
            // Who does not wait any more needs no answer.
            let _ = question.send(proof.clone());
        }
    }
}

/// Keeps a [`Standing`] until nobody looks at it any more.
pub(super) fn follow(raft: &Raft<Types>, shared: Arc<Shared>) -> watch::Receiver<Standing> {
    let (tx, rx) = watch::channel(Standing::default());
    let mut metrics = raft.server_metrics();
    tokio::spawn(async move {
        let mut in_touch_ms = None;
        loop {
            let now = metrics.borrow_and_update().clone();
            let me = shared.identity.id();
            let members: BTreeSet<u64> = now.membership_config.nodes().map(|(id, _)| *id).collect();
            shared.keep_heard(&members);
            let leads = now.state == ServerState::Leader && now.current_leader == Some(me);
            let good = match leads {
                true => has_majority(&now.membership_config, |id| is_up(&shared, id)),
                false => now.current_leader.is_some_and(|l| l != me),
            };
            if good {
                in_touch_ms = Some(boottime_ms());
            }
            let node =
                |id: u64| now.membership_config.nodes().find(|(i, _)| **i == id).map(|(_, n)| n.clone());
            let other = now.current_leader.filter(|l| *l != me);
            let new = Standing {
                leads: leads.then_some(now.vote.leader_id().term),
                leader: now.current_leader,
                leader_addr: other.and_then(node).map(|n: MonitorNode| n.addr),
                addrs: now
                    .membership_config
                    .nodes()
                    .map(|(_, n)| n.addr.as_str())
                    .collect::<Vec<_>>()
                    .join(","),
                in_touch: in_touch_ms.is_some_and(|at| boottime_ms() < at + SILENCE_MS),
            };
            let old = tx.borrow().clone();
            if old != new {
                report(me, &old, &new, || words(&shared, &now.membership_config.voter_ids().collect()));
                tx.send_replace(new);
            }
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(LOOK) => {}
                () = tx.closed() => return,
            }
        }
    });
    rx
}

/// Logs what an operator should know of a change.
fn report(me: u64, old: &Standing, new: &Standing, words: impl Fn() -> String) {
    if old.leader != new.leader {
        match new.leader {
            Some(leader) if leader == me => {}
            Some(leader) => tracing::info!(monitor = me, leader, "follows"),
            None => tracing::info!(monitor = me, "no leader"),
        }
    }
    match (old.in_touch, new.in_touch) {
        (true, false) => tracing::error!(monitor = me, "{}", words()),
        (false, true) => tracing::info!(monitor = me, "in touch with a quorum"),
        _ => {}
    }
}

fn has_majority(membership: &openraft::StoredMembership<u64, MonitorNode>, up: impl Fn(u64) -> bool) -> bool {
    let joint = membership.membership().get_joint_config();
    joint.iter().all(|voters| voters.iter().filter(|v| up(**v)).count() * 2 > voters.len())
}

/// Whether the monitor was heard from lately.
pub(super) fn is_up(shared: &Shared, id: u64) -> bool {
    id == shared.identity.id() || shared.heard(id).at_ms.is_some_and(|at| boottime_ms() < at + SILENCE_MS)
}

fn words(shared: &Shared, voters: &BTreeSet<u64>) -> String {
    let (up, down): (Vec<u64>, Vec<u64>) = voters.iter().partition(|id| is_up(shared, **id));
    let list = |ids: &[u64]| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let of = voters.len();
    match (voters.is_empty(), down.is_empty()) {
        (true, _) => format!("monitor {} is not part of a cluster yet", shared.identity.id()),
        (_, true) => "the monitors have no leader yet".into(),
        _ if up.len() * 2 > of => format!(
            "the monitors have no leader yet: {} of {of} are up, no answer from {}",
            up.len(),
            list(&down)
        ),
        _ => format!(
            "the monitors have no quorum: {} of {of} are up ({}), {} are needed, no answer from {}",
            up.len(),
            list(&up),
            of / 2 + 1,
            list(&down)
        ),
    }
}

impl Consensus {
    /// What this monitor believes, and the way to hear of changes.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.0.standing.clone()
    }

    /// Proof that this monitor leads, from after the call; answers the term.
    pub async fn confirm(&self) -> Result<u64, ConsensusError> {
        let (question, answer) = oneshot::channel();
        let ended = || ConsensusError::Stopped("its task has ended".into());
        self.0.questions.send(question).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// The state of the quorum as a sentence, for when there is none.
    pub fn quorum_words(&self) -> String {
        let members = self.0.raft.server_metrics().borrow().membership_config.clone();
        words(&self.0.shared, &members.voter_ids().collect())
    }
}
