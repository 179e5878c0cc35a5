//! Hedged reads: what does not come in time is asked of somebody else as well, and the first answer counts.
//! When that is, and how often it may be: `core/latency.rs`.
//!
//! *Erasure-coded groups* decode from other shards (`shards/gather.rs`).
//!
//! *Whole copies.* The primary reads its own copy; when its disk is late it asks one other member for the same blocks. Why that
//! answer may be shown (rules P5 and P6):
//!
//! - No write that overlaps the read, in whatever layer, is in flight when it begins or begins before it has ended. What the
//!   blocks hold is so durable on every acting member that does not miss the object, and a store's read sees
//!   everything that was durable when it was started: the member's blocks are those of the primary.
//! - Question and answer name the interval and both runs; only who has activated the interval answers.
//! - The answer counts only while the read waits: whichever comes first ends it, and only then may the blocks be written. A later
//!   one finds nobody who waits under its number.
//! - The primary needs its lease to answer, as ever: no later interval has served by then.
//! - A member whose map is newer may have purged what was removed: it looks at its map after it has read.
//!
//! An own read that was overtaken still occupies the disk. Of those, [`OVERTAKEN_MAX`] of a group may be under way; with
//! more, the other member is asked first, and the own disk only when it does not answer.

use super::member::sub_result;
use super::*;
use crate::core::latency::HEDGE_MAX_MS;
use gabion_proto::blocks::{Content, Extent};
use gabion_proto::limits::{BLOCK_BYTES, LAYERS_MAX, OBJECT_BYTES_MAX, OP_DATA_BYTES_MAX};

/// Own reads of one group that nobody waits for any more.
const OVERTAKEN_MAX: usize = 16;

/// After this long an answer is not expected any more.
const ANSWER_MS: Millis = 10_000;

/// A question to another member.
#[derive(Debug)]
pub struct Hedge {
    token: ClientToken,
    member: OsdId,
    since: Millis,
}

/// The objects that a read goes through, top layer first.
fn layers_of(object: ObjectId, below: &[LayerId]) -> impl Iterator<Item = ObjectId> + '_ {
    let lower = below.iter().map(move |layer| ObjectId { layer: *layer, ..object });
    std::iter::once(object).chain(lower)
}

impl Pg {
    /// Reads of this primary that have waited for long enough.
    pub fn hedge(&mut self, cx: &mut Cx<'_>) {
        if !cx.rules.keep(Rule::HedgedReads) {
            return;
        }
        if self.code.is_some() {
            return self.hedge_gathers(cx);
        }
        let (now, after) = (cx.now, cx.latency.hedge_ms());
        let Phase::Active(a) = &mut self.phase else { return };
        a.hedges.retain(|_, h| now < h.since + ANSWER_MS);
        let alone = a.reads.iter().filter(|(_, r)| r.hedge.is_none());
        let due: Vec<ClientToken> =
            alone.clone().filter(|(_, r)| now >= r.since + after).map(|(t, _)| *t).collect();
        let next = alone.map(|(_, r)| r.since + after).filter(|at| *at > now).min();
        let unanswered = a.reads.iter().filter(|(_, r)| !r.own && now >= r.since + HEDGE_MAX_MS);
        let unanswered: Vec<ClientToken> = unanswered.map(|(t, _)| *t).collect();
        if let Some(at) = next {
            cx.latency.wake(self.id, at);
        }
        for token in due {
            self.hedge_read(cx, token);
        }
        for token in unanswered {
            self.read_own(cx, token);
        }
    }

    /// A read that may begin: of the own copy, unless too many such reads are still under way for nobody.
    pub(super) fn begin_read(&mut self, cx: &mut Cx<'_>, token: ClientToken) {
        cx.latency.read_begun(self.id, cx.now);
        let Phase::Active(a) = &self.phase else { return };
        match a.overtaken.len() >= OVERTAKEN_MAX && self.hedge_read(cx, token) {
            true => cx.takes(Branch::HedgeFirst),
            false => self.read_own(cx, token),
        }
    }

    fn read_own(&mut self, cx: &mut Cx<'_>, token: ClientToken) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(read) = a.reads.get_mut(&token) else { return };
        read.own = true;
        let op = read.op();
        let OpKind::Read { first_block, block_count, below } = &op.kind else { return };
        let (object, below) = (op.object, below.clone());
        let (first_block, block_count) = (*first_block, *block_count);
        let token = self.token(cx, What::Read { token });
        cx.out.push(Effect::Read { token, pg: self.id, object, below, first_block, block_count });
    }

