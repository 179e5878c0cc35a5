//! Erasure-coded groups: what differs from keeping whole copies.
//!
//! Position `n` of the acting set keeps shard `n` of every object (see [`crate::erasure`]). Peering, activation, fences,
//! leases and the order of operations are those of every group; this module adds:
//!
//! - *Gathering.* Rows are read from the shards that are wanted, or from any `k` when one of them is away, late or unreadable,
//!   and decoded. Rows that are being read are not written meanwhile, so all of them are of one version (E2).
//! - *Two phases.* A write computes parity from new and gathered old rows and is *prepared* on every acting member beside
//!   the committed version; shards that do not change get the new version only (E1). When all have it durable it is answered.
//!   It is committed where the next write or a timer (E3) says so. One write of an object at a time, so that a member never
//!   holds more than two versions; what waits meanwhile is written together in the next one.
//! - *Rolling back.* A version that was provably never acknowledged or shown is dropped by the activation, in the same transaction
//!   (see `history`): the version before it is with everybody. Otherwise the newest version is kept. While some acting member
//!   lacks one that may not have been acknowledged, it is neither shown nor committed (invariant 4).
//! - *Too few to serve* (rule E5). A group that has fewer members than min-size, but as many as decode, while an OSD is held back from an empty
//!   position because another shard of its may be needed, *fills*: it peers and activates as always, except that the monitors are not told, serves
//!   nothing, commits nothing, and recovers what is certain. When every member holds everything, the monitors let one stand in
//!   for whoever is held back and had its position, so that this OSD may take the empty one.
//! - *A member keeps its shard number.* The monitors give an OSD that may be needed for one shard no other one. What is left of another
//!   number when it takes its place is older than the last time the group was clean.

mod delta;
#[cfg(test)]
mod exhaustive;
mod gather;
mod hedge;
mod history;
mod write;

pub use delta::Adding;
pub use history::{pending, rollbacks, unsettled, wanted};

use super::ops::{ClientWork, range_of};
use super::*;
use crate::erasure::{Geometry, ReedSolomon};
use gabion_proto::blocks::Extent;
use gabion_proto::limits::{BLOCK_BYTES, OBJECT_BYTES_MAX};
use gather::{For, Gather};
use write::Uncommitted;

/// Blocks of the largest object.
const OBJECT_BLOCKS: u32 = OBJECT_BYTES_MAX / BLOCK_BYTES;

/// What an active primary of an erasure-coded group keeps.
#[derive(Debug, Default)]
pub struct Shards {
    gathers: BTreeMap<u64, Gather>,
    /// Rows that members were asked for and that others made up for: since when, and of what.
    overtaken: BTreeMap<(u64, OsdId), (Millis, ObjectId)>,
    uncommitted: BTreeMap<ObjectId, Uncommitted>,
}

impl Pg {
    /// The code of the group's pool, when its map is first seen.
    pub(super) fn choose_code(&mut self, cx: &Cx<'_>) {
        if self.code.is_some() {
            return;
        }
        let pool = cx.map.pools.get(&self.id.pool);
        let Some(geometry) = pool.and_then(|p| Geometry::of(p.redundancy)) else { return };
        match ReedSolomon::shared(geometry) {
            Ok(code) => self.code = Some(code),
            Err(error) => tracing::error!(pg = %self.id, osd = %cx.id, %error, "cannot serve this group"),
        }
    }

    fn geometry(&self) -> Option<Geometry> {
        self.code.as_ref().map(|c| c.geometry())
    }

    /// Whether bringing the members up to date may bring more of them, when there are too few to serve.
    pub(super) fn may_fill(&self, cx: &Cx<'_>) -> bool {
        let enough = self.geometry().is_some_and(|g| self.record.members().count() >= usize::from(g.k));
        enough && cx.rules.keep(Rule::Fill) && self.record.held_back().any(|o| cx.map.up_osd(o).is_some())
    }

    /// Somebody else may be held back now, or who was came back.
    pub(super) fn fill_again(&mut self, cx: &mut Cx<'_>) {
        let may = self.may_fill(cx);
        if let (Phase::Active(a), true) = (&mut self.phase, may) {
            a.clean_reported = false;
            self.recover(cx);
        }
    }

