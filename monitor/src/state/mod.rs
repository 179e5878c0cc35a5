//! The replicated state of the monitors and how commands change it. Pure and deterministic: the
//! same commands in the same order give the same state on every monitor and in the simulator.
//!
//! Invariants: a refused command changes nothing; every change of the map raises its epoch by
//! exactly one; no id, incarnation, session or generation is ever given twice.

pub mod command;
mod division;
mod hosts;
pub mod intervals;
mod osds;
mod pgs;
mod pools;
mod requests;
pub mod scrubs;
pub mod slow;
mod snapshots;
mod volumes;

pub use command::*;
use scrubs::{ScrubRecord, ScrubSettings};
use slow::SlowPolicy;

use gabion_proto::ids::*;
use gabion_proto::map::ClusterMap;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Events kept for `gabion events`.
pub const EVENTS_MAX: usize = 1000;
/// Data-path clients that the cluster remembers.
pub const CLIENTS_MAX: usize = 100_000;
/// Exports of the whole cluster.
pub const EXPORTS_MAX: usize = 1_000_000;

/// A virtual disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub name: String,
    pub pool: PoolId,
    pub size_bytes: u64,
    /// Whose objects the layers are: its own, or those of the volume that it was cloned from.
    pub root: VolumeId,
    /// Top layer first.
    pub layers: Vec<LayerId>,
    /// What it was cloned from.
    pub origin: Option<SnapshotId>,
    /// A snapshot and its name, while the holder is asked to pause.
    pub taking: Option<(SnapshotId, String)>,
}

/// What a volume was at one moment. Its layers are frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub volume: VolumeId,
    pub name: String,
    pub size_bytes: u64,
    /// Top layer first.
    pub layers: Vec<LayerId>,
    pub unix_ms: u64,
}

/// A data-path client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Client {
    /// Its newest session; older ones are refused (rule C1).
    pub session: Session,
    pub host: String,
}

/// A volume that a gateway should serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    pub volume: VolumeId,
    /// This snapshot of the volume, instead of what it is now.
    pub snapshot: Option<SnapshotId>,
    pub kind: ExportKind,
    pub read_only: bool,
    pub host: String,
    /// Made for this VM, and removed with its disk.
    pub vm: Option<String>,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub volume: VolumeId,
    pub serial: String,
    /// The operator took it away and the running guest may still hold it.
    pub leaving: bool,
}

/// A network card of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// A tap device of the VM's host.
    pub tap: String,
    /// In a command, empty: derived from the VM's name.
    pub mac: String,
}

/// A virtual machine as wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    pub cpus: u32,
    pub memory_bytes: u64,
    pub disks: Vec<Disk>,
    pub host: String,
    pub kernel_args: String,
    /// native or qemu; empty: what suits the host.
    pub engine: String,
    /// host, generic or kvm64.
    pub cpu_model: String,
    pub nics: Vec<Nic>,
    pub wanted_running: bool,
    pub action: VmAction,
    /// Grows with every action.
    pub action_number: u64,
}

/// What the monitors know of an OSD beyond the map.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OsdFlags {
    /// Out without an operator's word (never booted, or down for too long): the next boot brings it in.
    pub automatic_out: bool,
    /// Out because it was slow, until an operator says otherwise.
    pub slow_out: bool,
}

/// How bad an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum EventSeverity {
    Ok,
    Warn,
    Error,
}

/// Something that happened to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with every event.
    pub number: u64,
    pub unix_ms: u64,
    pub epoch: Epoch,
    pub severity: EventSeverity,
    pub text: String,
}

/// The last number given of each kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counters {
    osd: u32,
    pool: u32,
    incarnation: u64,
    volume: u64,
    snapshot: u64,
    client: u64,
    generation: u64,
    export: u64,
    event: u64,
}

/// Everything that the monitors agree on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorState {
    pub map: ClusterMap,
    pub osd_flags: BTreeMap<OsdId, OsdFlags>,
    /// Members that a group goes on without, because its primary cannot work with them (rule P8).
    pub suspects: BTreeMap<PgId, BTreeSet<(OsdId, Incarnation)>>,
    pub volumes: BTreeMap<VolumeId, Volume>,
    volume_names: BTreeMap<String, VolumeId>,
    /// The last layer that was opened of each root that anything is made of.
    roots: BTreeMap<VolumeId, LayerId>,
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    pub clients: BTreeMap<ClientId, Client>,
    pub exports: BTreeMap<u64, Export>,
    pub vms: BTreeMap<String, Vm>,
    /// Grows with every change of exports or VMs.
    pub host_revision: u64,
    pub events: VecDeque<Event>,
    /// What each OSD may move for recovery; 0: no limit.
    pub rebuild_rate_bytes_per_s: u64,
    pub scrub_settings: ScrubSettings,
    pub scrubs: BTreeMap<PgId, ScrubRecord>,
    pub slow_policy: SlowPolicy,
    /// See [`MonitorState::placed_groups`].
    placed: BTreeMap<PoolId, u32>,
    /// How many groups pools are to have when they can be merged.
    merging: BTreeMap<PoolId, u32>,
    answered: requests::Answered,
    counters: Counters,
}

