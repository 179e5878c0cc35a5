//! A checkpoint brings what only the journal holds to its final place and trims the journal, in this order (rule S4):
//! a mark that all its records were durable, overlay blocks to their slots, device flush, one atomic batch of the
//! index, the superblocks. Commits and reads go on meanwhile.

use super::chunk_store::{ChunkStore, Purpose};
use super::device::{Device, Request};
use super::kv::{Batch, Kv};
use super::layout::{self, ChunkRecord, Key, Position, SUPERBLOCKS, Superblock, kind};
use super::rules::{Rule, holds};
use super::view::{BlockBytes, Value, View};
use super::{Done, StoreError};
use crate::store::buffer::Blocks;
use gabion_proto::limits::BLOCKS_PER_CHUNK;
use std::collections::VecDeque;

/// A checkpoint starts when this share of the journal is in use.
const START_SHARE: u32 = 4;
/// Writes of the write-back in flight.
const WRITES_MAX: usize = 64;

enum Phase {
    /// Superblocks say that all records of the checkpoint were durable.
    Mark,
    WriteBack,
    Flush,
    Index,
    /// Superblocks give the new tail.
    Trim,
}

/// A checkpoint on its way.
pub(super) struct Checkpoint {
    /// The last record that it covers.
    to: Position,
    phase: Phase,
    /// Write-back that is not submitted yet, by device address.
    writes: VecDeque<Request>,
    writes_in_flight: usize,
    /// A flush or superblock write is in flight.
    step_in_flight: bool,
    /// Superblocks that are still to be written in this phase.
    superblocks: VecDeque<u64>,
    /// The index has answered.
    indexed: Option<Result<(), String>>,
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Starts a checkpoint if one is due, carries on with the one there is; true when something moved.
    pub(super) fn advance_checkpoint(&mut self) -> Result<bool, StoreError> {
        let mut moved = false;
        if self.checkpoint.is_none() {
            if !self.checkpoint_is_due() && !self.want_checkpoint {
                return Ok(false);
            }
            moved |= self.begin_checkpoint()?;
        }
        while self.checkpoint.is_some() && self.step_checkpoint()? {
            moved = true;
        }
        Ok(moved)
    }

    pub(super) fn checkpoint_is_due(&self) -> bool {
        self.ring.used() > self.ring.blocks() / START_SHARE
    }

    fn begin_checkpoint(&mut self) -> Result<bool, StoreError> {
        let Some(to) = self.ring.end_of(self.durable) else {
            // Nothing that is durable waits. What is in flight may be waited for.
            if self.groups.is_empty() && self.queue.is_empty() {
                self.want_checkpoint = false;
                self.settled();
            }
            self.slots.starved = false;
            return Ok(false);
        };
        self.want_checkpoint = false;
        assert!(self.index.frozen.is_empty(), "one checkpoint at a time");
        self.index.frozen = std::mem::take(&mut self.index.dirty);
        // In-place writes change slots that replay would verify against the records that filled them.
        let mark = self.last_fresh > self.marked && holds(Rule::MarkBeforeWriteBack);
        self.checkpoint = Some(Checkpoint {
            to,
            phase: if mark { Phase::Mark } else { Phase::WriteBack },
            writes: if mark { VecDeque::new() } else { self.write_back()? },
            writes_in_flight: 0,
            step_in_flight: false,
            superblocks: VecDeque::new(),
            indexed: None,
        });
        if mark {
            self.superblock.flushed = self.durable;
            self.new_superblock();
        }
        Ok(true)
    }

