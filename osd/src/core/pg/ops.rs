//! Client operations at an active primary: admission, ordering, fan-out, acknowledgement.

use super::member::{FULL_FOR_MS, sub_result};
use super::writes::{Requested, Write};
use super::*;
use gabion_proto::blocks::{Content, ContentError};
use gabion_proto::limits::*;
use gabion_proto::map::Attachment;

/// An operation that has not started for this long is sent back, so that the client looks at its map.
const WAIT_MS: Millis = 1_000;
/// Unacknowledged sub-writes are sent again after this long at first, then ever later: a busy member has them already.
const RESEND_MS: Millis = 500;
/// What is not a client's write is not held against a member sooner, whatever the limit is.
pub(super) const PATIENCE_MS: Millis = SUBOP_STUCK.as_millis() as Millis;
/// From this version counter on, another interval is asked for, long before the versions end.
const VERSIONS_WORN: u32 = 1 << 31;
/// Writes of one object that may be in flight.
const WRITES_PER_OBJECT: usize = 64;

/// A client's operation that has been admitted but not started.
#[derive(Debug)]
pub struct ClientWork {
    pub token: ClientToken,
    op: ClientOp,
    data: Bytes,
    arrived: Millis,
}

#[derive(Debug)]
pub(super) struct Read {
    op: ClientOp,
    arrived: Millis,
    /// When it began.
    pub since: Millis,
    /// The own store was asked.
    pub own: bool,
    /// The number under which another member was asked.
    pub hedge: Option<u64>,
    /// The own copy of what it reads was replaced since it began: what it could not read may be readable now.
    stale: bool,
}

impl Read {
    pub(super) fn of(work: &ClientWork, now: Millis) -> Read {
        Read { op: work.op.clone(), arrived: work.arrived, since: now, own: false, hedge: None, stale: false }
    }

    pub(super) fn op(&self) -> &ClientOp {
        &self.op
    }

    /// In whatever layer: it may read through several.
    fn overlaps(&self, object: &ObjectId, first_block: u32, block_count: u32) -> bool {
        let (volume, index) = (self.op.object.volume, self.op.object.index);
        let Some((first, count)) = range_of(&self.op, OBJECT_BYTES_MAX / BLOCK_BYTES) else { return false };
        let there = volume == object.volume && index == object.index;
        there && first < first_block + block_count && first_block < first + count
    }
}

impl ClientWork {
    pub(super) fn op(&self) -> &ClientOp {
        &self.op
    }

    pub(super) fn data(&self) -> &Bytes {
        &self.data
    }
}

/// What an active primary keeps.
#[derive(Debug)]
pub struct Active {
    pub(super) writes: BTreeMap<u64, Write>,
    pub(super) reads: BTreeMap<ClientToken, Read>,
    /// Questions to other members about reads, by number.
    pub(super) hedges: BTreeMap<u64, hedge::Hedge>,
    /// Reads of the own store that nobody waits for any more: another member was faster.
    pub(super) overtaken: BTreeSet<ClientToken>,
    /// Reads of which some blocks are asked of other members.
    pub(super) mends: BTreeMap<ClientToken, mend::Mend>,
    pub(super) shards: shards::Shards,
    pub(super) next_tid: u64,
    pub recovery: recovery::Recovery,
    pub scrub: scrub::Scrub,
    /// Members that have too little room for clients' writes, and when they last said so (rule P7).
    full: BTreeMap<OsdId, Millis>,
    /// The monitors know that the interval is clean.
    pub clean_confirmed: bool,
    pub clean_reported: bool,
}

impl Active {
    pub fn new(
        recovery: recovery::Recovery,
        pending: BTreeMap<ObjectId, (Version, BTreeSet<OsdId>)>,
        now: Millis,
    ) -> Active {
        Active {
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
            hedges: BTreeMap::new(),
            overtaken: BTreeSet::new(),
            mends: BTreeMap::new(),
            shards: shards::Shards::new(pending, now),
            next_tid: 0,
            recovery,
            scrub: scrub::Scrub::default(),
            full: BTreeMap::new(),
            clean_confirmed: false,
            clean_reported: false,
        }
    }

