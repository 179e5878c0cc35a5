//! An object on its way here: at a primary that misses it, or at a member that its primary brings it to.
//!
//! ```text
//!   own piece read ──▶ asked for (Pull, with the digests of its leaves) ──▶ came (PullReply): what differs
//!        ▲                                                                       │
//!        │ next piece                                                            ▼
//!        └────────────────────────────────────────────────── chunks that change are placed in the store
//!                                                                                │ last piece
//!                                                                                ▼
//!                                       one transaction makes it the object, and takes it out of the missing map
//! ```
//!
//! - *What stays is proven.* A piece of the own copy is read, so that its checksums hold; a leaf of it stays only if whoever has the wanted version
//!   finds the same digest. All pieces must be of one version of the own copy, and the transaction names it. No history is believed.
//! - *Nothing is seen before the end.* Chunks are placed in slots that nothing names; a crash, another interval or a newer attempt frees them.
//! - *Piece by piece*, so that clients' operations get in between at every disk and on the link. The primary says when the next one goes.
//! - If the own copy cannot be read, or is not what it was, the object comes whole.
//!
//! *Put together.* At the primary of whole copies, a piece of which the source cannot read some blocks is not given up: it says which these are, and they are
//! asked of the next source, and of the next, and in the end of the own copy, if that is at the wanted version and misses only because a block of it could not be
//! read. One version has one content (P2), and each answer names the version that was read, so it does not matter whose blocks they are; each has the checksum that who could not read it has on
//! record. A copy that a scrub found wrong is
//! no source. One piece is in memory at a time, and nobody is asked twice for it. What could not be read whole elsewhere is replaced once the object is here.
//! A block that nobody could read ends it: the object is damaged if nobody else may have it (`recovery/lost.rs`), and reads are mended (`mend`).

use super::member::sub_result;
use super::pieces;
use super::*;
use crate::store::{Piece, Placed};
use gabion_proto::blocks::Content;
use gabion_proto::limits::*;

/// A piece that did not come is asked for again.
const ASK_AGAIN_MS: Millis = 700;
const ASK_AGAIN_MAX_MS: Millis = 5_000;
/// A primary that says nothing for this long does not bring the object any more, or under another number.
const FORGET_MS: Millis = 20_000;

/// What the own store has of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    Unknown,
    Nothing,
    At(Version),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Reading,
    /// At the primary: until it is its turn.
    Waiting,
    Asked,
    /// At the primary: what nobody else can read, of the own copy.
    ReadingRest,
    Placing,
    Storing,
}

/// See the module docs.
#[derive(Debug)]
pub struct Intake {
    pub tid: u64,
    pub from: OsdId,
    pub version: Version,
    over: Option<Version>,
    /// First block of the piece that is under way.
    first: u32,
    end: u32,
    own: Own,
    /// That piece of the own copy.
    here: Content,
    kept: Vec<u32>,
    placed: Vec<Placed>,
    /// What has come of the piece, which of its leaves are those of the own copy, and the blocks that nobody could read who was asked for it, with their checksums.
    part: Option<(Content, u32)>,
    lacking: BTreeMap<u32, u32>,
    tried: BTreeSet<OsdId>,
    /// Erasure coding: it is to be stored beside what is here, which takes the whole shard.
    beside: Option<Vec<Content>>,
    pub step: Step,
    since: Millis,
    /// When the piece was first asked for.
    asked: Millis,
    heard: Millis,
}

impl Intake {
    /// Its source has said something not long ago.
    pub fn is_alive(&self, now: Millis) -> bool {
        now < self.heard + FORGET_MS
    }

    pub fn new(from: OsdId, tid: u64, version: Version, over: Option<Version>, now: Millis) -> Intake {
        Intake {
            tid,
            from,
            version,
            over,
            first: 0,
            end: u32::MAX,
            own: Own::Unknown,
            here: Content::default(),
            kept: Vec::new(),
            placed: Vec::new(),
            part: None,
            lacking: BTreeMap::new(),
            tried: BTreeSet::new(),
            beside: None,
            step: Step::Reading,
            since: now,
            asked: now,
            heard: now,
        }
    }

