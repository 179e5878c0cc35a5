//! `ClientService`: sessions of gateways, and attachments with their fences (rules C1 to C3).

use super::Monitor;
use super::leadership::open;
use crate::raft::ConsensusError;
use crate::state::{Command, MonitorState, Reply};
use gabion_proto::ids::*;
use gabion_proto::pb::{self, Empty};
use std::time::Duration;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

/// How long an attach waits for the fence: longer than a lease, so that a dead OSD is known to be.
const FENCE_TIMEOUT: Duration = Duration::from_secs(15);

impl Monitor {
    /// Waits until every OSD that `counts` picks has `epoch` in force or is down (its lease has run out).
    ///
    /// What is waited for are facts, whoever leads: an acknowledgement stays one, and down is agreed on.
    pub(super) async fn in_force(
        &self,
        epoch: Epoch,
        counts: impl Fn(&MonitorState, OsdId) -> bool + Send,
    ) -> Result<(), Status> {
        let mut standing = self.0.consensus.standing();
        let mut reports = self.0.osd_reports.subscribe();
        let mut states = self.0.consensus.watch();
        let deadline = tokio::time::Instant::now() + FENCE_TIMEOUT;
        loop {
            let state = states.borrow_and_update().clone();
            reports.mark_unchanged();
            let Some(behind) = self.0.volatile.lock().behind(&state, epoch, &counts) else { return Ok(()) };
            let stopping = || Status::unavailable("the monitor is stopping");
            tokio::select! {
                changed = reports.changed() => changed.map_err(|_| stopping())?,
                changed = states.changed() => changed.map_err(|_| stopping())?,
                // Acknowledgements go to the leader.
                _ = standing.wait_for(|s| s.leads.is_none()) => {
                    return Err(self.failed(ConsensusError::NotLeader));
                }
                () = tokio::time::sleep_until(deadline) => {
                    return Err(Status::unavailable(format!("{behind} has not put epoch {epoch} in force: try again")));
                }
            }
        }
    }
}

#[tonic::async_trait]
impl pb::client_service_server::ClientService for Monitor {
    async fn open_session(&self, request: Request<pb::OpenSessionRequest>) -> Answer<pb::OpenSessionReply> {
        let (id, r) = open(request)?;
        let command = Command::OpenSession { client: ClientId(r.client), host: r.host };
        match self.propose_for(id, command).await? {
            Reply::Session { client, session } => Ok(Response::new(pb::OpenSessionReply {
                client: client.0,
                session: session.0,
                cluster: self.state().map.cluster.0.to_vec(),
            })),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn attach_volume(
        &self,
        request: Request<pb::AttachVolumeRequest>,
    ) -> Answer<pb::AttachVolumeReply> {
        let r = request.into_inner();
        let term = self.confirm().await?;
        let name = r.volume.clone();
        let command = Command::AttachVolume {
            volume: r.volume,
            client: ClientId(r.client),
            session: Session(r.session),
            take_over: r.take_over,
        };
        let Reply::Attached { volume, generation, epoch } = self.propose(command).await? else {
            return Err(Status::internal("unexpected answer"));
        };
        if let Err(late) = self.in_force(epoch, |_, _| true).await {
            // Nobody was told of it, and who asked may not ask again: it must not stay. But under another
            // leader who asked may have been answered meanwhile, with the same generation.
            let detach = Command::DetachVolume { volume: name, client: ClientId(r.client), generation };
            if let Err(error) = self.0.consensus.propose_in(term, detach).await {
                tracing::warn!(%volume, %generation, %error, "an attachment that came too late stays");
            }
            return Err(late);
        }
        let state = self.state();
        // Somebody may have taken it over while this one waited.
        let held = state.map.attachments.get(&volume);
        let still = held.is_some_and(|h| h.generation == generation && h.session == Session(r.session));
        let (Some(v), true) = (state.volumes.get(&volume), still) else {
            return Err(Status::aborted("the attachment was lost before it was in force"));
        };
        Ok(Response::new(pb::AttachVolumeReply {
            volume: volume.0,
            generation: generation.0,
            epoch: epoch.0,
            size_bytes: v.size_bytes,
            pool: v.pool.0,
            layers: v.layers.iter().map(|l| l.0).collect(),
            read_only: false,
            root: v.root.0,
        }))
    }

    async fn seal_snapshot(
        &self,
        request: Request<pb::SealSnapshotRequest>,
    ) -> Answer<pb::SealSnapshotReply> {
        let r = request.into_inner();
        self.confirm().await?;
        let (client, session, generation) =
            (ClientId(r.client), Session(r.session), Generation(r.generation));
        let (volume, snapshot) = (VolumeId(r.volume), SnapshotId(r.snapshot));
        self.propose(Command::SealSnapshot { volume, client, session, generation, snapshot }).await?;
        let state = self.state();
        let held = state.map.attachments.get(&volume);
        let still = held.is_some_and(|h| h.generation == generation && h.session == session);
        match state.volumes.get(&volume) {
            Some(v) if still => Ok(Response::new(pb::SealSnapshotReply {
                epoch: state.map.epoch.0,
                layers: v.layers.iter().map(|l| l.0).collect(),
            })),
            _ => Err(Status::aborted("the attachment was lost meanwhile")),
        }
    }

    async fn detach_volume(&self, request: Request<pb::DetachVolumeRequest>) -> Answer<Empty> {
        let r = request.into_inner();
        self.propose(Command::DetachVolume {
            volume: r.volume,
            client: ClientId(r.client),
            generation: Generation(r.generation),
        })
        .await?;
        Ok(Response::new(Empty {}))
    }
}