    /// Loaded: this OSD keeps the shard of its position from now on. False when it cannot, or not yet.
    pub(super) fn take_place(&mut self, cx: &mut Cx<'_>) -> bool {
        let pool = cx.map.pools.get(&self.id.pool);
        if self.code.is_none() && pool.is_some_and(|p| Geometry::of(p.redundancy).is_some()) {
            self.fail(cx, "erasure coding is not possible on this machine".into());
            return false;
        }
        let position = self.record.acting.iter().position(|o| *o == cx.id);
        let (Some(geometry), Some(number)) = (self.geometry(), position) else { return true };
        let place = geometry.shard(number as u8);
        let held = self.meta.shard.filter(|s| *s != place);
        let Some(held) = held else {
            self.meta.shard = Some(place);
            return true;
        };
        if self.record.past.iter().any(|p| p.acting.contains(&cx.id)) {
            self.fail(cx, format!("it holds {held:?}, which is needed, and was given {place:?}"));
            return false;
        }
        // Invariant 8: everything was on the members of an interval without this OSD, which the monitors called clean.
        tracing::info!(pg = %self.id, osd = %cx.id, ?held, ?place, "what an earlier place left is deleted");
        cx.takes(Branch::NewPlace);
        let meta = PgMeta { activated: Epoch(0), shard: Some(place), ..self.meta };
        self.remove_copy(cx, Some(meta));
        false
    }

    /// The newest version of an object that every acting member holds.
    fn acked(&self, object: &ObjectId) -> Version {
        if let Phase::Active(a) = &self.phase
            && let Some(w) = a.writes.values().find(|w| w.object == *object && w.is_sent())
        {
            return w.prev;
        }
        let held = self.index.objects.get(object).map(|h| h.version);
        held.or_else(|| self.index.missing.get(object).map(|n| n.version)).unwrap_or(Version::ZERO)
    }

    /// False: it must wait. See `start` of whole copies.
    pub(super) fn start_coded(
        &mut self,
        cx: &mut Cx<'_>,
        work: &ClientWork,
        first_block: u32,
        block_count: u32,
    ) -> bool {
        let Some(geometry) = self.geometry() else { return false };
        let (op, object) = (work.op(), work.op().object);
        let rows = geometry.rows(first_block, block_count);
        let overlap = |(first, count): (u32, u32)| first < rows.0 + rows.1 && rows.0 < first + count;
        let known = self.index.objects.contains_key(&object) || self.index.missing.contains_key(&object);
        let Phase::Active(a) = &mut self.phase else { return false };
        if let OpKind::Read { below, .. } = &op.kind {
            if !below.is_empty() {
                tracing::warn!(pg = %self.id, %object, "layers are not supported in erasure-coded pools");
                self.reply(cx, work.token, OpReply::Failed(OpError::Invalid));
                return true;
            }
            let written = |w: &writes::Write| {
                let rows = |r: &writes::Requested| overlap(geometry.rows(r.first_block, r.block_count));
                w.object == object && w.requested.iter().any(rows)
            };
            // Rule P5, and the row must stay of one version while it is read (E2).
            if cx.rules.keep(Rule::ReadsWaitForWrites) && a.writes.values().any(written) {
                cx.takes(Branch::ReadWaitsForWrite);
                return false;
            }
            let doubt = a.recovery.is_uncertain(&object) && cx.rules.keep(Rule::ReadsWaitForDoubt);
            if doubt || (known && a.recovery.holders(&object, true).len() < usize::from(geometry.k)) {
                a.recovery.demand(object);
                cx.takes(Branch::ReadWaitsForRecovery);
                return false;
            }
            self.read_rows(cx, work, known.then_some(rows), (first_block, block_count));
            return true;
        }
        if a.recovery.is_missing(&object) {
            a.recovery.demand(object);
            return false;
        }
        if a.scrub.holds(&object) {
            return false;
        }
        let read = |r: &ops::Read| {
            let range = range_of(r.op(), OBJECT_BLOCKS).unwrap_or((0, OBJECT_BLOCKS));
            r.op().object == object && overlap(geometry.rows(range.0, range.1))
        };
        if a.reads.values().any(read) {
            cx.takes(Branch::WriteWaitsForRead);
            return false;
        }
        if a.lacks_room(cx) && !matches!(op.kind, OpKind::Zero { discard: true, .. }) {
            cx.takes(Branch::NoRoom);
            self.reply(cx, work.token, OpReply::Failed(OpError::NoSpace));
            return true;
        }
        self.open_write(cx, work, (first_block, block_count))
    }
}
