//! Making, and opening, a store: the journal is replayed, everything is brought to its final place, and a new
//! journal begins under a new nonce, so that nothing of a lost tail can come back (rule S3).

use super::buffer::{Blocks, BlocksMut};
use super::checkpoint::{index_batch, write_back};
use super::chunk_store::{ChunkStore, Opened};
use super::device::{self, Device, Request};
use super::journal::{self, Record};
use super::kv::Kv;
use super::layout::{
    self, BLOCK, ChunkRecord, Geometry, JOURNAL_FIRST, Position, SUPERBLOCKS, Superblock, kind,
};
use super::rules::{Rule, holds};
use super::slots::Slots;
use super::view::Index;
use super::{Identity, StoreError};
use gabion_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK};

fn disk(what: &'static str) -> impl Fn(std::io::Error) -> StoreError {
    move |e| StoreError::Fatal(format!("{what} failed: {e}"))
}

/// Writes an empty store: index first, superblock last, so that an interrupted format is not a store.
pub fn format_parts(
    device: &mut impl Device,
    kv: &mut impl Kv,
    identity: Identity,
    geometry: Geometry,
    nonce: u64,
) -> Result<(), StoreError> {
    if geometry.slots == 0 {
        return Err(StoreError::Invalid("the disk is too small for a journal and a single chunk".into()));
    }
    let entry = (vec![kind::IDENTITY], Some(layout::encode(&identity)?));
    write_index(kv, vec![entry])?;
    let superblock = Superblock {
        generation: 1,
        size: device.blocks() * u64::from(BLOCK_BYTES),
        identity,
        journal_blocks: geometry.journal_blocks,
        nonce,
        tail: Position::default(),
        flushed: 0,
    };
    // The first one last: until then there is no store.
    for block in [SUPERBLOCKS[1], SUPERBLOCKS[0]] {
        write_superblock(device, block, &superblock)?;
    }
    Ok(())
}

fn write_superblock(device: &mut impl Device, block: u64, superblock: &Superblock) -> Result<(), StoreError> {
    let data = vec![Blocks::copy_of(&superblock.encode())];
    device::run(device, Request::Write { block, data, durable: true }).map_err(disk("writing the superblock"))
}

/// Applies a batch durably.
fn write_index(kv: &mut impl Kv, batch: super::kv::Batch) -> Result<(), StoreError> {
    kv.start(batch);
    kv.finish().map_err(StoreError::Fatal)
}

/// The newest intact superblock of the two.
pub fn read_superblock(device: &mut (impl Device + ?Sized)) -> Result<Superblock, StoreError> {
    let (mut best, mut why) = (None::<Superblock>, String::new());
    for block in SUPERBLOCKS {
        let mut buffer = BlocksMut::zeroed(1);
        let read = device.read_now(block, buffer.blocks_mut()).map_err(|e| e.to_string());
        match read.and_then(|()| Superblock::decode(buffer.bytes())) {
            Ok(s) if best.is_none_or(|b| b.generation < s.generation) => best = Some(s),
            Ok(_) => {}
            // The first says best what is wrong.
            Err(e) if why.is_empty() => why = e,
            Err(_) => {}
        }
    }
    best.ok_or(StoreError::Fatal(why))
}

