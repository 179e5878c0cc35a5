//! What an object is, in 64 bits: which blocks are data, which zeros, and the data's checksums. Copies of one version have the
//! same one, however their extents are cut; for scrubs, which compare them without moving data.

use super::chunk_store::ChunkStore;
use super::device::Device;
use super::kv::Kv;
use super::layout::{self, ChunkRecord, ObjectRecord, bits, kind};
use super::{ObjectState, StoreError};
use gabion_proto::blocks::{Content, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::limits::BLOCKS_PER_CHUNK;

/// FNV-1a over the blocks in order (Fowler, Noll, Vo; parameters of 64 bits as in RFC 9923).
struct Digest(u64);

impl Digest {
    fn new() -> Digest {
        Digest(0xcbf2_9ce4_8422_2325)
    }

    /// `crc` of a block of data, `None` of zeros.
    fn block(&mut self, number: u32, crc: Option<u32>) {
        let head = number.to_le_bytes().into_iter().chain([u8::from(crc.is_some())]);
        for byte in head.chain(crc.unwrap_or(0).to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// Of a whole object as it was read.
pub fn digest_of(content: &Content) -> u64 {
    let mut digest = Digest::new();
    for e in &content.extents {
        match &e.kind {
            ExtentKind::Zero => {
                (e.first_block..e.first_block + e.block_count).for_each(|b| digest.block(b, None));
            }
            ExtentKind::Data { crcs } => {
                (e.first_block..).zip(crcs).for_each(|(b, crc)| digest.block(b, Some(*crc)));
            }
        }
    }
    digest.0
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// The committed version's digest from its records: no data is read.
    pub(super) fn recorded_digest(
        &mut self,
        pg: PgId,
        object: ObjectId,
    ) -> Result<(ObjectState, u64), StoreError> {
        let value = self.index.get(&layout::object_key(kind::OBJECT, pg, object))?;
        let value = value.ok_or(StoreError::NotFound { object })?;
        let record: ObjectRecord = layout::decode(value.record()?)?;
        let mut digest = Digest::new();
        self.index.each(&layout::object_key(kind::CHUNK, pg, object), |key, value| {
            let first = layout::parse_numbered(&key)?.2.saturating_mul(BLOCKS_PER_CHUNK);
            let chunk = ChunkRecord::decode(value.record()?)?;
            for bit in bits(chunk.zero | chunk.data) {
                let crc = (chunk.data & (1 << bit) != 0).then_some(chunk.crcs[bit as usize]);
                digest.block(first + bit, crc);
            }
            Ok(())
        })?;
        Ok((record.into(), digest.0))
    }
}
