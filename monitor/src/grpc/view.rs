//! The state as people see it: protobuf records made of what is agreed on and what is reported.

use super::rebuild::Totals;
use super::volatile::Volatile;
use crate::state::scrubs::DamagedObject;
use crate::state::{Export, ExportKind, MonitorState, Vm, VmAction};
use gabion_proto::ids::*;
use gabion_proto::limits::DAMAGED_NAMED_MAX;
use gabion_proto::map::{FailureDomain, PgRecord};
use gabion_proto::pb;
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

pub(super) fn pool(state: &MonitorState, id: PoolId) -> Option<pb::PoolInfo> {
    let p = state.map.pools.get(&id)?;
    let volumes = || state.volumes.values().filter(|v| v.pool == id);
    let domain: FailureDomain = p.failure_domain;
    Some(pb::PoolInfo {
        id: id.0,
        name: p.name.clone(),
        redundancy: Some(p.redundancy.into()),
        min_size: p.min_size,
        failure_domain: pb::FailureDomain::from(domain) as i32,
        pg_count: p.pg_count,
        object_bytes: p.object_bytes,
        volumes: volumes().count() as u32,
        provisioned_bytes: volumes().map(|v| v.size_bytes).sum(),
        placed_pg_count: state.placed_groups(id).unwrap_or(p.pg_count),
        target_pg_count: state.merges_to(id).unwrap_or_default(),
        merge_waits_for: state.merge_waits_for(id) as u32,
    })
}

pub(super) fn osds(state: &MonitorState, volatile: &Volatile) -> Vec<pb::OsdDetail> {
    let one = |(id, o): (&OsdId, &gabion_proto::map::OsdInfo)| {
        let stats = volatile.osds.get(id).map(|r| r.stats.clone()).unwrap_or_default();
        let pgs = state.map.pgs.values();
        pb::OsdDetail {
            id: id.0,
            host: o.host.clone(),
            rack: o.rack.clone(),
            addr: o.addr.clone(),
            weight: o.weight,
            up: o.up,
            r#in: o.in_cluster,
            incarnation: o.incarnation.0,
            capacity_bytes: if stats.capacity_bytes > 0 { stats.capacity_bytes } else { o.capacity_bytes },
            used_bytes: stats.used_bytes,
            pgs: pgs.clone().filter(|r| r.acting.contains(id)).count() as u32,
            primary_pgs: pgs.filter(|r| r.primary == Some(*id)).count() as u32,
            fatal: stats.fatal,
        }
    };
    state.map.osds.iter().map(one).collect()
}

/// The state of a group in words, and the primary's report if there is one of this interval.
pub(super) fn pg_state<'a>(
    state: &MonitorState,
    volatile: &'a Volatile,
    id: PgId,
    record: &PgRecord,
) -> (&'static str, Option<&'a pb::PgStatus>) {
    let status = volatile.pgs.get(&id).filter(|s| s.interval == record.interval.0);
    let Some(pool) = state.map.pools.get(&id.pool) else { return ("unknown", None) };
    let have = record.members().count();
    let full = have == pool.redundancy.width();
    let words = if record.primary.is_none() {
        "down"
    } else if have < pool.min_size as usize {
        "undersized+inactive"
    } else if record.activated && record.clean {
        if full { "active+clean" } else { "active+degraded" }
    } else {
        use pb::PgState::*;
        match status.map(|s| s.state()) {
            Some(Down) => "down",
            Some(Peering) => "peering",
            Some(UndersizedInactive) => "undersized+inactive",
            Some(Incomplete) => "incomplete",
            Some(ActiveRecovering) => "active+recovering",
            Some(ActiveDegraded) => "active+degraded",
            // It says so, but its report of being clean is not agreed on yet.
            Some(ActiveClean) if full => "active+recovering",
            Some(ActiveClean) => "active+degraded",
            Some(Unspecified) | None if record.activated => "unknown",
            Some(Unspecified) | None => "peering",
        }
    };
    (words, status)
}