    pub fn next_tid(&mut self) -> u64 {
        self.next_tid += 1;
        self.next_tid
    }

    /// The own copy of the object was replaced: what reads that began before say about it is not true any more.
    pub(super) fn own_copy_is_new(&mut self, object: &ObjectId) {
        let reads = self.reads.values_mut();
        let of = |r: &&mut Read| (r.op.object.volume, r.op.object.index) == (object.volume, object.index);
        reads.filter(of).for_each(|r| r.stale = true);
        self.overtaken.clear();
    }

    /// Everybody who waits for an answer.
    pub fn take_tokens(&mut self) -> Vec<ClientToken> {
        let writes = self.writes.values_mut().flat_map(Write::take_tokens).collect::<Vec<_>>();
        let reads = std::mem::take(&mut self.reads);
        writes.into_iter().chain(reads.into_keys()).collect()
    }

    /// Erasure coding: shards of members that have not made a write durable.
    pub(super) fn shards_owed(&self, tid: u64, acting: &[OsdId]) -> BTreeSet<u8> {
        let Some(w) = self.writes.get(&tid) else { return BTreeSet::new() };
        acting.iter().zip(0u8..).filter(|(o, _)| w.waiting.contains(o)).map(|(_, n)| n).collect()
    }

    pub fn has_writes(&self, object: &ObjectId) -> bool {
        self.writes.values().any(|w| w.object == *object)
    }

    /// Rule P7: some member has too little room for clients' writes.
    pub(super) fn lacks_room(&self, cx: &Cx<'_>) -> bool {
        cx.full || self.full.values().any(|heard| cx.now < heard + FULL_FOR_MS)
    }
}

/// Blocks that an operation touches, or `None` when it is malformed.
pub(super) fn range_of(op: &ClientOp, object_blocks: u32) -> Option<(u32, u32)> {
    let (first, count) = match &op.kind {
        OpKind::Read { first_block, block_count, below } => {
            if below.len() > LAYERS_MAX {
                return None;
            }
            (*first_block, *block_count)
        }
        OpKind::Zero { first_block, block_count, .. } => (*first_block, *block_count),
        OpKind::Write { extents } => {
            let (first, last) = (extents.first()?, extents.last()?);
            (
                first.first_block,
                last.first_block.checked_add(last.block_count)?.checked_sub(first.first_block)?,
            )
        }
    };
    let end = first.checked_add(count)?;
    let small = matches!(op.kind, OpKind::Zero { .. }) || count <= OP_DATA_BYTES_MAX / BLOCK_BYTES;
    (count > 0 && end <= object_blocks && small).then_some((first, count))
}

impl Pg {
    pub(super) fn reply(&mut self, cx: &mut Cx<'_>, token: ClientToken, reply: OpReply) {
        cx.out.push(Effect::Reply { token, reply, data: Bytes::new() });
    }

    pub(super) fn retry(&mut self, cx: &mut Cx<'_>, token: ClientToken, why: RetryWhy) {
        let reply = OpReply::Retry { epoch: cx.map.epoch, why };
        self.reply(cx, token, reply);
    }

    pub fn client_ops(&self) -> usize {
        let active = match &self.phase {
            Phase::Active(a) => a.writes.len() + a.reads.len(),
            _ => 0,
        };
        self.waiting.len() + active
    }

    pub fn client_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Admission: whatever can be said at once is said at once.
    pub fn client(&mut self, cx: &mut Cx<'_>, token: ClientToken, op: ClientOp, data: Bytes) {
        let old = op.epoch < self.record.interval && cx.rules.keep(Rule::OperationEpoch);
        if old && self.record.primary == Some(cx.id) {
            cx.takes(Branch::OldEpoch);
        }
        if self.record.primary != Some(cx.id) || old {
            return self.retry(cx, token, RetryWhy::StaleMap);
        }
        let Some(pool) = cx.map.pools.get(&self.id.pool) else {
            return self.retry(cx, token, RetryWhy::StaleMap);
        };
        // The root's: of clones, too.
        let here = cx.map.pg_of(op.pg.pool, op.object.volume, op.object.index) == Some(op.pg);
        if !here || range_of(&op, pool.object_bytes / BLOCK_BYTES).is_none() {
            return self.reply(cx, token, OpReply::Failed(OpError::Invalid));
        }
        if let OpKind::Write { extents } = &op.kind {
            let content = Content { extents: extents.clone(), data: data.clone() };
            match content.validate(true) {
                Ok(()) => {}
                // Changed on the way (rule C5).
                Err(ContentError::Crc { .. }) => return self.retry(cx, token, RetryWhy::BadChecksum),
                Err(_) => return self.reply(cx, token, OpReply::Failed(OpError::Invalid)),
            }
        }
        self.waiting.push_back(ClientWork { token, op, data, arrived: cx.now });
        self.resume(cx);
    }

