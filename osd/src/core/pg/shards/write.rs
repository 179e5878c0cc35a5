//! Writes in two phases: gather old rows, compute parity, prepare everywhere; commit later.

use super::writes::{Requested, Write};
use super::*;
use crate::erasure::{Block, Rows, content_of, sparse_content};
use gabion_proto::blocks::Content;

/// A version that no later write or read commits is committed by a message of its own after this long (E3).
const COMMIT_AFTER_MS: Millis = 1_000;
/// And told again after this long.
const TELL_AGAIN_MS: Millis = 2_000;
/// Blocks between the ends of one write of several operations.
const JOINED_SPAN_MAX: u32 = 256;
/// Objects in one such message.
const COMMITS_AT_ONCE: usize = 256;

/// A version that every member holds and that may still be pending at some.
#[derive(Debug)]
pub struct Uncommitted {
    version: Version,
    members: BTreeSet<OsdId>,
    due: Millis,
}

impl Shards {
    pub fn new(pending: BTreeMap<ObjectId, (Version, BTreeSet<OsdId>)>, now: Millis) -> Shards {
        let uncommitted = pending
            .into_iter()
            .map(|(o, (version, members))| (o, Uncommitted { version, members, due: now + COMMIT_AFTER_MS }));
        Shards { uncommitted: uncommitted.collect(), ..Shards::default() }
    }
}

/// The new content of the blocks that an operation names; `None` is zeros.
fn new_blocks(op: &ClientOp, data: &Bytes) -> BTreeMap<u32, Option<Block>> {
    match &op.kind {
        OpKind::Read { .. } => BTreeMap::new(),
        OpKind::Zero { first_block, block_count, .. } => {
            (*first_block..first_block.saturating_add(*block_count)).map(|b| (b, None)).collect()
        }
        OpKind::Write { extents } => {
            let content = Content { extents: extents.clone(), data: data.clone() };
            extents
                .iter()
                .flat_map(|e| {
                    let rows = crate::erasure::rows_of(&content, e.first_block, e.block_count);
                    (e.first_block..).zip(rows)
                })
                .collect()
        }
    }
}

impl Pg {
    /// Takes a write whose turn it is in hand; false while an earlier one of the object is under way.
    pub(super) fn open_write(&mut self, cx: &mut Cx<'_>, work: &ClientWork, range: (u32, u32)) -> bool {
        let Phase::Active(a) = &mut self.phase else { return false };
        let object = work.op().object;
        let (requested, new) = (Requested::of(work, range), new_blocks(work.op(), work.data()));
        if let Some(w) = a.writes.values_mut().find(|w| w.object == object) {
            let joined = w.join(requested, &new, JOINED_SPAN_MAX);
            if joined {
                cx.takes(Branch::JoinedWrites);
            }
            return joined;
        }
        let tid = a.next_tid();
        a.writes.insert(tid, Write::open(requested, object, new, cx.now));
        true
    }

    /// Everything that could join has: first come whatever old rows the parity depends on.
    pub(in super::super) fn launch_writes(&mut self, cx: &mut Cx<'_>) {
        let Phase::Active(a) = &mut self.phase else { return };
        let open = a.writes.iter().filter(|(_, w)| w.is_open()).map(|(tid, _)| *tid).collect::<Vec<u64>>();
        open.into_iter().for_each(|tid| self.launch(cx, tid));
    }

