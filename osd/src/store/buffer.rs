//! Memory for direct I/O: whole blocks at block-aligned addresses, by type (rule S7). A device takes nothing else.

use super::pool::Place;
use bytes::Bytes;
use gabion_proto::limits::BLOCK_BYTES;
use std::fmt;
use std::sync::Arc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// One block; its alignment is part of the type.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct Block(pub [u8; BLOCK_BYTES as usize]);

const _: () = assert!(align_of::<Block>() == BLOCK_BYTES as usize);

/// Blocks that one owner may change.
pub struct BlocksMut {
    /// At least `count`.
    blocks: Vec<Block>,
    count: usize,
    /// Where they go at the end, if they are only lent.
    place: Option<Place>,
}

impl BlocksMut {
    pub fn zeroed(count: usize) -> BlocksMut {
        // Only an allocation that overflows `isize` fails here.
        BlocksMut::own(Block::new_vec_zeroed(count).unwrap_or_default())
    }

    fn own(blocks: Vec<Block>) -> BlocksMut {
        BlocksMut { count: blocks.len(), blocks, place: None }
    }

    /// The first `count` of blocks that belong to a pool.
    pub fn lent(blocks: Vec<Block>, count: usize, place: Place) -> BlocksMut {
        assert!(count <= blocks.len(), "more blocks than the buffer has");
        BlocksMut { blocks, count, place: Some(place) }
    }

    pub fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    pub fn into_blocks(mut self) -> Vec<Block> {
        assert!(self.place.is_none(), "only lent");
        std::mem::take(&mut self.blocks)
    }

    /// Copies of whole blocks, one behind the other.
    pub fn gather<'a>(blocks: impl ExactSizeIterator<Item = &'a [u8]>) -> BlocksMut {
        let mut out = Vec::with_capacity(blocks.len());
        // Not zeroed first: that takes longer than the copy.
        out.extend(blocks.map(|bytes| Block::read_from_bytes(bytes).expect("a whole block")));
        BlocksMut::own(out)
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn bytes(&self) -> &[u8] {
        self.blocks[..self.count].as_bytes()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.blocks_mut().as_mut_bytes()
    }

    pub fn blocks_mut(&mut self) -> &mut [Block] {
        &mut self.blocks[..self.count]
    }

    /// Shares the blocks; nobody changes them from now on.
    pub fn freeze(self) -> Blocks {
        let count = self.count;
        Blocks { shared: Shared::Own(Arc::new(self)), first: 0, count }
    }

    /// The first `len` bytes, without a copy.
    pub fn into_bytes(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
    }
}

impl Drop for BlocksMut {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            place.give_back(std::mem::take(&mut self.blocks));
        }
    }
}

impl AsRef<[u8]> for BlocksMut {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

#[derive(Clone)]
enum Shared {
    Own(Arc<BlocksMut>),
    /// Whole blocks that lie where blocks have to.
    Aligned(Bytes),
}

/// A run of shared, unchanging blocks.
#[derive(Clone)]
pub struct Blocks {
    shared: Shared,
    first: usize,
    count: usize,
}

impl Blocks {
    /// A copy of `bytes`, filled up with zeros to whole blocks.
    pub fn copy_of(bytes: &[u8]) -> Blocks {
        let mut blocks = BlocksMut::zeroed(bytes.len().div_ceil(BLOCK_BYTES as usize));
        blocks.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        blocks.freeze()
    }

    /// The bytes themselves, if they are whole blocks and lie where a device can take them from.
    pub fn of_aligned(bytes: Bytes) -> Option<Blocks> {
        let block = BLOCK_BYTES as usize;
        let fits = bytes.len().is_multiple_of(block) && bytes.as_ptr().addr().is_multiple_of(block);
        let count = bytes.len() / block;
        fits.then_some(Blocks { shared: Shared::Aligned(bytes), first: 0, count })
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn slice(&self, first: usize, count: usize) -> Blocks {
        assert!(first + count <= self.count, "a slice of blocks beyond their end");
        Blocks { shared: self.shared.clone(), first: self.first + first, count }
    }

    pub fn bytes(&self) -> &[u8] {
        let block = BLOCK_BYTES as usize;
        match &self.shared {
            Shared::Own(blocks) => &blocks.bytes()[self.first * block..(self.first + self.count) * block],
            Shared::Aligned(bytes) => &bytes[self.first * block..(self.first + self.count) * block],
        }
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} blocks", self.count)
    }
}