impl MonitorState {
    /// Carries out one command. `unix_ms` only stamps events, snapshots and scrubs.
    pub fn apply(&mut self, unix_ms: u64, command: Command) -> CommandResult {
        let first_new_event = self.counters.event + 1;
        let result = self.dispatch(unix_ms, command);
        for event in self.events.iter_mut().rev().take_while(|e| e.number >= first_new_event) {
            event.unix_ms = unix_ms;
        }
        result
    }

    fn dispatch(&mut self, unix_ms: u64, command: Command) -> CommandResult {
        match command {
            Command::Bootstrap { cluster } => self.bootstrap(cluster),
            Command::AddOsd { disk, host, rack, weight, capacity_bytes } => {
                self.add_osd(disk, host, rack, weight, capacity_bytes)
            }
            Command::BootOsd { osd, disk, addr, host, rack, capacity_bytes } => {
                self.boot_osd(osd, disk, addr, host, rack, capacity_bytes)
            }
            Command::MarkDown { osd, incarnation, reason } => self.mark_down(osd, incarnation, &reason),
            Command::OutOsd { osd, automatic } => self.out_osd(osd, automatic),
            Command::InOsd { osd } => self.in_osd(osd),
            Command::ReweightOsd { osd, weight } => self.reweight_osd(osd, weight),
            Command::RemoveOsd { osd, force } => self.remove_osd(osd, force),
            Command::CreatePool { name, redundancy, min_size, failure_domain, pg_count, object_bytes } => {
                let made =
                    self.create_pool(name, redundancy, min_size, failure_domain, pg_count, object_bytes)?;
                self.keep_scrub_records(unix_ms);
                Ok(made)
            }
            Command::SetPool { name, min_size } => self.set_pool(&name, None, min_size),
            Command::SetReplicas { name, replicas, min_size } => {
                self.set_pool(&name, Some(replicas), min_size)
            }
            Command::SetPgs { name, pg_count } => {
                let set = self.set_pgs(&name, pg_count)?;
                self.keep_scrub_records(unix_ms);
                Ok(set)
            }
            Command::RemovePool { name } => {
                let removed = self.remove_pool(&name)?;
                self.keep_scrub_records(unix_ms);
                Ok(removed)
            }
            Command::PgActivated { osd, incarnation, pg, interval } => {
                self.pg_activated(osd, incarnation, pg, interval)
            }
            Command::PgClean { osd, incarnation, pg, interval } => {
                self.pg_clean(osd, incarnation, pg, interval)
            }
            Command::SuspectPeer { osd, incarnation, pg, interval, peer, peer_incarnation } => {
                self.suspect_peer(osd, incarnation, pg, interval, peer, peer_incarnation)
            }
            Command::ClearSuspect { pg, peer, peer_incarnation } => {
                self.clear_suspect(pg, peer, peer_incarnation)
            }
            Command::CreateVolume { name, pool, size_bytes } => self.create_volume(name, &pool, size_bytes),
            Command::RemoveVolume { name } => self.remove_volume(&name),
            Command::ResizeVolume { name, size_bytes } => self.resize_volume(&name, size_bytes),
            Command::BeginSnapshot { snapshot } => self.begin_snapshot(unix_ms, &snapshot),
            Command::SealSnapshot { volume, client, session, generation, snapshot } => {
                self.seal_snapshot(unix_ms, volume, (client, session, generation), snapshot)
            }
            Command::GiveUpSnapshot { snapshot } => self.give_up_snapshot(snapshot),
            Command::RemoveSnapshot { snapshot } => self.remove_snapshot(&snapshot),
            Command::RollbackVolume { snapshot } => self.rollback_volume(&snapshot),
            Command::CloneVolume { snapshot, name } => self.clone_volume(&snapshot, name),
            Command::OpenSession { client, host } => self.open_session(client, host),
            Command::AttachVolume { volume, client, session, take_over } => {
                self.attach_volume(&volume, client, session, take_over)
            }
            Command::DetachVolume { volume, client, generation } => {
                self.detach_volume(&volume, client, generation)
            }
            Command::FenceVolume { volume } => self.fence_volume(&volume),
            Command::AddExport { volume, kind, read_only, host } => {
                self.add_export(&volume, kind, read_only, host)
            }
            Command::RemoveExport { id } => self.remove_export(id),
            Command::CreateVm {
                name,
                cpus,
                memory_bytes,
                disks,
                host,
                kernel_args,
                engine,
                cpu_model,
                nics,
            } => self.create_vm(name, cpus, memory_bytes, disks, host, kernel_args, engine, cpu_model, nics),
            Command::SetVmState { name, action } => self.set_vm_state(&name, action),
            Command::AttachDisk { vm, disk } => self.attach_disk(&vm, disk),
            Command::DetachDisk { vm, volume } => self.detach_disk(&vm, &volume),
            Command::VmStopped { name, action_number } => self.vm_stopped(&name, action_number),
            Command::DiskReleased { vm, volume } => self.disk_released(&vm, volume),
            Command::RemoveVm { name } => self.remove_vm(&name),
            Command::SetRebuildRate(bytes_per_s) => self.set_rebuild_rate(bytes_per_s),
            Command::SetScrub(settings) => self.set_scrub(settings),
            Command::RequestScrub { pool, pg, deep } => self.request_scrub(pool, pg, deep),
            Command::PgScrubbed { osd, incarnation, pg, interval, result } => {
                self.pg_scrubbed(unix_ms, (osd, incarnation), pg, interval, result)
            }
            Command::PgFilled { osd, incarnation, pg, interval } => {
                self.pg_filled(osd, incarnation, pg, interval)
            }
            Command::SetSlowPolicy(policy) => self.set_slow_policy(policy),
            Command::EvictSlow { osd, incarnation } => self.evict_slow(osd, incarnation),
            // Taken apart by `apply_agreed`.
            Command::Together(_) => Err(Refusal::invalid("commands go together only in the log")),
            Command::Announce { text } => {
                self.event(EventSeverity::Ok, text);
                Ok(Reply::Done)
            }
        }
    }