    /// Whether the volume's fence lets the operation through (rules C1 and C2).
    pub(super) fn fence(&self, cx: &mut Cx<'_>, op: &ClientOp) -> Result<(), OpReply> {
        let below = match &op.kind {
            OpKind::Read { below, .. } => below.as_slice(),
            _ => &[],
        };
        let mut objects = std::iter::once(op.object.layer).chain(below.iter().copied());
        if objects.any(|layer| is_removed(cx.map, &ObjectId { layer, ..op.object })) {
            return Err(OpReply::Failed(OpError::Removed));
        }
        if op.generation == Generation(0) {
            let reads = matches!(op.kind, OpKind::Read { .. });
            return if reads { Ok(()) } else { Err(OpReply::Failed(OpError::Invalid)) };
        }
        match cx.map.attachments.get(&op.volume) {
            Some(a) if is_holder(a, op.client, op.session, op.generation) => self.frozen(cx, a, op),
            _ if !cx.rules.keep(Rule::Generations) => Ok(()),
            Some(a)
                if op.client == a.client
                    && op.generation == a.generation
                    && !cx.rules.keep(Rule::Sessions) =>
            {
                Ok(())
            }
            // The client knows more than this OSD: its map will tell.
            Some(a) if op.generation > a.generation || (op.client == a.client && op.session > a.session) => {
                cx.out.push(Effect::WantMap { epoch: cx.map.epoch.next() });
                Err(OpReply::Retry { epoch: cx.map.epoch, why: RetryWhy::OsdBehind })
            }
            _ => {
                cx.takes(Branch::Fenced);
                Err(OpReply::Failed(OpError::Fenced))
            }
        }
    }

    /// Rule C6: a holder writes its top layer and nothing else.
    fn frozen(&self, cx: &mut Cx<'_>, a: &Attachment, op: &ClientOp) -> Result<(), OpReply> {
        if a.root != op.object.volume {
            return Err(OpReply::Failed(OpError::Invalid));
        }
        let reads = matches!(op.kind, OpKind::Read { .. });
        if reads || op.object.layer == a.top || !cx.rules.keep(Rule::FrozenLayers) {
            return Ok(());
        }
        if op.object.layer < a.top {
            cx.takes(Branch::Frozen);
            return Err(OpReply::Failed(OpError::Frozen));
        }
        // The client knows of a layer that this OSD does not.
        cx.out.push(Effect::WantMap { epoch: cx.map.epoch.next() });
        Err(OpReply::Retry { epoch: cx.map.epoch, why: RetryWhy::OsdBehind })
    }

    /// Starts what can start, in order of arrival per object.
    pub fn resume(&mut self, cx: &mut Cx<'_>) {
        if !matches!(self.phase, Phase::Active(_)) || self.fills || self.waiting.is_empty() || !cx.has_lease()
        {
            return;
        }
        let mut held: BTreeSet<ObjectId> = BTreeSet::new();
        let mut later = VecDeque::new();
        while let Some(work) = self.waiting.pop_front() {
            if held.contains(&work.op.object) {
                later.push_back(work);
                continue;
            }
            if let Err(reply) = self.fence(cx, &work.op) {
                self.reply(cx, work.token, reply);
                continue;
            }
            if !matches!(self.phase, Phase::Active(_)) || !self.start(cx, &work) {
                held.insert(work.op.object);
                later.push_back(work);
            }
        }
        self.waiting = later;
        self.launch_writes(cx);
        self.recover(cx);
    }

