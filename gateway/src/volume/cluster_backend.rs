//! The real backend: objects in the cluster, through the cluster client.

use super::{Backend, VolumeError};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use gabion_common::client::{ObjectClient, ObjectError};
use gabion_proto::blocks::Content;
use gabion_proto::ids::{LayerId, ObjectId, PoolId, VolumeId};
use gabion_proto::limits::LAYERS_MAX;
use gabion_proto::msg::{OpError, OpKind};
use parking_lot::RwLock;
use std::sync::Arc;

/// The layers of a volume. They change only while it is paused.
pub struct Chain {
    // Held to copy or to replace what is in it.
    layers: RwLock<(LayerId, Arc<[LayerId]>)>,
}

impl Chain {
    /// From the numbers of the layers, top first; `None` when there are none, or too many.
    pub fn new(layers: &[u32]) -> Option<Chain> {
        Some(Chain { layers: RwLock::new(split(layers)?) })
    }

    /// False: these are not layers.
    pub fn replace(&self, layers: &[u32]) -> bool {
        let Some(layers) = split(layers) else { return false };
        *self.layers.write() = layers;
        true
    }

    /// The top layer and those below it.
    pub fn layers(&self) -> (LayerId, Arc<[LayerId]>) {
        self.layers.read().clone()
    }
}

fn split(layers: &[u32]) -> Option<(LayerId, Arc<[LayerId]>)> {
    let (top, below) = layers.split_first()?;
    (layers.len() <= LAYERS_MAX).then(|| (LayerId(*top), below.iter().copied().map(LayerId).collect()))
}

/// One attached volume: writes go to its top layer, reads fall through to those below.
pub struct ClusterBackend {
    pub objects: ObjectClient,
    pub pool: PoolId,
    /// Whose objects the layers are.
    pub root: VolumeId,
    pub chain: Arc<Chain>,
}

impl ClusterBackend {
    async fn op(&self, index: u32, kind: OpKind, data: Bytes) -> Result<Content, VolumeError> {
        let (layer, _) = self.chain.layers();
        self.op_on(index, layer, kind, data).await
    }

    async fn op_on(
        &self,
        index: u32,
        layer: LayerId,
        kind: OpKind,
        data: Bytes,
    ) -> Result<Content, VolumeError> {
        let object = ObjectId { volume: self.root, index, layer };
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
        // What was written to a layer that came later was written after this read began.
        let (layer, below) = self.chain.layers();
        let kind = OpKind::Read { first_block, block_count, below: below.to_vec() };
        self.op_on(object, layer, kind, Bytes::new()).boxed()
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
