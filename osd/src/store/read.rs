//! Reads: layers resolved per block, overlay before slot, every checksum verified where it is served.

use super::buffer::{Block, BlocksMut};
use super::chunk_store::{ChunkStore, Purpose};
use super::device::{Device, ReadPart, Request};
use super::kv::Kv;
use super::layout::{self, BLOCK, ChunkRecord, OBJECT_BLOCKS_MAX, ObjectRecord, bits, kind, runs};
use super::view::{BlockBytes, ChunkOverlay, DataBlock, Value};
use super::{Done, ObjectState, Piece, Readable, StoreError, Work};
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::limits::*;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

/// A mismatch may come from write-back that overtook the read; one that stays is damage.
const ATTEMPTS_MAX: u32 = 4;
/// So many blocks of a read may fail before the others are not tried any more: each may cost the disk seconds, and everybody waits.
const FAILED_MAX: usize = 16;
/// Nor are they when this has taken so long and some have failed.
pub(super) const PROBE_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Absent,
    Zero,
    /// Data with this CRC, of this layer.
    Data(u32, LayerId),
}

/// A read in flight.
pub(super) struct ReadJob {
    pub tag: u64,
    /// To begin again: what is read may be overwritten in place meanwhile.
    work: Work,
    attempts: u32,
    /// Of a whole object, or of a piece of one, and where it ends.
    state: Option<(ObjectState, u32)>,
    object: ObjectId,
    first: u32,
    found: Vec<Found>,
    parts: Vec<ReadPart>,
    slots: Vec<u32>,
}

impl ReadJob {
    pub fn failed(&self, e: StoreError) -> Done {
        self.done(Err(e))
    }

    fn done(&self, result: Result<Content, StoreError>) -> Done {
        match (self.state, &self.work) {
            (Some((state, end)), Work::ReadPiece { .. }) => {
                Done::ReadPiece(result.map(|content| Piece { state, content, end }))
            }
            (Some((state, _)), _) => Done::ReadObject(result.map(|content| (state, content))),
            (None, _) => Done::Read(result),
        }
    }
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Starts a read, now or when the commits before it that it overlaps are durable.
    pub(super) fn start_read(&mut self, tag: u64, work: Work) {
        let (Work::Read { pg, object, .. }
        | Work::ReadObject { pg, object }
        | Work::ReadPiece { pg, object, .. }
        | Work::Digest { pg, object }) = work
        else {
            unreachable!("only reads are started here")
        };
        if self.is_touched(pg, object) {
            self.deferred.push_back((self.enqueued, tag, work));
        } else {
            self.begin_read(tag, work, 1);
        }
    }

    /// Starts deferred reads whose commits are durable.
    pub(super) fn start_deferred(&mut self) -> bool {
        let mut moved = false;
        let answered = self.answered;
        while let Some((_, tag, work)) = self.deferred.pop_front_if(|(after, ..)| *after <= answered) {
            moved = true;
            self.begin_read(tag, work, 1);
        }
        moved
    }

    fn begin_read(&mut self, tag: u64, work: Work, attempts: u32) {
        let home = |pg: &PgId, object| self.homes.home(*pg, object);
        let result = match &work {
            Work::Read { pg, object, below, first_block, block_count, pending } => self.plan(
                tag,
                home(pg, object),
                *object,
                below,
                *first_block..first_block.saturating_add(*block_count),
                *pending,
            ),
            Work::ReadObject { pg, object } => self.plan_object(tag, home(pg, object), *object, 0..u32::MAX),
            Work::ReadPiece { pg, object, first_block, block_count } => {
                let range = *first_block..first_block.saturating_add(*block_count);
                self.plan_object(tag, home(pg, object), *object, range)
            }
            Work::Digest { pg, object } => {
                let result = self.recorded_digest(home(pg, object), *object);
                let result = self.watch(result);
                return self.finish(tag, Done::Digest(result));
            }
            _ => unreachable!("only reads are started here"),
        };
        let (mut job, buffer) = match self.watch(result) {
            Ok(planned) => planned,
            Err(e) => return self.finish(tag, work.failed(e)),
        };
        (job.work, job.attempts) = (work, attempts);
        if job.parts.is_empty() {
            return self.finish_read(job, buffer);
        }
        self.next_read += 1;
        job.slots.iter().for_each(|&slot| self.slots.pin(slot));
        self.submit(Purpose::Read, self.next_read, Request::Read { buffer, parts: job.parts.clone() });
        self.reads.insert(self.next_read, job);
    }