    /// False: it must wait.
    fn start(&mut self, cx: &mut Cx<'_>, work: &ClientWork) -> bool {
        let op = &work.op;
        let Some((first_block, block_count)) = range_of(op, OBJECT_BYTES_MAX / BLOCK_BYTES) else {
            return true;
        };
        let is_read = matches!(op.kind, OpKind::Read { .. });
        if self.code.is_some() {
            return self.start_coded(cx, work, first_block, block_count);
        }
        let min_size = self.pool_min_size(cx).unwrap_or(usize::MAX);
        let members = self.record.members().count();
        let Phase::Active(a) = &mut self.phase else { return false };
        let layers = match &op.kind {
            OpKind::Read { below, .. } => below.as_slice(),
            _ => &[],
        };
        let mut gives_way = false;
        for layer in std::iter::once(op.object.layer).chain(layers.iter().copied()) {
            let object = ObjectId { layer, ..op.object };
            let doubts = cx.rules.keep(Rule::ReadsWaitForDoubt);
            let enough = if cx.rules.keep(Rule::EnoughHold) { min_size } else { 1 };
            let blocked = match is_read {
                true => a.recovery.blocks_reads(cx.id, &object, doubts),
                false => a.recovery.blocks_writes(cx.id, &object, members, enough),
            };
            gives_way = blocked && !is_read && a.recovery.may_give_way(cx.id, &object, members, enough);
            if blocked && !gives_way {
                a.recovery.demand(object);
                cx.takes(match is_read {
                    true => Branch::ReadWaitsForRecovery,
                    false => Branch::WriteWaitsForRecovery,
                });
                return false;
            }
        }
        let overlaps = |w: &&Write| {
            w.object.volume == op.object.volume
                && w.object.index == op.object.index
                && w.overlaps(first_block, block_count)
        };
        if is_read {
            // Rule P5: what is not durable everywhere is not shown.
            if cx.rules.keep(Rule::ReadsWaitForWrites) && a.writes.values().any(|w| overlaps(&w)) {
                cx.takes(Branch::ReadWaitsForWrite);
                return false;
            }
            a.reads.insert(work.token, Read::of(work, cx.now));
            self.begin_read(cx, work.token);
            return true;
        }
        let same = a.writes.values().filter(|w| w.object == op.object).count();
        if a.scrub.holds(&op.object) || a.mends.values().any(|m| m.asks_for(&op.object)) {
            return false;
        }
        if same >= WRITES_PER_OBJECT || a.writes.values().any(|w| overlaps(&w)) {
            return false;
        }
        // Rule P5: a read that is under way may find what this OSD makes durable meanwhile, before the others have it.
        if a.reads.values().any(|r| r.overlaps(&op.object, first_block, block_count)) {
            cx.takes(Branch::WriteWaitsForRead);
            return false;
        }
        if a.lacks_room(cx) && !matches!(op.kind, OpKind::Zero { discard: true, .. }) {
            cx.takes(Branch::NoRoom);
            self.reply(cx, work.token, OpReply::Failed(OpError::NoSpace));
            return true;
        }
        if gives_way {
            cx.takes(Branch::GiveWay);
            a.recovery.give_way(op.object);
        }
        self.start_write(cx, work, first_block, block_count);
        true
    }

    pub fn read_done(&mut self, cx: &mut Cx<'_>, what: What, result: Result<Content, StoreError>) {
        let token = match what {
            What::Read { token } => token,
            What::OwnRows { tid } => return self.own_rows_read(cx, tid, result),
            What::OldParity { object, version, first_row } => {
                return self.old_parity_read(cx, (object, version, first_row), result);
            }
            What::ServeRows { to, tid } => return self.rows_read(cx, to, tid, result),
            What::ServeBlocks { to, tid, layers } => return self.blocks_read(cx, (to, tid, layers), result),
            _ => return,
        };
        let Phase::Active(a) = &mut self.phase else { return };
        let overtaken = a.overtaken.remove(&token);
        let Some(read) = a.reads.remove(&token) else {
            // Nobody waits, but a bad block is a bad block.
            if let (true, Err(StoreError::Unreadable { object, block, why, .. })) = (overtaken, result)
                && !a.scrub.damaged.contains_key(&object)
                && !a.has_writes(&object)
                // Recovery has forgotten what was removed, and would wait for it for ever.
                && !is_removed(cx.map, &object)
            {
                tracing::warn!(pg = %self.id, osd = %cx.id, %object, block, why, "unreadable block, repairing from another copy");
                cx.takes(Branch::OvertakenBad);
                self.lose_own_copy(cx, object);
            }
            return;
        };
        self.answer_read(cx, token, read, result);
        // Writes may have waited for it.
        self.resume(cx);
    }