pub(super) fn pgs(state: &MonitorState, volatile: &Volatile, pool: Option<PoolId>) -> Vec<pb::PgDetail> {
    let chosen = state.map.pgs.iter().filter(|(id, _)| pool.is_none_or(|p| id.pool == p));
    let numbers = |osds: &[OsdId]| osds.iter().map(|o| o.0).collect();
    chosen
        .map(|(id, r)| {
            let (words, status) = pg_state(state, volatile, *id, r);
            let s = status.cloned().unwrap_or_default();
            pb::PgDetail {
                pool: id.pool.0,
                index: id.index,
                state: words.into(),
                up: numbers(&r.up),
                acting: numbers(&r.acting),
                primary: r.primary.map(|o| o.0),
                interval: r.interval.0,
                objects: s.objects,
                degraded_objects: s.degraded_objects,
                unfound_objects: s.unfound_objects,
                waiting_for: s.waiting_for,
            }
        })
        .collect()
}

pub(super) fn damaged_object(d: pb::DamagedObject) -> DamagedObject {
    let object = ObjectId { volume: VolumeId(d.volume), index: d.index, layer: LayerId(d.layer) };
    DamagedObject { object, inconsistent: d.inconsistent }
}

/// Objects of a group without a good copy: how many, and the first of them in words. Those of the last passes, and those that reads
/// have met since.
pub(super) fn damaged(state: &MonitorState, volatile: &Volatile, id: PgId) -> (u64, Vec<String>) {
    let met = volatile.pgs.get(&id);
    let record = state.scrubs.get(&id);
    let mut named: BTreeMap<ObjectId, bool> =
        record.into_iter().flat_map(|r| &r.damaged).map(|d| (d.object, d.inconsistent)).collect();
    let since = met.into_iter().flat_map(|s| s.damaged.iter().cloned().map(damaged_object));
    named.extend(since.map(|d| (d.object, d.inconsistent)));
    let count = record.map_or(0, |r| r.damaged_objects).max(met.map_or(0, |s| s.damaged_objects));
    let of = |v: &VolumeId| match state.volumes.get(v) {
        Some(volume) => format!(" of volume {}", volume.name),
        None => String::new(),
    };
    let words = named.iter().take(DAMAGED_NAMED_MAX).map(|(o, inconsistent)| {
        let what = match inconsistent {
            true => "copies differ and there is no majority",
            false => "no copy can be read whole",
        };
        format!("object {o}{}: {what}", of(&o.volume))
    });
    (count.max(named.len() as u64), words.collect())
}

fn depth(deep: Option<bool>) -> String {
    match deep {
        None => "none",
        Some(false) => "light",
        Some(true) => "deep",
    }
    .into()
}

pub(super) fn scrub_settings(state: &MonitorState) -> pb::ScrubSettings {
    let s = state.scrub_settings;
    pb::ScrubSettings {
        interval_s: s.interval_s,
        deep_interval_s: s.deep_interval_s,
        max_rate_bytes_per_s: s.rate_bytes_per_s,
    }
}

pub(super) fn scrubs(state: &MonitorState, volatile: &Volatile, pool: Option<PoolId>) -> Vec<pb::PgScrub> {
    let chosen = state.map.pgs.keys().filter(|id| pool.is_none_or(|p| id.pool == p));
    chosen
        .map(|id| {
            let record = state.scrubs.get(id).cloned().unwrap_or_default();
            let running = volatile.pgs.get(id).and_then(|s| s.scrub);
            let (damaged_objects, damaged) = damaged(state, volatile, *id);
            let (objects, findings, repaired) = match &running {
                Some(p) => (p.objects_done, p.findings, p.repaired),
                None => (record.last.objects, record.last.findings, record.last.repaired),
            };
            pb::PgScrub {
                pool: id.pool.0,
                index: id.index,
                last_unix_ms: record.last_unix_ms,
                last_deep_unix_ms: record.last_deep_unix_ms,
                requested: depth(record.requested()),
                running: depth(running.map(|p| p.deep)),
                objects,
                findings,
                repaired,
                damaged_objects,
                damaged,
            }
        })
        .collect()
}

