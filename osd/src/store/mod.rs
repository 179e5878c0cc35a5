//! The object store of one disk, as the placement groups see it.
//!
//! A store keeps, per placement group, object records ([`ObjectId`]: one layer of one object) and the
//! group's own metadata ([`PgMeta`], and the *missing map* of rule P4). Everything changes by
//! transactions: a [`Txn`] is atomic, and once [`Store::commit`] has returned it survives any crash.
//! Transactions of one commit are made durable in order, sharing their flushes (group commit).
//!
//! Failure policy (invariant 9): a failed flush or an error on the store's own metadata is
//! [`StoreError::Fatal`]; after it every call answers `Fatal`. ENOSPC rolls the one transaction back whole.
//! An unreadable block or a checksum mismatch is `Unreadable`, for replication to repair.

mod buffer;
mod checkpoint;
mod chunk_image;
mod chunk_store;
mod commit;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod decoder_tests;
mod device;
mod digest;
#[cfg(test)]
mod division_tests;
pub mod driver;
#[cfg(test)]
pub(crate) mod driver_tests;
mod dump;
#[cfg(test)]
mod fault_tests;
mod frozen;
mod fsck;
#[cfg(test)]
mod fsck_tests;
#[cfg(test)]
mod golden_tests;
mod group;
mod homes;
#[cfg(test)]
mod homes_tests;
mod journal;
mod kv;
mod layout;
#[cfg(test)]
mod model;
mod open;
mod place;
mod pool;
mod read;
mod recover;
mod rocks;
mod rules;
#[cfg(test)]
mod sector_tests;
pub mod sim;
mod slots;
mod stage;
#[cfg(test)]
mod start_tests;
mod synthetic;
#[cfg(test)]
mod tests;
pub mod thread;
#[cfg(test)]
mod thread_tests;
pub mod transfer;
mod uring;
mod view;
mod wake;
mod watchdog;

pub use chunk_store::{ChunkStore, Stats};
pub use device::Traffic;
pub use digest::digest_of;
pub use dump::{ObjectDump, ObjectLine};
pub use frozen::{DirFrozen, Frozen, open_damaged, open_frozen};
pub use fsck::{FsckReport, fsck};
pub use open::{DirStore, Engine, Info, ensure_blank, format, info, open, open_with};
pub use place::Placed;
pub use synthetic::synthetic_index;
pub use wake::Waker;

use crate::erasure::ShardId;
use bytes::Bytes;
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;

/// Who a store belongs to: a disk is never adopted by another cluster or OSD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub cluster: ClusterId,
    pub osd: OsdId,
    /// The disk's own identity.
    pub disk: ClusterId,
}

/// What a group keeps durable about itself on one OSD (rule P3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PgMeta {
    /// Everything of an interval below this one is refused.
    pub promised: Epoch,
    /// Highest interval in which this OSD was made an active member.
    pub activated: Epoch,
    /// Erasure coding: which shard of each object is here.
    pub shard: Option<ShardId>,
    /// Of how many groups of its pool it is one: which objects it can have (rule P9). 0: none was said.
    pub pg_count: u32,
}

/// Where an object stands on this OSD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectState {
    /// The version held; `ZERO` when there is none.
    pub version: Version,
    /// A tombstone: deleted as of `version`.
    pub deleted: bool,
    /// Erasure coding: a version written beside `version` and not yet committed.
    pub pending: Option<Version>,
}

/// An entry of the missing map: the object must come to this state before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needed {
    pub version: Version,
    pub deleted: bool,
    /// Nobody was shown `version` since its interval ended. If this is a lower one, the authority disagreed: `version` was never acknowledged or read,
    /// and this is the lowest one that somebody of the authority held instead. When `version` is lost, the object becomes another one
    /// (see [`Needed::may_become`]).
    pub uncertain: Option<Version>,
}

impl Needed {
    /// A state about which there is no doubt.
    pub fn certain(version: Version, deleted: bool) -> Needed {
        Needed { version, deleted, uncertain: None }
    }

    /// It was never acknowledged, nor read.
    pub fn may_be_given_up(&self) -> bool {
        self.uncertain.is_some_and(|lowest| lowest < self.version)
    }

