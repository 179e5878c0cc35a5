//! Small writes: parity changes by what is added to it (rule E2).
//!
//! Parity is linear. When some data blocks of a row change, each parity block changes by a sum that depends on old and new content of
//! these blocks alone. The primary computes that sum; who keeps the parity reads its own old block, adds the sum, and prepares the
//! result beside the committed version like every other part of a write. What must hold:
//!
//! - *Once, to one version.* A sum names the version before the write (`prev`), and is added to the content of that one only. A member
//!   at any other version does not take it: a repeated one finds the version that it made. So the member compares when it comes, and
//!   again when the old rows are here.
//! - *In order.* While a member reads old rows it is still at `prev`: later writes of the object wait behind as early ones. An
//!   interval that ends drops all of it.
//! - *Never a guess.* Old parity that cannot be read is answered with `Unreadable`. When all others have the write the primary decodes
//!   what it was from `k` of them, at `prev`, which they keep beneath the new version, since a write that one owes is committed
//!   nowhere. It adds the sum and sends that member the rows as they will be.

use super::*;
use crate::erasure::{Block, Rows, content_of, rows_of};
use gabion_proto::blocks::{Content, ExtentKind};

/// Steps until an old block is known: one of the own disk is read; another OSD is asked, reads, and answers.
const OWN_STEPS: usize = 1;
const ASKED_STEPS: usize = 3;

/// What it takes to read the old shards of an object.
pub(super) struct Costs {
    own: Option<u8>,
    held: BTreeSet<u8>,
    geometry: Geometry,
    /// Acting members that keep parity.
    parities: usize,
}

impl Costs {
    fn of(&self, shard: u8) -> usize {
        match self.held.contains(&shard) {
            true if self.own == Some(shard) => OWN_STEPS,
            true => ASKED_STEPS,
            // Decoded.
            false => ASKED_STEPS * usize::from(self.geometry.k),
        }
    }

    /// Whether the parity of a row is better added to, given which of its data blocks change and which it keeps. For that the `c`
    /// changed blocks are read, and each parity block where it is; or else the `k - c` kept ones. One block of 4+2: 3 steps (it is
    /// the primary's own) or 5, instead of 7 to 9; two blocks: 6 or 8, instead of 4 or 6. One of 2+1: 2 instead of 3 if it is
    /// the primary's own, or else 4 instead of 1.
    pub fn adds(&self, changed: &[u8], kept: &[u8]) -> bool {
        let steps = |shards: &[u8]| shards.iter().map(|n| self.of(*n)).sum::<usize>();
        steps(changed) + self.parities * OWN_STEPS < steps(kept)
    }
}

/// At a member: sums whose old rows are being read.
#[derive(Debug)]
pub struct Adding {
    tid: u64,
    version: Version,
    prev: Version,
    /// The version whose rows are read: `prev`.
    base: Version,
    whole: Content,
    added: Content,
    old: BTreeMap<u32, Option<Block>>,
    /// First rows of what is being read.
    reading: BTreeSet<u32>,
}

impl Pg {
    /// `None`: all parity is to be computed from whole rows.
    pub(super) fn costs(&self, cx: &Cx<'_>, object: &ObjectId) -> Option<Costs> {
        let (geometry, Phase::Active(a)) = (self.geometry()?, &self.phase) else { return None };
        // Of shards that do not fit, sums would keep it so.
        if a.scrub.damaged.contains_key(object) {
            return None;
        }
        let places = || self.record.acting.iter().zip(0u8..).filter(|(o, _)| **o != OsdId::NONE);
        Some(Costs {
            own: places().find(|(o, _)| **o == cx.id).map(|(_, n)| n),
            held: a.recovery.holders(object, true).into_keys().collect(),
            geometry,
            parities: places().filter(|(_, n)| *n >= geometry.k).count(),
        })
    }

    /// A member cannot read the old parity that it is to add to.
    pub(in super::super) fn parity_unreadable(&mut self, cx: &mut Cx<'_>, member: OsdId, tid: u64) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(w) = a.writes.get_mut(&tid).filter(|w| w.waiting.contains(&member)) else { return };
        w.unreadable.insert(member);
        self.decode_parity(cx, tid);
    }

