//! The state machine: [`MonitorState`] in memory, its snapshots in RocksDB, and its newest version
//! published to the rest of the daemon.
//!
//! On start the last snapshot is loaded and openraft applies the log after it again.

use super::log::{family, other, synced};
use super::{Database, MonitorNode, Types};
use crate::state::{CommandResult, MonitorState, Reply};
use gabion_proto::ids::Epoch;
use gabion_proto::map::MapIncrement;
use openraft::storage::RaftStateMachine;
use openraft::{
    Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError,
    StorageIOError, StoredMembership,
};
use parking_lot::Mutex;
use rocksdb::DB;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::{self, Cursor};
use std::sync::Arc;
use tokio::sync::watch;

/// Column family of the snapshot.
pub(super) const FAMILY: &str = "machine";
const SNAPSHOT: &[u8] = b"snapshot";
/// Changes of the map that are kept for those who follow it, and the records in them.
const INCREMENTS_MAX: usize = 500;
const INCREMENT_RECORDS_MAX: usize = 100_000;

type Failure = StorageError<u64>;

/// The newest state, and the last changes of its map.
#[derive(Debug)]
pub struct Published {
    state: watch::Sender<Arc<MonitorState>>,
    increments: Mutex<Increments>,
}

#[derive(Debug, Default)]
struct Increments {
    kept: VecDeque<Arc<MapIncrement>>,
    records: usize,
}

impl Increments {
    fn push(&mut self, increment: MapIncrement) {
        self.records += increment.pgs.len();
        self.kept.push_back(Arc::new(increment));
        // The newest one always stays, or nobody could follow at all.
        while self.kept.len() > INCREMENTS_MAX
            || (self.records > INCREMENT_RECORDS_MAX && self.kept.len() > 1)
        {
            self.records -= self.kept.pop_front().map_or(0, |oldest| oldest.pgs.len());
        }
    }
}

impl Published {
    fn new(state: MonitorState) -> Published {
        Published { state: watch::Sender::new(Arc::new(state)), increments: Mutex::default() }
    }

    pub fn watch(&self) -> watch::Receiver<Arc<MonitorState>> {
        self.state.subscribe()
    }

    pub fn state(&self) -> Arc<MonitorState> {
        self.state.borrow().clone()
    }

    /// What leads from `have` to the newest map; `None` if that is too long ago.
    pub fn since(&self, have: Epoch) -> Option<Vec<Arc<MapIncrement>>> {
        let increments = &self.increments.lock().kept;
        if increments.back().is_none_or(|i| i.to == have) {
            return (self.state.borrow().map.epoch == have).then(Vec::new);
        }
        let at = increments.iter().position(|i| i.from == have)?;
        Some(increments.iter().skip(at).cloned().collect())
    }

    fn publish(&self, new: Arc<MonitorState>, changed: Option<MapIncrement>) {
        let mut increments = self.increments.lock();
        if let Some(increment) = changed {
            increments.push(increment);
        }
        self.state.send_replace(new);
    }