    /// The object's own layer, as far as it is within `range`.
    fn plan_object(
        &mut self,
        tag: u64,
        pg: PgId,
        object: ObjectId,
        range: Range<u32>,
    ) -> Result<(ReadJob, BlocksMut), StoreError> {
        let value = self.index.get(&layout::object_key(kind::OBJECT, pg, object))?;
        let value = value.ok_or(StoreError::NotFound { object })?;
        let record: ObjectRecord = layout::decode(value.record()?)?;
        let mut end = 0;
        self.index.each(&layout::object_key(kind::CHUNK, pg, object), |key, _| {
            let number = layout::parse_numbered(&key)?.2;
            end = (number + 1).saturating_mul(BLOCKS_PER_CHUNK).min(OBJECT_BLOCKS_MAX);
            Ok(())
        })?;
        let range = range.start..range.end.min(end);
        let (mut job, buffer) = self.plan(tag, pg, object, &[], range, false)?;
        job.state = Some((record.into(), end));
        Ok((job, buffer))
    }

    /// What to read from where; what is in memory is in the buffer already.
    fn plan(
        &mut self,
        tag: u64,
        pg: PgId,
        object: ObjectId,
        below: &[LayerId],
        Range { start: first, end }: Range<u32>,
        pending: bool,
    ) -> Result<(ReadJob, BlocksMut), StoreError> {
        if end > OBJECT_BLOCKS_MAX {
            return Err(StoreError::Invalid("the range is beyond the object".into()));
        }
        let count = end.saturating_sub(first);
        if below.len() > LAYERS_MAX {
            return Err(StoreError::Invalid(format!("more than {LAYERS_MAX} layers")));
        }
        let mut job = ReadJob {
            tag,
            work: Work::Settle,
            attempts: 0,
            state: None,
            object,
            first,
            found: vec![Found::Absent; count as usize],
            parts: Vec::new(),
            slots: Vec::new(),
        };
        let mut buffer = self.device.buffer(count as usize);
        if count == 0 {
            return Ok((job, buffer));
        }
        for number in first / BLOCKS_PER_CHUNK..=(end - 1) / BLOCKS_PER_CHUNK {
            let start = number * BLOCKS_PER_CHUNK;
            let at = |bit: u32| (start + bit - first) as usize;
            let mut wanted = bits(u32::MAX)
                .filter(|b| (first..end).contains(&(start + b)))
                .fold(0u32, |mask, b| mask | 1 << b);
            let mut prepared = None;
            if pending {
                let chunk = layout::numbered_key(kind::PENDING_CHUNK, pg, object, number);
                prepared = self.index.get(&chunk)?;
                for bit in bits(wanted) {
                    let key = layout::numbered_key(kind::PENDING, pg, object, start + bit);
                    let Some(value) = self.index.get(&key)? else { continue };
                    let block = pending_block(value)?;
                    job.found[at(bit)] = match &block {
                        Some(block) => Found::Data(block.crc, object.layer),
                        None => Found::Zero,
                    };
                    if let Some(block) = block {
                        buffer.bytes_mut()[at(bit) * BLOCK..][..BLOCK].copy_from_slice(block.bytes.get());
                    }
                    wanted &= !(1 << bit);
                }
            }
            for layer in std::iter::once(object.layer).chain(below.iter().copied()) {
                let key = layout::numbered_key(kind::CHUNK, pg, ObjectId { layer, ..object }, number);
                // A whole chunk of the pending version is as it will be, without anything over it.
                let whole = prepared.take();
                let over = whole.is_none();
                let Some(value) = (match whole {
                    Some(value) => Some(value),
                    None => self.index.get(&key)?,
                }) else {
                    continue;
                };
                let chunk = ChunkRecord::decode(value.record()?)?;
                bits(chunk.zero & wanted).for_each(|bit| job.found[at(bit)] = Found::Zero);
                for bit in bits(chunk.data & wanted) {
                    job.found[at(bit)] = Found::Data(chunk.crcs[bit as usize], layer);
                }
                let overlay = if over { self.index.overlay(&key)? } else { ChunkOverlay::default() };
                for bit in bits(overlay.mask & chunk.data & wanted) {
                    if let Some(block) = overlay.blocks[bit as usize] {
                        buffer.bytes_mut()[at(bit) * BLOCK..][..BLOCK].copy_from_slice(block.bytes.get());
                    }
                }
                let stored = chunk.data & !overlay.mask & wanted;
                if stored != 0 {
                    let slot = chunk.slot.ok_or_else(|| StoreError::Fatal("data without a slot".into()))?;
                    job.slots.push(slot);
                    for (bit, len) in runs(stored) {
                        let block = self.geometry.slot_block(slot) + u64::from(bit);
                        job.parts.push(ReadPart { block, at: at(bit), count: len as usize });
                    }
                }
                wanted &= !(chunk.zero | chunk.data);
                if wanted == 0 {
                    break;
                }
            }
        }
        Ok((job, buffer))
    }

