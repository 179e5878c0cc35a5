//! Data-path messages: client to OSD and OSD to OSD.
//!
//! Metadata is encoded with postcard; bulk bytes travel beside it in the frame's data part and are
//! named by the [`Extent`]s in the message. `PROTOCOL_VERSION` changes with any change here.

use crate::blocks::Extent;
use crate::ids::*;
use serde::{Deserialize, Serialize};

/// Version of the data-path protocol; both ends must speak the same one.
pub const PROTOCOL_VERSION: u8 = 10;

/// Everything that travels on a data-path connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// First frame in each direction of a new connection.
    Hello(Hello),
    /// Client operation; answered by `OpReply` with the same request id.
    Op(ClientOp),
    OpReply(OpReply),
    /// OSD to OSD; one-way, matched by the placement-group state machines.
    Peer(PeerMsg),
}

/// Who speaks. The acceptor answers with its own; a foreign cluster is refused by closing after a
/// `Hello` whose `refusal` says why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub cluster: ClusterId,
    pub role: Role,
    pub refusal: Option<String>,
}

/// What the speaker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    Osd { id: OsdId, incarnation: Incarnation },
    Client { id: ClientId },
}

/// A client's operation on one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientOp {
    /// The client's map epoch.
    pub epoch: Epoch,
    pub pg: PgId,
    pub client: ClientId,
    /// Session and generation of the attachment; generation 0 is an unattached reader, which may
    /// only read.
    pub session: Session,
    pub generation: Generation,
    /// The volume whose attachment that is; of a clone another one than the object's root.
    pub volume: VolumeId,
    /// The object and its top layer: writes go there.
    pub object: ObjectId,
    pub kind: OpKind,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OpKind {
    /// Blocks `first_block..first_block + block_count`, resolved through the top layer and then
    /// `below`, top down.
    Read { first_block: u32, block_count: u32, below: Vec<LayerId> },
    /// Data in the frame; the extents name and checksum it. Data and zero extents may mix.
    Write { extents: Vec<Extent> },
    /// Zeros, without data; `discard` also returns the space.
    Zero { first_block: u32, block_count: u32, discard: bool },
}

/// The answer to a [`ClientOp`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OpReply {
    /// A write or zero is durable on every acting member.
    Done { version: Version },
    /// The blocks that are present in some layer; bytes in the frame's data. The rest reads as zero.
    Data { extents: Vec<Extent> },
    /// Not served here or not now: refresh the map to at least `epoch`, then retry.
    Retry { epoch: Epoch, why: RetryWhy },
    /// Final refusal.
    Failed(OpError),
}

/// Why an operation must be retried; none of these had an effect that a retry could double.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RetryWhy {
    /// The client's map is older than the group's interval, or another OSD is primary.
    StaleMap,
    /// This OSD's map is older than the client's.
    OsdBehind,
    /// The group is not active (peering, too few members); the client waits.
    NotActive,
    /// The payload's checksum did not match (rule C5): send it again.
    BadChecksum,
    /// Queues are full.
    Busy,
}

/// Final refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum OpError {
    #[error("the attachment was fenced by a newer one")]
    Fenced,
    #[error("no space left")]
    NoSpace,
    #[error("input/output error: no readable copy")]
    Io,
    #[error("the operation is malformed")]
    Invalid,
    #[error("the volume was removed")]
    Removed,
    #[error("a snapshot froze the layer")]
    Frozen,
}

/// One OSD to another, about one placement group. `interval` and both incarnations are checked by
/// the receiver before anything else (rule P1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerMsg {
    pub from: OsdId,
    pub from_incarnation: Incarnation,
    pub to: OsdId,
    /// The receiver's incarnation as the sender's map has it.
    pub to_incarnation: Incarnation,
    /// The sender's map epoch; a receiver that is behind fetches the map first.
    pub epoch: Epoch,
    pub pg: PgId,
    /// The interval that the message belongs to.
    pub interval: Epoch,
    pub body: PeerBody,
}

/// The object versions that peering exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectEntry {
    pub object: ObjectId,
    /// The version that the object should have here: its version, or what `missing` records.
    pub version: Version,
    /// The member knows of the version but does not hold it (rule P4).
    pub missing: bool,
    /// The object is deleted as of `version` (a tombstone).
    pub deleted: bool,
    /// Of a missing one: the authority disagreed about `version`, so nobody ever acknowledged or read it, and this
    /// is the lowest version that somebody of the authority held instead.
    pub uncertain: Option<Version>,
    /// Of a missing one: the version that is still held, and whether it is a tombstone.
    pub held: Option<(Version, bool)>,
    /// Erasure coding: `version` is written beside this committed one and not yet committed itself.
    pub base: Option<Version>,
}

