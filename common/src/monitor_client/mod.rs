//! Calls to the monitors. One client knows all of them and talks to one: the leader, once somebody
//! told where that is. Every answer names all monitors, so a client that was given one learns the rest.
//!
//! A monitor that does not lead does not forward: it says where the leader is ([`headers::LEADER`])
//! and the client goes there. So a lease is counted end to end between the OSD and the one who grants
//! it, no call waits behind two timeouts, and every client finds a monitor that was added later.
//!
//! Every call carries an id of its own, the same however often it is tried: what changes something
//! is carried out once ([`headers::REQUEST_ID`]).

mod backoff;
pub mod headers;
mod table;

pub use backoff::Backoff;
pub use headers::RequestId;

use crate::grpc;
use crate::tls::Security;
use gabion_proto::limits::GRPC_MESSAGE_BYTES_MAX;
use gabion_proto::pb;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use table::{Entry, Table};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// A monitor that holds a call for longer than this is taken for gone. Attaching a volume waits for
/// leases to run out, so this is longer than a lease and its grace.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a call is tried again while the monitors answer but none leads: longer than an election.
const RETRY_FOR: Duration = Duration::from_secs(10);

/// A monitor address that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MonitorAddressError {
    #[error("at least one monitor address is needed")]
    None,
    #[error("monitor address {addr:?} is not ip:port")]
    Malformed { addr: String },
}

/// Marks a call: its id, and whether an old answer will do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    request: Option<RequestId>,
    stale_ok: bool,
}

impl Interceptor for Stamp {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(id) = self.request {
            headers::put(request.metadata_mut(), headers::REQUEST_ID, &id.to_string());
        }
        if self.stale_ok {
            headers::put(request.metadata_mut(), headers::STALE_OK, "1");
        }
        Ok(request)
    }
}

/// A connection whose calls are stamped.
pub type MonitorChannel = InterceptedService<Channel, Stamp>;

/// Cheap to clone; connects lazily. Clones share which monitor is in use.
#[derive(Clone)]
pub struct MonitorClient {
    table: Arc<Table>,
    /// The monitor that the current try is about.
    pinned: Option<Entry>,
    stamp: Stamp,
    call_timeout: Duration,
    retry_for: Duration,
}