    /// Whether a copy at `version` is an older state of this object's one history, or a later one of the same interval: all in which nothing lacks
    /// that was acknowledged. A member may also hold a version that the history left behind; those between the lowest and the needed one are of another interval.
    pub fn may_become(&self, version: Version) -> bool {
        self.uncertain.is_some_and(|lowest| {
            let same = version.interval() == self.version.interval();
            version == lowest || (lowest < version && version != self.version && same)
        })
    }
}

/// One change within a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOp {
    /// Applies data and zero extents of validated `content` over the object and sets its version. The
    /// object must be exactly at `prev` (rule P2; `ZERO` for a new one, a tombstone counts with its version).
    Write { object: ObjectId, prev: Version, version: Version, content: Content },
    /// Like `Write` with zero extents; `discard` also gives the space of whole chunks back.
    Zero {
        object: ObjectId,
        prev: Version,
        version: Version,
        first_block: u32,
        block_count: u32,
        discard: bool,
    },
    /// Removes the content and leaves a tombstone at `version`.
    Delete { object: ObjectId, prev: Version, version: Version },
    /// Recovery: replaces whatever is here, also a newer or a divergent version, by `content` at
    /// `version` (or by a tombstone), and drops the object's missing entry, in one step (rule P4).
    Replace { object: ObjectId, version: Version, deleted: bool, content: Content },
    /// Recovery: the object becomes what was [`Placed`], and the chunks `kept` of what is here, which must then be exactly the
    /// committed version `base`, at `version`. Everything else of it goes, and so does its missing entry, in one step (rule P4).
    Assemble { object: ObjectId, version: Version, base: Version, kept: Vec<u32>, placed: Vec<Placed> },
    /// Erasure coding: writes `content` beside the committed version. Refused unless the committed
    /// version is `base`; replaces an older pending version.
    Prepare { object: ObjectId, base: Version, version: Version, content: Content },
    /// Makes the pending `version` the committed one. A no-op when it is already.
    CommitPending { object: ObjectId, version: Version },
    /// Forgets the pending version, if any.
    RollbackPending { object: ObjectId },
    /// Forgets a tombstone, if it is exactly at `version`.
    PurgeTombstone { object: ObjectId, version: Version },
    /// Forgets the object altogether, without a tombstone: for removed volumes.
    Purge { object: ObjectId },
    /// Sets the group's metadata. Creates the group.
    SetMeta(PgMeta),
    /// Adds to or replaces in the missing map.
    AddMissing { object: ObjectId, needed: Needed },
    /// Takes an object out of the missing map.
    DropMissing { object: ObjectId },
    /// Empties the missing map (before a new activation writes it afresh).
    ClearMissing,
    /// Deletes the group: objects, missing map and metadata.
    RemovePg,
    /// Divides a group of `from` (its metadata says so) into `to / from`: itself, and those whose numbers are a multiple of `from` higher.
    /// Each has those objects and missing entries that are its own now, and its metadata. Nothing, where there is no
    /// group.
    Divide { from: u32, to: u32 },
    /// The reverse: makes one group, one of `to`, of those of `from` that [`TxnOp::Divide`] would make of it. It has been active as far as each of
    /// them has: not at all, when one is not there. Nothing, where there is none.
    Combine { from: u32, to: u32 },
}

/// Groups that one [`TxnOp::Divide`] may make, or [`TxnOp::Combine`] take.
pub const DIVIDE_MAX: u32 = 64;

/// An atomic change of one group, or of it and those into which it is divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Txn {
    pub pg: PgId,
    pub ops: Vec<TxnOp>,
    /// Recovery and peering may use the space that is kept back from clients.
    pub reserve: bool,
}

/// Errors of a store; see the module docs for the policy.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum StoreError {
    #[error("object {object} is at {have}, the operation needs {want}")]
    VersionMismatch { object: ObjectId, have: Version, want: Version },
    #[error("no space left on the disk")]
    NoSpace,
    #[error("block {block} of object {object} is unreadable: {why}")]
    Unreadable {
        object: ObjectId,
        block: u32,
        why: String,
        /// What of it could be read.
        rest: Option<Box<Readable>>,
    },
    #[error("no object {object} in this group")]
    NotFound { object: ObjectId },
    #[error("malformed operation: {0}")]
    Invalid(String),
    /// Of a whole store: as it is, it is not served.
    #[error("{0}")]
    Refused(String),
    #[error("the store stopped for good: {0}")]
    Fatal(String),
}