/// Stands for the entries of a part of a list, all fields of them, in order.
pub type ListDigest = [u8; 16];

/// Some of `count` parts into which a list is divided by object; bit `n` of `wanted` is part `n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListParts {
    pub count: u8,
    pub wanted: u64,
}

impl ListParts {
    /// The whole list, undivided.
    pub const ALL: ListParts = ListParts { count: 1, wanted: 1 };

    /// Every one of `count` parts.
    pub fn all_of(count: u8) -> ListParts {
        let wanted = (0..u64::BITS).take(count.into()).fold(0, |wanted, n| wanted | 1 << n);
        ListParts { count, wanted }
    }

    /// The part of an object, below `count` and [`crate::limits::LIST_PARTS_MAX`].
    pub fn part_of(count: u8, object: &ObjectId) -> usize {
        let count = u64::from(count).clamp(1, crate::limits::LIST_PARTS_MAX as u64);
        ((object.volume.0 ^ u64::from(object.index)) % count) as usize
    }

    pub fn contains(self, object: &ObjectId) -> bool {
        self.wanted >> ListParts::part_of(self.count, object) & 1 == 1
    }

    pub fn nothing(self) -> bool {
        self.wanted == 0
    }
}

impl Default for ListParts {
    fn default() -> ListParts {
        ListParts::ALL
    }
}

impl ObjectEntry {
    /// An object that is here at `version`.
    pub fn here(object: ObjectId, version: Version, deleted: bool) -> ObjectEntry {
        ObjectEntry { object, version, missing: false, deleted, uncertain: None, held: None, base: None }
    }

    /// The copy that can be fetched there. One that is missing at the very version that is held could not be read.
    pub fn copy(&self) -> Option<(Version, bool)> {
        match self.missing {
            false => Some((self.version, self.deleted)),
            true => self.held.filter(|(v, _)| *v != self.version),
        }
    }
}

/// What members of a group say to each other. The flow is in the module docs of `gabion-osd`'s `pg`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerBody {
    /// Primary of `interval` asks: promise to refuse anything older, durably, and say what you have.
    Query,
    /// The promise is durable.
    Info {
        /// Highest interval activated here.
        activated: Epoch,
        object_count: u64,
        missing_count: u64,
        /// Erasure coding: which shard of each object is here.
        shard: Option<u8>,
        /// The digest of each part of the list, at most [`crate::limits::LIST_PARTS_MAX`] of them.
        parts: Vec<ListDigest>,
    },
    /// Next page of the object list, after `after`; of these parts only.
    ListRequest {
        after: Option<ObjectId>,
        parts: ListParts,
    },
    List {
        after: Option<ObjectId>,
        entries: Vec<ObjectEntry>,
        last: bool,
    },
    /// One page of what the receiver must obtain (or delete, for tombstones) to match the
    /// authority; the last page makes the activation durable. Erasure coding: an entry that is not missing names the
    /// committed version to which a pending one is rolled back.
    Activate {
        page: u32,
        missing: Vec<ObjectEntry>,
        last: bool,
    },
    ActivateAck {
        page: u32,
    },
    /// A write in version order (rule P2): refused unless the object is at `prev`.
    SubWrite {
        tid: u64,
        object: ObjectId,
        version: Version,
        prev: Version,
        write: SubWriteKind,
    },
    SubWriteAck {
        tid: u64,
        result: SubResult,
    },
    /// Asks who has an object at exactly `version` for a piece of it: a holder, or a primary that has sent `Push`. Who asks has read
    /// these leaves of the piece in a copy of its own, one after the other from `first_block` on, or none; those that are the same there and here need not be sent.
    Pull {
        tid: u64,
        object: ObjectId,
        version: Version,
        first_block: u32,
        have: Vec<LeafDigest>,
    },
    /// The piece, or why not. Bytes in the frame's data.
    PullReply {
        tid: u64,
        object: ObjectId,
        version: Version,
        first_block: u32,
        piece: Result<PieceImage, SubResult>,
    },
    /// The primary brings a member that misses the object to `version`; conditional on the member
    /// still missing it (rule P4), or on still holding what a scrub found wrong: a copy at `over`. The first piece comes along
    /// if the member has no older copy to compare; the others are pulled by the member, which answers when all is stored.
    Push {
        tid: u64,
        object: ObjectId,
        version: Version,
        deleted: bool,
        over: Option<Version>,
        piece: Option<PieceImage>,
    },
    PushAck {
        tid: u64,
        result: SubResult,
    },
    /// Erasure coding: asks for rows of the receiver's shard of an object that is at `version`, pending or not, or
    /// later.
    ShardRead {
        tid: u64,
        object: ObjectId,
        version: Version,
        first_row: u32,
        row_count: u32,
    },
    /// The rows, numbered within the shard, or why not. Bytes in the frame's data.
    ShardData {
        tid: u64,
        result: Result<Vec<Extent>, SubResult>,
    },
    /// Erasure coding: every member holds these versions; they may be committed.
    Commit {
        objects: Vec<(ObjectId, Version)>,
    },
    /// What of them is not pending any more.
    CommitAck {
        objects: Vec<(ObjectId, Version)>,
    },
    /// Scrub: asks what the receiver's store has of the objects in a range; `deep`: every block is read.
    ScrubRead {
        tid: u64,
        range: ScrubRange,
        deep: bool,
    },
    /// The answer, at most [`crate::limits::SCRUB_ENTRIES_MAX`] objects in order; `last`: there are no more in the range.
    ScrubInfo {
        tid: u64,
        entries: Vec<ScrubEntry>,
        last: bool,
    },
    /// The receiver promised a newer interval.
    Refused {
        promised: Epoch,
    },
    /// A member to its primary, again and again while it is so: its store has too little room for clients'
    /// writes (rule P7).
    Full,
    /// Whole copies: the primary asks for blocks, through these layers, that are not written meanwhile. Its own disk is late.
    BlockRead {
        tid: u64,
        object: ObjectId,
        below: Vec<LayerId>,
        first_block: u32,
        block_count: u32,
    },
    /// The blocks, or why not. Bytes in the frame's data.
    BlockData {
        tid: u64,
        result: Result<Vec<Extent>, SubResult>,
    },
}