    /// Both copies are to be written, the second when the first is durable.
    fn new_superblock(&mut self) {
        self.superblock.generation += 1;
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.superblocks = SUPERBLOCKS.into();
        }
    }

    fn write_back(&self) -> Result<VecDeque<Request>, StoreError> {
        write_back(&self.index.frozen, &self.superblock)
    }

    fn step_checkpoint(&mut self) -> Result<bool, StoreError> {
        let Some(checkpoint) = &mut self.checkpoint else { return Ok(false) };
        if checkpoint.step_in_flight {
            return Ok(false);
        }
        if let Some(block) = checkpoint.superblocks.pop_front() {
            checkpoint.step_in_flight = true;
            let data = vec![Blocks::copy_of(&self.superblock.encode())];
            self.submit(Purpose::Checkpoint, 0, Request::Write { block, data, durable: true });
            return Ok(true);
        }
        match checkpoint.phase {
            Phase::Mark => {
                self.marked = self.marked.max(self.superblock.flushed);
                let writes = self.write_back()?;
                if let Some(checkpoint) = &mut self.checkpoint {
                    checkpoint.writes = writes;
                    checkpoint.phase = Phase::WriteBack;
                }
            }
            Phase::WriteBack => {
                let mut more = Vec::new();
                while checkpoint.writes_in_flight < WRITES_MAX
                    && let Some(write) = checkpoint.writes.pop_front()
                {
                    checkpoint.writes_in_flight += 1;
                    more.push(write);
                }
                if checkpoint.writes_in_flight > 0 {
                    let moved = !more.is_empty();
                    for write in more {
                        self.submit(Purpose::WriteBack, 0, write);
                    }
                    return Ok(moved);
                }
                checkpoint.phase = Phase::Flush;
                if holds(Rule::FlushBeforeIndex) {
                    checkpoint.step_in_flight = true;
                    self.submit(Purpose::Checkpoint, 0, Request::Flush);
                }
            }
            Phase::Flush => {
                checkpoint.phase = Phase::Index;
                let to = checkpoint.to;
                let batch = index_batch(&self.index.frozen, to.seq)?;
                self.stats.index_bytes +=
                    batch.iter().map(|(k, v)| (k.len() + v.as_ref().map_or(0, Vec::len)) as u64).sum::<u64>();
                if holds(Rule::IndexBeforeTrim) {
                    self.index.kv.start(batch);
                }
            }
            Phase::Index => {
                match checkpoint
                    .indexed
                    .take()
                    .or_else(|| (!holds(Rule::IndexBeforeTrim)).then_some(Ok(())))
                    .or_else(|| self.index.kv.poll())
                {
                    None => return Ok(false),
                    Some(result) => result.map_err(StoreError::Fatal)?,
                }
                (self.index.pulse)();
                checkpoint.phase = Phase::Trim;
                self.superblock.tail = checkpoint.to;
                self.superblock.flushed = self.superblock.flushed.max(checkpoint.to.seq);
                self.index.thaw();
                self.new_superblock();
            }
            Phase::Trim => {
                let to = checkpoint.to;
                self.checkpoint = None;
                self.marked = self.marked.max(to.seq);
                self.ring.trim(to);
                self.slots.release(to.seq);
                self.slots.starved = false;
                self.stats.checkpoints += 1;
                if !self.settling.is_empty() {
                    if self.ring.is_empty() && self.queue.is_empty() {
                        self.settled();
                    } else {
                        self.want_checkpoint = true;
                    }
                }
            }
        }
        Ok(true)
    }

    fn settled(&mut self) {
        for tag in std::mem::take(&mut self.settling) {
            self.finish(tag, Done::Settled(Ok(())));
        }
    }

    pub(super) fn checkpoint_completed(&mut self, write_back: bool) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        if write_back {
            checkpoint.writes_in_flight -= 1;
        } else {
            checkpoint.step_in_flight = false;
        }
    }

    /// The index has an answer that nobody has taken; keeps it for the next step.
    pub(super) fn index_ready(&mut self) -> bool {
        match &mut self.checkpoint {
            Some(c) if matches!(c.phase, Phase::Index) => {
                if c.indexed.is_none() {
                    c.indexed = self.index.kv.poll();
                }
                c.indexed.is_some()
            }
            _ => false,
        }
    }
}

/// One write per run of blocks that lie side by side on the device, in its order.
pub(super) fn write_back(frozen: &View, superblock: &Superblock) -> Result<VecDeque<Request>, StoreError> {
    let geometry = superblock.geometry();
    let mut blocks: Vec<(u64, Blocks)> = Vec::new();
    let mut slot: Option<(Key, Option<u32>)> = None;
    for (key, value) in super::view::range(frozen, &[kind::OVERLAY], &[kind::OVERLAY]) {
        let Some(Value::Block(block)) = value else { continue };
        let (pg, object, number) = layout::parse_numbered(key)?;
        let chunk = layout::numbered_key(kind::CHUNK, pg, object, number / BLOCKS_PER_CHUNK);
        if slot.as_ref().is_none_or(|(k, _)| *k != chunk) {
            // An overlay block never comes without its chunk's record.
            let record = match frozen.get(&chunk) {
                Some(Some(value)) => ChunkRecord::decode(value.record()?)?,
                _ => return Err(StoreError::Fatal("an overlay block without its chunk".into())),
            };
            slot = Some((chunk, record.slot));
        }
        let Some((_, Some(slot))) = slot else {
            return Err(StoreError::Fatal("an overlay without a slot".into()));
        };
        let BlockBytes::Journaled(bytes) = &block.bytes else {
            return Err(StoreError::Fatal("an overlay block that is not in the journal".into()));
        };
        blocks.push((geometry.slot_block(slot) + u64::from(number % BLOCKS_PER_CHUNK), bytes.clone()));
    }
    blocks.sort_unstable_by_key(|(block, _)| *block);
    let mut writes = VecDeque::new();
    let mut next = None;
    for (block, bytes) in blocks {
        match writes.back_mut() {
            Some(Request::Write { data, .. })
                if next == Some(block) && data.len() < BLOCKS_PER_CHUNK as usize =>
            {
                data.push(bytes);
            }
            _ => writes.push_back(Request::Write { block, data: vec![bytes], durable: false }),
        }
        next = Some(block + 1);
    }
    Ok(writes)
}

/// What the index is told, with the number of the record up to which it is told.
pub(super) fn index_batch(frozen: &View, seq: u64) -> Result<Batch, StoreError> {
    let mut batch = Batch::with_capacity(frozen.len() + 1);
    for (key, value) in frozen.iter().filter(|(k, _)| k.kind() != kind::OVERLAY) {
        let value = match value {
            Some(Value::Record(bytes)) => Some(bytes.to_vec()),
            Some(Value::Block(block)) if key.kind() == kind::PENDING => {
                Some(layout::pending_data(block.crc, block.bytes.get()))
            }
            Some(Value::Block(_)) => {
                return Err(StoreError::Fatal("a data block stands in a record's place".into()));
            }
            None => None,
        };
        batch.push((key.to_vec(), value));
    }
    batch.push((vec![kind::APPLIED], Some(layout::encode(&seq)?)));
    Ok(batch)
}
