//! The daemon as a whole: open the data, listen, serve, stop. Also what tests start in-process.

use crate::decide::Timing;
use crate::grpc::Monitor;
use crate::raft::{Consensus, Links, SNAPSHOT_EVERY, Setup, Start};
use anyhow::Context as _;
use gabion_common::grpc::Incoming;
use gabion_common::metrics::{Endpoint, MetricsArgs};
use gabion_common::tls::Security;
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::sync::watch;

/// How to run a monitor.
#[derive(Clone, Debug)]
pub struct Options {
    pub data_dir: PathBuf,
    pub id: u64,
    /// Port 0 picks one.
    pub listen: SocketAddr,
    /// Where others find it, if not where it listens.
    pub advertise: Option<SocketAddr>,
    pub start: Start,
    /// `None`: the default.
    pub down_out_ms: Option<u64>,
    /// Commands between two snapshots of the state.
    pub snapshot_every: u64,
    /// Links to other monitors that do not work, for tests.
    pub links: Links,
    pub security: Security,
    pub metrics: MetricsArgs,
}

impl Options {
    /// A monitor with default settings.
    pub fn new(data_dir: PathBuf, id: u64, listen: SocketAddr, start: Start) -> Options {
        Options {
            data_dir,
            id,
            listen,
            advertise: None,
            start,
            down_out_ms: None,
            snapshot_every: SNAPSHOT_EVERY,
            links: Links::default(),
            security: Security::plain(),
            metrics: MetricsArgs::default(),
        }
    }
}

/// Runs a monitor until `stop` turns true. It is ready when `monitor.addr` is there.
pub async fn run(options: Options, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let Options {
        data_dir,
        id,
        listen,
        advertise,
        start,
        down_out_ms,
        snapshot_every,
        links,
        security,
        metrics,
    } = options;
    std::fs::create_dir_all(&data_dir).with_context(|| format!("cannot create {}", data_dir.display()))?;
    // What an earlier run left would send everybody to the wrong place.
    match std::fs::remove_file(gabion_common::addr_file::path(&data_dir, "monitor")) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).context("cannot remove monitor.addr");
        }
        _ => {}
    }
    let listener = tokio::net::TcpListener::bind(listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {listen}"))?;
    let addr = listener.local_addr()?;
    let public = advertise.unwrap_or(addr).to_string();
    let metrics = Endpoint::bind(metrics, &data_dir, "monitor").await?;
    let setup = Setup { snapshot_every, links, security: security.clone(), ..Setup::new(id, public, start) };
    let opened = Consensus::open(&data_dir, setup).await;
    let consensus = opened.with_context(|| data_dir.display().to_string())?;
    let epoch = consensus.state().map.epoch.0;
    tracing::info!(monitor = id, cluster = ?consensus.cluster(), epoch, %addr, "monitor serves");
    let mut timing = Timing::default();
    timing.down_out_ms = down_out_ms.unwrap_or(timing.down_out_ms);
    let monitor = Monitor::new(consensus.clone(), timing, stop);
    if let Some(endpoint) = metrics {
        endpoint.serve(monitor.clone());
    }
    gabion_common::addr_file::write(&data_dir, "monitor", addr).context("cannot write monitor.addr")?;
    gabion_common::readiness::serving();
    let outcome = tokio::select! {
        served = monitor.serve(Incoming::new(listener, security)?) => served,
        why = consensus.stopped() => Err(anyhow::anyhow!(why)),
    };
    consensus.close().await;
    tracing::info!("monitor stopped");
    outcome
}
