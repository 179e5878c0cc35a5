//! [`Kv`] on RocksDB. Nothing else in the product calls RocksDB.
//!
//! Its own log is off: the store's journal keeps what a batch holds until the batch is in a table file. A thread of its
//! own writes and flushes. Memory is bounded: 16 MiB of block cache (filters and indexes included) and two 16 MiB write
//! buffers.

use super::kv::{Batch, Kv, Pair};
use super::wake::Waker;
use parking_lot::Mutex;
use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, Direction, FlushOptions, IteratorMode, LogLevel,
    Options, ReadOptions, WriteBatch, WriteOptions,
};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

const BLOCK_CACHE_BYTES: usize = 16 << 20;
const WRITE_BUFFER_BYTES: usize = 16 << 20;
const WRITE_BUFFERS: i32 = 2;
const OPEN_FILES_MAX: i32 = 256;
/// RocksDB's notes for people. Of each flush it would make some kilobytes.
const LOG_FILES_MAX: usize = 2;
const LOG_FILE_BYTES_MAX: usize = 1 << 20;
/// The list of its tables begins anew when it is larger.
const MANIFEST_BYTES_MAX: usize = 4 << 20;
const SWEEP_BYTES: usize = 1 << 20;
const BLOOM_BITS_PER_KEY: f64 = 10.0;
/// Every batch makes one small table: merging them late costs reads little and saves writes.
const TABLES_BEFORE_COMPACTION: i32 = 8;

/// An open RocksDB database.
pub struct RocksKv {
    db: Arc<DB>,
    /// Taken when dropped, which ends the thread.
    batches: Option<Sender<Batch>>,
    results: Receiver<Result<(), String>>,
    waker: Arc<Mutex<Option<Waker>>>,
    thread: Option<JoinHandle<()>>,
}

fn options() -> Result<Options, String> {
    let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES).map_err(|e| e.to_string())?;
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&cache);
    table.set_cache_index_and_filter_blocks(true);
    table.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_write_buffer_number(WRITE_BUFFERS);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_log_level(LogLevel::Warn);
    options.set_keep_log_file_num(LOG_FILES_MAX);
    options.set_max_log_file_size(LOG_FILE_BYTES_MAX);
    options.set_max_manifest_file_size(MANIFEST_BYTES_MAX);
    options.set_level_zero_file_num_compaction_trigger(TABLES_BEFORE_COMPACTION);
    // Checksums do not compress.
    options.set_compression_type(DBCompressionType::None);
    Ok(options)
}

impl RocksKv {
    /// Opens the database in `dir` without changing a file there; every batch is refused.
    pub fn open_read_only(dir: &Path) -> Result<RocksKv, String> {
        // What is left of a log is of no account: the store never writes one.
        let db = DB::open_for_read_only(&options()?, dir, false).map_err(|e| e.to_string())?;
        let waker = Arc::new(Mutex::new(None));
        Ok(RocksKv { db: Arc::new(db), batches: None, results: channel().1, waker, thread: None })
    }

    /// Opens the database in `dir`, or makes a new one with `create`.
    pub fn open(dir: &Path, create: bool) -> Result<RocksKv, String> {
        let mut options = options()?;
        options.create_if_missing(create);
        let db = Arc::new(DB::open(&options, dir).map_err(|e| e.to_string())?);
        let (batches, incoming) = channel::<Batch>();
        let (outgoing, results) = channel();
        let waker = Arc::new(Mutex::new(None::<Waker>));
        let (writer, wake) = (db.clone(), waker.clone());
        let thread = std::thread::Builder::new()
            .name("index".into())
            .spawn(move || {
                for batch in incoming {
                    if outgoing.send(write(&writer, batch)).is_err() {
                        return;
                    }
                    if let Some(waker) = &*wake.lock() {
                        waker.wake();
                    }
                }
            })
            .map_err(|e| e.to_string())?;
        Ok(RocksKv { db, batches: Some(batches), results, waker, thread: Some(thread) })
    }
}

fn write(db: &DB, batch: Batch) -> Result<(), String> {
    let mut changes = WriteBatch::default();
    for (key, value) in batch {
        match value {
            Some(value) => changes.put(key, value),
            None => changes.delete(key),
        }
    }
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    db.write_opt(changes, &options).map_err(|e| e.to_string())?;
    let mut flush = FlushOptions::default();
    flush.set_wait(true);
    db.flush_opt(&flush).map_err(|e| e.to_string())
}

const GONE: &str = "nobody writes the index: its thread is gone, or it is open for reading only";

impl Kv for RocksKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, String> {
        self.db.get(key).map_err(|e| e.to_string())
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Pair>, String> {
        let start = prefix.max(from);
        let mut out = Vec::new();
        let mut options = ReadOptions::default();
        // Or it would step over everything that was deleted behind the prefix.
        if let Some(end) = after_prefix(prefix) {
            options.set_iterate_upper_bound(end);
        }
        let pairs = self.db.iterator_opt(IteratorMode::From(start, Direction::Forward), options);
        for pair in pairs.take(limit) {
            let (key, value) = pair.map_err(|e| e.to_string())?;
            if !key.starts_with(prefix) {
                break;
            }
            out.push((key.into_vec(), value.into_vec()));
        }
        Ok(out)
    }

    fn sweep(&self, prefix: &[u8], each: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), String> {
        let mut options = ReadOptions::default();
        if let Some(end) = after_prefix(prefix) {
            options.set_iterate_upper_bound(end);
        }
        // Once, in large pieces, and not in place of what is wanted again.
        options.fill_cache(false);
        options.set_readahead_size(SWEEP_BYTES);
        let mut at = self.db.raw_iterator_opt(options);
        at.seek(prefix);
        while let (Some(key), Some(value)) = (at.key(), at.value()) {
            if !key.starts_with(prefix) || !each(key, value) {
                break;
            }
            at.next();
        }
        at.status().map_err(|e| e.to_string())
    }

    fn start(&mut self, batch: Batch) {
        // A thread that is gone shows in the result.
        let _ = self.batches.as_ref().map(|batches| batches.send(batch));
    }

    fn poll(&mut self) -> Option<Result<(), String>> {
        match self.results.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(GONE.into())),
        }
    }

    fn finish(&mut self) -> Result<(), String> {
        self.results.recv().unwrap_or_else(|_| Err(GONE.into()))
    }

    fn set_waker(&mut self, waker: Waker) {
        *self.waker.lock() = Some(waker);
    }
}

impl Drop for RocksKv {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The first key behind everything that starts with `prefix`; `None` when there is none.
fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|b| *b != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the files in `dir` whose name begins so.
    fn bytes_of(dir: &Path, name: &str) -> u64 {
        let files = std::fs::read_dir(dir).expect("lists").map(|f| f.expect("lists"));
        let named = files.filter(|f| f.file_name().to_string_lossy().starts_with(name));
        named.map(|f| f.metadata().expect("a file").len()).sum()
    }

    /// A checkpoint of the store is one batch and one flush, for years.
    #[test]
    fn notes_of_many_batches_take_little_space() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut kv = RocksKv::open(dir.path(), true).expect("opens");
        let mut write = |n: u32| {
            kv.start(vec![(n.to_be_bytes().to_vec(), Some(vec![7; 40]))]);
            kv.finish().expect("writes");
        };
        write(0);
        let before = bytes_of(dir.path(), "LOG");
        (1..300).for_each(&mut write);
        let after = bytes_of(dir.path(), "LOG");
        assert!(before > 0 && after < before + 10_000, "{before} bytes became {after}");
    }
}
