//! `gabion-monitor`: parse, wire, run until told to stop.

use anyhow::Context as _;
use clap::Parser;
use gabion_common::metrics::MetricsArgs;
use gabion_common::tls::{ListenArgs, Role, TlsArgs};
use gabion_monitor::daemon::{self, Options};
use gabion_monitor::raft::Start;
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Keeps and serves the cluster map of a Gabion cluster.
#[derive(Parser)]
#[command(name = "gabion-monitor", version)]
struct Args {
    /// Where the monitor keeps its data.
    #[arg(long)]
    data_dir: PathBuf,
    /// Number of this monitor, from 1.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    id: u64,
    /// Address for gRPC; port 0 picks one, written to DATA_DIR/monitor.addr.
    #[arg(long, default_value = "127.0.0.1:7000")]
    listen: SocketAddr,
    /// Address for gossip (not built: accepted and not used).
    #[arg(long)]
    gossip: Option<SocketAddr>,
    /// Address that the other monitors and clients use, when it is not the one to listen on. It is for
    /// good: a monitor that moves is removed and added again.
    #[arg(long)]
    advertise: Option<SocketAddr>,
    /// Make a new cluster in an empty data directory.
    #[arg(long, conflicts_with = "join")]
    bootstrap: bool,
    /// In an empty data directory wait to be added to a cluster (gabion monitor add); else go on.
    #[arg(long)]
    join: bool,
    /// An OSD that is down for this many seconds is taken out.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    down_out_secs: Option<u64>,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    exposure: ListenArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Args = gabion_common::command_line::parse();
    gabion_common::telemetry::init("monitor");
    let security = args.tls.security(&[Role::Monitor])?;
    args.exposure.check(&security, args.listen)?;
    if let Some(gossip) = args.gossip {
        tracing::info!(%gossip, "gossip is not built: leases alone decide who is down");
    }
    let mut term = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        // Nobody listens only when everything has ended already.
        let _ = stop.send(true);
        // Stay, so that the receivers do not take a lost sender for a second signal.
        std::future::pending::<()>().await
    });
    let start = match (args.bootstrap, args.join) {
        (true, _) => Start::Bootstrap,
        (_, true) => Start::Join,
        _ => Start::Resume,
    };
    let options = Options {
        advertise: args.advertise,
        security,
        metrics: args.metrics,
        down_out_ms: args.down_out_secs.map(|s| s * 1000),
        ..Options::new(args.data_dir, args.id, args.listen, start)
    };
    daemon::run(options, stopping).await
}
