//! `MonitorPeerService`: what the other monitors ask of this one.
//!
//! Nothing is taken from another cluster, nor meant for other data than this (see [`super::identity`]).

use super::network::{Piece, Shared};
use super::{Consensus, StoreId};
use gabion_proto::convert;
use gabion_proto::limits::MONITOR_SNAPSHOT_BYTES_MAX;
use gabion_proto::pb::{self, Empty};
use openraft::error::{InstallSnapshotError, RaftError};
use openraft::raft::{AppendEntriesRequest, InstallSnapshotRequest, VoteRequest};
use serde::{Serialize, de::DeserializeOwned};
use std::sync::Arc;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

#[derive(Clone)]
pub(crate) struct PeerService {
    consensus: Consensus,
    shared: Arc<Shared>,
}

fn malformed(e: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("a malformed request: {e}"))
}

fn reply<T: Serialize>(answer: &T) -> Answer<pb::PeerReply> {
    let body = postcard::to_stdvec(answer).map_err(|e| Status::internal(e.to_string()))?;
    Ok(Response::new(pb::PeerReply { body }))
}

fn failed<E: std::error::Error>(e: RaftError<u64, E>) -> Status {
    Status::internal(e.to_string())
}

impl PeerService {
    pub fn new(consensus: Consensus, shared: Arc<Shared>) -> PeerService {
        PeerService { consensus, shared }
    }

    /// The body of a request that is meant for this monitor.
    async fn admit(&self, request: Request<pb::PeerRequest>) -> Result<Vec<u8>, Status> {
        let r = request.into_inner();
        if self.shared.links.is_cut(r.from) {
            return std::future::pending().await;
        }
        let cluster = convert::identity("cluster", &r.cluster).map_err(malformed)?;
        let store = convert::identity("to_store", &r.to_store).map_err(malformed)?;
        let identity = &self.shared.identity;
        match identity.cluster() {
            Some(mine) if mine == cluster => {}
            Some(mine) => {
                return Err(Status::failed_precondition(format!("this is cluster {mine}, not {cluster}")));
            }
            None => {
                return Err(Status::failed_precondition(
                    "this monitor is empty and not part of a cluster: remove it and add it again",
                ));
            }
        }
        if (identity.id(), identity.store()) != (r.to, StoreId(store.0)) {
            return Err(Status::failed_precondition(format!(
                "this is monitor {} with other data than the cluster knows: remove it and add it again",
                identity.id()
            )));
        }
        Ok(r.body)
    }

    async fn body<T: DeserializeOwned>(&self, request: Request<pb::PeerRequest>) -> Result<T, Status> {
        postcard::from_bytes(&self.admit(request).await?).map_err(malformed)
    }
}

#[tonic::async_trait]
impl pb::monitor_peer_service_server::MonitorPeerService for PeerService {
    async fn append(&self, request: Request<pb::PeerRequest>) -> Answer<pb::PeerReply> {
        let request: AppendEntriesRequest<super::Types> = self.body(request).await?;
        reply(&self.consensus.raft().append_entries(request).await.map_err(failed)?)
    }

    async fn vote(&self, request: Request<pb::PeerRequest>) -> Answer<pb::PeerReply> {
        let request: VoteRequest<u64> = self.body(request).await?;
        reply(&self.consensus.raft().vote(request).await.map_err(failed)?)
    }

    async fn install_snapshot(&self, request: Request<pb::PeerRequest>) -> Answer<pb::PeerReply> {
        let request: InstallSnapshotRequest<super::Types> = self.body(request).await?;
        let end = request.offset.saturating_add(request.data.len() as u64);
        if end > MONITOR_SNAPSHOT_BYTES_MAX {
            return Err(malformed(format!("a snapshot of more than {MONITOR_SNAPSHOT_BYTES_MAX} bytes")));
        }
        reply(&match self.consensus.raft().install_snapshot(request).await {
            Ok(response) => Piece::Taken(response),
            Err(RaftError::APIError(InstallSnapshotError::SnapshotMismatch(m))) => Piece::Mismatch(m),
            Err(fatal) => return Err(failed(fatal)),
        })
    }

    async fn invite(&self, request: Request<pb::InviteRequest>) -> Answer<pb::InviteReply> {
        let cluster = convert::identity("cluster", &request.into_inner().cluster).map_err(malformed)?;
        let identity = &self.shared.identity;
        if !identity.adopt(cluster).map_err(|e| Status::internal(e.to_string()))? {
            return Err(Status::failed_precondition(format!(
                "monitor {} belongs to another cluster: only an empty one can be added",
                identity.id()
            )));
        }
        Ok(Response::new(pb::InviteReply { id: identity.id(), store: identity.store().0.to_vec() }))
    }

    async fn dismiss(&self, request: Request<pb::PeerRequest>) -> Answer<Empty> {
        self.admit(request).await?;
        self.consensus.be_dismissed().map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(Empty {}))
    }
}
