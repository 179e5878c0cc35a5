//! Which of its less common ways the core has gone, for the simulator: a way that no seed takes is not tested.
//!
//! Without the feature `mutants` nothing is counted, and the compiler removes the question.

#[cfg(feature = "mutants")]
use std::collections::BTreeMap;

macro_rules! branches {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A way through the core.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Branch { $($(#[$doc])* $name,)* }

        impl Branch {
            pub const ALL: &[Branch] = &[$(Branch::$name,)*];
        }
    };
}

branches! {
    /// Peering: fewer members than min-size.
    Undersized,
    /// Peering: a question is asked again.
    AskedAgain,
    /// Peering: acting members are there, but of an earlier interval too few.
    WaitsForCoverage,
    /// Peering: a member of an earlier interval, which does not act, has told what it has.
    HeardStray,
    /// Peering: a member's list is the own one.
    SameList,
    /// Peering: everybody's is, and nothing in it is to be decided.
    AllAgree,
    /// Peering: parts of a member's list are the own ones, others are asked for.
    ListedInPart,
    /// Peering: the authority disagrees about a version, and it is rolled forward.
    RollForward,
    /// Peering: an uncertain version is lost, and the object goes back to an older one.
    GoBack,
    /// Peering: pending shards of a version that nobody was told of are dropped.
    RollBack,
    /// Peering: a pending version is kept, and committed later.
    KeepPending,
    /// Peering: what an acting member has is unknown to the authority and goes.
    DropUnknown,
    /// Activation: an object is needed that no source is known for.
    ActivateUnfound,
    /// Activation: asked again.
    ActivateAgain,
    /// The monitors refuse a report: the interval is over.
    ReportRefused,
    /// Recovery: an object is pulled.
    Pull,
    /// Recovery: an object is pushed.
    Push,
    /// Recovery: leaves of an older copy stay.
    KeepLeaves,
    /// Recovery: a deletion is brought about.
    RecoverDeletion,
    /// Recovery: shards are computed.
    ComputeShards,
    /// Recovery: a shard is stored beside the committed one.
    RecoverBeside,
    /// Recovery: an object that a client waits for goes first.
    Demanded,
    /// Recovery: writes in flight end first.
    RecoveryWaitsForWrites,
    /// Recovery: a source is late, another one is asked.
    SourceLate,
    /// Recovery: somebody is late, others do not wait for that.
    PassLate,
    /// Recovery: what was offered to a member is offered again.
    OfferAgain,
    /// Recovery: a piece that did not come is asked for again.
    PieceAgain,
    /// Recovery: a source has no good copy.
    SourceBad,
    /// Recovery: some blocks of a piece could not be read there, and are asked of another copy.
    AskForRest,
    /// Recovery: a piece is put together from several copies.
    PutTogether,
    /// Recovery: a member did not take what was pushed.
    PushRefused,
    /// Recovery: the own disk did not take what was recovered.
    OwnRefused,
    /// Recovery: members of earlier intervals are asked for what is unfound.
    AskStrays,
    /// Recovery: one of them has it.
    LateSource,
    /// Recovery: one of them has another version of what nobody has, which it may become.
    LateInstead,
    /// Throttle: clients leave no room now.
    Throttled,
    /// Throttle: recovery pauses, so that what is healthy can be measured.
    ThrottleProbes,
    /// Reads: a block of the own copy is unreadable and comes from another one.
    RepairOnRead,
    /// Reads: another member is asked for the blocks, too.
    HedgeBlocks,
    /// Reads: another member is asked first, since the own disk is far behind.
    HedgeFirst,
    /// Reads: the other member is faster than the own disk.
    HedgeWon,
    /// Reads: the own disk is faster after all.
    HedgeLate,
    /// Reads: the other member does not have the blocks.
    HedgeRefused,
    /// Reads: one that was overtaken finds a bad block.
    OvertakenBad,
    /// Reads: nobody else is known to have it.
    OwnCopyAlone,
    /// Recovery: the only copy of a version in doubt cannot be read.
    LastOfDoubtLost,
    /// Reads: nobody can read it.
    KeepDamaged,
    /// Reads: a block of a damaged object is asked of another copy.
    MendRead,
    /// Reads: all of what was asked for could be read, in several copies.
    Mended,
    /// Shards: decoded, since one is away, late or unreadable.
    Decode,
    /// Shards: others are asked for, since one that is needed is late.
    HedgeShards,
    /// Shards: others were enough before the late one came.
    HedgeDecoded,
    /// Shards: a member that owes much is not asked.
    ShunMember,
    /// Shards: one could not be read, and is computed anew.
    LoseShard,
    /// Shards: rows are read in smaller pieces, around unreadable ones.
    Piecewise,
    /// Shards: too few of one version.
    GatheringFailed,
    /// Shards: several writes are made together.
    JoinedWrites,
    /// Shards: parity is added to, from what changes alone.
    DeltaWrite,
    /// Shards: a member adds to its parity.
    DeltaAdded,
    /// Shards: a member cannot read the parity that it is to add to.
    DeltaUnreadable,
    /// Shards: committed by a message of its own.
    LazyCommit,
    /// Writes: one came before its predecessor.
    EarlyWrite,
    /// Writes: a member lacks the object, and notes the write.
    NotedWrite,
    /// Recovery: what is under way is given up, because a client writes the object.
    GiveWay,
    /// Writes: one waits, so that recovery of its object can begin.
    WriteWaitsForRecovery,
    /// Writes: a sub-write is sent again.
    WriteAgain,
    /// Writes: a member has refused one.
    WriteRefused,
    /// Writes: there is no room.
    NoRoom,
    /// Writes: one waits for a read under way.
    WriteWaitsForRead,
    /// Reads: one waits for a write under way.
    ReadWaitsForWrite,
    /// Reads: one waits, since the version is in doubt or missing here.
    ReadWaitsForRecovery,
    /// Operations: the lease ran out meanwhile.
    LeaseRanOut,
    /// Peering: a question that came before the map did.
    EarlyQuestion,
    /// Operations: sent back after waiting too long.
    WaitedTooLong,
    /// Operations: of before the interval.
    OldEpoch,
    /// Operations: fenced.
    Fenced,
    /// Operations: to a frozen layer.
    Frozen,
    /// A fence waits for older writes.
    FenceWaits,
    /// What is here of a group is divided.
    Divide,
    /// What is here of several groups is put together.
    Combine,
    /// A copy that is needed no more is deleted.
    DropStray,
    /// Shards: what an earlier place left is deleted.
    NewPlace,
    /// Objects of removed volumes or layers are purged.
    Purge,
    /// The own store refused what it must not.
    Broken,
    /// Scrub: an object is looked at closer.
    ScrubCloser,
    /// Scrub: an object that was written to meanwhile is put off.
    ScrubPutOff,
    /// Scrub: its writes wait.
    ScrubHoldsWrites,
    /// Scrub: writes have waited long enough for it.
    ScrubLetsGo,
    /// Scrub: copies are replaced.
    ScrubReplaces,
    /// Scrub: every copy is unreadable somewhere; they are put together.
    ScrubAssembles,
    /// Scrub: there is no good copy.
    ScrubDamaged,
    /// Scrub: a shard cannot be read.
    ScrubShardUnreadable,
    /// Scrub: a shard is not what the others give.
    ScrubShardWrong,
    /// Scrub: shards do not fit, and which is wrong is unclear.
    ScrubShardsUnclear,
}

/// How often each was taken.
#[derive(Clone, Debug, Default)]
pub struct Branches {
    #[cfg(feature = "mutants")]
    taken: BTreeMap<Branch, u64>,
}

impl Branches {
    #[cfg(feature = "mutants")]
    pub fn take(&mut self, branch: Branch) {
        *self.taken.entry(branch).or_default() += 1;
    }

    #[cfg(not(feature = "mutants"))]
    #[inline(always)]
    pub fn take(&mut self, _branch: Branch) {}

    #[cfg(feature = "mutants")]
    pub fn taken(&self) -> impl Iterator<Item = (Branch, u64)> + '_ {
        self.taken.iter().map(|(b, n)| (*b, *n))
    }
}
