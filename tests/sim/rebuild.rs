//! Disks are lost and added, one after the other, and what was on them, or is to be, is copied while clients are busy: an operation may
//! take half as long again as it does without that, also the slowest of a hundred. While clients do nothing disks are used fully.

use crate::run::Finding;
use crate::world::{Ev, World};
use std::mem;

pub const VOLUMES: usize = 16;
/// Enough for every disk to be in some.
pub const GROUPS: u32 = 16;
/// Of each disk.
pub const CHUNKS: u32 = 2_200;
pub const PHASE_MS: u64 = 300_000;
/// Clients that do one operation after the other while this is measured: so many that each OSD has some. One that has none does not
/// see whom it disturbs.
const BUSY: usize = 6;
const LOOK_MS: u64 = 50;
/// How long clients are watched while nothing is copied.
const HEALTHY_MS: u64 = 5_000;
/// Something is being copied if something was so long ago.
const MOVED_MS: u64 = 200;
/// Disks that are lost, and as many that are added; with the last two clients do nothing.
const LOST: u32 = 3;
/// Of the wait without recovery, in percent.
const TOLERATED_PERCENT: u64 = 150;
/// Fewer operations say nothing about the slowest of a hundred.
const OPERATIONS_MIN: usize = 1_000;
/// What must be copied in a second at least beside clients, ...
const RATE_MIN: u64 = 8 << 20;
/// ... and beside none: more than half of what a disk can do.
const RATE_IDLE_MIN: u64 = 64 << 20;

/// What this scenario does and measures.
#[derive(Default)]
pub struct Rebuild {
    stage: Stage,
    /// Disks lost or added.
    changes: u32,
    healthy: Vec<u64>,
    beside: Vec<u64>,
    /// What was copied beside clients, and in how many milliseconds; and what beside none.
    copied: [(u64, u64); 2],
}

#[derive(Default, PartialEq, Eq)]
enum Stage {
    #[default]
    NotYet,
    Filling,
    Healthy {
        since: u64,
    },
    Copying(Copying),
    Over,
}

#[derive(PartialEq, Eq)]
struct Copying {
    /// Something was not clean.
    begun: bool,
    bytes: u64,
    /// Since when there was no pause.
    since: u64,
    /// When the last of it was copied.
    last: Option<u64>,
}

impl Rebuild {
    pub fn measures(&self) -> bool {
        !matches!(self.stage, Stage::NotYet | Stage::Filling)
    }

    fn clients_are_idle(&self) -> bool {
        self.changes > 2 * (LOST - 1)
    }

    /// Operations that a client may have under way.
    pub fn in_flight(&self, client: usize) -> Option<usize> {
        self.measures().then_some(usize::from(client < BUSY && !self.clients_are_idle()))
    }

    /// A client's operation was answered.
    pub fn took(&mut self, now: u64, issued: u64) {
        match &self.stage {
            Stage::Healthy { since } if issued > *since + HEALTHY_MS / 10 => self.healthy.push(now - issued),
            Stage::Copying(c) if c.last.is_some() && issued >= c.since => self.beside.push(now - issued),
            _ => {}
        }
    }
}

impl World {
    pub fn go_on_with_rebuild(&mut self) {
        self.faults_on = false;
        self.at(LOOK_MS, Ev::Rebuild);
        let (now, clean, bytes) = (self.now, self.all_clean(), self.recovered_bytes());
        self.rebuild.stage = match mem::replace(&mut self.rebuild.stage, Stage::Over) {
            Stage::NotYet => {
                self.filling.begin(self.clients.len());
                Stage::Filling
            }
            Stage::Filling if self.is_filled() => {
                self.filling.end();
                Stage::Healthy { since: now }
            }
            Stage::Healthy { since } if now > since + HEALTHY_MS => {
                self.lose_or_add_a_disk();
                Stage::Copying(Copying { begun: false, bytes, since: now, last: None })
            }
            Stage::Copying(c) if c.begun && clean && self.rebuild.changes == 2 * LOST => Stage::Over,
            Stage::Copying(c) if c.begun && clean => Stage::Healthy { since: now },
            Stage::Copying(mut c) => {
                c.begun |= !clean;
                if bytes > c.bytes {
                    let idle = usize::from(self.rebuild.clients_are_idle());
                    let from = c.last.unwrap_or(now - LOOK_MS);
                    c.since = if c.last.is_none() { now } else { c.since };
                    self.rebuild.copied[idle].0 += bytes - c.bytes;
                    self.rebuild.copied[idle].1 += now - from;
                    (c.bytes, c.last) = (bytes, Some(now));
                } else if c.last.is_some_and(|last| now > last + MOVED_MS) {
                    c.last = None;
                }
                Stage::Copying(c)
            }
            same => same,
        };
    }

    fn lose_or_add_a_disk(&mut self) {
        let lose = self.rebuild.changes.is_multiple_of(2);
        self.rebuild.changes += 1;
        if !lose {
            self.add_node();
            return self.start(self.nodes.len() - 1);
        }
        let running: Vec<usize> = (0..self.nodes.len()).filter(|n| self.nodes[*n].core.is_some()).collect();
        let Some(node) = self.one_of(&running) else { return };
        self.log(|| format!("osd.{node} is lost for good"));
        self.stop(node, true);
        self.nodes[node].disk.forget();
        self.lose(node);
    }

    /// What went wrong, or what was measured.
    pub fn judge_rebuild(&mut self) -> Result<String, Finding> {
        let Rebuild { stage, healthy, beside, copied, .. } = &mut self.rebuild;
        if *stage != Stage::Over {
            return Err(format!("the rebuilds did not end\n{}", self.describe()));
        }
        healthy.sort_unstable();
        beside.sort_unstable();
        let of_100 = |waits: &[u64], n: usize| waits.get(waits.len() * n / 100).copied().unwrap_or(0);
        let mean = |waits: &[u64]| waits.iter().sum::<u64>() as f64 / waits.len().max(1) as f64;
        let rate = |(bytes, ms): (u64, u64)| bytes * 1_000 / ms.max(1);
        let told = |waits: &[u64]| {
            let (p50, p99, max) = (of_100(waits, 50), of_100(waits, 99), waits.last().copied().unwrap_or(0));
            format!(
                "{} took {:.1} ms (mean), {p50} (median), {p99} (99 of 100), {max} (all)",
                waits.len(),
                mean(waits)
            )
        };
        let [beside_rate, idle_rate] = copied.map(rate);
        let measured = format!(
            "operations: {}; beside recovery {}; copied at {} MiB/s, at {} MiB/s beside idle clients",
            told(healthy),
            told(beside),
            beside_rate >> 20,
            idle_rate >> 20
        );
        let wait = 100 * of_100(beside, 99) > TOLERATED_PERCENT * of_100(healthy, 99);
        match () {
            _ if wait => Err(format!("clients wait for recovery: {measured}")),
            _ if healthy.len().min(beside.len()) < OPERATIONS_MIN => {
                Err(format!("too few operations: {measured}"))
            }
            _ if beside_rate < RATE_MIN || idle_rate < RATE_IDLE_MIN => {
                Err(format!("recovery takes too long: {measured}"))
            }
            _ => Ok(measured),
        }
    }
}
