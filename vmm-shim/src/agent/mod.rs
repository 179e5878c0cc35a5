//! The host agent: what the monitors want of this host, against what runs.
//!
//! ```text
//!  WatchHost ──► spec ──► one task per guest (guest.rs) ──► Engine
//!                              │ status
//!  ReportHost ◄── every change and every 2 s
//! ```
//!
//! A guest that runs is never killed because the monitors do not mention it (they may have lost
//! their memory); it is reported and left alone.

pub mod admission;
mod guest;
mod record;

use crate::console::Consoles;
use crate::engine::Engine;
use gabion_common::host_offer;
use gabion_common::metrics::{Page, Source};
use gabion_common::monitor_client::{Backoff, MonitorClient};
use gabion_proto::pb;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

const REPORT_EVERY: Duration = Duration::from_secs(2);

/// What every part of the agent shares.
pub struct Host {
    pub monitors: MonitorClient,
    pub name: String,
    pub run_dir: PathBuf,
    pub state_dir: PathBuf,
    pub agent_addr: SocketAddr,
    pub engine: Arc<dyn Engine>,
    /// kvm or tcg.
    pub accelerator: &'static str,
    pub consoles: Consoles,
    pub reports: Reports,
    pub ledger: admission::Ledger,
}

/// What each guest's task last said of it.
#[derive(Default)]
pub struct Reports {
    // Written by the guests' tasks, read by the reporter.
    vms: Mutex<BTreeMap<String, pb::VmInfo>>,
    changed: Notify,
}

impl Reports {
    fn set(&self, info: pb::VmInfo) {
        let mut vms = self.vms.lock().unwrap_or_else(|e| e.into_inner());
        if vms.get(&info.name) != Some(&info) {
            vms.insert(info.name.clone(), info);
            self.changed.notify_one();
        }
    }
    fn remove(&self, name: &str) {
        self.vms.lock().unwrap_or_else(|e| e.into_inner()).remove(name);
        self.changed.notify_one();
    }
    fn all(&self) -> Vec<pb::VmInfo> {
        self.vms.lock().unwrap_or_else(|e| e.into_inner()).values().cloned().collect()
    }
}

/// One guest as the monitors want it, with the exports of its disks.
#[derive(Clone, Default, PartialEq)]
pub(crate) struct Wanted {
    /// None: the monitors no longer know it.
    spec: Option<pb::VmSpec>,
    exports: Vec<pb::ExportInfo>,
}

struct Task {
    wanted: watch::Sender<Wanted>,
    handle: JoinHandle<()>,
}

/// What an agent shows to Prometheus.
pub struct Figures(pub Arc<Host>);

impl std::fmt::Debug for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Figures")
    }
}

impl Source for Figures {
    fn collect(&self, page: &mut Page<'_>) -> std::fmt::Result {
        let vms = self.0.reports.all();
        let mut states: BTreeMap<&'static str, u64> = BTreeMap::new();
        for vm in &vms {
            *states.entry(vm.state().as_str_name().trim_start_matches("VM_STATE_")).or_default() += 1;
        }
        let states: Vec<(String, u64)> = states.iter().map(|(s, n)| (s.to_lowercase(), *n)).collect();
        page.gauge("host_guests", "Guests that the monitors gave to this host", vms.len() as u64)?;
        let by_state = states.iter().map(|(state, n)| (vec![("state", state.as_str())], *n));
        page.gauges("host_guests_by_state", "The same by state", by_state)?;
        let running = || vms.iter().filter(|v| v.state() == pb::VmState::Running);
        page.gauge(
            "host_guest_cpus",
            "vCPUs of guests that run",
            running().map(|v| u64::from(v.cpus)).sum(),
        )?;
        page.gauge(
            "host_guest_memory_bytes",
            "Memory of guests that run",
            running().map(|v| v.memory_bytes).sum(),
        )
    }
}

