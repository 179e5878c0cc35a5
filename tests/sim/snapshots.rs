//! Snapshots of simulated volumes: taken as gateways take them, read while everything goes wrong, and attacked.
//!
//! The holder is asked through the monitors' state, lets its writes end, has the snapshot taken and goes on when its map has come so
//! far. Once every OSD has the freeze in force it also sends a write to the frozen layer, as a gateway would that slept
//! through all of it: that must be refused.

use crate::client::{Kind, Op, start};
use crate::network::Place;
use crate::oracle::BlockId;
use crate::world::World;
use gabion_monitor::state::{Command, Reply};
use gabion_proto::ids::*;

/// The oracle numbers snapshots from here on, volumes below.
const FIRST: u64 = 1 << 32;

pub struct Snapshot {
    volume: usize,
    name: String,
    layers: Vec<LayerId>,
    removed: bool,
}

/// Why a client writes nothing.
#[derive(Clone, Copy)]
pub enum Pause {
    /// Its writes are ending.
    Draining(SnapshotId),
    /// The snapshot is taken: it waits for the map.
    Sealed { epoch: Epoch, snapshot: u64 },
}

impl World {
    /// The layers of a volume, as the monitors say.
    pub fn layers(&self, volume: VolumeId) -> Vec<LayerId> {
        self.monitor.state.volumes.get(&volume).map(|v| v.layers.clone()).unwrap_or_default()
    }

    /// The layers of what the oracle calls `of`, as client `i` knows them.
    pub fn layers_of(&self, i: usize, of: u64) -> Vec<LayerId> {
        match of.checked_sub(FIRST) {
            Some(n) => self.snapshots[n as usize].layers.clone(),
            None => self.clients[i].layers.clone(),
        }
    }

    /// Whose blocks the oracle means.
    pub fn volume_of(&self, of: u64) -> usize {
        of.checked_sub(FIRST).map_or(of as usize, |n| self.snapshots[n as usize].volume)
    }

    pub fn is_removed_snapshot(&self, of: u64) -> bool {
        of.checked_sub(FIRST).is_some_and(|n| self.snapshots[n as usize].removed)
    }

    pub fn some_snapshot(&mut self, volume: usize) -> Option<u64> {
        let there = self.snapshots.iter().enumerate().filter(|(_, s)| s.volume == volume && !s.removed);
        let there: Vec<usize> = there.map(|(n, _)| n).collect();
        let at = self.rng.below(there.len().max(1) as u64) as usize;
        there.get(at).map(|n| FIRST + *n as u64)
    }

    /// The operator wants a snapshot of the volume of client `i`. False: not now.
    pub fn ask_for_snapshot(&mut self, i: usize) -> bool {
        let c = &self.clients[i];
        let volume = c.volume;
        if self.seats[volume].removed || self.seats[volume].holder != i || !c.ready || c.pause.is_some() {
            return false;
        }
        let snapshot = format!("v{volume}@s{}", self.snapshots.len());
        match self.command(Command::BeginSnapshot { snapshot }) {
            Some(Reply::Snapshot(id)) => self.clients[i].pause = Some(Pause::Draining(id)),
            // In an erasure-coded pool.
            _ => return false,
        }
        *self.tally.work.entry("snapshot").or_default() += 1;
        true
    }

    pub fn go_on_with_snapshot(&mut self, i: usize) {
        let c = &self.clients[i];
        match c.pause {
            Some(Pause::Draining(id)) if !c.ops.values().any(|op| op.kind.is_write()) => self.seal(i, id),
            Some(Pause::Sealed { epoch, snapshot }) if c.map.epoch >= epoch && self.fenced(epoch) => {
                self.clients[i].pause = None;
                self.write_frozen(i, snapshot);
            }
            _ => {}
        }
    }

    fn seal(&mut self, i: usize, id: SnapshotId) {
        if !self.reaches_monitor(Place::Client(i)) {
            return;
        }
        let c = &self.clients[i];
        let (volume, volume_id) = (c.volume, c.volume_id);
        let (client, session, generation) = (c.id, c.session, c.generation);
        let seal = Command::SealSnapshot { volume: volume_id, client, session, generation, snapshot: id };
        // Refused: somebody took the volume over.
        let sealed = self.command(seal).is_some();
        let Some(taken) = self.monitor.state.snapshots.get(&id).filter(|_| sealed) else {
            self.clients[i].pause = None;
            return;
        };
        let (name, layers) = (self.monitor.state.snapshot_name(id), taken.layers.clone());
        let snapshot = FIRST + self.snapshots.len() as u64;
        self.snapshots.push(Snapshot { volume, name, layers, removed: false });
        self.oracle.freeze(volume as u64, snapshot);
        let layers = self.layers(volume_id);
        let epoch = self.monitor.state.map.epoch;
        let c = &mut self.clients[i];
        c.layers = layers;
        c.pause = Some(Pause::Sealed { epoch, snapshot });
    }

    /// As if the client had slept since before the snapshot.
    fn write_frozen(&mut self, i: usize, snapshot: u64) {
        if self.is_removed_snapshot(snapshot) {
            return;
        }
        let block = self.rng.below(8);
        let number = self.oracle.issue(BlockId { volume: snapshot, block }, false, true);
        let kind = Kind::Write { numbers: vec![number], zero: false };
        let layers = self.layers_of(i, snapshot);
        start(self, i, Op::new(snapshot, layers, (block, 1), kind).fenced(true));
    }

    /// The operator removes some snapshot. False: there is none.
    pub fn remove_snapshot(&mut self) -> bool {
        let there = self.snapshots.iter().enumerate().filter(|(_, s)| !s.removed);
        let there: Vec<usize> = there.map(|(n, _)| n).collect();
        let at = self.rng.below(there.len().max(1) as u64) as usize;
        let Some(n) = there.get(at) else { return false };
        self.forget(*n);
        *self.tally.work.entry("snapshot removed").or_default() += 1;
        true
    }

    pub fn remove_snapshots_of(&mut self, volume: usize) {
        for n in 0..self.snapshots.len() {
            if self.snapshots[n].volume == volume && !self.snapshots[n].removed {
                self.forget(n);
            }
        }
    }

    fn forget(&mut self, n: usize) {
        let snapshot = self.snapshots[n].name.clone();
        if self.command(Command::RemoveSnapshot { snapshot }).is_none() {
            self.finding = Some(format!("snapshot {} could not be removed", self.snapshots[n].name));
        }
        self.snapshots[n].removed = true;
        self.oracle.forget(FIRST + n as u64);
    }
}
