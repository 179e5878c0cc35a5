//! What a member does at the primary's word: promise, list, activate, write, take pushed objects, hand
//! objects out. The primary itself goes through the same promise and activation.

use super::intake::Intake;
use super::*;
use crate::store::Piece;
use gabion_proto::blocks::Content;
use gabion_proto::limits::PIECE_BLOCKS;

/// Sub-writes that may be early at one member of one group; more are dropped and come again.
pub(super) const EARLY_MAX: usize = 512;
/// A full member says so this often.
const TELL_FULL_MS: Millis = 1_000;
/// After this long without a word a member counts as full no more: some of them may be lost.
pub(super) const FULL_FOR_MS: Millis = 5 * TELL_FULL_MS;

/// A sub-write whose predecessor is not here yet.
#[derive(Debug)]
pub struct Early {
    pub tid: u64,
    pub object: ObjectId,
    pub version: Version,
    pub prev: Version,
    pub write: SubWriteKind,
    pub data: Bytes,
}

/// A member that is not primary.
#[derive(Debug, Default)]
pub struct Member {
    pub promising: bool,
    /// Activation pages so far, and how many.
    pages: Vec<ObjectEntry>,
    next_page: u32,
    /// The last page is in, the activation is being made durable.
    activating: bool,
    /// Activated in this interval, durably.
    pub active: bool,
    /// By object and predecessor.
    early: BTreeMap<(ObjectId, Version), Early>,
    /// Submitted and not durable: tids that want an answer.
    in_flight: BTreeMap<(ObjectId, Version), u64>,
    /// Erasure coding: writes that add to parity, whose old rows are being read.
    pub(super) adding: BTreeMap<ObjectId, shards::Adding>,
    /// Pushes being applied.
    pub(super) applying: BTreeSet<ObjectId>,
    /// Notes of what is being applied.
    notes: BTreeMap<(ObjectId, Version), Early>,
    /// Erasure coding: rows that are being read, for whom and under which number.
    pub serving: BTreeSet<(OsdId, u64)>,
    /// When the primary was last told that the store is full.
    told_full: Option<Millis>,
    /// Objects that a scrub of the primary asks for.
    pub scrub: Option<scrub::Reading>,
}

impl Member {
    fn note_of(&mut self, object: &ObjectId) -> Option<Early> {
        let (key, _) =
            self.notes.range((*object, Version::ZERO)..).next().filter(|((o, _), _)| o == object)?;
        let key = *key;
        self.notes.remove(&key)
    }
}

impl Pg {
    pub(super) fn member(&mut self) -> Option<&mut Member> {
        match &mut self.phase {
            Phase::Member(m) => Some(m),
            _ => None,
        }
    }

    /// Rule P7: the primary must refuse what this store has no room for.
    pub(super) fn tell_full(&mut self, cx: &mut Cx<'_>) {
        let Some(primary) = self.record.primary else { return };
        let (full, now) = (cx.full, cx.now);
        let Some(m) = self.member() else { return };
        if full && m.active && m.told_full.is_none_or(|t| now >= t + TELL_FULL_MS) {
            m.told_full = Some(now);
            self.send(cx, primary, PeerBody::Full, Bytes::new());
        }
    }

    /// Rule P3: the promise is durable before it is answered.
    pub(super) fn query(&mut self, cx: &mut Cx<'_>) {
        let interval = self.record.interval;
        let Some(m) = self.member() else {
            // It is answered when what is here is known.
            self.asked |= matches!(self.phase, Phase::Loading);
            return;
        };
        if m.promising {
            return;
        }
        if self.meta.promised < interval {
            let meta = PgMeta { promised: interval, ..self.meta };
            self.meta = meta;
            if let Some(m) = self.member() {
                m.promising = true;
            }
            self.submit(cx, What::Promised, vec![TxnOp::SetMeta(meta)]);
            return;
        }
        self.send_info(cx);
    }

