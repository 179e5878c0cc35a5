//! What the map asks of the holder of a volume while it is attached: to take over a greater size, and to pause for a snapshot.
//!
//! ```text
//!   serving ──the map asks──▶ pausing ──nothing in flight──▶ sealing ──answered, map reached──▶ serving, new layer on top
//!      ▲                        │ no longer asked for           │ given up, or not the holder any more
//!      └────────────────────────┴───────────────────────────────┘ the layers as before
//! ```
//!
//! Rule C6. While it is sealing nothing of the volume is in flight, and whether the snapshot was taken is known only to
//! the monitors: the holder waits for their answer however long that takes, and writes nothing meanwhile. From the epoch of the
//! snapshot on every OSD refuses writes to the frozen layer, so a holder that has stopped before it heard the answer
//! cannot change the snapshot either.

use crate::session::Granted;
use crate::volume::{Chain, Volume};
use gabion_common::map_watch;
use gabion_common::monitor_client::MonitorClient;
use gabion_proto::ids::{Epoch, Generation, SnapshotId, VolumeId};
use gabion_proto::map::{Attachment, ClusterMap};
use gabion_proto::pb;
use std::sync::Arc;
use tokio::sync::watch;

/// One attached volume.
pub struct Holder {
    pub monitors: MonitorClient,
    pub granted: Granted,
    pub id: VolumeId,
    pub generation: Generation,
    pub volume: Arc<Volume>,
    pub chain: Arc<Chain>,
}

impl Holder {
    fn own<'a>(&self, map: &'a ClusterMap) -> Option<&'a Attachment> {
        map.attachments.get(&self.id).filter(|a| {
            (a.client, a.session, a.generation)
                == (self.granted.client, self.granted.session, self.generation)
        })
    }

    fn asked(&self, map: &ClusterMap) -> Option<SnapshotId> {
        self.own(map)?.snapshot
    }

    /// Follows the map until nobody does.
    pub async fn follow(self, mut map: watch::Receiver<Arc<ClusterMap>>) {
        loop {
            let now = map.borrow_and_update().clone();
            if let Some(own) = self.own(&now) {
                self.volume.grow(own.size_bytes);
            }
            let followed = match self.asked(&now) {
                Some(snapshot) => self.snapshot(snapshot, &mut map).await.is_some(),
                None => map.changed().await.is_ok(),
            };
            if !followed {
                return;
            }
        }
    }

    /// Ends when the map does not ask for this snapshot any more; `None` when nobody follows the map.
    async fn snapshot(&self, snapshot: SnapshotId, map: &mut watch::Receiver<Arc<ClusterMap>>) -> Option<()> {
        let paused = tokio::select! {
            paused = self.volume.pause() => paused,
            over = map.wait_for(|m| self.asked(m) != Some(snapshot)) => return over.ok().map(drop),
        };
        let request = pb::SealSnapshotRequest {
            volume: self.id.0,
            client: self.granted.client.0,
            session: self.granted.session.0,
            generation: self.generation.0,
            snapshot: snapshot.0,
        };
        let sealed = self
            .monitors
            .until_answered("seal a snapshot", |m| async move { m.client().seal_snapshot(request).await })
            .await;
        match sealed {
            Ok(reply) => {
                map_watch::reach(map, Epoch(reply.epoch)).await?;
                let volume = self.volume.name();
                if self.chain.replace(&reply.layers) {
                    tracing::info!(volume, %snapshot, layers = ?reply.layers, "paused for a snapshot");
                } else {
                    // It goes on with the layers that it knows, and the OSDs say what may be written.
                    tracing::error!(volume, %snapshot, "the monitor's answer names no layers");
                }
            }
            Err(status) => {
                let (volume, error) = (self.volume.name(), status.message());
                tracing::warn!(volume, %snapshot, error, "not the holder of the volume any more");
            }
        }
        drop(paused);
        map.wait_for(|m| self.asked(m) != Some(snapshot)).await.ok().map(drop)
    }
}
