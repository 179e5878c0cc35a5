//! [`ChunkStore`]: chunks in slots of a device, everything else in the index.
//!
//! Invariants: a slot is named by at most one durable chunk record; the device is written in place only
//! where the overlay still holds the data (write-back) or where no durable record points (fresh slots), so a
//! torn write never damages anything that is visible; after a fatal error every call answers `Fatal`.

use super::device::Device;
use super::kv::Kv;
use super::layout::{self, ChunkRecord, ObjectRecord, Superblock, kind};
use super::slots::Slots;
use super::stage::scan_pages;
use super::{Identity, ListEntry, Needed, ObjectState, PgMeta, Store, StoreError, Txn, Usage};
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use gabion_proto::limits::*;
use std::collections::BTreeMap;

/// Above this commit writes back itself.
pub const OVERLAY_BYTES_MAX: u64 = 64 << 20;

/// See the module docs.
pub struct ChunkStore<D: Device, K: Kv> {
    pub(super) device: D,
    pub(super) kv: K,
    pub(super) identity: Identity,
    pub(super) slots: Slots,
    /// Chunk keys that have blocks in the overlay, and how many.
    pub(super) dirty: BTreeMap<Vec<u8>, u32>,
    pub(super) overlay_blocks: u64,
    pub(super) objects: u64,
    pub(super) checksum_errors: u64,
    pub(super) dead: Option<String>,
}

impl From<ObjectRecord> for ObjectState {
    fn from(r: ObjectRecord) -> ObjectState {
        ObjectState { version: r.version, deleted: r.deleted, pending: r.pending }
    }
}

/// Writes an empty store: index first, superblock last, so that an interrupted format is not a store.
pub fn format_parts(
    device: &mut impl Device,
    kv: &mut impl Kv,
    identity: Identity,
) -> Result<(), StoreError> {
    if layout::slot_count(device.size()) == 0 {
        return Err(StoreError::Invalid("the disk is too small for a single chunk".into()));
    }
    let superblock = Superblock { generation: 1, size: device.size(), identity };
    let entry = (vec![kind::IDENTITY], Some(layout::encode(&identity)?));
    kv.write(vec![entry], true).map_err(StoreError::Fatal)?;
    let fatal = |e: std::io::Error| StoreError::Fatal(format!("cannot write the superblock: {e}"));
    let bytes = superblock.encode();
    device.write_at(BLOCK_BYTES.into(), &bytes).map_err(fatal)?;
    device.write_at(0, &bytes).map_err(fatal)?;
    device.flush().map_err(fatal)
}

/// The newest intact superblock of the two.
pub fn read_superblock(device: &mut impl Device) -> Result<Superblock, StoreError> {
    let (mut best, mut why) = (None::<Superblock>, String::new());
    for offset in [0, u64::from(BLOCK_BYTES)] {
        let mut bytes = vec![0; layout::BLOCK];
        match device
            .read_at(offset, &mut bytes)
            .map_err(|e| e.to_string())
            .and_then(|()| Superblock::decode(&bytes))
        {
            Ok(s) if best.is_none_or(|b| b.generation < s.generation) => best = Some(s),
            Ok(_) => {}
            Err(e) => why = e,
        }
    }
    best.ok_or(StoreError::Fatal(why))
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Opens a formatted store and rebuilds the slot map and the list of overlay blocks.
    pub fn open(mut device: D, kv: K) -> Result<Self, StoreError> {
        let superblock = read_superblock(&mut device)?;
        if device.size() < superblock.size {
            return Err(StoreError::Fatal(format!(
                "the disk has {} bytes, its superblock says {}",
                device.size(),
                superblock.size
            )));
        }
        let recorded = kv.get(&[kind::IDENTITY]).map_err(StoreError::Fatal)?;
        let recorded =
            recorded.ok_or_else(|| StoreError::Fatal("the index is not that of a store".into()))?;
        if layout::decode::<Identity>(&recorded)? != superblock.identity {
            return Err(StoreError::Fatal("the index belongs to another disk".into()));
        }
        let mut slots = Slots::new(layout::slot_count(superblock.size));
        let (mut dirty, mut overlay_blocks, mut objects) = (BTreeMap::new(), 0, 0);
        scan_pages(&kv, &[kind::CHUNK], |key, value| {
            let chunk = ChunkRecord::decode(&value)?;
            if let Some(slot) = chunk.slot {
                slots.mark(slot)?;
            }
            if chunk.overlay != 0 {
                overlay_blocks += u64::from(chunk.overlay.count_ones());
                dirty.insert(key, chunk.overlay.count_ones());
            }
            Ok(())
        })?;
        scan_pages(&kv, &[kind::OBJECT], |_, _| {
            objects += 1;
            Ok(())
        })?;
        let identity = superblock.identity;
        Ok(ChunkStore {
            device,
            kv,
            identity,
            slots,
            dirty,
            overlay_blocks,
            objects,
            checksum_errors: 0,
            dead: None,
        })
    }

    /// Bytes that wait to be written back.
    pub fn overlay_bytes(&self) -> u64 {
        self.overlay_blocks * u64::from(BLOCK_BYTES)
    }

    pub(super) fn alive(&self) -> Result<(), StoreError> {
        self.dead.clone().map_or(Ok(()), |why| Err(StoreError::Fatal(why)))
    }

    /// Passes a result on and remembers a fatal error for good.
    pub(super) fn watch<T>(&mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Fatal(why)) = &result {
            self.dead.get_or_insert_with(|| why.clone());
        }
        result
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.kv.get(key).map_err(StoreError::Fatal)
    }

    /// Decoded objects' records of one kind after `after`.
    fn list_kind<T: serde::de::DeserializeOwned>(
        &self,
        kind: u8,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<(ObjectId, T)>, StoreError> {
        self.alive()?;
        let from = after.map_or_else(Vec::new, |o| {
            let mut key = layout::object_key(kind, pg, o);
            key.push(0);
            key
        });
        let page = self.kv.scan(&layout::pg_key(kind, pg), &from, limit).map_err(StoreError::Fatal)?;
        page.into_iter()
            .map(|(key, value)| {
                let object = layout::parse_key(&key)?.object;
                let object =
                    object.ok_or_else(|| StoreError::Fatal("a key of the index names no object".into()))?;
                Ok((object, layout::decode(&value)?))
            })
            .collect()
    }
}

