//! What goes wrong, and what operators do meanwhile; and how everything heals.

use crate::client::ClientEvent;
use crate::network::{Place, Slow};
use crate::nodes::Node;
use crate::world::{Ev, Pace, World};
use gabion_monitor::state::Command;
use gabion_monitor::state::slow::SlowPolicy;
use gabion_proto::map::Redundancy;

/// What an event is to the tally.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sort {
    Fault,
    /// Operators change the map.
    Change,
    /// Operators and clients do something else; counted where it is done.
    Work,
}
use Sort::{Change, Fault, Work};

/// What happens and how often each is drawn.
const KINDS: [(&str, u64, Sort); 38] = [
    ("crash", 24, Fault),
    ("absence", 2, Fault),
    ("disk error", 6, Fault),
    ("pause", 9, Fault),
    ("client pause", 4, Fault),
    ("slow disk", 6, Fault),
    ("slow node", 4, Fault),
    ("cut", 13, Fault),
    ("alone with the monitor", 3, Fault),
    ("stranded primary", 4, Fault),
    ("client cut", 5, Fault),
    ("cuts heal", 9, Work),
    ("monitor restart", 5, Fault),
    ("crash of all", 3, Fault),
    ("disk loss", 2, Fault),
    ("bit rot", 6, Fault),
    ("cold rot", 12, Fault),
    ("wrong bytes", 12, Fault),
    ("rot everywhere", 6, Fault),
    ("lone copy rots", 6, Fault),
    ("full disk", 4, Fault),
    ("client restart", 5, Fault),
    ("two crashes", 3, Fault),
    ("crash of a group", 2, Fault),
    ("out", 3, Change),
    ("in", 4, Change),
    ("reweight", 3, Change),
    ("min-size", 1, Change),
    ("pool size", 2, Change),
    ("more groups", 3, Change),
    ("fewer groups", 3, Change),
    ("drain", 2, Change),
    ("new host", 2, Change),
    ("take-over", 4, Work),
    ("volume removed", 1, Work),
    ("snapshot", 12, Work),
    ("snapshot removed", 2, Work),
    ("slow policy", 2, Work),
];

/// Nodes that there may be at once, and ever.
const NODES_MAX: usize = 8;
const NODES_EVER: usize = 24;
/// What a client sends in this time before it restarts may linger, for longer than its next life needs to hold the volume.
const LAST_WORDS_MS: u64 = 200;
const LINGERS_MS: u64 = 2_000;
/// Groups of the pool.
const GROUPS_MIN: u32 = 2;
const GROUPS_MAX: u32 = 16;
/// How often a drained OSD is looked at.
const DRAIN_CHECK_MS: u64 = 1_000;

impl World {
    pub fn fault(&mut self, chain: u64) {
        self.rotting &= !self.scrubs_done();
        if self.rotting || self.damage.is_some() {
            return self.at(200, Ev::Fault { chain });
        }
        let total: u64 = KINDS.iter().map(|(_, n, _)| n).sum();
        let mut drawn = self.rng.below(total);
        let kind = KINDS.iter().find(|(_, n, _)| {
            let hit = drawn < *n;
            drawn = drawn.saturating_sub(*n);
            hit
        });
        let Some((kind, _, sort)) = kind else { return };
        let before = self.monitor.state.map.epoch;
        let done = self.inject(kind);
        match sort {
            Fault if done => *self.tally.faults.entry(kind).or_default() += 1,
            Change if self.monitor.state.map.epoch != before => {
                *self.tally.changes.entry(kind).or_default() += 1;
            }
            _ => {}
        }
        let every = match self.pace {
            Pace::Storm => self.plan.fault_every_ms,
            Pace::Quiet => 40 * self.plan.fault_every_ms,
        };
        let wait = self.rng.range(1, every);
        self.at(wait, Ev::Fault { chain });
    }

