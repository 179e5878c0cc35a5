//! A backend in memory, for tests of everything above it.

use super::{Backend, VolumeError};
use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sparse; keeps what was written until the process ends.
#[derive(Default)]
pub struct MemoryBackend {
    // Held for the copy of a few blocks only.
    blocks: Mutex<BTreeMap<(u32, u32), Bytes>>,
    fenced: AtomicBool,
}

impl MemoryBackend {
    /// From now on as if a newer attachment existed.
    pub fn fence(&self) {
        self.fenced.store(true, Ordering::Relaxed);
    }
    /// Blocks that take space.
    pub fn block_count(&self) -> usize {
        self.blocks.lock().len()
    }
}

impl Backend for MemoryBackend {
    fn read(
        &self,
        object: u32,
        first_block: u32,
        block_count: u32,
    ) -> BoxFuture<'_, Result<Content, VolumeError>> {
        async move {
            let blocks = self.blocks.lock();
            let mut content = Content::default();
            let mut data = BytesMut::new();
            for ((_, block), bytes) in
                blocks.range((object, first_block)..(object, first_block + block_count))
            {
                let crcs = vec![crc32fast::hash(bytes)];
                content.extents.push(Extent {
                    first_block: *block,
                    block_count: 1,
                    kind: ExtentKind::Data { crcs },
                });
                data.extend_from_slice(bytes);
            }
            content.data = data.freeze();
            Ok(content)
        }
        .boxed()
    }

    fn write(&self, object: u32, content: Content) -> BoxFuture<'_, Result<(), VolumeError>> {
        async move {
            self.check()?;
            content.validate(true).map_err(|_| VolumeError::Io)?;
            // Lets other tasks run between the request and its effect, as a network does.
            tokio::task::yield_now().await;
            let mut blocks = self.blocks.lock();
            for (block, bytes, _) in content.data_blocks() {
                blocks.insert((object, block), Bytes::copy_from_slice(bytes));
            }
            Ok(())
        }
        .boxed()
    }

    fn zero(
        &self,
        object: u32,
        first_block: u32,
        block_count: u32,
        _discard: bool,
    ) -> BoxFuture<'_, Result<(), VolumeError>> {
        async move {
            self.check()?;
            tokio::task::yield_now().await;
            let mut blocks = self.blocks.lock();
            let range = (object, first_block)..(object, first_block + block_count);
            let gone: Vec<_> = blocks.range(range).map(|(at, _)| *at).collect();
            for at in gone {
                blocks.remove(&at);
            }
            Ok(())
        }
        .boxed()
    }

    fn check(&self) -> Result<(), VolumeError> {
        if self.fenced.load(Ordering::Relaxed) { Err(VolumeError::Fenced) } else { Ok(()) }
    }
}