    fn send_info(&mut self, cx: &mut Cx<'_>) {
        let Some(primary) = self.record.primary else { return };
        let body = PeerBody::Info {
            activated: self.meta.activated,
            object_count: self.index.objects.len() as u64,
            missing_count: self.index.missing.len() as u64,
            shard: self.meta.shard.map(|s| s.number),
            parts: self.index.digests(),
        };
        self.send(cx, primary, body, Bytes::new());
    }

    pub(super) fn promise_durable(&mut self, cx: &mut Cx<'_>) {
        match &mut self.phase {
            Phase::Member(m) => {
                m.promising = false;
                self.send_info(cx);
            }
            Phase::Peering(p) => {
                p.promised = true;
                self.peer_on(cx);
            }
            _ => {}
        }
    }

    pub(super) fn activate_page(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        page: u32,
        missing: Vec<ObjectEntry>,
        last: bool,
    ) {
        let Some(m) = self.member() else { return };
        if page < m.next_page {
            // Again: the acknowledgement was lost. The last page's waits for the disk.
            let durable = m.active || page + 1 < m.next_page || !m.activating;
            if durable {
                self.send(cx, from, PeerBody::ActivateAck { page }, Bytes::new());
            }
            return;
        }
        if page > m.next_page || m.activating {
            return;
        }
        m.pages.extend(missing);
        m.next_page += 1;
        if !last {
            self.send(cx, from, PeerBody::ActivateAck { page }, Bytes::new());
            return;
        }
        m.activating = true;
        let pages = std::mem::take(&mut m.pages);
        let missing = pages.iter().filter(|e| e.missing).map(|e| {
            let needed = Needed { version: e.version, deleted: e.deleted, uncertain: e.uncertain };
            (e.object, needed)
        });
        let back = pages.iter().filter(|e| !e.missing).map(|e| (e.object, e.version));
        self.submit_activation(cx, missing, back);
    }

    /// Missing map and activation change in one transaction (rules P3 and P4).
    pub(super) fn submit_activation(
        &mut self,
        cx: &mut Cx<'_>,
        missing: impl Iterator<Item = (ObjectId, Needed)>,
        back: impl Iterator<Item = (ObjectId, Version)>,
    ) {
        self.index.missing = missing.collect();
        // What others have not purged yet may be among it.
        self.purged = (0, 0);
        let mut rollbacks = Vec::new();
        for (object, version) in back {
            let pending = self.index.objects.get(&object).is_some_and(|h| h.base == Some(version));
            if pending && cx.rules.keep(Rule::RollBack) {
                self.index.hold(object, Needed::certain(version, false));
                rollbacks.push(TxnOp::RollbackPending { object });
            }
        }
        // `self.meta` follows when it is durable: a refused activation must not be claimed by the next promise.
        let interval = self.record.interval;
        let meta = PgMeta { promised: interval, activated: interval, ..self.meta };
        let durable = if cx.rules.keep(Rule::MissingMap) { usize::MAX } else { 0 };
        let entries = self
            .index
            .missing
            .iter()
            .take(durable)
            .map(|(o, n)| TxnOp::AddMissing { object: *o, needed: *n });
        let ops = std::iter::once(TxnOp::ClearMissing)
            .chain(entries)
            .chain(rollbacks)
            .chain(std::iter::once(TxnOp::SetMeta(meta)))
            .collect();
        self.submit(cx, What::Activated, ops);
    }

    pub(super) fn activation_durable(&mut self, cx: &mut Cx<'_>) {
        self.meta.activated = self.record.interval;
        match &mut self.phase {
            Phase::Member(m) => {
                m.active = true;
                m.activating = false;
                let page = m.next_page.saturating_sub(1);
                if let Some(primary) = self.record.primary {
                    self.send(cx, primary, PeerBody::ActivateAck { page }, Bytes::new());
                }
            }
            Phase::Activating(a) => {
                a.own = true;
                self.activate_on(cx);
            }
            _ => {}
        }
    }