    /// False: not now.
    fn inject(&mut self, kind: &str) -> bool {
        let nodes: Vec<usize> = (0..self.nodes.len()).filter(|n| !self.nodes[*n].lost).collect();
        let clients: Vec<usize> = (0..self.clients.len()).filter(|c| !self.clients[*c].has_ended()).collect();
        let (Some(node), Some(client)) = (self.one_of(&nodes), self.one_of(&clients)) else { return false };
        let (alive, runs) = (nodes.len(), self.nodes[node].core.is_some());
        let inside = self.monitor.state.map.osds.values().filter(|o| o.in_cluster).count();
        let (osd, width) = (self.nodes[node].id, self.width());
        match kind {
            "crash" if runs => self.crash(node),
            "absence" if runs => {
                let ms = self.long_absence();
                self.crash_for(node, Some(ms));
            }
            "two crashes" if runs => {
                self.crash(node);
                let other = self.rng.below(self.nodes.len() as u64) as usize;
                self.crash(other);
            }
            "crash of a group" => {
                let groups: Vec<_> = self.monitor.state.map.pgs.values().map(|r| r.acting.clone()).collect();
                let group = &groups[self.rng.below(groups.len() as u64) as usize];
                for n in 0..self.nodes.len() {
                    if group.contains(&self.nodes[n].id) {
                        self.crash(n);
                    }
                }
            }
            "crash of all" => (0..self.nodes.len()).for_each(|n| self.crash(n)),
            "disk error" if runs => {
                let after = self.rng.below(12);
                self.nodes[node].disk.fail_after(after);
            }
            "pause" if runs => {
                let ms = self.rng.range(200, 9_000);
                self.log(|| format!("osd.{node} pauses for {ms} ms"));
                // What came before sleeps as long as it was told.
                let node = &mut self.nodes[node];
                node.paused_until = node.paused_until.max(self.now + ms);
                node.asleep_until = node.asleep_until.max(node.paused_until);
            }
            "client pause" => {
                let ms = self.rng.range(200, 12_000);
                self.log(|| format!("client {client} pauses for {ms} ms"));
                let until = &mut self.clients[client].paused_until;
                *until = (*until).max(self.now + ms);
            }
            "slow disk" if runs => {
                let ms = match self.pace {
                    Pace::Storm => self.rng.range(2_000, 30_000),
                    // Long enough to be taken out, if the policy is so.
                    Pace::Quiet => self.rng.range(20_000, 240_000),
                };
                let by_ms = self.rng.range(50, 3_000);
                self.log(|| format!("the disk of osd.{node} is slower by {by_ms} ms for {ms} ms"));
                self.nodes[node].slow_disk = Slow { until: self.now + ms, by_ms };
            }
            "slow node" if runs => {
                let (ms, by_ms) = (self.rng.range(2_000, 30_000), self.rng.range(20, 800));
                self.log(|| format!("osd.{node} answers later by {by_ms} ms for {ms} ms"));
                self.nodes[node].slow_net = Slow { until: self.now + ms, by_ms };
            }
            "stranded primary" => self.strand_a_primary(client),
            "cut" => {
                // One-way or full, between two nodes or a node and the monitor.
                let other = self.rng.below(alive as u64 + 1) as usize;
                let to = nodes.get(other).map_or(Place::Monitor, |n| Place::Node(*n));
                return self.cut(Place::Node(node), to);
            }
            "alone with the monitor" => {
                // It keeps its lease and can only accuse the others.
                self.log(|| format!("cut between osd.{node} and every other node"));
                for other in (0..self.nodes.len()).filter(|o| *o != node) {
                    let (here, there) = (Place::Node(node), Place::Node(other));
                    self.network.cut.extend([(here, there), (there, here)]);
                }
            }
            "client cut" => {
                let to = if self.rng.chance(300) { Place::Monitor } else { Place::Node(node) };
                return self.cut(Place::Client(client), to);
            }
            "cuts heal" => {
                self.log(|| "all cuts heal".into());
                self.network.cut.clear();
            }
            "monitor restart" => {
                let down = if self.rng.chance(500) { 0 } else { self.rng.range(100, 8_000) };
                self.restart_monitor(down);
            }
            "disk loss" => {
                if self.plan.rot || alive <= width.max(3) || !self.may_lose_one() {
                    return false;
                }
                self.log(|| format!("osd.{node} is lost for good"));
                self.stop(node, true);
                self.nodes[node].disk.forget();
                self.lose(node);
                self.lost_one = true;
            }
            "bit rot" => {
                // While every other copy is good: a lone copy of what nobody acknowledged may rot, too.
                let all_run = self.nodes.iter().all(|n| n.lost || n.core.is_some());
                if !self.plan.rot || !all_run || !self.all_clean() {
                    return false;
                }
                self.rotten = true;
                let reads = self.rng.range(1, 4);
                self.log(|| format!("the disk of osd.0 rots under its next {reads} reads"));
                self.nodes[0].disk.rot_under_reads(reads);
            }
            "cold rot" => {
                // Nor is a disk about to fail: that would be one failure more than there are copies for.
                let runs =
                    |n: &Node| n.core.is_some() && n.asleep_until <= self.now && !n.disk.is_in_trouble();
                let well = |n: &Node| n.lost || runs(n);
                let all_well = self.nodes.iter().all(well) && self.network.cut.is_empty();
                // The monitor may not have noticed yet that one is lost.
                let lost: Vec<_> = self.nodes.iter().filter(|n| n.lost).map(|n| n.id).collect();
                let mut members = self.monitor.state.map.pgs.values().flat_map(|r| &r.acting);
                let away = members.any(|o| lost.contains(o));
                // Nor that one has not answered for so long that it will be left out.
                let owed = self.nodes.iter().filter_map(|n| n.core.as_ref()).any(|c| c.client_ops() > 0);
                // What just rotted is repaired first.
                let repaired = self.all_clean() && self.scrubs_done();
                if !all_well || away || owed || !self.monitor_runs() || !repaired {
                    return false;
                }
                self.rotting = self.rot_cold();
                return self.rotting;
            }
            "wrong bytes" | "rot everywhere" | "lone copy rots" => return self.damage(kind),
            "full disk" => {
                let (reserve, ms) = (self.rng.chance(500), self.rng.range(1_000, 20_000));
                self.log(|| format!("the disk of osd.{node} is full for {ms} ms"));
                self.fill(node, reserve);
                self.at(ms, Ev::Unfill { node });
            }
            "slow policy" if self.monitor_runs() => {
                let evict_after_s = [0, 60][self.rng.below(2) as usize];
                let limit_ms = self.rng.range(4_000, 15_000);
                self.command(Command::SetSlowPolicy(SlowPolicy { evict_after_s, limit_ms }));
            }
            "out" if self.monitor_runs() && inside > width => {
                self.command(Command::OutOsd { osd, automatic: false });
            }
            "in" if self.monitor_runs() => {
                self.command(Command::InOsd { osd });
            }
            "reweight" if self.monitor_runs() => {
                let weight = self.rng.range(30_000, 130_000) as u32;
                self.command(Command::ReweightOsd { osd, weight });
            }
            "min-size" if self.monitor_runs() => {
                let min_size = match self.redundancy() {
                    Redundancy::Replicated { size } => {
                        self.rng.range(u64::from(size.min(2)), u64::from(size) + 1)
                    }
                    Redundancy::Erasure { k, m } => {
                        self.rng.range(u64::from(k) + u64::from(m > 1), u64::from(k + m) + 1)
                    }
                };
                self.command(Command::SetPool { name: "p".into(), min_size: Some(min_size as u32) });
            }
            "pool size" if self.monitor_runs() => return self.resize_pool(),
            "more groups" if self.monitor_runs() => return self.divide_groups(),
            "fewer groups" if self.monitor_runs() => return self.merge_groups(),
            // Of those that are in there must be enough on other nodes, and the process must be there to be drained.
            "drain" if self.monitor_runs() && inside > width && alive > width.max(3) => {
                if self.plan.rot || !runs {
                    return false;
                }
                self.log(|| format!("osd.{node} is drained"));
                self.command(Command::OutOsd { osd, automatic: false });
                let run = self.nodes[node].run;
                self.at(DRAIN_CHECK_MS, Ev::Drained { node, run });
            }
            "client restart" => {
                self.log(|| format!("client {client} restarts"));
                let before = if self.plan.lingering { LAST_WORDS_MS } else { 1 };
                if self.plan.lingering {
                    let until = self.now + LAST_WORDS_MS;
                    self.network.slow_clients.insert(client, Slow { until, by_ms: LINGERS_MS });
                }
                self.at(before, Ev::Client { client, event: ClientEvent::Crash });
            }
            "take-over" => {
                self.log(|| format!("the volume of client {client} is taken over"));
                self.take_over(client);
            }
            "volume removed" if self.monitor_runs() => self.remove_volume(client),
            "snapshot" if self.monitor_runs() => return self.ask_for_snapshot(client),
            "snapshot removed" if self.monitor_runs() => return self.remove_snapshot(),
            "new host" if self.monitor_runs() && alive < NODES_MAX && self.nodes.len() < NODES_EVER => {
                self.add_node();
                let node = self.nodes.len() - 1;
                self.start(node);
            }
            _ => return false,
        }
        true
    }

