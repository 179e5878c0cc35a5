//! The configurations that are searched.

use crate::group::Event::{self, *};
use crate::group::{Group, Next};
use crate::rules::Rule;

/// A configuration, and what must happen somewhere in it.
pub struct Configuration {
    pub name: &'static str,
    pub group: Group,
    pub reaches: &'static [Event],
    /// Too large for every run of the tests.
    pub long: bool,
}

const ONE_WRITE: &[(u8, u8)] = &[(0, 0)];
/// One after the other.
const TWO_WRITES: &[(u8, u8)] = &[(0, 0), (0, 0)];
const THREE_WRITES: &[(u8, u8)] = &[(0, 0), (0, 0), (0, 0)];
/// At the same time.
const TWO_BLOCKS: &[(u8, u8)] = &[(0, 0), (0, 1)];
const TWO_HOLDERS: &[(u8, u8)] = &[(0, 0), (1, 0)];
const THREE_HOLDERS: &[(u8, u8)] = &[(0, 0), (1, 0), (2, 0)];

/// A pool of two copies over three OSDs.
const MOVING: Group = Group { osds: 3, moves: true, ..Group::TWO };

/// All configurations.
pub fn all() -> Vec<Configuration> {
    let short = |name, group, reaches| Configuration { name, group, reaches, long: false };
    let long = |name, group| Configuration { name, group, reaches: &[], long: true };
    let three = |changes, script, sends| Group { changes, script, sends, ..Group::THREE };
    let two = |changes, script, sends| Group { changes, script, sends, ..Group::TWO };
    // A new member misses the first write and notes the second; the third is on one disk.
    let moving = Group { changes: 3, script: THREE_WRITES, ..MOVING };
    let noted = Configuration { reaches: &[WentOn], ..long("moves, three writes", moving) };
    let held = |changes, next_holders| Group { next_holders, ..three(changes, TWO_HOLDERS, 2) };
    vec![
        short(
            "three copies",
            three(3, ONE_WRITE, 1),
            &[
                RolledForward,
                WentBack,
                HalfActivated,
                OldIntervalNeeded,
                DegradedWrite,
                EarlierPrimaryAwaited,
            ],
        ),
        short(
            "three copies, retries",
            three(2, TWO_WRITES, 2),
            &[OldOperationRefused, LateTwin, ConnectionSuperseded, NotedWrite],
        ),
        short("three copies, two blocks", three(2, TWO_BLOCKS, 1), &[RolledForward, SubWriteRefused]),
        short("two copies", two(4, TWO_WRITES, 1), &[WentBack, DegradedWrite, OldIntervalNeeded, NotedWrite]),
        short("two copies, retries", two(3, TWO_WRITES, 2), &[LateTwin]),
        short(
            "two copies, timeouts",
            Group { gives_up: true, ..two(3, TWO_WRITES, 1) },
            &[OldOperationRefused],
        ),
        short(
            "three copies, timeouts",
            Group { gives_up: true, ..three(2, TWO_WRITES, 2) },
            &[OldOperationRefused, ConnectionSuperseded],
        ),
        short("two copies, slow reads", Group { slow_reads: true, ..two(2, ONE_WRITE, 1) }, &[WriteWaited]),
        short(
            "moves",
            Group { changes: 2, script: ONE_WRITE, ..MOVING },
            &[StrayDropped, Recovered, Denied, NotedWrite],
        ),
        short("take-over", held(1, &[Next::TakeOver]), &[FencedRefused, FenceAwaited]),
        short(
            "take-over of two copies",
            Group { next_holders: &[Next::TakeOver], ..two(2, TWO_HOLDERS, 2) },
            &[FencedRefused, FenceAwaited, EarlierPrimaryAwaited],
        ),
        short("restart", held(1, &[Next::Restart]), &[FencedRefused, ConnectionSuperseded]),
        short(
            "restart and take-over",
            Group { next_holders: &[Next::Restart, Next::TakeOver], ..two(2, THREE_HOLDERS, 1) },
            &[FencedRefused],
        ),
        long("three copies, longer", three(4, ONE_WRITE, 1)),
        long("three copies, longer retries", three(3, TWO_WRITES, 2)),
        long("three copies, longer two blocks", three(3, TWO_BLOCKS, 1)),
        long("two copies, longer", two(5, ONE_WRITE, 2)),
        noted,
        long("moves, longer", Group { changes: 3, script: ONE_WRITE, ..MOVING }),
        long("take-over, longer", held(2, &[Next::TakeOver])),
        long("restart, longer", held(2, &[Next::Restart])),
    ]
}

/// Where the lack of a rule shows with little effort. `None`: nothing that clients can see depends on it here
/// (`docs/protocol.md` says what does).
pub fn where_missed(rule: Rule) -> Option<Group> {
    let two = |changes, script, sends| Group { changes, script, sends, ..Group::TWO };
    let moving = Group { changes: 2, script: ONE_WRITE, ..MOVING };
    let held = Group { next_holders: &[Next::TakeOver], ..two(1, TWO_HOLDERS, 1) };
    Some(match rule {
        Rule::VersionOrder => two(0, TWO_BLOCKS, 1),
        Rule::RestartsCount => two(1, TWO_BLOCKS, 1),
        Rule::ActivationRecorded | Rule::Lease => two(1, ONE_WRITE, 1),
        Rule::ActivationEverywhere
        | Rule::DoubtIsHidden
        | Rule::MissingUntilStored
        | Rule::ReadsWait
        | Rule::EveryMember
        | Rule::EarlierPrimaries => two(2, ONE_WRITE, 1),
        Rule::MissingIsDurable => two(3, ONE_WRITE, 1),
        Rule::WritesWaitForReads => Group { slow_reads: true, ..two(1, ONE_WRITE, 1) },
        Rule::Coverage
        | Rule::CleanIsWhole
        | Rule::StraysStay
        | Rule::OnlyDoubtGoesBack
        | Rule::OnlyTheLastDenies
        | Rule::WritesAreNoted
        | Rule::RecoveryWaitsForWrites => moving,
        Rule::EnoughHold => Group { min_size: 2, ..moving },
        Rule::OldIntervalsEnd | Rule::Holder | Rule::FenceFirst => held,
        Rule::Authority => Group { changes: 2, ..held },
        Rule::Connections => two(1, TWO_WRITES, 2),
        Rule::OperationEpoch => Group { gives_up: true, ..two(3, TWO_WRITES, 1) },
        Rule::FenceDrains => return None,
    })
}