    pub(super) fn version_of(&self, object: &ObjectId) -> Version {
        self.index.objects.get(object).map_or(Version::ZERO, |h| h.version)
    }

    /// Rule P2: in version order, each after its predecessor.
    pub(super) fn sub_write(&mut self, cx: &mut Cx<'_>, from: OsdId, w: Early) {
        let have = self.version_of(&w.object);
        let noted = self.index.missing.get(&w.object).map(|n| n.version);
        let Some(m) = self.member() else { return };
        // Writes come only after activation, and after what is being stored in the object's place: a push that was given up
        // may be. Others than notes come again.
        if !m.active {
            return;
        }
        if m.applying.contains(&w.object) {
            if w.write == SubWriteKind::Note && m.notes.len() < EARLY_MAX {
                m.notes.insert((w.object, w.version), w);
            }
            return;
        }
        match (noted, &w.write) {
            (Some(_), SubWriteKind::Note) => return self.note_write(cx, from, noted, &w),
            // It was brought here late, and the primary knows nothing of that.
            (None, SubWriteKind::Note) if w.version > have => return self.note_write(cx, from, noted, &w),
            // The primary takes this member for one that has it.
            (Some(_), _) => return,
            (None, _) => {}
        }
        // Without its rule a repeated sum is added to what the first one made.
        let twice = matches!(w.write, SubWriteKind::Delta { .. })
            && w.version == have
            && !cx.rules.keep(Rule::DeltaNamesBase);
        if w.version <= have && !twice {
            if !m.in_flight.contains_key(&(w.object, w.version)) {
                self.send(
                    cx,
                    from,
                    PeerBody::SubWriteAck { tid: w.tid, result: SubResult::Ok },
                    Bytes::new(),
                );
            }
            return;
        }
        if w.prev != have && is_removed(cx.map, &w.object) {
            // It is purged here already. Nobody will read it, and the primary waits for this answer.
            let body = PeerBody::SubWriteAck { tid: w.tid, result: SubResult::Ok };
            return self.send(cx, from, body, Bytes::new());
        }
        if w.prev != have && !twice && cx.rules.keep(Rule::VersionOrder) {
            if w.prev > have && m.early.len() < EARLY_MAX {
                cx.takes(Branch::EarlyWrite);
                m.early.insert((w.object, w.prev), w);
            }
            return;
        }
        let prev = if twice { w.prev } else { have };
        let (object, version) = (w.object, w.version);
        if self.apply_sub_write(cx, from, Early { prev, ..w }) {
            self.early_on(cx, object, version);
        }
    }

    /// The object is at this version now: what has waited for that is applied.
    pub(super) fn early_on(&mut self, cx: &mut Cx<'_>, object: ObjectId, mut version: Version) {
        let Some(primary) = self.record.primary else { return };
        let next = |m: &mut Member, version| match m.applying.contains(&object) {
            true => None,
            false => m.early.remove(&(object, version)),
        };
        while let Some(w) = self.member().and_then(|m| next(m, version)) {
            version = w.version;
            if !self.apply_sub_write(cx, primary, w) {
                return;
            }
        }
    }

    /// Rule P4: this member lacks the object; that it is at another version now is durable before the write is answered. Notes may
    /// overtake each other: the newest counts, and an older one is answered when that is durable.
    fn note_write(&mut self, cx: &mut Cx<'_>, from: OsdId, noted: Option<Version>, w: &Early) {
        let (tid, object, version) = (w.tid, w.object, w.version);
        let coded = self.code.is_some();
        let Some(m) = self.member() else { return };
        if coded {
            return;
        }
        if noted.is_some_and(|n| version <= n) {
            if !m.in_flight.range((object, version)..).any(|((o, _), _)| *o == object) {
                let body = PeerBody::SubWriteAck { tid, result: SubResult::Ok };
                self.send(cx, from, body, Bytes::new());
            }
            return;
        }
        if !cx.rules.keep(Rule::WritesAreNoted) {
            let body = PeerBody::SubWriteAck { tid, result: SubResult::Ok };
            return self.send(cx, from, body, Bytes::new());
        }
        cx.takes(Branch::NotedWrite);
        m.in_flight.insert((object, version), tid);
        let needed = Needed::certain(version, false);
        self.index.missing.insert(object, needed);
        self.comes(cx, &object);
        self.submit(cx, What::SubWrite { tid, object, version }, vec![TxnOp::AddMissing { object, needed }]);
    }