    /// A disk that fails while somebody else fills it has failed for its OSD, too.
    pub fn fill(&mut self, node: usize, reserve: bool) {
        if !self.nodes[node].disk.fill(reserve) {
            self.store_died(node);
        }
    }

    pub fn unfill(&mut self, node: usize) {
        if !self.nodes[node].disk.unfill() {
            self.store_died(node);
        }
    }

    /// Blocks that nobody reads rot, on as few disks that every object still has a good copy, and a scrub is asked for.
    pub fn rot_cold(&mut self) -> bool {
        let spare = match self.redundancy() {
            Redundancy::Replicated { size } => size - 1,
            Redundancy::Erasure { m, .. } => m,
        };
        // Reads of another disk must find what they look for.
        self.nodes[0].disk.rot_under_reads(0);
        let disks = self.rng.range(1, u64::from(spare) + 1) as usize;
        let mut rots = false;
        for node in self.some_running(disks) {
            let blocks = self.rng.range(1, 40) as usize;
            self.log(|| format!("{blocks} blocks of osd.{node} rot"));
            rots |= self.nodes[node].disk.rot_cold(blocks);
        }
        self.rotten |= rots;
        self.command(Command::RequestScrub { pool: None, pg: None, deep: true });
        rots
    }

    /// A primary does not hear of the monitors any more, and some who use a volume neither: they go on as if nothing had happened.
    /// The others go on without it, maybe with another holder of that volume.
    fn strand_a_primary(&mut self, client: usize) {
        let groups: Vec<_> = self.monitor.state.map.pgs.values().filter_map(|r| r.primary).collect();
        if groups.is_empty() {
            return;
        }
        let osd = groups[self.rng.below(groups.len() as u64) as usize];
        let mut places: Vec<Place> =
            self.nodes.iter().position(|n| n.id == osd).map(Place::Node).into_iter().collect();
        let volume = self.clients[client].volume;
        for c in 0..self.clients.len() {
            if self.clients[c].volume == volume && self.rng.chance(600) {
                places.push(Place::Client(c));
            }
        }
        self.log(|| format!("{places:?} lose the monitor"));
        for place in places {
            self.network.cut.extend([(place, Place::Monitor), (Place::Monitor, place)]);
        }
        if self.rng.chance(400) {
            let wait = self.rng.range(1, 8_000);
            self.at(wait, Ev::TakeOver { client });
        }
    }

