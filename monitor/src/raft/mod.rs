//! Agreement: openraft over RocksDB and gRPC, behind [`Consensus`]. Nothing outside this module knows
//! of it.
//!
//! ```text
//! identity      whose data this is          log, machine   what is kept
//! network       calls to other monitors     peer_service   their calls
//! standing      who leads, is there a quorum; confirming that it is still so
//! proposals     commands on their way into the log, those that wait together in one entry
//! membership    adding and removing monitors
//! ```
//!
//! Invariants: a proposal that was answered is durable on a quorum (each log is synced before openraft
//! hears that it is written); the published state only ever moves forward; what is read after
//! [`Consensus::confirm`] is not older than the question.
//!
//! Failure: an error of the disk stops openraft; every proposal then fails with
//! [`ConsensusError::Stopped`], and the daemon exits. Without a quorum nothing is agreed on:
//! proposals fail with [`ConsensusError::NoQuorum`] and may still come about later.

mod identity;
mod log;
mod machine;
mod membership;
mod network;
mod peer_service;
mod proposals;
mod standing;

pub use identity::StoreId;
pub use machine::Published;
pub use membership::{Member, MembershipError};
pub use network::Links;
pub use standing::Standing;

use crate::state::{Command, CommandResult, MonitorState, Refusal, Stamped};
use gabion_common::monitor_client::RequestId;
use gabion_common::tls::Security;
use gabion_proto::ids::{ClusterId, Epoch};
use gabion_proto::limits::*;
use gabion_proto::pb::monitor_peer_service_server::MonitorPeerServiceServer;
use identity::{Identity, Origin};
use network::Shared;
use openraft::error::{InitializeError, RaftError};
use openraft::{Config, Raft};
use peer_service::PeerService;
use proposals::Proposal;
use rocksdb::{ColumnFamilyDescriptor, DB, LogLevel, Options};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Cursor};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot, watch};

openraft::declare_raft_types!(
    pub(crate) Types:
        D = Stamped,
        R = CommandResult,
        NodeId = u64,
        Node = MonitorNode,
        Entry = openraft::Entry<Types>,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = openraft::TokioRuntime,
);

/// A monitor as the membership names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MonitorNode {
    pub addr: String,
    pub store: StoreId,
}

/// How long the only monitor of a cluster waits at its start until it leads.
const LEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a stop waits until the database is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a proposal may take; without a quorum it takes for ever.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// RocksDB's notes for people, and its list of tables.
const NOTE_FILES_MAX: usize = 4;
const NOTE_FILE_BYTES_MAX: usize = 1 << 20;
const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// Commands between two snapshots of the state.
pub const SNAPSHOT_EVERY: u64 = 2_000;

/// The leader speaks this often, and a call of it may take as long.
const HEARTBEAT_MS: u64 = 250;
/// openraft lets a follower wait for the greater of these two (the leader's lease) and then, fixed at
/// each start, for something between them: 1.5 to 2 seconds of silence make an election. A lease of
/// an OSD outlasts that.
const ELECTION_MS: (u64, u64) = (500, 1_000);
const _: () = assert!(2 * ELECTION_MS.1 < LEASE.as_millis() as u64);

/// Why a proposal or a start failed. A refusal by the state is not an error here.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConsensusError {
    #[error(
        "there is no monitor's data here: start with --bootstrap to make a new cluster, or with --join to be added to one"
    )]
    NotInitialised,
    #[error("there is a monitor's data here already: start without --bootstrap")]
    Initialised,
    #[error("this is the data of monitor {kept}, not of monitor {asked}")]
    OtherMonitor { kept: u64, asked: u64 },
    #[error("monitor {0} was removed from its cluster: remove its data to add it again")]
    Dismissed(u64),
    #[error("the monitor's database: {0}")]
    Database(#[from] rocksdb::Error),
    #[error("this monitor does not lead")]
    NotLeader,
    #[error("{0}")]
    NoQuorum(String),
    #[error("agreement has stopped: {0}")]
    Stopped(String),
}