    /// False: it is not applied, or not yet.
    fn apply_sub_write(&mut self, cx: &mut Cx<'_>, from: OsdId, w: Early) -> bool {
        if let SubWriteKind::Delta { .. } = w.write {
            self.add_to_parity(cx, from, w);
            return false;
        }
        let Early { tid, object, version, prev, write, data } = w;
        let ops = match write {
            SubWriteKind::Write { extents } => {
                let content = Content { extents, data };
                if let Err(error) = content.validate(true) {
                    tracing::warn!(pg = %self.id, %from, %object, %error, "sub-write refused");
                    let body = PeerBody::SubWriteAck { tid, result: SubResult::BadChecksum };
                    self.send(cx, from, body, Bytes::new());
                    return false;
                }
                match self.code {
                    Some(_) => self.prepare_ops(object, prev, version, content),
                    None => vec![TxnOp::Write { object, prev, version, content }],
                }
            }
            // Shards are only ever prepared.
            _ if self.code.is_some() => return false,
            SubWriteKind::Note | SubWriteKind::Delta { .. } => return false,
            SubWriteKind::Zero { first_block, block_count, discard } => {
                vec![TxnOp::Zero { object, prev, version, first_block, block_count, discard }]
            }
            SubWriteKind::Delete => vec![TxnOp::Delete { object, prev, version }],
        };
        self.store_sub_write(cx, tid, object, (prev, version), ops);
        true
    }

    /// Rule E2: once, and to the version that it names. What is being read is not read twice.
    fn add_to_parity(&mut self, cx: &mut Cx<'_>, from: OsdId, w: Early) {
        let base = if w.version == self.version_of(&w.object) { w.version } else { w.prev };
        let tid = w.tid;
        let Some(m) = self.member() else { return };
        let busy = m.adding.contains_key(&w.object) || m.in_flight.contains_key(&(w.object, w.version));
        // What is being stored may be another version than this member says.
        if busy || m.applying.contains(&w.object) {
            return;
        }
        if let Err(error) = self.begin_adding(cx, w, base) {
            tracing::warn!(pg = %self.id, %from, error, "sub-write refused");
            let body = PeerBody::SubWriteAck { tid, result: SubResult::BadChecksum };
            self.send(cx, from, body, Bytes::new());
        }
    }

    /// What was judged and is in order becomes durable.
    pub(super) fn store_sub_write(
        &mut self,
        cx: &mut Cx<'_>,
        tid: u64,
        object: ObjectId,
        (prev, version): (Version, Version),
        ops: Vec<TxnOp>,
    ) {
        self.comes(cx, &object);
        let deleted = matches!(ops[..], [TxnOp::Delete { .. }]);
        let base = self.code.is_some().then_some(prev);
        self.index.objects.insert(object, Held { version, deleted, base });
        if let Some(m) = self.member() {
            m.in_flight.insert((object, version), tid);
            // Whatever was to be added is in what came instead.
            m.adding.remove(&object);
        }
        self.submit(cx, What::SubWrite { tid, object, version }, ops);
    }

