//! What is where: the superblock, the slots of the device, and the keys and values of the index.
//!
//! Device: superblock in block 0, its copy in block 1, then slots of `CHUNK_BYTES` from `SLOTS_OFFSET`.
//! Index: one letter, the group (8 bytes), the object (16 bytes), a number (4 bytes), all big-endian, so
//! that order of keys is order of ids. Values start with a version byte. Nothing here panics on bad bytes.

use super::{Identity, StoreError};
use gabion_proto::ids::*;
use gabion_proto::limits::*;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub const BLOCK: usize = BLOCK_BYTES as usize;
pub const CHUNK: usize = CHUNK_BYTES as usize;
/// First byte of slot 0.
pub const SLOTS_OFFSET: u64 = CHUNK_BYTES as u64;
/// Blocks of the largest object.
pub const OBJECT_BLOCKS_MAX: u32 = OBJECT_BYTES_MAX / BLOCK_BYTES;

const MAGIC: &[u8; 8] = b"GABIONSB";
const SUPER_VERSION: u32 = 1;
const SUPER_BYTES: usize = 8 + 4 + 8 + 8 + 16 + 4 + 16;
const VALUE_VERSION: u8 = 1;

/// Kinds of index keys.
pub mod kind {
    pub const IDENTITY: u8 = b'I';
    pub const META: u8 = b'G';
    pub const MISSING: u8 = b'M';
    pub const OBJECT: u8 = b'O';
    pub const CHUNK: u8 = b'C';
    /// Data of one block that is newer than the block in its slot.
    pub const OVERLAY: u8 = b'V';
    /// One block of a pending version.
    pub const PENDING: u8 = b'P';
}

/// Slots that a device of `size` bytes has.
pub fn slot_count(size: u64) -> u32 {
    u32::try_from(size.saturating_sub(SLOTS_OFFSET) / u64::from(CHUNK_BYTES)).unwrap_or(u32::MAX)
}

/// Where a slot starts on the device.
pub fn slot_offset(slot: u32) -> u64 {
    SLOTS_OFFSET + u64::from(slot) * u64::from(CHUNK_BYTES)
}

/// The superblock: who the disk belongs to and how much of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub generation: u64,
    pub size: u64,
    pub identity: Identity,
}

impl Superblock {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BLOCK);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&SUPER_VERSION.to_le_bytes());
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&self.identity.cluster.0);
        out.extend_from_slice(&self.identity.osd.0.to_le_bytes());
        out.extend_from_slice(&self.identity.disk.0);
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out.resize(BLOCK, 0);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Superblock, String> {
        fn take<const N: usize>(bytes: &[u8], at: &mut usize) -> Result<[u8; N], String> {
            let part = bytes.get(*at..*at + N).and_then(|p| p.try_into().ok());
            *at += N;
            part.ok_or_else(|| "superblock is cut short".to_string())
        }
        let at = &mut 0;
        if &take::<8>(bytes, at)? != MAGIC {
            return Err("no superblock".into());
        }
        let version = u32::from_le_bytes(take(bytes, at)?);
        if version != SUPER_VERSION {
            return Err(format!("superblock version {version} is not {SUPER_VERSION}"));
        }
        let generation = u64::from_le_bytes(take(bytes, at)?);
        let size = u64::from_le_bytes(take(bytes, at)?);
        let cluster = ClusterId(take(bytes, at)?);
        let osd = OsdId(u32::from_le_bytes(take(bytes, at)?));
        let disk = ClusterId(take(bytes, at)?);
        if u32::from_le_bytes(take(bytes, at)?) != crc32fast::hash(&bytes[..SUPER_BYTES]) {
            return Err("superblock checksum mismatch".into());
        }
        Ok(Superblock { generation, size, identity: Identity { cluster, osd, disk } })
    }
}

/// `ObjectState` as kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRecord {
    pub version: Version,
    pub deleted: bool,
    pub pending: Option<Version>,
}

