//! Slow disks and nothing else: one of them must be noticed and read around, and when all are, nobody is accused. And a slow disk beside
//! copies that are not the newest: reads must not go around it to those.

use crate::client::VOLUME_OBJECTS;
use crate::network::Slow;
use crate::run::Finding;
use crate::world::{Ev, World};
use gabion_proto::ids::OsdId;
use std::collections::{BTreeMap, BTreeSet};

/// What a slow disk takes longer, at most.
const BY_MS: u64 = 800;
/// By then it must be known.
const KNOWN_AFTER_MS: u64 = 40_000;
/// Fewer reads say nothing.
const READS_MIN: usize = 200;

/// What this scenario measures.
#[derive(Default)]
pub struct Slowness {
    began: Option<u64>,
    /// Whose disks are slow.
    slow: BTreeSet<OsdId>,
    /// Whom the monitors have called slow.
    called: BTreeSet<OsdId>,
    /// How long reads waited for their answer since it must be known.
    waits: Vec<u64>,
}

impl Slowness {
    /// Clients mostly read, and anywhere: reads that wait for writes say nothing of disks.
    pub fn began(&self) -> bool {
        self.began.is_some()
    }

    pub fn read_took(&mut self, now: u64, issued: u64) {
        if self.began.is_some_and(|began| now >= began + KNOWN_AFTER_MS) {
            self.waits.push(now - issued);
        }
    }

    pub fn called(&mut self, slow: impl Iterator<Item = OsdId>) {
        if self.began() {
            self.called.extend(slow);
        }
    }
}

impl World {
    /// The OSD that clients have most to do with.
    fn busiest(&self) -> Option<OsdId> {
        let map = &self.monitor.state.map;
        let mut objects: BTreeMap<OsdId, usize> = BTreeMap::new();
        for (client, index) in self.clients.iter().flat_map(|c| (0..VOLUME_OBJECTS).map(move |n| (c, n))) {
            let pg = map.pg_of(self.pool, client.volume_id, index);
            if let Some(osd) = pg.and_then(|pg| map.pgs.get(&pg)?.primary) {
                *objects.entry(osd).or_default() += 1;
            }
        }
        objects.into_iter().max_by_key(|(_, n)| *n).map(|(osd, _)| osd)
    }

    /// From now on the disk of one OSD, which leads groups, or of all is slow, and nothing else is wrong.
    pub fn slow_down(&mut self, all: bool) {
        self.faults_on = false;
        self.slowness.began = Some(self.now);
        let slow = Slow { until: self.now + self.plan.fault_phase_ms, by_ms: BY_MS };
        let busiest = self.busiest();
        for node in self.nodes.iter_mut().filter(|n| all || Some(n.id) == busiest) {
            node.slow_disk = slow;
            self.slowness.slow.insert(node.id);
        }
        let slow = &self.slowness.slow;
        self.log(|| format!("the disks of {slow:?} are slow from now on"));
    }

    /// From now on the busiest OSD has a slow disk, so that its reads are hedged and recovery takes its time, and the others go away and come
    /// back, one after the other, to what was written meanwhile.
    pub fn make_copies_stale(&mut self) {
        let until = self.now + self.plan.fault_phase_ms;
        let busiest = self.busiest();
        if let Some(node) = self.nodes.iter().position(|n| Some(n.id) == busiest) {
            self.log(|| format!("the disk of osd.{node} is slow from now on"));
            self.nodes[node].slow_disk = Slow { until, by_ms: BY_MS / 2 };
            self.go_away(node);
        }
    }

    /// One that is not the slow one.
    pub fn go_away(&mut self, slow: usize) {
        if !self.faults_on {
            return;
        }
        let others = self.nodes.len() as u64 - 1;
        let node = (slow + 1 + self.rng.below(others) as usize) % self.nodes.len();
        // Longer than its lease: before that nothing is written without it.
        let away_ms = self.rng.range(5_000, 12_000);
        self.crash_for(node, Some(away_ms));
        let wait = away_ms + self.rng.range(3_000, 6_000);
        self.at(wait, Ev::GoAway { slow });
    }

    /// What went wrong, or what was measured.
    pub fn judge_slowness(&self, all: bool) -> Result<String, Finding> {
        let Slowness { slow, called, waits, .. } = &self.slowness;
        let guilty = if all { BTreeSet::new() } else { slow.clone() };
        if *called != guilty {
            return Err(format!("{slow:?} are slow, the monitors called {called:?} so"));
        }
        let stats = self.nodes.iter().filter_map(|n| Some(n.core.as_ref()?.stats()));
        let (reads, hedged) = stats.fold((0, 0), |(r, h), s| (r + s.reads, h + s.hedged_reads));
        let mut waits = waits.clone();
        waits.sort_unstable();
        let of_100 = |n: usize| waits.get(waits.len() * n / 100).copied().unwrap_or(0);
        let measured = format!(
            "{} reads waited {} ms (median), {} ms (90 of 100), {} ms (99 of 100); {hedged} of {reads} hedged",
            waits.len(),
            of_100(50),
            of_100(90),
            of_100(99)
        );
        // A tenth, and what each OSD had saved up.
        let hedged_max = reads / 10 + 40 * self.nodes.len() as u64;
        match all {
            _ if waits.len() < READS_MIN => Err(format!("too few reads: {measured}")),
            true if hedged > hedged_max => Err(format!("too much is asked twice: {measured}")),
            // Three times what is usual, a network that is late included, and the other's answer. Without hedges it is twice as long.
            false if of_100(90) >= BY_MS * 3 / 4 => Err(format!("reads wait for a slow disk: {measured}")),
            _ => Ok(measured),
        }
    }
}
