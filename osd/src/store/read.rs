//! Reads: layers resolved per block, overlay before slot, every checksum verified.

use super::StoreError;
use super::chunk_store::ChunkStore;
use super::commit::bits;
use super::device::Device;
use super::kv::Kv;
use super::layout::{self, BLOCK, ChunkRecord, OBJECT_BLOCKS_MAX, kind};
use super::stage::scan_pages;
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::limits::*;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Absent,
    Zero,
    Data(u32),
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// The object's own layer, all of it.
    pub(super) fn whole_object(&mut self, pg: PgId, object: ObjectId) -> Result<Content, StoreError> {
        let mut end = 0;
        scan_pages(&self.kv, &layout::object_key(kind::CHUNK, pg, object), |key, _| {
            let number = layout::parse_key(&key)?.number.unwrap_or(0);
            end = (number + 1).saturating_mul(BLOCKS_PER_CHUNK).min(OBJECT_BLOCKS_MAX);
            Ok(())
        })?;
        self.resolve(pg, object, &[], 0, end)
    }

    pub(super) fn resolve(
        &mut self,
        pg: PgId,
        object: ObjectId,
        below: &[LayerId],
        first: u32,
        count: u32,
    ) -> Result<Content, StoreError> {
        let end = first.checked_add(count).filter(|&end| end <= OBJECT_BLOCKS_MAX);
        let end = end.ok_or_else(|| StoreError::Invalid("the range is beyond the object".into()))?;
        if below.len() > LAYERS_MAX {
            return Err(StoreError::Invalid(format!("more than {LAYERS_MAX} layers")));
        }
        let mut found = vec![Found::Absent; count as usize];
        let mut data = vec![0u8; count as usize * BLOCK];
        if count > 0 {
            for number in first / BLOCKS_PER_CHUNK..=(end - 1) / BLOCKS_PER_CHUNK {
                let start = number * BLOCKS_PER_CHUNK;
                let mut wanted = bits(u32::MAX)
                    .filter(|b| (first..end).contains(&(start + b)))
                    .fold(0u32, |m, b| m | 1 << b);
                for layer in std::iter::once(object.layer).chain(below.iter().copied()) {
                    let object = ObjectId { layer, ..object };
                    let Some(value) = self.get(&layout::numbered_key(kind::CHUNK, pg, object, number))?
                    else {
                        continue;
                    };
                    let chunk = ChunkRecord::decode(&value)?;
                    for bit in bits(chunk.zero & wanted) {
                        found[(start + bit - first) as usize] = Found::Zero;
                    }
                    for bit in bits(chunk.data & wanted) {
                        found[(start + bit - first) as usize] = Found::Data(chunk.crcs[bit as usize]);
                    }
                    let at = |bit: u32| (start + bit - first) as usize * BLOCK;
                    self.read_chunk(pg, object, number, &chunk, wanted, &mut data, at)?;
                    wanted &= !(chunk.zero | chunk.data);
                    if wanted == 0 {
                        break;
                    }
                }
            }
        }
        Ok(assemble(first, &found, data))
    }

    /// Reads the `wanted` data blocks of one chunk to where `at` says.
    #[allow(clippy::too_many_arguments)] // one call site; a struct would only rename them
    fn read_chunk(
        &mut self,
        pg: PgId,
        object: ObjectId,
        number: u32,
        chunk: &ChunkRecord,
        wanted: u32,
        data: &mut [u8],
        at: impl Fn(u32) -> usize,
    ) -> Result<(), StoreError> {
        let start = number * BLOCKS_PER_CHUNK;
        for bit in bits(chunk.overlay & wanted) {
            let value = self.get(&layout::numbered_key(kind::OVERLAY, pg, object, start + bit))?;
            let value = value.filter(|v| v.len() == BLOCK);
            let value = value
                .ok_or_else(|| StoreError::Fatal("an overlay block is missing from the index".into()))?;
            data[at(bit)..][..BLOCK].copy_from_slice(&value);
        }
        let mut rest = chunk.data & !chunk.overlay & wanted;
        while rest != 0 {
            let bit = rest.trailing_zeros();
            let len = (rest >> bit).trailing_ones();
            let slot = chunk.slot.ok_or_else(|| StoreError::Fatal("data without a slot".into()))?;
            let offset = |bit: u32| layout::slot_offset(slot) + u64::from(bit * BLOCK_BYTES);
            if self.device.read_at(offset(bit), &mut data[at(bit)..][..len as usize * BLOCK]).is_err() {
                // Find the bad one.
                for b in bit..bit + len {
                    if let Err(e) = self.device.read_at(offset(b), &mut data[at(b)..][..BLOCK]) {
                        self.checksum_errors += 1;
                        return Err(StoreError::Unreadable { object, block: start + b, why: e.to_string() });
                    }
                }
            }
            rest &= !(((1u64 << len) - 1) << bit) as u32;
        }
        for bit in bits(chunk.data & wanted) {
            if crc32fast::hash(&data[at(bit)..][..BLOCK]) != chunk.crcs[bit as usize] {
                self.checksum_errors += 1;
                let why = "checksum mismatch".to_string();
                return Err(StoreError::Unreadable { object, block: start + bit, why });
            }
        }
        Ok(())
    }
}

/// Content from what was found for each block; closes the gaps in `data`.
fn assemble(first: u32, found: &[Found], mut data: Vec<u8>) -> Content {
    let mut extents: Vec<Extent> = Vec::new();
    let mut len = 0;
    for (i, f) in found.iter().enumerate() {
        let block = first + i as u32;
        let last = extents.last_mut().filter(|e| e.first_block + e.block_count == block);
        match (*f, last) {
            (Found::Absent, _) => continue,
            (Found::Zero, Some(Extent { kind: ExtentKind::Zero, block_count, .. })) => *block_count += 1,
            (Found::Zero, _) => {
                extents.push(Extent { first_block: block, block_count: 1, kind: ExtentKind::Zero })
            }
            (Found::Data(crc), last) => {
                match last {
                    Some(Extent { kind: ExtentKind::Data { crcs }, block_count, .. }) => {
                        *block_count += 1;
                        crcs.push(crc);
                    }
                    _ => {
                        let kind = ExtentKind::Data { crcs: vec![crc] };
                        extents.push(Extent { first_block: block, block_count: 1, kind });
                    }
                }
                if len != i * BLOCK {
                    data.copy_within(i * BLOCK..(i + 1) * BLOCK, len);
                }
                len += BLOCK;
            }
        }
    }
    data.truncate(len);
    data.shrink_to_fit();
    Content { extents, data: data.into() }
}
