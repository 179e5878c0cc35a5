//! What is where: the superblocks, the journal and the slots of the device, and the keys and values of the index.
//! `osd/docs/format.md` is the specification. Nothing here panics on bad bytes.

use super::{Identity, StoreError};
use gabion_proto::ids::*;
use gabion_proto::limits::*;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;

pub const BLOCK: usize = BLOCK_BYTES as usize;
pub const CHUNK_BLOCKS: u64 = BLOCKS_PER_CHUNK as u64;
/// Blocks of the largest object.
pub const OBJECT_BLOCKS_MAX: u32 = OBJECT_BYTES_MAX / BLOCK_BYTES;

/// Where the two superblocks are, in blocks.
pub const SUPERBLOCKS: [u64; 2] = [0, 16];
/// First block of the journal.
pub const JOURNAL_FIRST: u64 = CHUNK_BLOCKS;
/// Least and greatest journal that a superblock may name.
pub const JOURNAL_BLOCKS_MIN: u32 = 64;
pub const JOURNAL_BLOCKS_MAX: u32 = (64 << 20) / BLOCK_BYTES;
const JOURNAL_BLOCKS_DEFAULT_MIN: u32 = (4 << 20) / BLOCK_BYTES;
/// The journal's share of a disk by default, as long as it is within its limits.
const JOURNAL_SHARE: u64 = 16;

const MAGIC: &[u8; 8] = b"GABIONSB";
/// Of the superblock, and with it of everything else.
pub const FORMAT_VERSION: u32 = 4;
const SUPER_BYTES: usize = 8 + 4 + 8 + 8 + 16 + 4 + 16 + 4 + 8 + 8 + 4 + 4 + 8;
const VALUE_VERSION: u8 = 2;

/// Kinds of index keys.
pub mod kind {
    pub const IDENTITY: u8 = b'I';
    /// Number of the last journal record whose changes are in the index.
    pub const APPLIED: u8 = b'J';
    pub const META: u8 = b'G';
    /// Where the records of a group are that was divided, or whose number others use.
    pub const HOMES: u8 = b'H';
    pub const MISSING: u8 = b'M';
    pub const OBJECT: u8 = b'O';
    pub const CHUNK: u8 = b'C';
    /// Data of one block that is newer than the block in its slot: in the journal and in memory, never in the index.
    pub const OVERLAY: u8 = b'V';
    /// One block of a pending version.
    pub const PENDING: u8 = b'P';
    /// A whole chunk of a pending version, in a slot of its own.
    pub const PENDING_CHUNK: u8 = b'Q';
}

/// Which blocks of a device are what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub journal_blocks: u32,
    pub slots: u32,
}

impl Geometry {
    /// How a device of `size_bytes` is divided by default.
    pub fn for_size(size_bytes: u64) -> Geometry {
        let share = size_bytes / JOURNAL_SHARE / u64::from(CHUNK_BYTES) * CHUNK_BLOCKS;
        let share = u32::try_from(share).unwrap_or(JOURNAL_BLOCKS_MAX);
        Geometry::with_journal(size_bytes, share.clamp(JOURNAL_BLOCKS_DEFAULT_MIN, JOURNAL_BLOCKS_MAX))
    }

    pub fn with_journal(size_bytes: u64, journal_blocks: u32) -> Geometry {
        let before = (JOURNAL_FIRST + u64::from(journal_blocks)) * u64::from(BLOCK_BYTES);
        let slots = size_bytes.saturating_sub(before) / u64::from(CHUNK_BYTES);
        Geometry { journal_blocks, slots: u32::try_from(slots).unwrap_or(u32::MAX) }
    }

    /// First block of a slot.
    pub fn slot_block(&self, slot: u32) -> u64 {
        JOURNAL_FIRST + u64::from(self.journal_blocks) + u64::from(slot) * CHUNK_BLOCKS
    }
}

/// A position in the journal: after the record `seq`, whose CRC is `crc`, comes what starts at `block`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    pub block: u32,
    pub seq: u64,
    pub crc: u32,
}

/// The superblock: who the disk belongs to, how it is divided, and where its journal starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub generation: u64,
    pub size: u64,
    pub identity: Identity,
    pub journal_blocks: u32,
    /// Of the records that count (rule S3).
    pub nonce: u64,
    /// Everything up to here is in slots and index.
    pub tail: Position,
    /// Everything up to this record was durable with all that it names (rule S1).
    pub flushed: u64,
}

