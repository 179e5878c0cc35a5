//! Pieces of objects as recovery moves them, and how two copies of one are compared: leaf by leaf, by a digest that nobody can find
//! two leaves for (SHA-256). That CRCs are equal proves nothing: among the pairs of blocks of a cluster some are.

use crate::erasure::{Block, content_of};
use crate::store::{Piece, StoreError};
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::limits::*;
use gabion_proto::msg::LeafDigest;
use ring::digest::{Context, SHA256};
use std::collections::BTreeMap;

const BLOCK: usize = BLOCK_BYTES as usize;
const CHUNK_LEAVES: u32 = BLOCKS_PER_CHUNK / LEAF_BLOCKS;

/// Blocks of validated content by number; `None` is zeros, what is absent is not there.
type Blocks = BTreeMap<u32, Option<Block>>;

fn blocks_of(content: &Content) -> Blocks {
    let (mut out, mut at) = (Blocks::new(), 0);
    for e in &content.extents {
        for i in 0..e.block_count {
            let block = match &e.kind {
                ExtentKind::Zero => None,
                ExtentKind::Data { crcs } => {
                    let bytes = content.data.slice(at..at + BLOCK);
                    at += BLOCK;
                    Some(Block { crc: crcs[i as usize], bytes })
                }
            };
            out.insert(e.first_block + i, block);
        }
    }
    out
}

