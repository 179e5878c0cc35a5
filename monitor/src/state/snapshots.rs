//! Snapshots, clones, rollback: how layers come, are shared and go (rule C6).
//!
//! ```text
//!   volume v   [3, 2, 0]      3 is written, the others are frozen
//!   v@monday      [2, 0]
//!   clone c   [4, 2, 0]       made of v@monday: its lower layers are v's
//! ```
//!
//! All layers are objects of one root volume, which is never named again once nothing of it is left. A snapshot of a
//! volume that somebody holds is made in two steps: the attachment in the map asks the holder to pause; its word
//! that nothing is in flight makes the snapshot and opens the new layer in one command. Until that command the
//! old layer is written, and from its epoch on every OSD refuses to: there is nothing in between. A layer
//! of which neither a volume nor a snapshot is made any more becomes a tombstone in the map.

use super::*;
use gabion_proto::limits::*;
use gabion_proto::map::Redundancy;

impl MonitorState {
    /// A snapshot by its `VOLUME@NAME`.
    pub fn snapshot_named(&self, full: &str) -> Result<SnapshotId, Refusal> {
        let (volume, name) = split(full)?;
        let volume_id = self.volume_named(volume)?;
        let found = self.snapshots.iter().find(|(_, s)| s.volume == volume_id && s.name == name);
        found.map(|(id, _)| *id).ok_or_else(|| Refusal::not_found(format!("there is no snapshot {full:?}")))
    }

    /// The name that people give it.
    pub fn snapshot_name(&self, id: SnapshotId) -> String {
        self.snapshots.get(&id).map_or_else(
            || id.to_string(),
            |s| format!("{}@{}", self.volumes.get(&s.volume).map_or("", |v| &v.name), s.name),
        )
    }

    /// The volumes that were cloned from it.
    pub fn clones_of(&self, id: SnapshotId) -> Vec<&str> {
        self.volumes.values().filter(|v| v.origin == Some(id)).map(|v| v.name.as_str()).collect()
    }

    /// Of a volume, oldest first.
    pub fn snapshots_of(&self, volume: VolumeId) -> impl Iterator<Item = (SnapshotId, &Snapshot)> {
        self.snapshots.iter().filter(move |(_, s)| s.volume == volume).map(|(id, s)| (*id, s))
    }

