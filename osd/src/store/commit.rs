//! What each operation of a transaction changes, staged in memory on top of everything before it.
//!
//! Small data goes to the journal with the record. Whole chunks, and all of a replaced object, go to fresh slots. A
//! transaction with more small data than a record should hold copies its further chunks to fresh slots instead.

use super::buffer::{Blocks, BlocksMut};
use super::chunk_store::ChunkStore;
use super::device::Device;
use super::homes::{self, Class, Homes};
use super::kv::Kv;
use super::layout::{self, BLOCK, ChunkRecord, Key, OBJECT_BLOCKS_MAX, ObjectRecord, bits, kind, runs};
use super::read::pending_block;
use super::rules::{Rule, holds};
use super::stage::{FreshBlocks, Stage, Sweep};
use super::view::{self, BlockBytes, ChunkOverlay, DataBlock, Value, View};
use super::{DIVIDE_MAX, PgMeta, StoreError, Txn, TxnOp};
use bytes::Bytes;
use gabion_proto::blocks::{Content, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::limits::*;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// Blocks of what is light.
const LIGHT_BLOCKS_MAX: u32 = 8;

/// New content of one block: its CRC and bytes, or zeros.
pub(super) type NewBlock = Option<DataBlock>;

/// How content is put in place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Over what is there.
    Over,
    /// Over what is there, and chunks without data give their slot back.
    Discard,
    /// There is nothing there: every chunk goes to a fresh slot.
    Fresh,
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Stages one transaction. An error leaves it half staged: reject it.
    pub(super) fn stage_txn(&mut self, stage: &mut Stage, txn: &Txn) -> Result<(), StoreError> {
        let pg = txn.pg;
        let keep = if txn.reserve { RECOVERY_FREE_PERCENT } else { FULL_FREE_PERCENT };
        for op in &txn.ops {
            self.stage_op(stage, pg, op, keep)?;
        }
        Ok(())
    }

    fn stage_op(&mut self, stage: &mut Stage, group: PgId, op: &TxnOp, keep: u64) -> Result<(), StoreError> {
        // Where the records of its object are.
        let pg = match object_of(op) {
            Some(object) => self.staged_homes(stage).home(group, &object),
            None => group,
        };
        if homes::is_nowhere(pg) {
            return Err(StoreError::Invalid(format!(
                "an operation of group {group} on an object of another one"
            )));
        }
        match *op {
            TxnOp::Write { object, prev, version, ref content } => {
                self.advance(stage, pg, object, prev, version)?;
                self.apply(stage, pg, object, content, keep, Mode::Over)?;
            }
            TxnOp::Zero { object, prev, version, first_block, block_count, discard } => {
                self.advance(stage, pg, object, prev, version)?;
                let mode = if discard { Mode::Discard } else { Mode::Over };
                if block_count > 0 {
                    self.apply(stage, pg, object, &Content::zero(first_block, block_count), keep, mode)?;
                }
            }
            TxnOp::Delete { object, prev, version } => {
                self.advance(stage, pg, object, prev, version)?;
                self.drop_content(stage, pg, object)?;
                let record = ObjectRecord { version, deleted: true, pending: None };
                self.put_object(stage, pg, object, Some(record))?;
            }
            TxnOp::Replace { object, version, deleted, ref content } => {
                if deleted && !content.extents.is_empty() {
                    return Err(StoreError::Invalid("a tombstone has no content".into()));
                }
                self.drop_pending(stage, pg, object)?;
                self.drop_content(stage, pg, object)?;
                let record = ObjectRecord { version, deleted, pending: None };
                self.put_object(stage, pg, object, Some(record))?;
                self.apply(stage, pg, object, content, keep, Mode::Fresh)?;
                stage.delete(layout::object_key(kind::MISSING, pg, object));
            }
            TxnOp::Assemble { object, version, base, ref kept, ref placed } => {
                self.stage_assembly(stage, pg, (object, version, base), kept, placed)?;
            }
            TxnOp::Prepare { object, base, version, ref content } => {
                self.prepare(stage, pg, object, base, version, content, keep)?;
            }
            TxnOp::CommitPending { object, version } => {
                self.commit_pending(stage, pg, object, version)?;
            }
            TxnOp::RollbackPending { object } => {
                self.drop_pending(stage, pg, object)?;
                if let Some(record) = self.staged_object(stage, pg, object)? {
                    let known = record.version != Version::ZERO;
                    if !known || record.deleted {
                        self.drop_content(stage, pg, object)?;
                    }
                    let record = known.then_some(ObjectRecord { pending: None, ..record });
                    self.put_object(stage, pg, object, record)?;
                }
            }
            TxnOp::PurgeTombstone { object, version } => {
                let found = self.staged_object(stage, pg, object)?;
                if found.is_some_and(|r| r.deleted && r.version == version) {
                    self.drop_pending(stage, pg, object)?;
                    self.drop_content(stage, pg, object)?;
                    self.put_object(stage, pg, object, None)?;
                }
            }
            TxnOp::Purge { object } => {
                self.drop_pending(stage, pg, object)?;
                self.drop_content(stage, pg, object)?;
                self.put_object(stage, pg, object, None)?;
                stage.delete(layout::object_key(kind::MISSING, pg, object));
            }
            TxnOp::SetMeta(ref meta) => stage.put(layout::pg_key(kind::META, pg), layout::encode(meta)?),
            TxnOp::AddMissing { object, needed } => {
                stage.put(layout::object_key(kind::MISSING, pg, object), layout::encode(&needed)?);
            }
            TxnOp::DropMissing { object } => stage.delete(layout::object_key(kind::MISSING, pg, object)),
            TxnOp::ClearMissing => {
                for region in self.staged_homes(stage).regions(pg) {
                    self.sweep(stage, region.key(kind::MISSING, pg), region.class, |_| Ok(()))?;
                }
            }
            TxnOp::RemovePg => self.remove_group(stage, pg)?,
            TxnOp::Divide { from, to } => self.divide(stage, pg, from, to)?,
            TxnOp::Combine { from, to } => self.combine(stage, pg, from, to)?,
        }
        Ok(())
    }

    /// Homes as the current transaction sees them.
    fn staged_homes<'a>(&'a self, stage: &Stage) -> Cow<'a, Homes> {
        if stage.txn.homes.is_empty() {
            return Cow::Borrowed(&self.homes);
        }
        let mut homes = self.homes.clone();
        stage.txn.homes.iter().cloned().for_each(|c| homes.set(c));
        Cow::Owned(homes)
    }

    fn set_homes(&mut self, stage: &mut Stage, change: homes::Change) -> Result<(), StoreError> {
        let key = layout::pg_key(kind::HOMES, change.0);
        let known = self.staged(stage, &key)?.is_some();
        match &change.1 {
            Some(regions) => stage.put(key, layout::encode(regions)?),
            None if known => stage.delete(key),
            None => {}
        }
        stage.txn.homes.push(change);
        Ok(())
    }

    fn remove_group(&mut self, stage: &mut Stage, pg: PgId) -> Result<(), StoreError> {
        let homes = self.staged_homes(stage).into_owned();
        for region in homes.regions(pg) {
            let (key, class) = (|k| region.key(k, pg), region.class);
            for k in [kind::CHUNK, kind::PENDING_CHUNK] {
                let slot = |value: &[u8]| Ok(ChunkRecord::decode(value)?.slot);
                let slots = self.sweep(stage, key(k), class, slot)?;
                stage.txn.freed.extend(slots.into_iter().flatten());
            }
            let objects = self.sweep(stage, key(kind::OBJECT), class, |_| Ok(()))?;
            stage.txn.objects -= objects.len() as i64;
            for k in [kind::OVERLAY, kind::PENDING, kind::MISSING] {
                self.sweep(stage, key(k), class, |_| Ok(()))?;
            }
        }
        stage.delete(layout::pg_key(kind::META, pg));
        self.set_homes(stage, (pg, homes.after_removal(pg)))
    }

    /// See [`TxnOp::Divide`]. The caller knows what it has: everything else is an error of ours, after which nothing must be served.
    fn divide(&mut self, stage: &mut Stage, pg: PgId, from: u32, to: u32) -> Result<(), StoreError> {
        let fatal = |why: String| StoreError::Fatal(format!("group {pg} cannot be divided: {why}"));
        if from == 0
            || !to.is_multiple_of(from)
            || !(2..=DIVIDE_MAX).contains(&(to / from))
            || pg.index >= from
        {
            return Err(fatal(format!("from {from} into {to}")));
        }
        let Some(value) = self.staged(stage, &layout::pg_key(kind::META, pg))? else { return Ok(()) };
        let meta: PgMeta = layout::decode(value.record()?)?;
        if meta.pg_count != from {
            return Err(fatal(format!("it is one of {}, not of {from}", meta.pg_count)));
        }
        let parts = self.staged_homes(stage).divided(pg, from, to);
        for (part, regions) in parts {
            let key = layout::pg_key(kind::META, part);
            if part != pg && self.staged(stage, &key)?.is_some() {
                return Err(fatal(format!("there is a group {part} already")));
            }
            stage.put(key, layout::encode(&PgMeta { pg_count: to, ..meta })?);
            self.set_homes(stage, (part, Some(regions)))?;
        }
        Ok(())
    }

    /// See [`TxnOp::Combine`].
    fn combine(&mut self, stage: &mut Stage, pg: PgId, from: u32, to: u32) -> Result<(), StoreError> {
        let fatal = |why: String| StoreError::Fatal(format!("group {pg} cannot be put together: {why}"));
        if to == 0 || !from.is_multiple_of(to) || !(2..=DIVIDE_MAX).contains(&(from / to)) || pg.index >= to {
            return Err(fatal(format!("from {from} into {to}")));
        }
        let parts: Vec<PgId> = (0..from / to).map(|n| PgId { index: pg.index + n * to, ..pg }).collect();
        let mut metas = Vec::new();
        for part in &parts {
            let Some(value) = self.staged(stage, &layout::pg_key(kind::META, *part))? else { continue };
            let meta: PgMeta = layout::decode(value.record()?)?;
            if meta.pg_count != from || meta.shard.is_some() {
                return Err(fatal(format!("there is {meta:?} of {part}")));
            }
            metas.push(meta);
        }
        let Some(promised) = metas.iter().map(|m| m.promised).max() else { return Ok(()) };
        // One that is not there was never active.
        let activated = metas.iter().map(|m| m.activated).min().filter(|_| metas.len() == parts.len());
        let changes = self.staged_homes(stage).combined(&parts, from);
        for part in &parts[1..] {
            stage.delete(layout::pg_key(kind::META, *part));
        }
        let meta = PgMeta { promised, activated: activated.unwrap_or_default(), shard: None, pg_count: to };
        stage.put(layout::pg_key(kind::META, pg), layout::encode(&meta)?);
        changes.into_iter().try_for_each(|change| self.set_homes(stage, change))
    }

    /// A key as the current transaction sees it.
    fn staged(&mut self, stage: &Stage, key: &Key) -> Result<Option<Value>, StoreError> {
        if let Some(value) = stage.get(key) {
            return Ok(value.clone());
        }
        for group in self.groups.iter().rev() {
            if let Some(value) = group.changes.keys.get(key) {
                return Ok(value.clone());
            }
        }
        self.index.get(key)
    }

    /// A few blocks written over what is there, or may be put there, without a look into the index: see
    /// [`super::ConcurrentStore::is_light`]. Small enough for the journal, so that nothing is copied either.
    pub(super) fn is_light_txn(&self, txn: &Txn) -> bool {
        let [TxnOp::Write { object, content, .. }] = &txn.ops[..] else { return false };
        if content.extents.len() > LIGHT_BLOCKS_MAX as usize {
            return false;
        }
        let blocks: u32 = content.extents.iter().map(|e| e.block_count.min(OBJECT_BLOCKS_MAX)).sum();
        if blocks > LIGHT_BLOCKS_MAX.min(self.txn_blocks_max) {
            return false;
        }
        let pg = self.homes.home(txn.pg, object);
        let knows_chunk =
            |number| self.known(&layout::numbered_key(kind::CHUNK, pg, *object, number)).is_some();
        let chunks = content.extents.iter().flat_map(|e| {
            let last = e.first_block.saturating_add(e.block_count.saturating_sub(1));
            e.first_block / BLOCKS_PER_CHUNK..=last / BLOCKS_PER_CHUNK
        });
        match self.known(&layout::object_key(kind::OBJECT, pg, *object)) {
            None => false,
            Some(record) => !may_be_pending(record) && chunks.into_iter().all(knows_chunk),
        }
    }

    /// A key as the next transaction sees it, where that is known without a look into the index.
    fn known(&self, key: &Key) -> Option<&Option<Value>> {
        let groups = self.groups.iter().rev();
        groups.filter_map(|g| g.changes.keys.get(key)).next().or_else(|| self.index.remembered(key))
    }

    /// Everything in memory in front of the index, oldest first.
    fn layers<'a>(&'a self, stage: &'a Stage) -> Vec<&'a View> {
        [&self.index.frozen, &self.index.dirty]
            .into_iter()
            .chain(self.groups.iter().map(|g| &g.changes.keys))
            .chain([&stage.group.keys, &stage.txn.keys])
            .collect()
    }

    /// Everything of one object with `prefix`, as the current transaction sees it.
    pub(super) fn staged_scan(&self, stage: &Stage, prefix: &[u8]) -> Result<Vec<(Key, Value)>, StoreError> {
        view::scan(&self.index.kv, &self.layers(stage), prefix, prefix, usize::MAX)
    }

    fn staged_overlay<'a>(&'a self, stage: &'a Stage, chunk: &Key) -> Result<ChunkOverlay<'a>, StoreError> {
        let mut overlay = ChunkOverlay::default();
        for layer in self.layers(stage) {
            view::overlay_of(layer, chunk, &mut overlay)?;
        }
        Ok(overlay)
    }

    fn staged_chunk(&mut self, stage: &Stage, key: &Key) -> Result<ChunkRecord, StoreError> {
        match self.staged(stage, key)? {
            Some(value) => ChunkRecord::decode(value.record()?),
            None => Ok(ChunkRecord::default()),
        }
    }

    pub(super) fn staged_object(
        &mut self,
        stage: &Stage,
        pg: PgId,
        object: ObjectId,
    ) -> Result<Option<ObjectRecord>, StoreError> {
        let value = self.staged(stage, &layout::object_key(kind::OBJECT, pg, object))?;
        value.map(|v| layout::decode(v.record()?)).transpose()
    }

    pub(super) fn put_object(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        record: Option<ObjectRecord>,
    ) -> Result<(), StoreError> {
        let key = layout::object_key(kind::OBJECT, pg, object);
        let before = i64::from(self.staged(stage, &key)?.is_some());
        stage.txn.objects += i64::from(record.is_some()) - before;
        match record {
            Some(record) => stage.put(key, layout::encode(&record)?),
            None if before != 0 => stage.delete(key),
            None => {}
        }
        Ok(())
    }

    /// The version rule: from exactly `prev` to `version`. A pending version loses its base.
    fn advance(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        prev: Version,
        version: Version,
    ) -> Result<(), StoreError> {
        let record = self.staged_object(stage, pg, object)?.unwrap_or_default();
        if record.version != prev {
            return Err(StoreError::VersionMismatch { object, have: record.version, want: prev });
        }
        if version <= prev {
            return Err(StoreError::Invalid(format!("version {version} does not follow {prev}")));
        }
        if record.pending.is_some() {
            self.drop_pending(stage, pg, object)?;
        }
        self.put_object(stage, pg, object, Some(ObjectRecord { version, deleted: false, pending: None }))
    }

    /// Whole chunks of a pending version go to slots of their own, as they will be; smaller data goes to the journal.
    /// What its commit will need of space is taken now, so that it cannot fail for want of it.
    #[allow(clippy::too_many_arguments)] // one call site; a struct would only rename them
    fn prepare(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        base: Version,
        version: Version,
        content: &Content,
        keep: u64,
    ) -> Result<(), StoreError> {
        check(content)?;
        let record = self.staged_object(stage, pg, object)?.unwrap_or_default();
        if record.version != base {
            return Err(StoreError::VersionMismatch { object, have: record.version, want: base });
        }
        // Those of them that this version needs, too, keep their slots.
        let mut before = self.take_pending(stage, pg, object)?;
        for (number, new) in by_chunk(blocks(content)) {
            let key = layout::numbered_key(kind::CHUNK, pg, object, number);
            let mut chunk = self.staged_chunk(stage, &key)?;
            let data = data_count(&new);
            if data > 0 && (data == BLOCKS_PER_CHUNK || self.is_large(stage, data)) {
                // The base cannot change as long as this version is pending: what is copied from it stays true.
                let merged = self.fresh_chunk(stage, &key, &chunk, (&content.data, &new), keep)?;
                stage.put(key.with_kind(kind::PENDING_CHUNK), merged.encode());
                continue;
            }
            if data > 0 {
                before.remove(&number);
                if chunk.slot.is_none() {
                    chunk.slot = Some(self.take_slot(stage, keep)?);
                    stage.put(key, chunk.encode());
                }
            }
            for (bit, new) in new {
                let key = layout::numbered_key(kind::PENDING, pg, object, number * BLOCKS_PER_CHUNK + bit);
                match new {
                    Some(data) => stage.put(key, Value::Block(data)),
                    None => stage.put(key, layout::pending_zero()),
                }
            }
        }
        self.release_unused(stage, pg, object, before)?;
        self.put_object(stage, pg, object, Some(ObjectRecord { pending: Some(version), ..record }))
    }

    fn commit_pending(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        version: Version,
    ) -> Result<(), StoreError> {
        let record = self.staged_object(stage, pg, object)?.unwrap_or_default();
        if record.version == version {
            return Ok(());
        }
        if record.pending != Some(version) {
            return Err(StoreError::VersionMismatch { object, have: record.version, want: version });
        }
        for (key, value) in self.staged_scan(stage, &layout::object_key(kind::PENDING_CHUNK, pg, object))? {
            let chunk_key = key.with_kind(kind::CHUNK);
            let old = self.staged_chunk(stage, &chunk_key)?;
            stage.txn.freed.extend(old.slot);
            self.drop_overlay(stage, &chunk_key)?;
            stage.put(chunk_key, value);
            stage.delete(key);
        }
        let mut new = Vec::new();
        for (key, value) in self.staged_scan(stage, &layout::object_key(kind::PENDING, pg, object))? {
            new.push((layout::parse_numbered(&key)?.2, pending_block(value)?));
            stage.delete(key);
        }
        // A shard of a discarded range gives its space back.
        self.apply_blocks(stage, pg, object, (&Bytes::new(), new), 0, Mode::Discard)?;
        self.put_object(stage, pg, object, Some(ObjectRecord { version, deleted: false, pending: None }))
    }

    fn apply(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        content: &Content,
        keep: u64,
        mode: Mode,
    ) -> Result<(), StoreError> {
        check(content)?;
        self.apply_blocks(stage, pg, object, (&content.data, blocks(content)), keep, mode)
    }

    fn apply_blocks(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        (source, blocks): (&Bytes, Vec<(u32, NewBlock)>),
        keep: u64,
        mode: Mode,
    ) -> Result<(), StoreError> {
        for (number, new) in by_chunk(blocks) {
            let key = layout::numbered_key(kind::CHUNK, pg, object, number);
            self.apply_chunk(stage, key, (source, new), keep, mode)?;
        }
        Ok(())
    }

    fn apply_chunk(
        &mut self,
        stage: &mut Stage,
        key: Key,
        (source, new): (&Bytes, Vec<(u32, NewBlock)>),
        keep: u64,
        mode: Mode,
    ) -> Result<(), StoreError> {
        let mut chunk = self.staged_chunk(stage, &key)?;
        let data = data_count(&new);
        if data > 0 && (data == BLOCKS_PER_CHUNK || mode == Mode::Fresh || self.is_large(stage, data)) {
            let merged = self.fresh_chunk(stage, &key, &chunk, (source, &new), keep)?;
            stage.txn.freed.extend(chunk.slot);
            self.drop_overlay(stage, &key)?;
            stage.put(key, merged.encode());
            return Ok(());
        }
        let (pg, object, number) = layout::parse_numbered(&key)?;
        let overlay_key =
            |bit| layout::numbered_key(kind::OVERLAY, pg, object, number * BLOCKS_PER_CHUNK + bit);
        let overlaid = if data as usize == new.len() { 0 } else { self.staged_overlay(stage, &key)?.mask };
        for (bit, new) in new {
            let mask = 1u32 << bit;
            match new {
                Some(block) => {
                    chunk.data |= mask;
                    chunk.zero &= !mask;
                    chunk.crcs[bit as usize] = block.crc;
                    stage.put(overlay_key(bit), Value::Block(block));
                }
                None => {
                    chunk.data &= !mask;
                    if mode != Mode::Discard || holds(Rule::DiscardIsZero) {
                        chunk.zero |= mask;
                    }
                    if overlaid & mask != 0 {
                        stage.delete(overlay_key(bit));
                    }
                }
            }
        }
        if chunk.data != 0 && chunk.slot.is_none() {
            chunk.slot = Some(self.take_slot(stage, keep)?);
        }
        if chunk.data == 0 && mode == Mode::Discard {
            stage.txn.freed.extend(chunk.slot.take());
        }
        stage.put(key, chunk.encode());
        Ok(())
    }

    /// Whether so many more data blocks are too many for one record of the journal.
    fn is_large(&self, stage: &Stage, more: u32) -> bool {
        stage.txn.data_blocks + more > self.txn_blocks_max
    }

    fn take_slot(&mut self, stage: &mut Stage, keep: u64) -> Result<u32, StoreError> {
        let slot = self.slots.take(keep)?;
        stage.txn.taken.push(slot);
        Ok(slot)
    }

    /// `chunk` with `new` applied to it, in a slot of its own. What `new` does not name is copied.
    pub(super) fn fresh_chunk(
        &mut self,
        stage: &mut Stage,
        key: &Key,
        chunk: &ChunkRecord,
        (source, new): (&Bytes, &[(u32, NewBlock)]),
        keep: u64,
    ) -> Result<ChunkRecord, StoreError> {
        let mut merged = ChunkRecord { slot: None, ..chunk.clone() };
        let mut named = 0u32;
        for (bit, new) in new {
            let mask = 1u32 << bit;
            named |= mask;
            (merged.data, merged.zero) = match new {
                Some(_) => (merged.data | mask, merged.zero & !mask),
                None => (merged.data & !mask, merged.zero | mask),
            };
            merged.crcs[*bit as usize] = new.as_ref().map_or(0, |b| b.crc);
        }
        let (first, end) = (merged.data.trailing_zeros(), u32::BITS - merged.data.leading_zeros());
        let copied = chunk.data & !named;
        let data = match whole_run(source, new, first, end).filter(|_| copied == 0) {
            Some(data) => data,
            None => {
                let mut image = BlocksMut::zeroed((end - first) as usize);
                let at = |bit: u32| (bit - first) as usize * BLOCK;
                for (bit, block) in new.iter().filter_map(|(bit, new)| Some((*bit, new.as_ref()?))) {
                    image.bytes_mut()[at(bit)..at(bit) + BLOCK].copy_from_slice(block.bytes.get());
                }
                if copied != 0 {
                    self.copy_blocks(stage, key, chunk, copied, &mut image, first)?;
                }
                image.freeze()
            }
        };
        let slot = self.take_slot(stage, keep)?;
        stage.txn.fresh.push(FreshBlocks { slot, first, data });
        merged.slot = Some(slot);
        Ok(merged)
    }

    /// Copies blocks of a chunk as they are. What cannot be read becomes zeros: its checksum stays, so that
    /// it is found unreadable, and repaired, when somebody wants it.
    fn copy_blocks(
        &mut self,
        stage: &Stage,
        key: &Key,
        chunk: &ChunkRecord,
        wanted: u32,
        image: &mut BlocksMut,
        first: u32,
    ) -> Result<(), StoreError> {
        let mut rest = wanted;
        let overlay = self.staged_overlay(stage, key)?;
        for bit in bits(wanted & overlay.mask) {
            let Some(block) = overlay.blocks[bit as usize] else { continue };
            let at = (bit - first) as usize * BLOCK;
            image.bytes_mut()[at..at + BLOCK].copy_from_slice(block.bytes.get());
            rest &= !(1 << bit);
        }
        if rest == 0 {
            return Ok(());
        }
        let slot = chunk.slot.ok_or_else(|| StoreError::Fatal("data without a slot".into()))?;
        // A slot may be so fresh that it is not written yet.
        let in_memory = self.groups.iter().map(|g| &g.changes).chain([&stage.group, &stage.txn]);
        let fresh: Option<(u32, Blocks)> = in_memory
            .flat_map(|c| c.fresh.iter())
            .filter(|f| f.slot == slot)
            .map(|f| (f.first, f.data.clone()))
            .next_back();
        for (bit, len) in runs(rest) {
            let at = (bit - first) as usize;
            match &fresh {
                Some((start, data)) => {
                    let from = (bit - start) as usize * BLOCK..(bit - start + len) as usize * BLOCK;
                    image.bytes_mut()[at * BLOCK..(at + len as usize) * BLOCK]
                        .copy_from_slice(&data.bytes()[from]);
                }
                None => {
                    let from = self.geometry.slot_block(slot) + u64::from(bit);
                    for i in 0..len as usize {
                        let into = &mut image.blocks_mut()[at + i..at + i + 1];
                        // However long that takes: not to try would lose what may be the last good copy.
                        if self.read_one(from + i as u64, into).is_err() {
                            into[0].0.fill(0);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn drop_overlay(&mut self, stage: &mut Stage, chunk: &Key) -> Result<(), StoreError> {
        let mask = self.staged_overlay(stage, chunk)?.mask;
        let (pg, object, number) = layout::parse_numbered(chunk)?;
        for bit in bits(mask) {
            stage.delete(layout::numbered_key(kind::OVERLAY, pg, object, number * BLOCKS_PER_CHUNK + bit));
        }
        Ok(())
    }

    fn drop_content(&mut self, stage: &mut Stage, pg: PgId, object: ObjectId) -> Result<(), StoreError> {
        for (key, value) in self.staged_scan(stage, &layout::object_key(kind::CHUNK, pg, object))? {
            stage.txn.freed.extend(ChunkRecord::decode(value.record()?)?.slot);
            self.drop_overlay(stage, &key)?;
            stage.delete(key);
        }
        Ok(())
    }

    pub(super) fn drop_pending(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
    ) -> Result<(), StoreError> {
        let chunks = self.take_pending(stage, pg, object)?;
        self.release_unused(stage, pg, object, chunks)
    }

    /// Deletes what there is of a pending version, but for the slots that its commit would have needed. Returns the chunks
    /// that may have one.
    fn take_pending(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
    ) -> Result<BTreeSet<u32>, StoreError> {
        let mut chunks = BTreeSet::new();
        if self.staged_object(stage, pg, object)?.is_some_and(|r| r.pending.is_some()) {
            let whole = self.staged_scan(stage, &layout::object_key(kind::PENDING_CHUNK, pg, object))?;
            for (key, value) in whole {
                stage.txn.freed.extend(ChunkRecord::decode(value.record()?)?.slot);
                stage.delete(key);
            }
            for (key, _) in self.staged_scan(stage, &layout::object_key(kind::PENDING, pg, object))? {
                chunks.insert(layout::parse_numbered(&key)?.2 / BLOCKS_PER_CHUNK);
                stage.delete(key);
            }
        }
        Ok(chunks)
    }

    /// Gives back the slots of those of these chunks that have no data.
    fn release_unused(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        chunks: BTreeSet<u32>,
    ) -> Result<(), StoreError> {
        for number in chunks {
            let key = layout::numbered_key(kind::CHUNK, pg, object, number);
            let mut chunk = self.staged_chunk(stage, &key)?;
            if chunk.data != 0 || chunk.slot.is_none() {
                continue;
            }
            stage.txn.freed.extend(chunk.slot.take());
            if chunk.zero == 0 {
                stage.delete(key);
            } else {
                stage.put(key, chunk.encode());
            }
        }
        Ok(())
    }

    /// Deletes what a group has of a kind in one of its homes; returns what `read` took from each value.
    fn sweep<T>(
        &mut self,
        stage: &mut Stage,
        prefix: Key,
        class: Class,
        read: impl Fn(&[u8]) -> Result<T, StoreError>,
    ) -> Result<Vec<T>, StoreError> {
        let (wanted, pulse) = (|key: &[u8]| class.has_key(key), &self.index.pulse);
        let gone = view::pick(&self.index.kv, &self.layers(stage), &prefix, wanted, read, pulse)?;
        stage.txn.sweeps.push(Sweep { prefix, class });
        let take = |(key, taken)| {
            stage.delete(key);
            taken
        };
        Ok(gone.into_iter().map(take).collect())
    }
}

/// Whether an object's record has a pending version, or may have.
fn may_be_pending(record: &Option<Value>) -> bool {
    let Some(value) = record else { return false };
    let record = value.record().and_then(|bytes| layout::decode::<ObjectRecord>(bytes));
    record.map_or(true, |r| r.pending.is_some())
}

/// The object that an operation is about.
fn object_of(op: &TxnOp) -> Option<ObjectId> {
    match *op {
        TxnOp::Write { object, .. }
        | TxnOp::Zero { object, .. }
        | TxnOp::Delete { object, .. }
        | TxnOp::Replace { object, .. }
        | TxnOp::Assemble { object, .. }
        | TxnOp::Prepare { object, .. }
        | TxnOp::CommitPending { object, .. }
        | TxnOp::RollbackPending { object }
        | TxnOp::PurgeTombstone { object, .. }
        | TxnOp::Purge { object }
        | TxnOp::AddMissing { object, .. }
        | TxnOp::DropMissing { object } => Some(object),
        TxnOp::SetMeta(_) | TxnOp::ClearMissing | TxnOp::RemovePg => None,
        TxnOp::Divide { .. } | TxnOp::Combine { .. } => None,
    }
}

pub(super) fn check(content: &Content) -> Result<(), StoreError> {
    content.validate(false).map_err(|e| StoreError::Invalid(e.to_string()))
}

/// The blocks from `first` to `end`, if all are data of their own: those of `source` themselves where a device can take them
/// from, else copies.
fn whole_run(source: &Bytes, new: &[(u32, NewBlock)], first: u32, end: u32) -> Option<Blocks> {
    let run: Vec<&[u8]> = (first..end)
        .zip(new.iter().skip_while(|(bit, _)| *bit < first))
        .map_while(|(wanted, (bit, new))| Some(new.as_ref()?.bytes.get()).filter(|_| *bit == wanted))
        .collect();
    if run.is_empty() || run.len() != (end - first) as usize {
        return None;
    }
    let follows = |pair: &[&[u8]]| pair[0].as_ptr().addr() + BLOCK == pair[1].as_ptr().addr();
    let start = run[0].as_ptr().addr().checked_sub(source.as_ptr().addr());
    let inside =
        start.filter(|start| run.windows(2).all(follows) && start + run.len() * BLOCK <= source.len());
    let themselves =
        inside.and_then(|start| Blocks::of_aligned(source.slice(start..start + run.len() * BLOCK)));
    Some(themselves.unwrap_or_else(|| BlocksMut::gather(run.into_iter()).freeze()))
}

pub(super) fn data_count(new: &[(u32, NewBlock)]) -> u32 {
    new.iter().filter(|(_, n)| n.is_some()).count() as u32
}

/// Blocks by chunk, each numbered within it.
pub(super) fn by_chunk(blocks: Vec<(u32, NewBlock)>) -> BTreeMap<u32, Vec<(u32, NewBlock)>> {
    let mut chunks: BTreeMap<u32, Vec<(u32, NewBlock)>> = BTreeMap::new();
    for (block, new) in blocks {
        chunks.entry(block / BLOCKS_PER_CHUNK).or_default().push((block % BLOCKS_PER_CHUNK, new));
    }
    chunks
}

/// The blocks of validated content, in order.
pub(super) fn blocks(content: &Content) -> Vec<(u32, NewBlock)> {
    let mut out = Vec::new();
    let mut at = 0;
    for e in &content.extents {
        for i in 0..e.block_count.min(OBJECT_BLOCKS_MAX) {
            let new = match &e.kind {
                ExtentKind::Data { crcs } => {
                    let bytes: Bytes = content.data.slice(at..at + BLOCK);
                    at += BLOCK;
                    Some(DataBlock { crc: crcs[i as usize], bytes: BlockBytes::Raw(bytes) })
                }
                ExtentKind::Zero => None,
            };
            out.push((e.first_block + i, new));
        }
    }
    out
}
