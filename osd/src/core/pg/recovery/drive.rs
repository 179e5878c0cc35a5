//! Starts what there is room for, and takes each object through its stages.

use super::record::{PULL_PATIENCE_MS, PUSH_PATIENCE_MS};
use super::*;
use gabion_proto::limits::PIECE_BLOCKS;

impl Pg {
    pub(super) fn recovery(&mut self) -> Option<&mut Recovery> {
        match &mut self.phase {
            Phase::Active(a) => Some(&mut a.recovery),
            _ => None,
        }
    }

    /// Starts what there is room for; reports clean when nothing is left.
    pub fn recover(&mut self, cx: &mut Cx<'_>) {
        self.forget_removed(cx);
        let object_bytes = cx.map.pools.get(&self.id.pool).map_or(0, |p| u64::from(p.object_bytes));
        let Phase::Active(a) = &mut self.phase else { return };
        a.recovery.object_bytes = object_bytes;
        let done = a.recovery.is_done();
        let whole = done || (self.fills && !cx.rules.keep(Rule::FillWhole));
        if whole && !a.clean_reported && a.recovery.unsettled.is_empty() {
            a.clean_reported = true;
            let (pg, interval) = (self.id, self.record.interval);
            if self.fills {
                self.report(cx, What::ReportFilled, MonitorRequest::Filled { pg, interval });
            } else {
                self.report(cx, What::ReportClean, MonitorRequest::Clean { pg, interval });
            }
        }
        if done {
            return;
        }
        let Phase::Active(a) = &mut self.phase else { return };
        let patience = |s: &Stage| match s {
            Stage::Pulling { .. } => Some(PULL_PATIENCE_MS),
            Stage::Pushing { .. } => Some(PUSH_PATIENCE_MS),
            Stage::Replacing | Stage::Reading | Stage::Gathering => None,
        };
        // Whoever waits for its turn owes nothing; nor does a source while its piece is being stored.
        let owes = |o: &ObjectId, w: &Work| match w.stage {
            Stage::Pulling { .. } => self.intakes.get(o).is_none_or(|i| i.step == Step::Asked),
            _ => !a.recovery.wishes_for(o),
        };
        // The only source may need long for a disk that is failing: it is asked again and again, and not from the beginning.
        let alone = |o: &ObjectId, w: &Work| match w.stage {
            Stage::Pulling { from } => {
                self.intakes.get(o).is_some_and(|i| i.is_alive(cx.now))
                    && cx.map.up_osd(from).is_some()
                    && a.recovery.source_but(o, &[from].into(), cx.map).is_none()
            }
            _ => false,
        };
        let is_stale = |o: &ObjectId, w: &Work| {
            patience(&w.stage).is_some_and(|ms| cx.now >= w.since + ms) && owes(o, w) && !alone(o, w)
        };
        let stale: Vec<ObjectId> =
            a.recovery.work.iter().filter(|(o, w)| is_stale(o, w)).map(|(o, _)| *o).collect();
        for o in stale {
            // Another source, if there is one; a member that is pushed to is waited for, and reported in the end.
            let asked = self.intakes.remove(&o).is_some();
            if let Some(Work { stage: Stage::Pulling { from }, .. }) = a.recovery.work.remove(&o)
                && asked
            {
                a.recovery.bad.insert((o, from));
                cx.takes(Branch::SourceLate);
            }
        }
        let written = a.writes.values().map(|w| w.object).collect::<BTreeSet<ObjectId>>();
        // Whose writes have ended are waited for now.
        a.recovery.draining.retain(|o| written.contains(o));
        self.pass_late(cx);
        self.grant_wishes(cx);
        loop {
            let (pg, members) = (self.id, self.record.members().count());
            let Some(r) = self.recovery() else { return };
            let here = r.load();
            // Wanted objects may overtake even when all places are taken. Who waits for somebody who is late takes none.
            let places = here.objects + r.draining.len();
            if places >= 2 * AT_ONCE {
                break;
            }
            let mut under_way = cx.recovery_elsewhere;
            under_way += here;
            let allowed = cx.throttle.allows(under_way.moving());
            let waits = under_way.reserved >= BYTES_AT_ONCE || !allowed || !r.wishes.is_empty();
            // A write in the way of an object makes it begin anew: beside clients, where an object takes longer, one at a time of all groups.
            let limited = cx.throttle.limits();
            let taken = match limited {
                true => !cx.throttle.turns.may_begin(pg),
                false => places >= AT_ONCE,
            };
            let next = r.next(cx.id, cx.now, taken || waits, &written);
            let registered = cx.throttle.turns.waits_to_begin(pg) && r.spare_is_known;
            if limited && next.is_none() && here.objects == 0 && !registered {
                if let Some(spare) = r.next(cx.id, cx.now, false, &written).map(|o| r.spare(&o, members)) {
                    cx.throttle.turns.begin(pg, spare);
                    r.spare_is_known = true;
                }
                if !allowed {
                    cx.takes(if cx.throttle.probes() { Branch::ThrottleProbes } else { Branch::Throttled });
                }
            }
            let Some(object) = next else { break };
            match r.demanded.contains(&object) {
                true => cx.takes(Branch::Demanded),
                false => cx.throttle.turns.end(),
            }
            self.start_recovery(cx, object);
        }
        self.ask_strays(cx);
    }