/// Space, in bytes, and what is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub objects: u64,
    /// Blocks whose checksum did not match, since start.
    pub checksum_errors: u64,
}

/// A part of an object's own layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub state: ObjectState,
    pub content: Content,
    /// The object has no block from here on.
    pub end: u32,
}

/// What could be read, in a read or of a piece, where some blocks could not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readable {
    /// Of a piece: what the object is, and where it ends.
    pub state: Option<(ObjectState, u32)>,
    pub content: Content,
    /// All blocks that could not be read, of the objects that they were to come from, and the CRC32 that each should have.
    pub bad: Vec<(ObjectId, u32, u32)>,
}

/// One entry of an object listing.
pub type ListEntry = (ObjectId, ObjectState);

/// A store of one disk. One thread owns it. See the module docs.
pub trait Store: Send {
    fn identity(&self) -> Identity;
    /// Makes a group of transactions durable; one result each, in order. A transaction that fails
    /// (not `Fatal`) changed nothing and does not keep later ones from being applied.
    fn commit(&mut self, group: Vec<Txn>) -> Vec<Result<(), StoreError>>;
    /// The blocks present in `object` or, where absent, in the layers `below` it, top down, resolved
    /// in one call (rule S5). Every CRC is verified. An object that does not exist is empty.
    fn read(
        &mut self,
        pg: PgId,
        object: ObjectId,
        below: &[LayerId],
        first_block: u32,
        block_count: u32,
    ) -> Result<Content, StoreError>;
    /// Erasure coding: the object's own layer as it will be once its pending version, if there is one, is committed.
    fn read_pending(
        &mut self,
        pg: PgId,
        object: ObjectId,
        first_block: u32,
        block_count: u32,
    ) -> Result<Content, StoreError>;
    /// State of one object; `None` when nothing is known of it.
    fn object(&mut self, pg: PgId, object: ObjectId) -> Result<Option<ObjectState>, StoreError>;
    /// A whole object with its state, for recovery: only its own layer.
    fn read_object(&mut self, pg: PgId, object: ObjectId) -> Result<(ObjectState, Content), StoreError>;
    /// Some blocks of an object's own layer with its state.
    fn read_piece(
        &mut self,
        pg: PgId,
        object: ObjectId,
        first_block: u32,
        block_count: u32,
    ) -> Result<Piece, StoreError>;
    /// Writes chunks to slots that nothing names yet, for [`TxnOp::Assemble`]. Without it they are free again, at the latest
    /// when the store is opened anew.
    fn place(&mut self, pg: PgId, object: ObjectId, content: Content) -> Result<Placed, StoreError>;
    /// An object's state and the digest of its committed version ([`digest_of`]), from its records alone.
    fn digest(&mut self, pg: PgId, object: ObjectId) -> Result<(ObjectState, u64), StoreError>;
    /// Up to `limit` objects of a group in order, after `after`.
    fn list(&mut self, pg: PgId, after: Option<ObjectId>, limit: usize)
    -> Result<Vec<ListEntry>, StoreError>;
    /// Up to `limit` entries of the missing map in order, after `after`.
    fn list_missing(
        &mut self,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<(ObjectId, Needed)>, StoreError>;
    /// Every group here with its metadata.
    fn pgs(&mut self) -> Result<Vec<(PgId, PgMeta)>, StoreError>;
    /// The same of one group; none when nothing was ever said of it, or it was removed.
    fn meta(&mut self, pg: PgId) -> Result<Option<PgMeta>, StoreError>;
    fn usage(&self) -> Usage;
    /// Does a bounded piece of background work (write-back); true when there is more to do.
    fn background(&mut self) -> Result<bool, StoreError>;
}

/// The same without waiting, for the thread that owns a store and serves many at once.
pub trait ConcurrentStore: Store {
    /// Starts `work`; [`ConcurrentStore::progress`] hands out its outcome under `tag` (below 2^63), exactly once. Commits become
    /// durable in the order of their starts; a read sees every commit started before it that it overlaps, and may see later ones.
    fn start(&mut self, tag: u64, work: Work);
    /// Adds what has ended to `done`; true when something moved. Never waits.
    fn progress(&mut self, done: &mut Vec<(u64, Done)>) -> bool;
    /// Something is going on that will end by itself.
    fn busy(&self) -> bool;
    /// Waits until [`ConcurrentStore::progress`] may have something or the armed waker was used.
    fn wait(&mut self);
    /// What it did since it was opened.
    fn stats(&self) -> Stats;
    /// Ends [`ConcurrentStore::wait`] from other threads; the caller arms it.
    fn waker(&self) -> Waker;
    /// Called whenever disk or index have answered, and again and again while one call looks at very much of the index or waits for
    /// the disk more than once: not of what needs neither.
    fn set_pulse(&mut self, pulse: Pulse);
    /// A descriptor that becomes readable when [`ConcurrentStore::progress`] may have something of the disk; `None` where the disk
    /// must be waited for.
    fn completions(&self) -> Option<io::Result<OwnedFd>> {
        None
    }
    /// Whether `work` is so small, and all that it needs of the index so certainly in memory, that nothing of it can wait for the
    /// disk but its outcome. Holds as long as nothing else is started.
    fn is_light(&self, _work: &Work) -> bool {
        false
    }
    /// Nothing is going on and nothing is due.
    fn is_at_rest(&self) -> bool {
        false
    }
    /// There is something to do that may take long or wait for the disk.
    fn is_laborious(&self) -> bool {
        true
    }
    /// Hands the disk what [`ConcurrentStore::progress`] left for [`ConcurrentStore::wait`] to hand over; false when it takes no more
    /// for now. Never waits.
    fn submit(&mut self) -> bool {
        false
    }
}

/// See [`ConcurrentStore::set_pulse`].
pub type Pulse = Box<dyn Fn() + Send>;

/// What a store can do without waiting.
#[derive(Clone, Debug)]
pub enum Work {
    Commit(Vec<Txn>),
    Read {
        pg: PgId,
        object: ObjectId,
        below: Vec<LayerId>,
        first_block: u32,
        block_count: u32,
        /// As [`Store::read_pending`].
        pending: bool,
    },
    ReadObject {
        pg: PgId,
        object: ObjectId,
    },
    /// As [`Store::read_piece`].
    ReadPiece {
        pg: PgId,
        object: ObjectId,
        first_block: u32,
        block_count: u32,
    },
    /// As [`Store::place`].
    Place {
        pg: PgId,
        object: ObjectId,
        content: Content,
    },
    /// As [`Store::digest`].
    Digest {
        pg: PgId,
        object: ObjectId,
    },
    /// Brings everything to its final place.
    Settle,
}

impl Work {
    fn failed(&self, e: StoreError) -> Done {
        match self {
            Work::Commit(txns) => Done::Commit(vec![Err(e); txns.len()]),
            Work::Read { .. } => Done::Read(Err(e)),
            Work::ReadObject { .. } => Done::ReadObject(Err(e)),
            Work::ReadPiece { .. } => Done::ReadPiece(Err(e)),
            Work::Place { .. } => Done::Place(Err(e)),
            Work::Digest { .. } => Done::Digest(Err(e)),
            Work::Settle => Done::Settled(Err(e)),
        }
    }
}

/// The outcome of a [`Work`].
#[derive(Debug)]
pub enum Done {
    Commit(Vec<Result<(), StoreError>>),
    Read(Result<Content, StoreError>),
    ReadObject(Result<(ObjectState, Content), StoreError>),
    ReadPiece(Result<Piece, StoreError>),
    Place(Result<Placed, StoreError>),
    Digest(Result<(ObjectState, u64), StoreError>),
    Settled(Result<(), StoreError>),
}

/// Bytes of zeros for callers that need them spelled out.
pub fn zeros(len: usize) -> Bytes {
    Bytes::from(vec![0; len])
}