    pub(super) fn sub_write_done(
        &mut self,
        cx: &mut Cx<'_>,
        tid: u64,
        object: ObjectId,
        version: Version,
        result: Result<(), StoreError>,
    ) {
        let Some(primary) = self.record.primary else { return };
        if let Some(m) = self.member() {
            m.in_flight.remove(&(object, version));
        }
        let result = match result {
            Ok(()) => SubResult::Ok,
            Err(e) => {
                // The index says otherwise than the disk now: out of the group until a new interval
                // lists it again (rule P7).
                self.send(cx, primary, PeerBody::SubWriteAck { tid, result: sub_result(&e) }, Bytes::new());
                self.fail(cx, format!("the store refused a write: {e}"));
                return;
            }
        };
        self.send(cx, primary, PeerBody::SubWriteAck { tid, result }, Bytes::new());
    }

    /// Rule P4: conditional on the object being missed here at exactly that version, in this interval; or on what is here being
    /// what a scrub found wrong. Writes wait until that is answered, so whatever is newer came after an earlier one of the same.
    fn refuses_push(
        &self,
        (object, version, over): (ObjectId, Version, Option<Version>),
        deleted: bool,
    ) -> Option<SubResult> {
        let needed = self.index.missing.get(&object).copied();
        let have = self.version_of(&object);
        match needed {
            Some(n) if n.version == version && n.deleted == deleted => None,
            // A shard that this member could not read, computed from the others.
            None if self.code.is_some() && have == version && !deleted => None,
            None if over.is_some_and(|over| have <= version || have == over) => None,
            None if have >= version => Some(SubResult::Ok),
            _ => Some(SubResult::VersionMismatch),
        }
    }

    pub(super) fn push(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        (object, version, over): (ObjectId, Version, Option<Version>),
        deleted: bool,
        piece: Option<(PieceImage, Bytes)>,
    ) {
        let answer = self.refuses_push((object, version, over), deleted);
        let same = self.intakes.get(&object).is_some_and(|i| i.tid == tid);
        let Some(m) = self.member() else { return };
        if !m.active || m.applying.contains(&object) || same {
            return;
        }
        if let Some(result) = answer {
            self.send(cx, from, PeerBody::PushAck { tid, result }, Bytes::new());
            return;
        }
        if !deleted {
            return self.begin_intake(cx, object, Intake::new(from, tid, version, over, cx.now), piece);
        }
        m.applying.insert(object);
        let ops = match cx.rules.keep(Rule::MissingUntilStored) {
            false => vec![TxnOp::DropMissing { object }],
            true => replace_ops(object, version, true, Content::default()),
        };
        self.submit(cx, What::PushApplied { tid, object, version, deleted, beside: None }, ops);
    }

    /// All of a pushed object is here: whether it is still wanted. Nothing else of it is stored from now on.
    pub(super) fn may_store_pushed(
        &mut self,
        cx: &mut Cx<'_>,
        tid: u64,
        pushed: (ObjectId, Version, Option<Version>),
    ) -> bool {
        let (answer, primary) = (self.refuses_push(pushed, false), self.record.primary);
        let Some(m) = self.member() else { return false };
        if m.applying.contains(&pushed.0) {
            return false;
        }
        if answer.is_none() {
            m.applying.insert(pushed.0);
        } else if let (Some(result), Some(primary)) = (answer, primary) {
            self.send(cx, primary, PeerBody::PushAck { tid, result }, Bytes::new());
        }
        answer.is_none()
    }

    pub(super) fn push_applied(
        &mut self,
        cx: &mut Cx<'_>,
        tid: u64,
        object: ObjectId,
        (version, deleted, beside): (Version, bool, Option<Version>),
        result: Result<(), StoreError>,
    ) {
        let Some(primary) = self.record.primary else { return };
        if let Some(m) = self.member() {
            m.applying.remove(&object);
        }
        self.intake_stored(object, result.is_ok());
        let result = match result {
            Ok(()) => {
                self.index.missing.remove(&object);
                self.comes(cx, &object);
                self.index.hold(object, Needed::certain(version, deleted));
                if let Some(h) = self.index.objects.get_mut(&object).filter(|h| h.version == version) {
                    h.base = beside;
                }
                SubResult::Ok
            }
            Err(e) => sub_result(&e),
        };
        self.send(cx, primary, PeerBody::PushAck { tid, result }, Bytes::new());
        while let Some(note) = self.member().and_then(|m| m.note_of(&object)) {
            self.sub_write(cx, primary, note);
        }
    }