    fn start_recovery(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let Phase::Active(a) = &mut self.phase else { return };
        // Rule P4: writes that are in flight end first, and what waits for that begins as soon as they have.
        if a.has_writes(&object) && cx.rules.keep(Rule::RecoveryWaitsForWrites) {
            cx.takes(Branch::RecoveryWaitsForWrites);
            a.recovery.draining.insert(object);
            a.recovery.demand(object);
            return;
        }
        let needed = a.recovery.missing.values().find_map(|m| m.get(&object));
        if self.code.is_some() && needed.is_some_and(|n| !n.deleted) {
            cx.takes(Branch::ComputeShards);
            self.gather_lost(cx, object);
            return;
        }
        let Phase::Active(a) = &mut self.phase else { return };
        let tid = a.next_tid();
        let r = &mut a.recovery;
        let own = r.missing.get(&cx.id).and_then(|m| m.get(&object)).copied();
        let stage = match own {
            Some(n) if n.deleted => Stage::Replacing,
            Some(_) => {
                match r.source_but(&object, &BTreeSet::new(), cx.map) {
                    Some(from) => Stage::Pulling { from },
                    None => {
                        // Whoever is down or was late is nobody who can be reached, until strays are asked again.
                        let all: Vec<OsdId> = r.sources.get(&object).into_iter().flatten().copied().collect();
                        r.bad.extend(all.into_iter().map(|o| (object, o)));
                        return;
                    }
                }
            }
            None => {
                let needed = r.missing.values().find_map(|m| m.get(&object)).copied();
                match needed {
                    Some(n) if n.deleted => Stage::Pushing { waiting: BTreeSet::new() },
                    Some(_) => Stage::Reading,
                    None => return,
                }
            }
        };
        let pull = match stage {
            Stage::Pulling { from } => own.map(|n| (from, n.version)),
            _ => None,
        };
        match stage {
            Stage::Pulling { .. } => cx.takes(Branch::Pull),
            Stage::Reading => cx.takes(Branch::Push),
            _ => cx.takes(Branch::RecoverDeletion),
        }
        let (replacing, reading) = (matches!(stage, Stage::Replacing), matches!(stage, Stage::Reading));
        r.work.insert(object, Work::new(stage, tid, cx.now));
        if let Some((from, version)) = pull {
            self.begin_intake(cx, object, Intake::new(from, tid, version, None, cx.now), None);
        } else if let (true, Some(n)) = (replacing, own) {
            let ops = replace_ops(object, n.version, true, Content::default());
            self.submit(cx, What::Recovered { object, beside: None }, ops);
        } else if reading {
            let token = self.token(cx, What::PushRead { object, tid });
            let (pg, first_block, block_count) = (self.id, 0, PIECE_BLOCKS);
            cx.out.push(Effect::ReadPiece { token, pg, object, first_block, block_count });
        } else {
            self.push_to_all(cx, object, true, None);
        }
    }

