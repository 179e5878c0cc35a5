//! Block-granular content as it travels and as stores return it: extents of data or zeros, one
//! CRC32 (IEEE, as crc32fast computes it) per 4 KiB block of data.

use crate::limits::{BLOCK_BYTES, OBJECT_BYTES_MAX};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// What a run of blocks holds. Absent blocks are simply not listed (rule S5: look in the layer
/// below).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExtentKind {
    /// Bytes follow in the payload; one CRC per block.
    Data { crcs: Vec<u32> },
    /// All zero; nothing in the payload.
    Zero,
}

/// A run of blocks of one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First block within the object.
    pub first_block: u32,
    /// Number of blocks, at least one.
    pub block_count: u32,
    pub kind: ExtentKind,
}

/// Extents in ascending order without overlap, and the bytes of the data ones back to back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    pub extents: Vec<Extent>,
    pub data: Bytes,
}

/// Why content from outside was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ContentError {
    #[error("extent {index} is empty, out of order or beyond the object")]
    Shape { index: usize },
    #[error("extent {index} carries {crcs} checksums for {blocks} blocks")]
    CrcCount { index: usize, crcs: usize, blocks: u32 },
    #[error("payload has {got} bytes, the extents name {want}")]
    Length { want: usize, got: usize },
    #[error("checksum mismatch in block {block}")]
    Crc { block: u32 },
}

/// CRC of each block of `data`, whose length must be a multiple of the block size.
pub fn block_crcs(data: &[u8]) -> Vec<u32> {
    assert_eq!(data.len() % BLOCK_BYTES as usize, 0, "whole blocks only");
    data.chunks_exact(BLOCK_BYTES as usize).map(crc32fast::hash).collect()
}

impl Content {
    /// One run of data that starts at `first_block`; CRCs are computed.
    pub fn data(first_block: u32, data: Bytes) -> Content {
        let crcs = block_crcs(&data);
        let block_count = crcs.len() as u32;
        Content { extents: vec![Extent { first_block, block_count, kind: ExtentKind::Data { crcs } }], data }
    }

    /// One run of zeros.
    pub fn zero(first_block: u32, block_count: u32) -> Content {
        Content {
            extents: vec![Extent { first_block, block_count, kind: ExtentKind::Zero }],
            data: Bytes::new(),
        }
    }

    /// Two contents whose bytes came together, `first`'s in front. Lengths are judged by [`Content::validate`].
    pub fn pair(first: Vec<Extent>, second: Vec<Extent>, mut data: Bytes) -> (Content, Content) {
        let blocks = first.iter().filter(|e| e.kind != ExtentKind::Zero).map(|e| e.block_count as usize);
        let bytes = blocks.fold(0usize, usize::saturating_add).saturating_mul(BLOCK_BYTES as usize);
        let rest = data.split_off(bytes.min(data.len()));
        (Content { extents: first, data }, Content { extents: second, data: rest })
    }

    /// Checks shape, counts and (with `crc`) every checksum: bytes from a peer or a client are
    /// never trusted (invariant 10, rule C5).
    pub fn validate(&self, crc: bool) -> Result<(), ContentError> {
        let limit = OBJECT_BYTES_MAX / BLOCK_BYTES;
        let (mut next, mut want) = (0u32, 0usize);
        for (index, e) in self.extents.iter().enumerate() {
            let end = e.first_block.checked_add(e.block_count);
            match end {
                Some(end) if e.block_count > 0 && e.first_block >= next && end <= limit => next = end,
                _ => return Err(ContentError::Shape { index }),
            }
            if let ExtentKind::Data { crcs } = &e.kind {
                if crcs.len() != e.block_count as usize {
                    return Err(ContentError::CrcCount { index, crcs: crcs.len(), blocks: e.block_count });
                }
                want += e.block_count as usize * BLOCK_BYTES as usize;
            }
        }
        if want != self.data.len() {
            return Err(ContentError::Length { want, got: self.data.len() });
        }
        if crc {
            for (block, bytes, expected) in self.data_blocks() {
                if crc32fast::hash(bytes) != expected {
                    return Err(ContentError::Crc { block });
                }
            }
        }
        Ok(())
    }

    /// Each data block: its number, its bytes and its recorded CRC. Only for validated content.
    pub fn data_blocks(&self) -> impl Iterator<Item = (u32, &[u8], u32)> {
        let mut chunks = self.data.chunks_exact(BLOCK_BYTES as usize);
        self.extents
            .iter()
            .flat_map(|e| match &e.kind {
                ExtentKind::Data { crcs } => {
                    crcs.iter().enumerate().map(|(i, c)| (e.first_block + i as u32, *c)).collect::<Vec<_>>()
                }
                ExtentKind::Zero => Vec::new(),
            })
            .map_while(move |(b, c)| chunks.next().map(|d| (b, d, c)))
    }

    /// Blocks named by the extents.
    pub fn block_count(&self) -> u32 {
        self.extents.iter().map(|e| e.block_count).sum()
    }
}
