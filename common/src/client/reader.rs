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
    #[error(transparent)]
    Object(#[from] ObjectError),
}

/// See the module's documentation.
pub struct VolumeReader {
    objects: ObjectClient,
    pool: PoolId,
    volume: VolumeId,
    top: LayerId,
    below: Vec<LayerId>,
    object_bytes: u64,
    size_bytes: u64,
}

impl VolumeReader {
    /// Finds the volume called `name`. A `timeout` bounds every read.
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
            volume: VolumeId(info.id),
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
        VolumeReader::open(monitors, ClusterClient::new(map, ClientId(0)), name, timeout).await
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
