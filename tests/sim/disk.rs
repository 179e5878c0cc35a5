//! A node's disk: the real store on a device and an index that lose, tear and rot.

use bytes::Bytes;
use gabion_osd::store::sim::{SimDisk, SimStore};
use gabion_osd::store::*;
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use gabion_proto::limits::{CHUNK_BYTES, FULL_FREE_PERCENT};

/// A group that belongs to nobody and only takes room.
const BALLAST: PgId = PgId { pool: PoolId(u32::MAX), index: 0 };

pub struct Disk {
    machine: SimDisk,
    store: Option<SimStore>,
    filled: bool,
    /// It is to fail.
    fails: bool,
}

impl Disk {
    pub fn new(identity: Identity, chunks: u32, seed: u64) -> Disk {
        let machine = SimDisk::new((chunks as usize + 1) * CHUNK_BYTES as usize, seed);
        machine.format(identity).unwrap_or_else(|e| panic!("cannot format: {e}"));
        Disk { machine, store: None, filled: false, fails: false }
    }

    /// Opens the store; an error is a finding.
    pub fn mount(&mut self) -> Result<(), StoreError> {
        self.store = Some(self.machine.open()?);
        if !self.filled && !self.unfill() {
            return Err(StoreError::Fatal("a disk that was just mounted fails".into()));
        }
        Ok(())
    }

    pub fn store(&mut self) -> Option<&mut SimStore> {
        self.store.as_mut()
    }

    /// The process dies. Without power, what was not flushed is lost or torn, too.
    pub fn stop(&mut self, power_fails: bool) {
        self.store = None;
        self.machine.rot_under_reads(0);
        if power_fails {
            self.machine.crash();
        }
        self.fail_no_more();
    }

    /// After `writes` more operations every one fails, until the process has died.
    pub fn fail_after(&mut self, writes: u64) {
        self.fails = true;
        self.machine.set_fuse(Some(writes));
    }

    /// A failure that was still to come does not.
    pub fn fail_no_more(&mut self) {
        self.fails = false;
        self.machine.set_fuse(None);
    }

    pub fn rot_under_reads(&mut self, reads: u64) {
        self.machine.rot_under_reads(reads);
    }

    /// What was written long ago rots where it lies; nobody reads it. False: not now.
    pub fn rot_cold(&mut self, blocks: usize) -> bool {
        // A record of the journal that is still to be replayed must find what it names: that would be a write that was lost.
        if !matches!(self.store.as_mut().map(|s| s.background()), Some(Ok(_))) {
            return false;
        }
        self.machine.rot_written(blocks);
        true
    }

    /// It fails soon, or there is no room.
    pub fn is_in_trouble(&self) -> bool {
        self.fails || self.filled
    }

    /// What it keeps of an object, if all of that can be read.
    pub fn whole(&mut self, pg: PgId, object: ObjectId) -> Option<(ObjectState, Content)> {
        self.store.as_mut()?.read_object(pg, object).ok()
    }

    /// A block of an object, or row of a shard: what is prepared counts, since repairs may be.
    pub fn block(&mut self, pg: PgId, object: ObjectId, block: u32) -> Result<Bytes, StoreError> {
        let Some(store) = self.store.as_mut() else { return Ok(Bytes::new()) };
        store.read_pending(pg, object, block, 1).map(|content| content.data)
    }

    /// An object becomes something else at the version that it has, behind its OSD's back. False: not now.
    pub fn alter(&mut self, pg: PgId, object: ObjectId, version: Version, content: Content) -> bool {
        let Some(store) = self.store.as_mut() else { return false };
        let op = TxnOp::Replace { object, version, deleted: false, content };
        matches!(store.commit(vec![Txn { pg, ops: vec![op], reserve: true }]).pop(), Some(Ok(())))
    }

    /// This block cannot be read any more until it is written. False: it is not where it could rot yet.
    pub fn rot_block(&mut self, pg: PgId, object: ObjectId, block: u32) -> bool {
        let Some(store) = self.store.as_mut() else { return false };
        // As for any rot: what is still to be replayed is not what rots.
        if store.background().is_err() {
            return false;
        }
        self.machine.rot_under_reads(1);
        let read = store.read(pg, object, &[], block, 1);
        self.machine.rot_under_reads(0);
        matches!(read, Err(StoreError::Unreadable { .. }))
    }

    /// Somebody else fills the disk, as far as clients (or recovery) could. False: it failed meanwhile.
    #[must_use]
    pub fn fill(&mut self, reserve: bool) -> bool {
        self.filled = true;
        let Some(store) = self.store.as_mut() else { return true };
        let content = Content::data(0, Bytes::from(vec![1; CHUNK_BYTES as usize]));
        for index in 0.. {
            let object = ObjectId { volume: VolumeId(u64::MAX), index, layer: LayerId(0) };
            let version = Version::from_raw(1);
            let op = TxnOp::Replace { object, version, deleted: false, content: content.clone() };
            let meta = TxnOp::SetMeta(PgMeta::default());
            let result = store.commit(vec![Txn { pg: BALLAST, ops: vec![meta, op], reserve }]).pop();
            match result {
                Some(Ok(())) => {}
                other => return !matches!(other, Some(Err(StoreError::Fatal(_)))),
            }
        }
        true
    }

    /// False: it failed meanwhile.
    #[must_use]
    pub fn unfill(&mut self) -> bool {
        self.filled = false;
        let Some(store) = self.store.as_mut() else { return true };
        let result = store.commit(vec![Txn { pg: BALLAST, ops: vec![TxnOp::RemovePg], reserve: true }]).pop();
        !matches!(result, Some(Err(StoreError::Fatal(_))))
    }

    /// It is never mounted again.
    pub fn forget(&mut self) {
        self.store = None;
        self.machine = SimDisk::new(0, 0);
    }

    /// The groups that a starting OSD finds.
    pub fn pgs(&mut self) -> Result<Vec<(PgId, PgMeta)>, StoreError> {
        let Some(store) = self.store.as_mut() else { return Ok(Vec::new()) };
        Ok(store.pgs()?.into_iter().filter(|(pg, _)| *pg != BALLAST).collect())
    }

    /// Whether an OSD calls this disk too full for clients: as its server does.
    pub fn is_full(&self) -> bool {
        let Some(store) = self.store.as_ref() else { return false };
        let usage = store.usage();
        let free = usage.capacity_bytes.saturating_sub(usage.used_bytes);
        free < usage.capacity_bytes / 100 * FULL_FREE_PERCENT
    }
}
