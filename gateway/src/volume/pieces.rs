//! Splits ranges of a volume at block, object and operation borders.

use gabion_proto::limits::BLOCK_BYTES;
use std::ops::Range;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Part of one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First block within the volume.
    pub start_block: u64,
    pub object: u32,
    /// First block within the object.
    pub first_block: u32,
    pub block_count: u32,
}

/// The blocks that a byte range touches.
pub fn blocks_touched(offset: u64, len: u64) -> Range<u64> {
    offset / BLOCK..(offset + len).div_ceil(BLOCK)
}

/// The blocks that a byte range covers whole; empty when there is none.
pub fn blocks_inside(offset: u64, len: u64) -> Range<u64> {
    let (start, end) = (offset.div_ceil(BLOCK), (offset + len) / BLOCK);
    start..end.max(start)
}

/// `blocks` cut into pieces of one object and at most `blocks_max` blocks, in order.
pub fn pieces(
    blocks: Range<u64>,
    blocks_per_object: u32,
    blocks_max: u32,
) -> impl Iterator<Item = Piece> + Send {
    let per_object = u64::from(blocks_per_object);
    let mut at = blocks.start;
    std::iter::from_fn(move || {
        if at >= blocks.end {
            return None;
        }
        let first = at % per_object;
        let count = (per_object - first).min(blocks.end - at).min(blocks_max.into());
        let object = u32::try_from(at / per_object).expect("a volume's size is limited");
        let piece = Piece { start_block: at, object, first_block: first as u32, block_count: count as u32 };
        at += count;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn edges() {
        assert_eq!(blocks_touched(0, 1), 0..1);
        assert_eq!(blocks_touched(4095, 2), 0..2);
        assert_eq!(blocks_inside(0, 4095), 0..0);
        assert_eq!(blocks_inside(1, 8191), 1..2);
        assert!(blocks_inside(4097, 10).is_empty());
    }

    proptest! {
        #[test]
        fn pieces_cover_the_range_in_order(start in 0u64..5000, len in 0u64..5000, per in 0u32..4, max in 1u32..300) {
            let per = 64 << per;
            let mut next = start;
            for p in pieces(start..start + len, per, max) {
                prop_assert_eq!(p.start_block, next);
                prop_assert_eq!(u64::from(p.object) * u64::from(per) + u64::from(p.first_block), next);
                prop_assert!(p.block_count >= 1 && p.block_count <= max && p.first_block + p.block_count <= per);
                next += u64::from(p.block_count);
            }
            prop_assert_eq!(next, start + len);
        }
    }
}
