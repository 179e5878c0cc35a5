//! The index of a full disk without the disk: records of objects whose data was never written, for measurements of start-up
//! and memory. The store opens and lists; what it reads is not what its checksums say.

use super::device::{Access, FileDevice};
use super::kv::{Batch, Kv};
use super::layout::{self, CHUNK_BLOCKS, ChunkRecord, ObjectRecord, kind};
use super::open::fatal;
use super::recover::format_parts;
use super::rocks::RocksKv;
use super::{Identity, PgMeta, StoreError};
use gabion_proto::ids::*;
use gabion_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, OBJECT_BYTES_DEFAULT};
use std::fs::{self, File};
use std::path::Path;

/// Records that the index takes at once, as from a checkpoint.
const BATCH: usize = 4096;
/// Objects of one group.
const GROUP_OBJECTS: u32 = 256;

/// Makes a store in `data_dir` with the records of `objects` objects of the default size, all of it data. Its `block` is as large
/// as its data would be, and has holes instead.
pub fn synthetic_index(data_dir: &Path, objects: u32, identity: Identity) -> Result<(), StoreError> {
    let chunks = OBJECT_BYTES_DEFAULT / CHUNK_BYTES;
    let journal = u64::from(layout::JOURNAL_BLOCKS_MAX) + CHUNK_BLOCKS;
    let size = u64::from(objects) * u64::from(OBJECT_BYTES_DEFAULT) + journal * u64::from(BLOCK_BYTES);
    fs::create_dir(data_dir).map_err(|e| fatal(data_dir, e))?;
    let (block, index) = (data_dir.join("block"), data_dir.join("index"));
    File::create(&block).and_then(|f| f.set_len(size)).map_err(|e| fatal(&block, e))?;
    let mut device = FileDevice::open(&block, Access::ReadWrite)?;
    let mut kv = RocksKv::open(&index, true).map_err(|e| fatal(&index, e))?;
    format_parts(&mut device, &mut kv, identity, (size, layout::JOURNAL_BLOCKS_MAX), 1)?;
    let (mut batch, mut slot, mut crc) = (Batch::new(), 0, 1u32);
    let mut write = |batch: &mut Batch| {
        kv.start(std::mem::take(batch));
        kv.finish().map_err(StoreError::Fatal)
    };
    for n in 0..objects {
        let pg = PgId { pool: PoolId(1), index: n / GROUP_OBJECTS };
        let object = ObjectId { volume: VolumeId(1), index: n, layer: LayerId(0) };
        if n % GROUP_OBJECTS == 0 {
            let meta = PgMeta { promised: Epoch(1), activated: Epoch(1), shard: None, pg_count: 0 };
            batch.push((layout::pg_key(kind::META, pg).to_vec(), Some(layout::encode(&meta)?)));
        }
        let record = ObjectRecord { version: Version::from_raw(1 << 32 | 1), deleted: false, pending: None };
        batch.push((layout::object_key(kind::OBJECT, pg, object).to_vec(), Some(layout::encode(&record)?)));
        for number in 0..chunks {
            let mut chunk = ChunkRecord { slot: Some(slot), data: u32::MAX, ..ChunkRecord::default() };
            slot += 1;
            for bit in 0..BLOCKS_PER_CHUNK {
                // Checksums do not compress; neither do these (a linear congruential sequence).
                crc = crc.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                chunk.crcs[bit as usize] = crc;
            }
            let key = layout::numbered_key(kind::CHUNK, pg, object, number);
            batch.push((key.to_vec(), Some(chunk.encode())));
        }
        if batch.len() >= BATCH {
            write(&mut batch)?;
        }
    }
    write(&mut batch)
}
