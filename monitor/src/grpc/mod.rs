//! The gRPC face of a monitor: everything of `proto/gabion/v1` but consoles.
//!
//! [`Monitor`] ties the agreed state to what daemons report between changes ([`volatile`]), and
//! runs the failure detector. Every stream ends when the daemon stops.

mod admin;
mod clients;
mod health;
mod hosts;
mod maps;
mod osds;
mod rebuild;
mod status;
mod view;
mod volatile;

use crate::decide::{Event, FailureDetector, Timing};
use crate::raft::{Consensus, ConsensusError};
use crate::state::{Command, MonitorState, Refusal, RefusalKind, Reply};
use gabion_common::clock::boottime_ms;
use gabion_proto::limits::GRPC_MESSAGE_BYTES_MAX;
use gabion_proto::pb;
use parking_lot::Mutex;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::server::{Server, TcpIncoming};
use volatile::Volatile;

/// How often the failure detector looks.
const TICK: Duration = Duration::from_millis(200);
/// Heartbeats whose reports of stuck peers are dealt with at the same time.
const STUCK_TURNS: usize = 16;
/// Messages of one stream that wait for a slow reader.
const STREAM_DEPTH: usize = 16;

/// A stream of answers.
type Answers<T> = ReceiverStream<Result<T, Status>>;
type Sender<T> = mpsc::Sender<Result<T, Status>>;

struct Inner {
    consensus: Consensus,
    detector: Mutex<FailureDetector>,
    volatile: Mutex<Volatile>,
    /// Counts reports of OSDs: who waits for acknowledgements looks again.
    osd_reports: watch::Sender<u64>,
    /// Heartbeats whose reports of stuck peers are being dealt with.
    stuck_turns: Arc<Semaphore>,
    /// Counts reports of hosts that changed something.
    host_reports: watch::Sender<u64>,
    /// Numbers of host specifications.
    revision: AtomicU64,
    stop: watch::Receiver<bool>,
    addr: SocketAddr,
}

/// A running monitor; clones share it.
#[derive(Clone)]
pub struct Monitor(Arc<Inner>);

fn refused(refusal: Refusal) -> Status {
    let message = refusal.message;
    match refusal.kind {
        RefusalKind::Invalid => Status::invalid_argument(message),
        RefusalKind::NotFound => Status::not_found(message),
        RefusalKind::Exists => Status::already_exists(message),
        RefusalKind::Precondition => Status::failed_precondition(message),
        RefusalKind::Exhausted => Status::resource_exhausted(message),
        RefusalKind::Aborted => Status::aborted(message),
        RefusalKind::NotBuilt => Status::unimplemented(message),
    }
}

fn failed(e: ConsensusError) -> Status {
    Status::unavailable(e.to_string())
}

fn invalid(e: impl std::fmt::Display) -> Status {
    Status::invalid_argument(e.to_string())
}

impl Monitor {
    /// A monitor that serves on `addr` and ends when `stop` turns true.
    pub fn new(
        consensus: Consensus,
        timing: Timing,
        addr: SocketAddr,
        stop: watch::Receiver<bool>,
    ) -> Monitor {
        let revision = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |d| d.as_millis() as u64);
        Monitor(Arc::new(Inner {
            consensus,
            detector: Mutex::new(FailureDetector::new(timing)),
            volatile: Mutex::default(),
            osd_reports: watch::Sender::new(0),
            stuck_turns: Arc::new(Semaphore::new(STUCK_TURNS)),
            host_reports: watch::Sender::new(0),
            // Grows over restarts too, as long as the clock does.
            revision: AtomicU64::new(revision),
            stop,
            addr,
        }))
    }

    fn state(&self) -> Arc<MonitorState> {
        self.0.consensus.state()
    }

    async fn propose(&self, command: Command) -> Result<Reply, Status> {
        self.0.consensus.propose(command).await.map_err(failed)?.map_err(refused)
    }

    fn next_revision(&self) -> u64 {
        self.0.revision.fetch_add(1, Ordering::Relaxed)
    }

    /// A stream that `feed` fills until it returns, the reader leaves or the daemon stops.
    fn stream<T, F>(&self, feed: impl FnOnce(Sender<T>) -> F) -> Answers<T>
    where
        T: Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (tx, rx) = mpsc::channel(STREAM_DEPTH);
        let mut stop = self.0.stop.clone();
        let gone = tx.clone();
        let feed = feed(tx);
        tokio::spawn(async move {
            tokio::select! {
                () = feed => {}
                () = gone.closed() => {}
                _ = stop.wait_for(|s| *s) => {}
            }
        });
        ReceiverStream::new(rx)
    }

    /// Lets the detector act on an event, and has its decisions agreed on.
    async fn detect(&self, event: Event) {
        let commands = {
            let mut detector = self.0.detector.lock();
            detector.step(boottime_ms(), &self.state(), event)
        };
        for command in commands {
            let shown = format!("{command:?}");
            match self.0.consensus.propose(command).await {
                Ok(Ok(_)) => tracing::warn!(decision = shown, "failure handling"),
                Ok(Err(refusal)) => tracing::debug!(decision = shown, %refusal, "overtaken"),
                Err(error) => tracing::error!(decision = shown, %error, "a decision could not be agreed on"),
            }
        }
    }

    /// Runs the failure detector and the meters until the daemon stops.
    async fn watch_over(self) {
        let mut stop = self.0.stop.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                _ = stop.wait_for(|s| *s) => return,
            }
            self.detect(Event::Tick).await;
            let state = self.state();
            let forgot = self.0.volatile.lock().tick(boottime_ms(), &state);
            if forgot {
                self.0.host_reports.send_modify(|n| *n += 1);
            }
        }
    }

    /// Serves until `stop` turns true or the listener fails.
    pub async fn serve(self, incoming: TcpIncoming) -> anyhow::Result<()> {
        use pb::admin_service_server::AdminServiceServer;
        use pb::client_service_server::ClientServiceServer;
        use pb::host_service_server::HostServiceServer;
        use pb::map_service_server::MapServiceServer;
        use pb::osd_service_server::OsdServiceServer;
        use pb::status_service_server::StatusServiceServer;
        macro_rules! service {
            ($server:ident) => {
                $server::new(self.clone())
                    .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX)
            };
        }
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<AdminServiceServer<Monitor>>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let over = tokio::spawn(self.clone().watch_over());
        let mut stop = self.0.stop.clone();
        let served = Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .add_service(health_service)
            .add_service(reflection)
            .add_service(service!(AdminServiceServer))
            .add_service(service!(ClientServiceServer))
            .add_service(service!(HostServiceServer))
            .add_service(service!(MapServiceServer))
            .add_service(service!(OsdServiceServer))
            .add_service(service!(StatusServiceServer))
            .serve_with_incoming_shutdown(incoming, async move {
                // An error means that the sender is gone, which is a stop too.
                let _ = stop.wait_for(|s| *s).await;
            })
            .await;
        over.abort();
        Ok(served?)
    }
}
