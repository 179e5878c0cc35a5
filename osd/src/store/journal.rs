//! The journal: records in a ring of blocks, each chained to the one before (rule S3).
//!
//! A record is a header with its changes, filled up to whole blocks, then the data blocks that the changes name, in
//! their order. It never wraps: one that does not fit before the end of the ring starts at its beginning, so what
//! follows a record is either right behind it or at block 0.

use super::buffer::{Blocks, BlocksMut};
use super::homes::Class;
use super::layout::{BLOCK, Fields, Key, PG_KEY_BYTES, Position};
use super::stage::Sweep;
use super::view::{BlockBytes, DataBlock, Value, View};
use std::collections::{HashMap, VecDeque};

const MAGIC: &[u8; 8] = b"GABIONJR";
const HEADER_BYTES: usize = 48;
/// The header without its CRC.
const SEALED_BYTES: usize = HEADER_BYTES - 4;

mod tag {
    pub const DELETE: u8 = 1;
    pub const RECORD: u8 = 2;
    pub const BLOCK: u8 = 3;
    pub const DELETE_PREFIX: u8 = 4;
    pub const IMAGE: u8 = 5;
    pub const DELETE_CLASS: u8 = 6;
}

/// What a record says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub nonce: u64,
    pub seq: u64,
    /// Everything up to this record was durable, with its slots, when this one was written (rule S1).
    pub flushed: u64,
    pub previous_crc: u32,
}

/// Blocks that went straight to a slot in the same flush cycle as the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    pub slot: u32,
    pub first: u8,
    pub count: u8,
    /// Of all the bytes.
    pub crc: u32,
}

/// A record as read back.
pub struct Record {
    pub header: Header,
    pub crc: u32,
    pub blocks: u32,
    pub sweeps: Vec<Sweep>,
    pub images: Vec<Image>,
    pub changes: Vec<(Key, Option<Value>)>,
}

/// Upper bound of what `changes` take as the head of a record, in bytes.
pub fn head_bytes(sweeps: &[Sweep], images: usize, changes: &View) -> usize {
    let swept = Swept::new(sweeps);
    let change = |(key, value): (&Key, &Option<Value>)| match value {
        // Not named one by one: a group of any size can be removed.
        None if swept.has(key) => 0,
        Some(Value::Record(bytes)) => 2 + key.len() + 4 + bytes.len(),
        _ => 2 + key.len() + 4,
    };
    HEADER_BYTES + sweeps.len() * 40 + images * 11 + changes.iter().map(change).sum::<usize>()
}

/// What is deleted with everything else of its group: a record may delete many groups, and each of them has very many keys.
struct Swept<'a>(HashMap<&'a [u8], Vec<Class>>);

