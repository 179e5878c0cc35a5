//! What a stopped store knows of its objects, for people: `gabion-osd dump`.

use super::chunk_image::{ChunkImage, Found};
use super::device::Device;
use super::frozen::{Frozen, GROUP_KINDS, groups_with};
use super::kv::Kv;
use super::layout::{self, ChunkRecord, Geometry, Key, ObjectRecord, bits, kind};
use super::read::pending_block;
use super::view::ChunkOverlay;
use super::{Needed, PgMeta, StoreError};
use gabion_proto::ids::*;
use gabion_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Bad blocks of an object that are spelled out.
const BAD_MAX: usize = 64;

/// Blocks from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BlockRange {
    pub first: u32,
    pub last: u32,
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// A data block and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BadBlock {
    pub block: u32,
    pub why: String,
}

/// One data block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockDump {
    pub block: u32,
    /// As recorded.
    pub crc: u32,
    /// Its bytes have this checksum.
    pub matches: bool,
    /// Where its newest bytes are.
    pub at: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    Slot,
    Journal,
    Index,
}

/// One chunk's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChunkDump {
    pub chunk: u32,
    pub slot: Option<u32>,
    /// Where the slot is on the device.
    pub offset_bytes: Option<u64>,
    pub data_blocks: u32,
    pub zero_blocks: u32,
    /// Of its data blocks, those that only the journal has.
    pub journal_blocks: u32,
}

/// Content of one version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ContentDump {
    pub data: Vec<BlockRange>,
    pub zero: Vec<BlockRange>,
    pub data_blocks: u32,
    pub zero_blocks: u32,
    /// Over numbers and recorded checksums of all data blocks: equal content has equal digests.
    pub digest: u32,
    pub bad_blocks: u32,
    /// The first of them.
    pub bad: Vec<BadBlock>,
    pub chunks: Vec<ChunkDump>,
    /// Every data block, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Vec<BlockDump>>,
}

/// An entry of the missing map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NeededDump {
    pub version: String,
    pub deleted: bool,
    pub uncertain: Option<String>,
}

/// Everything that a store knows of one object in one group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ObjectDump {
    pub pg: String,
    pub object: String,
    pub volume: u64,
    pub index: u32,
    pub layer: u32,
    /// The group's last promise and activation; absent when the store has no metadata of it.
    pub promised: Option<u64>,
    pub activated: Option<u64>,
    /// Erasure coding: which shard is here.
    pub shard: Option<u8>,
    /// The committed version; absent when there is no record.
    pub version: Option<String>,
    pub deleted: bool,
    pub pending_version: Option<String>,
    pub missing: Option<NeededDump>,
    pub committed: ContentDump,
    pub pending: Option<ContentDump>,
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ObjectLine {
    pub pg: String,
    pub object: String,
    pub version: Option<String>,
    pub deleted: bool,
    pub pending_version: Option<String>,
    pub missing: Option<NeededDump>,
}

impl From<Needed> for NeededDump {
    fn from(n: Needed) -> NeededDump {
        NeededDump {
            version: n.version.to_string(),
            deleted: n.deleted,
            uncertain: n.uncertain.map(|v| v.to_string()),
        }
    }
}

impl<D: Device, K: Kv> Frozen<D, K> {
    /// The object in every group that has something of it, or in `pg` only: normally one.
    pub fn dump(
        &mut self,
        object: ObjectId,
        pg: Option<PgId>,
        blocks: bool,
    ) -> Result<Vec<ObjectDump>, StoreError> {
        let metas: BTreeMap<PgId, PgMeta> = self.groups()?.into_iter().collect();
        let mut out = Vec::new();
        for pg in self.all_groups(pg)? {
            out.extend(self.dump_in(pg, metas.get(&pg), object, blocks)?);
        }
        Ok(out)
    }

    /// Groups with metadata or records.
    fn all_groups(&self, only: Option<PgId>) -> Result<BTreeSet<PgId>, StoreError> {
        if let Some(pg) = only {
            return Ok([pg].into());
        }
        let mut out: BTreeSet<PgId> = groups_with(&self.0.index, kind::META)?.into_iter().collect();
        let owners = self.0.homes.owners();
        for k in GROUP_KINDS {
            // What others use is theirs.
            out.extend(groups_with(&self.0.index, k)?.into_iter().filter(|home| !owners.know(*home)));
        }
        Ok(out)
    }

