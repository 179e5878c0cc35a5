//! Chunks that are written ahead of the transaction that will name them, piece by piece: recovery brings an object without one burst
//! of all its bytes, and shows it in one step all the same.
//!
//! Nothing durable says that a placed slot is taken. A crash, or dropping [`Placed`], makes it free again; so it may hold anything
//! until [`TxnOp::Assemble`] names it. The record of that lists it among its fresh slots, of which it differs only in having been
//! written before: the flush that makes the record durable covers it, and replay verifies it (rule S1).

use super::chunk_store::{ChunkStore, Purpose};
use super::commit::{blocks, by_chunk, check, data_count};
use super::device::{Device, Request};
use super::journal::Image;
use super::kv::Kv;
use super::layout::{self, ChunkRecord, kind};
use super::stage::{FreshBlocks, Stage};
use super::{Done, StoreError, Txn, TxnOp, Work};
use gabion_proto::ids::*;
use gabion_proto::limits::{BLOCK_BYTES, RECOVERY_FREE_PERCENT};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Slots that are to be free again. Whoever drops a [`Placed`] may be on another thread than the store.
pub(super) type Returned = Arc<Mutex<Vec<u32>>>;

/// Chunks in slots that nothing names. When the last of its clones goes, so do they, unless a transaction has named them.
#[derive(Clone)]
pub struct Placed(Arc<Chunks>);

struct Chunks {
    records: Vec<(u32, ChunkRecord)>,
    images: Vec<Image>,
    named: AtomicBool,
    returned: Returned,
}

impl Drop for Chunks {
    fn drop(&mut self) {
        if !self.named.load(Ordering::Acquire) {
            self.returned.lock().extend(self.images.iter().map(|i| i.slot));
        }
    }
}

impl Placed {
    /// Nothing, nowhere: from stores that keep no bytes.
    pub fn nowhere() -> Placed {
        let (named, returned) = (AtomicBool::new(false), Returned::default());
        Placed(Arc::new(Chunks { records: Vec::new(), images: Vec::new(), named, returned }))
    }

    pub fn data_bytes(&self) -> u64 {
        let blocks: u32 = self.0.records.iter().map(|(_, c)| c.data.count_ones()).sum();
        u64::from(blocks) * u64::from(BLOCK_BYTES)
    }

    /// Its chunks, by number.
    pub fn chunks(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.records.iter().map(|(number, _)| *number)
    }
}

/// The same chunks in the same slots.
impl PartialEq for Placed {
    fn eq(&self, other: &Placed) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Placed {}

impl fmt::Debug for Placed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Placed({:?})", self.chunks().collect::<Vec<_>>())
    }
}

/// A transaction was accepted: what it names stays.
pub(super) fn named(txn: &Txn) {
    for op in &txn.ops {
        if let TxnOp::Assemble { placed, .. } = op {
            placed.iter().for_each(|p| p.0.named.store(true, Ordering::Release));
        }
    }
}

/// Chunks on their way to their slots.
pub(super) struct PlaceJob {
    pub tag: u64,
    placed: Placed,
    writes_left: usize,
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    pub(super) fn start_place(&mut self, tag: u64, work: Work) {
        let Work::Place { pg, object, content } = &work else { unreachable!("only placements start here") };
        let mut stage = Stage::default();
        let result = check(content).and_then(|()| {
            let mut records = Vec::new();
            for (number, new) in by_chunk(blocks(content)) {
                let key = layout::numbered_key(kind::CHUNK, *pg, *object, number);
                let record = match data_count(&new) {
                    0 => ChunkRecord {
                        zero: new.iter().fold(0, |mask, (bit, _)| mask | 1 << bit),
                        ..ChunkRecord::default()
                    },
                    _ => {
                        let (nothing, new) = (ChunkRecord::default(), (&content.data, &new[..]));
                        self.fresh_chunk(&mut stage, &key, &nothing, new, RECOVERY_FREE_PERCENT)?
                    }
                };
                records.push((number, record));
            }
            Ok(records)
        });
        let fresh = std::mem::take(&mut stage.txn.fresh);
        match result {
            Ok(records) => {
                let images = fresh.iter().map(FreshBlocks::image).collect();
                let (named, returned) = (AtomicBool::new(false), self.returned.clone());
                let placed = Placed(Arc::new(Chunks { records, images, named, returned }));
                self.write_placed(tag, placed, fresh);
            }
            Err(e) => {
                for slot in stage.reject() {
                    self.slots.untake(slot);
                }
                if self.slots.starved {
                    // There are slots when the journal is trimmed.
                    self.want_checkpoint = true;
                    self.unplaced.push_back((tag, work));
                    return;
                }
                let result = self.watch(Err(e));
                self.finish(tag, Done::Place(result));
            }
        }
    }

