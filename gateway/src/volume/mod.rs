//! A volume as exports see it: any byte range, ordered writes, durable when answered.
//!
//! One [`Volume`] is shared by every export of that volume on this gateway, so that its range lock
//! orders overlapping writes over all of them (rule S6). Below it a [`Backend`] takes whole 4 KiB
//! blocks of single objects.
//!
//! - A write is answered when every piece of it is durable; `flush` therefore waits for nothing and
//!   only says whether the volume can still be written (invariant 11).
//! - Writes, zeroes and trims run to their end even when the caller stops waiting, so that the range
//!   lock is never released over an operation that may still reach an OSD.
//! - A write that does not fill its first or last block reads that block first, under the lock.

mod backend;
mod cluster_backend;
mod counts;
mod disk;
mod error;
mod memory;
mod pieces;
mod range_lock;

pub use backend::Backend;
pub use cluster_backend::{Chain, ClusterBackend};
pub use counts::Counts;
pub use error::VolumeError;
pub use memory::MemoryBackend;

use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{self, StreamExt, TryStreamExt};
use gabion_proto::blocks::{Content, ExtentKind};
use gabion_proto::ids::VolumeId;
use gabion_proto::limits::{BLOCK_BYTES, OP_DATA_BYTES_MAX};
use pieces::{Piece, blocks_inside, blocks_touched, pieces};
pub use range_lock::Held;
use range_lock::RangeLock;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Pieces of one request that are in flight together.
const PIECES_IN_FLIGHT: usize = 16;
const BLOCK: u64 = BLOCK_BYTES as u64;
/// Bytes of writes that one volume holds while they run; more wait with whoever brings them.
const WRITE_BYTES_MAX: usize = 256 << 20;
const OP_BLOCKS_MAX: u32 = OP_DATA_BYTES_MAX / BLOCK_BYTES;

/// What identifies and shapes a volume.
#[derive(Clone, Debug)]
pub struct Shape {
    pub id: VolumeId,
    pub name: String,
    /// A multiple of the block size. The volume may grow later.
    pub size_bytes: u64,
    pub object_bytes: u32,
}

/// See the module's documentation.
pub struct Volume {
    shape: Shape,
    size_bytes: watch::Sender<u64>,
    inner: Arc<Inner>,
    /// Where writes run to their end.
    runtime: Handle,
    counts: Counts,
}

struct Inner {
    backend: Box<dyn Backend>,
    lock: Arc<RangeLock>,
    blocks_per_object: u32,
    /// Shares of [`WRITE_BYTES_MAX`], in blocks.
    room: Arc<Semaphore>,
}

impl Volume {
    /// A volume over `backend`. Must be called within a tokio runtime: writes run on it.
    pub fn new(shape: Shape, backend: Box<dyn Backend>) -> Arc<Volume> {
        assert!(shape.size_bytes.is_multiple_of(BLOCK), "the size is checked before");
        assert!(
            shape.object_bytes >= BLOCK_BYTES && shape.object_bytes.is_power_of_two(),
            "as is the object's"
        );
        let blocks_per_object = shape.object_bytes / BLOCK_BYTES;
        let room = Arc::new(Semaphore::new(WRITE_BYTES_MAX / BLOCK_BYTES as usize));
        let inner = Inner { backend, lock: Arc::default(), blocks_per_object, room };
        let size_bytes = watch::Sender::new(shape.size_bytes);
        Arc::new(Volume {
            shape,
            size_bytes,
            inner: Arc::new(inner),
            runtime: Handle::current(),
            counts: Counts::default(),
        })
    }

    /// A volume in memory: for tests of exports. `size_bytes` is rounded up to whole blocks.
    pub fn in_memory(size_bytes: u64) -> Arc<Volume> {
        let shape = Shape {
            id: VolumeId(1),
            name: "memory".into(),
            size_bytes: size_bytes.next_multiple_of(BLOCK),
            object_bytes: gabion_proto::limits::OBJECT_BYTES_DEFAULT,
        };
        Volume::new(shape, Box::<MemoryBackend>::default())
    }