    pub(super) fn begin_snapshot(&mut self, unix_ms: u64, full: &str) -> CommandResult {
        let (volume, name) = split(full)?;
        let volume_id = self.volume_named(volume)?;
        if !valid_name(name) {
            return Err(Refusal::invalid(format!("{name:?} cannot be the name of a snapshot")));
        }
        let v = &self.volumes[&volume_id];
        if let Some(Redundancy::Erasure { .. }) = self.map.pools.get(&v.pool).map(|p| p.redundancy) {
            return Err(Refusal::new(
                RefusalKind::NotBuilt,
                format!(
                    "volume {volume} is in an erasure-coded pool: snapshots of such volumes are not built"
                ),
            ));
        }
        if self.snapshots_of(volume_id).any(|(_, s)| s.name == name) {
            return Err(Refusal::exists(format!("there is a snapshot {full:?} already")));
        }
        if v.taking.is_some() {
            return Err(Refusal::precondition(format!(
                "a snapshot of volume {volume} is being taken: try again"
            )));
        }
        if v.layers.len() >= LAYERS_MAX {
            return Err(Refusal::exhausted(format!(
                "volume {volume} has {LAYERS_MAX} layers already: export it into a new volume"
            )));
        }
        if self.snapshots.len() >= SNAPSHOTS_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {SNAPSHOTS_MAX} snapshots")));
        }
        self.free_layer(v.root)?;
        self.counters.snapshot += 1;
        let id = SnapshotId(self.counters.snapshot);
        let taking = Some((id, name.to_owned()));
        if self.map.attachments.contains_key(&volume_id) {
            self.volume_mut(volume_id).taking = taking;
            self.bump(|map| {
                map.attachments.entry(volume_id).and_modify(|a| a.snapshot = Some(id));
            });
        } else {
            self.volume_mut(volume_id).taking = taking;
            self.take_snapshot(unix_ms, volume_id)?;
        }
        Ok(Reply::Snapshot(id))
    }

    /// The holder's word that nothing is in flight. Said again, or too late, it changes nothing.
    pub(super) fn seal_snapshot(
        &mut self,
        unix_ms: u64,
        volume: VolumeId,
        holder: (ClientId, Session, Generation),
        snapshot: SnapshotId,
    ) -> CommandResult {
        let held = self.map.attachments.get(&volume);
        let Some(a) = held.filter(|a| (a.client, a.session, a.generation) == holder) else {
            return Err(Refusal::aborted(format!(
                "{volume} is not attached as {} of {}",
                holder.2, holder.0
            )));
        };
        if a.snapshot == Some(snapshot) {
            self.take_snapshot(unix_ms, volume)?;
        }
        Ok(Reply::Done)
    }

    /// The holder does not pause, or nobody holds the volume any more.
    pub(super) fn give_up_snapshot(&mut self, snapshot: SnapshotId) -> CommandResult {
        let taking = |v: &Volume| v.taking.as_ref().is_some_and(|(id, _)| *id == snapshot);
        let Some(id) = self.volumes.iter().find(|(_, v)| taking(v)).map(|(id, _)| *id) else {
            return Ok(Reply::Done);
        };
        let text = format!("volume {} did not pause: no snapshot was taken", self.volumes[&id].name);
        self.volume_mut(id).taking = None;
        self.bump(|map| {
            map.attachments.entry(id).and_modify(|a| a.snapshot = None);
        });
        self.event(EventSeverity::Warn, text);
        Ok(Reply::Done)
    }

    /// Freezes the top layer and opens the next one.
    fn take_snapshot(&mut self, unix_ms: u64, volume: VolumeId) -> Result<(), Refusal> {
        let v = &self.volumes[&volume];
        let root = v.root;
        let top = self.free_layer(root)?;
        self.roots.insert(root, top);
        let v = self.volume_mut(volume);
        let Some((id, name)) = v.taking.take() else { return Ok(()) };
        let snapshot = Snapshot {
            volume,
            name: name.clone(),
            size_bytes: v.size_bytes,
            layers: v.layers.clone(),
            unix_ms,
        };
        v.layers.insert(0, top);
        let text = format!("snapshot {}@{name} was taken", v.name);
        self.snapshots.insert(id, snapshot);
        if self.map.attachments.contains_key(&volume) {
            self.bump(|map| {
                map.attachments.entry(volume).and_modify(|a| {
                    a.top = top;
                    a.snapshot = None;
                });
            });
        }
        self.event(EventSeverity::Ok, text);
        Ok(())
    }

    pub(super) fn remove_snapshot(&mut self, full: &str) -> CommandResult {
        let id = self.snapshot_named(full)?;
        let clones = self.clones_of(id);
        if !clones.is_empty() {
            return Err(Refusal::precondition(format!(
                "snapshot {full} has the clones {}: remove them first",
                clones.join(", ")
            )));
        }
        if let Some((export, _)) = self.exports.iter().find(|(_, e)| e.snapshot == Some(id)) {
            return Err(Refusal::precondition(format!(
                "snapshot {full} is exported: remove export {export} first"
            )));
        }
        let Some(gone) = self.snapshots.remove(&id) else { return Ok(Reply::Done) };
        let root = self.volumes[&gone.volume].root;
        self.bury(root, &gone.layers);
        self.event(EventSeverity::Ok, format!("snapshot {full} was removed"));
        Ok(Reply::Done)
    }

    /// Back to what the snapshot holds; what was written since is gone.
    pub(super) fn rollback_volume(&mut self, full: &str) -> CommandResult {
        let id = self.snapshot_named(full)?;
        let Snapshot { volume, size_bytes, layers, .. } = self.snapshots[&id].clone();
        let name = self.volumes[&volume].name.clone();
        self.check_unused(volume)?;
        let root = self.volumes[&volume].root;
        let top = self.free_layer(root)?;
        self.roots.insert(root, top);
        let v = self.volume_mut(volume);
        let below = std::mem::replace(&mut v.layers, std::iter::once(top).chain(layers).collect());
        v.size_bytes = size_bytes;
        self.bury(root, &below);
        self.event(EventSeverity::Warn, format!("volume {name} was rolled back to snapshot {full}"));
        Ok(Reply::Done)
    }

    pub(super) fn clone_volume(&mut self, full: &str, name: String) -> CommandResult {
        let id = self.snapshot_named(full)?;
        self.check_new_volume(&name)?;
        let Snapshot { volume, size_bytes, layers, .. } = self.snapshots[&id].clone();
        let (pool, root) = (self.volumes[&volume].pool, self.volumes[&volume].root);
        if layers.len() >= LAYERS_MAX {
            return Err(Refusal::exhausted(format!("snapshot {full} has {LAYERS_MAX} layers already")));
        }
        let top = self.free_layer(root)?;
        self.roots.insert(root, top);
        let layers = std::iter::once(top).chain(layers).collect();
        let clone = Volume { name, pool, size_bytes, root, layers, origin: Some(id), taking: None };
        let id = self.insert_volume(clone);
        Ok(Reply::Volume(id))
    }

    /// Refuses what needs a volume that nobody uses.
    pub(super) fn check_unused(&self, id: VolumeId) -> Result<(), Refusal> {
        let name = &self.volumes[&id].name;
        let served = |e: &Export| e.volume == id && e.snapshot.is_none();
        if let Some((export, e)) = self.exports.iter().find(|(_, e)| served(e)) {
            return Err(Refusal::precondition(match &e.vm {
                Some(vm) => format!("volume {name} is in use by VM {vm}: stop it first"),
                None => format!("volume {name} is exported: remove export {export} first"),
            }));
        }
        if let Some(held) = self.map.attachments.get(&id) {
            let host = self.host_of(held.client);
            return Err(Refusal::precondition(format!("volume {name} is attached on host {host}")));
        }
        Ok(())
    }

    /// The number of the next layer of a root.
    fn free_layer(&self, root: VolumeId) -> Result<LayerId, Refusal> {
        let last = self.roots.get(&root).copied().unwrap_or_default();
        let next = last.0.checked_add(1).map(LayerId);
        next.ok_or_else(|| Refusal::exhausted(format!("{root} has no numbers for layers left")))
    }

    fn volume_mut(&mut self, id: VolumeId) -> &mut Volume {
        self.volumes.get_mut(&id).expect("looked up by its name before")
    }

    /// Makes tombstones of those of `layers` of which nothing is made any more.
    pub(super) fn bury(&mut self, root: VolumeId, layers: &[LayerId]) {
        let left: Vec<VolumeId> =
            self.volumes.iter().filter(|(_, v)| v.root == root).map(|(id, _)| *id).collect();
        if left.is_empty() {
            self.roots.remove(&root);
            return self.bump(|map| map.remove_root(root));
        }
        let volumes = left.iter().flat_map(|id| &self.volumes[id].layers);
        let snapshots = self.snapshots.values().filter(|s| left.contains(&s.volume)).flat_map(|s| &s.layers);
        let used: BTreeSet<LayerId> = volumes.chain(snapshots).copied().collect();
        let gone: Vec<LayerId> = layers.iter().filter(|l| !used.contains(l)).copied().collect();
        if !gone.is_empty() {
            self.bump(|map| map.removed_layers.extend(gone.iter().map(|l| (root, *l))));
        }
    }
}

fn split(full: &str) -> Result<(&str, &str), Refusal> {
    full.split_once('@')
        .ok_or_else(|| Refusal::invalid(format!("{full:?} does not name a snapshot: use VOLUME@NAME")))
}

#[cfg(test)]
#[path = "snapshots_tests.rs"]
mod tests;
