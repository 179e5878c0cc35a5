//! Agreement: openraft over RocksDB, behind [`Consensus`]. Nothing outside this module knows of it.
//!
//! Invariants: a proposal that was answered is durable (the log is synced before openraft hears that
//! it is written); the published state only ever moves forward. One monitor for now: the network
//! answers that no other can be reached.
//!
//! Failure: an error of the disk stops openraft; every proposal then fails with
//! [`ConsensusError::Stopped`], and the daemon exits.

mod log;
mod machine;
mod network;

pub use machine::Published;

use crate::state::{Command, CommandResult, MonitorState, Stamped};
use openraft::error::{InitializeError, RaftError};
use openraft::{BasicNode, Config, Raft};
use rocksdb::{ColumnFamilyDescriptor, DB, Options};
use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

openraft::declare_raft_types!(
    pub(crate) Types:
        D = Stamped,
        R = CommandResult,
        NodeId = u64,
        Node = BasicNode,
        Entry = openraft::Entry<Types>,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = openraft::TokioRuntime,
);

/// How long a monitor that starts waits until it leads.
const LEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a stop waits until the database is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Commands between two snapshots of the state.
const SNAPSHOT_EVERY: u64 = 2_000;

/// Why a proposal or a start failed. A refusal by the state is not an error here.
#[derive(Debug, thiserror::Error)]
pub enum ConsensusError {
    #[error("{0} holds no monitor: start with --bootstrap to make a new cluster")]
    NotInitialised(String),
    #[error("{0} holds a monitor already: start without --bootstrap")]
    Initialised(String),
    #[error("the monitor's database: {0}")]
    Database(#[from] rocksdb::Error),
    #[error("this monitor does not lead: {0}")]
    NotLeader(String),
    #[error("agreement has stopped: {0}")]
    Stopped(String),
}

/// The agreed state, and how to change it. Clones share it.
#[derive(Clone)]
pub struct Consensus {
    raft: Raft<Types>,
    published: Arc<Published>,
    closed: watch::Receiver<()>,
    id: u64,
}

impl std::fmt::Debug for Consensus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Consensus(monitor {})", self.id)
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
    options.set_keep_log_file_num(4);
    options.set_max_total_wal_size(64 << 20);
    let families = [log::FAMILY, machine::FAMILY].map(|f| ColumnFamilyDescriptor::new(f, Options::default()));
    let db = DB::open_cf_descriptors(&options, dir, families)?;
    Ok(Arc::new(Database { db, closed: watch::Sender::new(()) }))
}

impl Consensus {
    /// Starts the monitor whose data is in `dir`; with `bootstrap` as the first of a new cluster. Answers
    /// once it leads and has caught up with its own log.
    pub async fn open(dir: &Path, id: u64, addr: &str, bootstrap: bool) -> Result<Consensus, ConsensusError> {
        let db = open_db(&dir.join("raft"))?;
        let stopped = |e: &dyn std::fmt::Display| ConsensusError::Stopped(e.to_string());
        let machine = machine::Machine::open(db.clone()).map_err(|e| stopped(&e))?;
        let published = machine.published();
        let closed = db.closed.subscribe();
        let config = Config {
            cluster_name: "gabion".into(),
            heartbeat_interval: 250,
            election_timeout_min: 750,
            election_timeout_max: 1500,
            snapshot_policy: openraft::SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
            max_in_snapshot_log_to_keep: 500,
            ..Config::default()
        };
        let config = Arc::new(config.validate().map_err(|e| stopped(&e))?);
        let raft = Raft::new(id, config, network::NoPeers, log::Log::new(db), machine)
            .await
            .map_err(|e| stopped(&e))?;
        let initialised = raft.is_initialized().await.map_err(|e| stopped(&e))?;
        let consensus = Consensus { raft, published, closed, id };
        let shown = dir.display().to_string();
        match (bootstrap, initialised) {
            (false, false) => {
                consensus.shutdown().await;
                return Err(ConsensusError::NotInitialised(shown));
            }
            (true, true) => {
                consensus.shutdown().await;
                return Err(ConsensusError::Initialised(shown));
            }
            (true, false) => {
                let members = BTreeMap::from([(id, BasicNode::new(addr))]);
                match consensus.raft.initialize(members).await {
                    Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                    Err(e) => return Err(stopped(&e)),
                }
            }
            (false, true) => {}
        }
        consensus
            .raft
            .wait(Some(LEAD_TIMEOUT))
            .metrics(
                |m| {
                    m.current_leader == Some(id)
                        && m.last_log_index.is_some()
                        && m.last_applied.map(|l| l.index) == m.last_log_index
                },
                "leads and has applied its log",
            )
            .await
            .map_err(|e| ConsensusError::NotLeader(e.to_string()))?;
        Ok(consensus)
    }

    /// Has a command agreed on and carried out. The outer error means that nobody knows whether it will
    /// be; the inner one that the state refused it.
    pub async fn propose(&self, command: Command) -> Result<CommandResult, ConsensusError> {
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        match self.raft.client_write(Stamped { unix_ms, command }).await {
            Ok(done) => Ok(done.data),
            Err(RaftError::APIError(e)) => Err(ConsensusError::NotLeader(e.to_string())),
            Err(RaftError::Fatal(e)) => Err(ConsensusError::Stopped(e.to_string())),
        }
    }

    /// The newest state and the way to hear of newer ones.
    pub fn watch(&self) -> watch::Receiver<Arc<MonitorState>> {
        self.published.watch()
    }

    /// The newest state.
    pub fn state(&self) -> Arc<MonitorState> {
        self.published.state()
    }

    /// The latest changes of the map.
    pub fn published(&self) -> &Arc<Published> {
        &self.published
    }

    /// This monitor's number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Ends when agreement has stopped, for instance because the disk failed.
    pub async fn stopped(&self) -> String {
        let mut metrics = self.raft.metrics();
        loop {
            if let Err(e) = &metrics.borrow_and_update().running_state {
                return e.to_string();
            }
            if metrics.changed().await.is_err() {
                return "its task has ended".into();
            }
        }
    }

    /// Stops taking part; what was answered is durable with or without it.
    pub async fn shutdown(&self) {
        if let Err(e) = self.raft.shutdown().await {
            tracing::warn!(error = %e, "agreement did not end cleanly");
        }
        // openraft's workers end on their own; whoever opens the directory next needs the database's lock.
        let mut closed = self.closed.clone();
        let ended = async { while closed.changed().await.is_ok() {} };
        if tokio::time::timeout(CLOSE_TIMEOUT, ended).await.is_err() {
            tracing::warn!("the database is still open");
        }
    }
}

#[cfg(test)]
mod tests;
