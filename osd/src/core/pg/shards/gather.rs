//! Rows of some shards, read or decoded.

use super::super::member::sub_result;
use super::*;
use crate::erasure::{Rows, content_of, rows_of};
use gabion_proto::blocks::Content;

/// A shard that does not come for this long is made up for by another one.
const LATE_MS: Millis = 1_000;
/// Unanswered questions are asked again after this long.
const ASK_AGAIN_MS: Millis = 500;
/// What could not be gathered for recovery is tried again after this long.
const AGAIN_MS: Millis = 2_000;

/// Who wants the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    Read { token: ClientToken, first_block: u32, block_count: u32 },
    Write { tid: u64 },
    Recovery,
}

#[derive(Debug)]
struct Asked {
    member: OsdId,
    first: Millis,
    last: Millis,
}

#[derive(Debug)]
pub struct Gather {
    pub purpose: For,
    pub object: ObjectId,
    version: Version,
    first_row: u32,
    row_count: u32,
    wanted: BTreeSet<u8>,
    parts: BTreeMap<u8, Rows>,
    asked: BTreeMap<u8, Asked>,
    bad: BTreeSet<u8>,
    /// Some shard was there and could not be read.
    unreadable: bool,
}

impl Shards {
    /// Members that owe rows, and since when.
    pub fn late(&self) -> impl Iterator<Item = (OsdId, Millis)> + '_ {
        self.gathers.values().flat_map(|g| g.asked.values()).map(|a| (a.member, a.first))
    }
}

impl Pg {
    fn shards(&mut self) -> Option<&mut Shards> {
        match &mut self.phase {
            Phase::Active(a) => Some(&mut a.shards),
            _ => None,
        }
    }

    /// A client's read: of `rows`, or of nothing that was ever written.
    pub(super) fn read_rows(
        &mut self,
        cx: &mut Cx<'_>,
        work: &ClientWork,
        rows: Option<(u32, u32)>,
        (first_block, block_count): (u32, u32),
    ) {
        let (Some(geometry), Some(rows)) = (self.geometry(), rows) else {
            self.counters.reads += 1;
            return self.reply(cx, work.token, OpReply::Data { extents: Vec::new() });
        };
        let Phase::Active(a) = &mut self.phase else { return };
        a.reads.insert(work.token, ops::Read::of(work));
        let wanted = (first_block..first_block + block_count).take(geometry.k.into());
        let wanted = wanted.map(|b| geometry.place(b).0).collect();
        let purpose = For::Read { token: work.token, first_block, block_count };
        self.gather(cx, purpose, work.op().object, rows, wanted);
    }

    /// Reads what is needed to compute the shards that members lack.
    pub(in super::super) fn gather_lost(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let object_bytes = cx.map.pools.get(&self.id.pool).map_or(0, |p| p.object_bytes);
        let held = self.index.objects.get(&object).copied();
        let (Some(geometry), Phase::Active(a)) = (self.geometry(), &mut self.phase) else { return };
        let tid = a.next_tid();
        a.recovery.begin_gathering(object, tid, held.map(|h| h.version), cx.now);
        let wanted = a.recovery.lacking(&object).into_keys().collect();
        let rows = (0, geometry.all_rows(object_bytes / BLOCK_BYTES));
        self.gather(cx, For::Recovery, object, rows, wanted);
    }

    pub(super) fn gather(
        &mut self,
        cx: &mut Cx<'_>,
        purpose: For,
        object: ObjectId,
        (first_row, row_count): (u32, u32),
        wanted: BTreeSet<u8>,
    ) {
        let version = match purpose {
            For::Recovery => self.needed_version(&object),
            _ => self.acked(&object),
        };
        let Phase::Active(a) = &mut self.phase else { return };
        let tid = a.next_tid();
        let gather = Gather {
            purpose,
            object,
            version,
            first_row,
            row_count,
            wanted,
            parts: BTreeMap::new(),
            asked: BTreeMap::new(),
            bad: BTreeSet::new(),
            unreadable: false,
        };
        a.shards.gathers.insert(tid, gather);
        self.gather_on(cx, tid);
    }

