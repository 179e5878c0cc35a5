//! The offline check: superblocks, journal, what refers to what in the index, and with `deep` every block against its
//! checksum. It changes nothing, and goes on where opening would stop.

use super::chunk_image::ChunkImage;
use super::chunk_store::ChunkStore;
use super::device::Device;
use super::frozen::{self, GROUP_KINDS, groups_with};
use super::homes::{self, Homes, Owners};
use super::kv::Kv;
use super::layout::{
    self, ChunkRecord, KEY_BYTES_MAX, OBJECT_BLOCKS_MAX, OBJECT_KEY_BYTES, ObjectRecord, PG_KEY_BYTES,
    Parsed, SUPERBLOCKS, bits, kind,
};
use super::read::pending_block;
use super::recover::{read_superblocks, written_together};
use super::view::{ChunkOverlay, Value};
use super::{Needed, PgMeta, StoreError};
use crate::erasure::MATRIX;
use gabion_proto::ids::*;
use gabion_proto::limits::BLOCKS_PER_CHUNK;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

/// What [`fsck`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FsckReport {
    pub groups: u64,
    pub objects: u64,
    /// Entries of missing maps.
    pub missing: u64,
    pub chunks_used: u64,
    pub blocks_read: u64,
    /// The first findings, at most `PROBLEMS_MAX`.
    pub problems: Vec<String>,
    pub problem_count: u64,
    /// What is worth knowing and not wrong.
    pub notes: Vec<String>,
}

/// Findings that a report spells out.
pub const PROBLEMS_MAX: usize = 1000;

impl FsckReport {
    pub fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    /// Tests of the store alone write to groups that they never made.
    #[cfg(test)]
    pub fn is_clean_but_for_strangers(&self) -> bool {
        self.problem_count == self.problems.len() as u64
            && self.problems.iter().all(|p| p.contains("no metadata"))
    }

    fn problem(&mut self, what: String) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(what);
        }
    }
}

impl fmt::Display for FsckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for p in &self.problems {
            writeln!(f, "{p}")?;
        }
        for n in &self.notes {
            writeln!(f, "note: {n}")?;
        }
        write!(
            f,
            "{} groups, {} objects, {} missing, {} chunks in use, {} blocks read, {} problems",
            self.groups, self.objects, self.missing, self.chunks_used, self.blocks_read, self.problem_count
        )
    }
}

/// Checks a stopped store and changes nothing; `deep` also reads every block against its checksum.
pub fn fsck(data_dir: &Path, deep: bool) -> Result<FsckReport, StoreError> {
    let (device, kv) = frozen::parts(data_dir)?;
    let mut report = check_parts(device, kv, deep);
    if let Ok(text) = std::fs::read_to_string(data_dir.join("disk-id"))
        && let Ok(info) = super::info(data_dir)
        && text.trim() != info.identity.disk.to_string()
    {
        report.problem(format!("disk-id says {}, the superblock says {}", text.trim(), info.identity.disk));
    }
    if let Err(e) = super::transfer::refuse_unfinished(data_dir) {
        report.notes.push(e.to_string());
    }
    Ok(report)
}

/// The same on device and index.
pub(super) fn check_parts<D: Device, K: Kv>(mut device: D, kv: K, deep: bool) -> FsckReport {
    let mut report = FsckReport::default();
    check_superblocks(&mut device, &mut report);
    let opened = ChunkStore::open_frozen(device, kv, |damage| {
        report.problem(damage.to_string());
        Ok(())
    });
    match opened {
        Ok((mut store, replay)) => {
            if replay.cut_short {
                let seq = replay.end.seq;
                report.notes.push(format!(
                    "behind record {seq}, where the journal ends, begins one that is not whole, or whose slots are not: \
                     a write that was not finished, or damage to the last one"
                ));
            }
            store.check(deep, &mut report);
        }
        Err(e) => report.problem(format!("nothing more can be checked: {e}")),
    }
    report
}

