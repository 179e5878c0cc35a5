//! One OSD is away while little is written to objects that are full: what is brought to it when it is back is little, too.

use crate::run::Finding;
use crate::world::{Ev, World};
use gabion_proto::limits::LEAF_BYTES;
use gabion_proto::map::Redundancy;

/// Every written block may make one leaf differ. Some are brought twice: an object that is written to while it is under way.
const TIMES_MAX: u64 = 2;
const LOOK_MS: u64 = 500;

/// What this scenario does and measures.
#[derive(Default)]
pub struct Absence {
    stage: Stage,
}

#[derive(Default, PartialEq, Eq)]
enum Stage {
    #[default]
    NotYet,
    Filling,
    Away {
        node: usize,
        until: u64,
        moved: u64,
        written: u64,
    },
    Over {
        moved_bytes: u64,
        written_blocks: u64,
    },
}

impl Absence {
    /// From now on clients do little.
    pub fn is_quiet(&self) -> bool {
        matches!(self.stage, Stage::Away { .. } | Stage::Over { .. })
    }
}

impl World {
    pub fn recovered_bytes(&self) -> u64 {
        let running = self.nodes.iter().filter_map(|n| Some(n.core.as_ref()?.stats().recovered_bytes));
        self.tally.recovered_bytes + running.sum::<u64>()
    }

    /// All volumes are full, and nothing is under way.
    pub fn is_filled(&self) -> bool {
        self.filling.is_full() && self.all_clean() && self.clients.iter().all(|c| c.ops.is_empty())
    }

    pub fn go_on_with_absence(&mut self) {
        self.faults_on = false;
        self.at(LOOK_MS, Ev::Absence);
        match self.absence.stage {
            Stage::NotYet => {
                self.filling.begin(self.clients.len());
                self.absence.stage = Stage::Filling;
            }
            Stage::Filling => {
                if self.is_filled() {
                    self.filling.end();
                    let node = self.rng.below(self.nodes.len() as u64) as usize;
                    // Longer than its lease: before that nothing is written without it.
                    let away_ms = self.rng.range(8_000, 18_000);
                    let (moved, written) = (self.recovered_bytes(), self.tally.written_blocks);
                    self.absence.stage = Stage::Away { node, until: self.now + away_ms, moved, written };
                    self.crash_for(node, Some(away_ms));
                }
            }
            Stage::Away { node, until, moved, written } => {
                let back = self.now > until + 3_000 && self.nodes[node].core.is_some();
                if back && self.all_clean() {
                    let moved_bytes = self.recovered_bytes() - moved;
                    let written_blocks = self.tally.written_blocks - written;
                    self.absence.stage = Stage::Over { moved_bytes, written_blocks };
                }
            }
            Stage::Over { .. } => {}
        }
    }

    /// What went wrong, or what was measured.
    pub fn judge_absence(&self) -> Result<String, Finding> {
        let Stage::Over { moved_bytes, written_blocks } = self.absence.stage else {
            return Err(format!("the absence did not end\n{}", self.describe()));
        };
        let measured = format!("{moved_bytes} bytes were moved after {written_blocks} blocks were written");
        // A shard that may have to go back, because its write was under way when the OSD went, comes whole.
        let coded = matches!(self.redundancy(), Redundancy::Erasure { .. });
        match coded || moved_bytes <= TIMES_MAX * written_blocks * u64::from(LEAF_BYTES) {
            true => Ok(measured),
            false => Err(format!("too much is brought: {measured}")),
        }
    }
}
