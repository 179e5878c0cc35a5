//! `MapService`: the map as a stream, from any monitor that is in touch with the leader.
//!
//! A follower's map may be a moment old, as every receiver's is; it never goes back on one stream, and a
//! client that has a newer one refuses it and asks elsewhere. A monitor that has lost touch ends its
//! streams, so that nobody waits there for maps that never come.

use super::{Answers, Monitor, Sender};
use crate::raft::ConsensusError;
use gabion_proto::ids::Epoch;
use gabion_proto::pb::{self, map_update::Update};
use tonic::{Request, Response, Status};

async fn follow(monitor: Monitor, mut have: Epoch, tx: Sender<pb::MapUpdate>) {
    let mut states = monitor.0.consensus.watch();
    loop {
        let newest = states.borrow_and_update().clone();
        // Nobody has a map before the first one, nor one of the future unless of another cluster.
        let increments = match have {
            Epoch(0) => None,
            _ => monitor.0.consensus.published().since(have),
        };
        match increments {
            Some(increments) => {
                for increment in increments {
                    have = increment.to;
                    let update = Some(Update::Increment(pb::MapIncrement::from(&*increment)));
                    if tx.send(Ok(pb::MapUpdate { update })).await.is_err() {
                        return;
                    }
                }
            }
            // Before the first map of all there is nothing to send.
            None if newest.map.epoch == Epoch(0) => {}
            None => {
                have = newest.map.epoch;
                let update = Some(Update::Full(pb::ClusterMap::from(&newest.map)));
                if tx.send(Ok(pb::MapUpdate { update })).await.is_err() {
                    return;
                }
            }
        }
        if states.wait_for(|s| s.map.epoch != have).await.is_err() {
            return;
        }
    }
}

#[tonic::async_trait]
impl pb::map_service_server::MapService for Monitor {
    type WatchMapStream = Answers<pb::MapUpdate>;

    async fn watch_map(
        &self,
        request: Request<pb::WatchMapRequest>,
    ) -> Result<Response<Self::WatchMapStream>, Status> {
        let have = Epoch(request.into_inner().have_epoch);
        if !self.0.consensus.standing().borrow().in_touch {
            return Err(self.failed(ConsensusError::NotLeader));
        }
        Ok(Response::new(self.stream(self.adrift(), |tx| follow(self.clone(), have, tx))))
    }
}