    /// The own copy is of no use: everything is brought.
    fn start_over(&mut self) {
        (self.first, self.own) = (0, Own::Nothing);
        (self.here, self.kept, self.placed) = (Content::default(), Vec::new(), Vec::new());
        self.beside.iter_mut().for_each(Vec::clear);
        (self.part, self.lacking, self.tried) = (None, BTreeMap::new(), BTreeSet::new());
    }

    /// A piece of the own copy was read, or not. False: it is of no use.
    fn own_read(&mut self, result: Result<Piece, StoreError>) -> bool {
        let piece = match result {
            Ok(piece) => piece,
            // Other pieces may be readable.
            Err(StoreError::Unreadable { .. }) => return true,
            Err(StoreError::NotFound { .. }) if self.own == Own::Unknown => {
                self.own = Own::Nothing;
                return true;
            }
            Err(_) => return false,
        };
        let state = piece.state;
        // What could not be read before is replaced whole.
        let older = state.version != Version::ZERO && state.version != self.version;
        let usable = older && !state.deleted && state.pending.is_none();
        let expected = matches!(self.own, Own::Unknown) || self.own == Own::At(state.version);
        if !usable || !expected {
            return false;
        }
        self.own = Own::At(state.version);
        self.here = piece.content;
        true
    }

    /// What the own copy has of what nobody else could read.
    fn take_rest(&mut self, result: Result<Piece, StoreError>) {
        let Ok((piece, _)) = pieces::with_gaps(result) else { return };
        let state = piece.state;
        if state.version == self.version && !state.deleted && state.pending.is_none() {
            self.take_part(&piece.content);
        }
    }

    /// What somebody else has of what lacks.
    fn take_part(&mut self, came: &Content) {
        if let Some((part, _)) = &mut self.part {
            *part = pieces::fill(part, came, &mut self.lacking);
        }
    }
}

impl Pg {
    /// An object begins to come here; `piece`: its first piece has come already.
    pub(super) fn begin_intake(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        mut intake: Intake,
        piece: Option<(PieceImage, Bytes)>,
    ) {
        if self.kept_beside(&object).is_some() {
            intake.beside = Some(Vec::new());
        }
        let own = cx.id;
        let older = match &self.phase {
            Phase::Active(a) => a.recovery.has_older(own, &object),
            _ => {
                let held = self.index.objects.get(&object);
                held.is_some_and(|h| !h.deleted && h.base.is_none() && h.version != intake.version)
            }
        };
        // A repair replaces all of a copy.
        let whole =
            !older || intake.over.is_some() || intake.beside.is_some() || self.comes_whole.contains(&object);
        if whole || piece.is_some() {
            intake.own = Own::Nothing;
        }
        let (from, tid, version) = (intake.from, intake.tid, intake.version);
        if piece.is_some() {
            intake.step = Step::Asked;
        }
        self.intakes.insert(object, intake);
        match piece {
            Some((image, data)) => self.piece_came(cx, from, (tid, object, version, 0), Ok(image), data),
            None => self.next_piece(cx, object),
        }
    }

    /// From the piece's beginning: what the own copy has of it comes first.
    fn next_piece(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let (pg, now) = (self.id, cx.now);
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        intake.here = Content::default();
        intake.since = now;
        if intake.first >= intake.end {
            return self.finish_intake(cx, object);
        }
        let (tid, first_block) = (intake.tid, intake.first);
        match intake.own {
            Own::Nothing => self.ask_for_piece(cx, object),
            Own::Unknown | Own::At(_) => {
                intake.step = Step::Reading;
                let token = self.token(cx, What::OwnPiece { object, tid });
                cx.out.push(Effect::ReadPiece { token, pg, object, first_block, block_count: PIECE_BLOCKS });
            }
        }
    }