    fn launch(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let (Some(geometry), Phase::Active(a)) = (self.geometry(), &mut self.phase) else { return };
        let Some(w) = a.writes.get_mut(&tid) else { return };
        let object = w.object;
        let Some(new) = w.close().cloned() else { return };
        let costs = self.costs(cx, &object);
        let rows: BTreeSet<u32> = new.keys().map(|b| geometry.place(*b).1).collect();
        // Old data that parity depends on: of what a row keeps, or of what changes.
        let mut wanted = BTreeSet::new();
        let mut added = BTreeSet::new();
        let mut partial: Option<(u32, u32)> = None;
        let known = self.index.objects.contains_key(&object);
        for row in rows.into_iter().filter(|_| known) {
            let (changed, kept): (Vec<u8>, Vec<u8>) =
                (0..geometry.k).partition(|n| new.contains_key(&geometry.block(*n, row)));
            if kept.is_empty() {
                continue;
            }
            partial = Some(partial.map_or((row, row), |(first, _)| (first, row)));
            if costs.as_ref().is_some_and(|c| c.adds(&changed, &kept)) {
                added.insert(row);
                wanted.extend(changed);
            } else {
                wanted.extend(kept);
            }
        }
        if !added.is_empty() {
            cx.takes(Branch::DeltaWrite);
            // Own parity is added to here.
            let own = self.record.acting.iter().position(|o| *o == cx.id).map(|n| n as u8);
            wanted.extend(own.filter(|n| *n >= geometry.k));
        }
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(w) = a.writes.get_mut(&tid) else { return };
        w.added = added;
        match partial {
            Some((first, last)) => {
                self.gather(cx, For::Write { tid }, object, (first, last - first + 1), wanted);
            }
            None => self.encode_write(cx, tid, 0, &BTreeMap::new()),
        }
    }

    /// Old rows are here: computes parity and sends every member its part.
    pub(super) fn encode_write(
        &mut self,
        cx: &mut Cx<'_>,
        tid: u64,
        first_row: u32,
        old: &BTreeMap<u8, Rows>,
    ) {
        let Some(code) = self.code.clone() else { return };
        let geometry = code.geometry();
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(w) = a.writes.get_mut(&tid) else { return };
        let object = w.object;
        if is_removed(cx.map, &object) {
            // Its objects are being deleted everywhere: nobody must make a new one.
            return self.withdraw_write(cx, tid);
        }
        let Some(new) = w.close().cloned() else { return };
        let sums: Vec<u32> = w.added.iter().copied().collect();
        let rows: BTreeSet<u32> = new.keys().map(|b| geometry.place(*b).1).collect();
        let whole: Vec<u32> = rows.iter().copied().filter(|r| !w.added.contains(r)).collect();
        let old_block = |n: u8, row: u32| {
            let at = row.checked_sub(first_row)? as usize;
            old.get(&n)?.get(at)?.clone()
        };
        let data: BTreeMap<u8, Rows> = (0..geometry.k)
            .map(|n| {
                let row = |r: &u32| match new.get(&geometry.block(n, *r)) {
                    Some(block) => block.clone(),
                    None => old_block(n, *r),
                };
                (n, whole.iter().map(row).collect())
            })
            .collect();
        let change = |n: u8, r: &u32| Some(Block::sum(new.get(&geometry.block(n, *r))?, &old_block(n, *r)));
        let changes: BTreeMap<u8, Rows> =
            (0..geometry.k).map(|n| (n, sums.iter().map(|r| change(n, r).flatten()).collect())).collect();
        let own_shard = self.record.acting.iter().position(|o| *o == cx.id).map(|n| n as u8);
        let known = self.index.objects.contains_key(&object);
        let keeps = |n: u8| known && whole.iter().any(|r| !new.contains_key(&geometry.block(n, *r)));
        let depends = |n: &u8| match *n < geometry.k {
            true => sums.iter().any(|r| change(*n, r).is_some()) || keeps(*n),
            false => Some(*n) == own_shard && !sums.is_empty(),
        };
        // Never zeros in place of what was not read.
        if (0..geometry.width()).filter(depends).any(|n| !old.contains_key(&n)) {
            return self.fail(cx, format!("old rows of {object} are not here, which its parity depends on"));
        }
        let parity: Vec<u8> = (geometry.k..geometry.width()).collect();
        let computed = code.compute(&data, &parity).and_then(|c| Ok((c, code.added(&changes)?)));
        let (computed, added) = match computed {
            Ok(computed) => computed,
            Err(error) => return self.fail(cx, format!("parity cannot be computed: {error}")),
        };
        let prev = self.version_of(&object);
        let Some(version) = prev.successor(self.record.interval) else {
            return self.fail(cx, format!("object {object} has no versions left in this interval"));
        };
        self.note_worn(version);
        // Rows as they will be, and what is to be added to others.
        let content = |n: u8| match computed.get(&n) {
            Some(parity) => {
                let added = added.get(&n).into_iter().flatten().cloned();
                (
                    content_of(whole.iter().copied().zip(parity.iter().cloned())),
                    sparse_content(sums.iter().copied().zip(added)),
                )
            }
            None => {
                let new = |r: &u32| Some((*r, new.get(&geometry.block(n, *r))?.clone()));
                (content_of(rows.iter().filter_map(new)), Content::default())
            }
        };
        let places = self.record.acting.iter().copied().zip(0u8..).filter(|(o, _)| *o != OsdId::NONE);
        let mut own = Content::default();
        let mut parts: BTreeMap<OsdId, (SubWriteKind, Bytes)> = BTreeMap::new();
        for (o, n) in places {
            let (whole, added) = content(n);
            if o == cx.id {
                let old = old.get(&n).into_iter().flatten().cloned();
                own = delta::sums(&whole, &added, &(first_row..).zip(old).collect());
            } else if cx.rules.keep(Rule::AllShards) || !whole.extents.is_empty() || !added.extents.is_empty()
            {
                parts.insert(o, delta::part(whole, added));
            }
        }
        let Phase::Active(a) = &mut self.phase else { return };
        a.shards.uncommitted.remove(&object);
        let Some(w) = a.writes.get_mut(&tid) else { return };
        w.send((prev, version), parts.clone(), cx.now);
        let ops = self.prepare_ops(object, prev, version, own);
        let ops = match cx.rules.keep(Rule::TwoPhases) {
            true => ops,
            false => ops.into_iter().chain([TxnOp::CommitPending { object, version }]).collect(),
        };
        self.index.objects.insert(object, Held { version, deleted: false, base: Some(prev) });
        self.submit(cx, What::Write { tid }, ops);
        for (o, (write, data)) in parts {
            self.send(cx, o, PeerBody::SubWrite { tid, object, version, prev, write }, data);
        }
    }

