//! Memory for direct I/O: whole blocks at block-aligned addresses, by type (rule S7). A device takes nothing else.

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
pub struct BlocksMut(Vec<Block>);

impl BlocksMut {
    pub fn zeroed(count: usize) -> BlocksMut {
        // Only an allocation that overflows `isize` fails here.
        BlocksMut(Block::new_vec_zeroed(count).unwrap_or_default())
    }

    /// Copies of whole blocks, one behind the other.
    pub fn gather<'a>(blocks: impl ExactSizeIterator<Item = &'a [u8]>) -> BlocksMut {
        let mut out = Vec::with_capacity(blocks.len());
        // Not zeroed first: that takes longer than the copy.
        out.extend(blocks.map(|bytes| Block::read_from_bytes(bytes).expect("a whole block")));
        BlocksMut(out)
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    pub fn bytes(&self) -> &[u8] {
        self.0.as_slice().as_bytes()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_slice().as_mut_bytes()
    }

    pub fn blocks_mut(&mut self) -> &mut [Block] {
        &mut self.0
    }

    /// Shares the blocks; nobody changes them from now on.
    pub fn freeze(self) -> Blocks {
        let count = self.0.len();
        Blocks { shared: Shared::Own(Arc::new(self)), first: 0, count }
    }

    /// The first `len` bytes, without a copy.
    pub fn into_bytes(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
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
            Shared::Own(blocks) => blocks.0[self.first..self.first + self.count].as_bytes(),
            Shared::Aligned(bytes) => &bytes[self.first * block..(self.first + self.count) * block],
        }
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} blocks", self.count)
    }
}
