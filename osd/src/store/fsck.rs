//! The offline check: what refers to what, and with `deep` every block against its checksum.

use super::chunk_store::ChunkStore;
use super::device::Device;
use super::kv::Kv;
use super::layout::{self, ChunkRecord, ObjectRecord, kind};
use super::open::FsckReport;
use super::{Needed, Store, StoreError};

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Slots used twice or beyond the device, and a journal that does not hold what was acknowledged, are
    /// already found by opening.
    pub(super) fn check(&mut self, deep: bool, report: &mut FsckReport) -> Result<(), StoreError> {
        let mut objects = Vec::new();
        for k in [kind::OBJECT, kind::CHUNK, kind::PENDING, kind::PENDING_CHUNK, kind::MISSING] {
            self.index.each(&[k], |key, value| {
                let parsed = layout::parse_key(&key);
                let Ok(layout::Parsed { pg, object: Some(object), number }) = parsed else {
                    report.problem("malformed key in the index".into());
                    return Ok(());
                };
                let value = value.record()?;
                let owner = || -> Option<ObjectRecord> {
                    let key = layout::object_key(kind::OBJECT, pg, object);
                    match self.index.in_memory(&key) {
                        Some(value) => layout::decode(value.as_ref()?.record().ok()?).ok(),
                        None => layout::decode(&self.index.kv.get(&key).ok()??).ok(),
                    }
                };
                let ok = match k {
                    kind::OBJECT => {
                        objects.push((pg, object));
                        layout::decode::<ObjectRecord>(value).is_ok()
                    }
                    // A pending version takes the slots that its commit will need.
                    kind::CHUNK => owner().is_some_and(|r| !r.deleted || r.pending.is_some()),
                    kind::PENDING => {
                        let crc_holds = match layout::parse_pending(value) {
                            Ok(Some((crc, data))) => crc32fast::hash(data) == crc,
                            Ok(None) => true,
                            Err(_) => false,
                        };
                        crc_holds && owner().is_some_and(|r| r.pending.is_some())
                    }
                    kind::PENDING_CHUNK => {
                        ChunkRecord::decode(value).is_ok_and(|c| c.data != 0)
                            && owner().is_some_and(|r| r.pending.is_some())
                    }
                    _ => layout::decode::<Needed>(value).is_ok(),
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
        for (pg, object) in objects.into_iter().filter(|_| deep) {
            match self.read_object(pg, object) {
                Ok((_, content)) => report.blocks_read += u64::from(content.block_count()),
                Err(StoreError::Fatal(why)) => return Err(StoreError::Fatal(why)),
                Err(e) => report.problem(format!("group {pg}: {e}")),
            }
        }
        Ok(())
    }
}