impl<'a> Swept<'a> {
    fn new(sweeps: &'a [Sweep]) -> Swept<'a> {
        let mut by_prefix: HashMap<&[u8], Vec<Class>> = HashMap::new();
        for sweep in sweeps {
            by_prefix.entry(&sweep.prefix).or_default().push(sweep.class);
        }
        Swept(by_prefix)
    }

    fn has(&self, key: &Key) -> bool {
        if self.0.is_empty() {
            return false;
        }
        // Sweeps are of a kind in a home. Others would only be named one by one.
        let classes = key.get(..PG_KEY_BYTES).and_then(|prefix| self.0.get(prefix));
        classes.is_some_and(|classes| classes.iter().any(|c| c.has_key(key)))
    }
}

fn put_key(out: &mut Vec<u8>, tag: u8, key: &Key) {
    out.push(tag);
    out.push(key.len() as u8);
    out.extend_from_slice(key);
}

/// Builds a record. Data blocks of `changes` are from then on the record's copy. Returns its CRC too.
pub fn encode(header: Header, sweeps: &[Sweep], images: &[Image], changes: &mut View) -> (Blocks, u32) {
    let mut head = Vec::with_capacity(BLOCK);
    head.resize(HEADER_BYTES, 0);
    for Sweep { prefix, class } in sweeps {
        if *class == Class::ALL {
            put_key(&mut head, tag::DELETE_PREFIX, prefix);
        } else {
            put_key(&mut head, tag::DELETE_CLASS, prefix);
            head.extend_from_slice(&class.index.to_le_bytes());
            head.extend_from_slice(&class.count.to_le_bytes());
        }
    }
    for image in images {
        head.push(tag::IMAGE);
        head.extend_from_slice(&image.slot.to_le_bytes());
        head.extend_from_slice(&[image.first, image.count]);
        head.extend_from_slice(&image.crc.to_le_bytes());
    }
    let (mut data_blocks, swept) = (0, Swept::new(sweeps));
    for (key, value) in changes.iter() {
        match value {
            None if swept.has(key) => {}
            None => put_key(&mut head, tag::DELETE, key),
            Some(Value::Record(bytes)) => {
                put_key(&mut head, tag::RECORD, key);
                head.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
                head.extend_from_slice(bytes);
            }
            Some(Value::Block(block)) => {
                put_key(&mut head, tag::BLOCK, key);
                head.extend_from_slice(&block.crc.to_le_bytes());
                data_blocks += 1;
            }
        }
    }
    let head_blocks = head.len().div_ceil(BLOCK);
    let mut out = BlocksMut::zeroed(head_blocks + data_blocks);
    let mut at = head_blocks * BLOCK;
    for value in changes.values() {
        if let Some(Value::Block(block)) = value {
            out.bytes_mut()[at..at + BLOCK].copy_from_slice(block.bytes.get());
            at += BLOCK;
        }
    }
    head[..8].copy_from_slice(MAGIC);
    head[8..16].copy_from_slice(&header.nonce.to_le_bytes());
    head[16..24].copy_from_slice(&header.seq.to_le_bytes());
    head[24..32].copy_from_slice(&header.flushed.to_le_bytes());
    head[32..36].copy_from_slice(&header.previous_crc.to_le_bytes());
    let changes_bytes = (head.len() - HEADER_BYTES) as u32;
    head[36..40].copy_from_slice(&changes_bytes.to_le_bytes());
    head[40..44].copy_from_slice(&(data_blocks as u32).to_le_bytes());
    let crc = record_crc(&head[..SEALED_BYTES], &head[HEADER_BYTES..], &out.bytes()[head_blocks * BLOCK..]);
    head[SEALED_BYTES..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    out.bytes_mut()[..head.len()].copy_from_slice(&head);
    let out = out.freeze();
    let mut at = head_blocks;
    for value in changes.values_mut() {
        if let Some(Value::Block(block)) = value {
            block.bytes = BlockBytes::Journaled(out.slice(at, 1));
            at += 1;
        }
    }
    (out, crc)
}

fn record_crc(sealed: &[u8], changes: &[u8], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(sealed);
    hasher.update(changes);
    hasher.update(data);
    hasher.finalize()
}

struct Lengths {
    changes_bytes: usize,
    head_blocks: usize,
    data_blocks: usize,
}

fn parse_header(block: &[u8], blocks_max: u32) -> Option<(Header, Lengths, u32)> {
    let mut from = Fields(block);
    if &from.take::<8>()? != MAGIC {
        return None;
    }
    let header =
        Header { nonce: from.u64()?, seq: from.u64()?, flushed: from.u64()?, previous_crc: from.u32()? };
    let (changes_bytes, data_blocks, crc) = (from.u32()? as usize, from.u32()? as usize, from.u32()?);
    let head_blocks = (HEADER_BYTES + changes_bytes).div_ceil(BLOCK);
    let lengths = Lengths { changes_bytes, head_blocks, data_blocks };
    (head_blocks + data_blocks <= blocks_max as usize).then_some((header, lengths, crc))
}

/// The header in a record's first block and how many blocks the record has, if that is at most `blocks_max`.
pub fn peek(block: &[u8], blocks_max: u32) -> Option<(Header, u32)> {
    let (header, lengths, _) = parse_header(block, blocks_max)?;
    Some((header, (lengths.head_blocks + lengths.data_blocks) as u32))
}

/// The record that `blocks` hold, if it is intact. Any bytes may stand there.
pub fn decode(blocks: &Blocks) -> Option<Record> {
    let bytes = blocks.bytes();
    let (header, lengths, crc) = parse_header(bytes.get(..BLOCK)?, blocks.count() as u32)?;
    let changes = bytes.get(HEADER_BYTES..HEADER_BYTES + lengths.changes_bytes)?;
    let data = bytes.get(lengths.head_blocks * BLOCK..(lengths.head_blocks + lengths.data_blocks) * BLOCK)?;
    if record_crc(&bytes[..SEALED_BYTES], changes, data) != crc {
        return None;
    }
    let mut record = Record {
        header,
        crc,
        blocks: (lengths.head_blocks + lengths.data_blocks) as u32,
        sweeps: Vec::new(),
        images: Vec::new(),
        changes: Vec::new(),
    };
    let (mut from, mut at) = (Fields(changes), lengths.head_blocks);
    let key = |from: &mut Fields<'_>| {
        let len = usize::from(from.u8()?);
        Key::new(from.bytes(len)?).filter(|k| !k.is_empty())
    };
    while !from.0.is_empty() {
        match from.u8()? {
            tag::DELETE => record.changes.push((key(&mut from)?, None)),
            tag::RECORD => {
                let key = key(&mut from)?;
                let len = from.u32()? as usize;
                record.changes.push((key, Some(from.bytes(len)?.to_vec().into())));
            }
            tag::BLOCK => {
                let (key, crc) = (key(&mut from)?, from.u32()?);
                if at >= blocks.count() {
                    return None;
                }
                let bytes = BlockBytes::Journaled(blocks.slice(at, 1));
                record.changes.push((key, Some(Value::Block(DataBlock { crc, bytes }))));
                at += 1;
            }
            tag::DELETE_PREFIX => record.sweeps.push(Sweep { prefix: key(&mut from)?, class: Class::ALL }),
            tag::DELETE_CLASS => {
                let (prefix, index) = (key(&mut from)?, from.u32()?);
                let class = Class { index, count: from.u32().filter(|c| *c > 0)? };
                record.sweeps.push(Sweep { prefix, class });
            }
            tag::IMAGE => record.images.push(Image {
                slot: from.u32()?,
                first: from.u8()?,
                count: from.u8()?,
                crc: from.u32()?,
            }),
            _ => return None,
        }
    }
    (at == lengths.head_blocks + lengths.data_blocks).then_some(record)
}

/// Which blocks of the ring are in use.
pub struct Ring {
    blocks: u32,
    pub head: Position,
    pub tail: Position,
    /// Where each record that is not trimmed ends.
    records: VecDeque<Position>,
}

impl Ring {
    /// An empty ring that goes on at `start`.
    pub fn new(blocks: u32, start: Position) -> Ring {
        Ring { blocks, head: start, tail: start, records: VecDeque::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Blocks between tail and head.
    pub fn used(&self) -> u32 {
        if self.is_empty() {
            0
        } else if self.head.block >= self.tail.block {
            self.head.block - self.tail.block
        } else {
            self.blocks - self.tail.block + self.head.block
        }
    }

    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Where a record of `len` blocks goes now. Head and tail meet only when the ring is empty.
    pub fn place(&self, len: u32) -> Option<u32> {
        let (head, tail) = (self.head.block, self.tail.block);
        if head < tail {
            (tail - head > len).then_some(head)
        } else if self.blocks - head >= len {
            Some(head)
        } else {
            (tail > len).then_some(0)
        }
    }

    /// A record was put at `block`.
    pub fn push(&mut self, block: u32, len: u32, seq: u64, crc: u32) {
        assert_eq!(self.place(len), Some(block), "a record in the wrong place");
        self.head = Position { block: block + len, seq, crc };
        self.records.push_back(self.head);
    }

    /// Where the record `seq` ends.
    pub fn end_of(&self, seq: u64) -> Option<Position> {
        let first = self.records.front()?.seq;
        let found = self.records.get(usize::try_from(seq.checked_sub(first)?).ok()?)?;
        assert_eq!(found.seq, seq, "the journal's records are numbered without gaps");
        Some(*found)
    }

    /// Everything up to `to` is not needed any more.
    pub fn trim(&mut self, to: Position) {
        while self.records.front().is_some_and(|r| r.seq <= to.seq) {
            self.records.pop_front();
        }
        self.tail = to;
    }
}