impl Superblock {
    pub fn geometry(&self) -> Geometry {
        Geometry::with_journal(self.size, self.journal_blocks)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BLOCK);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&self.identity.cluster.0);
        out.extend_from_slice(&self.identity.osd.0.to_le_bytes());
        out.extend_from_slice(&self.identity.disk.0);
        out.extend_from_slice(&self.journal_blocks.to_le_bytes());
        out.extend_from_slice(&self.nonce.to_le_bytes());
        out.extend_from_slice(&self.tail.seq.to_le_bytes());
        out.extend_from_slice(&self.tail.block.to_le_bytes());
        out.extend_from_slice(&self.tail.crc.to_le_bytes());
        out.extend_from_slice(&self.flushed.to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out.resize(BLOCK, 0);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Superblock, String> {
        let mut from = Fields(bytes);
        let short = || "superblock is cut short".to_string();
        if &from.take::<8>().ok_or_else(short)? != MAGIC {
            return Err("no superblock".into());
        }
        let version = from.u32().ok_or_else(short)?;
        if version != FORMAT_VERSION {
            let way_out = if version > FORMAT_VERSION {
                "use the newer one that wrote it"
            } else {
                "it is of an older one; take the OSD out, and format its disk anew when its data is elsewhere"
            };
            return Err(format!(
                "the disk has format {version}, this program needs format {FORMAT_VERSION}: {way_out}"
            ));
        }
        let mut fields = || {
            let (generation, size) = (from.u64()?, from.u64()?);
            let (cluster, osd, disk) = (ClusterId(from.take()?), OsdId(from.u32()?), ClusterId(from.take()?));
            let (journal_blocks, nonce) = (from.u32()?, from.u64()?);
            let (seq, block, crc) = (from.u64()?, from.u32()?, from.u32()?);
            let (tail, identity) = (Position { block, seq, crc }, Identity { cluster, osd, disk });
            let flushed = from.u64()?;
            let s = Superblock { generation, size, identity, journal_blocks, nonce, tail, flushed };
            Some((s, from.u32()?))
        };
        let (s, crc) = fields().ok_or_else(short)?;
        if crc != crc32fast::hash(&bytes[..SUPER_BYTES]) {
            return Err("superblock checksum mismatch".into());
        }
        if !(JOURNAL_BLOCKS_MIN..=JOURNAL_BLOCKS_MAX).contains(&s.journal_blocks)
            || s.tail.block > s.journal_blocks
            || s.geometry().slots == 0
        {
            return Err("superblock contradicts itself".into());
        }
        Ok(s)
    }
}

/// Little-endian fields of bytes from a disk.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }
    pub fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|b| b[0])
    }
    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkRecord {
    /// Where the data is; there is one if `data` is not empty.
    pub slot: Option<u32>,
    pub zero: u32,
    pub data: u32,
    /// Meaningful where `data` is set.
    pub crcs: [u32; BLOCKS_PER_CHUNK as usize],
}

impl ChunkRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(14 + 4 * self.data.count_ones() as usize);
        out.push(VALUE_VERSION);
        out.push(u8::from(self.slot.is_some()));
        out.extend_from_slice(&self.slot.unwrap_or(0).to_le_bytes());
        out.extend_from_slice(&self.zero.to_le_bytes());
        out.extend_from_slice(&self.data.to_le_bytes());
        for bit in bits(self.data) {
            out.extend_from_slice(&self.crcs[bit as usize].to_le_bytes());
        }
        out
    }

    /// Decodes and checks that the masks agree.
    pub fn decode(bytes: &[u8]) -> Result<ChunkRecord, StoreError> {
        let mut from = Fields(bytes);
        let mut read = || {
            if from.u8()? != VALUE_VERSION {
                return None;
            }
            let (has_slot, slot) = (from.u8()?, from.u32()?);
            let mut c = ChunkRecord { zero: from.u32()?, data: from.u32()?, ..ChunkRecord::default() };
            c.slot = match has_slot {
                0 if slot == 0 => None,
                1 => Some(slot),
                _ => return None,
            };
            for bit in bits(c.data) {
                c.crcs[bit as usize] = from.u32()?;
            }
            (from.0.is_empty() && c.zero & c.data == 0 && (c.data == 0 || c.slot.is_some())).then_some(c)
        };
        read().ok_or_else(|| StoreError::Fatal("a chunk record of the index is damaged".into()))
    }
}

/// The set bits of a mask.
pub fn bits(mut mask: u32) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = (mask != 0).then(|| mask.trailing_zeros())?;
        mask &= mask - 1;
        Some(bit)
    })
}

/// Runs of set bits of a mask, as first bit and length.
pub fn runs(mut mask: u32) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        let first = (mask != 0).then(|| mask.trailing_zeros())?;
        let len = (mask >> first).trailing_ones();
        mask &= !(((1u64 << len) - 1) << first) as u32;
        Some((first, len))
    })
}

pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    postcard::to_extend(value, vec![VALUE_VERSION])
        .map_err(|e| StoreError::Fatal(format!("cannot encode a record: {e}")))
}

pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    match bytes.split_first() {
        Some((&VALUE_VERSION, rest)) => match postcard::take_from_bytes(rest) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err(StoreError::Fatal("a record of the index is too long".into())),
            Err(e) => Err(StoreError::Fatal(format!("a record of the index is damaged: {e}"))),
        },
        Some((v, _)) => Err(StoreError::Fatal(format!("a record of the index has unknown version {v}"))),
        None => Err(StoreError::Fatal("a record of the index is empty".into())),
    }
}

