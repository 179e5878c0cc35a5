//! Write-back: overlay blocks go to their slots, the device is flushed, and only then the overlay forgets them.
//! A tear of the slot in between is harmless: the overlay still wins.

use super::StoreError;
use super::chunk_store::ChunkStore;
use super::commit::overlay_of;
use super::device::Device;
use super::kv::Kv;
use super::layout::{self, BLOCK, ChunkRecord};
use gabion_proto::limits::BLOCK_BYTES;

/// Blocks of one step (about 4 MiB).
const STEP_BLOCKS: u32 = 1024;

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// One step; true when more is left.
    pub(super) fn write_back(&mut self) -> Result<bool, StoreError> {
        let (mut keys, mut blocks) = (Vec::new(), 0);
        for (key, count) in &self.dirty {
            if blocks >= STEP_BLOCKS {
                break;
            }
            blocks += count;
            keys.push(key.clone());
        }
        if keys.is_empty() {
            return Ok(false);
        }
        let mut batch = Vec::new();
        for key in &keys {
            let value =
                self.get(key)?.ok_or_else(|| StoreError::Fatal("a dirty chunk has no record".into()))?;
            let mut chunk = ChunkRecord::decode(&value)?;
            let slot = chunk.slot.ok_or_else(|| StoreError::Fatal("an overlay without a slot".into()))?;
            while chunk.overlay != 0 {
                let bit = chunk.overlay.trailing_zeros();
                let len = (chunk.overlay >> bit).trailing_ones();
                let mut run = Vec::with_capacity(len as usize * BLOCK);
                for b in bit..bit + len {
                    let overlay_key = overlay_of(key, b)?;
                    let bytes = self.get(&overlay_key)?.filter(|v| v.len() == BLOCK);
                    let bytes =
                        bytes.ok_or_else(|| StoreError::Fatal("an overlay block is missing".into()))?;
                    run.extend_from_slice(&bytes);
                    batch.push((overlay_key, None));
                    chunk.overlay &= !(1 << b);
                }
                self.device
                    .write_at(layout::slot_offset(slot) + u64::from(bit * BLOCK_BYTES), &run)
                    .map_err(|e| StoreError::Fatal(format!("writing to the disk failed: {e}")))?;
            }
            batch.push((key.clone(), Some(layout::encode(&chunk)?)));
        }
        self.device.flush().map_err(|e| StoreError::Fatal(format!("flushing the disk failed: {e}")))?;
        // Need not be synced: if it is lost, the overlay is still there, and whatever builds on it comes
        // later in the same log.
        self.kv.write(batch, false).map_err(StoreError::Fatal)?;
        for key in keys {
            self.set_dirty(key, 0);
        }
        Ok(!self.dirty.is_empty())
    }
}
