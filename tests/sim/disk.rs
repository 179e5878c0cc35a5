//! A plain store in memory for the simulator: transactions are atomic and durable once committed. What
//! a crash loses is what the node had not yet handed over.

use bytes::Bytes;
use gabion_osd::store::*;
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::ids::*;
use std::collections::BTreeMap;

type Block = Option<Bytes>;

#[derive(Clone, Default)]
struct Object {
    state: ObjectState,
    /// `None` is a zero block; an absent key is an absent block.
    blocks: BTreeMap<u32, Block>,
}

#[derive(Clone, Default)]
struct Group {
    meta: PgMeta,
    objects: BTreeMap<ObjectId, Object>,
    missing: BTreeMap<ObjectId, Needed>,
}

pub struct MemoryStore {
    identity: Identity,
    groups: BTreeMap<PgId, Group>,
}

impl MemoryStore {
    pub fn new(identity: Identity) -> MemoryStore {
        MemoryStore { identity, groups: BTreeMap::new() }
    }
}

fn put(blocks: &mut BTreeMap<u32, Block>, content: &Content) {
    for e in &content.extents {
        if matches!(e.kind, ExtentKind::Zero) {
            for b in e.first_block..e.first_block + e.block_count {
                blocks.insert(b, None);
            }
        }
    }
    for (b, bytes, _) in content.data_blocks() {
        blocks.insert(b, Some(Bytes::copy_from_slice(bytes)));
    }
}

fn collect<'a>(blocks: impl Iterator<Item = (u32, &'a Block)>) -> Content {
    let mut extents: Vec<Extent> = Vec::new();
    let mut data = Vec::new();
    for (b, block) in blocks {
        let crc = block.as_ref().map(|bytes| {
            data.extend_from_slice(bytes);
            crc32fast::hash(bytes)
        });
        let next = extents.last().is_some_and(|e| e.first_block + e.block_count == b);
        match (extents.last_mut().filter(|_| next), crc) {
            (Some(Extent { block_count, kind: ExtentKind::Data { crcs }, .. }), Some(crc)) => {
                *block_count += 1;
                crcs.push(crc);
            }
            (Some(Extent { block_count, kind: ExtentKind::Zero, .. }), None) => *block_count += 1,
            (_, Some(crc)) => extents.push(Extent {
                first_block: b,
                block_count: 1,
                kind: ExtentKind::Data { crcs: vec![crc] },
            }),
            (_, None) => extents.push(Extent { first_block: b, block_count: 1, kind: ExtentKind::Zero }),
        }
    }
    Content { extents, data: data.into() }
}

fn step(group: &mut Group, op: TxnOp) -> Result<(), StoreError> {
    let at = |g: &Group, object: ObjectId, prev: Version| {
        let have = g.objects.get(&object).map_or(Version::ZERO, |o| o.state.version);
        if have == prev { Ok(()) } else { Err(StoreError::VersionMismatch { object, have, want: prev }) }
    };
    match op {
        TxnOp::Write { object, prev, version, content } => {
            at(group, object, prev)?;
            let o = group.objects.entry(object).or_default();
            if o.state.deleted {
                o.blocks.clear();
            }
            o.state = ObjectState { version, deleted: false, pending: None };
            put(&mut o.blocks, &content);
        }
        TxnOp::Zero { object, prev, version, first_block, block_count, .. } => {
            let content = Content::zero(first_block, block_count);
            return step(group, TxnOp::Write { object, prev, version, content });
        }
        TxnOp::Delete { object, prev, version } => {
            at(group, object, prev)?;
            let state = ObjectState { version, deleted: true, pending: None };
            group.objects.insert(object, Object { state, blocks: BTreeMap::new() });
        }
        TxnOp::Replace { object, version, deleted, content } => {
            let state = ObjectState { version, deleted, pending: None };
            let mut o = Object { state, blocks: BTreeMap::new() };
            put(&mut o.blocks, &content);
            group.objects.insert(object, o);
            group.missing.remove(&object);
        }
        TxnOp::PurgeTombstone { object, version } => {
            if group.objects.get(&object).is_some_and(|o| o.state.deleted && o.state.version == version) {
                group.objects.remove(&object);
            }
        }
        TxnOp::Purge { object } => {
            group.objects.remove(&object);
        }
        TxnOp::SetMeta(meta) => group.meta = meta,
        TxnOp::AddMissing { object, needed } => {
            group.missing.insert(object, needed);
        }
        TxnOp::DropMissing { object } => {
            group.missing.remove(&object);
        }
        TxnOp::ClearMissing => group.missing.clear(),
        TxnOp::Prepare { .. } | TxnOp::CommitPending { .. } | TxnOp::RollbackPending { .. } => {
            return Err(StoreError::Invalid("this store keeps no pending versions".into()));
        }
        TxnOp::RemovePg => *group = Group::default(),
    }
    Ok(())
}