    /// Nothing of it was sent to anybody.
    pub(super) fn withdraw_write(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Phase::Active(a) = &mut self.phase else { return };
        let mut write = a.writes.remove(&tid);
        for token in write.iter_mut().flat_map(|w| w.take_tokens()) {
            self.retry(cx, token, RetryWhy::NotActive);
        }
    }

    /// The version that a recovered shard must not replace: the recovered one may have to go back to it, or is itself
    /// not committed yet. What it goes back to may be here beside a committed one: then it takes that one's place, since every member had it.
    pub(in super::super) fn kept_beside(&self, object: &ObjectId) -> Option<Version> {
        let held = self.index.objects.get(object);
        match self.index.missing.get(object) {
            _ if self.code.is_none() => None,
            Some(needed) if needed.uncertain.is_some() => {
                let held = held.map(|h| h.beneath(needed));
                held.or(self.index.beneath.get(object).copied()).or(Some(Version::ZERO))
            }
            Some(_) => None,
            None => held.and_then(|h| h.base),
        }
    }

    /// A whole shard beside `base`: every row is spelled out, or those of `base` would show through.
    pub(in super::super) fn beside_ops(
        &self,
        cx: &Cx<'_>,
        object: ObjectId,
        base: Version,
        version: Version,
        content: Content,
    ) -> Vec<TxnOp> {
        let blocks = cx.map.pools.get(&self.id.pool).map_or(OBJECT_BLOCKS, |p| p.object_bytes / BLOCK_BYTES);
        let rows = self.geometry().map_or(blocks, |g| g.all_rows(blocks));
        let content = content_of((0..).zip(crate::erasure::rows_of(&content, 0, rows)));
        // It may be pending. Nothing happens if it is committed.
        let commit = (base != Version::ZERO).then_some(TxnOp::CommitPending { object, version: base });
        let prepare = [TxnOp::Prepare { object, base, version, content }, TxnOp::DropMissing { object }];
        commit.into_iter().chain(prepare).collect()
    }