    /// Whoever else was asked for it answers to nobody.
    pub(super) fn answer_read(
        &mut self,
        cx: &mut Cx<'_>,
        token: ClientToken,
        read: Read,
        result: Result<Content, StoreError>,
    ) {
        // Rule P6: the lease was good when the bytes were read.
        if !cx.has_lease() {
            cx.takes(Branch::LeaseRanOut);
            return self.retry(cx, token, RetryWhy::NotActive);
        }
        // A layer that was removed meanwhile may have been purged before the bytes were read.
        if let Err(reply) = self.fence(cx, &read.op) {
            return self.reply(cx, token, reply);
        }
        match result {
            Ok(content) => {
                self.counters.reads += 1;
                self.counters.read_bytes += content.data.len() as u64;
                let reply = OpReply::Data { extents: content.extents };
                cx.out.push(Effect::Reply { token, reply, data: content.data });
            }
            // This OSD is about to stop; others have the bytes.
            Err(StoreError::Fatal(_)) => self.retry(cx, token, RetryWhy::NotActive),
            Err(StoreError::Unreadable { .. }) if read.stale => self.retry(cx, token, RetryWhy::Busy),
            Err(StoreError::Unreadable { object: first, block, why, rest }) => {
                let Phase::Active(a) = &self.phase else { return };
                // What is known to be damaged cannot be repaired; other layers may be.
                let known = |o: &ObjectId| a.scrub.damaged.contains_key(o);
                let bad = rest.iter().flat_map(|r| r.bad.iter().map(|(o, ..)| *o));
                let object = bad.chain([first]).find(|o| !known(o)).unwrap_or(first);
                tracing::warn!(pg = %self.id, osd = %cx.id, object = %first, block, why, "unreadable block, repairing from another copy");
                cx.takes(Branch::RepairOnRead);
                if known(&object) {
                    match rest.filter(|_| self.code.is_none()) {
                        Some(rest) => self.mend(cx, token, read, *rest),
                        // Nobody has it: a scrub looked everywhere, or recovery did.
                        None => self.reply(cx, token, OpReply::Failed(OpError::Io)),
                    }
                } else if a.has_writes(&object) {
                    // The version that the others must have is not theirs yet: asked again when it is.
                    self.retry(cx, token, RetryWhy::Busy);
                } else if !self.lose_own_copy(cx, object) {
                    self.reply(cx, token, OpReply::Failed(OpError::Io));
                } else if self.index.missing.contains_key(&object) {
                    let Read { op, arrived, .. } = read;
                    self.waiting.push_front(ClientWork { token, op, data: Bytes::new(), arrived });
                } else {
                    // Nobody is known to have it: not read again before somebody was asked.
                    self.retry(cx, token, RetryWhy::NotActive);
                }
            }
            Err(_) => self.reply(cx, token, OpReply::Failed(OpError::Io)),
        }
    }