pub(super) fn totals(state: &MonitorState, volatile: &Volatile) -> Totals {
    let mut totals = Totals::default();
    for (id, record) in &state.map.pgs {
        let (words, status) = pg_state(state, volatile, *id, record);
        totals.pgs += 1;
        if words == "active+clean" {
            continue;
        }
        totals.not_clean += 1;
        if let Some(s) = status {
            totals.degraded_objects = totals.degraded_objects.saturating_add(s.degraded_objects);
            totals.degraded_bytes = totals.degraded_bytes.saturating_add(s.degraded_bytes);
            totals.unfound_objects = totals.unfound_objects.saturating_add(s.unfound_objects);
        }
    }
    totals
}

pub(super) fn rebuild(state: &MonitorState, volatile: &Volatile) -> pb::RebuildStatus {
    let totals = totals(state, volatile);
    let (rate, _) = volatile.meter.rates();
    let rebuilt = volatile.meter.rebuilt();
    let not_clean = state.map.pgs.iter().filter_map(|(id, r)| {
        let (words, status) = pg_state(state, volatile, *id, r);
        let s = status.cloned().unwrap_or_default();
        (words != "active+clean").then(|| pb::PgRebuild {
            pool: id.pool.0,
            index: id.index,
            state: words.into(),
            degraded_objects: s.degraded_objects,
            recovered_objects: s.recovered_objects,
            waiting_for: s.waiting_for,
        })
    });
    let objects_per_s = volatile.meter.objects_per_s();
    let eta_s = match objects_per_s > 0.0 && totals.degraded_objects > 0 {
        true => (totals.degraded_objects as f64 / objects_per_s).ceil() as u64,
        false => 0,
    };
    pb::RebuildStatus {
        max_rate_bytes_per_s: state.rebuild_rate_bytes_per_s,
        unix_ms: unix_ms(),
        pgs_total: totals.pgs,
        pgs_not_clean: totals.not_clean,
        degraded_objects: totals.degraded_objects,
        degraded_bytes: totals.degraded_bytes,
        unfound_objects: totals.unfound_objects,
        recovered_objects: rebuilt.objects,
        recovered_bytes: rebuilt.bytes,
        rate_bytes_per_s: rate,
        eta_s,
        pgs: not_clean.collect(),
    }
}

pub(super) fn volume(state: &MonitorState, id: VolumeId) -> Option<pb::VolumeInfo> {
    let v = state.volumes.get(&id)?;
    let pool = state.map.pools.get(&v.pool)?;
    let held = state.map.attachments.get(&id);
    Some(pb::VolumeInfo {
        id: id.0,
        name: v.name.clone(),
        pool: pool.name.clone(),
        pool_id: v.pool.0,
        size_bytes: v.size_bytes,
        layers: v.layers.iter().map(|l| l.0).collect(),
        object_bytes: pool.object_bytes,
        attached_host: held.map(|h| state.host_of(h.client).to_owned()).unwrap_or_default(),
        generation: held.map_or(0, |h| h.generation.0),
        root: v.root.0,
        origin: v.origin.map(|s| state.snapshot_name(s)).unwrap_or_default(),
        snapshots: state.snapshots_of(id).count() as u32,
    })
}

/// A snapshot as a volume that can be read.
pub(super) fn frozen(state: &MonitorState, id: SnapshotId) -> Option<pb::VolumeInfo> {
    let s = state.snapshots.get(&id)?;
    let of = volume(state, s.volume)?;
    Some(pb::VolumeInfo {
        name: state.snapshot_name(id),
        size_bytes: s.size_bytes,
        layers: s.layers.iter().map(|l| l.0).collect(),
        attached_host: String::new(),
        generation: 0,
        origin: String::new(),
        snapshots: 0,
        ..of
    })
}

