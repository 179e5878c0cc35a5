//! What goes wrong, and what operators do meanwhile; and how everything heals.

use crate::client::ClientEvent;
use crate::network::Place;
use crate::nodes::Node;
use crate::world::{Ev, World};
use gabion_monitor::state::Command;
use gabion_proto::map::Redundancy;

/// Kinds of faults and how often each is drawn.
const KINDS: [(&str, u64); 26] = [
    ("crash", 24),
    ("disk error", 6),
    ("pause", 9),
    ("client pause", 4),
    ("cut", 13),
    ("alone with the monitor", 3),
    ("client cut", 5),
    ("cuts heal", 9),
    ("monitor restart", 5),
    ("crash of all", 3),
    ("disk loss", 2),
    ("bit rot", 6),
    ("cold rot", 12),
    ("full disk", 4),
    ("out", 3),
    ("in", 4),
    ("reweight", 3),
    ("min-size", 1),
    ("client restart", 5),
    ("take-over", 4),
    ("volume removed", 1),
    ("snapshot", 12),
    ("snapshot removed", 2),
    ("new disk", 1),
    ("two crashes", 3),
    ("crash of a group", 2),
];

impl World {
    pub fn fault(&mut self) {
        self.rotting &= !self.scrubs_done();
        if self.rotting {
            return self.at(200, Ev::Fault);
        }
        let total: u64 = KINDS.iter().map(|(_, n)| n).sum();
        let mut drawn = self.rng.below(total);
        let kind = KINDS.iter().find(|(_, n)| {
            let hit = drawn < *n;
            drawn = drawn.saturating_sub(*n);
            hit
        });
        let Some((kind, _)) = kind else { return };
        if self.inject(kind) {
            self.tally.fault(kind);
        }
        let wait = self.rng.range(1, self.plan.fault_every_ms);
        self.at(wait, Ev::Fault);
    }

