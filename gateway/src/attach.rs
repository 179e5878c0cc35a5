//! Volumes that this gateway has attached, each once however many exports use it.

use crate::session::Granted;
use crate::volume::{ClusterBackend, Shape, Volume};
use gabion_common::client::{Attached, ClusterClient, ObjectClient};
use gabion_common::map_watch;
use gabion_common::monitor_client::MonitorClient;
use gabion_proto::ids::{Epoch, Generation, LayerId, PoolId, VolumeId};
use gabion_proto::limits::{BLOCK_BYTES, LAYERS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use gabion_proto::pb;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// How long the map may take to reach the epoch of an attachment.
const MAP_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("{}", .0.message())]
    Monitor(#[from] tonic::Status),
    #[error("the monitor's description of the volume is not valid: {0}")]
    Shape(&'static str),
    #[error("the map does not reach {0}")]
    Map(Epoch),
}

struct Open {
    volume: Arc<Volume>,
    generation: Generation,
    read_only: bool,
    users: usize,
}

/// Held while attaching and detaching that one volume.
type Slot = Arc<tokio::sync::Mutex<Option<Open>>>;

/// The attached volumes.
pub struct Volumes {
    monitors: MonitorClient,
    cluster: Arc<ClusterClient>,
    granted: Granted,
    io_timeout: Option<Duration>,
    // Held to find a slot only.
    slots: Mutex<HashMap<String, Slot>>,
}

impl Volumes {
    pub fn new(
        monitors: MonitorClient,
        cluster: Arc<ClusterClient>,
        granted: Granted,
        io_timeout: Option<Duration>,
    ) -> Volumes {
        Volumes { monitors, cluster, granted, io_timeout, slots: Mutex::default() }
    }

    fn slot(&self, name: &str) -> Slot {
        self.slots.lock().entry(name.to_owned()).or_default().clone()
    }

    /// The volume, attached if it was not, and whether it may only be read. To be given back with
    /// [`close`](Volumes::close).
    pub async fn open(&self, name: &str) -> Result<(Arc<Volume>, bool), AttachError> {
        let slot = self.slot(name);
        let mut slot = slot.lock().await;
        let open = match &mut *slot {
            Some(open) => open,
            none => none.insert(self.attach(name).await?),
        };
        open.users += 1;
        Ok((open.volume.clone(), open.read_only))
    }

    /// Gives the volume back; the last one detaches it, once nothing is in flight.
    pub async fn close(&self, name: &str) {
        let slot = self.slot(name);
        let mut slot = slot.lock().await;
        let Some(open) = &mut *slot else { return };
        open.users -= 1;
        if open.users > 0 {
            return;
        }
        open.volume.drain().await;
        let request = pb::DetachVolumeRequest {
            volume: name.to_owned(),
            client: self.granted.client.0,
            generation: open.generation.0,
        };
        let detached = self
            .monitors
            .until_answered("detach a volume", |m| {
                let request = request.clone();
                async move { m.client().detach_volume(request).await }
            })
            .await;
        match detached {
            Ok(_) => tracing::info!(volume = name, "detached"),
            Err(status) => tracing::warn!(volume = name, error = status.message(), "cannot detach"),
        }
        *slot = None;
    }

    async fn attach(&self, name: &str) -> Result<Open, AttachError> {
        let request = pb::AttachVolumeRequest {
            volume: name.to_owned(),
            client: self.granted.client.0,
            session: self.granted.session.0,
            take_over: false,
        };
        let reply = self
            .monitors
            .once(|m| {
                let request = request.clone();
                async move { m.client().attach_volume(request).await }
            })
            .await?;
        let size = reply.size_bytes;
        let (top, below) = reply.layers.split_first().ok_or(AttachError::Shape("no layer"))?;
        let size_ok =
            (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size) && size.is_multiple_of(BLOCK_BYTES.into());
        if !size_ok || reply.layers.len() > LAYERS_MAX {
            return Err(AttachError::Shape("its size or number of layers is out of range"));
        }
        let epoch = Epoch(reply.epoch);
        let mut watch = self.cluster.watch();
        let map = tokio::time::timeout(MAP_TIMEOUT, map_watch::reach(&mut watch, epoch))
            .await
            .ok()
            .flatten()
            .ok_or(AttachError::Map(epoch))?;
        let pool =
            map.pools.get(&PoolId(reply.pool)).ok_or(AttachError::Shape("its pool is not in the map"))?;
        let shape = Shape {
            id: VolumeId(reply.volume),
            name: name.to_owned(),
            size_bytes: size,
            object_bytes: pool.object_bytes,
        };
        let generation = Generation(reply.generation);
        let attached = Attached::new(shape.id, self.granted.client, self.granted.session, generation);
        let backend = ClusterBackend {
            objects: ObjectClient::new(self.cluster.clone(), Arc::new(attached), self.io_timeout),
            pool: PoolId(reply.pool),
            volume: shape.id,
            top: LayerId(*top),
            below: below.iter().copied().map(LayerId).collect(),
        };
        tracing::info!(volume = name, %generation, size_bytes = size, "attached");
        let volume = Volume::new(shape, Box::new(backend));
        Ok(Open { volume, generation, read_only: reply.read_only, users: 0 })
    }
}