    pub(super) fn own_piece_read(
        &mut self,
        cx: &mut Cx<'_>,
        (object, tid): (ObjectId, u64),
        result: Result<Piece, StoreError>,
    ) {
        let Some(intake) = self.intakes.get_mut(&object).filter(|i| i.tid == tid) else { return };
        if intake.step == Step::ReadingRest {
            intake.take_rest(result);
            return match intake.lacking.is_empty() {
                true => self.piece_complete(cx, object),
                false => {
                    let tried = std::mem::take(&mut intake.tried);
                    self.intakes.remove(&object);
                    self.assembly_failed(cx, object, tried);
                }
            };
        }
        if intake.step != Step::Reading {
            return;
        }
        if !intake.own_read(result) {
            intake.start_over();
        }
        self.ask_for_piece(cx, object);
    }

    fn ask_for_piece(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        match self.phase {
            Phase::Active(_) => {
                intake.step = Step::Waiting;
                self.want_own_piece(cx, object);
            }
            _ => self.pull_piece(cx, object),
        }
    }

    /// Its turn has come.
    pub(super) fn pull_piece(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let now = cx.now;
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        if intake.step != Step::Asked {
            intake.asked = now;
        }
        (intake.step, intake.since) = (Step::Asked, now);
        let (from, tid, version, first_block) = (intake.from, intake.tid, intake.version, intake.first);
        // A leaf is compared once.
        let have = match intake.part {
            None => pieces::digests(&intake.here, first_block),
            Some(_) => Vec::new(),
        };
        if from != cx.id {
            let body = PeerBody::Pull { tid, object, version, first_block, have };
            self.piece_asked(cx, object);
            return self.send(cx, from, body, Bytes::new());
        }
        // Erasure coding: the own shard was computed here.
        let Some((image, data)) = self.computed_piece(cx, cx.id, object, first_block, &have) else { return };
        self.piece_came(cx, from, (tid, object, version, first_block), Ok(image), data);
    }

    pub(super) fn piece_came(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        (tid, object, version, first): (u64, ObjectId, Version, u32),
        piece: Result<PieceImage, SubResult>,
        data: Bytes,
    ) {
        let (pg, now) = (self.id, cx.now);
        let blocks = cx.map.pools.get(&pg.pool).map_or(0, |p| p.object_bytes / BLOCK_BYTES);
        self.source_speaks(from);
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        let expected = (intake.from, intake.tid, intake.version, intake.first) == (from, tid, version, first);
        if !expected || intake.step != Step::Asked {
            return;
        }
        intake.heard = now;
        let image = match piece {
            Ok(image) => image,
            Err(why) => return self.source_refused(cx, object, why),
        };
        let came = Content { extents: image.extents, data };
        let comparable = !intake.here.extents.is_empty() && intake.part.is_none();
        let declared = if comparable { u32::MAX } else { 0 };
        let valid = came.validate(true).is_ok()
            && pieces::fits(&came, first, image.same)
            && pieces::gaps_fit(&came, &image.bad, first, image.same);
        if !valid || image.same & !declared != 0 {
            return self.source_refused(cx, object, SubResult::BadChecksum);
        }
        // Only a primary puts whole copies together.
        let primary = matches!(self.phase, Phase::Active(_));
        if !image.bad.is_empty() && (!primary || self.code.is_some()) {
            return self.source_refused(cx, object, SubResult::Io);
        }
        if image.same != 0 {
            cx.takes(Branch::KeepLeaves);
        }
        let is_rest = intake.part.is_some();
        if !is_rest {
            intake.end = image.end.min(blocks);
        }
        if from != cx.id && primary {
            self.piece_arrived(cx, object);
            self.count_moved(cx, came.data.len() as u64);
        }
        if !image.bad.is_empty() {
            self.partly_readable(cx, object, from);
        }
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        if let Some(whole) = &mut intake.beside {
            whole.push(came);
            return self.piece_is_here(cx, object);
        }
        match is_rest {
            true => intake.take_part(&came),
            false => {
                (intake.part, intake.lacking) = (Some((came, image.same)), image.bad.into_iter().collect())
            }
        }
        match intake.lacking.is_empty() {
            true => self.piece_complete(cx, object),
            false => self.ask_for_rest(cx, object),
        }
    }