fn check_superblocks(device: &mut impl Device, report: &mut FsckReport) {
    let found = read_superblocks(device);
    match &found {
        [Ok(a), Ok(b)] if !written_together(a, b) => report.problem(format!(
            "the superblocks in blocks {} and {} are not of one store: generation {} of {} of cluster {}, and generation {} of {} \
             of cluster {}",
            SUPERBLOCKS[0],
            SUPERBLOCKS[1],
            a.generation,
            a.identity.osd,
            a.identity.cluster,
            b.generation,
            b.identity.osd,
            b.identity.cluster
        )),
        // Said by whoever opens it.
        [Err(_), Err(_)] => {}
        _ => {}
    }
    if found.iter().any(Result::is_ok) {
        for (block, superblock) in SUPERBLOCKS.iter().zip(&found) {
            if let Err(why) = superblock {
                report.problem(format!("superblock in block {block}: {why}; the other one is used"));
            }
        }
    }
}

/// What a check knows while it goes through the index.
struct Check<'a> {
    report: &'a mut FsckReport,
    /// Groups with metadata, and what they promised, if that can be read.
    groups: BTreeMap<PgId, Option<PgMeta>>,
    owners: Owners,
    /// Groups without metadata that have records.
    strangers: BTreeSet<PgId>,
    slots: u32,
    /// A bit per slot that is in use.
    used: Vec<u64>,
    /// Slots in use more than once.
    twice: BTreeSet<u32>,
    /// The object looked for last.
    owner: Option<((PgId, ObjectId), Option<ObjectRecord>)>,
}

