//! Starts what there is room for, and takes each object through its stages.

use super::record::{PULL_PATIENCE_MS, PUSH_PATIENCE_MS};
use super::*;

impl Pg {
    pub(super) fn recovery(&mut self) -> Option<&mut Recovery> {
        match &mut self.phase {
            Phase::Active(a) => Some(&mut a.recovery),
            _ => None,
        }
    }

    /// Starts what there is room for; reports clean when nothing is left.
    pub(in super::super) fn recover(&mut self, cx: &mut Cx<'_>) {
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
        let is_stale = |w: &Work| patience(&w.stage).is_some_and(|ms| cx.now >= w.since + ms);
        let stale: Vec<ObjectId> =
            a.recovery.work.iter().filter(|(_, w)| is_stale(w)).map(|(o, _)| *o).collect();
        for o in stale {
            // Another source, if there is one; a member that is pushed to is waited for, and reported in the end.
            if let Some(Work { stage: Stage::Pulling { from }, .. }) = a.recovery.work.remove(&o) {
                a.recovery.bad.insert((o, from));
                cx.takes(Branch::SourceLate);
            }
        }
        let written = a.writes.values().map(|w| w.object).collect::<BTreeSet<ObjectId>>();
        // Whose writes have ended are waited for now.
        a.recovery.draining.retain(|o| written.contains(o));
        loop {
            let Some(r) = self.recovery() else { return };
            // Wanted objects may overtake even when all places are taken.
            let places = r.work.len() + r.draining.len();
            if places >= 2 * AT_ONCE {
                break;
            }
            let under_way = cx.recovery_bytes_elsewhere + r.bytes();
            let taken = places >= AT_ONCE || under_way >= BYTES_AT_ONCE || !cx.throttle.allows(under_way);
            let next = r.next(cx.id, cx.now, taken, &written);
            if next.is_none() && taken && !cx.throttle.allows(under_way) {
                cx.takes(if cx.throttle.probes() { Branch::ThrottleProbes } else { Branch::Throttled });
            }
            let Some(object) = next else { break };
            if r.demanded.contains(&object) {
                cx.takes(Branch::Demanded);
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
                let source = r.sources.get(&object).and_then(|s| {
                    s.iter().find(|o| !r.bad.contains(&(object, **o)) && cx.map.up_osd(**o).is_some())
                });
                match source {
                    Some(from) => Stage::Pulling { from: *from },
                    None => {
                        r.sources.remove(&object);
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
        r.work.insert(object, Work { stage, since: cx.now, tid });
        if let Some((from, _)) = pull {
            r.asked(from, cx.now);
        }
        if let Some((from, version)) = pull {
            self.send(cx, from, PeerBody::Pull { tid, object, version }, Bytes::new());
        } else if let (true, Some(n)) = (replacing, own) {
            let ops = replace_ops(object, n.version, true, Content::default());
            self.submit(cx, What::Recovered { object, beside: None }, ops);
        } else if reading {
            let token = self.token(cx, What::PushRead { object });
            cx.out.push(Effect::ReadObject { token, pg: self.id, object });
        } else {
            self.push_to_all(cx, object, true, Content::default());
        }
    }

    pub(in super::super) fn pulled(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        object: ObjectId,
        version: Version,
        image: Result<ObjectImage, SubResult>,
        data: Bytes,
    ) {
        let Some(r) = self.recovery() else { return };
        // Whatever a member answers, it works.
        r.owing.remove(&from);
        let Some(needed) = r.missing.get(&cx.id).and_then(|m| m.get(&object)).copied() else { return };
        let expected =
            r.work.get(&object).is_some_and(|w| matches!(w.stage, Stage::Pulling { from: f } if f == from));
        if !expected || needed.version != version {
            return;
        }
        let unreadable = image == Err(SubResult::Io);
        let content = match image {
            Ok(image) if image.deleted == needed.deleted => Some(Content { extents: image.extents, data }),
            _ => None,
        };
        match content.filter(|c| c.validate(true).is_ok()) {
            Some(content) => {
                if let Some(w) = r.work.get_mut(&object) {
                    w.stage = Stage::Replacing;
                }
                self.count_moved(cx, content.data.len() as u64);
                let ops = replace_ops(object, version, needed.deleted, content);
                self.submit(cx, What::Recovered { object, beside: None }, ops);
            }
            None => {
                r.bad.insert((object, from));
                r.work.remove(&object);
                if unreadable {
                    r.unreadable.insert((object, from));
                }
                tracing::warn!(pg = %self.id, source = %from, %object, "no good copy there");
                cx.takes(Branch::SourceBad);
                self.keep_if_damaged(cx, object, needed);
                self.recover(cx);
            }
        }
    }

    pub(in super::super) fn own_recovered(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        beside: Option<Version>,
        result: Result<(), StoreError>,
    ) {
        let Some(r) = self.recovery() else { return };
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
                let needed = r.missing.get(&cx.id).and_then(|m| m.get(&object)).copied();
                let repaired = r.settle(cx.id, &object);
                self.counters.scrub_repaired += u64::from(repaired);
                self.index.missing.remove(&object);
                if let Some(n) = needed {
                    self.index.hold(object, n);
                    if let Some(h) = self.index.objects.get_mut(&object) {
                        h.base = beside;
                    }
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
        match what {
            What::ServePull { to, tid, object, version } => {
                self.pull_read(cx, (to, tid, object, version), result)
            }
            What::ScrubCopy { tid, object } => self.copy_read(cx, (tid, object), result),
            What::PushRead { object } => match result {
                Ok((state, content)) => {
                    let held = self.index.objects.get(&object).copied();
                    if let Some(r) = self.recovery() {
                        r.own_bad.remove(&object);
                    }
                    if held == Some(Held::committed(state.version, state.deleted)) {
                        self.push_to_all(cx, object, state.deleted, content);
                    } else if let Some(r) = self.recovery() {
                        r.work.remove(&object);
                    }
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
                }
            },
            _ => {}
        }
    }

    /// Pushes to every other member that lacks the object.
    fn push_to_all(&mut self, cx: &mut Cx<'_>, object: ObjectId, deleted: bool, content: Content) {
        let own = cx.id;
        let Some(r) = self.recovery() else { return };
        let lacking: Vec<(OsdId, Version)> = r
            .missing
            .iter()
            .filter(|(o, _)| **o != own)
            .filter_map(|(o, m)| m.get(&object).map(|n| (*o, n.version)))
            .collect();
        let waiting = lacking.iter().map(|(o, _)| *o).collect();
        if !r.work.contains_key(&object) {
            return;
        }
        for (o, _) in &lacking {
            r.asked(*o, cx.now);
        }
        let repairs = r.repairs_of(&object);
        let Some(w) = r.work.get_mut(&object) else { return };
        w.stage = Stage::Pushing { waiting };
        w.since = cx.now;
        let tid = w.tid;
        let bytes = content.data.len() as u64 * lacking.len() as u64;
        for (o, version) in lacking {
            let image = ObjectImage { deleted, extents: content.extents.clone() };
            let over = repairs.get(&o).copied();
            self.send(cx, o, PeerBody::Push { tid, object, version, image, over }, content.data.clone());
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
        }
    }
}
