//! The cluster map: who stores what, as the monitors decided it.
//!
//! Placement is explicit: every placement group carries its up and acting sets, so nobody but the
//! monitors computes it. An [`Epoch`] names one map; a PG's *interval* is the run of epochs in
//! which nothing that matters to its data changed (rule P1), named by its first epoch.

use crate::ids::*;
use crate::shared::Shared;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// One version of the whole map. Cheap to share behind an `Arc`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterMap {
    pub cluster: ClusterId,
    pub epoch: Epoch,
    pub osds: BTreeMap<OsdId, OsdInfo>,
    pub pools: BTreeMap<PoolId, Pool>,
    /// Shared between maps: of thousands an epoch changes a few.
    pub pgs: BTreeMap<PgId, Shared<PgRecord>>,
    /// Fences: who may use which volume. An OSD refuses operations of any other
    /// generation or of an older session.
    pub attachments: BTreeMap<VolumeId, Attachment>,
    /// Volumes that were removed: their objects are deleted wherever they are met, and ids are
    /// never used again, so this set is the tombstone (invariant 7).
    pub removed_volumes: BTreeSet<VolumeId>,
    /// Layers that nothing is made of any more, of root volumes that still have others, likewise.
    pub removed_layers: BTreeSet<(VolumeId, LayerId)>,
    /// Pools that were removed, likewise. An OSD deletes a group only for this reason, or because the group is
    /// clean elsewhere: that a map does not mention a group may have other ones.
    pub removed_pools: BTreeSet<PoolId>,
}

/// One OSD as the monitors see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OsdInfo {
    /// Failure-domain path.
    pub host: String,
    pub rack: String,
    /// Data-path address, `ip:port`. Empty until the OSD first boots.
    pub addr: String,
    /// Share of data relative to other OSDs; 65,536 is one unit.
    pub weight: u32,
    /// Down is set only after the OSD's lease has run out or it said goodbye.
    pub up: bool,
    /// An OSD that is not in gets no placement.
    pub in_cluster: bool,
    /// The current (or last) run of the process.
    pub incarnation: Incarnation,
    /// Identity of the disk behind the id: another disk is refused under the same id.
    pub disk: ClusterId,
    /// Size of the store and what is used, as last reported; coarse.
    pub capacity_bytes: u64,
}

/// How a pool keeps its objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Redundancy {
    /// `size` whole copies.
    Replicated { size: u32 },
    /// `k` data and `m` parity shards.
    Erasure { k: u32, m: u32 },
}

impl Redundancy {
    /// Members in a full acting set.
    pub fn width(self) -> usize {
        match self {
            Redundancy::Replicated { size } => size as usize,
            Redundancy::Erasure { k, m } => (k + m) as usize,
        }
    }
}

/// The kind of place of which no two members of an acting set share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureDomain {
    Osd,
    Host,
    Rack,
}

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    pub name: String,
    pub redundancy: Redundancy,
    /// Members that must have a write durable before it is acknowledged; a PG with fewer acting
    /// members serves nothing.
    pub min_size: u32,
    pub failure_domain: FailureDomain,
    pub pg_count: u32,
    pub object_bytes: u32,
}

/// One placement group's place in the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PgRecord {
    /// Where placement wants it (only OSDs that are in), primary first.
    pub up: Vec<OsdId>,
    /// Who serves it now; for a replicated pool a list without holes, primary first; for an
    /// erasure-coded one position is the shard number and [`OsdId::NONE`] a hole.
    pub acting: Vec<OsdId>,
    /// Who orders writes. `None` when nobody in `acting` is up.
    pub primary: Option<OsdId>,
    /// First epoch of the current interval.
    pub interval: Epoch,
    /// The current interval may have taken writes: set by the primary's report, durable before
    /// the first operation is served (invariant 2).
    pub activated: bool,
    /// Every member of `acting` holds every object, as reported by the primary of this interval
    /// by compare-and-set on `interval` (rule P9, invariant 8).
    pub clean: bool,
    /// Earlier intervals that may have taken writes since the group was last clean, oldest
    /// first.
    pub past: Vec<PastInterval>,
}

/// An earlier interval that may have taken writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastInterval {
    /// Its first epoch: its name.
    pub interval: Epoch,
    pub acting: Vec<OsdId>,
    pub primary: Option<OsdId>,
}

/// Who holds a volume, and the one layer that may be written: every other one is frozen (rule C6).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub generation: Generation,
    pub client: ClientId,
    pub session: Session,
    /// Whose objects the volume's layers are: itself, or what it was cloned from.
    pub root: VolumeId,
    /// The volume's top layer. Numbers of layers grow, so a greater one is newer.
    pub top: LayerId,
    /// A grown volume tells its holder so.
    pub size_bytes: u64,
    /// A snapshot waits for the holder to pause and to say so.
    pub snapshot: Option<SnapshotId>,
}

impl ClusterMap {
    /// The placement group of an object: a hash of the root volume and the object's index, so
    /// that all layers of one place live together.
    pub fn pg_of(&self, pool: PoolId, volume: VolumeId, index: u32) -> Option<PgId> {
        let count = self.pools.get(&pool)?.pg_count;
        Some(PgId { pool, index: crate::placement::pg_index(volume, index, count) })
    }

    /// Whether nothing is made of an object any more: it is deleted wherever it is met (invariant 7).
    pub fn is_removed(&self, object: &ObjectId) -> bool {
        self.removed_volumes.contains(&object.volume)
            || self.removed_layers.contains(&(object.volume, object.layer))
    }