    pub fn size_bytes(&self) -> u64 {
        *self.size_bytes.borrow()
    }
    /// The size whenever it changes.
    pub fn sizes(&self) -> watch::Receiver<u64> {
        self.size_bytes.subscribe()
    }
    /// Takes over a greater size; requests beyond the old one are served from then on.
    pub fn grow(&self, size_bytes: u64) {
        let grown = self.size_bytes.send_if_modified(|size| {
            let greater = size_bytes > *size && size_bytes.is_multiple_of(BLOCK);
            if greater {
                *size = size_bytes;
            }
            greater
        });
        if grown {
            tracing::info!(volume = self.shape.name, size_bytes, "the volume has grown");
        }
    }
    /// Writes of whole blocks of this size cost no read.
    pub fn block_bytes() -> u32 {
        BLOCK_BYTES
    }
    pub fn id(&self) -> VolumeId {
        self.shape.id
    }
    pub fn name(&self) -> &str {
        &self.shape.name
    }
    /// What was asked of it since it was attached here.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }
    /// What a guest sees as the disk's serial number: at most 20 bytes.
    pub fn serial(&self) -> String {
        format!("gbn{:x}", self.shape.id.0)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes() => Ok(()),
            _ => Err(VolumeError::OutOfRange { offset, len, size_bytes: self.size_bytes() }),
        }
    }

    /// Reads any byte range.
    pub async fn read(&self, offset: u64, len: u32) -> Result<Bytes, VolumeError> {
        self.check(offset, len.into())?;
        self.counts.read(len.into(), self.inner.read(offset, len).await)
    }

    /// Writes any byte range; durable when it returns.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), VolumeError> {
        self.check(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        let inner = self.inner.clone();
        let blocks = blocks_touched(offset, data.len() as u64);
        let size = blocks.end - blocks.start;
        let room = inner.room(size).await;
        let turn = inner.lock.acquire(blocks.clone());
        let bytes = data.len() as u64;
        let written = self.to_the_end(async move {
            let _held = (turn.await, room);
            inner.write_locked(offset, data, blocks).await
        });
        self.counts.write(bytes, written.await)
    }

    /// Makes a byte range zero; `may_unmap` also gives its space back.
    pub async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), VolumeError> {
        self.check(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let inner = self.inner.clone();
        let touched = blocks_touched(offset, len);
        let place = inner.room(1).await;
        let turn = inner.lock.acquire(touched.clone());
        self.to_the_end(async move {
            let _held = (turn.await, place);
            let whole = blocks_inside(offset, len);
            if whole.is_empty() {
                // Within one block, or across the border of two.
                return inner.write_locked(offset, zeroes(len), touched).await;
            }
            let (start, end) = (whole.start * BLOCK, whole.end * BLOCK);
            if offset < start {
                inner.write_locked(offset, zeroes(start - offset), touched.start..whole.start).await?;
            }
            inner.zero_locked(whole.clone(), may_unmap).await?;
            if offset + len > end {
                inner.write_locked(end, zeroes(offset + len - end), whole.end..touched.end).await?;
            }
            Ok(())
        })
        .await
    }

    /// Gives the space of the whole blocks inside the range back; they read as zero from then on.
    /// Bytes of blocks that the range covers only in part stay as they are.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.check(offset, len)?;
        let whole = blocks_inside(offset, len);
        if whole.is_empty() {
            return Ok(());
        }
        let inner = self.inner.clone();
        let place = inner.room(1).await;
        let turn = inner.lock.acquire(whole.clone());
        self.to_the_end(async move {
            let _held = (turn.await, place);
            inner.zero_locked(whole, true).await
        })
        .await
    }

    /// Every write that was answered is durable already; fails when the volume is no longer ours.
    pub async fn flush(&self) -> Result<(), VolumeError> {
        self.inner.backend.check()
    }

    /// Waits until no write, zeroing or trim is in flight.
    pub async fn drain(&self) {
        drop(self.pause().await);
    }

    /// Waits until no write, zeroing or trim is in flight on any export; those that come later wait until what is answered is
    /// dropped. Giving up lets them go on.
    pub async fn pause(&self) -> Held {
        self.inner.lock.acquire(0..u64::MAX).await
    }

    async fn to_the_end<F>(&self, work: F) -> Result<(), VolumeError>
    where
        F: Future<Output = Result<(), VolumeError>> + Send + 'static,
    {
        match self.runtime.spawn(work).await {
            Ok(result) => result,
            Err(error) => {
                // A panic, or the runtime ends: either way nothing was promised.
                tracing::error!(volume = %self.shape.name, %error, "a write did not run to its end");
                Err(VolumeError::Io)
            }
        }
    }
}

impl Inner {
    /// Room for a write of so many blocks. What has no data asks for one: who waits for room has asked for no turn of its range yet,
    /// and nothing that came later may pass it.
    async fn room(&self, blocks: u64) -> OwnedSemaphorePermit {
        let all = WRITE_BYTES_MAX / BLOCK_BYTES as usize;
        let share = usize::try_from(blocks).map_or(all, |blocks| blocks.min(all));
        self.room.clone().acquire_many_owned(share as u32).await.expect("never closed")
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, VolumeError> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let blocks = blocks_touched(offset, len.into());
        let skip = (offset - blocks.start * BLOCK) as usize;
        let aligned = self.read_blocks(blocks).await?;
        Ok(aligned.slice(skip..skip + len as usize))
    }