    fn record<T: serde::de::DeserializeOwned>(&self, key: &Key) -> Result<Option<T>, StoreError> {
        self.0.index.peek(key)?.map(|v| layout::decode(v.record()?)).transpose()
    }

    fn dump_in(
        &mut self,
        pg: PgId,
        meta: Option<&PgMeta>,
        object: ObjectId,
        blocks: bool,
    ) -> Result<Option<ObjectDump>, StoreError> {
        let home = self.0.homes.home(pg, &object);
        let record: Option<ObjectRecord> = self.record(&layout::object_key(kind::OBJECT, home, object))?;
        let missing: Option<Needed> = self.record(&layout::object_key(kind::MISSING, home, object))?;
        let committed = self.committed(home, object, blocks)?;
        let pending = self.pending(home, object, blocks)?;
        let pending_version = record.and_then(|r| r.pending);
        if record.is_none() && missing.is_none() && committed.chunks.is_empty() && pending.is_empty() {
            return Ok(None);
        }
        Ok(Some(ObjectDump {
            pg: pg.to_string(),
            object: object.to_string(),
            volume: object.volume.0,
            index: object.index,
            layer: object.layer.0,
            promised: meta.map(|m| m.promised.0),
            activated: meta.map(|m| m.activated.0),
            shard: meta.and_then(|m| m.shard).map(|s| s.number),
            version: record.map(|r| r.version.to_string()),
            deleted: record.is_some_and(|r| r.deleted),
            pending_version: pending_version.map(|v| v.to_string()),
            missing: missing.map(NeededDump::from),
            committed,
            pending: (pending_version.is_some() || !pending.is_empty()).then_some(pending),
        }))
    }

    fn committed(&mut self, pg: PgId, object: ObjectId, blocks: bool) -> Result<ContentDump, StoreError> {
        let store = &mut self.0;
        let mut out = Collector::new(blocks);
        store.index.each(&layout::object_key(kind::CHUNK, pg, object), |key, value| {
            let chunk = ChunkRecord::decode(value.record()?)?;
            let overlay = store.index.overlay(&key)?;
            out.chunk(&mut store.device, store.geometry, layout::parse_numbered(&key)?.2, &chunk, &overlay)
        })?;
        Ok(out.finish())
    }

    /// What is written beside the committed version.
    fn pending(&mut self, pg: PgId, object: ObjectId, blocks: bool) -> Result<ContentDump, StoreError> {
        let store = &mut self.0;
        let mut out = Collector::new(blocks);
        store.index.each(&layout::object_key(kind::PENDING_CHUNK, pg, object), |key, value| {
            let chunk = ChunkRecord::decode(value.record()?)?;
            let number = layout::parse_numbered(&key)?.2;
            out.chunk(&mut store.device, store.geometry, number, &chunk, &ChunkOverlay::default())
        })?;
        store.index.each(&layout::object_key(kind::PENDING, pg, object), |key, value| {
            let block = layout::parse_numbered(&key)?.2;
            let at = if store.index.in_memory(&key).is_some() { Place::Journal } else { Place::Index };
            match pending_block(value)? {
                None => _ = out.zero.insert(block),
                Some(data) => {
                    let right = crc32fast::hash(data.bytes.get()) == data.crc;
                    let found = if right { Found::Good } else { Found::Mismatch };
                    out.data(block, data.crc, Some(&found), at);
                }
            }
            Ok(())
        })?;
        Ok(out.finish())
    }