/// One chunk of an object: bit `n` of each mask speaks of block `n`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRecord {
    /// Where the data is; there is one if `data` is not empty.
    pub slot: Option<u32>,
    pub zero: u32,
    pub data: u32,
    /// Part of `data`: the valid bytes are in the overlay, not in the slot.
    pub overlay: u32,
    /// One per block; meaningful where `data` is set.
    pub crcs: Vec<u32>,
}

impl ChunkRecord {
    pub fn new() -> ChunkRecord {
        ChunkRecord { crcs: vec![0; BLOCKS_PER_CHUNK as usize], ..ChunkRecord::default() }
    }

    /// Decodes and checks that the masks agree.
    pub fn decode(bytes: &[u8]) -> Result<ChunkRecord, StoreError> {
        let c: ChunkRecord = decode(bytes)?;
        if c.crcs.len() != BLOCKS_PER_CHUNK as usize
            || c.zero & c.data != 0
            || c.overlay & !c.data != 0
            || (c.data != 0 && c.slot.is_none())
        {
            return Err(StoreError::Fatal("a chunk record contradicts itself".into()));
        }
        Ok(c)
    }
}

/// One block of a pending version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PendingBlock {
    Zero,
    Data { crc: u32, bytes: Vec<u8> },
}

pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    postcard::to_extend(value, vec![VALUE_VERSION])
        .map_err(|e| StoreError::Fatal(format!("cannot encode a record: {e}")))
}

pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    match bytes.split_first() {
        Some((&VALUE_VERSION, rest)) => postcard::from_bytes(rest)
            .map_err(|e| StoreError::Fatal(format!("a record of the index is damaged: {e}"))),
        Some((v, _)) => Err(StoreError::Fatal(format!("a record of the index has unknown version {v}"))),
        None => Err(StoreError::Fatal("a record of the index is empty".into())),
    }
}

pub fn pg_key(kind: u8, pg: PgId) -> Vec<u8> {
    let mut key = Vec::with_capacity(29);
    key.push(kind);
    key.extend_from_slice(&pg.pool.0.to_be_bytes());
    key.extend_from_slice(&pg.index.to_be_bytes());
    key
}

pub fn object_key(kind: u8, pg: PgId, object: ObjectId) -> Vec<u8> {
    let mut key = pg_key(kind, pg);
    key.extend_from_slice(&object.volume.0.to_be_bytes());
    key.extend_from_slice(&object.index.to_be_bytes());
    key.extend_from_slice(&object.layer.0.to_be_bytes());
    key
}

/// Key of a chunk (`number` counts chunks) or of an overlay or pending block (it counts blocks).
pub fn numbered_key(kind: u8, pg: PgId, object: ObjectId, number: u32) -> Vec<u8> {
    let mut key = object_key(kind, pg, object);
    key.extend_from_slice(&number.to_be_bytes());
    key
}

/// What a key names, as far as it goes.
pub struct Parsed {
    pub pg: PgId,
    pub object: Option<ObjectId>,
    pub number: Option<u32>,
}

/// Takes a key apart.
pub fn parse_key(key: &[u8]) -> Result<Parsed, StoreError> {
    let bad = || StoreError::Fatal("a key of the index is malformed".into());
    let u32_at = |at: usize| key.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    let u64_at = |at: usize| key.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    if !matches!(key.len(), 9 | 25 | 29) {
        return Err(bad());
    }
    let pg = PgId { pool: PoolId(u32_at(1).ok_or_else(bad)?), index: u32_at(5).ok_or_else(bad)? };
    let object = match (u64_at(9), u32_at(17), u32_at(21)) {
        (Some(volume), Some(index), Some(layer)) => {
            Some(ObjectId { volume: VolumeId(volume), index, layer: LayerId(layer) })
        }
        _ => None,
    };
    let number = if key.len() == 29 { u32_at(25) } else { None };
    if number.is_some_and(|n| n >= OBJECT_BLOCKS_MAX) {
        return Err(bad());
    }
    Ok(Parsed { pg, object, number })
}