    /// Asks the member that answers fastest of those that hold the same; false: nobody is asked.
    fn hedge_read(&mut self, cx: &mut Cx<'_>, token: ClientToken) -> bool {
        let others = self.others(cx);
        let Phase::Active(a) = &mut self.phase else { return false };
        let tid = a.next_tid();
        let Some(read) = a.reads.get(&token) else { return false };
        let op = read.op();
        let OpKind::Read { first_block, block_count, below } = &op.kind else { return false };
        // Copies that differ, and nobody knows which is right: clients see one of them, always the same.
        if layers_of(op.object, below).any(|object| a.scrub.damaged.contains_key(&object)) {
            return false;
        }
        let lacks = |o: &OsdId| layers_of(op.object, below).any(|object| a.recovery.lacks(*o, &object));
        let holds = |o: &OsdId| !lacks(o) || !cx.rules.keep(Rule::HedgeHolders);
        let can = |o: &OsdId| cx.map.up_osd(*o).is_some() && !cx.latency.is_slow(*o) && holds(o);
        let turn = |o: &OsdId| (u64::from(o.0) + tid) % others.len() as u64;
        let member = others.iter().copied().filter(can).min_by_key(|o| (cx.latency.rank(*o), turn(o)));
        let Some(member) = member else { return false };
        if !cx.latency.spend_hedge([cx.id]) {
            return false;
        }
        let (object, below) = (op.object, below.clone());
        let (first_block, block_count) = (*first_block, *block_count);
        if let Some(read) = a.reads.get_mut(&token) {
            read.hedge = Some(tid);
        }
        a.hedges.insert(tid, Hedge { token, member, since: cx.now });
        self.counters.hedged_reads += 1;
        cx.takes(Branch::HedgeBlocks);
        let body = PeerBody::BlockRead { tid, object, below, first_block, block_count };
        self.send(cx, member, body, Bytes::new());
        true
    }

    pub(super) fn blocks_came(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        result: Result<Vec<Extent>, SubResult>,
        data: Bytes,
    ) {
        let Phase::Active(a) = &mut self.phase else { return };
        if a.hedges.get(&tid).is_none_or(|h| h.member != from) {
            return;
        }
        let Some(hedge) = a.hedges.remove(&tid) else { return };
        cx.latency.took(from, Kind::Read, cx.now.saturating_sub(hedge.since));
        let Some(read) = a.reads.get(&hedge.token).filter(|r| r.hedge == Some(tid)) else {
            return cx.takes(Branch::HedgeLate);
        };
        let asked = ops::range_of(read.op(), OBJECT_BYTES_MAX / BLOCK_BYTES);
        let within = |e: &Extent| {
            asked.is_some_and(|(first, count)| {
                e.first_block >= first && e.first_block + e.block_count <= first + count
            })
        };
        // What a scrub, or another read, has found out about that copy meanwhile counts.
        let OpKind::Read { below, .. } = &read.op().kind else { return };
        let knows_better = |o: ObjectId| a.scrub.damaged.contains_key(&o) || a.recovery.lacks(from, &o);
        let doubted =
            layers_of(read.op().object, below).any(knows_better) && cx.rules.keep(Rule::HedgeHolders);
        let content = result.map(|extents| Content { extents, data });
        let good = |c: &Content| c.validate(true).is_ok() && c.extents.iter().all(within);
        match content.ok().filter(|c| good(c) && !doubted) {
            Some(content) => {
                let Some(read) = a.reads.remove(&hedge.token) else { return };
                if read.own {
                    a.overtaken.insert(hedge.token);
                }
                self.counters.hedges_won += 1;
                cx.takes(Branch::HedgeWon);
                self.answer_read(cx, hedge.token, read, Ok(content));
                // Writes may have waited for it.
                self.resume(cx);
            }
            None if read.own => {}
            None => self.read_own(cx, hedge.token),
        }
    }

    /// At a member: blocks of its copy, which no write touches while the primary asks for them.
    pub(super) fn serve_blocks(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        (object, below): (ObjectId, Vec<LayerId>),
        (first_block, block_count): (u32, u32),
    ) {
        let coded = self.code.is_some();
        let Some(m) = self.member() else { return };
        if !m.active || coded || m.serving.contains(&(from, tid)) {
            return;
        }
        let end = first_block.checked_add(block_count);
        let within = end.is_some_and(|end| end <= OBJECT_BYTES_MAX / BLOCK_BYTES)
            && (1..=OP_DATA_BYTES_MAX / BLOCK_BYTES).contains(&block_count)
            && below.len() <= LAYERS_MAX;
        let layers: Vec<ObjectId> = layers_of(object, &below).take(LAYERS_MAX + 1).collect();
        let lacks = |o: &ObjectId| self.index.missing.contains_key(o) && cx.rules.keep(Rule::HedgeHolders);
        if !within || layers.iter().any(|o| lacks(o) || is_removed(cx.map, o)) {
            cx.takes(Branch::HedgeRefused);
            let body = PeerBody::BlockData { tid, result: Err(SubResult::Missing) };
            return self.send(cx, from, body, Bytes::new());
        }
        if let Some(m) = self.member() {
            m.serving.insert((from, tid));
        }
        let token = self.token(cx, What::ServeBlocks { to: from, tid, layers });
        cx.out.push(Effect::Read { token, pg: self.id, object, below, first_block, block_count });
    }

    pub(super) fn blocks_read(
        &mut self,
        cx: &mut Cx<'_>,
        (to, tid, layers): (OsdId, u64, Vec<ObjectId>),
        result: Result<Content, StoreError>,
    ) {
        if let Some(m) = self.member() {
            m.serving.remove(&(to, tid));
        }
        let (result, data) = match result {
            // The primary's map may be older.
            Ok(_) if layers.iter().any(|o| is_removed(cx.map, o)) => (Err(SubResult::Missing), Bytes::new()),
            Ok(content) => (Ok(content.extents), content.data),
            Err(StoreError::Fatal(_)) => (Err(SubResult::Missing), Bytes::new()),
            Err(e) => (Err(sub_result(&e)), Bytes::new()),
        };
        self.send(cx, to, PeerBody::BlockData { tid, result }, data);
    }
}