    pub(super) fn read_completed(&mut self, number: u64, buffer: Option<BlocksMut>, result: io::Result<()>) {
        let Some(job) = self.reads.remove(&number) else { return };
        job.slots.iter().for_each(|&slot| self.slots.unpin(slot));
        let mut buffer = buffer.expect("a read gives its buffer back");
        let failed = match result {
            Ok(()) => BTreeMap::new(),
            Err(e) => self.find_unreadable(&job, &mut buffer, e),
        };
        self.judge_read(job, buffer, failed);
    }

    /// Reads block by block what could not be read in one go: which blocks cannot be, and why.
    fn find_unreadable(
        &mut self,
        job: &ReadJob,
        buffer: &mut BlocksMut,
        whole: io::Error,
    ) -> BTreeMap<usize, String> {
        tracing::warn!(object = %job.object, error = %whole, "a read failed; trying block by block");
        let (mut failed, began) = (BTreeMap::new(), Instant::now());
        for part in &job.parts {
            for i in 0..part.count {
                let at = part.at + i;
                let block = part.block + i as u64;
                // What can be read slowly is worth the time as long as it may be all.
                let give_up =
                    failed.len() >= FAILED_MAX || (!failed.is_empty() && began.elapsed() >= self.probe_max);
                let read = match give_up {
                    false => self.read_one(block, &mut buffer.blocks_mut()[at..at + 1]),
                    true => Err(io::Error::other("too many others could not be read")),
                };
                if let Err(e) = read {
                    failed.insert(at, e.to_string());
                }
            }
        }
        failed
    }

    /// Reads at once what the disk may need seconds for. It has answered then, also where it cannot read (rule S9).
    pub(super) fn read_one(&mut self, block: u64, into: &mut [Block]) -> io::Result<()> {
        let result = self.device.read_now(block, into);
        (self.index.pulse)();
        result
    }

    fn finish_read(&mut self, job: ReadJob, buffer: BlocksMut) {
        self.judge_read(job, buffer, BTreeMap::new());
    }

