//! What only a leader does, and what the others say instead.
//!
//! ```text
//!              a term in which this monitor leads
//!   (none) ───────────────────────────────────────▶ Lead { term, detector, ... }
//!                                                     │  a later such term: everything
//!                                                     └─ volatile starts from nothing
//! ```
//!
//! Leases, reports and silence belong to one term of one leader; `decide` says why. A [`Lead`] whose
//! term is over does no harm: what it decides is agreed on in its own term or not at all.

use super::{Monitor, refused};
use crate::decide::{Event, FailureDetector};
use crate::raft::{ConsensusError, MembershipError};
use crate::state::{Command, Reply};
use gabion_common::clock::boottime_ms;
use gabion_common::monitor_client::{RequestId, headers};
use gabion_proto::ids::Epoch;
use std::time::Duration;
use tonic::{Request, Status};

/// How often the failure detector looks.
const TICK: Duration = Duration::from_millis(200);
/// Hosts report this often at least: until then a new leader does not know which there are.
const HOSTS_REPORT_MS: u64 = 6_000;

pub(super) struct Lead {
    pub term: u64,
    pub detector: FailureDetector,
    since_ms: u64,
    /// There was a cluster before this term, so there may be hosts that have not reported yet.
    inherited: bool,
}

/// A call: its request id, if it has one, and what it asks.
pub(super) fn open<T>(request: Request<T>) -> Result<(Option<RequestId>, T), Status> {
    let id = RequestId::of(request.metadata())?;
    Ok((id, request.into_inner()))
}

impl Monitor {
    /// Everything volatile starts anew with each term in which this monitor leads.
    pub(super) fn take_lead(&self, term: u64) {
        let mut lead = self.0.lead.lock();
        if lead.as_ref().is_some_and(|l| l.term >= term) {
            return;
        }
        *self.0.volatile.lock() = Default::default();
        *lead = Some(Lead {
            term,
            detector: FailureDetector::new(self.0.timing),
            since_ms: boottime_ms(),
            inherited: self.state().map.epoch > Epoch(1),
        });
        drop(lead);
        tracing::info!(term, "this monitor leads");
        let consensus = self.0.consensus.clone();
        tokio::spawn(async move { consensus.settle_membership().await });
    }

    /// Proof that this monitor leads and its state is not older than the call.
    pub(super) async fn confirm(&self) -> Result<u64, Status> {
        let term = self.0.consensus.confirm().await.map_err(|e| self.failed(e))?;
        self.take_lead(term);
        Ok(term)
    }

    /// For what does no harm at a monitor that led until a moment ago.
    pub(super) fn seems_to_lead(&self) -> Result<(), Status> {
        let standing = self.0.consensus.standing();
        let standing = standing.borrow();
        match (standing.leads, standing.in_touch) {
            (Some(_), true) => Ok(()),
            _ => Err(self.failed(ConsensusError::NotLeader)),
        }
    }

    /// Whether hosts may not have reported to this leader yet.
    pub(super) fn hosts_unheard(&self) -> bool {
        let lead = self.0.lead.lock();
        lead.as_ref().is_none_or(|l| l.inherited && boottime_ms() < l.since_ms + HOSTS_REPORT_MS)
    }

    /// To be asked again: a new leader has not heard from everybody.
    pub(super) fn too_early(&self, who: &str) -> Status {
        self.later(format!("this monitor leads since a moment ago: each {who} has yet to report"))
    }

    /// A refusal after which the same call may succeed.
    fn later(&self, message: String) -> Status {
        let mut status = Status::unavailable(message);
        headers::put(status.metadata_mut(), headers::MONITOR, &self.0.consensus.id().to_string());
        status
    }

