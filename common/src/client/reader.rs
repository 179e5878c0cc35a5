//! Reads a volume without attaching it: no fence, no ordering with its holder's writes. For files
//! that nobody changes at the moment, such as the kernel of a guest that is not running.

use super::{Attached, ClusterClient, ObjectClient, ObjectError};
use crate::monitor_client::MonitorClient;
use bytes::Bytes;
use gabion_proto::blocks::ExtentKind;
use gabion_proto::ids::{ClientId, LayerId, ObjectId, PoolId, VolumeId};
use gabion_proto::limits::{BLOCK_BYTES, LAYERS_MAX, OBJECT_BYTES_MAX, OP_DATA_BYTES_MAX, VOLUME_BYTES_MAX};
use gabion_proto::msg::OpKind;
use gabion_proto::pb;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum ReaderError {
    #[error("{}", .0.message())]
    Monitor(#[from] tonic::Status),
    #[error("the monitor's description of the volume is not valid")]
    Shape,
    #[error("{len} bytes at {offset} reach beyond the end of the volume at {size_bytes}")]
    OutOfRange { offset: u64, len: usize, size_bytes: u64 },
    #[error("it is not made of the snapshot that it is compared with")]
    NotMadeOfIt,
    #[error(transparent)]
    Object(#[from] ObjectError),
}

/// A range that was written after a snapshot; it may hold what it held before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub offset: u64,
    pub len: u64,
    /// Discarded, or written with zeros as such.
    pub zero: bool,
}

/// See the module's documentation.
pub struct VolumeReader {
    objects: ObjectClient,
    pool: PoolId,
    /// Whose objects the layers are.
    volume: VolumeId,
    top: LayerId,
    below: Vec<LayerId>,
    object_bytes: u64,
    size_bytes: u64,
}

impl VolumeReader {
    /// Finds the volume called `name`, or the snapshot `VOLUME@NAME`. A `timeout` bounds every read.
    pub async fn open(
        monitors: &MonitorClient,
        cluster: Arc<ClusterClient>,
        name: &str,
        timeout: Option<Duration>,
    ) -> Result<VolumeReader, ReaderError> {
        let request = pb::NameRequest { name: name.to_owned() };
        let info = monitors
            .once(|m| {
                let request = request.clone();
                async move { m.admin().get_volume(request).await }
            })
            .await?;
        let (top, below) = info.layers.split_first().ok_or(ReaderError::Shape)?;
        let shape_ok = info.object_bytes.is_power_of_two()
            && (BLOCK_BYTES..=OBJECT_BYTES_MAX).contains(&info.object_bytes)
            && info.size_bytes <= VOLUME_BYTES_MAX
            && info.layers.len() <= LAYERS_MAX;
        if !shape_ok {
            return Err(ReaderError::Shape);
        }
        Ok(VolumeReader {
            objects: ObjectClient::new(cluster, Arc::new(Attached::observer()), timeout),
            pool: PoolId(info.pool_id),
            volume: VolumeId(info.root),
            top: LayerId(*top),
            below: below.iter().copied().map(LayerId).collect(),
            object_bytes: info.object_bytes.into(),
            size_bytes: info.size_bytes,
        })
    }

    /// A reader with its own map watch and connections.
    pub async fn connect(
        monitors: &MonitorClient,
        name: &str,
        timeout: Option<Duration>,
    ) -> Result<VolumeReader, ReaderError> {
        let map = crate::map_watch::follow(monitors.clone());
        VolumeReader::open(monitors, ClusterClient::new(map, ClientId(0), monitors.security()), name, timeout)
            .await
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `buf` from `offset`.
    pub async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReaderError> {
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.size_bytes => {}
            _ => return Err(ReaderError::OutOfRange { offset, len: buf.len(), size_bytes: self.size_bytes }),
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let within = at % self.object_bytes;
            let skip = within % u64::from(BLOCK_BYTES);
            let room = (self.object_bytes - within).min(u64::from(OP_DATA_BYTES_MAX) - skip);
            let len = room.min(rest.len() as u64) as usize;
            let (now, later) = rest.split_at_mut(len);
            self.read_piece(at, now).await?;
            at += len as u64;
            rest = later;
        }
        Ok(())
    }

    /// What was written to the layers above those of `base`, a snapshot that this is made of.
    pub async fn changes_since(&self, base: &VolumeReader) -> Result<Vec<Change>, ReaderError> {
        let layers = |r: &VolumeReader| -> Vec<LayerId> {
            std::iter::once(r.top).chain(r.below.iter().copied()).collect()
        };
        let (own, old) = (layers(self), layers(base));
        let above = match own.strip_suffix(&old[..]) {
            Some(above) if self.volume == base.volume => above,
            _ => return Err(ReaderError::NotMadeOfIt),
        };
        let Some((top, below)) = above.split_first() else { return Ok(Vec::new()) };
        let mut changes: Vec<Change> = Vec::new();
        let step = u64::from(OP_DATA_BYTES_MAX).min(self.object_bytes);
        for offset in (0..self.size_bytes).step_by(step as usize) {
            let index = u32::try_from(offset / self.object_bytes).map_err(|_| ReaderError::Shape)?;
            let first_block = (offset % self.object_bytes / u64::from(BLOCK_BYTES)) as u32;
            let block_count = (step.min(self.size_bytes - offset) / u64::from(BLOCK_BYTES)) as u32;
            let object = ObjectId { volume: self.volume, index, layer: *top };
            let kind = OpKind::Read { first_block, block_count, below: below.to_vec() };
            let content = self.objects.op(self.pool, object, kind, Bytes::new()).await?;
            for e in &content.extents {
                let within = u64::from(e.first_block) * u64::from(BLOCK_BYTES);
                let change = Change {
                    offset: u64::from(index) * self.object_bytes + within,
                    len: u64::from(e.block_count) * u64::from(BLOCK_BYTES),
                    zero: matches!(e.kind, ExtentKind::Zero),
                };
                match changes.last_mut() {
                    Some(last) if last.zero == change.zero && last.offset + last.len == change.offset => {
                        last.len += change.len;
                    }
                    _ => changes.push(change),
                }
            }
        }
        Ok(changes)
    }

    /// Within one object and one operation.
    async fn read_piece(&self, at: u64, buf: &mut [u8]) -> Result<(), ReaderError> {
        let block = u64::from(BLOCK_BYTES);
        let within = at % self.object_bytes;
        let first_block = (within / block) as u32;
        let end_block = (within + buf.len() as u64).div_ceil(block) as u32;
        let index = u32::try_from(at / self.object_bytes).map_err(|_| ReaderError::Shape)?;
        let object = ObjectId { volume: self.volume, index, layer: self.top };
        let kind =
            OpKind::Read { first_block, block_count: end_block - first_block, below: self.below.clone() };
        let content = self.objects.op(self.pool, object, kind, Bytes::new()).await?;
        let mut whole = vec![0u8; ((end_block - first_block) * BLOCK_BYTES) as usize];
        let mut from = 0;
        for e in content.extents.iter().filter(|e| matches!(e.kind, ExtentKind::Data { .. })) {
            let to = ((e.first_block - first_block) * BLOCK_BYTES) as usize;
            let len = (e.block_count * BLOCK_BYTES) as usize;
            whole[to..to + len].copy_from_slice(&content.data[from..from + len]);
            from += len;
        }
        let skip = (within % block) as usize;
        buf.copy_from_slice(&whole[skip..skip + buf.len()]);
        Ok(())
    }
}