    /// False: not now.
    fn inject(&mut self, kind: &str) -> bool {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        let client = self.rng.below(self.clients.len() as u64) as usize;
        let alive = self.nodes.iter().filter(|n| !n.lost).count();
        let inside = self.monitor.state.map.osds.values().filter(|o| o.in_cluster).count();
        let (osd, width) = (self.nodes[node].id, self.plan.width());
        match kind {
            "crash" => self.crash(node),
            "two crashes" => {
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
            "disk error" => {
                if self.nodes[node].core.is_none() {
                    return false;
                }
                let after = self.rng.below(12);
                self.nodes[node].disk.fail_after(after);
            }
            "pause" => {
                let ms = self.rng.range(200, 9_000);
                self.log(|| format!("osd.{node} pauses for {ms} ms"));
                // What came before sleeps as long as it was told.
                let until = &mut self.nodes[node].paused_until;
                *until = (*until).max(self.now + ms);
            }
            "client pause" => {
                let ms = self.rng.range(200, 12_000);
                self.log(|| format!("client {client} pauses for {ms} ms"));
                let until = &mut self.clients[client].paused_until;
                *until = (*until).max(self.now + ms);
            }
            "cut" => {
                // One-way or full, between two nodes or a node and the monitor.
                let other = self.rng.below(self.nodes.len() as u64 + 1) as usize;
                let to = if other == self.nodes.len() { Place::Monitor } else { Place::Node(other) };
                self.cut(Place::Node(node), to);
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
                self.cut(Place::Client(client), to);
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
                self.nodes[node].lost = true;
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
                let well = |n: &Node| n.lost || (n.core.is_some() && n.paused_until <= self.now);
                let all_well = self.nodes.iter().all(well) && self.network.cut.is_empty();
                // The monitor may not have noticed yet that one is lost.
                let lost: Vec<_> = self.nodes.iter().filter(|n| n.lost).map(|n| n.id).collect();
                let mut members = self.monitor.state.map.pgs.values().flat_map(|r| &r.acting);
                let away = members.any(|o| lost.contains(o));
                if !all_well || away || !self.monitor_runs() || !self.all_clean() {
                    return false;
                }
                self.rotting = self.rot_cold();
                return self.rotting;
            }
            "full disk" => {
                let (reserve, ms) = (self.rng.chance(500), self.rng.range(1_000, 20_000));
                self.log(|| format!("the disk of osd.{node} is full for {ms} ms"));
                self.nodes[node].disk.fill(reserve);
                self.at(ms, Ev::Unfill { node });
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
                let min_size = match self.plan.redundancy {
                    Redundancy::Replicated { size } => {
                        self.rng.range(u64::from(size.min(2)), u64::from(size) + 1)
                    }
                    Redundancy::Erasure { k, m } => {
                        self.rng.range(u64::from(k) + u64::from(m > 1), u64::from(k + m) + 1)
                    }
                };
                self.command(Command::SetPool { name: "p".into(), min_size: Some(min_size as u32) });
            }
            "client restart" => {
                self.log(|| format!("client {client} restarts"));
                self.at(1, Ev::Client { client, event: ClientEvent::Crash });
            }
            "take-over" => {
                self.log(|| format!("the volume of client {client} is taken over"));
                self.take_over(client);
            }
            "volume removed" if self.monitor_runs() => self.remove_volume(client),
            "snapshot" if self.monitor_runs() => return self.ask_for_snapshot(client),
            "snapshot removed" if self.monitor_runs() => return self.remove_snapshot(),
            "new disk" if self.monitor_runs() && self.nodes.len() < 8 => {
                self.add_node();
                let node = self.nodes.len() - 1;
                self.start(node);
            }
            _ => return false,
        }
        true
    }

    /// Blocks that nobody reads rot, on as few disks that every object still has a good copy, and a scrub is asked for.
    pub fn rot_cold(&mut self) -> bool {
        let spare = match self.plan.redundancy {
            Redundancy::Replicated { size } => size - 1,
            Redundancy::Erasure { m, .. } => m,
        };
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

    fn cut(&mut self, from: Place, to: Place) {
        if from == to {
            return;
        }
        let (one, both) = (self.rng.chance(200), self.rng.chance(500));
        self.log(|| format!("cut between {from:?} and {to:?}"));
        if both || one {
            self.network.cut.insert((to, from));
        }
        if both || !one {
            self.network.cut.insert((from, to));
        }
    }

    /// Three copies, or two parity shards, survive the loss of any one disk at any time; others once everything is clean.
    fn may_lose_one(&mut self) -> bool {
        // The monitor may not have noticed the last loss yet.
        let lost: Vec<_> = self.nodes.iter().filter(|n| n.lost).map(|n| n.id).collect();
        let mut members = self.monitor.state.map.pgs.values().flat_map(|r| &r.acting);
        let clean = self.all_clean() && !members.any(|o| lost.contains(o));
        self.lost_one &= !clean;
        clean || (self.plan.spare() > 0 && self.plan.width() > 2 && !self.lost_one)
    }

    /// Lets groups serve with as few members as decode.
    pub fn may_serve_with_fewest(&mut self) {
        let fewest = match self.plan.redundancy {
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
        self.network.cut.clear();
        self.restart_monitor(0);
        let default = match self.plan.redundancy {
            Redundancy::Replicated { size } => size / 2 + 1,
            Redundancy::Erasure { k, m } => k + u32::from(m > 1),
        };
        self.command(Command::SetPool { name: "p".into(), min_size: Some(default) });
        for client in &mut self.clients {
            client.paused_until = 0;
        }
        for node in 0..self.nodes.len() {
            self.nodes[node].paused_until = 0;
            if self.nodes[node].lost {
                continue;
            }
            self.nodes[node].disk.unfill();
            self.nodes[node].disk.fail_no_more();
            let osd = self.nodes[node].id;
            self.command(Command::InOsd { osd });
            self.start(node);
        }
    }
}
