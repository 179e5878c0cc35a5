//! Follows the cluster map: a task that keeps a `WatchMap` stream open to some monitor and publishes
//! every newer map. It starts with the empty map of epoch 0, never publishes an older map or one of
//! another cluster, and reconnects for ever.

use crate::grpc;
use crate::monitor_client::{Backoff, MonitorClient};
use gabion_proto::convert::ConvertError;
use gabion_proto::ids::Epoch;
use gabion_proto::map::{ClusterMap, MapError, MapIncrement};
use gabion_proto::pb;
use gabion_proto::pb::map_update::Update;
use std::sync::Arc;
use tokio::sync::watch;
use tracing::{debug, error, warn};

/// Why a stream of maps was given up.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error("{}", .0.message())]
    Rpc(#[from] tonic::Status),
    #[error("the monitor ended the stream")]
    Ended,
    #[error("a map that is not valid: {0}")]
    Invalid(#[from] ConvertError),
    #[error("{0}")]
    Gap(#[from] MapError),
    #[error("the monitor belongs to cluster {got}, this process to {have}")]
    Foreign { have: gabion_proto::ids::ClusterId, got: gabion_proto::ids::ClusterId },
    #[error("the monitor is behind: it has {got}, this process has {have}")]
    Behind { have: Epoch, got: Epoch },
    #[error("an update without content")]
    Empty,
}

/// Follows the map through the monitors at `addrs` until every receiver is dropped. Malformed
/// addresses are logged once and nothing is followed: validate them first with
/// [`MonitorClient::new`].
pub fn spawn(addrs: Vec<String>) -> watch::Receiver<Arc<ClusterMap>> {
    match MonitorClient::new(&addrs) {
        Ok(monitors) => follow(monitors),
        Err(problem) => {
            error!(%problem, "cannot follow the cluster map");
            watch::channel(Arc::default()).1
        }
    }
}

/// Follows the map through `monitors` until every receiver is dropped. Any monitor will do, the leader
/// or not: one that is behind is told so by the epoch that is asked for, and one that has lost touch
/// with the others ends its streams.
pub fn follow(monitors: MonitorClient) -> watch::Receiver<Arc<ClusterMap>> {
    let (tx, rx) = watch::channel(Arc::<ClusterMap>::default());
    // Where the map comes from and where calls go are different matters.
    let monitors = monitors.fork();
    tokio::spawn(async move {
        let mut backoff = Backoff::default();
        let mut fresh = false;
        loop {
            let before = tx.borrow().epoch;
            let ended = tokio::select! {
                e = stream(&monitors, &tx, fresh) => e,
                _ = tx.closed() => return,
            };
            if tx.borrow().epoch > before {
                backoff.reset();
            }
            // What does not apply or does not parse is asked for again as a whole.
            fresh = matches!(ended, FollowError::Gap(_) | FollowError::Invalid(_));
            match &ended {
                FollowError::Ended => debug!("the map stream ended"),
                FollowError::Foreign { .. } | FollowError::Invalid(_) => {
                    error!(error = %ended, "a monitor's map was refused");
                }
                _ if backoff.is_first() => warn!(error = %ended, "lost the map stream, reconnecting"),
                _ => debug!(error = %ended, "no map stream"),
            }
            monitors.rotate();
            tokio::select! {
                _ = tokio::time::sleep(backoff.next()) => {}
                _ = tx.closed() => return,
            }
        }
    });
    rx
}

async fn stream(monitors: &MonitorClient, tx: &watch::Sender<Arc<ClusterMap>>, fresh: bool) -> FollowError {
    let have_epoch = if fresh { 0 } else { tx.borrow().epoch.0 };
    let mut updates = match monitors.map().watch_map(pb::WatchMapRequest { have_epoch }).await {
        Ok(reply) => {
            monitors.heard(reply.metadata());
            reply.into_inner()
        }
        Err(status) => return grpc::explained(status).into(),
    };
    loop {
        match updates.message().await {
            Ok(Some(update)) => {
                if let Err(e) = apply(tx, update) {
                    return e;
                }
            }
            Ok(None) => return FollowError::Ended,
            Err(status) => return status.into(),
        }
    }
}

/// What an update makes of the map that a follower has (of epoch 0: none).
pub fn updated(have: &ClusterMap, update: pb::MapUpdate) -> Result<ClusterMap, FollowError> {
    match update.update.ok_or(FollowError::Empty)? {
        Update::Full(full) => {
            let next = ClusterMap::try_from(full)?;
            if have.epoch > Epoch(0) && next.cluster != have.cluster {
                return Err(FollowError::Foreign { have: have.cluster, got: next.cluster });
            }
            if next.epoch < have.epoch {
                return Err(FollowError::Behind { have: have.epoch, got: next.epoch });
            }
            Ok(next)
        }
        Update::Increment(increment) => {
            let increment = MapIncrement::try_from(increment)?;
            let mut next = have.clone();
            increment.apply(&mut next)?;
            Ok(next)
        }
    }
}

fn apply(tx: &watch::Sender<Arc<ClusterMap>>, update: pb::MapUpdate) -> Result<(), FollowError> {
    let have = tx.borrow().clone();
    let next = updated(&have, update)?;
    if next.epoch > have.epoch {
        debug!(epoch = %next.epoch, "new map");
        tx.send_replace(Arc::new(next));
    }
    Ok(())
}

/// Waits until the map has reached `epoch`; `None` when nobody follows it any more.
pub async fn reach(map: &mut watch::Receiver<Arc<ClusterMap>>, epoch: Epoch) -> Option<Arc<ClusterMap>> {
    map.wait_for(|m| m.epoch >= epoch).await.ok().map(|m| m.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gabion_proto::ids::ClusterId;

    fn full(cluster: u8, epoch: u64) -> pb::MapUpdate {
        let map = ClusterMap { cluster: ClusterId([cluster; 16]), epoch: Epoch(epoch), ..Default::default() };
        pb::MapUpdate { update: Some(Update::Full((&map).into())) }
    }
    fn increment(from: u64, to: u64) -> pb::MapUpdate {
        let i = MapIncrement { from: Epoch(from), to: Epoch(to), ..Default::default() };
        pb::MapUpdate { update: Some(Update::Increment((&i).into())) }
    }

    #[test]
    fn publishes_only_what_is_newer_and_ours() {
        let (tx, rx) = watch::channel(Arc::<ClusterMap>::default());
        apply(&tx, full(1, 5)).unwrap();
        apply(&tx, increment(5, 6)).unwrap();
        assert_eq!(rx.borrow().epoch, Epoch(6));
        assert!(matches!(apply(&tx, increment(5, 7)), Err(FollowError::Gap(_))));
        assert!(matches!(apply(&tx, full(1, 5)), Err(FollowError::Behind { .. })));
        assert!(matches!(apply(&tx, full(2, 9)), Err(FollowError::Foreign { .. })));
        assert!(matches!(apply(&tx, pb::MapUpdate { update: None }), Err(FollowError::Empty)));
        assert_eq!(rx.borrow().epoch, Epoch(6));
        apply(&tx, full(1, 9)).unwrap();
        assert_eq!(rx.borrow().epoch, Epoch(9));
    }
}
