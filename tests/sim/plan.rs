//! What a seed decides before the run, and what a run counts.

use crate::rng::Rng;
use gabion_osd::core::Rules;
use gabion_proto::map::Redundancy;

/// What a seed decides before the run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub osds: u32,
    pub redundancy: Redundancy,
    pub volumes: usize,
    pub fault_phase_ms: u64,
    /// Per mille.
    pub loss: u64,
    pub duplicate: u64,
    /// Mean time between faults is half of it.
    pub fault_every_ms: u64,
    /// Bits rot on the first OSD's disk. Such a run loses no disk for good: the other copies must last.
    pub rot: bool,
    /// Light and deep scrubs, in seconds.
    pub scrub_every_s: (u64, u64),
    /// Chunks of each disk.
    pub chunks: u32,
    pub rules: Rules,
    pub scenario: Scenario,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Anything, at random.
    Faults,
    /// One link between two members of a group is cut for good; clients must go on (rule P8).
    OneBrokenLink,
}

impl Plan {
    pub fn of(rng: &mut Rng) -> Plan {
        let redundancy = match rng.below(100) {
            0..45 => Redundancy::Replicated { size: 3 },
            45..60 => Redundancy::Replicated { size: 2 },
            60..82 => Redundancy::Erasure { k: 2, m: 1 },
            82..97 => Redundancy::Erasure { k: 4, m: 2 },
            _ => Redundancy::Erasure { k: 3, m: 2 },
        };
        Plan::with(redundancy, rng)
    }

    /// One link breaks for good, in a group that can go on without one of its members.
    pub fn with_a_broken_link(rng: &mut Rng) -> Plan {
        let redundancy = match rng.chance(500) {
            true => Redundancy::Replicated { size: 3 },
            false => Redundancy::Erasure { k: 4, m: 2 },
        };
        Plan { scenario: Scenario::OneBrokenLink, ..Plan::with(redundancy, rng) }
    }

    /// Everything else by chance.
    pub fn with(redundancy: Redundancy, rng: &mut Rng) -> Plan {
        let width = (redundancy.width() as u64).max(3);
        Plan {
            osds: rng.range(width, width + 3) as u32,
            redundancy,
            volumes: rng.range(1, 4) as usize,
            fault_phase_ms: rng.range(40_000, 120_000),
            loss: [0, 0, 5, 30][rng.below(4) as usize],
            duplicate: [0, 10, 50][rng.below(3) as usize],
            fault_every_ms: rng.range(1_500, 6_000),
            // With one spare shard a member that was away is one failure already.
            rot: rng.chance(300) && !matches!(redundancy, Redundancy::Erasure { m: 1, .. }),
            scrub_every_s: (rng.range(5, 30), rng.range(10, 90)),
            chunks: 300,
            rules: Rules::default(),
            scenario: Scenario::Faults,
        }
    }

    pub fn width(&self) -> usize {
        self.redundancy.width()
    }

    /// Disks that may be lost at once, at any time, without losing what was acknowledged.
    pub fn spare(&self) -> u32 {
        match self.redundancy {
            // Min-size is more than half of them.
            Redundancy::Replicated { size } => size / 2,
            Redundancy::Erasure { m, .. } => m - 1,
        }
    }
}

/// Counters of a run, for honest reports.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub client_ops: u64,
    /// Of all runs added.
    pub least_ops: u64,
    pub least_faults: u64,
    pub reads_checked: u64,
    pub faults: u64,
    /// Faults by kind.
    pub by_kind: std::collections::BTreeMap<&'static str, u64>,
    pub map_epochs: u64,
    pub virtual_ms: u64,
    /// Runs whose last reads were repeated without as many shards as the code can spare.
    pub degraded_checks: u64,
    /// Seeds by redundancy.
    pub scrubs: u64,
    pub scrub_findings: u64,
    pub scrub_repaired: u64,
    pub by_redundancy: std::collections::BTreeMap<String, u64>,
}

impl Tally {
    pub fn fault(&mut self, kind: &'static str) {
        self.faults += 1;
        *self.by_kind.entry(kind).or_default() += 1;
    }

    pub fn add(&mut self, other: &Tally) {
        self.least_ops = self.least_ops.min(other.client_ops);
        self.least_faults = self.least_faults.min(other.faults);
        self.client_ops += other.client_ops;
        self.reads_checked += other.reads_checked;
        self.faults += other.faults;
        self.map_epochs += other.map_epochs;
        self.virtual_ms += other.virtual_ms;
        self.degraded_checks += other.degraded_checks;
        self.scrubs += other.scrubs;
        self.scrub_findings += other.scrub_findings;
        self.scrub_repaired += other.scrub_repaired;
        for (redundancy, n) in &other.by_redundancy {
            *self.by_redundancy.entry(redundancy.clone()).or_default() += n;
        }
        for (kind, n) in &other.by_kind {
            *self.by_kind.entry(kind).or_default() += n;
        }
    }
}
