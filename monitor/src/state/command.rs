//! What can be asked of the replicated state, and how it answers.
//!
//! Commands are what the monitors agree on, so they carry everything that their effect depends on:
//! applying one reads no clock, no random number and nothing outside the state.

use super::Nic;
use super::scrubs::{ScrubResult, ScrubSettings};
use super::slow::SlowPolicy;
use gabion_proto::ids::*;
use gabion_proto::map::{FailureDomain, Redundancy};
use serde::{Deserialize, Serialize};

/// How bytes of a volume leave a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExportKind {
    Nbd,
    VhostUser,
}

/// What an operator last asked of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmAction {
    Start,
    Stop,
    Kill,
}

/// A disk as asked for: a volume by name, and the serial that the guest sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRequest {
    pub volume: String,
    pub serial: String,
}

/// One change that the monitors agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Names the cluster; refused once it has another name.
    Bootstrap {
        cluster: ClusterId,
    },

    /// Registers a disk. The same disk gets the same id again. `weight` 0: from the capacity.
    AddOsd {
        disk: ClusterId,
        host: String,
        rack: String,
        weight: u32,
        capacity_bytes: u64,
    },
    /// An OSD process starts and gets a new incarnation at once, even if the map still calls the old
    /// one up: both run from the same disk, whose lock the new process holds, so the old one is
    /// dead and whatever lease it had is held by nobody.
    BootOsd {
        osd: OsdId,
        disk: ClusterId,
        addr: String,
        host: String,
        rack: String,
        capacity_bytes: u64,
    },
    /// Its lease has run out, or it said goodbye. Nothing else is a reason.
    MarkDown {
        osd: OsdId,
        incarnation: Incarnation,
        reason: String,
    },
    /// `automatic`: because it was down too long; its next boot brings it back in.
    OutOsd {
        osd: OsdId,
        automatic: bool,
    },
    InOsd {
        osd: OsdId,
    },
    ReweightOsd {
        osd: OsdId,
        weight: u32,
    },
    /// `force` declares its data lost.
    RemoveOsd {
        osd: OsdId,
        force: bool,
    },

    CreatePool {
        name: String,
        redundancy: Redundancy,
        /// 0: the default.
        min_size: u32,
        failure_domain: FailureDomain,
        pg_count: u32,
        object_bytes: u32,
    },
    SetPool {
        name: String,
        min_size: Option<u32>,
    },
    RemovePool {
        name: String,
    },

    /// The primary of `interval` is about to serve it (invariant 2).
    PgActivated {
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
    },
    /// Every acting member of `interval` holds everything (rule P9).
    PgClean {
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
    },
    /// The primary `osd` cannot get on with `peer` (rule P8): the group goes on without it.
    SuspectPeer {
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
        peer: OsdId,
        peer_incarnation: Incarnation,
    },
    /// The peer gets another chance.
    ClearSuspect {
        pg: PgId,
        peer: OsdId,
        peer_incarnation: Incarnation,
    },

    CreateVolume {
        name: String,
        pool: String,
        size_bytes: u64,
    },
    RemoveVolume {
        name: String,
    },
    ResizeVolume {
        name: String,
        size_bytes: u64,
    },
    /// Takes a snapshot, `VOLUME@NAME`, of a volume that nobody holds; asks the holder to pause where there is one.
    BeginSnapshot {
        snapshot: String,
    },
    /// The holder has nothing in flight: the snapshot is taken.
    SealSnapshot {
        volume: VolumeId,
        client: ClientId,
        session: Session,
        generation: Generation,
        snapshot: SnapshotId,
    },
    /// The holder did not pause in time.
    GiveUpSnapshot {
        snapshot: SnapshotId,
    },
    RemoveSnapshot {
        snapshot: String,
    },
    RollbackVolume {
        snapshot: String,
    },
    CloneVolume {
        snapshot: String,
        name: String,
    },

    /// `client` 0 asks for a new identity.
    OpenSession {
        client: ClientId,
        host: String,
    },
    AttachVolume {
        volume: String,
        client: ClientId,
        session: Session,
        take_over: bool,
    },
    DetachVolume {
        volume: String,
        client: ClientId,
        generation: Generation,
    },
    /// Takes a volume away from whoever holds it.
    FenceVolume {
        volume: String,
    },

    AddExport {
        volume: String,
        kind: ExportKind,
        read_only: bool,
        host: String,
    },
    RemoveExport {
        id: u64,
    },

    CreateVm {
        name: String,
        cpus: u32,
        memory_bytes: u64,
        disks: Vec<DiskRequest>,
        host: String,
        kernel_args: String,
        engine: String,
        cpu_model: String,
        nics: Vec<Nic>,
    },
    SetVmState {
        name: String,
        action: VmAction,
    },
    AttachDisk {
        vm: String,
        disk: DiskRequest,
    },
    DetachDisk {
        vm: String,
        volume: String,
    },
    /// The host says that the guest does not run (any more). `action_number` is the newest action
    /// that the report can be about: a newer one makes it stale.
    VmStopped {
        name: String,
        action_number: u64,
    },
    /// The host says that the running guest no longer has this disk.
    DiskReleased {
        vm: String,
        volume: VolumeId,
    },
    RemoveVm {
        name: String,
    },

    /// Something for the events only.
    Announce {
        text: String,
    },

    SetScrub(ScrubSettings),
    /// What each OSD may move for recovery, in bytes per second; 0: no limit.
    SetRebuildRate(u64),
    /// An operator wants groups to be scrubbed: all, those of a pool, or one.
    RequestScrub {
        pool: Option<String>,
        pg: Option<PgId>,
        deep: bool,
    },
    /// The primary of `interval` has scrubbed the whole group.
    PgScrubbed {
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
        result: ScrubResult,
    },
    /// A replicated pool keeps more or fewer copies from now on. (At the end, as logs know commands by their place.)
    SetReplicas {
        name: String,
        replicas: u32,
        /// As it is, if not given.
        min_size: Option<u32>,
    },
    /// Every acting member of `interval`, too few to serve, holds its shard of everything; see `PgRecord::held_back`.
    PgFilled {
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
    },
    SetSlowPolicy(SlowPolicy),
    /// It has been slow for as long as the policy allows: its data moves elsewhere.
    EvictSlow {
        osd: OsdId,
        incarnation: Incarnation,
    },
    /// Several commands that waited at the same time, each an encoded [`Stamped`] so that they cannot nest: carried out as if
    /// each had an entry of its own.
    Together(Vec<Vec<u8>>),
    /// A pool gets so many groups.
    SetPgs {
        name: String,
        pg_count: u32,
    },
}