    fn start_write(&mut self, cx: &mut Cx<'_>, work: &ClientWork, first_block: u32, block_count: u32) {
        let object = work.op.object;
        let prev = self.index.objects.get(&object).map_or(Version::ZERO, |h| h.version);
        let Some(version) = prev.successor(self.record.interval) else {
            self.retry(cx, work.token, RetryWhy::NotActive);
            return self.fail(cx, format!("object {object} has no versions left in this interval"));
        };
        self.note_worn(version);
        let data = work.data.clone();
        let (body, op) = match &work.op.kind {
            OpKind::Write { extents } => {
                let content = Content { extents: extents.clone(), data: data.clone() };
                (
                    SubWriteKind::Write { extents: extents.clone() },
                    TxnOp::Write { object, prev, version, content },
                )
            }
            OpKind::Zero { discard, .. } => {
                let discard = *discard;
                (
                    SubWriteKind::Zero { first_block, block_count, discard },
                    TxnOp::Zero { object, prev, version, first_block, block_count, discard },
                )
            }
            OpKind::Read { .. } => return,
        };
        self.index.objects.insert(object, Held::committed(version, false));
        let others = self.others(cx);
        let Phase::Active(a) = &mut self.phase else { return };
        let tid = a.next_tid();
        let requested = Requested::of(work, (first_block, block_count));
        let lacking = a.recovery.note_write(&object, version, &others);
        let write = match lacking.is_empty() {
            true => Write::same(requested, object, (prev, version), (body, data), &others, cx.now),
            false => {
                let to = (others.as_slice(), &lacking);
                Write::noted(requested, object, (prev, version), (body, data), to, cx.now)
            }
        };
        let parts: Vec<_> = others.iter().filter_map(|o| Some((*o, write.part(*o)?))).collect();
        a.writes.insert(tid, write);
        self.submit(cx, What::Write { tid }, vec![op]);
        for (o, (write, data)) in parts {
            self.send(cx, o, PeerBody::SubWrite { tid, object, version, prev, write }, data);
        }
    }

    pub(super) fn note_worn(&mut self, version: Version) {
        self.wants_interval |= version.counter() >= VERSIONS_WORN;
    }

    pub(super) fn own_write_done(&mut self, cx: &mut Cx<'_>, tid: u64, result: Result<(), StoreError>) {
        if let Err(e) = result {
            // Others may have it: only a new interval can decide.
            self.fail(cx, format!("the store refused a write ({:?}): {e}", sub_result(&e)));
            return;
        }
        if let Phase::Active(a) = &mut self.phase
            && let Some(w) = a.writes.get_mut(&tid)
        {
            w.own = true;
        }
        self.finish_write(cx, tid);
    }

    pub(super) fn member_full(&mut self, cx: &mut Cx<'_>, from: OsdId) {
        let acting = self.record.acting.contains(&from);
        if let (Phase::Active(a), true) = (&mut self.phase, acting) {
            a.full.insert(from, cx.now);
        }
    }

    pub(super) fn sub_write_ack(&mut self, cx: &mut Cx<'_>, from: OsdId, tid: u64, result: SubResult) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(w) = a.writes.get_mut(&tid) else { return };
        match result {
            SubResult::Ok => {
                if w.waiting.remove(&from) {
                    cx.latency.took(from, Kind::Write, cx.now.saturating_sub(w.started));
                }
                self.decode_parity(cx, tid);
                self.finish_write(cx, tid);
            }
            // Sent again by the timer.
            SubResult::BadChecksum => {}
            SubResult::Unreadable => self.parity_unreadable(cx, from, tid),
            _ if !cx.rules.keep(Rule::Refusals) => {
                w.waiting.remove(&from);
                self.finish_write(cx, tid);
            }
            refused => {
                tracing::warn!(pg = %self.id, member = %from, ?refused, "a member refused a write");
                cx.takes(Branch::WriteRefused);
                w.refused.insert(from, refused);
            }
        }
    }

    /// Invariant 1: every acting member has it durable.
    fn finish_write(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Phase::Active(a) = &mut self.phase else { return };
        let every = cx.rules.keep(Rule::EveryMember);
        let done = a.writes.get(&tid).is_some_and(|w| w.own && (w.waiting.is_empty() || !every));
        if !done {
            return;
        }
        let Some(mut w) = a.writes.remove(&tid) else { return };
        self.counters.writes += w.requested.len() as u64;
        self.counters.write_bytes += w.requested.iter().map(|r| r.bytes).sum::<u64>();
        if self.code.is_some() {
            self.commit_later(cx, w.object, w.version);
        }
        for token in w.take_tokens().collect::<Vec<_>>() {
            // Without the lease this may be a deposed primary: another one may have decided already.
            if cx.has_lease() {
                self.reply(cx, token, OpReply::Done { version: w.version });
            } else {
                cx.takes(Branch::LeaseRanOut);
                self.retry(cx, token, RetryWhy::NotActive);
            }
        }
        self.resume(cx);
    }

