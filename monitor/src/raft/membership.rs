//! The monitors of the cluster: listing, adding, removing.
//!
//! A monitor is added in two steps, so that it never counts for the quorum before it has the state:
//! first it is told everything without a vote, then it votes. A removal that would leave fewer than a
//! quorum of those who are up is refused: nothing could be agreed on afterwards, not even to undo it.

use super::standing::{SILENCE_MS, is_up};
use super::{Consensus, ConsensusError, MonitorNode, StoreId, stopped};
use crate::state::Command;
use gabion_common::monitor_client::RequestId;
use gabion_proto::convert;
use gabion_proto::limits::MONITORS_MAX;
use gabion_proto::pb::InviteRequest;
use openraft::ChangeMembers;
use openraft::error::{ChangeMembershipError, ClientWriteError, RaftError};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

/// How long the new monitor may take to say who it is, or the old one to hear that it is removed.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one call waits until the new monitor has the state; the next one goes on from there.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(12);
/// How long a change of the membership may take.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// A monitor as this one sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    pub addr: String,
    pub leader: bool,
    pub up: bool,
    pub voter: bool,
    /// Why it is not up, if that is known.
    pub error: String,
}

/// Why the membership was not changed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("{0}")]
    Invalid(String),
    #[error("there is no monitor {0}")]
    NotFound(u64),
    #[error("{0}")]
    Precondition(String),
    /// It may have been or will be.
    #[error("{0}")]
    Later(String),
    #[error(transparent)]
    Consensus(#[from] ConsensusError),
}

fn write_failed(e: RaftError<u64, ClientWriteError<u64, MonitorNode>>) -> MembershipError {
    match e {
        RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => ConsensusError::NotLeader.into(),
        RaftError::APIError(ClientWriteError::ChangeMembershipError(
            e @ ChangeMembershipError::InProgress(_),
        )) => MembershipError::Later(format!("another change of the monitors is under way: {e}")),
        e => stopped(e).into(),
    }
}

impl Consensus {
    fn nodes(&self) -> (BTreeMap<u64, MonitorNode>, BTreeSet<u64>) {
        let membership = self.0.raft.server_metrics().borrow().membership_config.clone();
        let nodes = membership.nodes().map(|(id, n)| (*id, n.clone())).collect();
        (nodes, membership.voter_ids().collect())
    }

    /// The monitors that there are, in the order of their numbers.
    pub fn members(&self) -> Vec<Member> {
        let (nodes, voters) = self.nodes();
        let standing = self.0.standing.borrow().clone();
        let me = self.id();
        let one = |(id, node): (u64, MonitorNode)| Member {
            id,
            // Its own address it knows better than the membership, which keeps what it was.
            addr: if id == me { self.0.addr.clone() } else { node.addr },
            leader: standing.leader == Some(id) && standing.in_touch,
            up: is_up(&self.0.shared, id),
            voter: voters.contains(&id),
            error: if is_up(&self.0.shared, id) { String::new() } else { self.0.shared.heard(id).error },
        };
        nodes.into_iter().map(one).collect()
    }

    async fn invite(&self, addr: SocketAddr) -> Result<(u64, StoreId), MembershipError> {
        let cluster = self.cluster().ok_or(ConsensusError::NotLeader)?;
        let refused = |s: tonic::Status| match s.code() {
            tonic::Code::FailedPrecondition => MembershipError::Precondition(s.message().to_owned()),
            _ => MembershipError::Precondition(format!("no monitor answers at {addr}: {}", s.message())),
        };
        let mut client = self.0.shared.client(&addr.to_string()).map_err(refused)?;
        let call = client.invite(InviteRequest { cluster: cluster.0.to_vec() });
        let answer = tokio::time::timeout(ASK_TIMEOUT, call).await;
        let timeout = |_| MembershipError::Precondition(format!("no monitor answers at {addr} in time"));
        let reply = answer.map_err(timeout)?.map_err(refused)?.into_inner();
        let store = convert::identity("store", &reply.store)
            .map_err(|e| MembershipError::Precondition(format!("the monitor at {addr} answered {e}")))?;
        Ok((reply.id, StoreId(store.0)))
    }

