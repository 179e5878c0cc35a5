//! Rows of some shards, read or decoded.

use super::super::intake::Intake;
use super::super::member::sub_result;
use super::*;
use crate::core::Damage;
use crate::erasure::{Rows, content_of, rows_of};
use gabion_proto::blocks::Content;

/// A shard that does not come for this long is made up for by another one.
const LATE_MS: Millis = 1_000;
/// Unanswered questions are asked again after this long.
const ASK_AGAIN_MS: Millis = 500;
/// A member of an earlier interval that does not answer for this long is not asked for the object any more.
const GIVE_UP_MS: Millis = 4_000;
/// What could not be gathered for recovery is tried again after this long.
const AGAIN_MS: Millis = 2_000;

/// Who wants the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    Read {
        token: ClientToken,
        first_block: u32,
        block_count: u32,
    },
    Write {
        tid: u64,
    },
    /// Old parity that its holder cannot read, and that a write adds to.
    Parity {
        tid: u64,
        shard: u8,
    },
    Recovery,
}

#[derive(Debug)]
pub(super) struct Asked {
    pub(super) member: OsdId,
    pub(super) first: Millis,
    last: Millis,
    /// Others make up for it.
    pub(super) passed: bool,
}

impl Asked {
    /// Ever later: a busy member has the question already.
    fn is_due(&self, now: Millis) -> bool {
        now >= self.last + ASK_AGAIN_MS.max(self.last - self.first)
    }
}

#[derive(Debug)]
pub struct Gather {
    pub purpose: For,
    pub object: ObjectId,
    version: Version,
    /// First of the rows that are wanted, and how many there are up to the last.
    rows: (u32, u32),
    /// Those that are being read: a run of them, until some cannot be read; then half by half, down to single rows.
    piece: (u32, u32),
    todo: Vec<(u32, u32)>,
    pub(super) piecewise: bool,
    pub(super) wanted: BTreeSet<u8>,
    /// What came of the wanted shards of earlier pieces. Nothing of rows that are not wanted.
    done: BTreeMap<u8, Rows>,
    pub(super) parts: BTreeMap<u8, Rows>,
    pub(super) asked: BTreeMap<u8, Asked>,
    pub(super) bad: BTreeSet<u8>,
    /// Never asked for.
    barred: BTreeSet<u8>,
    /// Some shard was there and could not be read.
    unreadable: bool,
    /// More was asked for than would do, because something was late.
    pub(super) hedged: bool,
    /// Members that are not asked, as long as there are others.
    pub(super) shunned: BTreeSet<OsdId>,
}

