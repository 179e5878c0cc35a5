//! openraft's log, vote and commit mark in RocksDB.
//!
//! Invariant: entries and votes are synced to the disk before they are reported as written. Keys of
//! entries are their index, big endian.

use super::{Database, Types};
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{Entry, LogId, LogState, OptionalSend, RaftLogReader, StorageError, StorageIOError, Vote};
use rocksdb::{ColumnFamily, DB, Direction, IteratorMode, WriteBatch, WriteOptions};
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

/// Column family of entries.
pub(super) const FAMILY: &str = "log";

const VOTE: &[u8] = b"vote";
const COMMITTED: &[u8] = b"committed";
const PURGED: &[u8] = b"purged";

type Failure = StorageError<u64>;

#[derive(Clone)]
pub(crate) struct Log {
    db: Arc<Database>,
}

pub(super) fn other(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(e.to_string())
}

pub(super) fn family<'a>(db: &'a DB, name: &str) -> io::Result<&'a ColumnFamily> {
    db.cf_handle(name).ok_or_else(|| other(format!("column family {name} is missing")))
}

pub(super) fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

fn reading(e: io::Error) -> Failure {
    StorageIOError::read_logs(&e).into()
}

fn writing(e: io::Error) -> Failure {
    StorageIOError::write_logs(&e).into()
}

fn index_of(key: &[u8]) -> io::Result<u64> {
    Ok(u64::from_be_bytes(key.try_into().map_err(|_| other("a log key is not 8 bytes"))?))
}

impl Log {
    pub(crate) fn new(db: Arc<Database>) -> Log {
        Log { db }
    }

    fn get<T: DeserializeOwned>(&self, key: &[u8]) -> io::Result<Option<T>> {
        match self.db.get(key).map_err(other)? {
            None => Ok(None),
            Some(bytes) => postcard::from_bytes(&bytes).map(Some).map_err(other),
        }
    }

    fn put<T: Serialize>(&self, key: &[u8], value: &T, options: &WriteOptions) -> io::Result<()> {
        let bytes = postcard::to_stdvec(value).map_err(other)?;
        self.db.put_opt(key, bytes, options).map_err(other)
    }

    fn entries(&self, from: u64, until: Option<u64>) -> io::Result<Vec<Entry<Types>>> {
        let start = from.to_be_bytes();
        let mode = IteratorMode::From(&start, Direction::Forward);
        let mut out = Vec::new();
        for item in self.db.iterator_cf(family(&self.db, FAMILY)?, mode) {
            let (key, value) = item.map_err(other)?;
            if until.is_some_and(|u| index_of(&key).map_or(true, |i| i >= u)) {
                break;
            }
            out.push(postcard::from_bytes(&value).map_err(other)?);
        }
        Ok(out)
    }

    fn last(&self) -> io::Result<Option<LogId<u64>>> {
        match self.db.iterator_cf(family(&self.db, FAMILY)?, IteratorMode::End).next() {
            None => Ok(None),
            Some(item) => {
                let (_, value) = item.map_err(other)?;
                let entry: Entry<Types> = postcard::from_bytes(&value).map_err(other)?;
                Ok(Some(entry.log_id))
            }
        }
    }

    fn write(&self, entries: impl IntoIterator<Item = Entry<Types>>) -> io::Result<()> {
        let mut batch = WriteBatch::default();
        let log = family(&self.db, FAMILY)?;
        for entry in entries {
            let bytes = postcard::to_stdvec(&entry).map_err(other)?;
            batch.put_cf(log, entry.log_id.index.to_be_bytes(), bytes);
        }
        self.db.write_opt(batch, &synced()).map_err(other)
    }

    /// Removes entries `from..until`, and with `purged` remembers up to where.
    fn remove(&self, from: u64, until: u64, purged: Option<LogId<u64>>) -> io::Result<()> {
        let mut batch = WriteBatch::default();
        batch.delete_range_cf(family(&self.db, FAMILY)?, from.to_be_bytes(), until.to_be_bytes());
        if let Some(purged) = purged {
            batch.put(PURGED, postcard::to_stdvec(&purged).map_err(other)?);
        }
        self.db.write_opt(batch, &synced()).map_err(other)
    }
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<Types>>, Failure> {
        let from = match range.start_bound() {
            Bound::Included(i) => *i,
            Bound::Excluded(i) => i.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let until = match range.end_bound() {
            Bound::Included(i) => i.checked_add(1),
            Bound::Excluded(i) => Some(*i),
            Bound::Unbounded => None,
        };
        self.entries(from, until).map_err(reading)
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Log;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, Failure> {
        let last_purged_log_id: Option<LogId<u64>> = self.get(PURGED).map_err(reading)?;
        let last_log_id = self.last().map_err(reading)?.or(last_purged_log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Log {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), Failure> {
        self.put(VOTE, vote, &synced()).map_err(|e| StorageIOError::write_vote(&e).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, Failure> {
        self.get(VOTE).map_err(|e| StorageIOError::read_vote(&e).into())
    }

    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<(), Failure> {
        // A hint for a quicker start; a stale one is harmless, so it is not synced.
        self.put(COMMITTED, &committed, &WriteOptions::default()).map_err(writing)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>, Failure> {
        Ok(self.get::<Option<LogId<u64>>>(COMMITTED).map_err(reading)?.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<(), Failure>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let written = self.write(entries);
        let failure = written.as_ref().err().map(|e| writing(other(e)));
        callback.log_io_completed(written);
        failure.map_or(Ok(()), Err)
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<(), Failure> {
        self.remove(log_id.index, u64::MAX, None).map_err(writing)
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<(), Failure> {
        self.remove(0, log_id.index + 1, Some(log_id)).map_err(writing)
    }
}
