//! The supervisor: brings the cluster up in order, then keeps it up until SIGTERM.
//!
//! Order up: monitors, format of new OSDs, OSDs, gateway, host agent. Order down: the reverse, so
//! that nobody waits for somebody who is gone.

use super::control::{self, Orders};
use super::daemon::{self, Change, Order, Spec};
use super::layout::{DaemonState, DevConfig, Kind, Layout, State};
use super::process::Process;
use crate::config::Target;
use anyhow::{Context, Result, bail};
use futures::future::join_all;
use gabion_common::addr_file;
use gabion_common::monitor_client::MonitorClient;
use gabion_common::tls::Role;
use gabion_proto::pb;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

const CHANGES_MAX: usize = 64;
const REQUESTS_MAX: usize = 8;
const MONITOR_WITHIN: Duration = Duration::from_secs(30);

struct Supervisor {
    layout: Layout,
    config: DevConfig,
    changes: mpsc::Sender<Change>,
    orders: Orders,
}

pub async fn run(dir: &Path) -> Result<()> {
    gabion_common::telemetry::init("supervisor");
    // Its own session: the terminal that started it may go. Refused only to a group leader, which
    // has what it needs.
    let _ = rustix::process::setsid();
    let layout = Layout::new(dir)?;
    let config = layout.config()?.context("no dev.toml here: gabion dev up makes it")?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let me = Process::of(std::process::id()).context("/proc is not mounted")?;
    let (failed_tx, failed_rx) = oneshot::channel();
    let (changes, changed) = mpsc::channel(CHANGES_MAX);
    let writer = tokio::spawn(write_state(layout.clone(), me, changed, failed_rx));
    match std::fs::remove_file(layout.socket()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let listener = UnixListener::bind(layout.socket())
        .with_context(|| format!("cannot listen on {}", layout.socket().display()))?;
    let supervisor = Supervisor { layout, config, changes, orders: Orders::default() };
    let result = tokio::select! {
        result = async {
            supervisor.start_all().await?;
            tracing::info!("every daemon is started");
            control::serve(listener, supervisor.orders.clone()).await
        } => result,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    supervisor.stop_all().await;
    if let Err(e) = &result {
        tracing::error!("{e:#}");
        // The writer is there until `changes` closes.
        let _ = failed_tx.send(format!("{e:#}"));
    }
    drop(supervisor);
    writer.await??;
    result
}

impl Supervisor {
    async fn start_all(&self) -> Result<()> {
        self.start_monitors().await?;
        let addr = self.config.monitors().join(",");
        for slot in 0..self.config.osds {
            self.start_osd(slot, &addr).await?;
        }
        let run_dir = self.layout.dir.join("gateway.host1");
        let mut args =
            strings(["--monitors", &addr, "--host", "host1", "--nbd-listen", "127.0.0.1:0", "--run-dir"]);
        args.push(run_dir.clone().into());
        args.extend(self.common_args(Role::Gateway));
        self.start(Kind::Gateway, "host1".to_owned(), args, run_dir)?;
        if !program("gabion-host")?.exists() {
            tracing::warn!("gabion-host is not installed beside gabion: no virtual machines here");
            return Ok(());
        }
        let run_dir = self.layout.dir.join("host.host1");
        let mut args =
            strings(["--monitors", &addr, "--host", "host1", "--listen", "127.0.0.1:0", "--run-dir"]);
        args.push(run_dir.clone().into());
        args.extend(self.common_args(Role::Host));
        self.start(Kind::Host, "host1".to_owned(), args, run_dir)
    }

    /// The first one makes the cluster; the others are added to it.
    async fn start_monitors(&self) -> Result<()> {
        let addrs = self.config.monitors();
        for (id, addr) in (1..).zip(&addrs) {
            let dir = self.layout.monitor(id);
            let mut args = strings(["--id", &id.to_string(), "--listen", addr, "--data-dir"]);
            args.push(dir.clone().into());
            args.extend(self.common_args(Role::Monitor));
            if let Some(secs) = self.config.down_out_secs {
                args.extend(strings(["--down-out-secs", &secs.to_string()]));
            }
            self.start(Kind::Monitor, id.to_string(), args, dir.clone())?;
            self.wait_for_addr(&dir, Kind::Monitor, &format!("monitor.{id}")).await?;
        }
        match tokio::time::timeout(MONITOR_WITHIN * 2, join_monitors(self.layout.target(&self.config)?)).await
        {
            Ok(joined) => joined,
            Err(_) => bail!(
                "the monitors do not find together: see the logs of monitor.1 to monitor.{}",
                addrs.len()
            ),
        }
    }

    /// What the daemons that serve have beside the options of their kind.
    fn common_args(&self, role: Role) -> Vec<OsString> {
        let mut args = strings(["--metrics-listen", "127.0.0.1:0"]);
        args.extend(self.tls_args(role));
        args
    }

    /// The options of a daemon of this role.
    fn tls_args(&self, role: Role) -> Vec<OsString> {
        if !self.config.tls {
            return Vec::new();
        }
        let files = self.layout.tls(role);
        let options = [("--tls-ca", files.ca), ("--tls-cert", files.cert), ("--tls-key", files.key)];
        options.into_iter().flat_map(|(option, file)| [option.into(), file.into_os_string()]).collect()
    }

    async fn start_osd(&self, slot: u32, monitors: &str) -> Result<()> {
        let dir = self.layout.dir.join(format!("osd-{slot}"));
        let host = format!("host{}", slot % self.config.hosts + 1);
        let mut args = strings(["--monitors", monitors, "--host", &host, "--data-dir"]);
        args.push(dir.clone().into());
        let mut format_args = strings(["format", "--size", &self.config.osd_size_bytes.to_string()]);
        format_args.extend(args.clone());
        format_args.extend(self.tls_args(Role::Osd));
        let out = tokio::process::Command::new(program("gabion-osd")?).args(format_args).output().await;
        let out = out.context("cannot start gabion-osd")?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        if !out.status.success() {
            let why = String::from_utf8_lossy(&out.stderr).into_owned();
            bail!(
                "cannot format {}: {}",
                dir.display(),
                why.trim().lines().last().unwrap_or("no reason given")
            );
        }
        // "osd.3 is ready in DIR"
        let id: String = said.trim_start_matches("osd.").chars().take_while(char::is_ascii_digit).collect();
        if id.is_empty() {
            bail!("gabion-osd format did not say which OSD {} is: {:?}", dir.display(), said.trim());
        }
        let mut run_args = strings(["run", "--listen", "127.0.0.1:0"]);
        run_args.extend(args);
        run_args.extend(self.common_args(Role::Osd));
        self.start(Kind::Osd, id, run_args, dir)
    }

    fn start(&self, kind: Kind, id: String, args: Vec<OsString>, data_dir: PathBuf) -> Result<()> {
        let name = format!("{}.{id}", kind.name());
        let program = program(&format!("gabion-{}", kind.name()))?;
        let log = self.layout.log(&name);
        let siblings: Vec<PathBuf> = match kind {
            Kind::Monitor => (1..=self.config.monitor_addrs.len()).map(|n| self.layout.monitor(n)).collect(),
            _ => Vec::new(),
        };
        let siblings = siblings.into_iter().filter(|s| *s != data_dir).collect();
        let spec = Spec { kind, id, program, args, data_dir, log, restart: self.config.restart, siblings };
        let (sender, requests) = mpsc::channel(REQUESTS_MAX);
        self.orders.add(name, kind, sender);
        tokio::spawn(daemon::run(spec, requests, self.changes.clone()));
        Ok(())
    }

    async fn wait_for_addr(&self, dir: &Path, kind: Kind, name: &str) -> Result<()> {
        let path = addr_file::path(dir, kind.name());
        let there = async {
            while !path.exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(MONITOR_WITHIN, there).await.map_err(|_| {
            anyhow::anyhow!(
                "{name} did not start in {} s: see {}",
                MONITOR_WITHIN.as_secs(),
                self.layout.log(name).display()
            )
        })
    }

    async fn stop_all(&self) {
        for kind in [Kind::Host, Kind::Gateway, Kind::Osd, Kind::Monitor] {
            let stops = self.orders.names(kind).into_iter().map(|name| {
                let orders = self.orders.clone();
                async move {
                    if let Err(e) = orders.send(&name, Order::Stop).await {
                        tracing::warn!(daemon = name, error = e, "cannot stop");
                    }
                }
            });
            join_all(stops).await;
        }
    }
}

/// Has those monitors that are not part of the cluster yet added to it.
async fn join_monitors(target: Target) -> Result<()> {
    let monitors = MonitorClient::secured(&target.monitors, target.security)?;
    let refused = |what: &str, s: tonic::Status| anyhow::anyhow!("{what}: {}", s.message());
    let known = monitors
        .until_answered("list the monitors", |m| async move { m.admin().list_monitors(pb::Empty {}).await })
        .await
        .map_err(|s| refused("the monitors do not serve", s))?;
    for (id, addr) in (1..).zip(&target.monitors) {
        if known.monitors.iter().any(|m| m.id == id && m.voter) {
            continue;
        }
        let request = pb::AddMonitorRequest { addr: addr.clone() };
        let added = monitors.until_answered("add a monitor", |m| {
            let request = request.clone();
            async move { m.admin().add_monitor(request).await }
        });
        added.await.map_err(|s| refused(&format!("monitor.{id} cannot be added"), s))?;
    }
    Ok(())
}

/// The only writer of `supervisor.json`; ends when every daemon's task did.
async fn write_state(
    layout: Layout,
    supervisor: Process,
    mut changes: mpsc::Receiver<Change>,
    mut failed: oneshot::Receiver<String>,
) -> Result<()> {
    let mut state = State { supervisor, daemons: Vec::new(), failed: None };
    loop {
        let bytes = serde_json::to_vec_pretty(&state)?;
        addr_file::replace(&layout.state_file(), &bytes)
            .with_context(|| format!("cannot write {}", layout.state_file().display()))?;
        let Some(Change { daemon }) = changes.recv().await else { break };
        let same = |d: &&mut DaemonState| d.kind == daemon.kind && d.id == daemon.id;
        match state.daemons.iter_mut().find(same) {
            Some(known) => *known = daemon,
            None => state.daemons.push(daemon),
        }
    }
    if let Ok(why) = failed.try_recv() {
        state.failed = Some(why);
        addr_file::replace(&layout.state_file(), &serde_json::to_vec_pretty(&state)?)?;
    }
    Ok(())
}

/// Daemons are installed beside `gabion`.
pub fn program(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("cannot tell where gabion is")?;
    Ok(me.with_file_name(name))
}

fn strings<const N: usize>(args: [&str; N]) -> Vec<OsString> {
    args.map(OsString::from).to_vec()
}