    /// False: there are enough.
    fn divide_groups(&mut self) -> bool {
        let had = self.monitor.state.map.pools.get(&self.pool).map_or(GROUPS_MAX, |p| p.pg_count);
        let factor = if self.rng.chance(200) { 4 } else { 2 };
        if had * factor > GROUPS_MAX {
            return false;
        }
        self.command(Command::SetPgs { name: "p".into(), pg_count: had * factor });
        true
    }

    /// They become fewer when all are clean, unless there are to be more again by then. False: there are few.
    fn merge_groups(&mut self) -> bool {
        let had = self.monitor.state.map.pools.get(&self.pool).map_or(0, |p| p.pg_count);
        let factor = if self.rng.chance(200) { 4 } else { 2 };
        if had < GROUPS_MIN * factor {
            return false;
        }
        self.command(Command::SetPgs { name: "p".into(), pg_count: had / factor });
        true
    }

    /// A pool keeps one copy more, or less. False: not now.
    fn resize_pool(&mut self) -> bool {
        let Redundancy::Replicated { size: size @ (2 | 3) } = self.redundancy() else { return false };
        let inside = self.monitor.state.map.osds.values().filter(|o| o.in_cluster).count();
        let replicas = 5 - size;
        if inside < replicas as usize {
            return false;
        }
        self.copies_min = self.copies_min.min(size).min(replicas);
        self.command(Command::SetReplicas { name: "p".into(), replicas, min_size: Some(2) });
        true
    }

    /// An OSD that was taken out is removed when nothing needs it any more.
    pub fn remove_drained(&mut self, node: usize, run: u64) {
        let osd = self.nodes[node].id;
        let is_out = self.monitor.state.map.osds.get(&osd).is_some_and(|o| !o.in_cluster);
        if !self.live(node, run) || !is_out || !self.faults_on {
            return;
        }
        let needed = |w: &World| {
            let mut groups = w.monitor.state.map.pgs.values();
            groups.any(|r| r.all_known().contains(&osd) || r.up.contains(&osd))
        };
        let alive = self.nodes.iter().filter(|n| !n.lost).count();
        if alive <= self.width().max(3) {
            // Another one was lost meanwhile: it must stay.
            self.command(Command::InOsd { osd });
            return;
        }
        if needed(self) || !self.reaches_monitor(Place::Node(node)) {
            return self.at(DRAIN_CHECK_MS, Ev::Drained { node, run });
        }
        self.log(|| format!("osd.{node} is drained: nothing needs it"));
        self.stop(node, false);
        self.goodbye(node);
        if self.command(Command::RemoveOsd { osd, force: false }).is_none() {
            self.finding = Some(format!("osd.{node} was drained and cannot be removed"));
        }
        self.lose(node);
        self.nodes[node].disk.forget();
        *self.tally.changes.entry("drained and removed").or_default() += 1;
    }

