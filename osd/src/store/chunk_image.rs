//! The blocks of one chunk of a stopped store, each against its checksum.

use super::StoreError;
use super::buffer::BlocksMut;
use super::device::Device;
use super::layout::{BLOCK, ChunkRecord, Geometry, bits, runs};
use super::view::ChunkOverlay;
use gabion_proto::limits::BLOCKS_PER_CHUNK;
use std::io;

/// What a data block turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Good,
    Mismatch,
    Unreadable(String),
}

impl Found {
    /// What is wrong with it.
    pub fn damage(&self) -> Option<&str> {
        match self {
            Found::Good => None,
            Found::Mismatch => Some("checksum mismatch"),
            Found::Unreadable(why) => Some(why),
        }
    }
}

/// A chunk with everything that is in its data blocks; the others are zeros.
pub(super) struct ChunkImage {
    pub blocks: BlocksMut,
    found: [Option<Found>; BLOCKS_PER_CHUNK as usize],
}

impl ChunkImage {
    /// Reads the data blocks of `chunk`: `overlay` has what is newer than the slot.
    pub fn read(
        device: &mut impl Device,
        geometry: Geometry,
        chunk: &ChunkRecord,
        overlay: &ChunkOverlay<'_>,
    ) -> Result<ChunkImage, StoreError> {
        let mut image = ChunkImage {
            blocks: BlocksMut::zeroed(BLOCKS_PER_CHUNK as usize),
            found: [const { None }; BLOCKS_PER_CHUNK as usize],
        };
        let mut stored = chunk.data;
        for bit in bits(chunk.data & overlay.mask) {
            let Some(block) = overlay.blocks[bit as usize] else { continue };
            image.block_mut(bit).copy_from_slice(block.bytes.get());
            stored &= !(1 << bit);
        }
        match chunk.slot {
            Some(slot) if slot < geometry.slots => image.read_slot(device, geometry.slot_block(slot), stored),
            _ => bits(stored).for_each(|bit| {
                image.found[bit as usize] = Some(Found::Unreadable("its slot is not on the device".into()));
            }),
        }
        for bit in bits(chunk.data).map(|bit| bit as usize) {
            if image.found[bit].is_none() {
                let right = crc32fast::hash(image.block(bit as u32)) == chunk.crcs[bit];
                image.found[bit] = Some(if right { Found::Good } else { Found::Mismatch });
            }
        }
        Ok(image)
    }

    /// Runs at once, block by block where that fails.
    fn read_slot(&mut self, device: &mut impl Device, first: u64, stored: u32) {
        for (bit, len) in runs(stored) {
            let range = bit as usize..(bit + len) as usize;
            if device.read_now(first + u64::from(bit), &mut self.blocks.blocks_mut()[range.clone()]).is_ok() {
                continue;
            }
            for at in range {
                let into = &mut self.blocks.blocks_mut()[at..at + 1];
                if let Err(e) = device.read_now(first + at as u64, into) {
                    into[0].0.fill(0);
                    self.found[at] = Some(Found::Unreadable(unreadable(&e)));
                }
            }
        }
    }

    fn block_mut(&mut self, bit: u32) -> &mut [u8] {
        &mut self.blocks.bytes_mut()[bit as usize * BLOCK..][..BLOCK]
    }

    pub fn block(&self, bit: u32) -> &[u8] {
        &self.blocks.bytes()[bit as usize * BLOCK..][..BLOCK]
    }

    /// Of a data block; `None` for any other.
    pub fn found(&self, bit: u32) -> Option<&Found> {
        self.found[bit as usize].as_ref()
    }
}

fn unreadable(e: &io::Error) -> String {
    format!("cannot be read: {e}")
}