    /// Every object of the store, or of one group, with what it should be where it is missing, in order of groups:
    /// first what is here, then what is only missed. One page is in memory at a time.
    pub fn list_objects<E: From<StoreError>>(
        &mut self,
        pg: Option<PgId>,
        mut each: impl FnMut(ObjectLine) -> Result<(), E>,
    ) -> Result<(), E> {
        for pg in self.all_groups(pg)? {
            let mut failed = None;
            let index = &self.0.index;
            let mut say = |line| {
                each(line).map_err(|e| {
                    failed = Some(e);
                    StoreError::Invalid("the listing was broken off".into())
                })
            };
            let regions = self.0.homes.regions(pg);
            let mut list = || {
                for region in &regions {
                    index.each(&region.key(kind::OBJECT, pg), |key, value| {
                        if !region.class.has_key(&key) {
                            return Ok(());
                        }
                        let record: ObjectRecord = layout::decode(value.record()?)?;
                        let missing = self.record(&key.with_kind(kind::MISSING))?;
                        say(line(pg, &key, Some(record), missing)?)
                    })?;
                }
                for region in &regions {
                    index.each(&region.key(kind::MISSING, pg), |key, value| {
                        let held = index.peek(&key.with_kind(kind::OBJECT))?.is_some();
                        if held || !region.class.has_key(&key) {
                            return Ok(());
                        }
                        say(line(pg, &key, None, Some(layout::decode(value.record()?)?))?)
                    })?;
                }
                Ok(())
            };
            let listed = list();
            match (listed, failed) {
                (_, Some(e)) => return Err(e),
                (result, None) => result?,
            }
        }
        Ok(())
    }
}

fn line(
    pg: PgId,
    key: &Key,
    record: Option<ObjectRecord>,
    missing: Option<Needed>,
) -> Result<ObjectLine, StoreError> {
    let object = layout::parse_key(key)?.object;
    let object = object.ok_or_else(|| StoreError::Fatal("a key of the index names no object".into()))?;
    Ok(ObjectLine {
        pg: pg.to_string(),
        object: object.to_string(),
        version: record.map(|r| r.version.to_string()),
        deleted: record.is_some_and(|r| r.deleted),
        pending_version: record.and_then(|r| r.pending).map(|v| v.to_string()),
        missing: missing.map(NeededDump::from),
    })
}

/// Builds a [`ContentDump`].
struct Collector {
    out: ContentDump,
    data: BTreeMap<u32, u32>,
    zero: BTreeSet<u32>,
}

impl Collector {
    fn new(blocks: bool) -> Collector {
        let out = ContentDump { blocks: blocks.then(Vec::new), ..ContentDump::default() };
        Collector { out, data: BTreeMap::new(), zero: BTreeSet::new() }
    }

    fn chunk(
        &mut self,
        device: &mut impl Device,
        geometry: Geometry,
        number: u32,
        chunk: &ChunkRecord,
        overlay: &ChunkOverlay<'_>,
    ) -> Result<(), StoreError> {
        let image = ChunkImage::read(device, geometry, chunk, overlay)?;
        let first = number.saturating_mul(BLOCKS_PER_CHUNK);
        self.zero.extend(bits(chunk.zero).map(|bit| first + bit));
        for bit in bits(chunk.data) {
            let at = if overlay.mask & 1 << bit != 0 { Place::Journal } else { Place::Slot };
            self.data(first + bit, chunk.crcs[bit as usize], image.found(bit), at);
        }
        self.out.chunks.push(ChunkDump {
            chunk: number,
            slot: chunk.slot,
            offset_bytes: chunk.slot.map(|s| geometry.slot_block(s) * u64::from(BLOCK_BYTES)),
            data_blocks: chunk.data.count_ones(),
            zero_blocks: chunk.zero.count_ones(),
            journal_blocks: (overlay.mask & chunk.data).count_ones(),
        });
        Ok(())
    }

    fn data(&mut self, block: u32, crc: u32, found: Option<&Found>, at: Place) {
        self.data.insert(block, crc);
        let why = found.and_then(Found::damage);
        if let Some(why) = why {
            self.out.bad_blocks += 1;
            if self.out.bad.len() < BAD_MAX {
                self.out.bad.push(BadBlock { block, why: why.to_owned() });
            }
        }
        if let Some(blocks) = &mut self.out.blocks {
            blocks.push(BlockDump { block, crc, matches: why.is_none(), at });
        }
    }

    fn finish(mut self) -> ContentDump {
        self.out.data = ranges(self.data.keys());
        self.out.zero = ranges(&self.zero);
        self.out.data_blocks = self.data.len() as u32;
        self.out.zero_blocks = self.zero.len() as u32;
        let mut digest = crc32fast::Hasher::new();
        for (block, crc) in &self.data {
            digest.update(&block.to_le_bytes());
            digest.update(&crc.to_le_bytes());
        }
        self.out.digest = digest.finalize();
        if let Some(blocks) = &mut self.out.blocks {
            blocks.sort_by_key(|b| b.block);
        }
        self.out
    }
}