    /// Somebody else is asked for what lacks of a piece, or in the end the own copy.
    fn ask_for_rest(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let (own, pg, now) = (cx.id, self.id, cx.now);
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        let Phase::Active(a) = &mut self.phase else { return };
        cx.takes(Branch::AskForRest);
        intake.tried.insert(intake.from);
        if let Some(source) = a.recovery.source_but(&object, &intake.tried, cx.map) {
            intake.from = source;
            a.recovery.pull_from(&object, source, now);
            return self.ask_for_piece(cx, object);
        }
        let (tid, first_block) = (intake.tid, intake.first);
        if !a.recovery.partly.contains(&(object, own)) {
            let tried = std::mem::take(&mut intake.tried);
            self.intakes.remove(&object);
            return self.assembly_failed(cx, object, tried);
        }
        intake.step = Step::ReadingRest;
        let token = self.token(cx, What::OwnPiece { object, tid });
        cx.out.push(Effect::ReadPiece { token, pg, object, first_block, block_count: PIECE_BLOCKS });
    }

    /// All of a piece has come.
    fn piece_complete(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let (pg, now) = (self.id, cx.now);
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        let Some((came, same)) = intake.part.take() else { return };
        let (tid, first) = (intake.tid, intake.first);
        // The next piece is asked of somebody who may have all of it.
        if !std::mem::take(&mut intake.tried).is_empty() {
            cx.takes(Branch::PutTogether);
            if let Phase::Active(a) = &mut self.phase
                && let Some(source) = a.recovery.source_but(&object, &BTreeSet::new(), cx.map)
            {
                intake.from = source;
                a.recovery.pull_from(&object, source, now);
            }
        }
        let here = std::mem::take(&mut intake.here);
        let (kept, content) = pieces::merge(&here, came, first, same);
        intake.kept.extend(kept);
        if content.extents.is_empty() {
            return self.piece_is_here(cx, object);
        }
        intake.step = Step::Placing;
        let token = self.token(cx, What::PlacePiece { object, tid });
        cx.out.push(Effect::Place { token, pg, object, content });
    }

    pub fn piece_placed(
        &mut self,
        cx: &mut Cx<'_>,
        (object, tid): (ObjectId, u64),
        result: Result<Placed, StoreError>,
    ) {
        let Some(intake) = self.intakes.get_mut(&object).filter(|i| i.tid == tid) else { return };
        if intake.step != Step::Placing {
            return;
        }
        match result {
            Ok(placed) => {
                intake.placed.push(placed);
                self.piece_is_here(cx, object);
            }
            Err(e) => self.intake_failed(cx, object, e),
        }
    }

    fn piece_is_here(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        intake.first = intake.first.saturating_add(PIECE_BLOCKS);
        self.next_piece(cx, object);
    }