    pub(super) fn serve_pull(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        (object, version): (ObjectId, Version),
        (first_block, have): (u32, Vec<LeafDigest>),
    ) {
        if self.member().is_none() {
            return;
        }
        // Also what is older than what this member should have: the object may have to go back to it.
        if self.version_of(&object) != version {
            let piece = Err(SubResult::VersionMismatch);
            let body = PeerBody::PullReply { tid, object, version, first_block, piece };
            self.send(cx, from, body, Bytes::new());
            return;
        }
        let what = What::ServePull { to: from, tid, object, version, first_block, have };
        let token = self.token(cx, what);
        let block_count = PIECE_BLOCKS;
        cx.out.push(Effect::ReadPiece { token, pg: self.id, object, first_block, block_count });
    }

    /// A piece of the own copy was read for somebody.
    pub(super) fn send_piece(
        &mut self,
        cx: &mut Cx<'_>,
        (to, tid): (OsdId, u64),
        (object, version): (ObjectId, Version),
        (first_block, have): (u32, &[LeafDigest]),
        result: Result<(Piece, pieces::Gaps), SubResult>,
    ) -> u64 {
        let (piece, data) = match result {
            Ok((piece, bad)) if piece.state.version == version && !piece.state.deleted => {
                let (image, data) = piece_image(cx, (piece.content, bad), piece.end, first_block, have);
                (Ok(image), data)
            }
            Ok(_) => (Err(SubResult::VersionMismatch), Bytes::new()),
            Err(why) => (Err(why), Bytes::new()),
        };
        let bytes = data.len() as u64;
        self.send(cx, to, PeerBody::PullReply { tid, object, version, first_block, piece }, data);
        bytes
    }
}

/// A piece as it travels to somebody who has these leaves. Of a leaf with a block that could not be read nobody can say that it is the same.
pub(super) fn piece_image(
    cx: &Cx<'_>,
    (content, bad): (Content, pieces::Gaps),
    end: u32,
    first_block: u32,
    have: &[LeafDigest],
) -> (PieceImage, Bytes) {
    let same = match cx.rules.keep(Rule::KeptIsEqual) || have.is_empty() {
        true => pieces::same(&content, first_block, have),
        false => u32::MAX,
    };
    let same = same & !pieces::leaves_of(&bad, first_block);
    let content = pieces::without(content, first_block, same);
    (PieceImage { same, extents: content.extents, end, bad }, content.data)
}

impl Index {
    /// The object is now as it was needed.
    pub fn hold(&mut self, object: ObjectId, needed: Needed) {
        if needed.version == Version::ZERO {
            self.objects.remove(&object);
        } else {
            self.objects.insert(object, Held::committed(needed.version, needed.deleted));
        }
    }
}

/// Brings an object to a state and takes it out of the missing map, in one transaction.
pub(super) fn replace_ops(object: ObjectId, version: Version, deleted: bool, content: Content) -> Vec<TxnOp> {
    if version == Version::ZERO {
        // The authority never heard of it.
        vec![TxnOp::Purge { object }, TxnOp::DropMissing { object }]
    } else {
        vec![TxnOp::Replace { object, version, deleted, content }]
    }
}

pub(super) fn sub_result(e: &StoreError) -> SubResult {
    match e {
        StoreError::VersionMismatch { .. } => SubResult::VersionMismatch,
        StoreError::NoSpace => SubResult::NoSpace,
        StoreError::NotFound { .. } => SubResult::Missing,
        _ => SubResult::Io,
    }
}
