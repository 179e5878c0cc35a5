//! `gabion-host`: the agent on each hypervisor.

use anyhow::{Context, Result};
use clap::Parser;
use gabion_common::grpc::{Access, Incoming};
use gabion_common::metrics::{Endpoint, MetricsArgs};
use gabion_common::monitor_client::MonitorClient;
use gabion_common::tls::{ListenArgs, Role, TlsArgs};
use gabion_common::{addr_file, command_line, readiness, telemetry};
use gabion_proto::pb::console_service_server::ConsoleServiceServer;
use gabion_vmm_shim::agent::{self, Host};
use gabion_vmm_shim::console::Consoles;
use gabion_vmm_shim::engine::choice::Engines;
use gabion_vmm_shim::engine::qemu::args::Accelerator;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(name = "gabion-host", version, about = "Gabion host agent: runs this host's guests")]
struct Args {
    /// Monitors, as ip:port.
    #[arg(long, value_delimiter = ',', required = true)]
    monitors: Vec<String>,
    /// This host's name.
    #[arg(long)]
    host: String,
    /// Sockets and logs of the guests.
    #[arg(long)]
    run_dir: PathBuf,
    /// Address of the console service; port 0 picks one.
    #[arg(long)]
    listen: SocketAddr,
    /// Accepted for uniformity: the monitors know host agents by their reports.
    #[arg(long)]
    gossip: Option<SocketAddr>,
    /// What must survive a reboot; default: RUN_DIR/state.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    exposure: ListenArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

/// Consoles are an operator's.
fn may_call(_path: &str, role: Role) -> bool {
    role == Role::Admin
}

#[tokio::main]
async fn main() -> Result<()> {
    let args: Args = command_line::parse();
    telemetry::init("gabion-host");
    let security = args.tls.security(&[Role::Host])?;
    args.exposure.check(&security, args.listen)?;
    let state_dir = args.state_dir.unwrap_or_else(|| args.run_dir.join("state"));
    for dir in [&args.run_dir, &state_dir] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    // QEMU gets these paths and may have another working directory in mind.
    let run_dir = args.run_dir.canonicalize().with_context(|| args.run_dir.display().to_string())?;
    if let Some(addr) = args.gossip {
        tracing::info!(%addr, "host agents do not gossip: the monitors know them by their reports");
    }
    let engine = Engines::detect();
    let accelerator = match engine.accelerator() {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => {
            tracing::warn!("no usable hardware virtualization here: guests are emulated and slow");
            "tcg"
        }
    };
    let listener = tokio::net::TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let agent_addr = listener.local_addr()?;
    let consoles = Consoles::default();
    let host = Arc::new(Host {
        monitors: MonitorClient::secured(&args.monitors, security.clone())?,
        name: args.host,
        run_dir: run_dir.clone(),
        state_dir,
        agent_addr,
        engine: Arc::new(engine),
        accelerator,
        consoles: consoles.clone(),
        reports: agent::Reports::default(),
        ledger: agent::admission::Ledger::default(),
    });
    if let Some(endpoint) = Endpoint::bind(args.metrics, &run_dir, "host").await? {
        endpoint.serve(agent::Figures(host.clone()));
    }
    let server = tonic::transport::Server::builder()
        .layer(Access(may_call))
        .add_service(ConsoleServiceServer::new(consoles))
        .serve_with_incoming(Incoming::new(listener, security)?);
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    addr_file::write(&run_dir, "host", agent_addr).context("cannot write host.addr")?;
    readiness::serving();
    tracing::info!(%agent_addr, "serving consoles");
    tokio::select! {
        () = agent::run(host) => {}
        served = server => served.context("the console service ended")?,
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    tracing::info!("stopping; guests run on");
    Ok(())
}
