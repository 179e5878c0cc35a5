//! [`Kv`] on RocksDB. Nothing else in the product calls RocksDB.
//!
//! Memory is bounded: 16 MiB of block cache (filters and indexes included) and two 16 MiB write buffers.

use super::kv::{Batch, Kv, Pair};
use rocksdb::{BlockBasedOptions, Cache, DB, Direction, IteratorMode, Options, WriteBatch, WriteOptions};
use std::path::Path;

const BLOCK_CACHE_BYTES: usize = 16 << 20;
const WRITE_BUFFER_BYTES: usize = 16 << 20;
const WRITE_BUFFERS: i32 = 2;
const OPEN_FILES_MAX: i32 = 256;
const LOG_FILES_MAX: usize = 2;
const BLOOM_BITS_PER_KEY: f64 = 10.0;

/// An open RocksDB database.
pub struct RocksKv {
    db: DB,
}

impl RocksKv {
    /// Opens the database in `dir`, or makes a new one with `create`.
    pub fn open(dir: &Path, create: bool) -> Result<RocksKv, String> {
        let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES).map_err(|e| e.to_string())?;
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&cache);
        table.set_cache_index_and_filter_blocks(true);
        table.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
        let mut options = Options::default();
        options.create_if_missing(create);
        options.set_block_based_table_factory(&table);
        options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        options.set_max_write_buffer_number(WRITE_BUFFERS);
        options.set_max_open_files(OPEN_FILES_MAX);
        options.set_keep_log_file_num(LOG_FILES_MAX);
        let db = DB::open(&options, dir).map_err(|e| e.to_string())?;
        Ok(RocksKv { db })
    }
}

impl Kv for RocksKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, String> {
        self.db.get(key).map_err(|e| e.to_string())
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Pair>, String> {
        let start = prefix.max(from);
        let mut out = Vec::new();
        for pair in self.db.iterator(IteratorMode::From(start, Direction::Forward)).take(limit) {
            let (key, value) = pair.map_err(|e| e.to_string())?;
            if !key.starts_with(prefix) {
                break;
            }
            out.push((key.into_vec(), value.into_vec()));
        }
        Ok(out)
    }

    fn write(&mut self, batch: Batch, sync: bool) -> Result<(), String> {
        let mut changes = WriteBatch::default();
        for (key, value) in batch {
            match value {
                Some(value) => changes.put(key, value),
                None => changes.delete(key),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db.write_opt(changes, &options).map_err(|e| e.to_string())
    }
}
