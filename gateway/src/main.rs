//! `gabion-gateway`: one host's volumes as NBD and vhost-user-blk exports.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gabion_common::metrics::MetricsArgs;
use gabion_common::tls::{Role, TlsArgs};
use gabion_gateway::daemon::{self, Config};
use gabion_proto::limits::valid_name;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Parser)]
#[command(name = "gabion-gateway", version, about = "Gabion gateway: one per host")]
struct Args {
    /// Monitors, as ip:port.
    #[arg(long, value_delimiter = ',', required = true)]
    monitors: Vec<String>,
    /// This host's name.
    #[arg(long)]
    host: String,
    /// Directory for sockets and the address file.
    #[arg(long)]
    run_dir: PathBuf,
    /// Where NBD clients connect; port 0 picks one.
    #[arg(long, default_value = "127.0.0.1:0")]
    nbd_listen: SocketAddr,
    /// UDP address for gossip.
    #[arg(long)]
    gossip: Option<SocketAddr>,
    /// Keeps this gateway's identity; default RUN_DIR/client-id.
    #[arg(long)]
    client_id_file: Option<PathBuf>,
    /// Fail an I/O that was not answered for so many seconds; 0 waits for ever.
    #[arg(long, default_value_t = 0)]
    io_timeout_s: u64,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

fn main() -> Result<()> {
    let args: Args = gabion_common::command_line::parse();
    gabion_common::telemetry::init("gateway");
    let security = args.tls.security(&[Role::Gateway])?;
    if !args.nbd_listen.ip().is_loopback() {
        tracing::warn!(
            addr = %args.nbd_listen,
            "NBD has no TLS and no passwords here: whoever connects can read and change the exported volumes"
        );
    }
    ensure!(valid_name(&args.host), "host name {:?}: use 1 to 64 of a-z A-Z 0-9 . _ -", args.host);
    std::fs::create_dir_all(&args.run_dir)
        .and_then(|()| args.run_dir.canonicalize())
        .with_context(|| format!("cannot use {}", args.run_dir.display()))
        .and_then(|run_dir| {
            let config = Config {
                monitors: args.monitors,
                host: args.host,
                client_id_file: args.client_id_file.unwrap_or_else(|| run_dir.join("client-id")),
                run_dir,
                nbd_listen: args.nbd_listen,
                gossip: args.gossip,
                security,
                metrics: args.metrics,
                io_timeout: (args.io_timeout_s > 0).then(|| Duration::from_secs(args.io_timeout_s)),
            };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(daemon::run(config))
        })
}