    /// What others owe for too long holds nobody up, and what was offered and perhaps not heard is offered again.
    fn pass_late(&mut self, cx: &mut Cx<'_>) {
        let (own, now) = (cx.id, cx.now);
        let Phase::Active(a) = &mut self.phase else { return };
        let gathers = a.shards.stalled_recovery(own, now);
        if a.recovery.mark_late(now, cx.recovery_elsewhere.late_count, &gathers) {
            cx.takes(Branch::PassLate);
        }
        for (to, tid, object, needed) in a.recovery.offers(now) {
            cx.takes(Branch::OfferAgain);
            let (version, deleted) = (needed.version, needed.deleted);
            let body = PeerBody::Push { tid, object, version, deleted, over: None, piece: None };
            self.send(cx, to, body, Bytes::new());
        }
    }

    /// Pieces whose turn it is go; those of objects in demand whatever clients leave.
    fn grant_wishes(&mut self, cx: &mut Cx<'_>) {
        let (own, pg) = (cx.id, self.id);
        loop {
            let Some(r) = self.recovery() else { return };
            let mut under_way = cx.recovery_elsewhere;
            under_way += r.load();
            let allowed = cx.throttle.allows(under_way.moving());
            if !allowed && !r.wishes.is_empty() {
                cx.throttle.turns.go_on(pg);
                cx.takes(if cx.throttle.probes() { Branch::ThrottleProbes } else { Branch::Throttled });
            }
            let Some(wish) = r.next_wish(allowed && under_way.reserved < BYTES_AT_ONCE) else { return };
            let Some(w) = r.work.get_mut(&wish.object) else { continue };
            w.legs.insert(wish.to, Leg::here(cx.now));
            w.since = cx.now;
            if let (true, Stage::Pulling { from }) = (wish.to == own, &w.stage) {
                let from = *from;
                r.asked(from, cx.now);
            }
            match wish.to == own {
                true => self.pull_piece(cx, wish.object),
                false => self.grant(cx, wish),
            }
        }
    }

    /// A piece for a member.
    fn grant(&mut self, cx: &mut Cx<'_>, wish: Wish) {
        let Wish { object, to, tid, version, first_block, have } = wish;
        if let Some((image, data)) = self.computed_piece(cx, to, object, first_block, &have) {
            if let Some(r) = self.recovery() {
                r.asked(to, cx.now);
                r.piece_goes(&object, to, cx.now);
            }
            let piece = Ok(image);
            return self.send(cx, to, PeerBody::PullReply { tid, object, version, first_block, piece }, data);
        }
        let token = self.token(cx, What::ServePushed { to, tid, object, version, first_block, have });
        let block_count = PIECE_BLOCKS;
        cx.out.push(Effect::ReadPiece { token, pg: self.id, object, first_block, block_count });
    }

    /// Erasure coding: a piece of a shard that was computed here.
    pub(in super::super) fn computed_piece(
        &mut self,
        cx: &mut Cx<'_>,
        to: OsdId,
        object: ObjectId,
        first_block: u32,
        have: &[LeafDigest],
    ) -> Option<(PieceImage, Bytes)> {
        let whole = self.recovery()?.work.get(&object)?.computed.get(&to)?;
        let (content, end) = (pieces::slice(whole, first_block, PIECE_BLOCKS), pieces::end_of(whole));
        let (image, data) = piece_image(cx, (content, Vec::new()), end, first_block, have);
        self.count_moved(cx, data.len() as u64);
        Some((image, data))
    }

    /// The next piece of what misses here: when it is its turn.
    pub(in super::super) fn want_own_piece(&mut self, cx: &mut Cx<'_>, object: ObjectId) {
        let own = cx.id;
        let Some(r) = self.recovery() else { return };
        let Some(w) = r.work.get_mut(&object) else {
            self.intakes.remove(&object);
            return;
        };
        w.legs.remove(&own);
        let (tid, version) = (w.tid, Version::ZERO);
        r.wishes.push_back(Wish { object, to: own, tid, version, first_block: 0, have: Vec::new() });
        self.grant_wishes(cx);
    }

    /// A piece of what misses here was asked for.
    pub(in super::super) fn piece_asked(&mut self, cx: &Cx<'_>, object: ObjectId) {
        if let Some(r) = self.recovery() {
            r.piece_goes(&object, cx.id, cx.now);
        }
    }