    /// When all other members have the write: what cannot be read is decoded from what they have of the version before. Not sooner,
    /// and not from others: rows that are read as `prev` while the write is on its way there may be those of the write.
    pub(in super::super) fn decode_parity(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(w) = a.writes.get_mut(&tid).filter(|w| w.waiting.is_subset(&w.unreadable)) else { return };
        let object = w.object;
        w.decoding.get_or_insert(cx.now);
        let mut lost = Vec::new();
        for (member, shard) in self.record.acting.iter().zip(0u8..).filter(|(o, _)| w.waiting.contains(o)) {
            // Else it was sent what needs no old rows.
            let Some((SubWriteKind::Delta { added, .. }, _)) = w.part(*member) else { continue };
            let runs: Vec<_> = added.iter().map(|e| (e.first_block, e.block_count)).collect();
            let purpose = For::Parity { tid, shard };
            if !a.shards.is_gathering(purpose) {
                lost.push((*member, shard, purpose, runs));
            }
        }
        for (member, shard, purpose, runs) in lost {
            tracing::warn!(pg = %self.id, %member, %object, shard, "unreadable parity, computing it from other shards");
            cx.takes(Branch::DeltaUnreadable);
            self.gather_runs(cx, purpose, object, runs, BTreeSet::from([shard]));
        }
    }

    /// What the old parity was is known.
    pub(super) fn parity_decoded(
        &mut self,
        cx: &mut Cx<'_>,
        tid: u64,
        shard: u8,
        first_row: u32,
        old: &Rows,
    ) {
        let Some(member) = self.record.acting.get(usize::from(shard)).copied() else { return };
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(w) = a.writes.get_mut(&tid).filter(|w| w.waiting.contains(&member)) else { return };
        let Some((SubWriteKind::Delta { whole, added }, data)) = w.part(member) else { return };
        let (whole, added) = Content::pair(whole, added, data);
        let old = (first_row..).zip(old.iter().cloned()).collect();
        let content = sums(&whole, &added, &old);
        let (object, version, prev) = (w.object, w.version, w.prev);
        let part = (SubWriteKind::Write { extents: content.extents }, content.data);
        w.replace_part(member, part.clone());
        w.decoding = Some(cx.now);
        let (write, data) = part;
        self.send(cx, member, PeerBody::SubWrite { tid, object, version, prev, write }, data);
    }

    /// At a member that is at `base`, which is what the write names: reads the rows that are to be added to. `Err`: what is wrong with them.
    pub(in super::super) fn begin_adding(
        &mut self,
        cx: &mut Cx<'_>,
        w: member::Early,
        base: Version,
    ) -> Result<(), String> {
        let SubWriteKind::Delta { whole, added } = w.write else { return Err("nothing to add".into()) };
        let (whole, added) = Content::pair(whole, added, w.data);
        self.judge_delta(cx, &whole, &added)?;
        cx.takes(Branch::DeltaAdded);
        let runs: Vec<(u32, u32)> = match base {
            // There is nothing yet: zeros.
            Version::ZERO => Vec::new(),
            _ => added.extents.iter().map(|e| (e.first_block, e.block_count)).collect(),
        };
        let (object, version) = (w.object, w.version);
        let reading = runs.iter().map(|(first, _)| *first).collect();
        let (tid, prev, old) = (w.tid, w.prev, BTreeMap::new());
        // More than that comes again.
        let Some(m) = self.member().filter(|m| m.adding.len() < member::EARLY_MAX) else { return Ok(()) };
        m.adding.insert(object, Adding { tid, version, prev, base, whole, added, old, reading });
        for (first, count) in &runs {
            let what = What::OldParity { object, version, first_row: *first };
            self.read_own_rows(cx, what, object, base, (*first, *count));
        }
        if runs.is_empty() {
            self.add(cx, object);
        }
        Ok(())
    }