fn letter(kind: u8) -> char {
    char::from(kind)
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Everything in the index, with the journal on top.
    pub(super) fn check(&mut self, deep: bool, report: &mut FsckReport) {
        let mut check = Check {
            report,
            groups: BTreeMap::new(),
            owners: Owners::default(),
            strangers: BTreeSet::new(),
            slots: self.geometry.slots,
            used: vec![0; (self.geometry.slots as usize).div_ceil(u64::BITS as usize)],
            twice: BTreeSet::new(),
            owner: None,
        };
        for pass in [
            Self::check_homes,
            Self::check_groups,
            Self::check_letters,
            Self::check_objects,
            Self::check_missing,
        ] {
            if let Err(e) = pass(self, &mut check) {
                check.report.problem(format!("index: {e}"));
            }
        }
        for k in [kind::CHUNK, kind::PENDING_CHUNK] {
            if let Err(e) = self.check_chunks(&mut check, k, deep) {
                check.report.problem(format!("index: {e}"));
            }
        }
        for pass in [Self::check_pending, Self::check_overlay, Self::name_shared_slots] {
            if let Err(e) = pass(self, &mut check) {
                check.report.problem(format!("index: {e}"));
            }
        }
        check.report.chunks_used = check.used.iter().map(|w| u64::from(w.count_ones())).sum();
        let strangers = std::mem::take(&mut check.strangers);
        for pg in strangers {
            check.report.problem(format!(
                "group {pg} has records and no metadata: nobody uses them, and they take space"
            ));
        }
    }

    fn check_groups(&mut self, check: &mut Check<'_>) -> Result<(), StoreError> {
        self.index.each(&[kind::META], |key, value| {
            let parsed = layout::parse_key(&key).ok().filter(|_| key.len() == PG_KEY_BYTES);
            let Some(Parsed { pg, .. }) = parsed else {
                check.report.problem(format!("malformed key {key:?} in the index"));
                return Ok(());
            };
            let meta = value.record().and_then(|v| layout::decode::<PgMeta>(v));
            match &meta {
                Err(e) => check.report.problem(format!("group {pg}: its metadata cannot be read: {e}")),
                Ok(meta) => check_meta(pg, meta, check.report),
            }
            check.groups.insert(pg, meta.ok());
            check.report.groups += 1;
            Ok(())
        })?;
        for k in GROUP_KINDS {
            for home in groups_with(&self.index, k)? {
                // Of one that groups have in common each record is looked at.
                if !check.owners.know(home) && !check.groups.contains_key(&home) {
                    check.strangers.insert(home);
                }
            }
        }
        Ok(())
    }

    fn check_homes(&mut self, check: &mut Check<'_>) -> Result<(), StoreError> {
        let mut homes = Homes::default();
        self.index.each(&[kind::HOMES], |key, value| {
            match value.record().and_then(|v| homes::parse(&key, v)) {
                Ok(change) => homes.set(change),
                Err(e) => check.report.problem(format!("record {} of the index: {e}", key.escape_ascii())),
            }
            Ok(())
        })?;
        check.owners = homes.owners();
        Ok(())
    }

    /// Letters that no record has, data where only the journal may have it, and keys of one letter that go on.
    fn check_letters(&mut self, check: &mut Check<'_>) -> Result<(), StoreError> {
        let known =
            [&GROUP_KINDS[..], &[kind::META, kind::HOMES, kind::IDENTITY, kind::APPLIED, kind::OVERLAY]]
                .concat();
        for letter in 0..=u8::MAX {
            if !known.contains(&letter) && !self.index.scan(&[letter], &[letter], 1)?.is_empty() {
                let letter = char::from(letter).escape_default();
                check.report.problem(format!("the index has records of an unknown kind '{letter}'"));
            }
        }
        for single in [kind::IDENTITY, kind::APPLIED] {
            if !self.index.scan(&[single], &[single, 0], 1)?.is_empty() {
                check.report.problem(format!("a key '{}' of the index is too long", letter(single)));
            }
        }
        let overlay = self.index.kv.scan(&[kind::OVERLAY], &[kind::OVERLAY], 1).map_err(StoreError::Fatal)?;
        if !overlay.is_empty() {
            check.report.problem("the index has a block that belongs into the journal".into());
        }
        Ok(())
    }

    fn check_objects(&mut self, check: &mut Check<'_>) -> Result<(), StoreError> {
        self.index.each(&[kind::OBJECT], |key, value| {
            check.report.objects += 1;
            let Some((pg, object, _)) = check.key(&key, OBJECT_KEY_BYTES) else { return Ok(()) };
            let record = match value.record().and_then(|v| layout::decode::<ObjectRecord>(v)) {
                Ok(record) => record,
                Err(e) => {
                    check.found(pg, object, format!("its record cannot be read: {e}"));
                    return Ok(());
                }
            };
            if record.version == Version::ZERO && record.pending.is_none() {
                check.found(pg, object, "it has no version".into());
            }
            if record.pending.is_some_and(|p| p <= record.version) {
                check.found(pg, object, "its pending version does not follow the committed one".into());
            }
            check.promised(pg, object, record.pending.unwrap_or(record.version));
            Ok(())
        })
    }

    fn check_missing(&mut self, check: &mut Check<'_>) -> Result<(), StoreError> {
        self.index.each(&[kind::MISSING], |key, value| {
            check.report.missing += 1;
            let Some((pg, object, _)) = check.key(&key, OBJECT_KEY_BYTES) else { return Ok(()) };
            match value.record().and_then(|v| layout::decode::<Needed>(v)) {
                Ok(needed) => check.promised(pg, object, needed.version),
                Err(e) => check.found(pg, object, format!("its missing entry cannot be read: {e}")),
            }
            Ok(())
        })
    }

    /// Records of chunks, committed or pending, and with `deep` what their slots hold.
    fn check_chunks(&mut self, check: &mut Check<'_>, k: u8, deep: bool) -> Result<(), StoreError> {
        let ChunkStore { index, device, geometry, .. } = self;
        index.each(&[k], |key, value| {
            let Some((pg, object, number)) = check.key(&key, KEY_BYTES_MAX) else { return Ok(()) };
            let whole = k == kind::PENDING_CHUNK;
            let what = if whole { "pending chunk" } else { "chunk" };
            if number >= OBJECT_BLOCKS_MAX / BLOCKS_PER_CHUNK {
                check.found(pg, object, format!("{what} {number} is beyond its end"));
                return Ok(());
            }
            let chunk = match value.record().and_then(|v| ChunkRecord::decode(v)) {
                Ok(chunk) => chunk,
                Err(e) => {
                    check.found(pg, object, format!("{what} {number}: {e}"));
                    return Ok(());
                }
            };
            check.take_slot(pg, object, &chunk);
            let owner = check.owner(index, pg, object)?;
            let owned = match (whole, owner) {
                (true, Some(r)) => r.pending.is_some(),
                // A pending version takes the slots that its commit will need.
                (false, Some(r)) => !r.deleted || r.pending.is_some(),
                (_, None) => false,
            };
            if !owned {
                let slot = chunk.slot.map_or("no slot".into(), |s| format!("slot {s}"));
                check.found(pg, object, format!("{what} {number} belongs to no version and takes {slot}"));
            }
            // Whether a block of it is pending.
            let pending = || {
                let first = number * BLOCKS_PER_CHUNK;
                let from = layout::numbered_key(kind::PENDING, pg, object, first);
                let prefix = layout::object_key(kind::PENDING, pg, object);
                let next = index.scan(&prefix, &from, 1)?.into_iter().next();
                Ok::<_, StoreError>(next.is_some_and(|(k, _)| {
                    layout::parse_numbered(&k).is_ok_and(|(_, _, n)| n < first + BLOCKS_PER_CHUNK)
                }))
            };
            if let (false, Some(slot), 0, 0) = (whole, chunk.slot, chunk.data, chunk.zero)
                && !pending()?
            {
                check.found(pg, object, format!("chunk {number} has nothing in it and takes slot {slot}"));
            }
            if whole {
                if chunk.data == 0 {
                    check.found(pg, object, format!("pending chunk {number} is empty"));
                }
                if pending()? {
                    check.found(pg, object, format!("chunk {number} is pending twice, whole and by block"));
                }
            }
            if deep && chunk.data != 0 {
                let overlay = if whole { ChunkOverlay::default() } else { index.overlay(&key)? };
                let image = ChunkImage::read(device, *geometry, &chunk, &overlay)?;
                check.report.blocks_read += u64::from(chunk.data.count_ones());
                for bit in bits(chunk.data) {
                    if let Some(why) = image.found(bit).and_then(|f| f.damage()) {
                        let block = number * BLOCKS_PER_CHUNK + bit;
                        let slot = chunk.slot.unwrap_or_default();
                        check.found(pg, object, format!("block {block}, in slot {slot}: {why}"));
                    }
                }
            }
            Ok(())
        })
    }

    /// Blocks of pending versions.
    fn check_pending(&mut self, check: &mut Check<'_>) -> Result<(), StoreError> {
        let index = &self.index;
        index.each(&[kind::PENDING], |key, value| {
            let Some((pg, object, block)) = check.key(&key, KEY_BYTES_MAX) else { return Ok(()) };
            if check.owner(index, pg, object)?.is_none_or(|r| r.pending.is_none()) {
                check.found(pg, object, format!("block {block} is of a pending version that there is not"));
            }
            let data = match pending_block(value) {
                Ok(data) => data,
                Err(e) => {
                    check.found(pg, object, format!("pending block {block}: {e}"));
                    return Ok(());
                }
            };
            if let Some(data) = data {
                if crc32fast::hash(data.bytes.get()) != data.crc {
                    check.found(pg, object, format!("pending block {block}: checksum mismatch"));
                }
                let chunk = layout::numbered_key(kind::CHUNK, pg, object, block / BLOCKS_PER_CHUNK);
                let chunk = index.peek(&chunk)?.map(|v| ChunkRecord::decode(v.record()?)).transpose();
                if !chunk.is_ok_and(|c| c.is_some_and(|c| c.slot.is_some())) {
                    check.found(pg, object, format!("pending block {block} has no slot to go to"));
                }
            }
            Ok(())
        })
    }

    /// Data that only the journal has: each block must be one that its chunk says is there.
    fn check_overlay(&mut self, check: &mut Check<'_>) -> Result<(), StoreError> {
        let index = &self.index;
        let newer = [&index.frozen, &index.dirty];
        let blocks = newer.iter().flat_map(|v| super::view::range(v, &[kind::OVERLAY], &[kind::OVERLAY]));
        for (key, value) in blocks {
            let Some(Value::Block(data)) = value else { continue };
            if !matches!(index.in_memory(key), Some(Some(_))) {
                continue;
            }
            let Some((pg, object, block)) = check.key(key, KEY_BYTES_MAX) else { continue };
            let (number, bit) = (block / BLOCKS_PER_CHUNK, block % BLOCKS_PER_CHUNK);
            let chunk = index.peek(&layout::numbered_key(kind::CHUNK, pg, object, number))?;
            let chunk = chunk.map(|v| ChunkRecord::decode(v.record()?)).transpose();
            let named = chunk.is_ok_and(|c| c.is_some_and(|c| c.slot.is_some() && c.data & 1 << bit != 0));
            if !named || crc32fast::hash(data.bytes.get()) != data.crc {
                check.found(pg, object, format!("block {block} of the journal is damaged or not its"));
            }
        }
        Ok(())
    }

    /// Says who shares the slots that more than one record names.
    fn name_shared_slots(&mut self, check: &mut Check<'_>) -> Result<(), StoreError> {
        if check.twice.is_empty() {
            return Ok(());
        }
        let twice = std::mem::take(&mut check.twice);
        for k in [kind::CHUNK, kind::PENDING_CHUNK] {
            self.index.each(&[k], |key, value| {
                let slot = value.record().and_then(|v| ChunkRecord::decode(v)).ok().and_then(|c| c.slot);
                if let (Some(slot), Ok((pg, object, number))) = (slot, layout::parse_numbered(&key))
                    && twice.contains(&slot)
                {
                    check.found(pg, object, format!("chunk {number}: slot {slot} is used twice"));
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

fn check_meta(pg: PgId, meta: &PgMeta, report: &mut FsckReport) {
    if meta.activated > meta.promised {
        report.problem(format!(
            "group {pg}: it was activated in interval {} and promised only {}",
            meta.activated, meta.promised
        ));
    }
    if let Some(s) = meta.shard
        && (s.k == 0 || s.m == 0 || s.number >= s.k.saturating_add(s.m) || s.matrix != MATRIX)
    {
        report.problem(format!("group {pg}: there is no shard {s:?}"));
    }
}

impl Check<'_> {
    /// `home`: where it is.
    fn found(&mut self, home: PgId, object: ObjectId, what: String) {
        let pg = self.owners.of(home, &object);
        self.report.problem(format!("group {pg}, object {object}: {what}"));
    }

    /// Home, object and number of a key of this length. The number is 0 where there is none.
    fn key(&mut self, key: &[u8], len: usize) -> Option<(PgId, ObjectId, u32)> {
        match layout::parse_key(key) {
            Ok(Parsed { pg, object: Some(object), number }) if key.len() == len => {
                Some((pg, object, number.unwrap_or_default()))
            }
            _ => {
                self.report.problem(format!("malformed key {} in the index", key.escape_ascii()));
                None
            }
        }
    }

    /// Nothing is of a later interval than the group has promised: a promise was lost, or the version is wrong.
    fn promised(&mut self, home: PgId, object: ObjectId, version: Version) {
        let pg = self.owners.of(home, &object);
        if !self.groups.contains_key(&pg) {
            self.strangers.insert(pg);
        }
        if let Some(Some(meta)) = self.groups.get(&pg)
            && version.interval() > meta.promised
        {
            let promised = meta.promised;
            self.found(
                home,
                object,
                format!("version {version} is newer than the promised interval {promised}"),
            );
        }
    }

    fn take_slot(&mut self, pg: PgId, object: ObjectId, chunk: &ChunkRecord) {
        let Some(slot) = chunk.slot else { return };
        if slot >= self.slots {
            self.found(pg, object, format!("slot {slot} is beyond the device of {} slots", self.slots));
            return;
        }
        let (word, bit) = (slot as usize / u64::BITS as usize, 1 << (slot % u64::BITS));
        if self.used[word] & bit != 0 && self.twice.len() < PROBLEMS_MAX {
            self.twice.insert(slot);
        }
        self.used[word] |= bit;
    }

    /// The record of a chunk's or block's object.
    fn owner<K: Kv>(
        &mut self,
        index: &super::view::Index<K>,
        pg: PgId,
        object: ObjectId,
    ) -> Result<Option<ObjectRecord>, StoreError> {
        if let Some((last, record)) = &self.owner
            && *last == (pg, object)
        {
            return Ok(*record);
        }
        let value = index.peek(&layout::object_key(kind::OBJECT, pg, object))?;
        // One that cannot be read has been named.
        let record = value.and_then(|v| layout::decode(v.record().ok()?).ok());
        self.owner = Some(((pg, object), record));
        Ok(record)
    }
}