    /// It has come, and is to be stored.
    pub(in super::super) fn piece_arrived(&mut self, cx: &Cx<'_>, object: ObjectId) {
        if let Some(r) = self.recovery() {
            r.piece_is_here(&object, cx.id, cx.now);
        }
    }

    /// A member asks for a piece of what it was offered.
    pub(in super::super) fn piece_wanted(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        (object, version): (ObjectId, Version),
        (first_block, have): (u32, Vec<LeafDigest>),
    ) {
        let Some(r) = self.recovery() else { return };
        r.owing.remove(&from);
        let offered = |w: &&mut Work| {
            let waiting = matches!(&w.stage, Stage::Pushing { waiting } if waiting.contains(&from));
            w.tid == tid && waiting
        };
        let Some(w) = r.work.get_mut(&object).filter(offered) else {
            let piece = Err(SubResult::Missing);
            let body = PeerBody::PullReply { tid, object, version, first_block, piece };
            return self.send(cx, from, body, Bytes::new());
        };
        w.since = cx.now;
        w.legs.remove(&from);
        r.wishes.retain(|w| (w.object, w.to) != (object, from));
        r.wishes.push_back(Wish { object, to: from, tid, version, first_block, have });
        self.grant_wishes(cx);
    }

    pub(in super::super) fn source_speaks(&mut self, from: OsdId) {
        // Whatever a member answers, it works.
        if let Some(r) = self.recovery() {
            r.owing.remove(&from);
        }
    }

    /// The source has no good copy.
    pub(in super::super) fn pull_refused(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        from: OsdId,
        why: SubResult,
    ) {
        let Some(r) = self.recovery() else { return };
        let Some(needed) = r.missing.get(&cx.id).and_then(|m| m.get(&object)).copied() else { return };
        r.refused(object, from, why);
        r.work.remove(&object);
        tracing::warn!(pg = %self.id, source = %from, %object, "no good copy there");
        cx.takes(Branch::SourceBad);
        self.keep_if_damaged(cx, object, needed);
        self.recover(cx);
    }

    /// All of an object that misses here has come: whether it is still wanted.
    pub(in super::super) fn may_store_own(
        &mut self,
        own: OsdId,
        object: ObjectId,
        (tid, version): (u64, Version),
    ) -> bool {
        let missing = self.index.missing.get(&object).copied();
        let coded = self.code.is_some();
        let Some(w) = self.recovery().and_then(|r| r.work.get_mut(&object)) else { return false };
        let wanted = missing.map_or(coded, |n| n.version == version && !n.deleted);
        if w.tid != tid || !wanted {
            return false;
        }
        w.legs.remove(&own);
        if let Stage::Pulling { .. } = w.stage {
            w.stage = Stage::Replacing;
        }
        true
    }

    pub(in super::super) fn own_recovered(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        beside: Option<Version>,
        result: Result<(), StoreError>,
    ) {
        self.intake_stored(object, result.is_ok());
        let own = cx.id;
        let Some(r) = self.recovery() else { return };
        if let Some(w) = r.work.get_mut(&object) {
            w.legs.remove(&own);
            w.computed.remove(&own);
        }
        let pushing = match r.work.get_mut(&object).map(|w| &mut w.stage) {
            Some(Stage::Pushing { waiting }) => {
                waiting.remove(&cx.id);
                !waiting.is_empty()
            }
            _ => false,
        };
        if !pushing {
            r.work.remove(&object);
        }
        match result {
            Ok(()) => {
                let needed = r.missing.get(&own).and_then(|m| m.get(&object)).copied();
                let partly = r.partly_read(&object);
                let repaired = r.settle(cx.id, &object);
                self.counters.scrub_repaired += u64::from(repaired);
                self.index.missing.remove(&object);
                self.comes(cx, &object);
                if let Some(n) = needed {
                    self.replace_partly_read(cx, object, n, partly);
                    self.index.hold(object, n);
                    if let Some(h) = self.index.objects.get_mut(&object) {
                        h.base = beside;
                    }
                }
                if let Phase::Active(a) = &mut self.phase {
                    a.own_copy_is_new(&object);
                }
                self.commit_recovered(cx, object);
                self.count_recovered();
                self.resume(cx);
                self.recover(cx);
            }
            // No room, most likely.
            Err(e) => {
                r.not_before.insert(object, cx.now + AGAIN_MS);
                tracing::warn!(pg = %self.id, %object, error = %e, "cannot store a recovered object");
                cx.takes(Branch::OwnRefused);
            }
        }
    }