    fn replace(&self, new: Arc<MonitorState>) {
        *self.increments.lock() = Increments::default();
        self.state.send_replace(new);
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    meta: SnapshotMeta<u64, MonitorNode>,
    data: Vec<u8>,
}

pub(crate) struct Machine {
    db: Arc<Database>,
    state: Arc<MonitorState>,
    last_applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, MonitorNode>,
    published: Arc<Published>,
    kept: Arc<Kept>,
}

/// Where snapshots are kept. Builders run beside the machine: one that began before a snapshot came from the leader may end after it.
struct Kept {
    db: Arc<Database>,
    /// The last entry in the one there is.
    last: Mutex<Option<LogId<u64>>>,
}

impl Kept {
    /// Keeps a snapshot, unless there is a newer one: the log before that may be gone.
    fn store(&self, stored: &Stored) -> io::Result<()> {
        let mut last = self.last.lock();
        if stored.meta.last_log_id < *last {
            return Ok(());
        }
        let bytes = postcard::to_stdvec(stored).map_err(other)?;
        self.db.put_cf_opt(family(&self.db, FAMILY)?, SNAPSHOT, bytes, &synced()).map_err(other)?;
        *last = stored.meta.last_log_id;
        Ok(())
    }
}

fn load(db: &DB) -> io::Result<Option<Stored>> {
    match db.get_cf(family(db, FAMILY)?, SNAPSHOT).map_err(other)? {
        None => Ok(None),
        Some(bytes) => postcard::from_bytes(&bytes).map(Some).map_err(other),
    }
}

fn writing(e: io::Error) -> Failure {
    StorageIOError::write_snapshot(None, &e).into()
}

fn reading(e: io::Error) -> Failure {
    StorageIOError::read_snapshot(None, &e).into()
}

impl Machine {
    pub(crate) fn open(db: Arc<Database>) -> io::Result<Machine> {
        let (mut state, mut last_applied, mut membership) =
            (MonitorState::default(), None, Default::default());
        if let Some(stored) = load(&db)? {
            state = postcard::from_bytes(&stored.data).map_err(other)?;
            last_applied = stored.meta.last_log_id;
            membership = stored.meta.last_membership;
        }
        let published = Arc::new(Published::new(state.clone()));
        let kept = Arc::new(Kept { db: db.clone(), last: Mutex::new(last_applied) });
        Ok(Machine { db, state: Arc::new(state), last_applied, membership, published, kept })
    }

    pub(super) fn published(&self) -> Arc<Published> {
        self.published.clone()
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotBuilder = Builder;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, MonitorNode>), Failure> {
        Ok((self.last_applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<CommandResult>, Failure>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut answers = Vec::new();
        // While somebody holds the old state, the first change copies it; so once for all that is carried out here.
        let old = self.state.clone();
        for entry in entries {
            self.last_applied = Some(entry.log_id);
            answers.push(match entry.payload {
                EntryPayload::Blank => Ok(Reply::Done),
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Ok(Reply::Done)
                }
                EntryPayload::Normal(stamped) => {
                    let term = entry.log_id.leader_id.term;
                    Arc::make_mut(&mut self.state).apply_agreed(term, stamped)
                }
            });
        }
        let changed = old.map.epoch != self.state.map.epoch;
        let increment = changed.then(|| MapIncrement::between(&old.map, &self.state.map));
        self.published.publish(self.state.clone(), increment);
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            kept: self.kept.clone(),
            state: self.state.clone(),
            last_applied: self.last_applied,
            membership: self.membership.clone(),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, Failure> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, MonitorNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), Failure> {
        let stored = Stored { meta: meta.clone(), data: snapshot.into_inner() };
        let state: MonitorState = postcard::from_bytes(&stored.data).map_err(|e| reading(other(e)))?;
        self.kept.store(&stored).map_err(writing)?;
        self.state = Arc::new(state);
        self.last_applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.published.replace(self.state.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, Failure> {
        let stored = load(&self.db).map_err(reading)?;
        Ok(stored.map(|s| Snapshot { meta: s.meta, snapshot: Box::new(Cursor::new(s.data)) }))
    }
}

pub(crate) struct Builder {
    kept: Arc<Kept>,
    state: Arc<MonitorState>,
    last_applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, MonitorNode>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, Failure> {
        let data = postcard::to_stdvec(&*self.state).map_err(|e| writing(other(e)))?;
        let snapshot_id = self.last_applied.map_or("0".into(), |l| format!("{}-{}", l.leader_id, l.index));
        let meta = SnapshotMeta {
            last_log_id: self.last_applied,
            last_membership: self.membership.clone(),
            snapshot_id,
        };
        let stored = Stored { meta, data };
        self.kept.store(&stored).map_err(writing)?;
        Ok(Snapshot { meta: stored.meta, snapshot: Box::new(Cursor::new(stored.data)) })
    }
}