    /// What a lost shard must be computed at.
    fn needed_version(&self, object: &ObjectId) -> Version {
        let Phase::Active(a) = &self.phase else { return Version::ZERO };
        a.recovery.lacking(object).values().map(|(_, n)| n.version).next().unwrap_or(Version::ZERO)
    }

    /// Asks for what is still needed, or goes on with what came.
    fn gather_on(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Some(k) = self.geometry().map(|g| usize::from(g.k)) else { return };
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(g) = a.shards.gathers.get_mut(&tid) else { return };
        if g.wanted.iter().all(|n| g.parts.contains_key(n)) || g.parts.len() >= k {
            return self.gathered(cx, tid);
        }
        let up = |o: &OsdId| *o == cx.id || cx.map.up_osd(*o).is_some();
        // Members of earlier intervals come and go without a new one.
        g.asked.retain(|_, a| up(&a.member));
        let mut free = a.recovery.holders(&g.object, g.purpose != For::Recovery);
        free.retain(|n, o| {
            up(o) && !g.parts.contains_key(n) && !g.asked.contains_key(n) && !g.bad.contains(n)
        });
        let is_late = |a: &Asked| cx.now >= a.first + LATE_MS;
        let awaited = g.asked.values().filter(|a| !is_late(a)).count();
        let reachable = |n: &u8| {
            g.parts.contains_key(n) || free.contains_key(n) || g.asked.get(n).is_some_and(|a| !is_late(a))
        };
        let ask: Vec<(u8, OsdId)> = if g.wanted.iter().all(reachable) {
            g.wanted.iter().filter_map(|n| Some((*n, *free.get(n)?))).collect()
        } else {
            if g.parts.len() + g.asked.len() + free.len() < k {
                return self.gathering_failed(cx, tid);
            }
            let lacking = k.saturating_sub(g.parts.len() + awaited);
            let (first, rest): (Vec<_>, Vec<_>) =
                free.iter().map(|(n, o)| (*n, *o)).partition(|(n, _)| g.wanted.contains(n));
            first.into_iter().chain(rest).take(lacking).collect()
        };
        for (n, member) in &ask {
            g.asked.insert(*n, Asked { member: *member, first: cx.now, last: cx.now });
        }
        for (_, member) in ask {
            self.ask_rows(cx, tid, member);
        }
    }

    fn ask_rows(&mut self, cx: &mut Cx<'_>, tid: u64, member: OsdId) {
        let Some(g) = self.shards().and_then(|s| s.gathers.get(&tid)) else { return };
        let (object, version, first_row, row_count) = (g.object, g.version, g.first_row, g.row_count);
        if member != cx.id {
            let body = PeerBody::ShardRead { tid, object, version, first_row, row_count };
            return self.send(cx, member, body, Bytes::new());
        }
        self.read_own_rows(cx, What::OwnRows { tid }, object, version, (first_row, row_count));
    }

    /// Rows of the own shard, which holds `version`, perhaps still pending.
    fn read_own_rows(
        &mut self,
        cx: &mut Cx<'_>,
        what: What,
        object: ObjectId,
        version: Version,
        (first_block, block_count): (u32, u32),
    ) {
        let pending =
            self.index.objects.get(&object).is_some_and(|h| h.version == version && h.base.is_some());
        let (token, pg) = (self.token(cx, what), self.id);
        cx.out.push(match pending {
            true => Effect::ReadPending { token, pg, object, first_block, block_count },
            false => Effect::Read { token, pg, object, below: Vec::new(), first_block, block_count },
        });
    }