    /// What operators do when everything is clean: lost disks are removed, and volumes with many layers.
    pub fn tidy(&mut self) {
        let lost: Vec<_> = self.nodes.iter().filter(|n| n.lost).map(|n| n.id).collect();
        for osd in lost {
            let known = self.monitor.state.map.osds.get(&osd);
            let out = known.is_some_and(|o| !o.in_cluster && !o.up);
            if out && self.command(Command::RemoveOsd { osd, force: false }).is_some() {
                *self.tally.changes.entry("lost disk removed").or_default() += 1;
            }
        }
        self.remove_layered_volumes();
    }

    /// The primary of a group and another member of it cannot talk any more; everything else is well.
    pub fn break_link(&mut self) {
        let Some(record) = self.monitor.state.map.pgs.values().find(|r| r.acting.len() > 1) else { return };
        let (one, other) = (record.acting[0], record.acting[1]);
        let place = |osd| self.nodes.iter().position(|n| n.id == osd).map(Place::Node);
        if let (Some(one), Some(other)) = (place(one), place(other)) {
            self.log(|| format!("the link between {one:?} and {other:?} breaks"));
            self.network.cut.insert((one, other));
            self.network.cut.insert((other, one));
        }
    }

    /// False: that is one place.
    fn cut(&mut self, from: Place, to: Place) -> bool {
        if from == to {
            return false;
        }
        let (one, both) = (self.rng.chance(200), self.rng.chance(500));
        self.log(|| format!("cut between {from:?} and {to:?}"));
        if both || one {
            self.network.cut.insert((to, from));
        }
        if both || !one {
            self.network.cut.insert((from, to));
        }
        true
    }

    pub fn one_of(&mut self, choices: &[usize]) -> Option<usize> {
        let at = self.rng.below(choices.len().max(1) as u64) as usize;
        choices.get(at).copied()
    }

    /// Three copies, or two parity shards, survive the loss of any one disk at any time; others once everything is clean.
    fn may_lose_one(&mut self) -> bool {
        // The monitor may not have noticed the last loss yet.
        let lost: Vec<_> = self.nodes.iter().filter(|n| n.lost).map(|n| n.id).collect();
        let mut members = self.monitor.state.map.pgs.values().flat_map(|r| &r.acting);
        let clean = self.all_clean() && !members.any(|o| lost.contains(o));
        self.lost_one &= !clean;
        if clean {
            self.copies_min = u32::MAX;
        }
        clean || (self.spare() > 0 && !self.lost_one)
    }

    /// Lets groups serve with as few members as decode.
    pub fn may_serve_with_fewest(&mut self) {
        let fewest = match self.redundancy() {
            Redundancy::Replicated { .. } => 1,
            Redundancy::Erasure { k, .. } => k,
        };
        self.command(Command::SetPool { name: "p".into(), min_size: Some(fewest) });
    }

    /// So many running nodes, by chance.
    pub fn some_running(&mut self, count: usize) -> Vec<usize> {
        let mut running: Vec<usize> =
            (0..self.nodes.len()).filter(|n| self.nodes[*n].core.is_some()).collect();
        while running.len() > count {
            let leave = self.rng.below(running.len() as u64) as usize;
            running.swap_remove(leave);
        }
        running
    }

    /// Faults stop, everything that can come back does.
    pub fn heal(&mut self) {
        self.log(|| "everything heals".into());
        self.faults_on = false;
        self.set_pace(Pace::Storm);
        self.network.cut.clear();
        self.restart_monitor(0);
        let min_size = Some(self.plan.min_size(self.redundancy()));
        self.command(Command::SetPool { name: "p".into(), min_size });
        self.command(Command::SetSlowPolicy(SlowPolicy::default()));
        for client in &mut self.clients {
            client.paused_until = 0;
        }
        for node in 0..self.nodes.len() {
            self.nodes[node].paused_until = 0;
            self.nodes[node].slow_disk = Slow::default();
            self.nodes[node].slow_net = Slow::default();
            if self.nodes[node].lost {
                continue;
            }
            // First: making room is a write, too, and nobody would notice that it failed.
            self.nodes[node].disk.fail_no_more();
            self.unfill(node);
            let osd = self.nodes[node].id;
            self.command(Command::InOsd { osd });
            self.start(node);
        }
    }
}