impl Store for MemoryStore {
    fn identity(&self) -> Identity {
        self.identity
    }
    fn commit(&mut self, transactions: Vec<Txn>) -> Vec<Result<(), StoreError>> {
        let mut results = Vec::new();
        for txn in transactions {
            let removed = txn.ops.contains(&TxnOp::RemovePg);
            let mut group = self.groups.get(&txn.pg).cloned().unwrap_or_default();
            let result = txn.ops.into_iter().try_for_each(|op| step(&mut group, op));
            if result.is_ok() {
                self.groups.insert(txn.pg, group);
                if removed {
                    self.groups.remove(&txn.pg);
                }
            }
            results.push(result);
        }
        results
    }
    fn read(
        &mut self,
        pg: PgId,
        object: ObjectId,
        below: &[LayerId],
        first_block: u32,
        block_count: u32,
    ) -> Result<Content, StoreError> {
        let Some(group) = self.groups.get(&pg) else { return Ok(Content::default()) };
        let mut found: BTreeMap<u32, &Block> = BTreeMap::new();
        for layer in std::iter::once(object.layer).chain(below.iter().copied()) {
            let Some(o) = group.objects.get(&ObjectId { layer, ..object }) else { continue };
            for (b, block) in o.blocks.range(first_block..first_block + block_count) {
                found.entry(*b).or_insert(block);
            }
        }
        Ok(collect(found.into_iter()))
    }
    fn object(&mut self, pg: PgId, object: ObjectId) -> Result<Option<ObjectState>, StoreError> {
        Ok(self.groups.get(&pg).and_then(|g| g.objects.get(&object)).map(|o| o.state))
    }
    fn read_object(&mut self, pg: PgId, object: ObjectId) -> Result<(ObjectState, Content), StoreError> {
        let found = self.groups.get(&pg).and_then(|g| g.objects.get(&object));
        let o = found.ok_or(StoreError::NotFound { object })?;
        Ok((o.state, collect(o.blocks.iter().map(|(b, x)| (*b, x)))))
    }
    fn list(
        &mut self,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<ListEntry>, StoreError> {
        let Some(g) = self.groups.get(&pg) else { return Ok(Vec::new()) };
        Ok(g.objects
            .iter()
            .filter(|(o, _)| after.is_none_or(|a| **o > a))
            .take(limit)
            .map(|(o, x)| (*o, x.state))
            .collect())
    }
    fn list_missing(
        &mut self,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<(ObjectId, Needed)>, StoreError> {
        let Some(g) = self.groups.get(&pg) else { return Ok(Vec::new()) };
        Ok(g.missing
            .iter()
            .filter(|(o, _)| after.is_none_or(|a| **o > a))
            .take(limit)
            .map(|(o, n)| (*o, *n))
            .collect())
    }
    fn pgs(&mut self) -> Result<Vec<(PgId, PgMeta)>, StoreError> {
        Ok(self.groups.iter().map(|(id, g)| (*id, g.meta)).collect())
    }
    fn usage(&self) -> Usage {
        let objects = self.groups.values().map(|g| g.objects.len() as u64).sum();
        Usage { capacity_bytes: 1 << 40, used_bytes: 0, objects, checksum_errors: 0 }
    }
    fn background(&mut self) -> Result<bool, StoreError> {
        Ok(false)
    }
}