    pub(in super::super) fn gather_again(&mut self, cx: &mut Cx<'_>) {
        let (own, now) = (cx.id, cx.now);
        let Some(shards) = self.shards() else { return };
        let mut again = Vec::new();
        for (tid, g) in &mut shards.gathers {
            for a in g.asked.values_mut().filter(|a| a.member != own && now >= a.last + ASK_AGAIN_MS) {
                a.last = now;
                again.push((*tid, a.member));
            }
        }
        let all: Vec<u64> = shards.gathers.keys().copied().collect();
        again.into_iter().for_each(|(tid, member)| self.ask_rows(cx, tid, member));
        all.into_iter().for_each(|tid| self.gather_on(cx, tid));
    }

    pub(in super::super) fn own_rows_read(
        &mut self,
        cx: &mut Cx<'_>,
        tid: u64,
        result: Result<Content, StoreError>,
    ) {
        self.rows_here(cx, cx.id, tid, result.map_err(|e| sub_result(&e)));
    }

    pub(in super::super) fn rows_came(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        result: Result<Vec<Extent>, SubResult>,
        data: Bytes,
    ) {
        let content = result.and_then(|extents| {
            let content = Content { extents, data };
            content.validate(true).map(|()| content).map_err(|_| SubResult::BadChecksum)
        });
        self.rows_here(cx, from, tid, content);
    }

    fn rows_here(&mut self, cx: &mut Cx<'_>, from: OsdId, tid: u64, result: Result<Content, SubResult>) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(g) = a.shards.gathers.get_mut(&tid) else { return };
        let Some(n) = g.asked.iter().find(|(_, a)| a.member == from).map(|(n, _)| *n) else { return };
        match result {
            Ok(content) => {
                g.asked.remove(&n);
                g.parts.insert(n, rows_of(&content, g.first_row, g.row_count));
            }
            // Asked again by the timer.
            Err(SubResult::BadChecksum) => return,
            Err(why) => {
                g.asked.remove(&n);
                g.bad.insert(n);
                let object = g.object;
                if why == SubResult::Io {
                    g.unreadable = true;
                    tracing::warn!(pg = %self.id, member = %from, %object, shard = n, "unreadable shard, computing it from others");
                    let version = self.acked(&object);
                    let Phase::Active(a) = &mut self.phase else { return };
                    a.recovery.lose_shard(from, object, version);
                    a.clean_reported = false;
                }
            }
        }
        self.gather_on(cx, tid);
    }

    fn gathering_failed(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(g) = a.shards.gathers.remove(&tid) else { return };
        match g.purpose {
            For::Read { token, .. } => {
                if a.reads.remove(&token).is_none() {
                    return;
                }
                // All that is there was tried; what is away may come back.
                if g.unreadable {
                    self.reply(cx, token, OpReply::Failed(OpError::Io));
                } else {
                    self.retry(cx, token, RetryWhy::NotActive);
                }
            }
            For::Write { tid } => {
                // Nothing of it was sent to anybody.
                let mut write = a.writes.remove(&tid);
                for token in write.iter_mut().flat_map(|w| w.take_tokens()) {
                    self.retry(cx, token, RetryWhy::NotActive);
                }
            }
            For::Recovery => a.recovery.gathering_failed(g.object, cx.now + AGAIN_MS),
        }
    }

