//! The real backend: objects in the cluster, through the cluster client.

use super::{Backend, VolumeError};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use gabion_common::client::{ObjectClient, ObjectError};
use gabion_proto::blocks::Content;
use gabion_proto::ids::{LayerId, ObjectId, PoolId, VolumeId};
use gabion_proto::msg::{OpError, OpKind};

/// One attached volume: writes go to its top layer, reads fall through to those below.
pub struct ClusterBackend {
    pub objects: ObjectClient,
    pub pool: PoolId,
    pub volume: VolumeId,
    pub top: LayerId,
    pub below: Vec<LayerId>,
}

impl ClusterBackend {
    async fn op(&self, index: u32, kind: OpKind, data: Bytes) -> Result<Content, VolumeError> {
        let object = ObjectId { volume: self.volume, index, layer: self.top };
        self.objects.op(self.pool, object, kind, data).await.map_err(|error| {
            let known = match error {
                ObjectError::Refused(OpError::Fenced) => VolumeError::Fenced,
                ObjectError::Refused(OpError::NoSpace) => VolumeError::NoSpace,
                ObjectError::Refused(OpError::Removed) => VolumeError::Removed,
                ObjectError::TimedOut => VolumeError::TimedOut,
                _ => VolumeError::Io,
            };
            if known != VolumeError::Fenced {
                tracing::warn!(%object, %error, "an operation on an object failed");
            }
            known
        })
    }
}

impl Backend for ClusterBackend {
    fn read(
        &self,
        object: u32,
        first_block: u32,
        block_count: u32,
    ) -> BoxFuture<'_, Result<Content, VolumeError>> {
        let kind = OpKind::Read { first_block, block_count, below: self.below.clone() };
        self.op(object, kind, Bytes::new()).boxed()
    }

    fn write(&self, object: u32, content: Content) -> BoxFuture<'_, Result<(), VolumeError>> {
        let kind = OpKind::Write { extents: content.extents };
        self.op(object, kind, content.data).map(|r| r.map(drop)).boxed()
    }

    fn zero(
        &self,
        object: u32,
        first_block: u32,
        block_count: u32,
        discard: bool,
    ) -> BoxFuture<'_, Result<(), VolumeError>> {
        self.op(object, OpKind::Zero { first_block, block_count, discard }, Bytes::new())
            .map(|r| r.map(drop))
            .boxed()
    }

    fn check(&self) -> Result<(), VolumeError> {
        if self.objects.attached().is_fenced() { Err(VolumeError::Fenced) } else { Ok(()) }
    }
}
