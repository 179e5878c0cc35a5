//! Making, and opening, a store: the journal is replayed, everything is brought to its final place, and a new
//! journal begins under a new nonce, so that nothing of a lost tail can come back (rule S3).

use super::buffer::{Blocks, BlocksMut};
use super::checkpoint::{index_batch, write_back};
use super::chunk_store::{ChunkStore, Opened};
use super::device::{self, Device, Request};
use super::homes::Homes;
use super::journal::{self, Header, Record};
use super::kv::Kv;
use super::layout::{
    self, BLOCK, ChunkRecord, Geometry, JOURNAL_FIRST, Position, SUPERBLOCKS, Superblock, kind,
};
use super::rules::{Rule, holds};
use super::slots::Slots;
use super::stage::Sweep;
use super::view::Index;
use super::{Identity, StoreError};
use gabion_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK};

fn disk(what: &'static str) -> impl Fn(std::io::Error) -> StoreError {
    move |e| StoreError::Fatal(format!("{what} failed: {e}"))
}

/// Writes an empty store into the first `size` bytes of a device: index first, superblock last, so that an interrupted format is
/// not a store.
pub fn format_parts(
    device: &mut impl Device,
    kv: &mut impl Kv,
    identity: Identity,
    (size, journal_blocks): (u64, u32),
    nonce: u64,
) -> Result<(), StoreError> {
    let geometry = Geometry::with_journal(size, journal_blocks);
    if size > device.blocks() * u64::from(BLOCK_BYTES) {
        return Err(StoreError::Invalid(format!("the disk has less than {size} bytes")));
    }
    if geometry.slots == 0 {
        return Err(StoreError::Invalid("the disk is too small for a journal and a single chunk".into()));
    }
    let entry = (vec![kind::IDENTITY], Some(layout::encode(&identity)?));
    write_index(kv, vec![entry])?;
    let superblock = Superblock {
        generation: 1,
        size,
        identity,
        journal_blocks,
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

/// Writes both superblocks, one after the other: first over the copy that is damaged or older, so that they are never more than one
/// generation apart, however often starts fail in between.
fn write_superblocks(device: &mut impl Device, superblock: &Superblock) -> Result<(), StoreError> {
    let [a, b] = SUPERBLOCKS;
    let order = match read_superblocks(device) {
        [Ok(first), Ok(second)] if second.generation < first.generation => [b, a],
        [Ok(_), Err(_)] => [b, a],
        _ => [a, b],
    };
    order.into_iter().try_for_each(|block| write_superblock(device, block, superblock))
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

/// Both superblocks, as they are.
pub fn read_superblocks(device: &mut (impl Device + ?Sized)) -> [Result<Superblock, String>; 2] {
    SUPERBLOCKS.map(|block| {
        let mut buffer = BlocksMut::zeroed(1);
        let read = device.read_now(block, buffer.blocks_mut()).map_err(|e| e.to_string());
        read.and_then(|()| Superblock::decode(buffer.bytes()))
    })
}

/// The newest intact superblock of the two.
pub fn read_superblock(device: &mut (impl Device + ?Sized)) -> Result<Superblock, StoreError> {
    match read_superblocks(device) {
        [Ok(a), Ok(b)] if b.generation > a.generation => Ok(b),
        [Ok(a), _] => Ok(a),
        [Err(_), Ok(b)] => Ok(b),
        // The first says best what is wrong.
        [Err(why), Err(_)] => Err(StoreError::Fatal(why)),
    }
}

/// Whether two intact superblocks can be of one store: a crash leaves them at most one generation apart.
pub fn written_together(a: &Superblock, b: &Superblock) -> bool {
    let (a, b) = if a.generation < b.generation { (a, b) } else { (b, a) };
    let same = (a.identity, a.size, a.journal_blocks) == (b.identity, b.size, b.journal_blocks);
    same && (a == b || a.generation + 1 == b.generation)
}

/// What is left in the journal.
pub(super) struct Replay {
    /// Those that the index does not hold yet.
    records: Vec<Record>,
    pub end: Position,
    /// Records behind the end were durable once, so what was acknowledged is not all there.
    pub lost: Option<String>,
    /// Behind the end begins the next record, which is not whole.
    pub cut_short: bool,
}

impl Replay {
    /// Applies the records to the index, in memory. True when some name fresh slots.
    fn apply<K: Kv>(&mut self, index: &mut Index<K>) -> Result<bool, StoreError> {
        let mut fresh = false;
        for record in std::mem::take(&mut self.records) {
            fresh |= !record.images.is_empty();
            apply(index, record)?;
        }
        Ok(fresh)
    }
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Opens a formatted store. `nonce` must never have been given before on this disk.
    pub fn open(mut device: D, kv: K, nonce: u64) -> Result<Self, StoreError> {
        let mut superblock = read_superblock(&mut device)?;
        check_size(&device, &superblock)?;
        check_identity(&kv, &superblock)?;
        let mut index = Index::new(kv);
        replay_into(&mut device, &mut index, &mut superblock)?;
        superblock.generation += 1;
        if holds(Rule::Chain) {
            superblock.nonce = nonce;
        }
        write_superblocks(&mut device, &superblock)?;
        assert!(index.dirty.is_empty() && index.frozen.is_empty(), "the journal has been replayed");
        let (slots, objects) = count(&index.kv, superblock.geometry())?;
        let homes = Homes::load(&index)?;
        Ok(ChunkStore::assemble(Opened { device, index, superblock, slots, objects, homes }))
    }

    /// The store as opening it would find it, for reading only: what the journal holds lies in memory over the index,
    /// and nothing is written. Commits fail, and slots are not counted. `damage` hears what would keep it
    /// from being opened, and may let it pass.
    pub(super) fn open_frozen(
        mut device: D,
        kv: K,
        mut damage: impl FnMut(StoreError) -> Result<(), StoreError>,
    ) -> Result<(Self, Replay), StoreError> {
        let superblock = read_superblock(&mut device)?;
        check_size(&device, &superblock).or_else(&mut damage)?;
        check_identity(&kv, &superblock).or_else(&mut damage)?;
        let mut index = Index::new(kv);
        let applied = applied(&index.kv).or_else(|e| damage(e).map(|()| 0))?;
        let mut replay = read_journal(&mut device, &superblock, applied)?;
        if let Some(why) = &replay.lost {
            damage(StoreError::Fatal(why.clone()))?;
        }
        replay.apply(&mut index)?;
        let slots = Slots::new(superblock.geometry().slots);
        let homes = Homes::load(&index).or_else(|e| damage(e).map(|()| Homes::default()))?;
        let opened = Opened { device, index, superblock, slots, objects: 0, homes };
        Ok((ChunkStore::assemble(opened), replay))
    }
}

/// The slots in use and the objects of an index with nothing on top.
fn count(kv: &impl Kv, geometry: Geometry) -> Result<(Slots, u64), StoreError> {
    let (mut slots, mut objects, mut result) = (Slots::new(geometry.slots), 0, Ok(()));
    for k in [kind::CHUNK, kind::PENDING_CHUNK] {
        let swept = kv.sweep(&[k], &mut |_, value| {
            result = ChunkRecord::decode(value).and_then(|c| c.slot.map_or(Ok(()), |slot| slots.mark(slot)));
            result.is_ok()
        });
        swept.map_err(StoreError::Fatal)?;
        std::mem::replace(&mut result, Ok(()))?;
    }
    let swept = kv.sweep(&[kind::OBJECT], &mut |_, _| {
        objects += 1;
        true
    });
    swept.map_err(StoreError::Fatal)?;
    Ok((slots, objects))
}

fn check_size(device: &impl Device, superblock: &Superblock) -> Result<(), StoreError> {
    let size = device.blocks() * u64::from(BLOCK_BYTES);
    if size < superblock.size {
        return Err(StoreError::Fatal(format!(
            "the disk has {size} bytes, its superblock says {}",
            superblock.size
        )));
    }
    Ok(())
}

fn check_identity(kv: &impl Kv, superblock: &Superblock) -> Result<(), StoreError> {
    let recorded = kv.get(&[kind::IDENTITY]).map_err(StoreError::Fatal)?;
    let recorded = recorded.ok_or_else(|| StoreError::Fatal("the index is not that of a store".into()))?;
    if layout::decode::<Identity>(&recorded)? != superblock.identity {
        return Err(StoreError::Fatal("the index belongs to another disk".into()));
    }
    Ok(())
}

/// Number of the last record that the index holds.
fn applied(kv: &impl Kv) -> Result<u64, StoreError> {
    match kv.get(&[kind::APPLIED]).map_err(StoreError::Fatal)? {
        Some(value) => layout::decode(&value),
        None => Ok(0),
    }
}

/// Replays the journal into slots and index; `superblock` then has its end as the tail.
fn replay_into<D: Device, K: Kv>(
    device: &mut D,
    index: &mut Index<K>,
    superblock: &mut Superblock,
) -> Result<(), StoreError> {
    let applied = applied(&index.kv)?;
    let mut replay = read_journal(device, superblock, applied)?;
    if let Some(why) = replay.lost.take() {
        return Err(StoreError::Fatal(why));
    }
    let end = replay.end;
    let fresh = replay.apply(index)?;
    if end.seq == superblock.tail.seq {
        return Ok(());
    }
    // What was read may have been in the disk's cache only.
    device::run(device, Request::Flush).map_err(disk("flushing the disk"))?;
    superblock.flushed = end.seq;
    if fresh && holds(Rule::MarkBeforeWriteBack) {
        // In-place writes change slots that another replay would verify.
        superblock.generation += 1;
        write_superblocks(device, superblock)?;
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
    for Sweep { prefix, class } in &record.sweeps {
        let gone = index.pick(prefix, |key| class.has_key(key))?;
        index.dirty.extend(gone.into_iter().map(|(key, ())| (key, None)));
    }
    index.dirty.extend(record.changes);
    Ok(())
}

/// The chain of intact records from the tail on, without those whose slots are not as they say or that are applied.
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
            let Found::Record(record) = read_record(device, superblock, block) else { continue };
            let next = record.header.seq == at.seq + 1;
            if next && (record.header.previous_crc == at.crc || !holds(Rule::Chain)) {
                found = Some((block, record));
                break;
            }
        }
        let Some((block, record)) = found else { break };
        flushed = flushed.max(record.header.flushed);
        at = Position { block: block + record.blocks, seq: record.header.seq, crc: record.crc };
        records.push((record, at));
    }
    let chained = at;
    let mut end = superblock.tail;
    let (mut out, mut unknown) = (Vec::new(), None);
    for (record, position) in records {
        // Acknowledged only if all that it names was durable (rule S1).
        if holds(Rule::FreshSlotsVerified) && record.header.seq > flushed.max(applied) {
            match images(device, superblock, &record) {
                Images::Hold => {}
                Images::Differ => break,
                Images::Unreadable(block) => {
                    let seq = record.header.seq;
                    unknown = Some(format!(
                        "block {block}, which record {seq} of the journal names, cannot be read"
                    ));
                    break;
                }
            }
        }
        end = position;
        out.push(record);
    }
    let lost = lost_record(device, superblock, end.seq).map(|seq| {
        format!("the journal ends at record {}, but record {seq} was acknowledged: the disk lost it", end.seq)
    });
    let lost = lost.or_else(|| index_lost(superblock, applied, end));
    let unknown = unknown.or_else(|| hidden_record(device, superblock, chained));
    let lost = match (lost, unknown) {
        (Some(why), Some(unknown)) => Some(format!("{why} ({unknown})")),
        (None, Some(unknown)) => Some(format!("{unknown}: whether it was acknowledged is not known")),
        (why, None) => why,
    };
    let applied = if holds(Rule::AppliedOnce) { applied } else { 0 };
    out.retain(|r| r.header.seq > applied);
    let cut_short = begins_after(device, superblock, end);
    Ok(Replay { records: out, end, lost, cut_short })
}

/// What is wrong with an index that holds everything up to record `applied`, beside this journal.
fn index_lost(superblock: &Superblock, applied: u64, end: Position) -> Option<String> {
    let tail = superblock.tail.seq;
    // The batch with that number is durable before the tail moves (rule S4).
    if applied < tail {
        return Some(format!(
            "the index holds what the journal said up to record {applied}, the journal begins after record {tail}: the index \
             is an older one, what was acknowledged in between is lost"
        ));
    }
    (end.seq < applied).then(|| {
        format!(
            "the journal ends at record {}, the index knows record {applied}: acknowledged records are lost",
            end.seq
        )
    })
}

/// The blocks at which the record after `end` may begin.
fn next_places(superblock: &Superblock, end: Position) -> impl Iterator<Item = u32> {
    let (blocks, tail) = (superblock.journal_blocks, superblock.tail.block);
    // At the beginning of the ring only where it did not fit behind `end`, and has room there in front of the tail. (The tail of the
    // time when it was written is no later one.)
    let wraps = end.block >= tail && blocks - end.block < tail;
    [(end.block < blocks).then_some(end.block), wraps.then_some(0)].into_iter().flatten()
}

/// What is to be said where the record after `end` may lie in a block that cannot be read. If it was the last one that was
/// acknowledged, nothing else tells of it.
fn hidden_record(device: &mut impl Device, superblock: &Superblock, end: Position) -> Option<String> {
    let hidden =
        next_places(superblock, end).find_map(|block| match read_record(device, superblock, block) {
            Found::Unreadable { block, header } => {
                // What can be read may say that it is another one.
                header.is_none_or(|h| h.nonce == superblock.nonce && h.seq == end.seq + 1).then_some(block)
            }
            _ => None,
        })?;
    let block = JOURNAL_FIRST + u64::from(hidden);
    Some(format!("block {block}, where record {} of the journal would be, cannot be read", end.seq + 1))
}

/// Whether the head of the record after `end` is there.
fn begins_after(device: &mut impl Device, superblock: &Superblock, end: Position) -> bool {
    [end.block, 0].into_iter().any(|block| {
        let next = read_head(device, superblock, block).ok().flatten().map(|(header, _)| header);
        next.is_some_and(|h| h.nonce == superblock.nonce && h.seq == end.seq + 1)
    })
}

/// What is at a block of the ring.
enum Found {
    /// An intact record of this journal.
    Record(Record),
    /// None.
    Nothing,
    /// Perhaps one: this block cannot be read. The header, where that can.
    Unreadable { block: u32, header: Option<Header> },
}

/// Header and length of what may be a record at `block` of the ring. An error where the block cannot be read.
fn read_head(
    device: &mut impl Device,
    superblock: &Superblock,
    block: u32,
) -> std::io::Result<Option<(Header, u32)>> {
    let room = superblock.journal_blocks.saturating_sub(block);
    if room == 0 {
        return Ok(None);
    }
    let mut head = BlocksMut::zeroed(1);
    device.read_now(JOURNAL_FIRST + u64::from(block), head.blocks_mut())?;
    Ok(journal::peek(head.bytes(), room))
}

fn read_record(device: &mut impl Device, superblock: &Superblock, block: u32) -> Found {
    let (header, len) = match read_head(device, superblock, block) {
        Ok(Some((header, len))) if header.nonce == superblock.nonce => (header, len),
        Ok(_) => return Found::Nothing,
        Err(_) => return Found::Unreadable { block, header: None },
    };
    let mut buffer = BlocksMut::zeroed(len as usize);
    if let Some(at) = read_each(device, JOURNAL_FIRST + u64::from(block), &mut buffer).first() {
        return Found::Unreadable { block: block + at, header: Some(header) };
    }
    journal::decode(&buffer.freeze()).map_or(Found::Nothing, Found::Record)
}

/// Reads blocks of the device. Returns which of them cannot be read; they are zeros.
fn read_each(device: &mut impl Device, address: u64, buffer: &mut BlocksMut) -> Vec<u32> {
    if device.read_now(address, buffer.blocks_mut()).is_ok() {
        return Vec::new();
    }
    let mut unreadable = Vec::new();
    for (i, one) in (0..).zip(buffer.blocks_mut().chunks_mut(1)) {
        if device.read_now(address + u64::from(i), one).is_err() {
            one[0].0.fill(0);
            unreadable.push(i);
        }
    }
    unreadable
}

/// What is in the fresh slots of a record.
enum Images {
    /// What it says.
    Hold,
    /// Something else: it was never finished.
    Differ,
    /// What it says, but for this block and perhaps others, which cannot be read. They may have been flushed, and the record
    /// acknowledged.
    Unreadable(u64),
}

fn images(device: &mut impl Device, superblock: &Superblock, record: &Record) -> Images {
    let geometry = superblock.geometry();
    let mut found = Images::Hold;
    for image in &record.images {
        let (first, count) = (u32::from(image.first), u32::from(image.count));
        if image.slot >= geometry.slots || first + count > BLOCKS_PER_CHUNK {
            return Images::Differ;
        }
        let mut buffer = BlocksMut::zeroed(count as usize);
        let block = geometry.slot_block(image.slot) + u64::from(first);
        match read_each(device, block, &mut buffer).first() {
            Some(at) => found = Images::Unreadable(block + u64::from(*at)),
            None if crc32fast::hash(buffer.bytes()) != image.crc => return Images::Differ,
            None => {}
        }
    }
    found
}

/// A record behind the end that was durable, as one that came after it or the superblock says: the disk lied about a
/// flush, or lost what it had. A block that cannot be read says nothing.
fn lost_record(device: &mut impl Device, superblock: &Superblock, end: u64) -> Option<u64> {
    const PIECE_BLOCKS: u32 = 256;
    let mut block = 0;
    while block < superblock.journal_blocks {
        let count = PIECE_BLOCKS.min(superblock.journal_blocks - block);
        let mut buffer = BlocksMut::zeroed(count as usize);
        read_each(device, JOURNAL_FIRST + u64::from(block), &mut buffer);
        for i in 0..count {
            let head = &buffer.bytes()[i as usize * BLOCK..(i as usize + 1) * BLOCK];
            let Some((header, _)) = journal::peek(head, superblock.journal_blocks - block - i) else {
                continue;
            };
            if header.nonce != superblock.nonce || header.flushed <= end {
                continue;
            }
            let says_so = match read_record(device, superblock, block + i) {
                Found::Record(record) => record.header.flushed > end,
                // Not all of it can be verified: better no start than a loss.
                Found::Unreadable { .. } => true,
                Found::Nothing => false,
            };
            if says_so {
                return Some(header.flushed);
            }
        }
        block += count;
    }
    Some(superblock.flushed).filter(|flushed| *flushed > end)
}