    fn count_recovered(&mut self) {
        self.recovered_objects += 1;
        self.counters.recovered_objects += 1;
    }

    pub fn object_read(
        &mut self,
        cx: &mut Cx<'_>,
        what: What,
        result: Result<(ObjectState, Content), StoreError>,
    ) {
        if let What::ScrubCopy { tid, object } = what {
            self.copy_read(cx, (tid, object), result);
        }
    }

    pub fn piece_read(&mut self, cx: &mut Cx<'_>, what: What, result: Result<Piece, StoreError>) {
        match what {
            What::OwnPiece { object, tid } => self.own_piece_read(cx, (object, tid), result),
            What::ServePull { to, tid, object, version, first_block, have } => {
                // Of shards rows are read.
                let result = match self.code {
                    None => pieces::with_gaps(result),
                    Some(_) => result.map(|piece| (piece, Vec::new())),
                };
                let result = result.map_err(|e| sub_result(&e));
                self.send_piece(cx, (to, tid), (object, version), (first_block, &have), result);
            }
            What::ServePushed { to, tid, object, version, first_block, have } => {
                let result = self.own_piece(cx, (object, tid), result);
                if let (Ok(piece), Some(r)) = (&result, self.recovery())
                    && let Some(w) = r.work.get_mut(&object).filter(|w| w.tid == tid)
                {
                    w.goes(first_block, piece.end);
                }
                let result = result.map(|piece| (piece, Vec::new()));
                let bytes = self.send_piece(cx, (to, tid), (object, version), (first_block, &have), result);
                if let Some(r) = self.recovery() {
                    r.asked(to, cx.now);
                    if r.is_under_way(&object, tid) {
                        r.piece_goes(&object, to, cx.now);
                    }
                }
                self.count_moved(cx, bytes);
            }
            What::PushRead { object, tid } => {
                let Ok(piece) = self.own_piece(cx, (object, tid), result) else { return };
                let Some(r) = self.recovery().filter(|r| r.is_under_way(&object, tid)) else { return };
                r.own_bad.remove(&object);
                self.push_to_all(cx, object, piece.state.deleted, Some(piece));
            }
            _ => {}
        }
    }

    /// A piece of the own copy that members are to get. One that cannot be read is lost.
    fn own_piece(
        &mut self,
        cx: &mut Cx<'_>,
        (object, tid): (ObjectId, u64),
        result: Result<Piece, StoreError>,
    ) -> Result<Piece, SubResult> {
        match result {
            Ok(piece) => {
                let held = self.index.objects.get(&object).copied();
                if held == Some(Held::committed(piece.state.version, piece.state.deleted)) {
                    return Ok(piece);
                }
                // Unless it was given up for a write, and has begun anew.
                if let Some(r) = self.recovery().filter(|r| r.is_under_way(&object, tid)) {
                    r.work.remove(&object);
                }
                Err(SubResult::VersionMismatch)
            }
            // It gave way to a write, of which nobody else may have the version yet. It is read again.
            Err(_) if !self.recovery().is_some_and(|r| r.is_under_way(&object, tid)) => {
                Err(SubResult::VersionMismatch)
            }
            Err(e) => {
                tracing::warn!(pg = %self.id, osd = %cx.id, %object, error = %e, result = ?sub_result(&e), "own copy is bad");
                if let Some(r) = self.recovery() {
                    r.work.remove(&object);
                    // Others get their turn.
                    r.not_before.insert(object, cx.now + UNREADABLE_AGAIN_MS);
                }
                self.lose_own_copy(cx, object);
                self.recover(cx);
                Err(SubResult::Io)
            }
        }
    }

