//! Watches the rebuilds of a Gabion cluster: one line for each message, until nothing is left to rebuild.
//!
//!     gabion-example-rebuilds CLIENT_TOML
//!
//! CLIENT_TOML names the monitors and, with TLS, a certificate (role viewer is enough). `MonitorClient` knows how
//! to find the leader and how to check a monitor's certificate; without it see `rebuilds.py` for what that takes.

use anyhow::{Context, Result, bail};
use gabion_common::monitor_client::{MonitorClient, is_transient};
use gabion_common::tls::{Role, Security, TlsFiles};
use gabion_proto::pb::WatchRebuildsRequest;
use serde::Deserialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const TRY_FOR: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
struct Config {
    monitors: Vec<String>,
    tls: Option<Tls>,
}

#[derive(Deserialize)]
struct Tls {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

fn connect(client_toml: &Path) -> Result<MonitorClient> {
    let text = std::fs::read_to_string(client_toml).with_context(|| client_toml.display().to_string())?;
    let config: Config = toml::from_str(&text).with_context(|| client_toml.display().to_string())?;
    let dir = client_toml.parent().unwrap_or(Path::new(""));
    let security = match config.tls {
        Some(tls) => {
            let files = TlsFiles { ca: dir.join(tls.ca), cert: dir.join(tls.cert), key: dir.join(tls.key) };
            Security::load(&files, &[Role::Viewer, Role::Admin])?
        }
        None => Security::plain(),
    };
    Ok(MonitorClient::secured(&config.monitors, security)?)
}

/// Prints until the stream ends; an error when this is not the leader, or no longer.
async fn watch(monitors: &MonitorClient) -> Result<(), tonic::Status> {
    let request = WatchRebuildsRequest { until_clean: true };
    let mut messages = monitors.status().watch_rebuilds(request).await?.into_inner();
    while let Some(status) = messages.message().await? {
        let line = format!(
            "pgs_not_clean={} degraded_objects={} recovered_objects={} rate_bytes_per_s={:.0} eta_s={}",
            status.pgs_not_clean,
            status.degraded_objects,
            status.recovered_objects,
            status.rate_bytes_per_s,
            status.eta_s
        );
        // Whoever read this has gone when it fails.
        if writeln!(std::io::stdout(), "{line}").is_err() {
            return Ok(());
        }
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let file = std::env::args_os().nth(1).context("usage: gabion-example-rebuilds CLIENT_TOML")?;
    let monitors = connect(Path::new(&file))?;
    let give_up = Instant::now() + TRY_FOR;
    loop {
        match watch(&monitors).await {
            Ok(()) => return Ok(()),
            Err(status) if is_transient(&status) && Instant::now() < give_up => {
                // Goes to the leader if the answer names it.
                monitors.failed(&status);
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(status) => bail!("{}: {}", monitors.addr(), status.message()),
        }
    }
}
