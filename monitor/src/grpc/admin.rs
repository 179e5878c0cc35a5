//! `AdminService`: what operators ask. Checks form here, meaning in the state.

use super::leadership::open;
use super::monitors::member;
use super::{Monitor, invalid, refused, view};
use crate::state::scrubs::ScrubSettings;
use crate::state::slow::SlowPolicy;
use crate::state::{Command, DiskRequest, ExportKind, Nic, Reply, Vm, VmAction};
use gabion_proto::admission::{self, Resources};
use gabion_proto::convert;
use gabion_proto::ids::*;
use gabion_proto::map::{FailureDomain, Redundancy};
use gabion_proto::pb::{self, Empty};
use std::collections::BTreeSet;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

fn gone(what: &str) -> Status {
    Status::aborted(format!("the {what} was removed meanwhile"))
}

fn nic(n: pb::VmNic) -> Nic {
    Nic { tap: n.tap, mac: n.mac }
}

fn disk(d: pb::VmDisk) -> DiskRequest {
    DiskRequest { volume: d.volume, serial: d.serial }
}

impl Monitor {
    fn pool_info(&self, name: &str) -> Result<pb::PoolInfo, Status> {
        let state = self.state();
        view::pool(&state, state.pool_named(name).map_err(refused)?).ok_or_else(|| gone("pool"))
    }

    fn volume_info(&self, name: &str) -> Result<pb::VolumeInfo, Status> {
        let state = self.state();
        if name.contains('@') {
            let id = state.snapshot_named(name).map_err(refused)?;
            return view::frozen(&state, id).ok_or_else(|| gone("snapshot"));
        }
        view::volume(&state, state.volume_named(name).map_err(refused)?).ok_or_else(|| gone("volume"))
    }

    fn vm_info(&self, name: &str) -> Result<pb::VmInfo, Status> {
        let state = self.state();
        let vm = state.vms.get(name).ok_or_else(|| Status::not_found(format!("there is no VM {name:?}")))?;
        Ok(view::vm(&state, &self.0.volatile.lock(), name, vm))
    }

    /// Refuses a guest that its host has no room for. A host that does not report is asked when it does: its agent
    /// judges again before it starts the guest.
    fn admit(&self, vm: &str, host: &str, wants: Resources, running: Vec<Resources>) -> Result<(), Status> {
        let unheard = self.hosts_unheard();
        let volatile = self.0.volatile.lock();
        let Some((_, agent)) = volatile.agents.get(host) else {
            // What it has is not known to this leader yet, and may be less than is asked for.
            return if unheard { Err(self.too_early("host agent")) } else { Ok(()) };
        };
        let has = Resources { cpus: agent.cpus, memory_bytes: agent.memory_bytes };
        match admission::refusal(has, running, wants) {
            Some(why) => {
                Err(Status::resource_exhausted(format!("VM {vm} does not fit on host {host}: {why}")))
            }
            None => Ok(()),
        }
    }

    /// The host that is meant when none is named.
    fn only_host(&self, named: String, what: &str, hosts: BTreeSet<String>) -> Result<String, Status> {
        if !named.is_empty() {
            return Ok(named);
        }
        if self.hosts_unheard() {
            // As many as there are now may be too few to tell.
            return Err(self.too_early(what));
        }
        match hosts.len() {
            0 => Err(Status::failed_precondition(format!(
                "no {what} has reported: start one or name the host"
            ))),
            1 => Ok(hosts.into_iter().next().unwrap_or_default()),
            _ => {
                let names = hosts.into_iter().collect::<Vec<_>>().join(", ");
                Err(Status::invalid_argument(format!("name the host: there is a {what} on each of {names}")))
            }
        }
    }
}

#[tonic::async_trait]
impl pb::admin_service_server::AdminService for Monitor {
    async fn create_pool(&self, request: Request<pb::CreatePoolRequest>) -> Answer<pb::PoolInfo> {
        let (id, r) = open(request)?;
        let redundancy =
            r.redundancy.ok_or_else(|| invalid("redundancy: must name replicas or an erasure code"))?;
        let redundancy = Redundancy::try_from(redundancy).map_err(invalid)?;
        let domain = convert::failure_domain(r.failure_domain).map_err(invalid)?;
        self.propose_for(
            id,
            Command::CreatePool {
                name: r.name.clone(),
                redundancy,
                min_size: r.min_size,
                failure_domain: domain.unwrap_or(FailureDomain::Host),
                pg_count: r.pg_count,
                object_bytes: r.object_bytes,
            },
        )
        .await?;
        Ok(Response::new(self.pool_info(&r.name)?))
    }