    /// A shard was recovered. When nobody lacks the object any more, what is pending of it may be committed.
    pub(in super::super) fn commit_recovered(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let held = self.index.objects.get(&object).map(|h| h.version);
        let Phase::Active(a) = &self.phase else { return };
        if !a.recovery.is_missing(&object)
            && let Phase::Active(a) = &mut self.phase
        {
            a.scrub.recovered(&object);
        }
        let Phase::Active(a) = &self.phase else { return };
        let idle = !a.recovery.is_missing(&object) && !a.has_writes(&object);
        if let (Some(version), true, true) = (held, idle, self.code.is_some()) {
            self.commit_later(cx, object, version);
        }
    }

    /// The new version beside the one before it, which everybody holds.
    pub(in super::super) fn prepare_ops(
        &self,
        object: ObjectId,
        prev: Version,
        version: Version,
        content: Content,
    ) -> Vec<TxnOp> {
        let pending = self.index.objects.get(&object).is_some_and(|h| h.version == prev && h.base.is_some());
        let commit = pending.then_some(TxnOp::CommitPending { object, version: prev });
        let prepare = TxnOp::Prepare { object, base: prev, version, content };
        commit.into_iter().chain([prepare]).collect()
    }

    /// Commits `version` here if it is the pending one: somebody who knows says that it is certain.
    pub(super) fn commit_held(&mut self, cx: &mut Cx<'_>, object: ObjectId, version: Version) {
        let held = self.index.objects.get_mut(&object);
        let Some(held) = held.filter(|h| h.version == version && h.base.is_some()) else { return };
        held.base = None;
        self.submit(cx, What::Housekeeping, vec![TxnOp::CommitPending { object, version }]);
    }

    /// Every member holds it.
    pub(in super::super) fn commit_later(&mut self, cx: &mut Cx<'_>, object: ObjectId, version: Version) {
        let members = self.record.members().collect();
        let Phase::Active(a) = &mut self.phase else { return };
        let due = cx.now + COMMIT_AFTER_MS;
        a.shards.uncommitted.insert(object, Uncommitted { version, members, due });
    }

    pub(in super::super) fn commit_lazily(&mut self, cx: &mut Cx<'_>) {
        let (own, now) = (cx.id, cx.now);
        // With so few members both versions may be needed.
        if self.fills {
            return;
        }
        let Phase::Active(a) = &mut self.phase else { return };
        let mut told: BTreeMap<OsdId, Vec<(ObjectId, Version)>> = BTreeMap::new();
        // What somebody still lacks may have to go back (invariant 4).
        let recovery = &a.recovery;
        let due = a.shards.uncommitted.iter_mut();
        for (o, u) in due.filter(|(o, u)| now >= u.due && !recovery.is_missing(o)).take(COMMITS_AT_ONCE) {
            u.due = now + TELL_AGAIN_MS;
            for m in &u.members {
                told.entry(*m).or_default().push((*o, u.version));
            }
        }
        for (member, objects) in told {
            if member == own {
                for (object, version) in &objects {
                    self.commit_held(cx, *object, *version);
                }
                self.commit_acked(own, &objects);
            } else {
                cx.takes(Branch::LazyCommit);
                self.send(cx, member, PeerBody::Commit { objects }, Bytes::new());
            }
        }
    }

    pub(in super::super) fn commit_told(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        objects: Vec<(ObjectId, Version)>,
    ) {
        if !self.member().is_some_and(|m| m.active) || objects.len() > COMMITS_AT_ONCE {
            return;
        }
        // What is being stored is what it was when it was offered: it is told again.
        let mut objects = objects;
        objects.retain(|(o, _)| !self.member().is_some_and(|m| m.applying.contains(o)));
        for (object, version) in &objects {
            if !self.index.missing.contains_key(object) {
                self.commit_held(cx, *object, *version);
            }
        }
        self.send(cx, from, PeerBody::CommitAck { objects }, Bytes::new());
    }

    pub(in super::super) fn commit_acked(&mut self, from: OsdId, objects: &[(ObjectId, Version)]) {
        let Phase::Active(a) = &mut self.phase else { return };
        for (o, version) in objects {
            let Some(u) = a.shards.uncommitted.get_mut(o).filter(|u| u.version == *version) else { continue };
            u.members.remove(&from);
            if u.members.is_empty() {
                a.shards.uncommitted.remove(o);
            }
        }
    }
}
