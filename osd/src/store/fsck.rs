//! The offline check: what refers to what, and with `deep` every block against its checksum.

use super::chunk_store::ChunkStore;
use super::device::Device;
use super::kv::Kv;
use super::layout::{self, ChunkRecord, ObjectRecord, PendingBlock, kind};
use super::open::FsckReport;
use super::stage::scan_pages;
use super::{Needed, StoreError};
use gabion_proto::limits::BLOCKS_PER_CHUNK;

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Slots used twice or beyond the device are already found by opening.
    pub(super) fn check(&mut self, deep: bool, report: &mut FsckReport) -> Result<(), StoreError> {
        let mut objects = Vec::new();
        for k in [kind::OBJECT, kind::CHUNK, kind::OVERLAY, kind::PENDING, kind::MISSING] {
            scan_pages(&self.kv, &[k], |key, value| {
                let parsed = layout::parse_key(&key);
                let Ok(layout::Parsed { pg, object: Some(object), number }) = parsed else {
                    report.problem("malformed key in the index".into());
                    return Ok(());
                };
                let owner = || -> Result<Option<ObjectRecord>, StoreError> {
                    let value = self.kv.get(&layout::object_key(kind::OBJECT, pg, object));
                    value.map_err(StoreError::Fatal)?.map(|v| layout::decode(&v)).transpose()
                };
                let ok = match k {
                    kind::OBJECT => {
                        if deep {
                            objects.push((pg, object));
                        }
                        layout::decode::<ObjectRecord>(&value).is_ok()
                    }
                    kind::CHUNK => owner()?.is_some_and(|r| !r.deleted),
                    kind::OVERLAY => {
                        let block = number.unwrap_or(0);
                        let chunk = layout::numbered_key(kind::CHUNK, pg, object, block / BLOCKS_PER_CHUNK);
                        let chunk = self.kv.get(&chunk).map_err(StoreError::Fatal)?;
                        let chunk = chunk.map(|v| ChunkRecord::decode(&v)).transpose()?;
                        chunk.is_some_and(|c| c.overlay & (1 << (block % BLOCKS_PER_CHUNK)) != 0)
                    }
                    kind::PENDING => match layout::decode(&value) {
                        Ok(PendingBlock::Data { crc, bytes }) if crc32fast::hash(&bytes) != crc => false,
                        Ok(_) => owner()?.is_some_and(|r| r.pending.is_some()),
                        Err(_) => false,
                    },
                    _ => layout::decode::<Needed>(&value).is_ok(),
                };
                if !ok {
                    let k = char::from(k);
                    report.problem(format!(
                        "object {object} of group {pg}: bad or orphaned record {k}{number:?}"
                    ));
                }
                Ok(())
            })?;
        }
        for (pg, object) in objects {
            match self.whole_object(pg, object) {
                Ok(content) => report.blocks_read += u64::from(content.block_count()),
                Err(StoreError::Fatal(why)) => return Err(StoreError::Fatal(why)),
                Err(e) => report.problem(format!("group {pg}: {e}")),
            }
        }
        Ok(())
    }
}
