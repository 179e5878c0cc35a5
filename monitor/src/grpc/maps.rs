//! `MapService`: the map as a stream.

use super::{Answers, Monitor, Sender};
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
        Ok(Response::new(self.stream(|tx| follow(self.clone(), have, tx))))
    }
}