macro_rules! service {
    ($(#[$doc:meta])* $name:ident, $module:ident, $client:ident) => {
        $(#[$doc])*
        pub fn $name(&self) -> pb::$module::$client<MonitorChannel> {
            pb::$module::$client::new(self.channel())
                .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
                .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX)
        }
    };
}

impl MonitorClient {
    /// A plain client of the monitors at `addrs`, each `ip:port`.
    pub fn new<A: AsRef<str>>(addrs: &[A]) -> Result<MonitorClient, MonitorAddressError> {
        MonitorClient::secured(addrs, Security::plain())
    }

    /// The same by `security`.
    pub fn secured<A: AsRef<str>>(
        addrs: &[A],
        security: Security,
    ) -> Result<MonitorClient, MonitorAddressError> {
        let table = Arc::new(Table::new(addrs, security)?);
        Ok(MonitorClient {
            table,
            pinned: None,
            stamp: Stamp::default(),
            call_timeout: CALL_TIMEOUT,
            retry_for: RETRY_FOR,
        })
    }

    /// How it connects, and whatever else this process has to connect to.
    pub fn security(&self) -> Security {
        self.table.security()
    }

    /// One that goes its own way among the same monitors.
    pub fn fork(&self) -> MonitorClient {
        MonitorClient { table: Arc::new(self.table.fork()), ..self.clone() }
    }

    /// One that takes a monitor for gone when it holds a call for longer than `call_timeout`.
    pub fn with_call_timeout(&self, call_timeout: Duration) -> MonitorClient {
        MonitorClient { call_timeout, ..self.clone() }
    }

    /// One that is content when the monitors had no leader for `retry_for`.
    pub fn with_retry_for(&self, retry_for: Duration) -> MonitorClient {
        MonitorClient { retry_for, ..self.clone() }
    }

    /// One that takes an old answer where the monitors have no quorum.
    pub fn with_stale_ok(&self) -> MonitorClient {
        let mut client = self.clone();
        client.stamp.stale_ok = true;
        client
    }

    fn entry(&self) -> Entry {
        self.pinned.clone().unwrap_or_else(|| self.table.current())
    }

    /// The channel to the monitor in use.
    pub fn channel(&self) -> MonitorChannel {
        InterceptedService::new(self.entry().channel, self.stamp)
    }

    /// The monitor in use.
    pub fn addr(&self) -> SocketAddr {
        self.entry().addr
    }

    /// Uses another monitor from now on: the leader if this refusal, or end of a stream, names it.
    pub fn failed(&self, status: &Status) {
        if self.table.learn(status.metadata()).is_none() {
            self.table.leave(None);
        }
    }

    /// Takes in which monitors there are, from an answer.
    pub fn heard(&self, metadata: &MetadataMap) {
        self.table.learn(metadata);
    }

    /// Uses the next monitor from now on.
    pub fn rotate(&self) {
        self.table.leave(None);
    }

    service!(admin, admin_service_client, AdminServiceClient);
    service!(map, map_service_client, MapServiceClient);
    service!(osd, osd_service_client, OsdServiceClient);
    service!(client, client_service_client, ClientServiceClient);
    service!(host, host_service_client, HostServiceClient);
    service!(status, status_service_client, StatusServiceClient);

    /// The same client for one request, with an id if it has none.
    fn for_one_request(&self) -> MonitorClient {
        let mut client = self.clone();
        client.stamp.request.get_or_insert_with(RequestId::random);
        client
    }

    /// Makes a call until a monitor answers or refuses it. Gives up when no monitor can be reached at
    /// all, or when they had no leader for longer than an election takes.
    pub async fn once<T, F, Fut>(&self, mut call: F) -> Result<T, Status>
    where
        F: FnMut(MonitorClient) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let client = self.for_one_request();
        let ends = Instant::now() + client.retry_for;
        let mut backoff = Backoff::default();
        loop {
            match client.round(&mut call).await {
                Round::Done(result) => return result,
                Round::Nobody(status) => return Err(status),
                Round::NoLeader(status) if Instant::now() >= ends => return Err(status),
                Round::NoLeader(_) => tokio::time::sleep(backoff.next()).await,
            }
        }
    }

    /// Asks the monitors one after the other, the leader as soon as it is named.
    async fn round<T, F, Fut>(&self, call: &mut F) -> Round<T>
    where
        F: FnMut(MonitorClient) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut tried = Vec::new();
        let mut reached = false;
        let mut last = Status::unavailable("no monitor answered");
        // One more than there are: the leader may have been asked before it led.
        for _ in 0..=self.table.len() {
            let entry = self.entry();
            let at = entry.addr;
            let attempt = MonitorClient { pinned: Some(entry), ..self.clone() };
            let answer = tokio::time::timeout(self.call_timeout, call(attempt)).await;
            let status = match answer {
                Ok(Ok(reply)) => {
                    self.heard(reply.metadata());
                    return Round::Done(Ok(reply.into_inner()));
                }
                Ok(Err(status)) if !is_transient(&status) => return Round::Done(Err(status)),
                Ok(Err(status)) => grpc::explained(status),
                Err(_) => Status::deadline_exceeded(format!("monitor {at} did not answer in time")),
            };
            let hint = self.table.learn(status.metadata()).filter(|hint| *hint != at);
            if hint.is_none() {
                self.table.leave(Some(at));
            }
            // What a monitor says is worth more than that another one cannot be reached.
            if headers::is_answer(&status) || !reached {
                reached |= headers::is_answer(&status);
                last = status;
            }
            tried.push(at);
            if tried.iter().filter(|t| **t == self.table.current().addr).count() > 1 {
                break;
            }
        }
        if reached { Round::NoLeader(last) } else { Round::Nobody(last) }
    }

    /// Makes a call until a monitor answers it or refuses it, however long that takes.
    pub async fn until_answered<T, F, Fut>(&self, what: &'static str, mut call: F) -> Result<T, Status>
    where
        F: FnMut(MonitorClient) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let client = self.for_one_request();
        let mut backoff = Backoff::default();
        loop {
            match client.once(&mut call).await {
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

/// What asking all monitors came to.
enum Round<T> {
    Done(Result<T, Status>),
    /// Some answered, but none leads.
    NoLeader(Status),
    /// None could be reached.
    Nobody(Status),
}

/// Whether the same call may succeed later or at another monitor.
pub fn is_transient(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal
    )
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[tokio::test]
    async fn goes_to_the_leader_with_the_same_id() {
        let monitors = MonitorClient::new(&["127.0.0.1:1", "127.0.0.1:2"]).unwrap();
        let seen = std::sync::Mutex::new(Vec::new());
        let answer = monitors
            .once(|m| {
                seen.lock().unwrap().push((m.addr().port(), m.stamp.request.unwrap()));
                async move {
                    if m.addr().port() == 9 {
                        return Ok(Response::new(7));
                    }
                    let mut status = Status::unavailable("not the leader");
                    headers::put(status.metadata_mut(), headers::MONITOR, "1");
                    headers::put(status.metadata_mut(), headers::LEADER, "127.0.0.1:9");
                    Err(status)
                }
            })
            .await;
        assert_eq!(answer.unwrap(), 7);
        let seen = seen.into_inner().unwrap();
        assert_eq!(seen.iter().map(|s| s.0).collect::<Vec<_>>(), [1, 9]);
        assert_eq!(seen[0].1, seen[1].1);
        assert_eq!(monitors.addr().port(), 9, "it stays there");
        assert!(monitors.stamp.request.is_none(), "the next request is another one");
    }

    #[tokio::test]
    async fn waits_for_an_election_but_not_for_ever() {
        let mut monitors = MonitorClient::new(&["127.0.0.1:1", "127.0.0.1:2"]).unwrap();
        let no_leader = || {
            let mut status = Status::unavailable("no quorum");
            headers::put(status.metadata_mut(), headers::MONITOR, "1");
            status
        };
        let mut tries = 0;
        let answer = monitors.once(|_| {
            tries += 1;
            let elected = tries > 10;
            async move { if elected { Ok(Response::new(())) } else { Err(no_leader()) } }
        });
        answer.await.unwrap();
        monitors.retry_for = Duration::from_millis(100);
        let never = monitors.once(|_| async move { Err::<Response<()>, _>(no_leader()) }).await;
        assert_eq!(never.unwrap_err().message(), "no quorum");
    }

    #[tokio::test]
    async fn gives_up_at_once_when_nobody_is_there() {
        let monitors = MonitorClient::new(&["127.0.0.1:1", "127.0.0.1:2"]).unwrap();
        let mut calls = 0;
        let failed = monitors.once(|_| {
            calls += 1;
            async { Err::<Response<()>, _>(Status::unavailable("connection refused")) }
        });
        failed.await.unwrap_err();
        assert!((2..=3).contains(&calls), "{calls}");
    }
}
