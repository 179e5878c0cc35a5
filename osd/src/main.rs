//! `gabion-osd`: the storage daemon of one disk, and the offline tools for it.

use anyhow::Result;
use clap::{Parser, Subcommand};
use gabion_common::metrics::{Endpoint, MetricsArgs};
use gabion_common::monitor_client::MonitorClient;
use gabion_common::tls::{ListenArgs, Role, TlsArgs};
use gabion_osd::server;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

mod format;
mod offline;

/// The store stopped for good (invariant 9), or the monitors have forgotten what it took part in: whoever supervises this daemon must
/// not start it again.
const EXIT_FATAL: u8 = 3;

#[derive(Parser)]
#[command(name = "gabion-osd", version, about = "Gabion storage daemon: one per disk")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the disk until SIGTERM.
    Run {
        /// Directory with `block` and `index/`, made by `format`.
        #[arg(long)]
        data_dir: PathBuf,
        /// Monitors, as ip:port.
        #[arg(long, value_delimiter = ',', required = true)]
        monitors: Vec<String>,
        /// Data-path address; port 0 picks one.
        #[arg(long)]
        listen: SocketAddr,
        /// UDP address for gossip.
        #[arg(long)]
        gossip: Option<SocketAddr>,
        /// Failure domain: the host's name.
        #[arg(long)]
        host: String,
        #[arg(long, default_value = "default")]
        rack: String,
        #[command(flatten)]
        tls: TlsArgs,
        #[command(flatten)]
        exposure: ListenArgs,
        #[command(flatten)]
        metrics: MetricsArgs,
    },
    /// Prepares a disk and registers it with the monitors. Does nothing when that was done before.
    Format {
        #[arg(long)]
        data_dir: PathBuf,
        /// Size of the preallocated file, with K M G T (powers of 1024).
        #[arg(long)]
        size: String,
        #[arg(long, value_delimiter = ',', required = true)]
        monitors: Vec<String>,
        #[arg(long)]
        host: String,
        #[arg(long, default_value = "default")]
        rack: String,
        /// Share of data; 65536 is one unit, 0 derives it from the size.
        #[arg(long, default_value_t = 0)]
        weight: u32,
        #[command(flatten)]
        tls: TlsArgs,
    },
    #[command(flatten)]
    Offline(offline::Offline),
}

fn main() -> ExitCode {
    let args: Args = gabion_common::command_line::parse();
    gabion_common::telemetry::init("osd");
    match run(args.command) {
        Ok(code) => code,
        Err(e) => {
            tracing::error!("{e:#}");
            match e.downcast_ref() {
                Some(server::ServerError::Fatal(_) | server::ServerError::Forgotten { .. }) => {
                    ExitCode::from(EXIT_FATAL)
                }
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match command {
        Command::Run { data_dir, monitors, listen, gossip, host, rack, tls, exposure, metrics } => {
            let security = tls.security(&[Role::Osd])?;
            exposure.check(&security, listen)?;
            runtime.block_on(async {
                let metrics = Endpoint::bind(metrics, &data_dir, "osd").await?;
                let config = server::Config { data_dir, monitors, host, rack, security, metrics };
                // As a task of its own: what it and others of this thread tell each other then costs no look at the reactor.
                match tokio::spawn(server::start(config, listen, gossip)).await {
                    Ok(ended) => Ok::<_, anyhow::Error>(ended?),
                    Err(e) => Err(e
                        .try_into_panic()
                        .map_or_else(Into::into, |panic| std::panic::resume_unwind(panic))),
                }
            })?;
        }
        Command::Format { data_dir, size, monitors, host, rack, weight, tls } => {
            let size_bytes = format::parse_size(&size)?;
            let security = tls.security(&[Role::Osd, Role::Admin])?;
            let disk = format::Disk { size_bytes, host, rack, weight };
            let id = runtime.block_on(async {
                let monitors = MonitorClient::secured(&monitors, security)?;
                format::format(&data_dir, &monitors, disk).await
            })?;
            println!("{id} is ready in {}", data_dir.display());
        }
        Command::Offline(command) => return offline::run(command),
    }
    Ok(ExitCode::SUCCESS)
}