/// How a monitor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// As the first of a new cluster, in an empty directory.
    Bootstrap,
    /// To be added to a cluster, or going on with what it has.
    Join,
    /// Going on with what it has.
    Resume,
}

/// Who a monitor is and how it runs.
#[derive(Clone, Debug)]
pub struct Setup {
    pub id: u64,
    /// Where the others find it, `ip:port`; for good.
    pub addr: String,
    pub start: Start,
    pub snapshot_every: u64,
    pub links: Links,
    pub security: Security,
}

impl Setup {
    pub fn new(id: u64, addr: impl Into<String>, start: Start) -> Setup {
        Setup {
            id,
            addr: addr.into(),
            start,
            snapshot_every: SNAPSHOT_EVERY,
            links: Links::default(),
            security: Security::plain(),
        }
    }
}

struct Inner {
    raft: Raft<Types>,
    published: Arc<Published>,
    shared: Arc<Shared>,
    addr: String,
    standing: watch::Receiver<Standing>,
    questions: mpsc::Sender<standing::Question>,
    proposals: mpsc::Sender<Proposal>,
    dismissed: watch::Sender<bool>,
    closed: watch::Receiver<()>,
}

/// The agreed state, and how to change it. Clones share it.
#[derive(Clone)]
pub struct Consensus(Arc<Inner>);

impl std::fmt::Debug for Consensus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Consensus(monitor {})", self.id())
    }
}

/// The open database, and word of when it is closed.
pub(crate) struct Database {
    // Dropped first, so that whoever hears that the sender is gone finds the lock free.
    db: DB,
    closed: watch::Sender<()>,
}

impl std::ops::Deref for Database {
    type Target = DB;
    fn deref(&self) -> &DB {
        &self.db
    }
}

pub(crate) fn open_db(dir: &Path) -> Result<Arc<Database>, rocksdb::Error> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_log_level(LogLevel::Warn);
    options.set_keep_log_file_num(NOTE_FILES_MAX);
    options.set_max_log_file_size(NOTE_FILE_BYTES_MAX);
    options.set_max_manifest_file_size(MANIFEST_BYTES_MAX);
    options.set_max_total_wal_size(64 << 20);
    let families = [log::FAMILY, machine::FAMILY].map(|f| ColumnFamilyDescriptor::new(f, Options::default()));
    let db = DB::open_cf_descriptors(&options, dir, families)?;
    Ok(Arc::new(Database { db, closed: watch::Sender::new(()) }))
}

fn stopped(e: impl std::fmt::Display) -> ConsensusError {
    ConsensusError::Stopped(e.to_string())
}

