//! Erasure coding without I/O: where each block of an object lies, and how lost shards are computed from others.
//!
//! An object of a `k`+`m` pool is a table. Block `b` is in row `b / k` of data shard `b % k`; row by row, `m` parity
//! shards follow. Every member of a group keeps one shard of each object, as an object of its own whose blocks are
//! numbered by row. A row decodes from any `k` shards *of one version*. Blocks that are absent count as zeros, so that what was
//! never written takes no room in any shard.
//!
//! The code is Reed-Solomon over GF(2^8) with the polynomial `x^8+x^4+x^3+x^2+1` and a systematic Vandermonde matrix (Plank, "A
//! Tutorial on Reed-Solomon Coding for Fault-Tolerance in RAID-like Systems", 1997, with the 2003 correction): [`MATRIX`] names it
//! on every disk, whatever library computes it.

mod code;
#[cfg(test)]
mod tests;

pub use code::{Code, CodeError, ReedSolomon};

use bytes::{Bytes, BytesMut};
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::limits::BLOCK_BYTES;
use gabion_proto::map::Redundancy;
use serde::{Deserialize, Serialize};

/// The matrix in use. A disk written with another one is refused.
pub const MATRIX: u8 = 1;

const BLOCK: usize = BLOCK_BYTES as usize;

/// Which shard of each object a disk keeps for a group, and of which code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardId {
    pub number: u8,
    pub k: u8,
    pub m: u8,
    pub matrix: u8,
}

/// The shape of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub k: u8,
    pub m: u8,
}

impl Geometry {
    /// Of a pool that is erasure coded.
    pub fn of(redundancy: Redundancy) -> Option<Geometry> {
        match redundancy {
            Redundancy::Replicated { .. } => None,
            Redundancy::Erasure { k, m } => {
                Some(Geometry { k: u8::try_from(k).ok()?, m: u8::try_from(m).ok()? })
            }
        }
    }

    pub fn width(self) -> u8 {
        self.k + self.m
    }

    pub fn shard(self, number: u8) -> ShardId {
        ShardId { number, k: self.k, m: self.m, matrix: MATRIX }
    }

    /// The data shard and the row of a block.
    pub fn place(self, block: u32) -> (u8, u32) {
        let k = u32::from(self.k);
        ((block % k) as u8, block / k)
    }

    pub fn block(self, shard: u8, row: u32) -> u32 {
        row * u32::from(self.k) + u32::from(shard)
    }

    /// First row and number of rows that a run of blocks touches.
    pub fn rows(self, first_block: u32, block_count: u32) -> (u32, u32) {
        let first = self.place(first_block).1;
        let last = self.place(first_block + block_count.max(1) - 1).1;
        (first, last - first + 1)
    }

    /// Rows of an object of so many blocks.
    pub fn all_rows(self, object_blocks: u32) -> u32 {
        object_blocks.div_ceil(u32::from(self.k))
    }
}

/// One block of data with its checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub crc: u32,
    pub bytes: Bytes,
}

impl Block {
    /// Computes the checksum; `None` for zeros.
    pub fn of(bytes: Bytes) -> Option<Block> {
        let zero = bytes.iter().all(|b| *b == 0);
        (!zero).then(|| Block { crc: crc32fast::hash(&bytes), bytes })
    }

    /// The sum in GF(2^8), which is also the difference; `None` is zeros.
    pub fn sum(a: &Option<Block>, b: &Option<Block>) -> Option<Block> {
        match (a, b) {
            (Some(a), Some(b)) => {
                Block::of(a.bytes.iter().zip(&b.bytes[..]).map(|(a, b)| a ^ b).collect::<Vec<u8>>().into())
            }
            (one, None) | (None, one) => one.clone(),
        }
    }
}

/// Some rows of one shard; `None` is zeros.
pub type Rows = Vec<Option<Block>>;

/// The rows `first..first + count` of a shard from what a store returned (validated).
pub fn rows_of(content: &Content, first: u32, count: u32) -> Rows {
    let mut rows: Rows = vec![None; count as usize];
    let mut at = 0;
    for e in &content.extents {
        let ExtentKind::Data { crcs } = &e.kind else { continue };
        for (i, crc) in crcs.iter().enumerate() {
            let slot = (e.first_block + i as u32).checked_sub(first).and_then(|r| rows.get_mut(r as usize));
            if let (Some(slot), true) = (slot, at + BLOCK <= content.data.len()) {
                *slot = Some(Block { crc: *crc, bytes: content.data.slice(at..at + BLOCK) });
            }
            at += BLOCK;
        }
    }
    rows
}

/// Blocks in ascending order as content; `None` is spelled out as zeros.
pub fn content_of(blocks: impl IntoIterator<Item = (u32, Option<Block>)>) -> Content {
    let mut extents: Vec<Extent> = Vec::new();
    let mut data = BytesMut::new();
    for (number, block) in blocks {
        let last = extents.last_mut().filter(|e| e.first_block + e.block_count == number);
        match (block, last) {
            (None, Some(e)) if e.kind == ExtentKind::Zero => e.block_count += 1,
            (None, _) => extents.push(Extent { first_block: number, block_count: 1, kind: ExtentKind::Zero }),
            (Some(b), last) => {
                data.extend_from_slice(&b.bytes);
                match last {
                    Some(Extent { block_count, kind: ExtentKind::Data { crcs }, .. }) => {
                        *block_count += 1;
                        crcs.push(b.crc);
                    }
                    _ => {
                        let kind = ExtentKind::Data { crcs: vec![b.crc] };
                        extents.push(Extent { first_block: number, block_count: 1, kind });
                    }
                }
            }
        }
    }
    Content { extents, data: data.freeze() }
}

/// The same, without what is zero anyway.
pub fn sparse_content(blocks: impl IntoIterator<Item = (u32, Option<Block>)>) -> Content {
    content_of(blocks.into_iter().filter(|(_, b)| b.is_some()))
}