/// Neighbours put together.
fn ranges<'a>(blocks: impl IntoIterator<Item = &'a u32>) -> Vec<BlockRange> {
    let mut out: Vec<BlockRange> = Vec::new();
    for &block in blocks {
        match out.last_mut() {
            Some(r) if r.last + 1 == block => r.last = block,
            _ => out.push(BlockRange { first: block, last: block }),
        }
    }
    out
}

impl ContentDump {
    fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.data_blocks == 0 && self.zero_blocks == 0
    }
}

struct Ranges<'a>(&'a [BlockRange]);

impl fmt::Display for Ranges<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return write!(f, "none");
        }
        for (i, range) in self.0.iter().enumerate() {
            write!(f, "{}{range}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

impl fmt::Display for ContentDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  data     {} blocks: {}", self.data_blocks, Ranges(&self.data))?;
        writeln!(f, "  zero     {} blocks: {}", self.zero_blocks, Ranges(&self.zero))?;
        write!(f, "  checked  digest {:08x}, ", self.digest)?;
        match self.bad_blocks {
            0 => writeln!(f, "every data block has its checksum")?,
            n => writeln!(f, "{n} BAD blocks")?,
        }
        for b in &self.bad {
            writeln!(f, "    block {}: {}", b.block, b.why)?;
        }
        for c in &self.chunks {
            write!(f, "  chunk {:<4} ", c.chunk)?;
            match (c.slot, c.offset_bytes) {
                (Some(slot), Some(offset)) => write!(f, "slot {slot} at byte {offset}")?,
                _ => write!(f, "no slot")?,
            }
            write!(f, ": {} data, {} zero", c.data_blocks, c.zero_blocks)?;
            match c.journal_blocks {
                0 => writeln!(f)?,
                n => writeln!(f, ", {n} only in the journal")?,
            }
        }
        for b in self.blocks.iter().flatten() {
            let (says, at) = (if b.matches { "matches" } else { "BAD" }, b.at);
            writeln!(
                f,
                "  block {:<5} crc {:08x} {says}, {}",
                b.block,
                b.crc,
                format!("{at:?}").to_lowercase()
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for NeededDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "needs {}", self.version)?;
        if self.deleted {
            write!(f, ", deleted")?;
        }
        match &self.uncertain {
            Some(v) => write!(f, ", uncertain, may go back to {v}"),
            None => Ok(()),
        }
    }
}

fn or_none(text: Option<&str>) -> &str {
    text.unwrap_or("none")
}

impl fmt::Display for ObjectDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (volume, index, layer) = (self.volume, self.index, self.layer);
        writeln!(f, "object   {}: volume {volume}, index {index}, layer {layer}", self.object)?;
        write!(f, "group    {}: ", self.pg)?;
        match (self.promised, self.activated) {
            (Some(p), Some(a)) => write!(f, "promised interval {p}, activated in {a}")?,
            _ => write!(f, "no metadata")?,
        }
        match self.shard {
            Some(number) => writeln!(f, ", shard {number}")?,
            None => writeln!(f)?,
        }
        let tombstone = if self.deleted { ", deleted" } else { "" };
        writeln!(f, "version  {}{tombstone}", or_none(self.version.as_deref()))?;
        writeln!(f, "pending  {}", or_none(self.pending_version.as_deref()))?;
        if let Some(missing) = &self.missing {
            writeln!(f, "missing  {missing}")?;
        }
        write!(f, "committed content\n{}", self.committed)?;
        if let Some(pending) = &self.pending {
            write!(f, "pending content\n{pending}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ObjectLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.pg, self.object, or_none(self.version.as_deref()))?;
        if self.deleted {
            write!(f, " deleted")?;
        }
        if let Some(v) = &self.pending_version {
            write!(f, " pending {v}")?;
        }
        match &self.missing {
            Some(missing) => write!(f, " {missing}"),
            None => Ok(()),
        }
    }
}