    /// What a caller is told when this monitor cannot do it: where to go, or what is missing.
    pub(super) fn failed(&self, e: ConsensusError) -> Status {
        let consensus = &self.0.consensus;
        let standing = consensus.standing().borrow().clone();
        let lost = matches!(e, ConsensusError::NoQuorum(_)) || !standing.in_touch;
        let message = match (&e, &standing.leader_addr) {
            (ConsensusError::NotLeader, Some(addr)) if !lost => {
                format!("monitor {} does not lead: ask the one at {addr}", consensus.id())
            }
            (ConsensusError::NotLeader, _) => consensus.quorum_words(),
            _ => e.to_string(),
        };
        let mut status = Status::unavailable(message);
        let metadata = status.metadata_mut();
        headers::put(metadata, headers::MONITOR, &consensus.id().to_string());
        headers::put(metadata, headers::MONITORS, &standing.addrs);
        match (&e, standing.leader_addr) {
            (ConsensusError::NotLeader, Some(addr)) if !lost => {
                headers::put(metadata, headers::LEADER, &addr)
            }
            _ if lost => headers::put(metadata, headers::NO_QUORUM, "1"),
            _ => {}
        }
        status
    }

    pub(super) fn membership_failed(&self, e: MembershipError) -> Status {
        match e {
            MembershipError::Invalid(m) => Status::invalid_argument(m),
            MembershipError::NotFound(_) => Status::not_found(e.to_string()),
            MembershipError::Precondition(m) => Status::failed_precondition(m),
            MembershipError::Later(m) => self.later(m),
            MembershipError::Consensus(e) => self.failed(e),
        }
    }

    pub(super) async fn propose(&self, command: Command) -> Result<Reply, Status> {
        self.propose_for(None, command).await
    }

    /// Has a request carried out, once.
    pub(super) async fn propose_for(
        &self,
        request: Option<RequestId>,
        command: Command,
    ) -> Result<Reply, Status> {
        let agreed = self.0.consensus.propose_for(request, command).await;
        agreed.map_err(|e| self.failed(e))?.map_err(refused)
    }

    /// The answer to an earlier try of this request, looked for before the world is: it may have
    /// changed since.
    pub(super) async fn answered(&self, request: Option<RequestId>) -> Result<Option<Reply>, Status> {
        self.confirm().await?;
        let Some(request) = request else { return Ok(None) };
        self.state().answer_to(request.0).cloned().transpose().map_err(refused)
    }

    /// Lets the failure detector act on an event, and has its decisions agreed on.
    pub(super) async fn detect(&self, event: Event) {
        let leads = self.0.consensus.standing().borrow().leads;
        let (term, commands) = match &mut *self.0.lead.lock() {
            Some(lead) if leads == Some(lead.term) => {
                // The state is read under the lock, as for leases.
                (lead.term, lead.detector.step(boottime_ms(), &self.state(), event))
            }
            _ => return,
        };
        for command in commands {
            let shown = format!("{command:?}");
            match self.0.consensus.propose_in(term, command).await {
                Ok(Ok(_)) => tracing::warn!(decision = shown, "failure handling"),
                Ok(Err(refusal)) => tracing::debug!(decision = shown, %refusal, "overtaken"),
                Err(error) => tracing::warn!(decision = shown, %error, "a decision could not be agreed on"),
            }
        }
    }

    /// Runs the failure detector and the meters while this monitor leads, until the daemon stops.
    pub(super) async fn watch_over(self) {
        let mut stop = self.0.stop.clone();
        let mut standing = self.0.consensus.standing();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let leads = standing.borrow_and_update().leads;
            if let Some(term) = leads {
                self.take_lead(term);
            }
            tokio::select! {
                _ = tick.tick(), if leads.is_some() => {}
                changed = standing.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                _ = stop.wait_for(|s| *s) => return,
            }
            self.detect(Event::Tick).await;
            let state = self.state();
            self.give_up_snapshots(&state).await;
            let slow = self.0.lead.lock().as_ref().map(|l| l.detector.slow()).unwrap_or_default();
            let forgot = {
                let mut volatile = self.0.volatile.lock();
                volatile.slow = slow;
                volatile.tick(boottime_ms(), &state)
            };
            if forgot {
                self.0.host_reports.send_modify(|n| *n += 1);
            }
        }
    }
}