    fn write_placed(&mut self, tag: u64, placed: Placed, fresh: Vec<FreshBlocks>) {
        if fresh.is_empty() {
            return self.finish(tag, Done::Place(Ok(placed)));
        }
        self.next_place += 1;
        let number = self.next_place;
        self.placing.insert(number, PlaceJob { tag, placed, writes_left: fresh.len() });
        for f in fresh {
            let block = self.geometry.slot_block(f.slot) + u64::from(f.first);
            let data = vec![f.data];
            self.submit(Purpose::Place, number, Request::Write { block, data, durable: false });
        }
    }

    pub(super) fn place_completed(&mut self, number: u64) {
        let Some(job) = self.placing.get_mut(&number) else { return };
        job.writes_left -= 1;
        if job.writes_left == 0
            && let Some(job) = self.placing.remove(&number)
        {
            self.finish(job.tag, Done::Place(Ok(job.placed)));
        }
    }

    /// Placements that waited for slots.
    pub(super) fn place_waiting(&mut self) -> bool {
        let mut moved = false;
        while !self.slots.starved
            && let Some((tag, work)) = self.unplaced.pop_front()
        {
            moved = true;
            self.start_place(tag, work);
        }
        moved
    }

    /// Slots of placements that nobody has wanted: what was written there is no one's.
    pub(super) fn take_back(&mut self) {
        let returned = std::mem::take(&mut *self.returned.lock());
        returned.into_iter().for_each(|slot| self.slots.untake(slot));
    }

    /// See [`TxnOp::Assemble`].
    pub(super) fn stage_assembly(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        (object, version, base): (ObjectId, Version, Version),
        kept: &[u32],
        placed: &[Placed],
    ) -> Result<(), StoreError> {
        let record = self.staged_object(stage, pg, object)?.unwrap_or_default();
        let exact = record.version == base && !record.deleted && record.pending.is_none();
        if !kept.is_empty() && !exact {
            return Err(StoreError::VersionMismatch { object, have: record.version, want: base });
        }
        let mut numbers: BTreeSet<u32> = kept.iter().copied().collect();
        for number in placed.iter().flat_map(Placed::chunks) {
            if !numbers.insert(number) {
                return Err(StoreError::Invalid(format!("chunk {number} is named twice")));
            }
        }
        if placed.iter().any(|p| p.0.named.load(Ordering::Acquire)) {
            return Err(StoreError::Invalid("placed chunks are named twice".into()));
        }
        self.drop_pending(stage, pg, object)?;
        for (key, value) in self.staged_scan(stage, &layout::object_key(kind::CHUNK, pg, object))? {
            if kept.contains(&layout::parse_numbered(&key)?.2) {
                continue;
            }
            stage.txn.freed.extend(ChunkRecord::decode(value.record()?)?.slot);
            self.drop_overlay(stage, &key)?;
            stage.delete(key);
        }
        let assembled = layout::ObjectRecord { version, deleted: false, pending: None };
        self.put_object(stage, pg, object, Some(assembled))?;
        for (number, chunk) in placed.iter().flat_map(|p| &p.0.records) {
            stage.put(layout::numbered_key(kind::CHUNK, pg, object, *number), chunk.encode());
        }
        stage.txn.placed.extend(placed.iter().flat_map(|p| p.0.images.iter().copied()));
        stage.delete(layout::object_key(kind::MISSING, pg, object));
        Ok(())
    }
}