/// Runs until dropped.
pub async fn run(host: Arc<Host>) {
    let (tx, mut specs) = watch::channel(None);
    tokio::join!(watch_specs(&host, tx), report(&host), async {
        let mut tasks: HashMap<String, Task> = HashMap::new();
        while specs.changed().await.is_ok() {
            let spec = specs.borrow_and_update().clone();
            if let Some(spec) = spec {
                apply(&host, &mut tasks, spec);
            }
        }
    });
}

fn apply(host: &Arc<Host>, tasks: &mut HashMap<String, Task>, spec: pb::HostSpec) {
    tasks.retain(|_, task| !task.handle.is_finished());
    let mut all: HashMap<String, Wanted> = HashMap::new();
    for vm in spec.vms {
        let Some(name) = vm.vm.as_ref().map(|v| v.name.clone()) else { continue };
        // The name becomes a directory.
        if !is_safe_name(&name) {
            tracing::warn!(name, "a guest with an unusable name is ignored");
            continue;
        }
        let exports = spec.exports.iter().filter(|e| e.vm == name).cloned().collect();
        all.insert(name, Wanted { spec: Some(vm), exports });
    }
    for (name, task) in tasks.iter() {
        if !all.contains_key(name) {
            task.wanted.send_replace(Wanted::default());
        }
    }
    for (name, wanted) in all {
        match tasks.get(&name) {
            Some(task) => {
                task.wanted.send_if_modified(|w| {
                    let changed = *w != wanted;
                    *w = wanted;
                    changed
                });
            }
            None => {
                let (tx, rx) = watch::channel(wanted);
                let handle = tokio::spawn(guest::run(host.clone(), name.clone(), rx));
                tasks.insert(name, Task { wanted: tx, handle });
            }
        }
    }
}

fn is_safe_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !name.is_empty()
        && name.len() <= gabion_proto::limits::NAME_BYTES_MAX
        && !name.starts_with('.')
        && name.bytes().all(allowed)
}

async fn watch_specs(host: &Host, specs: watch::Sender<Option<pb::HostSpec>>) {
    let mut backoff = Backoff::default();
    loop {
        let request = pb::WatchHostRequest { host: host.name.clone() };
        match host.monitors.host().watch_host(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(spec)) => {
                            backoff.reset();
                            specs.send_replace(Some(spec));
                        }
                        Ok(None) => break host.monitors.rotate(),
                        Err(status) => {
                            tracing::warn!(
                                error = status.message(),
                                "lost the monitor's wishes; asking again"
                            );
                            break host.monitors.failed(&status);
                        }
                    }
                }
            }
            Err(status) => {
                if backoff.is_first() {
                    tracing::warn!(error = status.message(), "no monitor says what to run; asking again");
                }
                // Not the leader: it said who is.
                host.monitors.failed(&status);
            }
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

async fn report(host: &Host) {
    loop {
        let (cpus, memory_bytes) = (host_offer::cpus(), host_offer::memory_bytes("MemTotal"));
        let agent = pb::AgentReport {
            agent_addr: host.agent_addr.to_string(),
            cpus,
            memory_bytes,
            accelerator: host.accelerator.into(),
            vms: host.reports.all(),
        };
        let report = pb::HostReport {
            host: host.name.clone(),
            reporter: Some(pb::host_report::Reporter::Agent(agent)),
        };
        let sent = host.monitors.once(|m| {
            let report = report.clone();
            async move { m.host().report_host(report).await }
        });
        if let Err(status) = sent.await {
            tracing::debug!(error = status.message(), "report not delivered");
        }
        tokio::select! {
            () = host.reports.changed.notified() => {}
            () = tokio::time::sleep(REPORT_EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_their_directory() {
        for good in ["a", "web-1", "x.y_z"] {
            assert!(is_safe_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", ".hidden", "a b", "ä"] {
            assert!(!is_safe_name(bad), "{bad}");
        }
    }
}
