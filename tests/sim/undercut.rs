//! Erasure-coded groups with fewer members than they need to serve, although enough shards are there: those that could
//! fill the empty positions are held back, because another shard of theirs may be needed (rule E5).

use crate::world::World;
use gabion_monitor::decide::SUSPECT_MS;
use gabion_monitor::state::Command;
use gabion_proto::ids::{OsdId, PgId};
use gabion_proto::map::{PgRecord, Redundancy};
use std::collections::BTreeSet;

/// In the tally: a group with too few members has brought them up to date.
pub const FILLED: &str = "too few members brought up to date";
/// In the tally: that was not enough.
const RELIEVED: &str = "fresh disks instead of those held back";

/// Longer than the monitor may take: a member that others accused is left out, and tried again only after [`SUSPECT_MS`].
const PATIENCE_MS: u64 = 2 * SUSPECT_MS;
/// Longer than it takes until what was written is committed.
const QUIET_MS: u64 = 5_000;

impl World {
    /// Disks that were spare stand in for members that are away. Before they have everything as many others are lost for good, if all groups can spare them,
    /// and those that were away come back, to other positions than they had.
    pub fn undercut(&mut self) {
        let Redundancy::Erasure { m, .. } = self.plan.redundancy else { return };
        self.wait_for("clean groups", World::all_clean);
        let acting = |w: &World| first(w).map(|r| r.acting.clone()).unwrap_or_default();
        let before = acting(self);
        let (mut members, spare): (Vec<usize>, Vec<usize>) =
            (0..self.nodes.len()).partition(|n| before.contains(&self.nodes[*n].id));
        if self.rng.chance(700) {
            // What they lack they do not get before the others are lost.
            spare.iter().for_each(|n| self.fill(*n, true));
        }
        // What was being written when the first ones went away, and those that stood in did not get, is all that may be waited for.
        let quiet = self.rng.chance(600);
        if quiet {
            self.drain(true);
            let later = self.now + QUIET_MS;
            self.run_until(later);
        }
        let away = self.draw(&mut members, m as usize);
        for node in &away {
            self.log(|| format!("osd.{node} goes away"));
            let power_fails = self.rng.chance(500);
            self.stop(*node, power_fails);
            self.command(Command::OutOsd { osd: self.nodes[*node].id, automatic: false });
        }
        let gone: Vec<OsdId> = away.iter().map(|n| self.nodes[*n].id).collect();
        let replaced = |r: &PgRecord| r.activated && !r.acting.iter().any(|o| gone.contains(o));
        self.wait_for("spare disks to stand in", |w| first(w).is_some_and(&replaced));
        self.drain(false);
        let soon = self.now + self.rng.below(400);
        self.run_until(soon);
        let mut lost = BTreeSet::new();
        for node in self.draw(&mut members, m as usize) {
            lost.insert(self.nodes[node].id);
            if !self.may_lose(&lost) {
                lost.remove(&self.nodes[node].id);
                continue;
            }
            self.log(|| format!("osd.{node} is lost for good"));
            self.stop(node, true);
            self.nodes[node].disk.forget();
            self.lose(node);
            self.command(Command::OutOsd { osd: self.nodes[node].id, automatic: false });
        }
        for node in away {
            self.command(Command::InOsd { osd: self.nodes[node].id });
            self.start(node);
        }
        let crashes = self.rng.below(3);
        for _ in 0..crashes {
            let next = self.now + self.rng.range(100, 8_000);
            self.run_until(next);
            let node = self.rng.below(self.nodes.len() as u64) as usize;
            self.crash(node);
        }
    }

    /// Groups that are not clean must say that it is because of objects about which only more members can decide: fresh disks, instead of
    /// those that are held back, let them serve.
    pub fn relieve(&mut self) {
        let says = |w: &World, pg: &PgId| -> Vec<String> {
            let statuses = w.nodes.iter().filter_map(|n| n.core.as_ref()).flat_map(|c| c.pg_statuses());
            let of = statuses.filter(|s| s.pool == pg.pool.0 && s.index == pg.index);
            of.map(|s| format!("{:?}: {}", s.state(), s.waiting_for)).collect()
        };
        let waiting = self.monitor.state.map.pgs.clone().into_iter().filter(|(_, r)| !r.clean);
        let mut held_back = BTreeSet::new();
        for (pg, record) in waiting {
            let says = says(self, &pg);
            if !says.iter().any(|s| s.contains("a member of an earlier interval, about")) {
                let why = format!("{pg} does not serve, and waits for no decision about an object: {says:?}");
                return self.finding = Some(format!("{why}\n{}", self.describe()));
            }
            held_back.extend(record.held_back());
        }
        *self.tally.work.entry(RELIEVED).or_default() += 1;
        for osd in held_back {
            self.command(Command::OutOsd { osd, automatic: false });
            self.add_node();
            self.start(self.nodes.len() - 1);
        }
    }

    /// As many shards as decode are left of every interval that may have written. A disk that is spare for one group is a member of others, and
    /// when it was full they may have gone on without it: they can spare fewer.
    fn may_lose(&self, lost: &BTreeSet<OsdId>) -> bool {
        let Redundancy::Erasure { k, .. } = self.plan.redundancy else { return false };
        let left =
            |acting: &[OsdId]| acting.iter().filter(|o| **o != OsdId::NONE && !lost.contains(o)).count();
        self.monitor.state.map.pgs.values().flat_map(|r| r.holders()).all(|acting| left(acting) >= k as usize)
    }

    fn drain(&mut self, draining: bool) {
        self.clients.iter_mut().for_each(|c| c.draining = draining);
    }

    pub fn draw(&mut self, from: &mut Vec<usize>, count: usize) -> Vec<usize> {
        (0..count).map(|_| from.swap_remove(self.rng.below(from.len() as u64) as usize)).collect()
    }

    pub fn wait_for(&mut self, what: &str, done: impl Fn(&World) -> bool) {
        let deadline = self.now + PATIENCE_MS;
        while self.finding.is_none() && !done(self) {
            if self.now >= deadline {
                self.finding = Some(format!("no {what} within {PATIENCE_MS} ms\n{}", self.describe()));
            }
            let next = self.now + 20;
            self.run_until(next);
        }
    }
}

pub fn first(w: &World) -> Option<&PgRecord> {
    w.monitor.state.map.pgs.values().next().map(|r| &**r)
}
