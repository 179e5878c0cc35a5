//! The gRPC face of a monitor: everything of `proto/gabion/v1` but consoles.
//!
//! [`Monitor`] ties the agreed state to what daemons report between changes (`volatile`), and
//! runs the failure detector while it leads (`leadership`). Only the leader answers; a monitor that
//! does not lead says where the leader is, and serves nothing but the map's stream. Every stream ends
//! when the daemon stops; those of a leader also when it no longer leads.

mod access;
mod admin;
mod clients;
mod health;
mod hosts;
mod leadership;
mod maps;
mod metrics;
mod monitors;
mod osds;
mod rebuild;
mod slow;
mod snapshots;
mod status;
mod view;
mod volatile;

use crate::decide::Timing;
use crate::raft::{Consensus, ConsensusError, Standing};
use crate::state::{MonitorState, Refusal, RefusalKind};
use gabion_common::grpc::{Access, Incoming};
use gabion_common::monitor_client::headers;
use gabion_proto::limits::GRPC_MESSAGE_BYTES_MAX;
use gabion_proto::pb;
use leadership::Lead;
use parking_lot::Mutex;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::server::Server;
use tower::util::MapResponseLayer;
use volatile::Volatile;

/// How long the word that this monitor leads may lag behind the proof of it.
const STANDING_LAG: Duration = Duration::from_secs(1);
/// Reports of stuck peers that are acted on at a time; the rest is reported again.
const STUCK_REPORTS_MAX: usize = 16;
/// Messages of one stream that wait for a slow reader.
const STREAM_DEPTH: usize = 16;

/// A stream of answers.
type Answers<T> = ReceiverStream<Result<T, Status>>;
type Sender<T> = mpsc::Sender<Result<T, Status>>;

struct Inner {
    consensus: Consensus,
    timing: Timing,
    // Held to read or change it only; taken before `volatile`.
    lead: Mutex<Option<Lead>>,
    volatile: Mutex<Volatile>,
    stuck_reports: Arc<Semaphore>,
    /// Counts reports of OSDs: who waits for acknowledgements looks again.
    osd_reports: watch::Sender<u64>,
    /// Counts reports of hosts that changed something.
    host_reports: watch::Sender<u64>,
    /// Numbers of host specifications.
    revision: AtomicU64,
    stop: watch::Receiver<bool>,
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

fn invalid(e: impl std::fmt::Display) -> Status {
    Status::invalid_argument(e.to_string())
}

impl Monitor {
    /// A monitor that ends when `stop` turns true.
    pub fn new(consensus: Consensus, timing: Timing, stop: watch::Receiver<bool>) -> Monitor {
        let revision = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |d| d.as_millis() as u64);
        Monitor(Arc::new(Inner {
            consensus,
            timing,
            lead: Mutex::default(),
            volatile: Mutex::default(),
            stuck_reports: Arc::new(Semaphore::new(STUCK_REPORTS_MAX)),
            osd_reports: watch::Sender::new(0),
            host_reports: watch::Sender::new(0),
            // Grows over restarts too, as long as the clock does.
            revision: AtomicU64::new(revision),
            stop,
        }))
    }

    fn state(&self) -> Arc<MonitorState> {
        self.0.consensus.state()
    }

    fn next_revision(&self) -> u64 {
        self.0.revision.fetch_add(1, Ordering::Relaxed)
    }

    /// A stream that `feed` fills until it returns, the reader leaves, the daemon stops or `over` ends;
    /// then the reader is told where to go.
    fn stream<T, F>(
        &self,
        over: impl Future<Output = ()> + Send + 'static,
        feed: impl FnOnce(Sender<T>) -> F,
    ) -> Answers<T>
    where
        T: Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (tx, rx) = mpsc::channel(STREAM_DEPTH);
        let mut stop = self.0.stop.clone();
        let gone = tx.clone();
        let feed = feed(tx);
        let monitor = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = feed => {}
                () = gone.closed() => {}
                _ = stop.wait_for(|s| *s) => {}
                () = over => {
                    // A reader that is behind finds out by itself.
                    let _ = gone.try_send(Err(monitor.failed(ConsensusError::NotLeader)));
                }
            }
        });
        ReceiverStream::new(rx)
    }

    /// Ends when this monitor no longer leads in `term`.
    fn deposed(&self, term: u64) -> impl Future<Output = ()> + Send + 'static {
        let mut standing = self.0.consensus.standing();
        async move {
            let in_term = |s: &Standing| s.leads == Some(term);
            // What is believed may not have caught up with what was proved.
            let seen = tokio::time::timeout(STANDING_LAG, standing.wait_for(in_term)).await.is_ok();
            if seen {
                // An error means that the monitor has ended.
                let _ = standing.wait_for(|s| !in_term(s)).await;
            }
        }
    }

    /// Ends when this monitor has lost touch with the others.
    fn adrift(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut standing = self.0.consensus.standing();
        async move {
            let _ = standing.wait_for(|s| !s.in_touch).await;
        }
    }

    /// Serves until `stop` turns true or the listener fails.
    pub async fn serve(self, incoming: Incoming) -> anyhow::Result<()> {
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
        let standing = self.0.consensus.standing();
        let names_all = MapResponseLayer::new(move |mut response: http::Response<tonic::body::Body>| {
            if let Ok(addrs) = http::HeaderValue::from_str(&standing.borrow().addrs) {
                response.headers_mut().insert(headers::MONITORS, addrs);
            }
            response
        });
        let served = Server::builder()
            .layer(names_all)
            .layer(Access(access::rule))
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .add_service(health_service)
            .add_service(reflection)
            .add_service(service!(AdminServiceServer))
            .add_service(service!(ClientServiceServer))
            .add_service(service!(HostServiceServer))
            .add_service(service!(MapServiceServer))
            .add_service(service!(OsdServiceServer))
            .add_service(service!(StatusServiceServer))
            .add_service(self.0.consensus.peer_service())
            .serve_with_incoming_shutdown(incoming, async move {
                // An error means that the sender is gone, which is a stop too.
                let _ = stop.wait_for(|s| *s).await;
            })
            .await;
        over.abort();
        Ok(served?)
    }
}
