//! What a seed decides before the run.

use crate::rebuild;
use crate::rng::Rng;
use gabion_osd::core::Rules;
use gabion_proto::map::Redundancy;

/// How long a run is: it goes on until it has all of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    pub operations_min: u64,
    pub faults_min: u64,
    pub map_changes_min: u64,
    pub virtual_ms_min: u64,
    /// Between storms of faults there are quiet stretches, long ones, in which little happens.
    pub quiet: bool,
}

/// A run that is no test of much is not one.
pub const SHORT: Form =
    Form { operations_min: 500, faults_min: 10, map_changes_min: 0, virtual_ms_min: 0, quiet: false };
pub const FULL: Form = Form {
    operations_min: 2_000,
    faults_min: 20,
    map_changes_min: 5,
    virtual_ms_min: 3_600_000,
    quiet: true,
};

fn coded(redundancy: Redundancy) -> bool {
    matches!(redundancy, Redundancy::Erasure { .. })
}

/// What a seed decides before the run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub form: Form,
    pub osds: u32,
    /// At the beginning: a pool may get more copies, or fewer.
    pub redundancy: Redundancy,
    pub volumes: usize,
    /// Per mille of volumes that somebody else reads, beside their holder.
    pub observed: u64,
    /// What a client sends just before it restarts takes long, and may come when its next life holds the volume.
    pub lingering: bool,
    /// Per mille of clients' operations that take until after the next changes of the group.
    pub overdue: u64,
    /// Of the first storm.
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
    /// An erasure-coded group is left with too few members, while others that could join are held back (rule E5).
    TooFewMembers,
    /// The disk of one OSD is slow, or those of all: clients must hardly notice when they read, and the monitors must.
    SlowDisks { all: bool },
    /// Spare disks stand in for more members of an erasure-coded group than it can spare, and all come back (rule P3e).
    StandIns,
    /// One disk is slow, and other OSDs come and go: what they lack must not be read from them (rule P5).
    StaleCopies,
    /// Objects are damaged, one after the other, and repaired.
    Damage,
    /// An OSD is away while little is written: what is brought to it then is in proportion.
    Absence,
    /// Disks are lost and added while clients are busy: they must hardly notice.
    Rebuild,
}

impl Scenario {
    /// As the command line names them.
    pub const NAMES: [(&str, Scenario); 9] = [
        ("faults", Scenario::Faults),
        ("broken-link", Scenario::OneBrokenLink),
        ("slow-disk", Scenario::SlowDisks { all: false }),
        ("slow-disks", Scenario::SlowDisks { all: true }),
        ("stale-copies", Scenario::StaleCopies),
        ("absence", Scenario::Absence),
        ("rebuild", Scenario::Rebuild),
        ("stand-ins", Scenario::StandIns),
        ("damage", Scenario::Damage),
    ];
}

impl Plan {
    pub fn of(rng: &mut Rng, form: Form) -> Plan {
        let redundancy = match rng.below(100) {
            0..45 => Redundancy::Replicated { size: 3 },
            45..60 => Redundancy::Replicated { size: 2 },
            60..82 => Redundancy::Erasure { k: 2, m: 1 },
            82..97 => Redundancy::Erasure { k: 4, m: 2 },
            _ => Redundancy::Erasure { k: 3, m: 2 },
        };
        Plan::with(redundancy, rng, form)
    }

    /// One kind of thing goes wrong and nothing else, in a pool that can go on without one member.
    pub fn in_scenario(scenario: Scenario, pool: Option<Redundancy>, rng: &mut Rng) -> Plan {
        let redundancy = pool.unwrap_or_else(|| match (scenario, rng.chance(500)) {
            (Scenario::StandIns, true) => Redundancy::Erasure { k: 2, m: 1 },
            (_, true) => Redundancy::Replicated { size: 3 },
            (_, false) => Redundancy::Erasure { k: 4, m: 2 },
        });
        let plan = Plan { scenario, ..Plan::with(redundancy, rng, SHORT) };
        match scenario {
            // Long enough to be called slow, and not more work than a slow disk can do.
            Scenario::SlowDisks { .. } => {
                Plan { volumes: 2, observed: 0, fault_phase_ms: 90_000, rot: false, ..plan }
            }
            Scenario::StaleCopies => Plan { rot: false, ..plan },
            // Enough for all members of a group but one to be others.
            Scenario::Damage => {
                let width = redundancy.width() as u32;
                let osds = if coded(redundancy) { width } else { (2 * width - 1).max(3) };
                Plan { osds, rot: false, loss: 0, fault_phase_ms: 90_000, ..plan }
            }
            Scenario::Absence => {
                let (volumes, observed, fault_phase_ms) = (2, 0, 90_000);
                Plan { volumes, observed, fault_phase_ms, rot: false, loss: 0, duplicate: 0, ..plan }
            }
            // Enough to last for seconds, on disks that do one thing at a time.
            Scenario::Rebuild => Plan {
                osds: redundancy.width() as u32 + 2,
                volumes: rebuild::VOLUMES,
                observed: 0,
                fault_phase_ms: rebuild::PHASE_MS,
                loss: 0,
                duplicate: 0,
                rot: false,
                scrub_every_s: (100_000, 100_000),
                chunks: rebuild::CHUNKS,
                ..plan
            },
            // As many as are away at once.
            Scenario::StandIns => {
                let m = match redundancy {
                    Redundancy::Erasure { m, .. } => m,
                    Redundancy::Replicated { .. } => 0,
                };
                let (osds, fault_phase_ms) = (redundancy.width() as u32 + m + 1, 5_000);
                Plan { osds, fault_phase_ms, volumes: 3, rot: false, ..plan }
            }
            Scenario::TooFewMembers => Plan::with_too_few_members(redundancy, rng),
            Scenario::Faults | Scenario::OneBrokenLink => plan,
        }
    }

    /// Min-size is more than decodes, and as many disks are spare as will be lost.
    pub fn with_too_few_members(redundancy: Redundancy, rng: &mut Rng) -> Plan {
        let plan = Plan::with(redundancy, rng, SHORT);
        let m = match redundancy {
            Redundancy::Erasure { m, .. } => m,
            Redundancy::Replicated { .. } => 0,
        };
        Plan {
            scenario: Scenario::TooFewMembers,
            osds: redundancy.width() as u32 + m,
            fault_phase_ms: rng.range(6_000, 12_000),
            rot: false,
            ..plan
        }
    }

    /// What the pool's min-size is, but for what operators do meanwhile.
    pub fn min_size(&self, redundancy: Redundancy) -> u32 {
        match (redundancy, self.scenario) {
            (Redundancy::Replicated { size }, _) => size / 2 + 1,
            (Redundancy::Erasure { k, .. }, Scenario::TooFewMembers) => k + 1,
            (Redundancy::Erasure { k, m }, _) => k + u32::from(m > 1),
        }
    }

    /// Everything else by chance.
    pub fn with(redundancy: Redundancy, rng: &mut Rng, form: Form) -> Plan {
        let width = (redundancy.width() as u64).max(3);
        Plan {
            form,
            osds: rng.range(width, width + 3) as u32,
            redundancy,
            volumes: rng.range(1, 4) as usize,
            observed: [0, 500, 1_000][rng.below(3) as usize],
            lingering: false,
            overdue: 0,
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
}