    /// `failed`: blocks that are not in the buffer.
    fn judge_read(&mut self, mut job: ReadJob, buffer: BlocksMut, failed: BTreeMap<usize, String>) {
        let bytes = buffer.bytes();
        let again = failed.is_empty() && !job.parts.is_empty() && job.attempts < ATTEMPTS_MAX;
        let mut bad = failed;
        for (i, found) in job.found.iter().enumerate() {
            if let Found::Data(crc, _) = found
                && !bad.contains_key(&i)
                && crc32fast::hash(&bytes[i * BLOCK..(i + 1) * BLOCK]) != *crc
            {
                bad.insert(i, "checksum mismatch".into());
            }
        }
        if bad.is_empty() {
            let content = assemble(job.first, &job.found, buffer);
            return self.finish(job.tag, job.done(Ok(content)));
        }
        if again {
            return self.begin_read(job.tag, job.work, job.attempts + 1);
        }
        self.checksum_errors += 1;
        let e = unreadable(&mut job, &bad, buffer);
        self.finish(job.tag, job.done(Err(e)));
    }
}

fn unreadable(job: &mut ReadJob, bad: &BTreeMap<usize, String>, buffer: BlocksMut) -> StoreError {
    let place = |at: usize| {
        let Found::Data(crc, layer) = job.found[at] else { return None };
        Some((ObjectId { layer, ..job.object }, job.first + at as u32, crc))
    };
    // Only of what is data anything is read.
    let places: Vec<(ObjectId, u32, u32)> = bad.keys().filter_map(|at| place(*at)).collect();
    let (object, block, _) = places.first().copied().unwrap_or((job.object, job.first, 0));
    let why = bad.values().next().cloned().unwrap_or_default();
    let wanted = matches!(job.work, Work::Read { pending: false, .. } | Work::ReadPiece { .. });
    let rest = wanted.then(|| {
        bad.keys().for_each(|at| job.found[*at] = Found::Absent);
        let content = assemble(job.first, &job.found, buffer);
        Box::new(Readable { state: job.state, content, bad: places })
    });
    StoreError::Unreadable { object, block, why, rest }
}

/// Content from what was found for each block; closes the gaps in the buffer. Of that nothing is shown but blocks whose checksums are right.
fn assemble(first: u32, found: &[Found], mut buffer: BlocksMut) -> Content {
    let mut extents: Vec<Extent> = Vec::new();
    let mut len = 0;
    for (i, f) in found.iter().enumerate() {
        let block = first + i as u32;
        let last = extents.last_mut().filter(|e| e.first_block + e.block_count == block);
        match (*f, last) {
            (Found::Absent, _) => continue,
            (Found::Zero, Some(Extent { kind: ExtentKind::Zero, block_count, .. })) => *block_count += 1,
            (Found::Zero, _) => {
                extents.push(Extent { first_block: block, block_count: 1, kind: ExtentKind::Zero });
            }
            (Found::Data(crc, _), last) => {
                match last {
                    Some(Extent { kind: ExtentKind::Data { crcs }, block_count, .. }) => {
                        *block_count += 1;
                        crcs.push(crc);
                    }
                    _ => {
                        let kind = ExtentKind::Data { crcs: vec![crc] };
                        extents.push(Extent { first_block: block, block_count: 1, kind });
                    }
                }
                if len != i * BLOCK {
                    buffer.bytes_mut().copy_within(i * BLOCK..(i + 1) * BLOCK, len);
                }
                len += BLOCK;
            }
        }
    }
    Content { extents, data: buffer.into_bytes(len) }
}

/// A block of a pending version, from memory or from the index; `None` is zeros.
pub(super) fn pending_block(value: Value) -> Result<Option<DataBlock>, StoreError> {
    Ok(match value {
        Value::Block(block) => Some(block),
        Value::Record(bytes) => layout::parse_pending(&bytes)?
            .map(|(crc, data)| DataBlock { crc, bytes: BlockBytes::Raw(bytes.slice_ref(data)) }),
    })
}
