//! The daemon as a whole: open the data, listen, serve, stop. Also what tests start in-process.

use crate::decide::Timing;
use crate::grpc::Monitor;
use crate::raft::Consensus;
use crate::state::Command;
use anyhow::Context as _;
use gabion_proto::ids::{ClusterId, Epoch};
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::sync::watch;
use tonic::transport::server::TcpIncoming;

/// How to run a monitor.
#[derive(Clone, Debug)]
pub struct Options {
    pub data_dir: PathBuf,
    pub id: u64,
    /// Port 0 picks one.
    pub listen: SocketAddr,
    /// Make a new cluster.
    pub bootstrap: bool,
    /// `None`: the default.
    pub down_out_ms: Option<u64>,
}

/// Runs a monitor until `stop` turns true. It is ready when `monitor.addr` is there.
pub async fn run(options: Options, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let Options { data_dir, id, listen, bootstrap, down_out_ms } = options;
    std::fs::create_dir_all(&data_dir).with_context(|| format!("cannot create {}", data_dir.display()))?;
    // What an earlier run left would send everybody to the wrong place.
    match std::fs::remove_file(gabion_common::addr_file::path(&data_dir, "monitor")) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).context("cannot remove monitor.addr");
        }
        _ => {}
    }
    let incoming = TcpIncoming::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    let incoming = incoming.with_nodelay(Some(true));
    let addr = incoming.local_addr()?;
    let consensus = Consensus::open(&data_dir, id, &addr.to_string(), bootstrap).await?;
    // Also after a bootstrap that was cut off between the two steps.
    if consensus.state().map.epoch == Epoch(0) {
        let cluster = ClusterId(rand::random());
        consensus.propose(Command::Bootstrap { cluster }).await??;
    }
    let state = consensus.state();
    tracing::info!(cluster = %state.map.cluster, epoch = state.map.epoch.0, %addr, "monitor serves");
    let mut timing = Timing::default();
    timing.down_out_ms = down_out_ms.unwrap_or(timing.down_out_ms);
    let monitor = Monitor::new(consensus.clone(), timing, addr, stop);
    gabion_common::addr_file::write(&data_dir, "monitor", addr).context("cannot write monitor.addr")?;
    let outcome = tokio::select! {
        served = monitor.serve(incoming) => served,
        why = consensus.stopped() => Err(anyhow::anyhow!("agreement has stopped: {why}")),
    };
    consensus.shutdown().await;
    tracing::info!("monitor stopped");
    outcome
}
