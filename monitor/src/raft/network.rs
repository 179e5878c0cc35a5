//! Calls to the other monitors: openraft's requests over `MonitorPeerService`.
//!
//! Connections are shared by all of openraft's tasks and made when they are used. Every answer is
//! remembered with its time: it is how a monitor knows which others are up.

use super::identity::{Identity, StoreId};
use super::{MonitorNode, Types};
use gabion_common::clock::boottime_ms;
use gabion_common::grpc::{Connector, explained};
use gabion_common::tls::{Role, Security};
use gabion_proto::ids::ClusterId;
use gabion_proto::limits::MONITOR_PEER_MESSAGE_BYTES_MAX;
use gabion_proto::pb;
use gabion_proto::pb::monitor_peer_service_client::MonitorPeerServiceClient;
use openraft::error::*;
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::*;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// An unreachable monitor is tried again after this.
const RETRY: Duration = Duration::from_millis(250);
/// Connections that are kept; there are far fewer monitors.
const CHANNELS_MAX: usize = 64;

/// Links between monitors that do not work: the seam for partitions in tests.
#[derive(Clone, Debug, Default)]
pub struct Links {
    cut: Arc<Mutex<BTreeSet<u64>>>,
}

impl Links {
    /// From now on nothing goes to this monitor or comes from it.
    pub fn cut(&self, peer: u64) {
        self.cut.lock().insert(peer);
    }
    pub fn heal(&self) {
        self.cut.lock().clear();
    }
    pub fn is_cut(&self, peer: u64) -> bool {
        self.cut.lock().contains(&peer)
    }
}

/// What was last heard of another monitor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard {
    pub at_ms: Option<u64>,
    pub error: String,
}

pub(crate) struct Shared {
    pub identity: Arc<Identity>,
    pub links: Links,
    security: Security,
    channels: Mutex<HashMap<String, Channel>>,
    heard: Mutex<BTreeMap<u64, Heard>>,
}

impl Shared {
    pub fn new(identity: Arc<Identity>, links: Links, security: Security) -> Arc<Shared> {
        Arc::new(Shared { identity, links, security, channels: Mutex::default(), heard: Mutex::default() })
    }

    fn channel(&self, addr: &str) -> Result<Channel, Status> {
        let mut channels = self.channels.lock();
        if let Some(channel) = channels.get(addr) {
            return Ok(channel.clone());
        }
        let malformed =
            || Status::invalid_argument(format!("{addr:?} is not an address of the form ip:port"));
        let socket = addr.parse().map_err(|_| malformed())?;
        let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|_| malformed())?;
        let channel = endpoint
            .http2_keep_alive_interval(Duration::from_secs(1))
            .keep_alive_timeout(Duration::from_secs(1))
            .connect_with_connector_lazy(Connector::new(
                socket,
                self.security.clone(),
                Role::Monitor,
                CONNECT_TIMEOUT,
            ));
        if channels.len() >= CHANNELS_MAX {
            channels.clear();
        }
        channels.insert(addr.to_owned(), channel.clone());
        Ok(channel)
    }

    pub fn client(&self, addr: &str) -> Result<MonitorPeerServiceClient<Channel>, Status> {
        Ok(MonitorPeerServiceClient::new(self.channel(addr)?)
            .max_decoding_message_size(MONITOR_PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MONITOR_PEER_MESSAGE_BYTES_MAX))
    }

    pub fn heard(&self, peer: u64) -> Heard {
        self.heard.lock().get(&peer).cloned().unwrap_or_default()
    }

    pub fn keep_heard(&self, members: &BTreeSet<u64>) {
        self.heard.lock().retain(|id, _| members.contains(id));
    }

    fn hear(&self, peer: u64, answer: Result<(), &Status>) {
        let mut heard = self.heard.lock();
        let heard = heard.entry(peer).or_default();
        match answer {
            Ok(()) => *heard = Heard { at_ms: Some(boottime_ms()), error: String::new() },
            Err(status) if status.code() == Code::FailedPrecondition => {
                // It answers, but it is not who it should be.
                *heard = Heard { at_ms: None, error: status.message().to_owned() };
            }
            Err(status) => heard.error = status.message().to_owned(),
        }
    }

    /// The request around `body` for `to`.
    pub fn request(&self, to: u64, store: StoreId, body: Vec<u8>) -> pb::PeerRequest {
        pb::PeerRequest {
            cluster: self.identity.cluster().unwrap_or(ClusterId([0; 16])).0.to_vec(),
            from: self.identity.id(),
            to,
            to_store: store.0.to_vec(),
            body,
        }
    }
}

/// The answer to a piece of a snapshot; other errors travel as gRPC's.
#[derive(Serialize, Deserialize)]
pub(super) enum Piece {
    Taken(InstallSnapshotResponse<u64>),
    Mismatch(SnapshotMismatch),
}

pub(crate) struct Peers(pub Arc<Shared>);

pub(crate) struct Peer {
    shared: Arc<Shared>,
    id: u64,
    node: MonitorNode,
}

type Failure<E = Infallible> = RPCError<u64, MonitorNode, RaftError<u64, E>>;

impl RaftNetworkFactory<Types> for Peers {
    type Network = Peer;
    async fn new_client(&mut self, target: u64, node: &MonitorNode) -> Peer {
        Peer { shared: self.0.clone(), id: target, node: node.clone() }
    }
}

#[derive(Clone, Copy)]
enum Verb {
    Append,
    Vote,
    InstallSnapshot,
}

impl Peer {
    async fn call<Q: Serialize, A: DeserializeOwned>(&self, verb: Verb, request: &Q) -> Result<A, Status> {
        if self.shared.links.is_cut(self.id) {
            // As a real one: nothing comes back.
            return std::future::pending().await;
        }
        let body = postcard::to_stdvec(request).map_err(|e| Status::internal(e.to_string()))?;
        let request = self.shared.request(self.id, self.node.store, body);
        let mut client = self.shared.client(&self.node.addr)?;
        let answer = match verb {
            Verb::Append => client.append(request).await,
            Verb::Vote => client.vote(request).await,
            Verb::InstallSnapshot => client.install_snapshot(request).await,
        };
        let answer = answer.map_err(explained);
        self.shared.hear(self.id, answer.as_ref().map(drop));
        let reply = answer?.into_inner();
        postcard::from_bytes(&reply.body).map_err(|e| Status::internal(format!("a malformed answer: {e}")))
    }
}

fn failure<E: std::error::Error>(status: &Status) -> Failure<E> {
    match status.code() {
        Code::Unavailable | Code::FailedPrecondition => RPCError::Unreachable(Unreachable::new(status)),
        _ => RPCError::Network(NetworkError::new(status)),
    }
}

impl RaftNetwork<Types> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failure> {
        self.call(Verb::Append, &rpc).await.map_err(|s| failure(&s))
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<Types>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failure<InstallSnapshotError>> {
        match self.call(Verb::InstallSnapshot, &rpc).await.map_err(|s| failure(&s))? {
            Piece::Taken(response) => Ok(response),
            Piece::Mismatch(mismatch) => {
                let error = RaftError::APIError(InstallSnapshotError::SnapshotMismatch(mismatch));
                Err(RPCError::RemoteError(RemoteError::new(self.id, error)))
            }
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        _option: RPCOption,
    ) -> Result<VoteResponse<u64>, Failure> {
        self.call(Verb::Vote, &rpc).await.map_err(|s| failure(&s))
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}