/// A command with what it was proposed under.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamped {
    /// Wall-clock time of the proposal, for events.
    pub unix_ms: u64,
    /// The request that it belongs to: carried out once, however often it is proposed.
    pub request: Option<u128>,
    /// The leader's term in which it was decided, when what it is based on holds only under that leader:
    /// agreed on under another one, it has no effect.
    pub term: Option<u64>,
    pub command: Command,
}

impl Stamped {
    /// Commands, each encoded, that are agreed on in one entry of the log and carried out one after the other.
    pub(crate) fn together(commands: Vec<Vec<u8>>) -> Stamped {
        Stamped { unix_ms: 0, request: None, term: None, command: Command::Together(commands) }
    }
}

/// What a command that was carried out answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Osd(OsdId),
    Booted {
        incarnation: Incarnation,
        epoch: Epoch,
    },
    Pool(PoolId),
    Volume(VolumeId),
    /// Taken, or asked for: it is there once it is taken.
    Snapshot(SnapshotId),
    Session {
        client: ClientId,
        session: Session,
    },
    Attached {
        volume: VolumeId,
        generation: Generation,
        epoch: Epoch,
    },
    Fenced {
        epoch: Epoch,
    },
    Export(u64),
    /// So many groups will be scrubbed.
    Scrubs(u32),
    /// One answer to each command that was agreed on together, in order.
    Together(Vec<CommandResult>),
}

/// Why a command was refused, as gRPC distinguishes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    Invalid,
    NotFound,
    Exists,
    Precondition,
    Exhausted,
    /// The caller's view (incarnation, interval, session) is out of date.
    Aborted,
    NotBuilt,
}

/// A refusal: the state is as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub kind: RefusalKind,
    /// One sentence for a person.
    pub message: String,
}

impl Refusal {
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Refusal {
        Refusal { kind, message: message.into() }
    }
    pub(crate) fn invalid(message: impl Into<String>) -> Refusal {
        Refusal::new(RefusalKind::Invalid, message)
    }
    pub(crate) fn not_found(message: impl Into<String>) -> Refusal {
        Refusal::new(RefusalKind::NotFound, message)
    }
    pub(crate) fn exists(message: impl Into<String>) -> Refusal {
        Refusal::new(RefusalKind::Exists, message)
    }
    pub(crate) fn precondition(message: impl Into<String>) -> Refusal {
        Refusal::new(RefusalKind::Precondition, message)
    }
    pub(crate) fn exhausted(message: impl Into<String>) -> Refusal {
        Refusal::new(RefusalKind::Exhausted, message)
    }
    pub(crate) fn aborted(message: impl Into<String>) -> Refusal {
        Refusal::new(RefusalKind::Aborted, message)
    }
}

/// The answer to a command.
pub type CommandResult = Result<Reply, Refusal>;