pub(super) fn snapshot(state: &MonitorState, id: SnapshotId) -> Option<pb::SnapshotInfo> {
    let s = state.snapshots.get(&id)?;
    Some(pb::SnapshotInfo {
        id: id.0,
        volume: volume_name(state, s.volume),
        name: s.name.clone(),
        size_bytes: s.size_bytes,
        layers: s.layers.iter().map(|l| l.0).collect(),
        unix_ms: s.unix_ms,
        clones: state.clones_of(id).into_iter().map(str::to_owned).collect(),
    })
}

fn volume_name(state: &MonitorState, id: VolumeId) -> String {
    state.volumes.get(&id).map(|v| v.name.clone()).unwrap_or_default()
}

pub(super) fn export(state: &MonitorState, volatile: &Volatile, id: u64, e: &Export) -> pb::ExportInfo {
    let kind = match e.kind {
        ExportKind::Nbd => pb::ExportKind::Nbd,
        ExportKind::VhostUser => pb::ExportKind::VhostUser,
    };
    let report = volatile.gateways.get(&e.host).and_then(|(_, r)| r.exports.iter().find(|x| x.id == id));
    let known = |s: i32| s != pb::ExportState::Unspecified as i32 && pb::ExportState::try_from(s).is_ok();
    pb::ExportInfo {
        id,
        volume: match e.snapshot {
            Some(snapshot) => state.snapshot_name(snapshot),
            None => volume_name(state, e.volume),
        },
        kind: kind as i32,
        read_only: e.read_only,
        host: e.host.clone(),
        state: report.map(|r| r.state).filter(|s| known(*s)).unwrap_or(pb::ExportState::Pending as i32),
        uri: report.map(|r| r.uri.clone()).unwrap_or_default(),
        socket: report.map(|r| r.socket.clone()).unwrap_or_default(),
        error: report.map(|r| r.error.clone()).unwrap_or_default(),
        vm: e.vm.clone().unwrap_or_default(),
    }
}

pub(super) fn vm(state: &MonitorState, volatile: &Volatile, name: &str, vm: &Vm) -> pb::VmInfo {
    let agent = volatile.agents.get(&vm.host).map(|(_, a)| a);
    let report = agent.and_then(|a| a.vms.iter().find(|v| v.name == name));
    let attached =
        |volume: &str| report.is_some_and(|r| r.disks.iter().any(|d| d.volume == volume && d.attached));
    let disk = |d: &crate::state::Disk| {
        let volume = volume_name(state, d.volume);
        pb::VmDisk { attached: attached(&volume), volume, serial: d.serial.clone() }
    };
    let stopped_if_none = match vm.wanted_running {
        true => pb::VmState::Unspecified,
        false => pb::VmState::Stopped,
    };
    pb::VmInfo {
        name: name.into(),
        cpus: vm.cpus,
        memory_bytes: vm.memory_bytes,
        disks: vm.disks.iter().filter(|d| !d.leaving).map(disk).collect(),
        host: vm.host.clone(),
        kernel_args: vm.kernel_args.clone(),
        wanted: if vm.wanted_running { pb::VmState::Running } else { pb::VmState::Stopped } as i32,
        state: report.map_or(stopped_if_none as i32, |r| r.state),
        error: report.map(|r| r.error.clone()).unwrap_or_default(),
        engine: report.map(|r| r.engine.clone()).unwrap_or_default(),
        agent_addr: agent.map(|a| a.agent_addr.clone()).unwrap_or_default(),
        engine_wanted: vm.engine.clone(),
        cpu_model: vm.cpu_model.clone(),
        nics: vm.nics.iter().map(|n| pb::VmNic { tap: n.tap.clone(), mac: n.mac.clone() }).collect(),
    }
}

pub(super) fn action(action: VmAction) -> pb::VmAction {
    match action {
        VmAction::Start => pb::VmAction::Start,
        VmAction::Stop => pb::VmAction::Stop,
        VmAction::Kill => pb::VmAction::Kill,
    }
}