    async fn read_blocks(&self, blocks: Range<u64>) -> Result<Bytes, VolumeError> {
        let total = ((blocks.end - blocks.start) * BLOCK) as usize;
        let mut all = pieces(blocks, self.blocks_per_object, OP_BLOCKS_MAX);
        let first = all.next().expect("the range is not empty");
        let Some(second) = all.next() else { return self.read_piece(first).await };
        let mut parts = stream::iter([first, second].into_iter().chain(all))
            .map(|p| self.read_piece(p))
            .buffered(PIECES_IN_FLIGHT);
        let mut out = BytesMut::with_capacity(total);
        while let Some(part) = parts.try_next().await? {
            out.extend_from_slice(&part);
        }
        Ok(out.freeze())
    }

    async fn read_piece(&self, p: Piece) -> Result<Bytes, VolumeError> {
        let content = self.backend.read(p.object, p.first_block, p.block_count).await?;
        flatten(content, p.first_block, p.block_count)
    }

    /// Writes `data` at `offset`; the caller holds the lock over `blocks`, all blocks it touches.
    async fn write_locked(&self, offset: u64, data: Bytes, blocks: Range<u64>) -> Result<(), VolumeError> {
        let (start, end) = (blocks.start * BLOCK, blocks.end * BLOCK);
        let data_end = offset + data.len() as u64;
        let data = if start == offset && end == data_end {
            data
        } else {
            self.fill_up(offset, data, blocks.clone()).await?
        };
        let base = blocks.start;
        let write = |p: Piece, data: &Bytes| {
            let from = ((p.start_block - base) * BLOCK) as usize;
            let bytes = data.slice(from..from + (p.block_count * BLOCK_BYTES) as usize);
            self.backend.write(p.object, Content::data(p.first_block, bytes))
        };
        self.each(blocks, OP_BLOCKS_MAX, |p| write(p, &data)).await
    }

    /// `data` with the rest of its first and last block around it.
    async fn fill_up(&self, offset: u64, data: Bytes, blocks: Range<u64>) -> Result<Bytes, VolumeError> {
        let (start, end) = (blocks.start * BLOCK, blocks.end * BLOCK);
        let data_end = offset + data.len() as u64;
        let last = blocks.end - 1;
        let head = async {
            if offset == start {
                Ok(Bytes::new())
            } else {
                self.read_blocks(blocks.start..blocks.start + 1).await
            }
        };
        let tail = async {
            if data_end == end { Ok(Bytes::new()) } else { self.read_blocks(last..blocks.end).await }
        };
        let (head, tail) = futures::try_join!(head, tail)?;
        let mut out = BytesMut::with_capacity((end - start) as usize);
        out.put_slice(&head[..(offset - start) as usize]);
        out.put_slice(&data);
        if data_end < end {
            out.put_slice(&tail[(data_end - last * BLOCK) as usize..]);
        }
        Ok(out.freeze())
    }

    async fn zero_locked(&self, blocks: Range<u64>, discard: bool) -> Result<(), VolumeError> {
        self.each(blocks, u32::MAX, |p| self.backend.zero(p.object, p.first_block, p.block_count, discard))
            .await
    }

    /// Runs `work` on every piece and waits for *all* of them, failed or not: none may be in flight
    /// when the lock is released.
    async fn each<F, Fut>(&self, blocks: Range<u64>, blocks_max: u32, work: F) -> Result<(), VolumeError>
    where
        F: Fn(Piece) -> Fut,
        Fut: Future<Output = Result<(), VolumeError>>,
    {
        let mut all = pieces(blocks, self.blocks_per_object, blocks_max);
        let Some(first) = all.next() else { return Ok(()) };
        let Some(second) = all.next() else { return work(first).await };
        let mut running =
            stream::iter([first, second].into_iter().chain(all)).map(work).buffer_unordered(PIECES_IN_FLIGHT);
        let mut result = Ok(());
        while let Some(r) = running.next().await {
            result = result.and(r);
        }
        result
    }
}

fn zeroes(len: u64) -> Bytes {
    Bytes::from(vec![0u8; len as usize])
}

/// The bytes of `block_count` blocks from `first_block`; what `content` does not name is zero.
fn flatten(content: Content, first_block: u32, block_count: u32) -> Result<Bytes, VolumeError> {
    let total = (block_count * BLOCK_BYTES) as usize;
    if content.data.len() == total {
        return Ok(content.data);
    }
    let mut out = BytesMut::zeroed(total);
    let mut from = 0;
    for e in &content.extents {
        let inside =
            e.first_block >= first_block && e.first_block + e.block_count <= first_block + block_count;
        if !inside {
            tracing::warn!(?first_block, block_count, "an OSD answered blocks that were not asked for");
            return Err(VolumeError::Io);
        }
        if let ExtentKind::Data { .. } = e.kind {
            let len = (e.block_count * BLOCK_BYTES) as usize;
            let at = ((e.first_block - first_block) * BLOCK_BYTES) as usize;
            out[at..at + len].copy_from_slice(&content.data[from..from + len]);
            from += len;
        }
    }
    Ok(out.freeze())
}

#[cfg(test)]
mod tests;