    async fn list_pools(&self, _: Request<Empty>) -> Answer<pb::ListPoolsReply> {
        self.confirm().await?;
        let state = self.state();
        let pools = state.map.pools.keys().filter_map(|id| view::pool(&state, *id)).collect();
        Ok(Response::new(pb::ListPoolsReply { pools }))
    }

    async fn remove_pool(&self, request: Request<pb::NameRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::RemovePool { name: r.name }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn set_pool(&self, request: Request<pb::SetPoolRequest>) -> Answer<pb::PoolInfo> {
        let (id, r) = open(request)?;
        let (name, min_size) = (r.name.clone(), r.min_size);
        let command = match (r.pg_count, r.replicas) {
            (Some(pg_count), None) if min_size.is_none() => {
                let state = self.state();
                let allowed = self.0.volatile.lock().may_merge(&state, &name, pg_count);
                allowed.map_err(Status::failed_precondition)?;
                Command::SetPgs { name, pg_count }
            }
            (Some(_), _) => {
                return Err(Status::invalid_argument(
                    "the number of groups is changed alone, not with other settings",
                ));
            }
            (None, Some(replicas)) => Command::SetReplicas { name, replicas, min_size },
            (None, None) => Command::SetPool { name, min_size },
        };
        self.propose_for(id, command).await?;
        Ok(Response::new(self.pool_info(&r.name)?))
    }

    async fn add_osd(&self, request: Request<pb::AddOsdRequest>) -> Answer<pb::AddOsdReply> {
        let (id, r) = open(request)?;
        let disk = convert::identity("disk", &r.disk).map_err(invalid)?;
        let command = Command::AddOsd {
            disk,
            host: r.host,
            rack: r.rack,
            weight: r.weight,
            capacity_bytes: r.capacity_bytes,
        };
        match self.propose_for(id, command).await? {
            Reply::Osd(id) => {
                let cluster = self.state().map.cluster.0.to_vec();
                Ok(Response::new(pb::AddOsdReply { id: id.0, cluster }))
            }
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn list_osds(&self, _: Request<Empty>) -> Answer<pb::ListOsdsReply> {
        self.confirm().await?;
        let osds = view::osds(&self.state(), &self.0.volatile.lock());
        Ok(Response::new(pb::ListOsdsReply { osds }))
    }

    async fn out_osd(&self, request: Request<pb::OsdRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::OutOsd { osd: OsdId(r.id), automatic: false }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn in_osd(&self, request: Request<pb::OsdRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::InOsd { osd: OsdId(r.id) }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn reweight_osd(&self, request: Request<pb::ReweightOsdRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::ReweightOsd { osd: OsdId(r.id), weight: r.weight }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn remove_osd(&self, request: Request<pb::RemoveOsdRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::RemoveOsd { osd: OsdId(r.id), force: r.force }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn list_pgs(&self, request: Request<pb::ListPgsRequest>) -> Answer<pb::ListPgsReply> {
        self.confirm().await?;
        let state = self.state();
        let pool = match request.into_inner().pool.as_str() {
            "" => None,
            name => Some(state.pool_named(name).map_err(refused)?),
        };
        let pgs = view::pgs(&state, &self.0.volatile.lock(), pool);
        Ok(Response::new(pb::ListPgsReply { pgs }))
    }

    async fn start_scrub(&self, request: Request<pb::StartScrubRequest>) -> Answer<pb::StartScrubReply> {
        let (id, r) = open(request)?;
        let command = Command::RequestScrub {
            pool: Some(r.pool).filter(|name| !name.is_empty()),
            pg: r.pg.map(|pg| PgId { pool: PoolId(pg.pool), index: pg.index }),
            deep: r.deep,
        };
        match self.propose_for(id, command).await? {
            Reply::Scrubs(pgs) => Ok(Response::new(pb::StartScrubReply { pgs })),
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn set_rebuild(&self, request: Request<pb::SetRebuildRequest>) -> Answer<pb::RebuildSettings> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::SetRebuildRate(r.max_rate_bytes_per_s)).await?;
        let max_rate_bytes_per_s = self.state().rebuild_rate_bytes_per_s;
        Ok(Response::new(pb::RebuildSettings { max_rate_bytes_per_s }))
    }

    async fn get_slow_policy(&self, _: Request<Empty>) -> Answer<pb::SlowPolicy> {
        self.confirm().await?;
        Ok(Response::new(self.slow_policy()))
    }

    async fn set_slow_policy(&self, request: Request<pb::SetSlowPolicyRequest>) -> Answer<pb::SlowPolicy> {
        let (id, r) = open(request)?;
        self.confirm().await?;
        let now = self.state().slow_policy;
        let policy = SlowPolicy {
            evict_after_s: r.evict_after_s.unwrap_or(now.evict_after_s),
            limit_ms: r.limit_ms.unwrap_or(now.limit_ms),
        };
        self.propose_for(id, Command::SetSlowPolicy(policy)).await?;
        Ok(Response::new(self.slow_policy()))
    }

    async fn list_scrubs(&self, request: Request<pb::ListPgsRequest>) -> Answer<pb::ListScrubsReply> {
        self.confirm().await?;
        let state = self.state();
        let pool = match request.into_inner().pool.as_str() {
            "" => None,
            name => Some(state.pool_named(name).map_err(refused)?),
        };
        let settings = Some(view::scrub_settings(&state));
        let pgs = view::scrubs(&state, &self.0.volatile.lock(), pool);
        Ok(Response::new(pb::ListScrubsReply { settings, pgs }))
    }

    async fn set_scrub(&self, request: Request<pb::SetScrubRequest>) -> Answer<pb::ScrubSettings> {
        let (id, r) = open(request)?;
        self.confirm().await?;
        let now = self.state().scrub_settings;
        let settings = ScrubSettings {
            interval_s: r.interval_s.unwrap_or(now.interval_s),
            deep_interval_s: r.deep_interval_s.unwrap_or(now.deep_interval_s),
            rate_bytes_per_s: r.max_rate_bytes_per_s.unwrap_or(now.rate_bytes_per_s),
        };
        self.propose_for(id, Command::SetScrub(settings)).await?;
        Ok(Response::new(view::scrub_settings(&self.state())))
    }

    async fn create_volume(&self, request: Request<pb::CreateVolumeRequest>) -> Answer<pb::VolumeInfo> {
        let (id, r) = open(request)?;
        let command = Command::CreateVolume { name: r.name.clone(), pool: r.pool, size_bytes: r.size_bytes };
        self.propose_for(id, command).await?;
        Ok(Response::new(self.volume_info(&r.name)?))
    }

    async fn list_volumes(&self, _: Request<Empty>) -> Answer<pb::ListVolumesReply> {
        self.confirm().await?;
        let state = self.state();
        let volumes = state.volumes.keys().filter_map(|id| view::volume(&state, *id)).collect();
        Ok(Response::new(pb::ListVolumesReply { volumes }))
    }

    async fn get_volume(&self, request: Request<pb::NameRequest>) -> Answer<pb::VolumeInfo> {
        self.confirm().await?;
        Ok(Response::new(self.volume_info(&request.into_inner().name)?))
    }

    async fn resize_volume(&self, request: Request<pb::ResizeVolumeRequest>) -> Answer<pb::VolumeInfo> {
        let (id, r) = open(request)?;
        let command = Command::ResizeVolume { name: r.name.clone(), size_bytes: r.size_bytes };
        self.propose_for(id, command).await?;
        Ok(Response::new(self.volume_info(&r.name)?))
    }

    async fn clone_volume(&self, request: Request<pb::CloneVolumeRequest>) -> Answer<pb::VolumeInfo> {
        let (id, r) = open(request)?;
        let command = Command::CloneVolume { snapshot: r.snapshot, name: r.name.clone() };
        self.propose_for(id, command).await?;
        Ok(Response::new(self.volume_info(&r.name)?))
    }

    async fn create_snapshot(&self, request: Request<pb::SnapshotRequest>) -> Answer<pb::SnapshotInfo> {
        let (id, r) = open(request)?;
        self.take_snapshot(id, r.snapshot).await.map(Response::new)
    }

    async fn list_snapshots(
        &self,
        request: Request<pb::ListSnapshotsRequest>,
    ) -> Answer<pb::ListSnapshotsReply> {
        self.confirm().await?;
        let state = self.state();
        let of = match request.into_inner().volume.as_str() {
            "" => None,
            name => Some(state.volume_named(name).map_err(refused)?),
        };
        let chosen = state.snapshots.iter().filter(|(_, s)| of.is_none_or(|v| s.volume == v));
        let snapshots = chosen.filter_map(|(id, _)| view::snapshot(&state, *id)).collect();
        Ok(Response::new(pb::ListSnapshotsReply { snapshots }))
    }

    async fn remove_snapshot(&self, request: Request<pb::SnapshotRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::RemoveSnapshot { snapshot: r.snapshot }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn rollback_volume(&self, request: Request<pb::SnapshotRequest>) -> Answer<pb::VolumeInfo> {
        let (id, r) = open(request)?;
        let volume = r.snapshot.split('@').next().unwrap_or_default().to_owned();
        self.propose_for(id, Command::RollbackVolume { snapshot: r.snapshot }).await?;
        // A holder from before that is out of touch writes no more.
        self.in_force(self.state().map.epoch, |_, _| true).await?;
        Ok(Response::new(self.volume_info(&volume)?))
    }

    async fn remove_volume(&self, request: Request<pb::NameRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::RemoveVolume { name: r.name }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn fence_volume(&self, request: Request<pb::NameRequest>) -> Answer<pb::VolumeInfo> {
        let (id, r) = open(request)?;
        let name = r.name;
        let fence = Command::FenceVolume { volume: name.clone() };
        let Reply::Fenced { epoch } = self.propose_for(id, fence).await? else {
            return Err(Status::internal("unexpected answer"));
        };
        self.in_force(epoch, |_, _| true).await?;
        self.get_volume(Request::new(pb::NameRequest { name })).await
    }

    async fn add_export(&self, request: Request<pb::AddExportRequest>) -> Answer<pb::ExportInfo> {
        let (id, r) = open(request)?;
        let kind = match pb::ExportKind::try_from(r.kind) {
            Ok(pb::ExportKind::Nbd) => ExportKind::Nbd,
            Ok(pb::ExportKind::VhostUser) => ExportKind::VhostUser,
            _ => return Err(invalid("kind: must be NBD or vhost-user")),
        };
        let reply = match self.answered(id).await? {
            Some(reply) => reply,
            None => {
                let hosts = self.0.volatile.lock().gateways.keys().cloned().collect();
                let host = self.only_host(r.host, "gateway", hosts)?;
                let command = Command::AddExport { volume: r.volume, kind, read_only: r.read_only, host };
                self.propose_for(id, command).await?
            }
        };
        let Reply::Export(id) = reply else { return Err(Status::internal("unexpected answer")) };
        let state = self.state();
        let export = state.exports.get(&id).ok_or_else(|| gone("export"))?;
        Ok(Response::new(view::export(&state, &self.0.volatile.lock(), id, export)))
    }

    async fn list_exports(&self, _: Request<Empty>) -> Answer<pb::ListExportsReply> {
        self.confirm().await?;
        let state = self.state();
        let volatile = self.0.volatile.lock();
        let exports = state.exports.iter().map(|(id, e)| view::export(&state, &volatile, *id, e)).collect();
        Ok(Response::new(pb::ListExportsReply { exports }))
    }

    async fn remove_export(&self, request: Request<pb::ExportRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::RemoveExport { id: r.id }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn list_hosts(&self, _: Request<Empty>) -> Answer<pb::ListHostsReply> {
        self.confirm().await?;
        let state = self.state();
        let volatile = self.0.volatile.lock();
        let mut names: BTreeSet<&String> = volatile.gateways.keys().chain(volatile.agents.keys()).collect();
        names.extend(state.vms.values().map(|v| &v.host).chain(state.exports.values().map(|e| &e.host)));
        let hosts = names.into_iter().map(|name| {
            let agent = volatile.agents.get(name).map(|(_, a)| a.clone());
            let agent_up = agent.is_some();
            let agent = agent.unwrap_or_default();
            pb::HostInfo {
                name: name.clone(),
                gateway_up: volatile.gateways.contains_key(name),
                agent_up,
                agent_addr: agent.agent_addr,
                cpus: agent.cpus,
                memory_bytes: agent.memory_bytes,
                accelerator: agent.accelerator,
                vms: state.vms.values().filter(|v| v.host == *name).count() as u32,
            }
        });
        Ok(Response::new(pb::ListHostsReply { hosts: hosts.collect() }))
    }

    async fn create_vm(&self, request: Request<pb::CreateVmRequest>) -> Answer<pb::VmInfo> {
        let (id, r) = open(request)?;
        if self.answered(id).await?.is_some() {
            return Ok(Response::new(self.vm_info(&r.name)?));
        }
        let hosts = self.0.volatile.lock().agents.keys().cloned().collect();
        let host = self.only_host(r.host, "host agent", hosts)?;
        let wants = Resources { cpus: r.cpus, memory_bytes: r.memory_bytes };
        self.admit(&r.name, &host, wants, Vec::new())?;
        self.propose_for(
            id,
            Command::CreateVm {
                name: r.name.clone(),
                cpus: r.cpus,
                memory_bytes: r.memory_bytes,
                disks: r.disks.into_iter().map(disk).collect(),
                host,
                kernel_args: r.kernel_args,
                engine: r.engine,
                cpu_model: r.cpu_model,
                nics: r.nics.into_iter().map(nic).collect(),
            },
        )
        .await?;
        Ok(Response::new(self.vm_info(&r.name)?))
    }

    async fn list_vms(&self, _: Request<Empty>) -> Answer<pb::ListVmsReply> {
        self.confirm().await?;
        let state = self.state();
        let volatile = self.0.volatile.lock();
        let vms = state.vms.iter().map(|(name, vm)| view::vm(&state, &volatile, name, vm)).collect();
        Ok(Response::new(pb::ListVmsReply { vms }))
    }

    async fn get_vm(&self, request: Request<pb::NameRequest>) -> Answer<pb::VmInfo> {
        self.confirm().await?;
        Ok(Response::new(self.vm_info(&request.into_inner().name)?))
    }

    async fn set_vm_state(&self, request: Request<pb::SetVmStateRequest>) -> Answer<pb::VmInfo> {
        let (id, r) = open(request)?;
        let action = match pb::VmAction::try_from(r.action) {
            Ok(pb::VmAction::Start) => VmAction::Start,
            Ok(pb::VmAction::Stop) => VmAction::Stop,
            Ok(pb::VmAction::Kill) => VmAction::Kill,
            _ => return Err(invalid("action: must be start, stop or kill")),
        };
        if self.answered(id).await?.is_some() {
            return Ok(Response::new(self.vm_info(&r.name)?));
        }
        let now = self.vm_info(&r.name)?;
        let running = matches!(now.state(), pb::VmState::Starting | pb::VmState::Running);
        if action == VmAction::Start && now.wanted() == pb::VmState::Running && running {
            return Ok(Response::new(now));
        }
        if action == VmAction::Start {
            let state = self.state();
            let vm = state.vms.get(&r.name);
            let others = state
                .vms
                .iter()
                .filter(|(name, v)| **name != r.name && v.host == now.host && v.wanted_running);
            let of = |v: &Vm| Resources { cpus: v.cpus, memory_bytes: v.memory_bytes };
            self.admit(
                &r.name,
                &now.host,
                vm.map(of).unwrap_or_default(),
                others.map(|(_, v)| of(v)).collect(),
            )?;
        }
        self.propose_for(id, Command::SetVmState { name: r.name.clone(), action }).await?;
        Ok(Response::new(self.vm_info(&r.name)?))
    }

    async fn attach_disk(&self, request: Request<pb::AttachDiskRequest>) -> Answer<pb::VmInfo> {
        let (id, r) = open(request)?;
        let disk = disk(r.disk.ok_or_else(|| invalid("disk: must be given"))?);
        self.propose_for(id, Command::AttachDisk { vm: r.vm.clone(), disk }).await?;
        Ok(Response::new(self.vm_info(&r.vm)?))
    }

    async fn detach_disk(&self, request: Request<pb::DetachDiskRequest>) -> Answer<pb::VmInfo> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::DetachDisk { vm: r.vm.clone(), volume: r.volume }).await?;
        Ok(Response::new(self.vm_info(&r.vm)?))
    }

    async fn remove_vm(&self, request: Request<pb::NameRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.propose_for(id, Command::RemoveVm { name: r.name }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn list_monitors(&self, _: Request<Empty>) -> Answer<pb::ListMonitorsReply> {
        self.confirm().await?;
        let monitors = self.0.consensus.members().into_iter().map(member).collect();
        Ok(Response::new(pb::ListMonitorsReply { monitors }))
    }

    async fn add_monitor(&self, request: Request<pb::AddMonitorRequest>) -> Answer<pb::MonitorStatus> {
        let addr = request.into_inner().addr;
        let id = self.0.consensus.add_monitor(&addr).await.map_err(|e| self.membership_failed(e))?;
        let added = self.0.consensus.members().into_iter().find(|m| m.id == id);
        Ok(Response::new(member(added.ok_or_else(|| gone("monitor"))?)))
    }

    async fn remove_monitor(&self, request: Request<pb::RemoveMonitorRequest>) -> Answer<Empty> {
        let (id, r) = open(request)?;
        self.0.consensus.remove_monitor(r.id, id).await.map_err(|e| self.membership_failed(e))?;
        Ok(Response::new(Empty {}))
    }
}