fn config(snapshot_every: u64) -> Result<Arc<Config>, ConsensusError> {
    let config = Config {
        cluster_name: "gabion".into(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MS.0,
        election_timeout_max: ELECTION_MS.1,
        install_snapshot_timeout: 10_000,
        snapshot_policy: openraft::SnapshotPolicy::LogsSinceLast(snapshot_every),
        snapshot_max_chunk_size: MONITOR_SNAPSHOT_PIECE_BYTES as u64,
        max_in_snapshot_log_to_keep: snapshot_every / 4,
        replication_lag_threshold: snapshot_every * 2,
        max_payload_entries: MONITOR_APPEND_ENTRIES_MAX as u64,
        ..Config::default()
    };
    config.validate().map(Arc::new).map_err(stopped)
}

impl Consensus {
    /// Starts the monitor whose data is in `dir`. The only one of a cluster is ready when it leads and
    /// has caught up with its own log; others take part from then on.
    pub async fn open(dir: &Path, setup: Setup) -> Result<Consensus, ConsensusError> {
        let Setup { id, addr, start, snapshot_every, links, security } = setup;
        let db = open_db(&dir.join("raft"))?;
        let origin = match start {
            Start::Bootstrap => Some(Origin::Founder),
            Start::Join => Some(Origin::Joiner),
            Start::Resume => None,
        };
        let identity = Arc::new(Identity::open(db.clone(), id, origin)?);
        let machine = machine::Machine::open(db.clone()).map_err(stopped)?;
        let published = machine.published();
        let closed = db.closed.subscribe();
        let shared = Shared::new(identity.clone(), links, security);
        let peers = network::Peers(shared.clone());
        let config = config(snapshot_every)?;
        let raft = Raft::new(id, config, peers, log::Log::new(db), machine).await.map_err(stopped)?;
        let (asking, questions) = mpsc::channel(standing::QUESTIONS_MAX);
        tokio::spawn(standing::answer(raft.clone(), shared.clone(), questions));
        let (proposing, proposals) = mpsc::channel(PROPOSALS_WAITING_MAX);
        tokio::spawn(proposals::commit_in_turn(raft.clone(), proposals));
        let standing = standing::follow(&raft, shared.clone());
        let dismissed = watch::Sender::new(false);
        let inner = Inner {
            raft,
            published,
            shared,
            addr,
            standing,
            questions: asking,
            proposals: proposing,
            dismissed,
            closed,
        };
        let consensus = Consensus(Arc::new(inner));
        match consensus.begin(start, identity.origin()).await {
            Ok(()) => Ok(consensus),
            Err(e) => {
                consensus.close().await;
                Err(e)
            }
        }
    }

    async fn begin(&self, start: Start, origin: Origin) -> Result<(), ConsensusError> {
        let raft = &self.0.raft;
        match (start, raft.is_initialized().await.map_err(stopped)?) {
            (Start::Bootstrap, true) => return Err(ConsensusError::Initialised),
            (Start::Bootstrap | Start::Resume, false) if origin == Origin::Founder => {
                let node = MonitorNode { addr: self.0.addr.clone(), store: self.0.shared.identity.store() };
                match raft.initialize(BTreeMap::from([(self.id(), node)])).await {
                    Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                    Err(e) => return Err(stopped(e)),
                }
            }
            _ => {}
        }
        let id = self.id();
        let voters = raft.with_raft_state(|s| s.membership_state.effective().voter_ids().collect::<Vec<_>>());
        if voters.await.map_err(stopped)? != [id] {
            return Ok(());
        }
        raft.wait(Some(LEAD_TIMEOUT))
            .metrics(
                |m| {
                    let leads = m.current_leader == Some(id) && m.last_log_index.is_some();
                    leads && m.last_applied.map(|l| l.index) == m.last_log_index
                },
                "leads and has applied its log",
            )
            .await
            .map_err(stopped)?;
        let mut standing = self.0.standing.clone();
        standing.wait_for(|s| s.leads.is_some() && s.in_touch).await.map_err(stopped)?;
        // Also after a bootstrap that was cut off between the two steps.
        if let (Epoch(0), Some(cluster)) = (self.state().map.epoch, self.cluster()) {
            self.propose(Command::Bootstrap { cluster }).await?.map_err(stopped)?;
        }
        Ok(())
    }

    /// Has a command agreed on and carried out. The outer error means that nobody knows whether it will
    /// be; the inner one that the state refused it.
    pub async fn propose(&self, command: Command) -> Result<CommandResult, ConsensusError> {
        self.agree(None, None, command).await
    }

    /// The same for a request that may be made again: it is carried out once.
    pub async fn propose_for(
        &self,
        request: Option<RequestId>,
        command: Command,
    ) -> Result<CommandResult, ConsensusError> {
        self.agree(request.map(|r| r.0), None, command).await
    }

    /// The same for what was decided as the leader of `term`: it has no effect under another one.
    pub async fn propose_in(&self, term: u64, command: Command) -> Result<CommandResult, ConsensusError> {
        self.agree(None, Some(term), command).await
    }

    async fn agree(
        &self,
        request: Option<u128>,
        term: Option<u64>,
        command: Command,
    ) -> Result<CommandResult, ConsensusError> {
        if !self.0.standing.borrow().in_touch {
            // It could only wait in the log, with whatever else is asked for until a quorum returns.
            return Err(ConsensusError::NoQuorum(self.quorum_words()));
        }
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let stamped = Stamped { unix_ms, request, term, command };
        let encoded = postcard::to_stdvec(&stamped).map_err(stopped)?;
        if encoded.len() > COMMAND_BYTES_MAX {
            let (bytes, limit) = (encoded.len(), COMMAND_BYTES_MAX);
            return Ok(Err(Refusal::invalid(format!("a request has at most {limit} bytes, not {bytes}"))));
        }
        let (answer, answered) = oneshot::channel();
        let ended = || ConsensusError::Stopped("its task has ended".into());
        let agreed = async {
            let proposal = Proposal { stamped, encoded, answer };
            self.0.proposals.send(proposal).await.map_err(|_| ended())?;
            answered.await.map_err(|_| ended())?
        };
        match tokio::time::timeout(PROPOSE_TIMEOUT, agreed).await {
            Ok(result) => result,
            Err(_) => Err(ConsensusError::NoQuorum(self.quorum_words())),
        }
    }

    /// The newest state that this monitor has, and the way to hear of newer ones.
    pub fn watch(&self) -> watch::Receiver<Arc<MonitorState>> {
        self.0.published.watch()
    }

    /// The newest state that this monitor has.
    pub fn state(&self) -> Arc<MonitorState> {
        self.0.published.state()
    }

    /// The latest changes of the map.
    pub fn published(&self) -> &Arc<Published> {
        &self.0.published
    }

    /// This monitor's number.
    pub fn id(&self) -> u64 {
        self.0.shared.identity.id()
    }

    /// The cluster that it is part of, once it is.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.0.shared.identity.cluster()
    }

    /// What the other monitors call.
    pub(crate) fn peer_service(&self) -> MonitorPeerServiceServer<PeerService> {
        MonitorPeerServiceServer::new(PeerService::new(self.clone(), self.0.shared.clone()))
            .max_decoding_message_size(MONITOR_PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MONITOR_PEER_MESSAGE_BYTES_MAX)
    }

    fn raft(&self) -> &Raft<Types> {
        &self.0.raft
    }

    /// The cluster goes on without this monitor.
    fn be_dismissed(&self) -> io::Result<()> {
        self.0.shared.identity.dismiss()?;
        self.0.dismissed.send_replace(true);
        Ok(())
    }

    /// Ends when agreement has stopped, for instance because the disk failed, or goes on without this
    /// monitor.
    pub async fn stopped(&self) -> String {
        let mut metrics = self.0.raft.metrics();
        let mut dismissed = self.0.dismissed.subscribe();
        loop {
            if let Err(e) = &metrics.borrow_and_update().running_state {
                return format!("agreement has stopped: {e}");
            }
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() {
                    return "agreement has stopped: its task has ended".into();
                },
                _ = dismissed.wait_for(|d| *d) => return ConsensusError::Dismissed(self.id()).to_string(),
            }
        }
    }

    /// Stops taking part; what was answered is durable with or without it.
    pub async fn shutdown(&self) {
        if let Err(e) = self.0.raft.shutdown().await {
            tracing::warn!(error = %e, "agreement did not end cleanly");
        }
    }

    /// Stops, gives up everything and waits until the next one can open the directory.
    pub async fn close(self) {
        self.shutdown().await;
        let mut closed = self.0.closed.clone();
        drop(self);
        // openraft's workers end on their own; whoever opens the directory next needs the database's lock.
        let ended = async { while closed.changed().await.is_ok() {} };
        if tokio::time::timeout(CLOSE_TIMEOUT, ended).await.is_err() {
            tracing::warn!("the database is still open");
        }
    }
}

#[cfg(test)]
mod tests;
