//! `gabion dev up`: makes the directory, starts the supervisor and waits until the cluster serves.

use super::layout::{DevConfig, Kind, Layout, State};
use super::{down, supervise};
use crate::commands::Context as Cli;
use crate::config::{ClientConfig, TlsSection};
use crate::output;
use crate::rpc::Monitors;
use crate::size::human;
use anyhow::{Context, Result, bail, ensure};
use gabion_common::addr_file;
use gabion_common::tls::Role;
use gabion_common::tls::authority::{Authority, Request};
use gabion_proto::pb;
use serde_json::json;
use std::fs::OpenOptions;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Unix socket paths hold 107 bytes; `/gateway.host1/vhost-NUMBER.sock` needs this many of them.
const SOCKET_NAME_BYTES: usize = 42;
/// A development cluster is not that old.
const CERTIFICATE_DAYS: u32 = 3650;
const POLL: Duration = Duration::from_millis(100);

pub struct Wanted {
    pub osds: u32,
    pub monitors: u32,
    pub hosts: Option<u32>,
    pub osd_size: u64,
    pub no_restart: bool,
    pub down_out_secs: Option<u64>,
    pub tls: bool,
}

pub async fn run(cli: &Cli, dir: &Path, wanted: Wanted, timeout: Duration) -> Result<()> {
    let layout = Layout::new(dir)?;
    let length = layout.dir.as_os_str().len();
    ensure!(
        length + SOCKET_NAME_BYTES <= 107,
        "{}: the path has {length} bytes, too long for Unix sockets under it; choose a --dir of at most {}",
        layout.dir.display(),
        107 - SOCKET_NAME_BYTES
    );
    let started = Instant::now();
    let config = prepare(&layout, &wanted)?;
    let state = layout.state()?;
    let mut child = None;
    match state {
        Some(state) if state.supervisor.is_alive() => {
            output::note(&format!("a cluster already runs in {}", layout.dir.display()));
        }
        state => {
            if let Some(state) = state {
                // Daemons whose supervisor was killed.
                down::stop(&layout, &state).await?;
                std::fs::remove_file(layout.state_file())?;
            }
            child = Some(spawn(&layout)?);
        }
    }
    let wait = wait_until_serving(&layout, &config, child.as_mut());
    match tokio::time::timeout(timeout, wait).await {
        Ok(result) => result?,
        Err(_) => bail!(
            "the cluster in {} does not serve after {} s: {}; see gabion dev status and the logs in {}",
            layout.dir.display(),
            timeout.as_secs(),
            missing(&layout, &config).await.unwrap_or_else(|e| format!("{e:#}")),
            layout.dir.join("log").display()
        ),
    }
    let sentence = format!(
        "cluster up in {:.1} s: monitors at {}, {} OSDs on {} hosts, in {}\nnext: gabion pool create NAME --replicas 3; gabion volume create NAME --size 10G --pool NAME",
        started.elapsed().as_secs_f64(),
        config.monitors().join(", "),
        config.osds,
        config.hosts,
        layout.dir.display()
    );
    let value = json!({
        "dir": layout.dir,
        "monitors": config.monitors(),
        "osds": config.osds,
        "hosts": config.hosts,
        "client_config": layout.client_toml(),
    });
    cli.out.done(&sentence, value)
}

/// The directory and its files; a cluster that was made before keeps its shape.
fn prepare(layout: &Layout, wanted: &Wanted) -> Result<DevConfig> {
    for daemon in ["gabion-monitor", "gabion-osd", "gabion-gateway"] {
        let path = supervise::program(daemon)?;
        ensure!(path.exists(), "{} is missing: build or install it beside gabion", path.display());
    }
    std::fs::create_dir_all(layout.dir.join("log"))
        .with_context(|| format!("cannot make {}", layout.dir.display()))?;
    let config = match layout.config()? {
        Some(old) => {
            if old.osds != wanted.osds && wanted.osds != 4 {
                output::note(&format!(
                    "the cluster in {} has {} OSDs and keeps them",
                    layout.dir.display(),
                    old.osds
                ));
            }
            if old.monitor_addrs.len() != wanted.monitors as usize && wanted.monitors != 1 {
                output::note(&format!(
                    "the cluster in {} has {} monitors and keeps them; see gabion monitor add",
                    layout.dir.display(),
                    old.monitor_addrs.len()
                ));
            }
            if old.tls != wanted.tls && wanted.tls {
                output::note(&format!("the cluster in {} has no TLS and stays so", layout.dir.display()));
            }
            DevConfig {
                restart: !wanted.no_restart,
                down_out_secs: wanted.down_out_secs.or(old.down_out_secs),
                ..old
            }
        }
        None => {
            ensure_room(layout, wanted)?;
            DevConfig {
                monitor_addrs: free_addrs(wanted.monitors)?,
                osds: wanted.osds,
                hosts: wanted.hosts.unwrap_or(wanted.osds.min(4)),
                osd_size_bytes: wanted.osd_size,
                restart: !wanted.no_restart,
                down_out_secs: wanted.down_out_secs,
                tls: wanted.tls,
            }
        }
    };
    layout.write_config(&config)?;
    let tls = match config.tls {
        true => Some(certify(layout)?),
        false => None,
    };
    let client = toml::to_string(&ClientConfig { monitors: config.monitors(), tls })?;
    addr_file::replace(&layout.client_toml(), client.as_bytes())?;
    Ok(config)
}