    /// Makes the empty monitor at `addr` part of the cluster; answers its number. Going on with what an
    /// earlier call began, and changing nothing when all is done.
    pub async fn add_monitor(&self, addr: &str) -> Result<u64, MembershipError> {
        let invalid = || MembershipError::Invalid(format!("{addr:?} is not an address of the form ip:port"));
        let socket: SocketAddr = addr.parse().map_err(|_| invalid())?;
        self.confirm().await?;
        let (id, store) = self.invite(socket).await?;
        let node = MonitorNode { addr: socket.to_string(), store };
        let (nodes, voters) = self.nodes();
        match nodes.get(&id) {
            Some(known) if *known == node && voters.contains(&id) => return Ok(id),
            Some(known) if *known == node => {}
            Some(known) if known.store == store => {
                return Err(MembershipError::Precondition(format!(
                    "monitor {id} is known at {}: remove it first, an address is for good",
                    known.addr
                )));
            }
            Some(_) => {
                return Err(MembershipError::Precondition(format!(
                    "there is a monitor {id} with other data: remove it first"
                )));
            }
            None if nodes.len() >= MONITORS_MAX => {
                return Err(MembershipError::Precondition(format!(
                    "a cluster has at most {MONITORS_MAX} monitors"
                )));
            }
            None => {}
        }
        let adding = self.0.raft.add_learner(id, node, true);
        match tokio::time::timeout(CATCH_UP_TIMEOUT, adding).await {
            Ok(added) => added.map_err(write_failed)?,
            Err(_) => {
                return Err(MembershipError::Later(format!("monitor {id} has not caught up yet: try again")));
            }
        };
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id])), true).await?;
        tracing::info!(monitor = id, addr, "monitor added");
        let text = format!("monitor {id} at {addr} was added");
        self.propose(Command::Announce { text }).await?.ok();
        Ok(id)
    }

    /// Takes a monitor out of the cluster, also one that is down.
    pub async fn remove_monitor(&self, id: u64, request: Option<RequestId>) -> Result<(), MembershipError> {
        self.confirm().await?;
        // The answer to an earlier try may be lost: then it is gone already and that is well.
        let again = request.is_some_and(|r| self.state().answer_to(r.0).is_some());
        let (nodes, voters) = self.nodes();
        let Some(node) = nodes.get(&id) else {
            return if again { Ok(()) } else { Err(MembershipError::NotFound(id)) };
        };
        if voters.contains(&id) {
            let left: Vec<u64> = voters.iter().copied().filter(|v| *v != id).collect();
            let up = left.iter().filter(|v| is_up(&self.0.shared, **v)).count();
            if left.is_empty() {
                return Err(MembershipError::Precondition("the last monitor cannot be removed".into()));
            }
            if up * 2 <= left.len() {
                return Err(MembershipError::Precondition(format!(
                    "without monitor {id} there is no quorum: of the other {} only {up} answered in the last {} s",
                    left.len(),
                    SILENCE_MS / 1000
                )));
            }
        }
        // Remembers the request before anything is done.
        let text = format!("monitor {id} at {} is removed", node.addr);
        self.propose_for(request, Command::Announce { text }).await?.ok();
        let gone = BTreeSet::from([id]);
        let change = match voters.contains(&id) {
            true => ChangeMembers::RemoveVoters(gone),
            false => ChangeMembers::RemoveNodes(gone),
        };
        self.change(change, false).await?;
        tracing::info!(monitor = id, "monitor removed");
        self.tell_dismissed(id, node.clone());
        Ok(())
    }

    fn tell_dismissed(&self, id: u64, node: MonitorNode) {
        if id == self.id() {
            if let Err(error) = self.be_dismissed() {
                tracing::error!(%error, "cannot note that this monitor was removed");
            }
            return;
        }
        let shared = self.0.shared.clone();
        tokio::spawn(async move {
            let request = shared.request(id, node.store, Vec::new());
            let Ok(mut client) = shared.client(&node.addr) else { return };
            // One that is down hears it from nobody; what it asks the others is refused or in vain.
            if tokio::time::timeout(ASK_TIMEOUT, client.dismiss(request)).await.is_err() {
                tracing::info!(monitor = id, "the removed monitor does not answer");
            }
        });
    }

    async fn change(
        &self,
        change: ChangeMembers<u64, MonitorNode>,
        retain: bool,
    ) -> Result<(), MembershipError> {
        match tokio::time::timeout(CHANGE_TIMEOUT, self.0.raft.change_membership(change, retain)).await {
            Ok(done) => done.map(drop).map_err(write_failed),
            Err(_) => Err(ConsensusError::NoQuorum(self.quorum_words()).into()),
        }
    }

    /// A new leader ends a change that the one before left half done.
    pub async fn settle_membership(&self) {
        let membership = self.0.raft.server_metrics().borrow().membership_config.clone();
        let joint = membership.membership().get_joint_config().clone();
        if let [_, .., last] = &joint[..] {
            tracing::warn!(voters = ?last, "ending a change of the monitors that was left half done");
            let change = ChangeMembers::ReplaceAllVoters(last.clone());
            if let Err(error) = self.change(change, false).await {
                tracing::warn!(%error, "the change of the monitors is still half done");
            }
        }
    }
}