/// What is left in the journal.
struct Replay {
    records: Vec<Record>,
    end: Position,
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Opens a formatted store. `nonce` must never have been given before on this disk.
    pub fn open(mut device: D, kv: K, nonce: u64) -> Result<Self, StoreError> {
        let mut superblock = read_superblock(&mut device)?;
        if device.blocks() * u64::from(BLOCK_BYTES) < superblock.size {
            return Err(StoreError::Fatal(format!(
                "the disk has {} bytes, its superblock says {}",
                device.blocks() * u64::from(BLOCK_BYTES),
                superblock.size
            )));
        }
        let recorded = kv.get(&[kind::IDENTITY]).map_err(StoreError::Fatal)?;
        let recorded =
            recorded.ok_or_else(|| StoreError::Fatal("the index is not that of a store".into()))?;
        if layout::decode::<Identity>(&recorded)? != superblock.identity {
            return Err(StoreError::Fatal("the index belongs to another disk".into()));
        }
        let mut index = Index::new(kv);
        replay_into(&mut device, &mut index, &mut superblock)?;
        superblock.generation += 1;
        if holds(Rule::Chain) {
            superblock.nonce = nonce;
        }
        for block in SUPERBLOCKS {
            write_superblock(&mut device, block, &superblock)?;
        }
        let mut slots = Slots::new(superblock.geometry().slots);
        for k in [kind::CHUNK, kind::PENDING_CHUNK] {
            index.each(&[k], |_, value| match ChunkRecord::decode(value.record()?)?.slot {
                Some(slot) => slots.mark(slot),
                None => Ok(()),
            })?;
        }
        let mut objects = 0;
        index.each(&[kind::OBJECT], |_, _| {
            objects += 1;
            Ok(())
        })?;
        Ok(ChunkStore::assemble(Opened { device, index, superblock, slots, objects }))
    }
}

/// Replays the journal into slots and index; `superblock` then has its end as the tail.
fn replay_into<D: Device, K: Kv>(
    device: &mut D,
    index: &mut Index<K>,
    superblock: &mut Superblock,
) -> Result<(), StoreError> {
    let applied: u64 = match index.kv.get(&[kind::APPLIED]).map_err(StoreError::Fatal)? {
        Some(value) => layout::decode(&value)?,
        None => 0,
    };
    let Replay { records, end } = read_journal(device, superblock, applied)?;
    if end.seq < applied {
        return Err(StoreError::Fatal(format!(
            "the journal ends at record {}, the index knows record {applied}: acknowledged records are lost",
            end.seq
        )));
    }
    let mut fresh = false;
    let applied = if holds(Rule::AppliedOnce) { applied } else { 0 };
    for record in records.into_iter().filter(|r| r.header.seq > applied) {
        fresh |= !record.images.is_empty();
        apply(index, record)?;
    }
    if end.seq == superblock.tail.seq {
        return Ok(());
    }
    // What was read may have been in the disk's cache only.
    device::run(device, Request::Flush).map_err(disk("flushing the disk"))?;
    superblock.flushed = end.seq;
    if fresh && holds(Rule::MarkBeforeWriteBack) {
        // In-place writes change slots that another replay would verify.
        superblock.generation += 1;
        for block in SUPERBLOCKS {
            write_superblock(device, block, superblock)?;
        }
    }
    index.frozen = std::mem::take(&mut index.dirty);
    device::run_all(device, write_back(&index.frozen, superblock)?).map_err(disk("writing to the disk"))?;
    device::run(device, Request::Flush).map_err(disk("flushing the disk"))?;
    let batch = index_batch(&index.frozen, end.seq)?;
    write_index(&mut index.kv, batch)?;
    index.thaw();
    superblock.tail = end;
    Ok(())
}

/// What one record changes.
fn apply<K: Kv>(index: &mut Index<K>, record: Record) -> Result<(), StoreError> {
    for prefix in &record.prefixes {
        let gone = index.scan(prefix, prefix, usize::MAX)?;
        index.dirty.extend(gone.into_iter().map(|(key, _)| (key, None)));
    }
    index.dirty.extend(record.changes);
    Ok(())
}

