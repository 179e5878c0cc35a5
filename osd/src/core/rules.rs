//! Rules that can be switched off one at a time in the simulator, which must notice (mutation check).
//!
//! Without the feature `mutants` every rule holds, and the compiler removes the question.

/// A rule of `docs/ARCHITECTURE.md`, as far as the core keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Messages belong to one interval and one run of both processes (P1).
    Intervals,
    /// A sub-write applies to exactly its predecessor (P2).
    VersionOrder,
    /// Only members with the highest activated interval say what an object's version should be (P3).
    Authority,
    /// The activation is durable on every acting member before anything is served (P3).
    ActivationEverywhere,
    /// A member of each earlier interval must have answered (invariant 3).
    Coverage,
    /// Of a member's list only parts that are not the own ones are left out (P10).
    PartsDiffer,
    /// What a member misses is durable with its activation (P4).
    MissingMap,
    /// An object leaves the missing map only when it is stored (P4).
    MissingUntilStored,
    /// What a member keeps of an older copy is what the wanted version has there (P4).
    KeptIsEqual,
    /// While members lack an object it is written only if enough others have it (P4).
    EnoughHold,
    /// A member that lacks an object has noted a write of it durably before the write is answered (P4).
    WritesAreNoted,
    /// What a member lacks is not brought to it while writes of it are in flight (P4).
    RecoveryWaitsForWrites,
    /// A read waits for overlapping writes in flight (P5).
    ReadsWaitForWrites,
    /// A read waits while the authority disagrees about the object (P5).
    ReadsWaitForDoubt,
    /// Reads and answers need the lease (P6).
    Lease,
    /// A write is answered when every acting member has it durable (invariant 1).
    EveryMember,
    /// A member that refused a sub-write does not count as having it (P7).
    Refusals,
    /// Members that owe something are reported (P8).
    StuckReports,
    /// Operations of before the interval are refused (C1).
    OperationEpoch,
    /// Older sessions of the holder are refused (C1).
    Sessions,
    /// Only the holder's generation is served (C2).
    Generations,
    /// A fence is acknowledged when older writes have ended (C3).
    FenceDrains,
    /// A holder writes its top layer and no other (C6).
    FrozenLayers,
    /// A copy is deleted only when the group is clean elsewhere (invariant 8).
    StraysStay,
    /// What an OSD has of a group is divided when its pool has more groups (P9).
    CopiesAreDivided,
    /// So is what it has of groups in which it does not act.
    StraysAreDivided,
    /// That is done before anything else under that map.
    DividedFirst,
    /// What it has of groups that become one is put together (P9).
    PartsAreCombined,
    /// Erasure coding: as many members of each earlier interval as decode must have answered (invariant 3).
    CoverageDecodes,
    /// Erasure coding: a version that a member of its own interval lacks was never acknowledged, and is rolled back.
    RollBack,
    /// Erasure coding: a version replaces the one before it only when every member holds it (invariant 4).
    TwoPhases,
    /// Erasure coding: every write gives all shards the new version (E1).
    AllShards,
    /// Erasure coding: rows are computed from shards of one version only (E2).
    OneVersion,
    /// Erasure coding: what is added to parity is added once, to the version that it names (E2).
    DeltaNamesBase,
    /// Erasure coding: a group with too few members to serve fills empty positions (E5).
    Fill,
    /// Erasure coding: it does so when its members hold everything (E5).
    FillWhole,
    /// A copy that a scrub finds bad is replaced.
    ScrubRepairs,
    /// A read that waits for long is asked of somebody else, too.
    HedgedReads,
    /// Only a member that holds the object is asked, and answers (P5).
    HedgeHolders,
    /// Recovery leaves clients what they need.
    RoomForClients,
}

impl Rule {
    pub const ALL: [Rule; 40] = [
        Rule::Intervals,
        Rule::VersionOrder,
        Rule::Authority,
        Rule::ActivationEverywhere,
        Rule::Coverage,
        Rule::PartsDiffer,
        Rule::MissingMap,
        Rule::MissingUntilStored,
        Rule::KeptIsEqual,
        Rule::EnoughHold,
        Rule::WritesAreNoted,
        Rule::RecoveryWaitsForWrites,
        Rule::ReadsWaitForWrites,
        Rule::ReadsWaitForDoubt,
        Rule::Lease,
        Rule::EveryMember,
        Rule::Refusals,
        Rule::StuckReports,
        Rule::OperationEpoch,
        Rule::Sessions,
        Rule::Generations,
        Rule::FenceDrains,
        Rule::FrozenLayers,
        Rule::StraysStay,
        Rule::CopiesAreDivided,
        Rule::StraysAreDivided,
        Rule::DividedFirst,
        Rule::PartsAreCombined,
        Rule::CoverageDecodes,
        Rule::RollBack,
        Rule::TwoPhases,
        Rule::AllShards,
        Rule::OneVersion,
        Rule::DeltaNamesBase,
        Rule::Fill,
        Rule::FillWhole,
        Rule::ScrubRepairs,
        Rule::HedgedReads,
        Rule::HedgeHolders,
        Rule::RoomForClients,
    ];
}

/// The rules that one core keeps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    #[cfg(feature = "mutants")]
    without: Option<Rule>,
}

impl Rules {
    /// All but one.
    #[cfg(feature = "mutants")]
    pub fn without(rule: Rule) -> Rules {
        Rules { without: Some(rule) }
    }

    #[cfg(feature = "mutants")]
    pub fn keep(self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    #[cfg(not(feature = "mutants"))]
    #[inline(always)]
    pub fn keep(self, _rule: Rule) -> bool {
        true
    }
}