const ZERO_BLOCK: u8 = 0;
const DATA_BLOCK: u8 = 1;

/// A pending block of zeros.
pub fn pending_zero() -> Vec<u8> {
    vec![VALUE_VERSION, ZERO_BLOCK]
}

/// A pending block of data, as the index keeps it.
pub fn pending_data(crc: u32, data: &[u8]) -> Vec<u8> {
    let mut out = vec![VALUE_VERSION, DATA_BLOCK];
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(data);
    out
}

/// A pending block of the index: `None` for zeros, else its CRC and bytes.
pub fn parse_pending(bytes: &[u8]) -> Result<Option<(u32, &[u8])>, StoreError> {
    match bytes {
        [VALUE_VERSION, ZERO_BLOCK] => Ok(None),
        [VALUE_VERSION, DATA_BLOCK, a, b, c, d, data @ ..] if data.len() == BLOCK => {
            Ok(Some((u32::from_le_bytes([*a, *b, *c, *d]), data)))
        }
        _ => Err(StoreError::Fatal("a pending block of the index is damaged".into())),
    }
}

// Keys of a group, of an object, and of a chunk or block.
pub const PG_KEY_BYTES: usize = 9;
pub const OBJECT_KEY_BYTES: usize = 25;
/// Longest key.
pub const KEY_BYTES_MAX: usize = 29;

/// A key of the index: one letter, the group, or a home of its (8 bytes), the object (16 bytes), a number (4 bytes), all
/// big-endian, so that order of keys is order of ids.
#[derive(Clone, Copy)]
pub struct Key {
    len: u8,
    bytes: [u8; KEY_BYTES_MAX],
}

impl Key {
    pub fn new(bytes: &[u8]) -> Option<Key> {
        let mut key = Key { len: u8::try_from(bytes.len()).ok()?, bytes: [0; KEY_BYTES_MAX] };
        key.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(key)
    }

    pub fn letter(kind: u8) -> Key {
        let mut key = Key { len: 1, bytes: [0; KEY_BYTES_MAX] };
        key.bytes[0] = kind;
        key
    }

    fn append(mut self, bytes: &[u8]) -> Key {
        let len = usize::from(self.len);
        self.bytes[len..len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len() as u8;
        self
    }

    pub fn kind(&self) -> u8 {
        self.bytes[0]
    }

    /// The same key under another letter.
    pub fn with_kind(mut self, kind: u8) -> Key {
        self.bytes[0] = kind;
        self
    }
}

impl Deref for Key {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}
impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        self
    }
}
impl PartialEq for Key {
    fn eq(&self, other: &Key) -> bool {
        **self == **other
    }
}
impl Eq for Key {}
impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Key) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Key {
    fn cmp(&self, other: &Key) -> std::cmp::Ordering {
        (**self).cmp(&**other)
    }
}
impl std::hash::Hash for Key {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.escape_ascii())
    }
}

pub fn pg_key(kind: u8, pg: PgId) -> Key {
    Key::letter(kind).append(&pg.pool.0.to_be_bytes()).append(&pg.index.to_be_bytes())
}

pub fn object_key(kind: u8, pg: PgId, object: ObjectId) -> Key {
    pg_key(kind, pg)
        .append(&object.volume.0.to_be_bytes())
        .append(&object.index.to_be_bytes())
        .append(&object.layer.0.to_be_bytes())
}

/// Key of a chunk (`number` counts chunks) or of an overlay or pending block (it counts blocks).
pub fn numbered_key(kind: u8, pg: PgId, object: ObjectId, number: u32) -> Key {
    object_key(kind, pg, object).append(&number.to_be_bytes())
}

/// What a key names, as far as it goes.
#[derive(Clone, Copy, Debug)]
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
    if !matches!(key.len(), PG_KEY_BYTES | OBJECT_KEY_BYTES | KEY_BYTES_MAX) {
        return Err(bad());
    }
    let pg = PgId { pool: PoolId(u32_at(1).ok_or_else(bad)?), index: u32_at(5).ok_or_else(bad)? };
    let object = match (u64_at(9), u32_at(17), u32_at(21)) {
        (Some(volume), Some(index), Some(layer)) => {
            Some(ObjectId { volume: VolumeId(volume), index, layer: LayerId(layer) })
        }
        _ => None,
    };
    let number = if key.len() == KEY_BYTES_MAX { u32_at(25) } else { None };
    if number.is_some_and(|n| n >= OBJECT_BLOCKS_MAX) {
        return Err(bad());
    }
    Ok(Parsed { pg, object, number })
}

/// Object and number of a key that must have both.
pub fn parse_numbered(key: &[u8]) -> Result<(PgId, ObjectId, u32), StoreError> {
    let parsed = parse_key(key)?;
    match (parsed.object, parsed.number) {
        (Some(object), Some(number)) => Ok((parsed.pg, object, number)),
        _ => Err(StoreError::Fatal("a key of the index names no block".into())),
    }
}
