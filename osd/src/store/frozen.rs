//! A stopped store, opened without changing a byte of it: what its journal holds lies in memory over the index.

use super::chunk_store::ChunkStore;
use super::device::{Access, Device, FileDevice};
use super::kv::Kv;
use super::layout::{self, kind};
use super::open::{LockedDevice, fatal, lock_existing};
use super::rocks::RocksKv;
use super::view::Index;
use super::{Identity, PgMeta, Store, StoreError};
use gabion_proto::ids::*;
use std::path::Path;

/// See the module docs.
pub struct Frozen<D: Device, K: Kv>(pub(super) ChunkStore<D, K>);

/// Of a data directory, whose lock it holds.
pub type DirFrozen = Frozen<LockedDevice, RocksKv>;

impl<D: Device, K: Kv> Frozen<D, K> {
    /// Refuses what the daemon would refuse to open.
    pub(super) fn open(device: D, kv: K) -> Result<Frozen<D, K>, StoreError> {
        ChunkStore::open_frozen(device, kv, Err).map(|(store, _)| Frozen(store))
    }

    pub fn identity(&self) -> Identity {
        self.0.superblock.identity
    }

    /// The groups with their metadata.
    pub fn groups(&mut self) -> Result<Vec<(PgId, PgMeta)>, StoreError> {
        self.0.pgs()
    }
}

/// Device and index of a data directory, for reading.
pub(super) fn parts(data_dir: &Path) -> Result<(LockedDevice, RocksKv), StoreError> {
    let lock = lock_existing(data_dir)?;
    let device = FileDevice::open(&data_dir.join("block"), Access::Read)?;
    let index = data_dir.join("index");
    let kv = RocksKv::open_read_only(&index).map_err(|e| fatal(&index, e))?;
    Ok((LockedDevice::new(Box::new(device), lock), kv))
}

/// The same where the daemon would refuse, for those who only want to look; and why it would.
pub fn open_damaged(data_dir: &Path) -> Result<(DirFrozen, Vec<StoreError>), StoreError> {
    let (device, kv) = parts(data_dir)?;
    let mut refused = Vec::new();
    let (store, _) = ChunkStore::open_frozen(device, kv, |why| {
        refused.push(why);
        Ok(())
    })?;
    Ok((Frozen(store), refused))
}

/// Opens the stopped store in `data_dir` for reading.
pub fn open_frozen(data_dir: &Path) -> Result<DirFrozen, StoreError> {
    let (device, kv) = parts(data_dir)?;
    Frozen::open(device, kv)
}

/// Every group that has a record of this kind, in order.
pub(super) fn groups_with<K: Kv>(index: &Index<K>, kind: u8) -> Result<Vec<PgId>, StoreError> {
    let (mut out, mut from) = (Vec::new(), vec![kind]);
    while let Some((key, _)) = index.scan(&[kind], &from, 1)?.into_iter().next() {
        from = key.to_vec();
        match layout::parse_key(&key) {
            Ok(parsed) => {
                out.push(parsed.pg);
                from.truncate(layout::PG_KEY_BYTES);
                from.extend([u8::MAX; layout::KEY_BYTES_MAX]);
            }
            // Named by fsck.
            Err(_) => from.push(0),
        }
    }
    Ok(out)
}

/// Kinds of records that belong to a group, without its metadata.
pub(super) const GROUP_KINDS: [u8; 5] =
    [kind::OBJECT, kind::MISSING, kind::CHUNK, kind::PENDING, kind::PENDING_CHUNK];
