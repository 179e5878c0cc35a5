//! Calls to the monitors. One client knows all of them, talks to one, and goes to the next when it
//! does not answer. Nothing here decides whether a call may be repeated: every call of the API that
//! daemons make is idempotent.

use gabion_proto::limits::GRPC_MESSAGE_BYTES_MAX;
use gabion_proto::pb;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A monitor that holds a call for longer than this is taken for gone. Attaching a volume waits for
/// leases to run out, so this is longer than a lease and its grace.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// A monitor address that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MonitorAddressError {
    #[error("at least one monitor address is needed")]
    None,
    #[error("monitor address {addr:?} is not ip:port")]
    Malformed { addr: String },
}

/// Cheap to clone; connects lazily.
#[derive(Clone)]
pub struct MonitorClient {
    channels: Arc<[Channel]>,
    /// Index of the monitor in use, modulo their number.
    current: Arc<AtomicUsize>,
}

macro_rules! service {
    ($(#[$doc:meta])* $name:ident, $module:ident, $client:ident) => {
        $(#[$doc])*
        pub fn $name(&self) -> pb::$module::$client<Channel> {
            pb::$module::$client::new(self.channel())
                .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
                .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX)
        }
    };
}

impl MonitorClient {
    /// A client of the monitors at `addrs`, each `ip:port`.
    pub fn new<A: AsRef<str>>(addrs: &[A]) -> Result<MonitorClient, MonitorAddressError> {
        let channels: Vec<Channel> = addrs.iter().map(|a| channel(a.as_ref())).collect::<Result<_, _>>()?;
        if channels.is_empty() {
            return Err(MonitorAddressError::None);
        }
        Ok(MonitorClient { channels: channels.into(), current: Arc::default() })
    }

    /// The channel to the monitor in use.
    pub fn channel(&self) -> Channel {
        let at = self.current.load(Ordering::Relaxed) % self.channels.len();
        self.channels[at].clone()
    }

    /// Uses the next monitor from now on.
    pub fn rotate(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
    }

    service!(admin, admin_service_client, AdminServiceClient);
    service!(map, map_service_client, MapServiceClient);
    service!(osd, osd_service_client, OsdServiceClient);
    service!(client, client_service_client, ClientServiceClient);
    service!(host, host_service_client, HostServiceClient);
    service!(status, status_service_client, StatusServiceClient);

    /// Makes a call, once at each monitor until one answers. The first refusal is final.
    pub async fn once<T, F, Fut>(&self, mut call: F) -> Result<T, Status>
    where
        F: FnMut(MonitorClient) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut last = Status::unavailable("no monitor answered");
        for _ in 0..self.channels.len() {
            match tokio::time::timeout(CALL_TIMEOUT, call(self.clone())).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) if !is_transient(&status) => return Err(status),
                Ok(Err(status)) => last = status,
                Err(_) => last = Status::deadline_exceeded("the monitor did not answer in time"),
            }
            self.rotate();
        }
        Err(last)
    }

    /// Makes a call until a monitor answers it or refuses it.
    pub async fn until_answered<T, F, Fut>(&self, what: &'static str, mut call: F) -> Result<T, Status>
    where
        F: FnMut(MonitorClient) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut backoff = Backoff::default();
        loop {
            match self.once(&mut call).await {
                Err(status) if is_transient(&status) => {
                    if backoff.is_first() {
                        tracing::warn!(what, error = status.message(), "no monitor answers, trying again");
                    }
                    tokio::time::sleep(backoff.next()).await;
                }
                answer => return answer,
            }
        }
    }
}

fn channel(addr: &str) -> Result<Channel, MonitorAddressError> {
    let malformed = || MonitorAddressError::Malformed { addr: addr.to_owned() };
    let addr: SocketAddr = addr.parse().map_err(|_| malformed())?;
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|_| malformed())?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        // A monitor whose machine is gone closes nothing: streams must notice all the same.
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(3))
        .connect_lazy())
}

/// Whether the same call may succeed later or at another monitor.
pub fn is_transient(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal
    )
}

/// Doubling waits with jitter, so that many clients do not come back at once.
#[derive(Debug, Default)]
pub struct Backoff {
    tries: u32,
}

impl Backoff {
    /// Whether nothing failed yet.
    pub fn is_first(&self) -> bool {
        self.tries == 0
    }
    /// After success.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
    /// How long to wait before the next try.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Duration {
        let full = BACKOFF_MIN.saturating_mul(1 << self.tries.min(8)).min(BACKOFF_MAX);
        self.tries = self.tries.saturating_add(1);
        full.mul_f64(rand::random_range(0.5..1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stay_bounded() {
        let mut b = Backoff::default();
        let waits: Vec<_> = (0..40).map(|_| b.next()).collect();
        assert!(waits[0] <= BACKOFF_MIN && waits[39] >= BACKOFF_MAX / 2);
        assert!(waits.iter().all(|w| *w <= BACKOFF_MAX));
    }

    #[tokio::test]
    async fn refuses_addresses_that_are_none() {
        assert!(matches!(MonitorClient::new::<&str>(&[]), Err(MonitorAddressError::None)));
        for bad in ["", "localhost", "127.0.0.1", "127.0.0.1:99999", "http://127.0.0.1:1"] {
            assert!(
                matches!(MonitorClient::new(&[bad]), Err(MonitorAddressError::Malformed { .. })),
                "{bad}"
            );
        }
    }
}