    /// Bytes of a peer: what is to be added must be data, in rows that there are, and not in those that are given.
    fn judge_delta(&self, cx: &Cx<'_>, whole: &Content, added: &Content) -> Result<(), String> {
        let Some(geometry) = self.geometry() else { return Err("no shards are kept here".into()) };
        whole.validate(true).and_then(|()| added.validate(true)).map_err(|e| e.to_string())?;
        let position = self.record.acting.iter().position(|o| *o == cx.id);
        if position.is_none_or(|n| n < usize::from(geometry.k)) {
            return Err("no parity is kept here".into());
        }
        let object_bytes = cx.map.pools.get(&self.id.pool).map_or(0, |p| p.object_bytes);
        let rows = geometry.all_rows(object_bytes / BLOCK_BYTES);
        let ends = |c: &Content| c.extents.last().map_or(0, |e| e.first_block + e.block_count);
        if ends(whole).max(ends(added)) > rows {
            return Err("rows are beyond the object".into());
        }
        if added.extents.iter().any(|e| e.kind == ExtentKind::Zero) {
            return Err("zeros are to be added".into());
        }
        let numbers = |c: &Content| {
            let runs = c.extents.iter().map(|e| e.first_block..e.first_block + e.block_count);
            runs.flatten().collect::<BTreeSet<u32>>()
        };
        match numbers(whole).is_disjoint(&numbers(added)) {
            true => Ok(()),
            false => Err("rows are given and to be added to".into()),
        }
    }

    /// At a member: old rows were read, and their checksums verified, or not.
    pub(in super::super) fn old_parity_read(
        &mut self,
        cx: &mut Cx<'_>,
        (object, version, first_row): (ObjectId, Version, u32),
        result: Result<Content, StoreError>,
    ) {
        let primary = self.record.primary;
        let Some(m) = self.member() else { return };
        let Some(x) = m.adding.get_mut(&object).filter(|x| x.version == version) else { return };
        if !x.reading.remove(&first_row) {
            return;
        }
        match result {
            Ok(content) => {
                let count = x.added.extents.iter().find(|e| e.first_block == first_row);
                let rows = rows_of(&content, first_row, count.map_or(0, |e| e.block_count));
                x.old.extend((first_row..).zip(rows));
                if x.reading.is_empty() {
                    self.add(cx, object);
                }
            }
            Err(e) => {
                let tid = x.tid;
                m.adding.remove(&object);
                // A disk that is about to stop its OSD says nothing of its rows.
                if let (Some(primary), false) = (primary, matches!(e, StoreError::Fatal(_))) {
                    tracing::warn!(pg = %self.id, osd = %cx.id, %object, error = %e, "old parity cannot be read");
                    let body = PeerBody::SubWriteAck { tid, result: SubResult::Unreadable };
                    self.send(cx, primary, body, Bytes::new());
                }
            }
        }
    }

    /// Old rows are all here: the write goes on as every other one.
    fn add(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let Some(x) = self.member().and_then(|m| m.adding.remove(&object)) else { return };
        let applying = self.member().is_some_and(|m| m.applying.contains(&object));
        let mut rows = x.added.extents.iter().flat_map(|e| e.first_block..e.first_block + e.block_count);
        let whole = x.base == Version::ZERO || rows.all(|row| x.old.contains_key(&row));
        // Purged, missed, or replaced meanwhile: the primary asks again, if it still wants to.
        let same = self.version_of(&object) == x.base && !self.index.missing.contains_key(&object);
        if !same || applying || !whole {
            return;
        }
        let content = sums(&x.whole, &x.added, &x.old);
        let ops = self.prepare_ops(object, x.prev, x.version, content);
        self.store_sub_write(cx, x.tid, object, (x.prev, x.version), ops);
        self.early_on(cx, object, x.version);
    }
}

/// What a member is sent. Who keeps data has nothing to add to.
pub(super) fn part(whole: Content, added: Content) -> (SubWriteKind, Bytes) {
    if added.extents.is_empty() {
        return (SubWriteKind::Write { extents: whole.extents }, whole.data);
    }
    let data = [&whole.data[..], &added.data[..]].concat().into();
    (SubWriteKind::Delta { whole: whole.extents, added: added.extents }, data)
}

/// Rows as they will be: those that are given, and the sums of old ones and what is added to them.
pub(super) fn sums(whole: &Content, added: &Content, old: &BTreeMap<u32, Option<Block>>) -> Content {
    let given = whole.extents.iter().flat_map(|e| {
        let rows = rows_of(whole, e.first_block, e.block_count);
        (e.first_block..).zip(rows)
    });
    let changed = added.extents.iter().flat_map(|e| {
        let rows = rows_of(added, e.first_block, e.block_count);
        let sum = |(n, row): (u32, Option<Block>)| (n, Block::sum(old.get(&n).unwrap_or(&None), &row));
        (e.first_block..).zip(rows).map(sum).collect::<Vec<_>>()
    });
    content_of(given.chain(changed).collect::<BTreeMap<u32, Option<Block>>>())
}