    /// Offers it to every other member that lacks the object.
    fn push_to_all(&mut self, cx: &mut Cx<'_>, object: ObjectId, deleted: bool, first: Option<Piece>) {
        let own = cx.id;
        let Some(r) = self.recovery() else { return };
        let lacking: Vec<(OsdId, Version)> = r
            .missing
            .iter()
            .filter(|(o, _)| **o != own)
            .filter_map(|(o, m)| m.get(&object).map(|n| (*o, n.version)))
            .collect();
        if !r.work.contains_key(&object) {
            return;
        }
        for (o, _) in &lacking {
            r.asked(*o, cx.now);
        }
        let repairs = r.repairs_of(&object);
        let first = first.filter(|_| !deleted);
        let older: BTreeSet<OsdId> =
            lacking.iter().map(|(o, _)| *o).filter(|o| r.has_older(*o, &object)).collect();
        let Some(w) = r.work.get_mut(&object) else { return };
        w.stage = Stage::Pushing { waiting: lacking.iter().map(|(o, _)| *o).collect() };
        w.since = cx.now;
        let tid = w.tid;
        if let Some(piece) = &first {
            w.goes(0, piece.end);
        }
        let leg = |o: &OsdId| Leg::there(first.is_some() && !older.contains(o), cx.now);
        w.legs = lacking.iter().map(|(o, _)| (*o, leg(o))).collect();
        let mut bytes = 0;
        for (o, version) in lacking {
            let piece = first.as_ref().filter(|_| !older.contains(&o));
            let data = piece.map_or_else(Bytes::new, |p| p.content.data.clone());
            let piece = piece.map(|p| PieceImage {
                same: 0,
                extents: p.content.extents.clone(),
                end: p.end,
                bad: Vec::new(),
            });
            bytes += data.len() as u64;
            let over = repairs.get(&o).copied();
            self.send(cx, o, PeerBody::Push { tid, object, version, deleted, over, piece }, data);
        }
        self.count_moved(cx, bytes);
    }

    pub(in super::super) fn count_moved(&mut self, cx: &mut Cx<'_>, bytes: u64) {
        self.recovered_bytes += bytes;
        self.counters.recovered_bytes += bytes;
        cx.throttle.spend(bytes);
    }

    pub(in super::super) fn push_ack(&mut self, cx: &mut Cx<'_>, from: OsdId, tid: u64, result: SubResult) {
        let Some(r) = self.recovery() else { return };
        r.owing.remove(&from);
        let Some((object, w)) = r.work.iter_mut().find(|(_, w)| w.tid == tid) else { return };
        let object = *object;
        let Stage::Pushing { waiting } = &mut w.stage else { return };
        if !waiting.remove(&from) {
            return;
        }
        let last = waiting.is_empty();
        w.legs.remove(&from);
        w.computed.remove(&from);
        if last {
            r.work.remove(&object);
        }
        if result == SubResult::Ok {
            let repaired = r.settle(from, &object);
            self.counters.scrub_repaired += u64::from(repaired);
            self.commit_recovered(cx, object);
            self.count_recovered();
        } else {
            r.not_before.insert(object, cx.now + AGAIN_MS);
            tracing::warn!(pg = %self.id, member = %from, %object, ?result, "a member did not take a recovered object");
            cx.takes(Branch::PushRefused);
        }
        if last {
            self.resume(cx);
            self.recover(cx);
        }
    }

    /// Objects of removed volumes are nobody's any more.
    fn forget_removed(&mut self, cx: &mut Cx<'_>) {
        let known = cx.map.tombstones();
        let Some(r) = self.recovery() else { return };
        if std::mem::replace(&mut r.forgotten, known) == known {
            return;
        }
        r.unsettled.retain(|o| !is_removed(cx.map, o));
        let gone: BTreeSet<ObjectId> = r.missing.values().flat_map(|m| removed_objects(cx.map, m)).collect();
        for o in gone {
            for m in r.missing.values_mut() {
                m.remove(&o);
            }
            r.work.remove(&o);
            r.not_before.remove(&o);
            r.demanded.remove(&o);
            r.uncertain.remove(&o);
            r.own_bad.remove(&o);
            r.repairs.retain(|(object, _), _| *object != o);
            r.unreadable.retain(|(object, _)| *object != o);
            r.damaged.retain(|(object, _)| *object != o);
            r.partly.retain(|(object, _)| *object != o);
        }
    }
}