impl Shards {
    /// Members that owe rows, since when, and whether a client's write waits for them.
    pub fn late(&self) -> impl Iterator<Item = (OsdId, Millis, bool)> + '_ {
        let writes = |g: &Gather| matches!(g.purpose, For::Write { .. } | For::Parity { .. });
        let asked = self.gathers.values().flat_map(move |g| g.asked.values().map(move |a| (a, writes(g))));
        asked.map(|(a, write)| (a.member, a.first, write))
    }

    /// Objects to be recovered of which all shards that have not come are late, and none of them is the own one.
    pub fn stalled_recovery(&self, own: OsdId, now: Millis) -> BTreeSet<ObjectId> {
        let late = |a: &Asked| a.member != own && now >= a.last + recovery::PASSED_MS;
        let stalled =
            |g: &&Gather| g.purpose == For::Recovery && !g.asked.is_empty() && g.asked.values().all(late);
        self.gathers.values().filter(stalled).map(|g| g.object).collect()
    }

    /// Old parity of a shard is being decoded for a write.
    pub fn decodes(&self, tid: u64, shard: u8) -> bool {
        self.is_gathering(For::Parity { tid, shard })
    }

    pub fn is_gathering(&self, purpose: For) -> bool {
        self.gathers.values().any(|g| g.purpose == purpose)
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
        a.reads.insert(work.token, ops::Read::of(work, cx.now));
        let wanted = (first_block..first_block + block_count).take(geometry.k.into());
        let wanted = wanted.map(|b| geometry.place(b).0).collect();
        let purpose = For::Read { token: work.token, first_block, block_count };
        cx.latency.read_begun(self.id, cx.now);
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
        rows: (u32, u32),
        wanted: BTreeSet<u8>,
    ) {
        self.gather_runs(cx, purpose, object, vec![rows], wanted);
    }

    /// Runs of rows, in order, one after the other: what is between them is not read.
    pub(super) fn gather_runs(
        &mut self,
        cx: &mut Cx<'_>,
        purpose: For,
        object: ObjectId,
        mut runs: Vec<(u32, u32)>,
        wanted: BTreeSet<u8>,
    ) {
        let (Some((first, _)), Some((last, count))) = (runs.first().copied(), runs.last().copied()) else {
            return;
        };
        let rows = (first, last + count - first);
        runs.reverse();
        let Some(piece) = runs.pop() else { return };
        let version = match purpose {
            For::Recovery => self.needed_version(&object),
            _ => self.acked(&object),
        };
        let Phase::Active(a) = &mut self.phase else { return };
        let tid = a.next_tid();
        let barred = match purpose {
            For::Parity { tid, .. } => a.shards_owed(tid, &self.record.acting),
            _ => BTreeSet::new(),
        };
        let gather = Gather {
            purpose,
            object,
            version,
            rows,
            piece,
            todo: runs,
            piecewise: false,
            done: wanted.iter().map(|n| (*n, vec![None; rows.1 as usize])).collect(),
            wanted,
            parts: BTreeMap::new(),
            asked: BTreeMap::new(),
            bad: barred.clone(),
            barred,
            unreadable: false,
            hedged: false,
            shunned: BTreeSet::new(),
        };
        a.shards.gathers.insert(tid, gather);
        self.shun(cx, tid);
        self.gather_on(cx, tid);
    }

    /// What a lost shard must be computed at.
    fn needed_version(&self, object: &ObjectId) -> Version {
        let Phase::Active(a) = &self.phase else { return Version::ZERO };
        a.recovery.lacking(object).values().map(|(_, n)| n.version).next().unwrap_or(Version::ZERO)
    }

    /// Asks for what is still needed, or goes on with what came.
    pub(super) fn gather_on(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Some(k) = self.geometry().map(|g| usize::from(g.k)) else { return };
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(g) = a.shards.gathers.get_mut(&tid) else { return };
        if g.wanted.iter().all(|n| g.parts.contains_key(n)) || g.parts.len() >= k {
            return self.gathered(cx, tid);
        }
        let up = |o: &OsdId| *o == cx.id || cx.map.up_osd(*o).is_some();
        // Members of earlier intervals come and go without a new one.
        g.asked.retain(|_, a| up(&a.member));
        let mut free = a.recovery.holders(&g.object, g.piecewise || g.purpose != For::Recovery);
        free.retain(|n, o| {
            let asked = g.parts.contains_key(n) || g.asked.contains_key(n);
            up(o) && !asked && !g.bad.contains(n) && !g.shunned.contains(o)
        });
        if !g.shunned.is_empty() && g.parts.len() + g.asked.len() + free.len() < k {
            g.shunned.clear();
            return self.gather_on(cx, tid);
        }
        let is_late = |a: &Asked| a.passed || cx.now >= a.first + LATE_MS;
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
            g.asked.insert(*n, Asked { member: *member, first: cx.now, last: cx.now, passed: false });
        }
        for (_, member) in ask {
            self.ask_rows(cx, tid, member);
        }
    }

    fn ask_rows(&mut self, cx: &mut Cx<'_>, tid: u64, member: OsdId) {
        let Some(g) = self.shards().and_then(|s| s.gathers.get(&tid)) else { return };
        let (object, version, (first_row, row_count)) = (g.object, g.version, g.piece);
        if member != cx.id {
            let body = PeerBody::ShardRead { tid, object, version, first_row, row_count };
            return self.send(cx, member, body, Bytes::new());
        }
        self.read_own_rows(cx, What::OwnRows { tid }, object, version, (first_row, row_count));
    }

    /// Rows of the own shard, which holds `version`, perhaps still pending.
    pub(in super::super) fn read_own_rows(
        &mut self,
        cx: &mut Cx<'_>,
        what: What,
        object: ObjectId,
        version: Version,
        (first_block, block_count): (u32, u32),
    ) {
        // Rule E2: of exactly that version, not of what is newest here.
        let any = !cx.rules.keep(Rule::OneVersion);
        let pending = self
            .index
            .objects
            .get(&object)
            .is_some_and(|h| (h.version == version || any) && h.base.is_some());
        let (token, pg) = (self.token(cx, what), self.id);
        cx.out.push(match pending {
            true => Effect::ReadPending { token, pg, object, first_block, block_count },
            false => Effect::Read { token, pg, object, below: Vec::new(), first_block, block_count },
        });
    }

    pub(in super::super) fn gather_again(&mut self, cx: &mut Cx<'_>) {
        let (own, now) = (cx.id, cx.now);
        let Phase::Active(active) = &mut self.phase else { return };
        let shards = &mut active.shards;
        let mut again = Vec::new();
        for (tid, g) in &mut shards.gathers {
            // A member of the past that does not answer is nobody's to report: others have their turn.
            let silent = |a: &&mut Asked| now >= a.first + GIVE_UP_MS;
            let silent: Vec<OsdId> = g.asked.values_mut().filter(silent).map(|a| a.member).collect();
            for member in silent.into_iter().filter(|m| active.recovery.give_up(g.object, *m)) {
                g.asked.retain(|_, a| a.member != member);
            }
            for a in g.asked.values_mut().filter(|a| a.member != own && a.is_due(now)) {
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
        self.rows_here(cx, cx.id, tid, result.map_err(rows_refused));
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
        if self.parity_rows(cx, from, tid, &result) {
            return;
        }
        let Phase::Active(a) = &mut self.phase else { return };
        if let Some((since, object)) = a.shards.overtaken.remove(&(tid, from)) {
            measure(cx, from, since);
            // Nobody waits, but a bad row is a bad row.
            if result.is_err_and(|why| why == SubResult::Io) && !a.has_writes(&object) {
                self.shard_unreadable(cx, from, object);
            }
            return;
        }
        let Some(g) = a.shards.gathers.get_mut(&tid) else { return };
        let Some(n) = g.asked.iter().find(|(_, a)| a.member == from).map(|(n, _)| *n) else { return };
        if let Some(asked) = g.asked.get(&n).filter(|_| g.purpose != For::Recovery) {
            measure(cx, from, asked.first);
        }
        match result {
            Ok(content) => {
                g.asked.remove(&n);
                g.parts.insert(n, rows_of(&content, g.piece.0, g.piece.1));
            }
            // Asked again by the timer.
            Err(SubResult::BadChecksum) => return,
            Err(why) => {
                g.asked.remove(&n);
                g.bad.insert(n);
                let object = g.object;
                if why == SubResult::Io && !is_removed(cx.map, &object) {
                    g.unreadable = true;
                    self.shard_unreadable(cx, from, object);
                }
            }
        }
        self.gather_on(cx, tid);
    }

    /// A member has its shard and cannot read it: it is computed anew.
    fn shard_unreadable(&mut self, cx: &mut Cx<'_>, member: OsdId, object: ObjectId) {
        if is_removed(cx.map, &object) {
            return;
        }
        tracing::warn!(pg = %self.id, %member, %object, "unreadable shard, computing it from others");
        cx.takes(Branch::LoseShard);
        let version = self.acked(&object);
        let Phase::Active(a) = &mut self.phase else { return };
        a.recovery.lose_shard(member, object, version);
        a.clean_reported = false;
    }

    fn gathering_failed(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let (away, known) = (self.record.acting.contains(&OsdId::NONE), self.record.all_known());
        let away = away || known.iter().any(|o| !self.record.acting.contains(o));
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(g) = a.shards.gathers.remove(&tid) else { return };
        let damaged = g.unreadable || a.recovery.is_damaged(&g.object);
        cx.takes(Branch::GatheringFailed);
        if damaged && (!g.piecewise || g.piece.1 > 1) {
            cx.takes(Branch::Piecewise);
            return self.gather_halves(cx, g);
        }
        match g.purpose {
            For::Read { token, .. } => {
                if a.reads.remove(&token).is_none() {
                    return;
                }
                // What is away may come back with what cannot be read here.
                if g.unreadable && !away {
                    self.reply(cx, token, OpReply::Failed(OpError::Io));
                } else {
                    self.retry(cx, token, RetryWhy::NotActive);
                }
            }
            For::Write { tid } => self.withdraw_write(cx, tid),
            // The member is sent its part again, says again that it cannot, and is left out in the end (rule P8).
            For::Parity { .. } => {}
            For::Recovery => {
                if damaged && !away {
                    a.scrub.damaged.insert(g.object, Damage::Unreadable);
                }
                // Members of earlier intervals that are down are nobody who can be reached: others are asked again.
                let down: Vec<OsdId> = a
                    .recovery
                    .holders(&g.object, true)
                    .into_values()
                    .filter(|o| *o != cx.id && cx.map.up_osd(*o).is_none())
                    .collect();
                for o in down {
                    a.recovery.give_up(g.object, o);
                }
                a.recovery.gathering_failed(g.object, cx.now + AGAIN_MS);
            }
        }
    }

    /// Other rows of a shard of which one cannot be read may be good.
    fn gather_halves(&mut self, cx: &mut Cx<'_>, mut g: Gather) {
        let (first, count) = g.piece;
        let half = count / 2;
        if half > 0 {
            g.todo.push((first + half, count - half));
        }
        g.piece = (first, half.max(1));
        g.piecewise = true;
        self.gather_piece(cx, g);
    }

    fn gather_piece(&mut self, cx: &mut Cx<'_>, mut g: Gather) {
        let Phase::Active(a) = &mut self.phase else { return };
        g.parts.clear();
        g.asked.clear();
        g.bad = g.barred.clone();
        g.unreadable = false;
        // A number of its own: late answers are of another piece.
        let tid = a.next_tid();
        a.shards.gathers.insert(tid, g);
        self.gather_on(cx, tid);
    }

    fn gathered(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Phase::Active(a) = &mut self.phase else { return };
        let (Some(mut g), Some(code)) = (a.shards.gathers.remove(&tid), self.code.clone()) else { return };
        let lost: Vec<u8> = g.wanted.iter().copied().filter(|n| !g.parts.contains_key(n)).collect();
        if g.hedged && !lost.is_empty() {
            self.counters.hedges_won += 1;
            cx.takes(Branch::HedgeDecoded);
        }
        if matches!(g.purpose, For::Read { .. }) {
            let object = g.object;
            a.shards.overtaken.extend(g.asked.values().map(|a| ((tid, a.member), (a.first, object))));
        }
        if !lost.is_empty() {
            if g.purpose != For::Recovery {
                cx.takes(Branch::Decode);
            }
            match code.compute(&g.parts, &lost) {
                Ok(computed) => g.parts.extend(computed),
                Err(error) => {
                    tracing::error!(pg = %self.id, object = %g.object, %error, "cannot decode");
                    a.shards.gathers.insert(tid, g);
                    return self.gathering_failed(cx, tid);
                }
            }
        }
        let at = (g.piece.0 - g.rows.0) as usize;
        for (n, rows) in &mut g.done {
            let came = g.parts.remove(n).unwrap_or_default();
            came.into_iter().zip(&mut rows[at..]).for_each(|(block, row)| *row = block);
        }
        if let Some(piece) = g.todo.pop() {
            g.piece = piece;
            return self.gather_piece(cx, g);
        }
        match g.purpose {
            For::Read { token, first_block, block_count } => {
                let blocks = (first_block..first_block + block_count).map(|b| {
                    let (shard, row) = code.geometry().place(b);
                    let rows = g.done.get(&shard);
                    (b, rows.and_then(|r| r.get((row - g.rows.0) as usize)?.clone()))
                });
                self.read_gathered(cx, token, content_of(blocks.filter(|(_, b)| b.is_some())));
            }
            For::Write { tid } => self.encode_write(cx, tid, g.rows.0, &g.done),
            For::Parity { tid, shard } => {
                if let Some(old) = g.done.get(&shard) {
                    self.parity_decoded(cx, tid, shard, g.rows.0, old);
                }
            }
            For::Recovery => self.shards_computed(cx, g.object, g.version, g.done),
        }
    }

    fn read_gathered(&mut self, cx: &mut Cx<'_>, token: ClientToken, content: Content) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(read) = a.reads.remove(&token) else { return };
        // Rule P6: the lease was good when the bytes were read.
        if cx.has_lease() {
            // What was removed meanwhile may have been purged before it was read.
            if let Err(reply) = self.fence(cx, read.op()) {
                self.reply(cx, token, reply);
                return self.resume(cx);
            }
            self.counters.reads += 1;
            self.counters.read_bytes += content.data.len() as u64;
            let reply = OpReply::Data { extents: content.extents };
            cx.out.push(Effect::Reply { token, reply, data: content.data });
        } else {
            cx.takes(Branch::LeaseRanOut);
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
        let shard = |(n, member): (&u8, &OsdId)| {
            let rows = parts.get(n)?;
            Some((*member, crate::erasure::sparse_content((0..).zip(rows.iter().cloned()))))
        };
        a.recovery.keep_computed(&object, lacking.iter().filter_map(shard).collect());
        let over = a.recovery.repairs_of(&object);
        for (n, member) in lacking {
            let Phase::Active(a) = &mut self.phase else { return };
            if !parts.contains_key(&n) {
                continue;
            }
            let over = over.get(&member).copied();
            if member == cx.id {
                self.begin_intake(cx, object, Intake::new(cx.id, tid, version, over, cx.now), None);
                continue;
            }
            // Who has an older shard compares it first.
            let (mut piece, mut data) = (None, Bytes::new());
            if !a.recovery.has_older(member, &object) {
                (piece, data) = match self.computed_piece(cx, member, object, 0, &[]) {
                    Some((image, data)) => (Some(image), data),
                    None => continue,
                };
            }
            let begun = piece.is_some();
            self.send(cx, member, PeerBody::Push { tid, object, version, deleted: false, over, piece }, data);
            if let Phase::Active(a) = &mut self.phase {
                a.recovery.offered(&object, member, begun, cx.now);
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
        // What is being read is answered once.
        let asked_before = self.member().is_some_and(|m| m.serving.contains(&(from, tid)));
        if self.member().is_none() || (acting && !active) || asked_before {
            return;
        }
        let here = self.index.objects.get(&object).is_some_and(|h| {
            // The rows do not change while they are asked for, so a later version of an acting member has them, too.
            let later = acting && h.version > version && h.base.is_none_or(|b| b >= version);
            h.version == version || h.base == Some(version) || later || !cx.rules.keep(Rule::OneVersion)
        });
        let within =
            row_count > 0 && first_row.checked_add(row_count).is_some_and(|end| end <= OBJECT_BLOCKS);
        // What this member holds of an object that it misses is older; from outside the acting set that may be what is asked for.
        let missing = self.index.missing.get(&object).is_some_and(|n| acting || n.version == version);
        if !here || !within || missing {
            let body = PeerBody::ShardData { tid, result: Err(SubResult::Missing) };
            return self.send(cx, from, body, Bytes::new());
        }
        if let Some(m) = self.member() {
            m.serving.insert((from, tid));
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
        if let Some(m) = self.member() {
            m.serving.remove(&(to, tid));
        }
        let (result, data) = match result {
            Ok(content) => (Ok(content.extents), content.data),
            Err(e) => (Err(rows_refused(e)), Bytes::new()),
        };
        self.send(cx, to, PeerBody::ShardData { tid, result }, data);
    }
}

/// A member, other than this one, whose disk is measured by itself, has answered.
fn measure(cx: &mut Cx<'_>, from: OsdId, since: Millis) {
    if from != cx.id {
        cx.latency.took(from, Kind::Read, cx.now.saturating_sub(since));
    }
}

/// Rows that cannot be read are to be computed; a disk that is about to stop its OSD says nothing of them.
fn rows_refused(e: StoreError) -> SubResult {
    match e {
        StoreError::Fatal(_) => SubResult::Missing,
        e => sub_result(&e),
    }
}
