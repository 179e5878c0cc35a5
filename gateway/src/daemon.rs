//! Wiring of the daemon: session, map, listener, exports, signals.

use crate::attach::Volumes;
use crate::exports::{Exports, Place, remove_stale_sockets};
use crate::metrics::Figures;
use crate::nbd;
use crate::session;
use anyhow::{Context, Result, ensure};
use gabion_common::client::ClusterClient;
use gabion_common::gossip::{Gossip, GossipConfig};
use gabion_common::metrics::{Endpoint, MetricsArgs};
use gabion_common::monitor_client::MonitorClient;
use gabion_common::tls::Security;
use gabion_common::{addr_file, map_watch, readiness};
use gabion_proto::ids::Epoch;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

/// How long what is in flight may take to end when the gateway stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Validated settings.
pub struct Config {
    pub monitors: Vec<String>,
    pub host: String,
    /// Absolute and there.
    pub run_dir: PathBuf,
    pub client_id_file: PathBuf,
    pub nbd_listen: SocketAddr,
    pub gossip: Option<SocketAddr>,
    pub io_timeout: Option<Duration>,
    pub security: Security,
    pub metrics: MetricsArgs,
}

/// Serves until SIGTERM or SIGINT.
pub async fn run(config: Config) -> Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let serving = async {
        let (exports, gossip) = join(config).await?;
        Ok::<_, anyhow::Error>((tokio::spawn(exports.clone().run()), exports, gossip))
    };
    tokio::pin!(serving);
    let mut started = None;
    loop {
        tokio::select! {
            joined = &mut serving, if started.is_none() => started = Some(joined?),
            _ = term.recv() => break info!("SIGTERM, stopping"),
            _ = int.recv() => break info!("SIGINT, stopping"),
        }
    }
    let Some((following, exports, _gossip)) = started else { return Ok(()) };
    following.abort();
    if tokio::time::timeout(STOP_TIMEOUT, exports.stop()).await.is_err() {
        warn!("some I/O did not end in time; it was not answered");
    }
    Ok(())
}

/// Listens and becomes part of the cluster, however long that takes.
async fn join(config: Config) -> Result<(Arc<Exports>, Option<Gossip>)> {
    let monitors = MonitorClient::secured(&config.monitors, config.security.clone())?;
    remove_stale_sockets(&config.run_dir)
        .with_context(|| format!("cannot clean up {}", config.run_dir.display()))?;
    let listener = TcpListener::bind(config.nbd_listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.nbd_listen))?;
    let nbd_addr = listener.local_addr()?;
    addr_file::write(&config.run_dir, "gateway", nbd_addr).context("cannot write gateway.addr")?;
    let endpoint = Endpoint::bind(config.metrics, &config.run_dir, "gateway").await?;
    let table = Arc::new(nbd::Table::default());
    tokio::spawn(nbd::listen_tcp(listener, table.clone()));
    info!(%nbd_addr, "listening");
    // The cluster may come later: with every node off, the monitors may be the last to start.
    readiness::serving();

    let granted = session::open(&monitors, &config.host, &config.client_id_file).await?;
    let mut map = map_watch::follow(monitors.clone());
    let first = map_watch::reach(&mut map, Epoch(1)).await.context("the map is not followed any more")?;
    ensure!(first.cluster == granted.cluster, "the map and the session belong to different clusters");
    info!(client = %granted.client, session = %granted.session, cluster = %granted.cluster, "in the cluster");

    let gossip = match config.gossip {
        None => None,
        Some(listen) => Some(
            Gossip::spawn(GossipConfig {
                node: format!("gateway.{}", config.host),
                generation: granted.session.0,
                cluster: granted.cluster,
                listen,
                seeds: config.monitors.clone(),
            })
            .await?,
        ),
    };
    if let Some(gossip) = &gossip {
        gossip.set("nbd", &nbd_addr.to_string()).await;
    }

    let cluster = ClusterClient::new(map, granted.client, config.security);
    let volumes = Volumes::new(monitors.clone(), cluster, granted, config.io_timeout);
    let place = Place { host: config.host, run_dir: config.run_dir, nbd_addr };
    let exports = Exports::new(place, monitors, granted, volumes, table);
    if let Some(endpoint) = endpoint {
        endpoint.serve(Figures(exports.clone()));
    }
    Ok((exports, gossip))
}