    /// How many tombstones there are, in a form that no two maps with different ones share.
    pub fn tombstones(&self) -> (usize, usize) {
        // Layers leave their set only when their root enters the other one.
        (self.removed_volumes.len(), self.removed_layers.len())
    }

    fn drop_covered_tombstones(&mut self) {
        let roots = &self.removed_volumes;
        self.removed_layers.retain(|(root, _)| !roots.contains(root));
    }

    /// Removes a root volume with all its layers.
    pub fn remove_root(&mut self, root: VolumeId) {
        self.removed_volumes.insert(root);
        self.drop_covered_tombstones();
    }

    /// The record of an OSD that is up.
    pub fn up_osd(&self, id: OsdId) -> Option<&OsdInfo> {
        self.osds.get(&id).filter(|o| o.up)
    }
}

impl PgRecord {
    /// Members of the acting set without holes.
    pub fn members(&self) -> impl Iterator<Item = OsdId> + '_ {
        self.acting.iter().copied().filter(|o| *o != OsdId::NONE)
    }

    /// Everyone whom peering must consider: acting members and those of past intervals.
    pub fn all_known(&self) -> BTreeSet<OsdId> {
        self.members()
            .chain(self.past.iter().flat_map(|p| p.acting.iter().copied()))
            .filter(|o| *o != OsdId::NONE)
            .collect()
    }

    /// Acting sets of the intervals that may have written what is needed, newest first.
    pub fn holders(&self) -> impl Iterator<Item = &Vec<OsdId>> {
        let current = self.activated.then_some(&self.acting);
        current.into_iter().chain(self.past.iter().rev().map(|p| &p.acting))
    }

    /// Erasure coding: the position whose shard an OSD may be needed for.
    pub fn place_of(&self, osd: OsdId) -> Option<usize> {
        let places = |acting: &Vec<OsdId>| acting.iter().position(|o| *o == osd);
        if osd == OsdId::NONE { None } else { self.holders().find_map(places) }
    }

    /// Erasure coding: who is to have a position that is empty, and does not get it while another shard of its may be needed.
    pub fn held_back(&self) -> impl Iterator<Item = OsdId> + '_ {
        let empty = self.up.iter().zip(&self.acting).zip(0usize..);
        let empty = empty.filter(|((_, acting), _)| **acting == OsdId::NONE);
        empty
            .filter(|((up, _), p)| self.place_of(**up).is_some_and(|place| place != *p))
            .map(|((up, _), _)| *up)
    }
}

/// What changed between two epochs; applies to exactly the map of epoch `from`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapIncrement {
    pub from: Epoch,
    pub to: Epoch,
    pub osds: BTreeMap<OsdId, Option<OsdInfo>>,
    pub pools: BTreeMap<PoolId, Option<Pool>>,
    pub pgs: BTreeMap<PgId, Option<Shared<PgRecord>>>,
    pub attachments: BTreeMap<VolumeId, Option<Attachment>>,
    pub removed_volumes: BTreeSet<VolumeId>,
    pub removed_layers: BTreeSet<(VolumeId, LayerId)>,
    pub removed_pools: BTreeSet<PoolId>,
}

/// Why an increment could not be applied.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MapError {
    #[error("increment from {from} cannot be applied to a map of {have}")]
    Gap { from: Epoch, have: Epoch },
}

fn diff_tree<K: Ord + Copy, V: PartialEq + Clone>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> BTreeMap<K, Option<V>> {
    let mut out = BTreeMap::new();
    let mut before = old.iter().peekable();
    // Both are in order.
    for (k, v) in new {
        while let Some((gone, _)) = before.next_if(|(o, _)| *o < k) {
            out.insert(*gone, None);
        }
        match before.next_if(|(o, _)| *o == k) {
            Some((_, had)) if had == v => {}
            _ => _ = out.insert(*k, Some(v.clone())),
        }
    }
    out.extend(before.map(|(gone, _)| (*gone, None)));
    out
}

fn apply_tree<K: Ord + Copy, V: Clone>(tree: &mut BTreeMap<K, V>, changes: &BTreeMap<K, Option<V>>) {
    for (k, v) in changes {
        match v {
            Some(v) => tree.insert(*k, v.clone()),
            None => tree.remove(k),
        };
    }
}

impl MapIncrement {
    /// What leads from `old` to `new`.
    pub fn between(old: &ClusterMap, new: &ClusterMap) -> MapIncrement {
        MapIncrement {
            from: old.epoch,
            to: new.epoch,
            osds: diff_tree(&old.osds, &new.osds),
            pools: diff_tree(&old.pools, &new.pools),
            pgs: diff_tree(&old.pgs, &new.pgs),
            attachments: diff_tree(&old.attachments, &new.attachments),
            removed_volumes: new.removed_volumes.difference(&old.removed_volumes).copied().collect(),
            removed_layers: new.removed_layers.difference(&old.removed_layers).copied().collect(),
            removed_pools: new.removed_pools.difference(&old.removed_pools).copied().collect(),
        }
    }

    /// Brings `map` forward.
    pub fn apply(&self, map: &mut ClusterMap) -> Result<(), MapError> {
        if map.epoch != self.from {
            return Err(MapError::Gap { from: self.from, have: map.epoch });
        }
        apply_tree(&mut map.osds, &self.osds);
        apply_tree(&mut map.pools, &self.pools);
        apply_tree(&mut map.pgs, &self.pgs);
        apply_tree(&mut map.attachments, &self.attachments);
        map.removed_volumes.extend(self.removed_volumes.iter().copied());
        map.removed_layers.extend(self.removed_layers.iter().copied());
        map.drop_covered_tombstones();
        map.removed_pools.extend(self.removed_pools.iter().copied());
        map.epoch = self.to;
        Ok(())
    }
}
