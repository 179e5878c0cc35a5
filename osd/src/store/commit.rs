//! Commits: stage every transaction of the group in memory, write fresh slots, flush, then one synced batch.

use super::chunk_store::{ChunkStore, OVERLAY_BYTES_MAX};
use super::device::Device;
use super::kv::Kv;
use super::layout::{self, BLOCK, CHUNK, ChunkRecord, OBJECT_BLOCKS_MAX, ObjectRecord, PendingBlock, kind};
use super::stage::Stage;
use super::{StoreError, Txn, TxnOp};
use bytes::Bytes;
use gabion_proto::blocks::{Content, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::limits::*;
use std::collections::BTreeMap;

/// New content of one block: its CRC and bytes, or zeros.
type NewBlock = Option<(u32, Bytes)>;

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
    /// An error of the whole group is fatal.
    pub(super) fn commit_group(
        &mut self,
        group: Vec<Txn>,
    ) -> Result<Vec<Result<(), StoreError>>, StoreError> {
        let mut stage = Stage::default();
        let mut results = Vec::with_capacity(group.len());
        for txn in group {
            match self.stage_txn(&mut stage, txn) {
                Ok(()) => {
                    stage.accept();
                    results.push(Ok(()));
                }
                Err(StoreError::Fatal(why)) => return Err(StoreError::Fatal(why)),
                Err(e) => {
                    for slot in stage.reject() {
                        self.slots.free(slot)?;
                    }
                    results.push(Err(e));
                }
            }
        }
        if !stage.group.writes.is_empty() {
            for (offset, bytes) in &stage.group.writes {
                self.device
                    .write_at(*offset, bytes)
                    .map_err(|e| StoreError::Fatal(format!("writing to the disk failed: {e}")))?;
            }
            self.device.flush().map_err(|e| StoreError::Fatal(format!("flushing the disk failed: {e}")))?;
        }
        if !stage.group.keys.is_empty() {
            self.kv.write(stage.batch(), true).map_err(StoreError::Fatal)?;
        }
        for &slot in &stage.group.freed {
            self.slots.free(slot)?;
        }
        self.objects = self.objects.saturating_add_signed(stage.group.objects);
        for (key, value) in stage.group.keys.into_iter().filter(|(k, _)| k[0] == kind::CHUNK) {
            let now =
                value.map(|v| ChunkRecord::decode(&v)).transpose()?.map_or(0, |c| c.overlay.count_ones());
            self.set_dirty(key, now);
        }
        while self.overlay_bytes() > OVERLAY_BYTES_MAX {
            // The group is durable whatever happens here; a failure stops later calls.
            let result = self.write_back();
            if self.watch(result).is_err() {
                break;
            }
        }
        Ok(results)
    }

    /// Records how many overlay blocks a chunk has.
    pub(super) fn set_dirty(&mut self, key: Vec<u8>, blocks: u32) {
        let before = if blocks == 0 { self.dirty.remove(&key) } else { self.dirty.insert(key, blocks) };
        self.overlay_blocks = self.overlay_blocks + u64::from(blocks) - u64::from(before.unwrap_or(0));
    }

    fn stage_txn(&mut self, stage: &mut Stage, txn: Txn) -> Result<(), StoreError> {
        let pg = txn.pg;
        let keep = if txn.reserve { RECOVERY_FREE_PERCENT } else { FULL_FREE_PERCENT };
        for op in txn.ops {
            match op {
                TxnOp::Write { object, prev, version, content } => {
                    self.advance(stage, pg, object, prev, version)?;
                    self.apply(stage, pg, object, &content, keep, Mode::Over)?;
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
                TxnOp::Replace { object, version, deleted, content } => {
                    if deleted && !content.extents.is_empty() {
                        return Err(StoreError::Invalid("a tombstone has no content".into()));
                    }
                    self.drop_pending(stage, pg, object)?;
                    self.drop_content(stage, pg, object)?;
                    self.put_object(
                        stage,
                        pg,
                        object,
                        Some(ObjectRecord { version, deleted, pending: None }),
                    )?;
                    self.apply(stage, pg, object, &content, keep, Mode::Fresh)?;
                    stage.delete(layout::object_key(kind::MISSING, pg, object));
                }
                TxnOp::Prepare { object, base, version, content } => {
                    check(&content)?;
                    let record = self.staged_object(stage, pg, object)?.unwrap_or_default();
                    if record.version != base {
                        return Err(StoreError::VersionMismatch { object, have: record.version, want: base });
                    }
                    self.drop_pending(stage, pg, object)?;
                    for (block, new) in blocks(&content) {
                        let value = match new {
                            Some((crc, bytes)) => PendingBlock::Data { crc, bytes: bytes.to_vec() },
                            None => PendingBlock::Zero,
                        };
                        stage.put(
                            layout::numbered_key(kind::PENDING, pg, object, block),
                            layout::encode(&value)?,
                        );
                    }
                    let record = ObjectRecord { pending: Some(version), ..record };
                    self.put_object(stage, pg, object, Some(record))?;
                }
                TxnOp::CommitPending { object, version } => {
                    self.commit_pending(stage, pg, object, version, keep)?
                }
                TxnOp::RollbackPending { object } => {
                    self.drop_pending(stage, pg, object)?;
                    if let Some(record) = self.staged_object(stage, pg, object)? {
                        let known = record.version != Version::ZERO;
                        let record = known.then_some(ObjectRecord { pending: None, ..record });
                        self.put_object(stage, pg, object, record)?;
                    }
                }
                TxnOp::PurgeTombstone { object, version } => {
                    let found = self.staged_object(stage, pg, object)?;
                    if found.is_some_and(|r| r.deleted && r.version == version) {
                        self.drop_pending(stage, pg, object)?;
                        self.put_object(stage, pg, object, None)?;
                    }
                }
                TxnOp::Purge { object } => {
                    self.drop_pending(stage, pg, object)?;
                    self.drop_content(stage, pg, object)?;
                    self.put_object(stage, pg, object, None)?;
                    stage.delete(layout::object_key(kind::MISSING, pg, object));
                }
                TxnOp::SetMeta(meta) => stage.put(layout::pg_key(kind::META, pg), layout::encode(&meta)?),
                TxnOp::AddMissing { object, needed } => {
                    stage.put(layout::object_key(kind::MISSING, pg, object), layout::encode(&needed)?);
                }
                TxnOp::DropMissing { object } => stage.delete(layout::object_key(kind::MISSING, pg, object)),
                TxnOp::ClearMissing => self.drop_all(stage, &layout::pg_key(kind::MISSING, pg))?,
                TxnOp::RemovePg => {
                    self.drop_chunks(stage, &layout::pg_key(kind::CHUNK, pg))?;
                    let objects = stage.scan(&self.kv, &layout::pg_key(kind::OBJECT, pg))?.len();
                    stage.txn.objects -= objects as i64;
                    for k in [kind::OBJECT, kind::PENDING, kind::MISSING, kind::META] {
                        self.drop_all(stage, &layout::pg_key(k, pg))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn staged_object(
        &self,
        stage: &Stage,
        pg: PgId,
        object: ObjectId,
    ) -> Result<Option<ObjectRecord>, StoreError> {
        let value = stage.get(&self.kv, &layout::object_key(kind::OBJECT, pg, object))?;
        value.map(|v| layout::decode(&v)).transpose()
    }

    fn put_object(
        &self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        record: Option<ObjectRecord>,
    ) -> Result<(), StoreError> {
        let key = layout::object_key(kind::OBJECT, pg, object);
        let before = i64::from(stage.get(&self.kv, &key)?.is_some());
        stage.txn.objects += i64::from(record.is_some()) - before;
        match record {
            Some(record) => stage.put(key, layout::encode(&record)?),
            None => stage.delete(key),
        }
        Ok(())
    }

    /// The version rule: from exactly `prev` to `version`. A pending version loses its base.
    fn advance(
        &self,
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

    fn commit_pending(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        version: Version,
        keep: u64,
    ) -> Result<(), StoreError> {
        let record = self.staged_object(stage, pg, object)?.unwrap_or_default();
        if record.version == version {
            return Ok(());
        }
        if record.pending != Some(version) {
            return Err(StoreError::VersionMismatch { object, have: record.version, want: version });
        }
        let mut new = Vec::new();
        for (key, value) in stage.scan(&self.kv, &layout::object_key(kind::PENDING, pg, object))? {
            let number = layout::parse_key(&key)?.number;
            let number = number.ok_or_else(|| StoreError::Fatal("a pending block has no number".into()))?;
            new.push(match layout::decode(&value)? {
                PendingBlock::Zero => (number, None),
                PendingBlock::Data { crc, bytes } if bytes.len() == BLOCK => {
                    (number, Some((crc, bytes.into())))
                }
                PendingBlock::Data { .. } => {
                    return Err(StoreError::Fatal("a pending block has the wrong length".into()));
                }
            });
            stage.delete(key);
        }
        self.apply_blocks(stage, pg, object, new, keep, Mode::Over)?;
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
        self.apply_blocks(stage, pg, object, blocks(content), keep, mode)
    }

    fn apply_blocks(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        blocks: Vec<(u32, NewBlock)>,
        keep: u64,
        mode: Mode,
    ) -> Result<(), StoreError> {
        let mut chunks: BTreeMap<u32, Vec<(u32, NewBlock)>> = BTreeMap::new();
        for (block, new) in blocks {
            chunks.entry(block / BLOCKS_PER_CHUNK).or_default().push((block % BLOCKS_PER_CHUNK, new));
        }
        for (number, new) in chunks {
            self.apply_chunk(stage, pg, object, number, new, keep, mode)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // one call site; a struct would only rename them
    fn apply_chunk(
        &mut self,
        stage: &mut Stage,
        pg: PgId,
        object: ObjectId,
        number: u32,
        new: Vec<(u32, NewBlock)>,
        keep: u64,
        mode: Mode,
    ) -> Result<(), StoreError> {
        let key = layout::numbered_key(kind::CHUNK, pg, object, number);
        let mut chunk = match stage.get(&self.kv, &key)? {
            Some(value) => ChunkRecord::decode(&value)?,
            None => ChunkRecord::new(),
        };
        let overlay_key =
            |bit: u32| layout::numbered_key(kind::OVERLAY, pg, object, number * BLOCKS_PER_CHUNK + bit);
        let whole = new.iter().filter(|(_, n)| n.is_some()).count() == BLOCKS_PER_CHUNK as usize;
        let fresh = (whole || mode == Mode::Fresh) && new.iter().any(|(_, n)| n.is_some());
        let mut image = if fresh { vec![0u8; CHUNK] } else { Vec::new() };
        if fresh {
            stage.txn.freed.extend(chunk.slot.take());
        }
        for (bit, new) in new {
            let mask = 1u32 << bit;
            match new {
                Some((crc, bytes)) => {
                    chunk.data |= mask;
                    chunk.zero &= !mask;
                    chunk.crcs[bit as usize] = crc;
                    if fresh {
                        image[bit as usize * BLOCK..][..BLOCK].copy_from_slice(&bytes);
                        if chunk.overlay & mask != 0 {
                            stage.delete(overlay_key(bit));
                        }
                        chunk.overlay &= !mask;
                    } else {
                        chunk.overlay |= mask;
                        stage.put(overlay_key(bit), bytes.to_vec());
                    }
                }
                None => {
                    if chunk.overlay & mask != 0 {
                        stage.delete(overlay_key(bit));
                    }
                    chunk.overlay &= !mask;
                    chunk.data &= !mask;
                    chunk.zero |= mask;
                    chunk.crcs[bit as usize] = 0;
                }
            }
        }
        if chunk.data != 0 && chunk.slot.is_none() {
            let slot = self.slots.take(keep)?;
            stage.txn.taken.push(slot);
            chunk.slot = Some(slot);
            if fresh {
                stage.txn.writes.push((layout::slot_offset(slot), image.into()));
            }
        }
        if chunk.data == 0 && mode == Mode::Discard {
            stage.txn.freed.extend(chunk.slot.take());
        }
        stage.put(key, layout::encode(&chunk)?);
        Ok(())
    }

    fn drop_content(&self, stage: &mut Stage, pg: PgId, object: ObjectId) -> Result<(), StoreError> {
        self.drop_chunks(stage, &layout::object_key(kind::CHUNK, pg, object))
    }

    fn drop_pending(&self, stage: &mut Stage, pg: PgId, object: ObjectId) -> Result<(), StoreError> {
        if self.staged_object(stage, pg, object)?.is_some_and(|r| r.pending.is_some()) {
            self.drop_all(stage, &layout::object_key(kind::PENDING, pg, object))?;
        }
        Ok(())
    }

    /// Deletes chunk records, their overlay blocks and, once durable, their slots.
    fn drop_chunks(&self, stage: &mut Stage, prefix: &[u8]) -> Result<(), StoreError> {
        for (key, value) in stage.scan(&self.kv, prefix)? {
            let chunk = ChunkRecord::decode(&value)?;
            stage.txn.freed.extend(chunk.slot);
            for bit in bits(chunk.overlay) {
                stage.delete(overlay_of(&key, bit)?);
            }
            stage.delete(key);
        }
        Ok(())
    }

    fn drop_all(&self, stage: &mut Stage, prefix: &[u8]) -> Result<(), StoreError> {
        for (key, _) in stage.scan(&self.kv, prefix)? {
            stage.delete(key);
        }
        Ok(())
    }
}

/// The set bits of a mask.
pub(super) fn bits(mask: u32) -> impl Iterator<Item = u32> {
    (0..u32::BITS).filter(move |b| mask & (1 << b) != 0)
}

/// The overlay key of a block of the chunk that `chunk_key` names.
pub(super) fn overlay_of(chunk_key: &[u8], bit: u32) -> Result<Vec<u8>, StoreError> {
    let parsed = layout::parse_key(chunk_key)?;
    match (parsed.object, parsed.number) {
        (Some(object), Some(number)) => {
            Ok(layout::numbered_key(kind::OVERLAY, parsed.pg, object, number * BLOCKS_PER_CHUNK + bit))
        }
        _ => Err(StoreError::Fatal("a chunk's key is malformed".into())),
    }
}

fn check(content: &Content) -> Result<(), StoreError> {
    content.validate(false).map_err(|e| StoreError::Invalid(e.to_string()))
}

/// The blocks of validated content, in order.
fn blocks(content: &Content) -> Vec<(u32, NewBlock)> {
    let mut out = Vec::new();
    let mut at = 0;
    for e in &content.extents {
        for i in 0..e.block_count.min(OBJECT_BLOCKS_MAX) {
            out.push((
                e.first_block + i,
                match &e.kind {
                    ExtentKind::Data { crcs } => {
                        let bytes = content.data.slice(at..at + BLOCK);
                        at += BLOCK;
                        Some((crcs[i as usize], bytes))
                    }
                    ExtentKind::Zero => None,
                },
            ));
        }
    }
    out
}