    fn gathered(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Phase::Active(a) = &mut self.phase else { return };
        let (Some(mut g), Some(code)) = (a.shards.gathers.remove(&tid), self.code.clone()) else { return };
        let lost: Vec<u8> = g.wanted.iter().copied().filter(|n| !g.parts.contains_key(n)).collect();
        if !lost.is_empty() {
            match code.compute(&g.parts, &lost) {
                Ok(computed) => g.parts.extend(computed),
                Err(error) => {
                    tracing::error!(pg = %self.id, object = %g.object, %error, "cannot decode");
                    g.unreadable = true;
                    a.shards.gathers.insert(tid, g);
                    return self.gathering_failed(cx, tid);
                }
            }
        }
        match g.purpose {
            For::Read { token, first_block, block_count } => {
                let blocks = (first_block..first_block + block_count).map(|b| {
                    let (shard, row) = code.geometry().place(b);
                    let rows = g.parts.get(&shard);
                    (b, rows.and_then(|r| r.get((row - g.first_row) as usize)?.clone()))
                });
                self.read_gathered(cx, token, content_of(blocks.filter(|(_, b)| b.is_some())));
            }
            For::Write { tid } => self.encode_write(cx, tid, g.first_row, &g.parts),
            For::Recovery => self.shards_computed(cx, g.object, g.version, g.parts),
        }
    }

    fn read_gathered(&mut self, cx: &mut Cx<'_>, token: ClientToken, content: Content) {
        let Phase::Active(a) = &mut self.phase else { return };
        if a.reads.remove(&token).is_none() {
            return;
        }
        // Rule P6: the lease was good when the bytes were read.
        if cx.has_lease() {
            self.counters.reads += 1;
            self.counters.read_bytes += content.data.len() as u64;
            let reply = OpReply::Data { extents: content.extents };
            cx.out.push(Effect::Reply { token, reply, data: content.data });
        } else {
            self.retry(cx, token, RetryWhy::NotActive);
        }
        self.resume(cx);
    }

    /// What members lack is known: everybody gets its shard.
    fn shards_computed(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        version: Version,
        parts: BTreeMap<u8, Rows>,
    ) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some((tid, lacking)) = a.recovery.begin_pushing(&object, version, cx.now) else { return };
        for (n, member) in lacking {
            let Some(rows) = parts.get(&n) else { continue };
            let content = crate::erasure::sparse_content((0..).zip(rows.iter().cloned()));
            let bytes = content.data.len() as u64;
            self.recovered_bytes += bytes;
            self.counters.recovered_bytes += bytes;
            if member == cx.id {
                let op = TxnOp::Replace { object, version, deleted: false, content };
                self.submit(cx, What::Recovered { object }, vec![op]);
            } else {
                let image = ObjectImage { deleted: false, extents: content.extents };
                self.send(cx, member, PeerBody::Push { tid, object, version, image }, content.data);
            }
        }
    }

    /// At a member: rows of its shard, of exactly what the primary knows to be certain.
    pub(in super::super) fn serve_rows(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        object: ObjectId,
        version: Version,
        (first_row, row_count): (u32, u32),
    ) {
        let acting = self.record.acting.contains(&cx.id);
        let active = self.member().is_some_and(|m| m.active);
        if self.member().is_none() || (acting && !active) {
            return;
        }
        let here = self.index.objects.get(&object).is_some_and(|h| {
            // The rows do not change while they are asked for, so a later version of an acting member has them, too.
            let later = acting && h.version > version && h.base.is_none_or(|b| b >= version);
            h.version == version || h.base == Some(version) || later || !cx.rules.keep(Rule::OneVersion)
        });
        let within =
            row_count > 0 && first_row.checked_add(row_count).is_some_and(|end| end <= OBJECT_BLOCKS);
        if !here || !within || self.index.missing.contains_key(&object) {
            let body = PeerBody::ShardData { tid, result: Err(SubResult::Missing) };
            return self.send(cx, from, body, Bytes::new());
        }
        self.read_own_rows(cx, What::ServeRows { to: from, tid }, object, version, (first_row, row_count));
    }

    pub(in super::super) fn rows_read(
        &mut self,
        cx: &mut Cx<'_>,
        to: OsdId,
        tid: u64,
        result: Result<Content, StoreError>,
    ) {
        let (result, data) = match result {
            Ok(content) => (Ok(content.extents), content.data),
            Err(e) => (Err(sub_result(&e)), Bytes::new()),
        };
        self.send(cx, to, PeerBody::ShardData { tid, result }, data);
    }
}