/// Objects that a scrub looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScrubRange {
    /// All that come after this one; all there are.
    After(Option<ObjectId>),
    One(ObjectId),
}

impl ScrubRange {
    pub fn contains(&self, object: &ObjectId) -> bool {
        match self {
            ScrubRange::After(after) => after.is_none_or(|a| *object > a),
            ScrubRange::One(one) => object == one,
        }
    }
}

/// A copy as a scrub finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubEntry {
    pub object: ObjectId,
    /// The newest one, pending or not; `ZERO`: the store has nothing of an object that should be here.
    pub version: Version,
    pub deleted: bool,
    /// Which blocks are data and which zeros, and the data's checksums; 0 of a shard, which is like no other one.
    pub digest: u64,
    /// Deep: a block that cannot be read, or does not match its checksum.
    pub unreadable: Option<u32>,
}

/// The change of a [`PeerBody::SubWrite`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SubWriteKind {
    /// Bytes in the frame's data.
    Write {
        extents: Vec<Extent>,
    },
    Zero {
        first_block: u32,
        block_count: u32,
        discard: bool,
    },
    /// Leaves a tombstone.
    Delete,
    /// The receiver lacks the object, and notes that it is at this version now (rule P4).
    Note,
    /// Erasure coding, to who keeps a parity shard: rows of it as they will be (`whole`), and what is to be added (exclusive or)
    /// to other rows as they are at `prev`, and at no other version (rule E2). Bytes of both in the frame's data, in this order.
    Delta {
        whole: Vec<Extent>,
        added: Vec<Extent>,
    },
}

/// What a leaf of an object is, in 256 bits: which of its blocks are data and which zeros, and the data itself (`gabion-osd`'s
/// `pieces`). Leaves with the same one are taken for the same, which CRCs would not allow.
pub type LeafDigest = [u8; 32];

/// A piece of an object as recovery moves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceImage {
    /// Which leaves of the piece are what the asker has: they are not among the extents.
    pub same: u32,
    pub extents: Vec<Extent>,
    /// The object has no block from here on.
    pub end: u32,
    /// Blocks of the piece that are data, and that who sends it cannot read, with the CRC32 that they should have: not among the extents
    /// either. In ascending order.
    pub bad: Vec<(u32, u32)>,
}

/// How a sub-operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SubResult {
    Ok,
    /// The receiver is not at the named version.
    VersionMismatch,
    NoSpace,
    Io,
    BadChecksum,
    Missing,
    /// The receiver cannot read what a [`SubWriteKind::Delta`] is to be added to.
    Unreadable,
}
