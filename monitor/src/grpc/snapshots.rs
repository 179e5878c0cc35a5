//! Taking a snapshot: asks the holder to pause, waits for its word, and for the freeze to be in force.

use super::{Monitor, view};
use crate::state::{Command, MonitorState, Reply};
use gabion_common::clock::boottime_ms;
use gabion_common::monitor_client::RequestId;
use gabion_proto::ids::SnapshotId;
use gabion_proto::pb;
use std::collections::BTreeSet;
use tonic::Status;

/// A holder has this long to end what is in flight; everything of the volume that comes later waits meanwhile.
const PAUSE_WITHIN_MS: u64 = 15_000;

fn taking(state: &MonitorState) -> impl Iterator<Item = SnapshotId> {
    state.volumes.values().filter_map(|v| v.taking.as_ref().map(|(id, _)| *id))
}

impl Monitor {
    pub(super) async fn take_snapshot(
        &self,
        request: Option<RequestId>,
        name: String,
    ) -> Result<pb::SnapshotInfo, Status> {
        let begin = Command::BeginSnapshot { snapshot: name.clone() };
        let Reply::Snapshot(id) = self.propose_for(request, begin).await? else {
            return Err(Status::internal("unexpected answer"));
        };
        let mut standing = self.0.consensus.standing();
        let mut states = self.0.consensus.watch();
        loop {
            let state = states.borrow_and_update().clone();
            if state.snapshots.contains_key(&id) {
                break;
            }
            if !taking(&state).any(|t| t == id) {
                return Err(Status::failed_precondition(format!(
                    "snapshot {name} was not taken: the volume did not pause within {} s, or its holder changed; nothing was changed",
                    PAUSE_WITHIN_MS / 1000
                )));
            }
            tokio::select! {
                changed = states.changed() => {
                    changed.map_err(|_| Status::unavailable("the monitor is stopping"))?;
                }
                // The next leader goes on; the same request finds it there.
                _ = standing.wait_for(|s| s.leads.is_none()) => {
                    return Err(self.failed(crate::raft::ConsensusError::NotLeader));
                }
            }
        }
        // No OSD lets anybody write the frozen layer from here on (rule C6).
        self.in_force(self.state().map.epoch, |_, _| true).await?;
        view::snapshot(&self.state(), id).ok_or_else(|| Status::aborted("the snapshot was removed meanwhile"))
    }

    /// Gives up snapshots that their holders do not answer, so that nothing waits for a dead one for ever.
    pub(super) async fn give_up_snapshots(&self, state: &MonitorState) {
        let now = boottime_ms();
        let open: BTreeSet<SnapshotId> = taking(state).collect();
        let late: Vec<SnapshotId> = {
            let since = &mut self.0.volatile.lock().taking;
            since.retain(|id, _| open.contains(id));
            open.into_iter().filter(|id| now >= *since.entry(*id).or_insert(now) + PAUSE_WITHIN_MS).collect()
        };
        for snapshot in late {
            if let Err(error) = self.propose(Command::GiveUpSnapshot { snapshot }).await {
                tracing::warn!(%snapshot, error = error.message(), "a snapshot could not be given up");
            }
        }
    }
}
