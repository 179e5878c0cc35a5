//! Everything an OSD decides, without I/O: `step(now, event) -> effects`.
//!
//! [`OsdCore`] owns the map, the lease, the fences and every placement group of this OSD. It is driven by
//! the server (sockets, clocks, the store's thread) and, unchanged, by the simulator. It never blocks, has no clock and
//! no randomness of its own; time is milliseconds of a monotonic clock that runs on while the machine is paused
//! (CLOCK_BOOTTIME). Every [`Effect`] that wants an answer carries a token that the answer brings back.

mod branches;
mod context;
mod latency;
mod osd;
#[cfg(test)]
mod peering_tests;
mod pg;
#[cfg(test)]
mod recovery_tests;
mod rules;
#[cfg(test)]
mod scenarios;
mod scrub_budget;
mod throttle;
mod turns;

pub use branches::{Branch, Branches};
pub use osd::{Boot, OsdCore};
pub use pg::damaged_object;
pub use rules::{Rule, Rules};

use crate::store::{ListEntry, Needed, ObjectState, PgMeta, Piece, Placed, StoreError, Txn};
use bytes::Bytes;
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use gabion_proto::map::ClusterMap;
use gabion_proto::msg::{ClientOp, OpReply, PeerMsg};
use std::sync::Arc;

/// Milliseconds of CLOCK_BOOTTIME (or of simulated time).
pub type Millis = u64;

/// Matches an answer to the effect that asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// Names a client operation at the server: where the answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientToken(pub u64);

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A newer map.
    Map(Arc<ClusterMap>),
    /// The lease was renewed: it runs until then. The server computes it from when it *sent* the
    /// request (rule P6).
    Lease { until: Millis, epoch: Epoch },
    /// A client operation and its payload. Checksums are not verified yet.
    Client { token: ClientToken, op: ClientOp, data: Bytes },
    /// A message from another OSD and its payload.
    Peer { msg: PeerMsg, data: Bytes },
    /// Answer to `Effect::Store`.
    Committed { token: Token, result: Result<(), StoreError> },
    /// Answer to `Effect::Read`.
    ReadDone { token: Token, result: Result<Content, StoreError> },
    /// Answer to `Effect::ReadObject`.
    ObjectRead { token: Token, result: Result<(ObjectState, Content), StoreError> },
    /// Answer to `Effect::ReadPiece`.
    PieceRead { token: Token, result: Result<Piece, StoreError> },
    /// Answer to `Effect::Place`.
    PiecePlaced { token: Token, result: Result<Placed, StoreError> },
    /// Answer to `Effect::Digest`.
    Digested { token: Token, result: Result<(ObjectState, u64), StoreError> },
    /// Answer to `Effect::List`.
    Listed { token: Token, result: Result<Listing, StoreError> },
    /// How much recovery may move in a second, at most; 0: no limit.
    RebuildLimit { bytes_per_s: u64 },
    /// Answer to `Effect::Monitor`.
    Monitor { token: Token, result: Result<(), MonitorRefused> },
    /// Nobody waits for this operation's answer any more (its connection is gone): if it has not
    /// started, it never does.
    ClientGone { token: ClientToken },
    /// Whether the store has too little room for clients' writes.
    Full(bool),
    /// The monitors want these groups, which this OSD leads, to be scrubbed, and let scrubs read so much here.
    Scrub { orders: Vec<ScrubOrder>, rate_bytes_per_s: u64 },
    /// What the monitors say of slow OSDs: how long a member may owe a sub-operation before it is reported, and who is slow.
    Slow { limit_ms: Millis, osds: Vec<OsdId> },
    /// Time passes; at least every 100 ms.
    Tick,
    /// The time that [`OsdCore::wake_at`] named has come.
    Wake,
}

/// The monitors' word that a group is to be scrubbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubOrder {
    pub pg: PgId,
    /// Grows with every pass and every request; the report names it.
    pub number: u64,
    pub deep: bool,
}

/// How a pass over a whole group ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Of the order under which it began.
    pub number: u64,
    pub deep: bool,
    pub objects: u64,
    /// Copies that were lacking, wrong or unreadable, and how many of them were replaced.
    pub findings: u64,
    pub repaired: u64,
    /// Objects left without a good copy, and the first of them.
    pub damaged_objects: u64,
    pub damaged: Vec<(ObjectId, Damage)>,
}

/// Why an object has no good copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// None can be read whole.
    Unreadable,
    /// Copies of one version differ, each matches its checksums, and there is no majority.
    Inconsistent,
}

/// All that a store knows of one group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// What it keeps about itself.
    pub meta: Option<PgMeta>,
    pub objects: Vec<ListEntry>,
    pub missing: Vec<(ObjectId, Needed)>,
}

/// The monitors refused a report: the interval is over. (Unreachable monitors are retried by the
/// server, not reported.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MonitorRefused;

/// What to tell the monitors; durable there when answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MonitorRequest {
    /// This primary is about to serve the interval (invariant 2).
    Activated { pg: PgId, interval: Epoch },
    /// Every acting member holds everything (invariant 8).
    Clean { pg: PgId, interval: Epoch },
    /// Erasure coding: the acting members, too few to serve, hold everything.
    Filled { pg: PgId, interval: Epoch },
    /// The whole group was scrubbed.
    Scrubbed { pg: PgId, interval: Epoch, report: ScrubReport },
}

/// What to do. Effects are executed in order; store effects of one core are executed in order.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Send to `msg.to`; may be lost.
    Send {
        msg: PeerMsg,
        data: Bytes,
    },
    Reply {
        token: ClientToken,
        reply: OpReply,
        data: Bytes,
    },
    Store {
        token: Token,
        txn: Txn,
    },
    Read {
        token: Token,
        pg: PgId,
        object: ObjectId,
        below: Vec<LayerId>,
        first_block: u32,
        block_count: u32,
    },
    /// Erasure coding: as `Read`, of an object with its pending version as if it were committed. Answered alike.
    ReadPending {
        token: Token,
        pg: PgId,
        object: ObjectId,
        first_block: u32,
        block_count: u32,
    },
    ReadObject {
        token: Token,
        pg: PgId,
        object: ObjectId,
    },
    /// Some blocks of an object's own layer, with its state.
    ReadPiece {
        token: Token,
        pg: PgId,
        object: ObjectId,
        first_block: u32,
        block_count: u32,
    },
    /// Writes chunks of an object to slots that nothing names yet.
    Place {
        token: Token,
        pg: PgId,
        object: ObjectId,
        content: Content,
    },
    /// State and digest of one object, from the store's records alone.
    Digest {
        token: Token,
        pg: PgId,
        object: ObjectId,
    },
    /// The whole listing of a group (rule P10 will page this by version).
    List {
        token: Token,
        pg: PgId,
    },
    Monitor {
        token: Token,
        request: MonitorRequest,
    },
    /// Map newer than ours was mentioned: fetch it.
    WantMap {
        epoch: Epoch,
    },
}

/// A group's metadata as the store holds it at start.
pub type StartState = Vec<(PgId, PgMeta)>;
