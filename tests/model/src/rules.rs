//! The rules of the protocol that the models can go without, one at a time: each must be missed.

use std::fmt;

/// A rule of `docs/protocol.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// P1: a restart of a member begins a new interval.
    RestartsCount,
    /// P1: a member that knows of a newer interval takes nothing of an older one.
    OldIntervalsEnd,
    /// P2: a sub-write applies to exactly the version before it.
    VersionOrder,
    /// P3: only members with the highest activated interval say what the object should be.
    Authority,
    /// P3: the activation is durable at every acting member before anything is served.
    ActivationEverywhere,
    /// P3: it is recorded by the monitors, too.
    ActivationRecorded,
    /// P3: a member of each earlier interval that may have taken writes has answered.
    Coverage,
    /// P3: a version about which the authority disagrees is not read before every member has it.
    DoubtIsHidden,
    /// P3: a version is given up only if it is marked as uncertain.
    OnlyDoubtGoesBack,
    /// P3: a member denies a version only for the last interval that may have served.
    OnlyTheLastDenies,
    /// P4: what a member lacks is durable with its activation.
    MissingIsDurable,
    /// P4: an object leaves the missing map in the transaction that stores it.
    MissingUntilStored,
    /// P4: while a member lacks the object it is written only if enough others have it.
    EnoughHold,
    /// P4: a member that lacks the object has noted a write of it, durably, before the write is answered.
    WritesAreNoted,
    /// P4: what a member lacks is not brought to it while writes of it are in flight.
    RecoveryWaitsForWrites,
    /// P4: the monitors hear that a group is clean when no member lacks anything.
    CleanIsWhole,
    /// P5: a read waits for writes in flight.
    ReadsWait,
    /// P5: a write waits for reads in flight.
    WritesWaitForReads,
    /// Invariant 1: a write is answered when every acting member has it.
    EveryMember,
    /// P6: operations need the lease, and only who has none is called down.
    Lease,
    /// P6: a group activates when earlier primaries that are up know that they are none any more.
    EarlierPrimaries,
    /// P9: a copy is deleted when the monitors' record says that the group is clean without it.
    StraysStay,
    /// C1: operations of before the interval are refused.
    OperationEpoch,
    /// C1: a client's newer connection ends its older ones.
    Connections,
    /// C1, C2: only the operations of the holder in the map are taken.
    Holder,
    /// C3: an attachment is answered when every OSD that is up knows of it.
    FenceFirst,
    /// C3: with older operations drained.
    FenceDrains,
}

impl Rule {
    pub const ALL: [Rule; 27] = [
        Rule::RestartsCount,
        Rule::OldIntervalsEnd,
        Rule::VersionOrder,
        Rule::Authority,
        Rule::ActivationEverywhere,
        Rule::ActivationRecorded,
        Rule::Coverage,
        Rule::DoubtIsHidden,
        Rule::OnlyDoubtGoesBack,
        Rule::OnlyTheLastDenies,
        Rule::MissingIsDurable,
        Rule::MissingUntilStored,
        Rule::EnoughHold,
        Rule::WritesAreNoted,
        Rule::RecoveryWaitsForWrites,
        Rule::CleanIsWhole,
        Rule::ReadsWait,
        Rule::WritesWaitForReads,
        Rule::EveryMember,
        Rule::Lease,
        Rule::EarlierPrimaries,
        Rule::StraysStay,
        Rule::OperationEpoch,
        Rule::Connections,
        Rule::Holder,
        Rule::FenceFirst,
        Rule::FenceDrains,
    ];
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
