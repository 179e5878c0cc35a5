//! `HostService`: what gateways and host agents should do, and what they say is so.

use super::volatile::HOSTS_MAX;
use super::{Answers, Monitor, Sender, invalid, view};
use crate::state::{Command, MonitorState};
use gabion_common::clock::boottime_ms;
use gabion_proto::limits::valid_name;
use gabion_proto::pb::{self, Empty, host_report::Reporter};
use tonic::{Request, Response, Status};

impl Monitor {
    fn host_spec(&self, state: &MonitorState, host: &str) -> pb::HostSpec {
        let volatile = self.0.volatile.lock();
        let exports = state.exports.iter().filter(|(_, e)| e.host == host);
        let vms = state.vms.iter().filter(|(_, v)| v.host == host);
        pb::HostSpec {
            revision: 0,
            exports: exports.map(|(id, e)| view::export(state, &volatile, *id, e)).collect(),
            vms: vms
                .map(|(name, vm)| pb::VmSpec {
                    vm: Some(view::vm(state, &volatile, name, vm)),
                    action_number: vm.action_number,
                    action: view::action(vm.action) as i32,
                })
                .collect(),
        }
    }

    /// What has to be agreed on after a host agent's report.
    fn consequences(&self, state: &MonitorState, host: &str, report: &pb::AgentReport) -> Vec<Command> {
        let mut out = Vec::new();
        let mut volatile = self.0.volatile.lock();
        for seen in &report.vms {
            let Some(vm) = state.vms.get(&seen.name).filter(|v| v.host == host) else { continue };
            let has_exports = state.exports.values().any(|e| e.vm.as_deref() == Some(&seen.name));
            match seen.state() {
                pb::VmState::Starting | pb::VmState::Running | pb::VmState::Stopping => {
                    volatile.alive.insert(seen.name.clone(), vm.action_number);
                    let held = |volume: &str| seen.disks.iter().any(|d| d.volume == volume && d.attached);
                    for disk in vm.disks.iter().filter(|d| d.leaving) {
                        let name = state.volumes.get(&disk.volume).map_or("", |v| v.name.as_str());
                        if !held(name) {
                            out.push(Command::DiskReleased { vm: seen.name.clone(), volume: disk.volume });
                        }
                    }
                }
                pb::VmState::Stopped | pb::VmState::Failed if !vm.wanted_running && has_exports => {
                    out.push(Command::VmStopped { name: seen.name.clone(), action_number: vm.action_number });
                }
                // It ran since it was told to, so this is not a report from before the start.
                pb::VmState::Stopped
                    if vm.wanted_running && volatile.alive.get(&seen.name) == Some(&vm.action_number) =>
                {
                    out.push(Command::VmStopped { name: seen.name.clone(), action_number: vm.action_number });
                }
                _ => {}
            }
        }
        out
    }
}

async fn follow(monitor: Monitor, host: String, tx: Sender<pb::HostSpec>) {
    let mut states = monitor.0.consensus.watch();
    let mut reports = monitor.0.host_reports.subscribe();
    let mut last = None;
    loop {
        let state = states.borrow_and_update().clone();
        reports.mark_unchanged();
        let spec = monitor.host_spec(&state, &host);
        if last.as_ref() != Some(&spec) {
            let numbered = pb::HostSpec { revision: monitor.next_revision(), ..spec.clone() };
            last = Some(spec);
            if tx.send(Ok(numbered)).await.is_err() {
                return;
            }
        }
        let ended = tokio::select! {
            r = states.changed() => r.is_err(),
            r = reports.changed() => r.is_err(),
        };
        if ended {
            return;
        }
    }
}

#[tonic::async_trait]
impl pb::host_service_server::HostService for Monitor {
    type WatchHostStream = Answers<pb::HostSpec>;

    async fn watch_host(
        &self,
        request: Request<pb::WatchHostRequest>,
    ) -> Result<Response<Self::WatchHostStream>, Status> {
        let host = request.into_inner().host;
        if !valid_name(&host) {
            return Err(invalid(format!("{host:?} cannot be the name of a host")));
        }
        let term = self.confirm().await?;
        Ok(Response::new(self.stream(self.deposed(term), |tx| follow(self.clone(), host, tx))))
    }

    async fn report_host(&self, request: Request<pb::HostReport>) -> Result<Response<Empty>, Status> {
        let pb::HostReport { host, reporter } = request.into_inner();
        if !valid_name(&host) {
            return Err(invalid(format!("{host:?} cannot be the name of a host")));
        }
        self.seems_to_lead()?;
        let state = self.state();
        let now = boottime_ms();
        let mut commands = Vec::new();
        let full = |len: usize, known: bool| match len >= HOSTS_MAX && !known {
            true => Err(Status::resource_exhausted(format!("a cluster has at most {HOSTS_MAX} hosts"))),
            false => Ok(()),
        };
        let changed = match reporter {
            None => return Err(invalid("reporter: must be a gateway or a host agent")),
            Some(Reporter::Gateway(mut report)) => {
                report.exports.retain(|e| state.exports.get(&e.id).is_some_and(|x| x.host == host));
                let mut volatile = self.0.volatile.lock();
                full(volatile.gateways.len(), volatile.gateways.contains_key(&host))?;
                let old = volatile.gateways.insert(host, (now, report.clone()));
                old.is_none_or(|(_, o)| o != report)
            }
            Some(Reporter::Agent(mut report)) => {
                report.vms.retain(|v| state.vms.get(&v.name).is_some_and(|x| x.host == host));
                commands = self.consequences(&state, &host, &report);
                let mut volatile = self.0.volatile.lock();
                full(volatile.agents.len(), volatile.agents.contains_key(&host))?;
                let old = volatile.agents.insert(host, (now, report.clone()));
                old.is_none_or(|(_, o)| o != report)
            }
        };
        if changed {
            self.0.host_reports.send_modify(|n| *n += 1);
        }
        for command in commands {
            match self.propose(command).await {
                // Overtaken by an operator; the next report is judged anew.
                Err(e) if e.code() == tonic::Code::Aborted || e.code() == tonic::Code::NotFound => {}
                Err(e) => return Err(e),
                Ok(_) => {}
            }
        }
        Ok(Response::new(Empty {}))
    }
}