    pub(super) fn resend_writes(&mut self, cx: &mut Cx<'_>) {
        let Phase::Active(a) = &mut self.phase else { return };
        let mut again = Vec::new();
        for (tid, w) in
            a.writes.iter_mut().filter(|(_, w)| cx.now >= w.sent + RESEND_MS.max(w.sent - w.started))
        {
            w.sent = cx.now;
            for o in w.waiting.iter().filter(|o| !w.refused.contains_key(o)) {
                let Some((write, data)) = w.part(*o) else { continue };
                let body = PeerBody::SubWrite {
                    tid: *tid,
                    object: w.object,
                    version: w.version,
                    prev: w.prev,
                    write,
                };
                again.push((*o, body, data));
            }
        }
        for (o, body, data) in again {
            cx.takes(Branch::WriteAgain);
            self.send(cx, o, body, data);
        }
    }

    /// What has waited for long goes back to the client: its map may be old, or this OSD alone.
    pub(super) fn expire_waiting(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now;
        let (old, rest): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|w| now >= w.arrived + WAIT_MS);
        self.waiting = rest;
        for w in old {
            cx.takes(Branch::WaitedTooLong);
            self.retry(cx, w.token, RetryWhy::NotActive);
        }
    }

    pub fn client_gone(&mut self, token: ClientToken) {
        self.waiting.retain(|w| w.token != token);
        if let Phase::Active(a) = &mut self.phase {
            a.reads.remove(&token);
            let requested = a.writes.values_mut().flat_map(|w| &mut w.requested);
            requested.filter(|r| r.token == Some(token)).for_each(|r| r.token = None);
        }
    }

    /// Rules C3 and C6: a started write of a holder that is fenced by now, or to a layer that is frozen by now.
    pub fn has_fenced_writes(&self, map: &ClusterMap) -> bool {
        let Phase::Active(a) = &self.phase else { return false };
        a.writes.values().flat_map(|w| w.requested.iter().map(|r| (w.object.layer, r))).any(|(layer, r)| {
            let (volume, client, session, generation) = r.holder;
            let may = |h: &Attachment| is_holder(h, client, session, generation) && h.top == layer;
            !map.attachments.get(&volume).is_some_and(may)
        })
    }

    /// Rules P7 and P8: who owes what to this primary, and for how long.
    pub(super) fn late_members(&self, now: Millis, limit_ms: Millis) -> BTreeMap<OsdId, Millis> {
        let mut late: BTreeMap<OsdId, Millis> = BTreeMap::new();
        let Phase::Active(a) = &self.phase else { return late };
        let shard = |o: &OsdId| self.record.acting.iter().position(|a| a == o).map(|n| n as u8);
        for (tid, w) in &a.writes {
            for o in &w.waiting {
                // Who gives the rows that its parity is decoded from owes those, not who cannot read it.
                let waits = shard(o).is_some_and(|n| a.shards.decodes(*tid, n));
                // A refusal is final: no need to wait any longer.
                let age = match (w.refused.contains_key(o), w.owes_since(*o)) {
                    (true, _) => limit_ms,
                    (false, Some(since)) if !waits => now.saturating_sub(since),
                    (false, _) => continue,
                };
                let entry = late.entry(*o).or_default();
                *entry = (*entry).max(age);
            }
        }
        // Recovery moves whole objects, and tries again by itself.
        let patient = a.recovery.late().filter(|(_, since)| now >= since + PATIENCE_MS);
        let rows = a.shards.late().filter(|(_, since, write)| *write || now >= since + PATIENCE_MS);
        for (o, since) in patient.chain(rows.map(|(o, since, _)| (o, since))) {
            let entry = late.entry(o).or_default();
            *entry = (*entry).max(now.saturating_sub(since));
        }
        late
    }
}

fn is_holder(a: &Attachment, client: ClientId, session: Session, generation: Generation) -> bool {
    a.client == client && a.session == session && a.generation == generation
}