    fn bootstrap(&mut self, cluster: ClusterId) -> CommandResult {
        if self.map.epoch != Epoch(0) {
            if self.map.cluster == cluster {
                return Ok(Reply::Done);
            }
            return Err(Refusal::exists(format!("this is cluster {} already", self.map.cluster)));
        }
        self.map.cluster = cluster;
        self.map.epoch = Epoch(1);
        self.event(EventSeverity::Ok, format!("cluster {cluster} was created"));
        Ok(Reply::Done)
    }

    /// A change of the map that no placement group depends on.
    fn bump(&mut self, change: impl FnOnce(&mut ClusterMap)) {
        change(&mut self.map);
        self.map.epoch = self.map.epoch.next();
    }

    /// A change of OSDs, pools or suspects: groups are looked at again, and with `placement` their
    /// up sets too.
    fn change_groups(&mut self, placement: bool, change: impl FnOnce(&mut ClusterMap)) {
        let osds = self.map.osds.clone();
        let pools = self.map.pools.clone();
        self.bump(change);
        // Suspicion ends with the run of the process that it was about.
        let map = &self.map;
        for suspects in self.suspects.values_mut() {
            suspects.retain(|(osd, inc)| map.up_osd(*osd).is_some_and(|o| o.incarnation == *inc));
        }
        self.suspects.retain(|pg, s| !s.is_empty() && map.pools.contains_key(&pg.pool));
        let placed = placement.then_some(&self.placed);
        intervals::recompute(&mut self.map, &osds, &pools, &self.suspects, placed);
    }

    fn event(&mut self, severity: EventSeverity, text: String) {
        self.counters.event += 1;
        let event = Event { number: self.counters.event, unix_ms: 0, epoch: self.map.epoch, severity, text };
        self.events.push_back(event);
        while self.events.len() > EVENTS_MAX {
            self.events.pop_front();
        }
    }

    /// The pool of that name.
    pub fn pool_named(&self, name: &str) -> Result<PoolId, Refusal> {
        let found = self.map.pools.iter().find(|(_, p)| p.name == name);
        found.map(|(id, _)| *id).ok_or_else(|| Refusal::not_found(format!("there is no pool {name:?}")))
    }

    /// The volume of that name.
    pub fn volume_named(&self, name: &str) -> Result<VolumeId, Refusal> {
        let found = self.volume_names.get(name).copied();
        found.ok_or_else(|| Refusal::not_found(format!("there is no volume {name:?}")))
    }
}

#[cfg(test)]
mod division_tests;
#[cfg(test)]
mod places_tests;
#[cfg(test)]
pub(crate) mod tests;