/// The chain of intact records from the tail on, without those whose slots are not as they say.
fn read_journal(
    device: &mut impl Device,
    superblock: &Superblock,
    applied: u64,
) -> Result<Replay, StoreError> {
    let mut records = Vec::new();
    let (mut at, mut flushed) = (superblock.tail, superblock.flushed);
    loop {
        let mut found = None;
        for block in [at.block, 0] {
            let record = read_record(device, superblock, block)?;
            found = record
                .filter(|r| r.header.seq == at.seq + 1)
                .filter(|r| r.header.previous_crc == at.crc || !holds(Rule::Chain))
                .map(|r| (block, r));
            if found.is_some() {
                break;
            }
        }
        let Some((block, record)) = found else { break };
        flushed = flushed.max(record.header.flushed);
        at = Position { block: block + record.blocks, seq: record.header.seq, crc: record.crc };
        records.push((record, at));
    }
    let mut end = superblock.tail;
    let mut out = Vec::new();
    for (record, position) in records {
        // Acknowledged only if all that it names was durable (rule S1).
        if holds(Rule::FreshSlotsVerified)
            && record.header.seq > flushed.max(applied)
            && !images_hold(device, superblock, &record)?
        {
            break;
        }
        end = position;
        out.push(record);
    }
    refuse_lost_records(device, superblock, end.seq)?;
    Ok(Replay { records: out, end })
}

/// The intact record of this journal at `block` of the ring, if there is one.
fn read_record(
    device: &mut impl Device,
    superblock: &Superblock,
    block: u32,
) -> Result<Option<Record>, StoreError> {
    let room = superblock.journal_blocks - block.min(superblock.journal_blocks);
    if room == 0 {
        return Ok(None);
    }
    let address = JOURNAL_FIRST + u64::from(block);
    let mut head = BlocksMut::zeroed(1);
    device.read_now(address, head.blocks_mut()).map_err(disk("reading the journal"))?;
    let Some((header, len)) = journal::peek(head.bytes(), room) else { return Ok(None) };
    if header.nonce != superblock.nonce {
        return Ok(None);
    }
    let mut buffer = BlocksMut::zeroed(len as usize);
    device.read_now(address, buffer.blocks_mut()).map_err(disk("reading the journal"))?;
    Ok(journal::decode(&buffer.freeze()))
}

fn images_hold(
    device: &mut impl Device,
    superblock: &Superblock,
    record: &Record,
) -> Result<bool, StoreError> {
    let geometry = superblock.geometry();
    for image in &record.images {
        let (first, count) = (u32::from(image.first), u32::from(image.count));
        if image.slot >= geometry.slots || first + count > BLOCKS_PER_CHUNK {
            return Ok(false);
        }
        let mut buffer = BlocksMut::zeroed(count as usize);
        let block = geometry.slot_block(image.slot) + u64::from(first);
        let read = device.read_now(block, buffer.blocks_mut());
        if read.is_err() || crc32fast::hash(buffer.bytes()) != image.crc {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A record that comes after the end and says that the end was not the end of what was durable: the disk lied
/// about a flush, or lost what it had.
fn refuse_lost_records(
    device: &mut impl Device,
    superblock: &Superblock,
    end: u64,
) -> Result<(), StoreError> {
    const PIECE_BLOCKS: u32 = 256;
    let mut block = 0;
    while block < superblock.journal_blocks {
        let count = PIECE_BLOCKS.min(superblock.journal_blocks - block);
        let mut buffer = BlocksMut::zeroed(count as usize);
        device
            .read_now(JOURNAL_FIRST + u64::from(block), buffer.blocks_mut())
            .map_err(disk("reading the journal"))?;
        for i in 0..count {
            let head = &buffer.bytes()[i as usize * BLOCK..(i as usize + 1) * BLOCK];
            let Some((header, _)) = journal::peek(head, superblock.journal_blocks - block - i) else {
                continue;
            };
            if header.nonce != superblock.nonce || header.flushed <= end {
                continue;
            }
            if read_record(device, superblock, block + i)?.is_some_and(|r| r.header.flushed > end) {
                return Err(StoreError::Fatal(format!(
                    "the journal ends at record {end}, but record {} was acknowledged: the disk lost it",
                    header.flushed
                )));
            }
        }
        block += count;
    }
    if superblock.flushed > end {
        return Err(StoreError::Fatal(format!(
            "the journal ends at record {end}, but record {} was acknowledged: the disk lost it",
            superblock.flushed
        )));
    }
    Ok(())
}
