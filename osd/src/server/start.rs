//! Wiring of the daemon: the listening socket, its address file, signals.

use super::run::{Config, ServerError, serve};
use gabion_proto::limits::valid_name;
use std::net::SocketAddr;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// Runs the daemon until SIGTERM or SIGINT.
pub async fn start(
    config: Config,
    listen: SocketAddr,
    gossip: Option<SocketAddr>,
) -> Result<(), ServerError> {
    for (what, name) in [("host", &config.host), ("rack", &config.rack)] {
        if !valid_name(name) {
            return Err(ServerError::Config(format!(
                "{what} name {name:?}: use 1 to 64 of a-z A-Z 0-9 . _ -"
            )));
        }
    }
    let io = |context| move |source| ServerError::Io { context, source };
    let listener = TcpListener::bind(listen).await.map_err(io("cannot listen"))?;
    let addr = listener.local_addr().map_err(io("cannot listen"))?;
    gabion_common::addr_file::write(&config.data_dir, "osd", addr).map_err(io("cannot write osd.addr"))?;
    if let Some(gossip) = gossip {
        info!(%gossip, "gossip");
    }
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let mut term = signal(SignalKind::terminate()).map_err(io("cannot catch SIGTERM"))?;
    let mut int = signal(SignalKind::interrupt()).map_err(io("cannot catch SIGINT"))?;
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => info!("SIGTERM, stopping"),
            _ = int.recv() => info!("SIGINT, stopping"),
        }
        stopping.cancel();
    });
    serve(config, listener, stop).await
}