/// The OSDs' files are written whole, so that no later write finds the disk full.
fn ensure_room(layout: &Layout, wanted: &Wanted) -> Result<()> {
    let stat = rustix::fs::statvfs(&layout.dir)
        .with_context(|| format!("cannot ask for the room in {}", layout.dir.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let need = u64::from(wanted.osds).saturating_mul(wanted.osd_size);
    ensure!(
        need <= free,
        "{} OSDs of {} need {}, and {} has {}; choose a smaller --osd-size or another --dir",
        wanted.osds,
        human(wanted.osd_size),
        human(need),
        layout.dir.display(),
        human(free)
    );
    Ok(())
}

/// A CA and a certificate for each role, unless they are there already; the operator's one.
fn certify(layout: &Layout) -> Result<TlsSection> {
    let admin = layout.tls(Role::Admin);
    let dir = admin.ca.parent().context("no directory for certificates")?.to_owned();
    // The operator's comes last: where it is, all are.
    if !admin.cert.exists() {
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot make {} anew", dir.display()))?;
        }
        let authority = Authority::create(&dir, "dev", CERTIFICATE_DAYS)?;
        for role in [Role::Monitor, Role::Osd, Role::Gateway, Role::Host, Role::Viewer, Role::Admin] {
            let addresses = vec![std::net::Ipv4Addr::LOCALHOST.into()];
            let request = Request { role, name: "dev".into(), addresses, days: CERTIFICATE_DAYS };
            authority.issue_into(&dir, role.name(), &request, true)?;
        }
    }
    Ok(TlsSection { ca: admin.ca, cert: admin.cert, key: admin.key })
}

/// Different ones, free a moment ago.
fn free_addrs(count: u32) -> Result<Vec<SocketAddr>> {
    let listeners: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    Ok(listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?)
}

fn spawn(layout: &Layout) -> Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(layout.log("supervisor"))?;
    Command::new(std::env::current_exe()?)
        .args(["dev", "supervise", "--dir"])
        .arg(&layout.dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the supervisor")
}

async fn wait_until_serving(
    layout: &Layout,
    config: &DevConfig,
    mut child: Option<&mut Child>,
) -> Result<()> {
    loop {
        if let Some(child) = &mut child
            && let Some(status) = child.try_wait()?
        {
            let why = layout.state()?.and_then(|s: State| s.failed);
            bail!(
                "the cluster in {} did not start: {}; see {}",
                layout.dir.display(),
                why.unwrap_or_else(|| status.to_string()),
                layout.log("supervisor").display()
            );
        }
        if missing(layout, config).await.is_ok_and(|what| what.is_empty()) {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What the cluster does not have yet; empty when it serves.
async fn missing(layout: &Layout, config: &DevConfig) -> Result<String> {
    let state = layout.state()?.context("the supervisor has not started")?;
    if let Some(dead) = state.daemons.iter().find(|d| !d.is_running()) {
        let how = dead.last_exit.as_deref().unwrap_or("not started yet");
        return Ok(format!("{} is down ({how})", dead.name()));
    }
    let monitors = Monitors::new(layout.target(config)?)?;
    let voters = crate::rpc!(monitors, "monitor list", admin.list_monitors, pb::Empty {})?.monitors;
    let up = voters.iter().filter(|m| m.voter && m.up).count();
    if up < config.monitor_addrs.len() {
        return Ok(format!("{up} of {} monitors are up", config.monitor_addrs.len()));
    }
    let osds = crate::rpc!(monitors, "osd list", admin.list_osds, pb::Empty {})?.osds;
    let up = osds.iter().filter(|o| o.up).count();
    if up < config.osds as usize {
        return Ok(format!("{up} of {} OSDs are up", config.osds));
    }
    let hosts = crate::rpc!(monitors, "host list", admin.list_hosts, pb::Empty {})?.hosts;
    let host = hosts.iter().find(|h| h.name == "host1");
    if !host.is_some_and(|h| h.gateway_up) {
        return Ok("the gateway does not report yet".to_owned());
    }
    let wants_agent = state.daemons.iter().any(|d| d.kind == Kind::Host);
    if wants_agent && !host.is_some_and(|h| h.agent_up) {
        return Ok("the host agent does not report yet".to_owned());
    }
    Ok(String::new())
}
