//! Volumes that this gateway has attached, each once however many exports use it; and snapshots, which are only read.

use crate::holder::Holder;
use crate::session::Granted;
use crate::volume::{Chain, ClusterBackend, Shape, Volume};
use gabion_common::client::{Attached, ClusterClient, ObjectClient};
use gabion_common::map_watch;
use gabion_common::monitor_client::MonitorClient;
use gabion_proto::ids::{Epoch, Generation, PoolId, VolumeId};
use gabion_proto::limits::{BLOCK_BYTES, OBJECT_BYTES_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use gabion_proto::pb;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tonic::Code;

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
    /// `None`: of a snapshot, which nobody attaches.
    held: Option<Held>,
    read_only: bool,
    users: usize,
}

struct Held {
    generation: Generation,
    /// Does what the map asks of the holder.
    following: JoinHandle<()>,
}

/// What is known of a volume.
#[derive(Default)]
enum State {
    #[default]
    Closed,
    /// Attaching it failed, but the monitors may have granted it: then with this generation, if that is known.
    Doubtful(Option<Generation>),
    Open(Open),
}

impl State {
    fn open(&mut self) -> Option<&mut Open> {
        match self {
            State::Open(open) => Some(open),
            _ => None,
        }
    }
}

/// Held while attaching and detaching that one volume.
type Slot = Arc<tokio::sync::Mutex<State>>;

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

    /// Those that are attached; one that is being attached or detached right now is left out.
    pub fn attached(&self) -> Vec<Arc<Volume>> {
        let slots: Vec<Slot> = self.slots.lock().values().cloned().collect();
        slots.iter().filter_map(|s| Some(s.try_lock().ok()?.open()?.volume.clone())).collect()
    }

    /// The volume, attached if it was not, and whether it may only be read. To be given back with
    /// [`close`](Volumes::close), or with [`give_up`](Volumes::give_up) by who failed and does not try again.
    pub async fn open(&self, name: &str) -> Result<(Arc<Volume>, bool), AttachError> {
        let slot = self.slot(name);
        let mut slot = slot.lock().await;
        if slot.open().is_none() {
            *slot = State::Open(match name.contains('@') {
                true => self.open_snapshot(name).await?,
                false => self.attach(name, &mut slot).await?,
            });
        }
        let open = slot.open().expect("opened just now");
        open.users += 1;
        Ok((open.volume.clone(), open.read_only))
    }

    /// Detaches a volume that could not be opened and may be attached all the same: the answer was lost, or could not be used.
    pub async fn give_up(&self, name: &str) {
        let slot = self.slot(name);
        let mut slot = slot.lock().await;
        let State::Doubtful(granted) = *slot else { return };
        let generation = match granted {
            Some(generation) => Some(generation),
            None => self.generation(name).await,
        };
        if let Some(generation) = generation {
            self.detach(name, generation).await;
        }
        *slot = State::Closed;
    }

    /// Gives the volume back; the last one detaches it, once nothing is in flight.
    pub async fn close(&self, name: &str) {
        let slot = self.slot(name);
        let mut slot = slot.lock().await;
        let Some(open) = slot.open() else { return };
        open.users -= 1;
        if open.users > 0 {
            return;
        }
        if let Some(held) = &open.held {
            // No snapshot pauses a volume that is given back: its requests have ended.
            held.following.abort();
            open.volume.drain().await;
            self.detach(name, held.generation).await;
        }
        *slot = State::Closed;
    }

    /// The generation of who has the volume attached, if anybody has.
    async fn generation(&self, name: &str) -> Option<Generation> {
        let request = pb::NameRequest { name: name.to_owned() };
        let found = self
            .monitors
            .until_answered("look for an attachment", |m| {
                let request = request.clone();
                async move { m.admin().get_volume(request).await }
            })
            .await;
        match found {
            Ok(info) => Some(Generation(info.generation)).filter(|_| !info.attached_host.is_empty()),
            Err(status) => {
                tracing::warn!(volume = name, error = status.message(), "cannot tell whether it is attached");
                None
            }
        }
    }

    /// Refused, and harmless, where the volume is not attached by this gateway with this generation.
    async fn detach(&self, name: &str, generation: Generation) {
        let request = pb::DetachVolumeRequest {
            volume: name.to_owned(),
            client: self.granted.client.0,
            generation: generation.0,
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
    }

    /// After an error `state` says what may be attached all the same.
    async fn attach(&self, name: &str, state: &mut State) -> Result<Open, AttachError> {
        let request = pb::AttachVolumeRequest {
            volume: name.to_owned(),
            client: self.granted.client.0,
            session: self.granted.session.0,
            take_over: false,
        };
        *state = State::Doubtful(None);
        let reply = self
            .monitors
            .once(|m| {
                let request = request.clone();
                async move { m.client().attach_volume(request).await }
            })
            .await
            .inspect_err(|status| {
                if matches!(status.code(), Code::FailedPrecondition | Code::NotFound) {
                    *state = State::Closed;
                }
            })?;
        let generation = Generation(reply.generation);
        *state = State::Doubtful(Some(generation));
        let size = reply.size_bytes;
        let chain = chain(size, &reply.layers)?;
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
        let id = shape.id;
        let attached = Attached::new(id, self.granted.client, self.granted.session, generation);
        let backend = ClusterBackend {
            objects: ObjectClient::new(self.cluster.clone(), Arc::new(attached), self.io_timeout),
            pool: PoolId(reply.pool),
            root: VolumeId(reply.root),
            chain: chain.clone(),
        };
        tracing::info!(volume = name, %generation, size_bytes = size, "attached");
        let volume = Volume::new(shape, Box::new(backend));
        let (monitors, granted) = (self.monitors.clone(), self.granted);
        let holder = Holder { monitors, granted, id, generation, volume: volume.clone(), chain };
        let held = Held { generation, following: tokio::spawn(holder.follow(watch)) };
        Ok(Open { volume, held: Some(held), read_only: reply.read_only, users: 0 })
    }

    /// A snapshot does not change, so it is read without being attached.
    async fn open_snapshot(&self, name: &str) -> Result<Open, AttachError> {
        let request = pb::NameRequest { name: name.to_owned() };
        let info = self
            .monitors
            .once(|m| {
                let request = request.clone();
                async move { m.admin().get_volume(request).await }
            })
            .await?;
        let chain = chain(info.size_bytes, &info.layers)?;
        if !info.object_bytes.is_power_of_two()
            || !(BLOCK_BYTES..=OBJECT_BYTES_MAX).contains(&info.object_bytes)
        {
            return Err(AttachError::Shape("its objects have no valid size"));
        }
        let shape = Shape {
            id: VolumeId(info.id),
            name: name.to_owned(),
            size_bytes: info.size_bytes,
            object_bytes: info.object_bytes,
        };
        let observer = Arc::new(Attached::observer());
        let backend = ClusterBackend {
            objects: ObjectClient::new(self.cluster.clone(), observer, self.io_timeout),
            pool: PoolId(info.pool_id),
            root: VolumeId(info.root),
            chain,
        };
        tracing::info!(snapshot = name, size_bytes = info.size_bytes, "opened for reading");
        Ok(Open { volume: Volume::new(shape, Box::new(backend)), held: None, read_only: true, users: 0 })
    }
}

fn chain(size: u64, layers: &[u32]) -> Result<Arc<Chain>, AttachError> {
    let size_ok =
        (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size) && size.is_multiple_of(BLOCK_BYTES.into());
    if !size_ok {
        return Err(AttachError::Shape("its size is out of range"));
    }
    Chain::new(layers).map(Arc::new).ok_or(AttachError::Shape("its number of layers is out of range"))
}