    /// Everything is here: one transaction, if it is still what is wanted.
    fn finish_intake(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let beside = self.kept_beside(&object);
        let Some(intake) = self.intakes.get_mut(&object) else { return };
        let (tid, version) = (intake.tid, intake.version);
        if beside.is_some() != intake.beside.is_some() {
            self.intakes.remove(&object);
            return;
        }
        intake.step = Step::Storing;
        let base = match intake.own {
            Own::At(version) if !intake.kept.is_empty() => version,
            _ => Version::ZERO,
        };
        let (kept, placed) = (std::mem::take(&mut intake.kept), std::mem::take(&mut intake.placed));
        let whole = intake.beside.take().unwrap_or_default();
        let over = intake.over;
        let own = matches!(self.phase, Phase::Active(_));
        let wanted = match own {
            true => self.may_store_own(cx.id, object, (tid, version)),
            false => self.may_store_pushed(cx, tid, (object, version, over)),
        };
        if !wanted {
            self.intakes.remove(&object);
            return;
        }
        let what = match own {
            true => What::Recovered { object, beside },
            false => What::PushApplied { tid, object, version, deleted: false, beside },
        };
        let ops = match (cx.rules.keep(Rule::MissingUntilStored), beside) {
            (false, _) => vec![TxnOp::DropMissing { object }],
            (true, Some(base)) => {
                cx.takes(Branch::RecoverBeside);
                let extents = whole.iter().flat_map(|c| c.extents.iter().cloned()).collect();
                let data = whole.iter().flat_map(|c| c.data.iter().copied()).collect();
                self.beside_ops(cx, object, base, version, Content { extents, data })
            }
            (true, None) => vec![TxnOp::Assemble { object, version, base, kept, placed }],
        };
        self.submit(cx, what, ops);
    }

    /// It was stored, or not: then it comes whole the next time, in case the own copy was not what it seemed to be.
    pub(super) fn intake_stored(&mut self, object: ObjectId, stored: bool) {
        self.intakes.remove(&object);
        match stored {
            true => _ = self.comes_whole.remove(&object),
            false => _ = self.comes_whole.insert(object),
        }
    }

    fn intake_failed(&mut self, cx: &mut Cx<'_>, object: ObjectId, e: StoreError) {
        let Some(intake) = self.intakes.remove(&object) else { return };
        match self.phase {
            Phase::Active(_) => self.own_recovered(cx, object, None, Err(e)),
            _ => {
                let body = PeerBody::PushAck { tid: intake.tid, result: sub_result(&e) };
                self.send(cx, intake.from, body, Bytes::new());
            }
        }
    }

    fn source_refused(&mut self, cx: &mut Cx<'_>, object: ObjectId, why: SubResult) {
        if let Phase::Active(a) = &mut self.phase
            && let Some(intake) = self.intakes.get(&object).filter(|i| i.part.is_some())
        {
            // Others may have the rest.
            a.recovery.refused(object, intake.from, why);
            return self.ask_for_rest(cx, object);
        }
        let Some(intake) = self.intakes.remove(&object) else { return };
        match self.phase {
            Phase::Active(_) => self.pull_refused(cx, object, intake.from, why),
            // Changed on the way: the primary offers it again.
            _ if why == SubResult::BadChecksum => {
                let body = PeerBody::PushAck { tid: intake.tid, result: why };
                self.send(cx, intake.from, body, Bytes::new());
            }
            _ => {}
        }
    }

    /// What does not come is asked for again.
    pub(super) fn pull_on(&mut self, cx: &mut Cx<'_>) {
        let (own, now) = (cx.id, cx.now);
        // A primary changes the source.
        if self.member().is_some() {
            self.intakes.retain(|_, i| i.step != Step::Asked || i.is_alive(now));
        }
        // Less and less often, of somebody who is slow.
        let patience = |i: &Intake| i.since.saturating_sub(i.asked).clamp(ASK_AGAIN_MS, ASK_AGAIN_MAX_MS);
        let wanted = |o: &ObjectId, i: &Intake| match &self.phase {
            Phase::Active(a) => i.from != own && a.recovery.is_under_way(o, i.tid),
            _ => true,
        };
        let late = |i: &Intake| i.step == Step::Asked && now >= i.since + patience(i);
        let late = self.intakes.iter().filter(|(o, i)| late(i) && wanted(o, i));
        let late: Vec<ObjectId> = late.map(|(o, _)| *o).collect();
        for object in late {
            cx.takes(Branch::PieceAgain);
            self.pull_piece(cx, object);
        }
    }
}