impl<D: Device, K: Kv> Store for ChunkStore<D, K> {
    fn identity(&self) -> Identity {
        self.identity
    }

    fn commit(&mut self, group: Vec<Txn>) -> Vec<Result<(), StoreError>> {
        let count = group.len();
        let result = self.alive().and_then(|()| self.commit_group(group));
        let result = self.watch(result);
        result.unwrap_or_else(|e| vec![Err(e); count])
    }

    fn read(
        &mut self,
        pg: PgId,
        object: ObjectId,
        below: &[LayerId],
        first_block: u32,
        block_count: u32,
    ) -> Result<Content, StoreError> {
        self.alive()?;
        let result = self.resolve(pg, object, below, first_block, block_count);
        self.watch(result)
    }

    fn object(&mut self, pg: PgId, object: ObjectId) -> Result<Option<ObjectState>, StoreError> {
        self.alive()?;
        let found = self.get(&layout::object_key(kind::OBJECT, pg, object));
        let record = found.and_then(|v| v.map(|v| layout::decode::<ObjectRecord>(&v)).transpose());
        self.watch(record).map(|r| r.map(Into::into))
    }

    fn read_object(&mut self, pg: PgId, object: ObjectId) -> Result<(ObjectState, Content), StoreError> {
        let state = self.object(pg, object)?.ok_or(StoreError::NotFound { object })?;
        let result = self.whole_object(pg, object);
        Ok((state, self.watch(result)?))
    }

    fn list(
        &mut self,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<ListEntry>, StoreError> {
        let result = self.list_kind::<ObjectRecord>(kind::OBJECT, pg, after, limit);
        Ok(self.watch(result)?.into_iter().map(|(o, r)| (o, r.into())).collect())
    }

    fn list_missing(
        &mut self,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<(ObjectId, Needed)>, StoreError> {
        let result = self.list_kind::<Needed>(kind::MISSING, pg, after, limit);
        self.watch(result)
    }

    fn pgs(&mut self) -> Result<Vec<(PgId, PgMeta)>, StoreError> {
        self.alive()?;
        let mut out = Vec::new();
        let result = scan_pages(&self.kv, &[kind::META], |key, value| {
            out.push((layout::parse_key(&key)?.pg, layout::decode(&value)?));
            Ok(())
        });
        self.watch(result).map(|()| out)
    }

    fn usage(&self) -> Usage {
        Usage {
            capacity_bytes: u64::from(self.slots.count()) * u64::from(CHUNK_BYTES),
            used_bytes: u64::from(self.slots.used()) * u64::from(CHUNK_BYTES),
            objects: self.objects,
            checksum_errors: self.checksum_errors,
        }
    }

    fn background(&mut self) -> Result<bool, StoreError> {
        self.alive()?;
        let result = self.write_back();
        self.watch(result)
    }
}
