//! What one OSD's disk says of its objects, without their bytes. Objects that all copies of a group have alike are kept
//! once for all OSDs, so that the memory that is measured is the OSDs' own.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use gabion_osd::core::Listing;
use gabion_osd::store::{Needed, ObjectState, PgMeta, Piece, StoreError, Txn, TxnOp};
use gabion_proto::blocks::Content;
use gabion_proto::ids::{ObjectId, PgId, Version};

/// Objects at one version, in order.
#[derive(Clone, Debug, Default)]
pub struct Laid {
    pub version: Version,
    pub objects: Arc<[ObjectId]>,
}

#[derive(Debug, Default)]
struct Group {
    meta: Option<PgMeta>,
    laid: Laid,
    /// What is otherwise than it was laid.
    changed: BTreeMap<ObjectId, ObjectState>,
    missing: BTreeMap<ObjectId, Needed>,
}

/// The index of one disk. Every object holds one and the same block.
#[derive(Debug, Default)]
pub struct IndexStore {
    groups: BTreeMap<PgId, Group>,
    pub transactions: u64,
}

impl Group {
    fn object(&self, object: &ObjectId) -> Option<ObjectState> {
        self.changed.get(object).copied().or_else(|| {
            let laid = self.laid.objects.binary_search(object).is_ok();
            laid.then_some(ObjectState { version: self.laid.version, deleted: false, pending: None })
        })
    }

    fn expect(&self, object: ObjectId, want: Version) -> Result<(), StoreError> {
        let have = self.object(&object).map_or(Version::ZERO, |s| s.version);
        if have == want { Ok(()) } else { Err(StoreError::VersionMismatch { object, have, want }) }
    }

    fn hold(&mut self, object: ObjectId, version: Version, deleted: bool) {
        self.changed.insert(object, ObjectState { version, deleted, pending: None });
    }

    fn apply(&mut self, op: TxnOp) -> Result<(), StoreError> {
        match op {
            TxnOp::SetMeta(meta) => self.meta = Some(meta),
            TxnOp::ClearMissing => self.missing.clear(),
            TxnOp::AddMissing { object, needed } => _ = self.missing.insert(object, needed),
            TxnOp::DropMissing { object } => _ = self.missing.remove(&object),
            TxnOp::Write { object, prev, version, .. } => {
                self.expect(object, prev)?;
                self.hold(object, version, false);
            }
            TxnOp::Replace { object, version, deleted, .. } => {
                self.hold(object, version, deleted);
                self.missing.remove(&object);
            }
            TxnOp::Assemble { object, version, .. } => {
                self.hold(object, version, false);
                self.missing.remove(&object);
            }
            other => return Err(StoreError::Invalid(format!("not part of this measurement: {other:?}"))),
        }
        Ok(())
    }
}

impl IndexStore {
    /// Copies of all objects of a group are here.
    pub fn lay(&mut self, pg: PgId, laid: Laid) {
        self.groups.entry(pg).or_default().laid = laid;
    }

    pub fn commit(&mut self, txn: Txn) -> Result<(), StoreError> {
        self.transactions += 1;
        let group = self.groups.entry(txn.pg).or_default();
        txn.ops.into_iter().try_for_each(|op| group.apply(op))
    }

    pub fn list(&self, pg: PgId) -> Listing {
        let Some(group) = self.groups.get(&pg) else { return Listing::default() };
        let laid = ObjectState { version: group.laid.version, deleted: false, pending: None };
        let unchanged = group.laid.objects.iter().filter(|o| !group.changed.contains_key(*o));
        let mut objects: Vec<_> = unchanged.map(|o| (*o, laid)).collect();
        if !group.changed.is_empty() {
            objects.extend(group.changed.iter().map(|(o, s)| (*o, *s)));
            objects.sort_unstable_by_key(|(o, _)| *o);
        }
        Listing { meta: group.meta, objects, missing: group.missing.iter().map(|(o, n)| (*o, *n)).collect() }
    }

    pub fn read_piece(&self, pg: PgId, object: ObjectId, first_block: u32) -> Result<Piece, StoreError> {
        let state = self.groups.get(&pg).and_then(|g| g.object(&object));
        let state = state.ok_or(StoreError::NotFound { object })?;
        let content = if first_block == 0 { Content::data(0, block()) } else { Content::default() };
        Ok(Piece { state, content, end: 1 })
    }

    /// What the OSD starts from.
    pub fn start(&self) -> Vec<(PgId, PgMeta)> {
        self.groups.iter().filter_map(|(pg, g)| Some((*pg, g.meta?))).collect()
    }
}

/// What is in every object.
pub fn block() -> Bytes {
    static BLOCK: [u8; gabion_proto::limits::BLOCK_BYTES as usize] = [1; _];
    Bytes::from_static(&BLOCK)
}