/// One digest for each leaf of the piece that begins at `first`, of which `content` is all there is. None of nothing.
pub fn digests(content: &Content, first: u32) -> Vec<LeafDigest> {
    if content.extents.is_empty() {
        return Vec::new();
    }
    let blocks = blocks_of(content);
    let leaf = |n: u32| {
        let numbers = first + n * LEAF_BLOCKS..first + (n + 1) * LEAF_BLOCKS;
        let states = numbers.clone().map(|b| match blocks.get(&b) {
            None => 0,
            Some(None) => 1,
            Some(Some(_)) => 2,
        });
        let mut context = Context::new(&SHA256);
        context.update(&states.collect::<Vec<u8>>());
        for block in numbers.filter_map(|b| blocks.get(&b)?.as_ref()) {
            context.update(&block.bytes);
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(context.finish().as_ref());
        digest
    };
    (0..PIECE_LEAVES).map(leaf).collect()
}

/// Which leaves of the piece from `first` on somebody has who has leaves of these digests.
pub fn same(content: &Content, first: u32, have: &[LeafDigest]) -> u32 {
    if have.len() != PIECE_LEAVES as usize {
        return 0;
    }
    let pairs = digests(content, first).into_iter().zip(have).enumerate();
    pairs.filter(|(_, (a, b))| a == *b).fold(0, |same, (n, _)| same | 1 << n)
}

/// The leaf of a block of the piece from `first` on, as a bit; none of one that is outside.
fn leaf_bit(block: u32, first: u32) -> u32 {
    let leaf = block.checked_sub(first).map(|b| b / LEAF_BLOCKS).filter(|n| *n < PIECE_LEAVES);
    leaf.map_or(0, |n| 1 << n)
}

/// The content without these leaves.
pub fn without(content: Content, first: u32, leaves: u32) -> Content {
    if leaves == 0 {
        return content;
    }
    let blocks = blocks_of(&content).into_iter();
    content_of(blocks.filter(|(b, _)| leaf_bit(*b, first) & leaves == 0))
}

/// Whether all of it is within the piece from `first` on, and nothing in these leaves.
pub fn fits(content: &Content, first: u32, but: u32) -> bool {
    let blocks = content.extents.iter().flat_map(|e| e.first_block..e.first_block + e.block_count);
    blocks.map(|b| leaf_bit(b, first)).all(|bit| bit & !but != 0)
}

/// Blocks of data that somebody cannot read, and the checksums that they should have.
pub type Gaps = Vec<(u32, u32)>;

/// The leaves of these blocks.
pub fn leaves_of(blocks: &Gaps, first: u32) -> u32 {
    blocks.iter().fold(0, |leaves, (b, _)| leaves | leaf_bit(*b, first))
}

/// Whether blocks that somebody cannot read may be those of the piece from `first` on of which all this could be read, without these leaves.
pub fn gaps_fit(content: &Content, bad: &Gaps, first: u32, but: u32) -> bool {
    let there =
        |b: &u32| content.extents.iter().any(|e| (e.first_block..e.first_block + e.block_count).contains(b));
    bad.is_sorted_by(|a, b| a.0 < b.0)
        && bad.iter().all(|(b, _)| leaf_bit(*b, first) & !but != 0 && !there(b))
}

/// A piece, and the blocks of it that could not be read, if that is all that was wrong.
pub fn with_gaps(result: Result<Piece, StoreError>) -> Result<(Piece, Gaps), StoreError> {
    match result {
        Ok(piece) => Ok((piece, Vec::new())),
        Err(StoreError::Unreadable { object, block, why, rest: Some(rest) }) => match rest.state {
            Some((state, end)) => {
                let bad = rest.bad.iter().map(|(_, block, crc)| (*block, *crc)).collect();
                Ok((Piece { state, content: rest.content, end }, bad))
            }
            None => Err(StoreError::Unreadable { object, block, why, rest: Some(rest) }),
        },
        Err(e) => Err(e),
    }
}

/// The content with those of the `lacking` blocks that `other`, which was validated, has with the checksum that is expected; they are not lacking any more.
pub fn fill(content: &Content, other: &Content, lacking: &mut BTreeMap<u32, u32>) -> Content {
    let mut all = blocks_of(content);
    for (number, block) in blocks_of(other) {
        // Zeros are no data.
        if block.as_ref().is_some_and(|b| lacking.get(&number) == Some(&b.crc)) {
            lacking.remove(&number);
            all.insert(number, block);
        }
    }
    content_of(all)
}

/// What becomes of a piece of which `here` has the leaves `same`, and `came` the others: chunks that stay as they are, and what is
/// to be written, in whole chunks.
pub fn merge(here: &Content, came: Content, first: u32, same: u32) -> (Vec<u32>, Content) {
    if same == 0 {
        return (Vec::new(), came);
    }
    let here = blocks_of(here);
    let chunk_leaves = |chunk: u32| {
        let at = (chunk * BLOCKS_PER_CHUNK - first) / LEAF_BLOCKS;
        ((1 << CHUNK_LEAVES) - 1) << at
    };
    let chunks = first / BLOCKS_PER_CHUNK..(first + PIECE_BLOCKS) / BLOCKS_PER_CHUNK;
    let kept: Vec<u32> = chunks
        .filter(|c| same & chunk_leaves(*c) == chunk_leaves(*c))
        .filter(|c| here.range(c * BLOCKS_PER_CHUNK..(c + 1) * BLOCKS_PER_CHUNK).next().is_some())
        .collect();
    let mut all = blocks_of(&came);
    let stays = |b: &u32| leaf_bit(*b, first) & same != 0 && !kept.contains(&(b / BLOCKS_PER_CHUNK));
    all.extend(here.into_iter().filter(|(b, _)| stays(b)));
    (kept, content_of(all))
}

/// Blocks `first..first + count` of it; the bytes are shared.
pub fn slice(content: &Content, first: u32, count: u32) -> Content {
    let (mut extents, mut from, mut to, mut at) = (Vec::new(), None, 0, 0);
    for e in &content.extents {
        let bytes = match e.kind {
            ExtentKind::Data { .. } => e.block_count as usize * BLOCK,
            ExtentKind::Zero => 0,
        };
        let start = e.first_block.max(first);
        let end = (e.first_block + e.block_count).min(first.saturating_add(count));
        if start < end {
            let skip = (start - e.first_block) as usize;
            let kind = match &e.kind {
                ExtentKind::Zero => ExtentKind::Zero,
                ExtentKind::Data { crcs } => {
                    from.get_or_insert(at + skip * BLOCK);
                    to = at + (end - e.first_block) as usize * BLOCK;
                    ExtentKind::Data { crcs: crcs[skip..(end - e.first_block) as usize].to_vec() }
                }
            };
            extents.push(Extent { first_block: start, block_count: end - start, kind });
        }
        at += bytes;
    }
    let data = from.map_or_else(Default::default, |from| content.data.slice(from..to));
    Content { extents, data }
}

/// Behind its last block.
pub fn end_of(content: &Content) -> u32 {
    content.extents.last().map_or(0, |e| e.first_block + e.block_count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn random(seed: u32, blocks: impl Iterator<Item = u32>) -> Content {
        let block = |b: u32| match (b + seed) % 5 {
            0 => None,
            n => Block::of(Bytes::from(vec![n as u8 + seed as u8; BLOCK])),
        };
        content_of(blocks.map(|b| (b, block(b))))
    }

    /// Whatever two copies differ in, the one becomes the other from what travels.
    #[test]
    fn what_differs_is_enough() {
        let first = PIECE_BLOCKS;
        for seed in 0..40u32 {
            let sparse = |b: &u32| !(b / 7 + seed).is_multiple_of(3);
            let there = random(1, (first..first + PIECE_BLOCKS).filter(sparse));
            let mut here = blocks_of(&there);
            for n in 0..seed % 7 {
                let at = first + (n * 37 + seed * 11) % PIECE_BLOCKS;
                match n % 3 {
                    0 => _ = here.insert(at, None),
                    1 => _ = here.remove(&at),
                    _ => _ = here.insert(at, Block::of(Bytes::from(vec![99; BLOCK]))),
                }
            }
            let here = content_of(here);
            let same = same(&there, first, &digests(&here, first));
            let came = without(there.clone(), first, same);
            assert!(fits(&came, first, same), "seed {seed}");
            assert!(came.data.len() <= 7 * LEAF_BYTES as usize, "seed {seed}: {}", came.data.len());
            let (kept, written) = merge(&here, came, first, same);
            let mut all = blocks_of(&written);
            assert!(all.keys().all(|b| !kept.contains(&(b / BLOCKS_PER_CHUNK))), "seed {seed}");
            all.extend(blocks_of(&here).into_iter().filter(|(b, _)| kept.contains(&(b / BLOCKS_PER_CHUNK))));
            assert_eq!(content_of(all), there, "seed {seed}");
        }
    }

    #[test]
    fn zeros_are_not_absent_blocks_nor_data() {
        let zero = digests(&Content::zero(0, 4), 0)[0];
        let data = digests(&Content::data(0, Bytes::from(vec![0; 4 * BLOCK])), 0)[0];
        let absent = digests(&Content::zero(8, 4), 0)[0];
        assert!(zero != data && zero != absent && data != absent);
    }

    #[test]
    fn what_is_outside_does_not_fit() {
        let first = PIECE_BLOCKS;
        assert!(fits(&Content::zero(first, PIECE_BLOCKS), first, 0));
        assert!(!fits(&Content::zero(first, PIECE_BLOCKS + 1), first, 0));
        assert!(!fits(&Content::zero(first - 1, 1), first, 0));
        assert!(!fits(&Content::zero(first, 1), first, 1), "it is what the asker has");
    }

    #[test]
    fn what_one_lacks_another_one_gives_and_nothing_else() {
        let first = PIECE_BLOCKS;
        let of = |fill: u8| Block::of(Bytes::from(vec![fill; BLOCK]));
        let crc = |fill: u8| of(fill).expect("not zeros").crc;
        let number = |b: u32| (b % 250) as u8 + 1;
        let all = || (first..first + 30).map(|b| (b, of(number(b))));
        let whole = content_of(all());
        for gaps in [vec![], vec![first + 1], (first + 1..first + 9).collect(), vec![first + 2, first + 29]] {
            let gaps: Gaps = gaps.into_iter().map(|b| (b, crc(number(b)))).collect();
            let lacks = |b: &u32| gaps.iter().any(|(gap, _)| gap == b);
            let part = content_of(all().filter(|(b, _)| !lacks(b)));
            assert!(gaps_fit(&part, &gaps, first, 0), "{gaps:?}");
            let mut lacking: BTreeMap<u32, u32> = gaps.iter().copied().collect();
            // What should be other bytes is no gap filled, and zeros are not.
            for other in [content_of(all().map(|(b, _)| (b, of(254)))), Content::zero(first, 30)] {
                assert_eq!(fill(&part, &other, &mut lacking), part);
                assert_eq!(lacking.len(), gaps.len());
            }
            // Nor is anything taken that is there already, or is not there at all.
            let other = content_of(all().filter(|(b, _)| lacks(b)).chain([(first + 40, of(9))]));
            assert_eq!(fill(&part, &other, &mut lacking), whole, "{gaps:?}");
            assert!(lacking.is_empty());
        }
        assert!(!gaps_fit(&whole, &vec![(first + 1, 0)], first, 0), "it is there");
        assert!(!gaps_fit(&Content::default(), &vec![(first + 1, 0), (first + 1, 1)], first, 0));
        assert!(
            !gaps_fit(&Content::default(), &vec![(first + 1, 0)], first, 1),
            "of a leaf that the asker has"
        );
        assert!(!gaps_fit(&Content::default(), &vec![(2 * first, 0)], first, 0));
        assert_eq!(leaves_of(&vec![(first, 0), (first + 3, 0), (first + 4, 0)], first), 0b11);
    }

    #[test]
    fn slices_are_what_they_say() {
        let whole = random(2, (0..600).filter(|b| b % 11 != 3));
        for (first, count) in [(0, 128), (3, 1), (100, 300), (590, 128), (700, 1)] {
            let part = slice(&whole, first, count);
            part.validate(true).expect("valid");
            let mut wanted = blocks_of(&whole);
            wanted.retain(|b, _| (first..first + count).contains(b));
            assert_eq!(blocks_of(&part), wanted);
        }
    }
}
