//! Peering and activation at the primary (rules P1, P3, P6; invariants 2 and 3).

use super::*;
use gabion_proto::limits::LIST_ENTRIES_MAX;

/// Unanswered questions are asked again after this long.
const ASK_AGAIN_MS: Millis = 300;
/// A member that does not act and tells no more for this long is not waited for if others know enough.
const STRAY_PATIENCE_MS: Millis = 3_000;

/// What a member told.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub activated: Epoch,
    /// Its list, as far as it has come in; parts that are the own ones are added when it has.
    pub entries: BTreeMap<ObjectId, ObjectEntry>,
    /// What must come in, and up to where it has.
    asked: ListParts,
    reached: Option<ObjectId>,
    complete: bool,
    /// When it last told something.
    heard: Millis,
    /// Erasure coding: which shard of each object it keeps.
    pub shard: Option<u8>,
}

impl Told {
    #[cfg(test)]
    pub fn of(activated: u64, entries: impl IntoIterator<Item = ObjectEntry>) -> Told {
        let entries = entries.into_iter().map(|e| (e.object, e)).collect();
        Told { activated: Epoch(activated), entries, complete: true, ..Told::default() }
    }

    /// Whether the object can be fetched there as it should be.
    pub fn has(&self, object: &ObjectId, n: &Needed) -> bool {
        self.entries.get(object).is_some_and(|e| {
            let beside = !e.missing && !n.deleted && e.base == Some(n.version);
            beside || e.copy() == Some((n.version, n.deleted))
        })
    }
}

#[derive(Debug, Default)]
pub struct Peering {
    /// The own promise is durable.
    pub promised: bool,
    told: BTreeMap<OsdId, Told>,
    /// Digests of the own list, by how many there are.
    digests: BTreeMap<u8, Vec<ListDigest>>,
    asked: Option<Millis>,
    waiting_for: String,
}

#[derive(Debug, Default)]
pub struct Activating {
    /// What each acting member must obtain, pages not yet acknowledged first.
    missing: BTreeMap<OsdId, BTreeMap<ObjectId, Needed>>,
    /// Next page to be acknowledged; absent once the last one was.
    pages: BTreeMap<OsdId, u32>,
    /// The own activation is durable.
    pub own: bool,
    reported: bool,
    sources: BTreeMap<ObjectId, BTreeSet<OsdId>>,
    uncertain: BTreeSet<ObjectId>,
    /// Erasure coding: the committed version to which each acting member returns.
    back: BTreeMap<OsdId, BTreeMap<ObjectId, Version>>,
    /// Erasure coding: what is pending at whom and will be committed.
    pending: BTreeMap<ObjectId, (Version, BTreeSet<OsdId>)>,
    /// Erasure coding: which shard members of earlier intervals keep.
    strays: BTreeMap<OsdId, u8>,
    /// Erasure coding, while the group does not serve: what must wait for more members.
    unsettled: BTreeSet<ObjectId>,
    /// Who has an older copy of what it lacks.
    older: BTreeSet<(ObjectId, OsdId)>,
    sent: Option<Millis>,
}

impl Peering {
    pub fn waiting_for(&self) -> &str {
        &self.waiting_for
    }

    /// Acting members that have not answered everything.
    pub fn silent_members(&self, record: &PgRecord) -> Vec<OsdId> {
        let own = record.primary;
        record
            .members()
            .filter(|o| Some(*o) != own && !self.told.get(o).is_some_and(|t| t.complete))
            .collect()
    }
}

impl Activating {
    /// Members that have not made the activation durable yet.
    pub fn waiting_for(&self) -> Vec<OsdId> {
        self.pages.keys().copied().collect()
    }

    /// What a member must hear.
    fn entries(&self, member: OsdId) -> usize {
        let back = self.back.get(&member).map_or(0, BTreeMap::len);
        back + self.missing.get(&member).map_or(0, BTreeMap::len)
    }
}

impl Pg {
    pub(super) fn start_peering(&mut self, cx: &mut Cx<'_>) {
        let Some(min_size) = self.pool_min_size(cx) else {
            return self.fail(cx, "the pool of the group is unknown".into());
        };
        self.fills = self.record.members().count() < min_size;
        if self.fills && !self.may_fill(cx) {
            self.phase = Phase::Undersized;
            cx.takes(Branch::Undersized);
            return;
        }
        if self.fills {
            // Perhaps long after the interval began.
            self.since = cx.now;
        }
        self.phase = Phase::Peering(Peering::default());
        self.meta.promised = self.meta.promised.max(self.record.interval);
        self.submit(cx, What::Promised, vec![TxnOp::SetMeta(self.meta)]);
        self.peer_on(cx);
    }

    pub(super) fn info(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        activated: Epoch,
        shard: Option<u8>,
        parts: &[ListDigest],
    ) {
        if !self.record.all_known().contains(&from) {
            return;
        }
        match &mut self.phase {
            Phase::Peering(p) => {
                // Only the first answer asks on: answers to repeated questions must not multiply.
                if p.told.contains_key(&from) {
                    return;
                }
                if !self.record.acting.contains(&from) {
                    cx.takes(Branch::HeardStray);
                }
                let mut asked = self.index.parts_that_differ(&mut p.digests, parts);
                if !cx.rules.keep(Rule::PartsDiffer) {
                    asked.wanted = 0;
                }
                let complete = asked.nothing();
                let told = Told { activated, asked, complete, heard: cx.now, shard, ..Told::default() };
                p.told.insert(from, told);
                if complete {
                    cx.takes(Branch::SameList);
                    return self.peer_on(cx);
                }
                if asked != ListParts::all_of(asked.count) {
                    cx.takes(Branch::ListedInPart);
                }
                self.send(cx, from, PeerBody::ListRequest { after: None, parts: asked }, Bytes::new());
            }
            Phase::Active(_) => self.late_source_speaks(cx, from, shard),
            _ => {}
        }
    }

    pub(super) fn list_page(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        after: Option<ObjectId>,
        entries: Vec<ObjectEntry>,
        last: bool,
    ) {
        match &mut self.phase {
            Phase::Peering(p) => {
                let Some(told) = p.told.get_mut(&from).filter(|t| !t.complete) else { return };
                let (reached, parts) = (told.reached, told.asked);
                if after != reached || (!last && entries.is_empty()) {
                    return;
                }
                let new = |e: &ObjectEntry| Some(e.object) > reached && parts.contains(&e.object);
                let new: Vec<ObjectEntry> = entries.into_iter().filter(new).collect();
                if new.is_empty() && !last {
                    // Nothing that was asked for. It is asked again, in a while.
                    return;
                }
                told.reached = new.iter().map(|e| e.object).max().or(reached);
                told.entries.extend(new.into_iter().map(|e| (e.object, e)));
                told.complete = last;
                told.heard = cx.now;
                let after = told.reached;
                if last {
                    self.peer_on(cx);
                } else {
                    self.send(cx, from, PeerBody::ListRequest { after, parts }, Bytes::new());
                }
            }
            Phase::Active(_) => self.late_source_lists(cx, from, entries, last),
            _ => {}
        }
    }

    /// Asks what is not known, or goes on when enough is.
    pub(super) fn peer_on(&mut self, cx: &mut Cx<'_>) {
        let (id, known) = (cx.id, self.record.all_known());
        let Phase::Peering(p) = &mut self.phase else { return };
        if !p.promised {
            p.waiting_for = "its own disk".into();
            return;
        }
        let up: BTreeSet<OsdId> =
            known.into_iter().filter(|o| *o != id && cx.map.up_osd(*o).is_some()).collect();
        // What a process said that is gone since counts no more: it did not promise for its successor,
        // but a new incarnation of an acting member is a new interval anyway, and a past member's promise is durable.
        let silent: Vec<OsdId> = up.iter().filter(|o| !p.told.contains_key(o)).copied().collect();
        let unlisted: Vec<(OsdId, PeerBody)> = p
            .told
            .iter()
            .filter(|(o, t)| !t.complete && up.contains(o))
            .map(|(o, t)| (*o, PeerBody::ListRequest { after: t.reached, parts: t.asked }))
            .collect();
        let acting: BTreeSet<OsdId> = self.record.members().collect();
        let listing = p
            .told
            .iter()
            .filter(|(o, t)| !t.complete && up.contains(o))
            .any(|(o, t)| acting.contains(o) || cx.now < t.heard + STRAY_PATIENCE_MS);
        // Members of earlier intervals may have something else instead of what was lost (rule P3g).
        let may_be_heard =
            self.code.is_none() && !silent.is_empty() && cx.now < self.since + STRAY_PATIENCE_MS;
        let unheard = may_be_heard && self.index.missing.values().any(|n| n.uncertain.is_some());
        let ask = p.asked.is_none_or(|t| cx.now >= t + ASK_AGAIN_MS);
        if ask {
            if p.asked.is_some() {
                cx.takes(Branch::AskedAgain);
            }
            p.asked = Some(cx.now);
        }
        let missing_acting: Vec<OsdId> = self
            .record
            .members()
            .filter(|o| *o != id && !p.told.get(o).is_some_and(|t| t.complete))
            .collect();
        let own = self.meta.activated;
        let told = &p.told;
        // Invariant 3: of each past interval, one that was active in it, or as many as decode what it wrote.
        let enough = match &self.code {
            Some(code) if cx.rules.keep(Rule::CoverageDecodes) => usize::from(code.geometry().k),
            _ => 1,
        };
        let covers = |o: &OsdId, interval: Epoch| match *o == id {
            true => own >= interval,
            false => told.get(o).is_some_and(|t| t.complete && t.activated >= interval),
        };
        let uncovered = self
            .record
            .past
            .iter()
            .find(|past| past.acting.iter().filter(|o| covers(o, past.interval)).count() < enough)
            .filter(|_| cx.rules.keep(Rule::Coverage))
            .map(|past| (past.interval, past.acting.clone()));
        p.waiting_for = if !missing_acting.is_empty() {
            format!("answers of {missing_acting:?}")
        } else if let Some((interval, acting)) = &uncovered {
            cx.takes(Branch::WaitsForCoverage);
            format!("a member of interval {interval}: {enough} of {acting:?}")
        } else {
            String::new()
        };
        // Everybody who answered should also have listed, so that no source is overlooked. That an earlier primary, which
        // may still serve reads under its lease, knows of this interval is for the monitors to see (rule P6): they
        // hear from it even when this OSD does not.
        if p.waiting_for.is_empty() && !listing && !unheard {
            self.choose_history(cx);
            return;
        }
        if ask {
            for o in silent {
                self.send(cx, o, PeerBody::Query, Bytes::new());
            }
            for (o, request) in unlisted {
                self.send(cx, o, request, Bytes::new());
            }
        }
    }

    /// The members with the highest activated interval are the authority (rule P3).
    fn choose_history(&mut self, cx: &mut Cx<'_>) {
        let Phase::Peering(p) = &mut self.phase else { return };
        let mut told = std::mem::take(&mut p.told);
        // Who went away before the end of its list may know of more than it said: neither authority nor source.
        told.retain(|_, t| t.complete);
        if !self.fills && self.agrees(&told) {
            cx.takes(Branch::AllAgree);
            let strays = self.shards_of_strays(&told);
            self.index.beneath.clear();
            return self.activate(cx, Activating { strays, ..Activating::default() }, BTreeMap::new());
        }
        for t in told.values_mut().filter(|t| t.asked != ListParts::ALL) {
            t.entries.extend(self.index.entries_beside(t.asked));
        }
        let own = Told {
            activated: self.meta.activated,
            entries: self.index.entries(),
            complete: true,
            heard: cx.now,
            shard: self.meta.shard.map(|s| s.number),
            ..Told::default()
        };
        told.insert(cx.id, own);
        let highest = told.values().map(|t| t.activated).max().unwrap_or_default();
        if !cx.rules.keep(Rule::Authority) {
            told.values_mut().for_each(|t| t.activated = highest);
        }
        let removed = |o: &ObjectId| is_removed(cx.map, o);
        let wanted = match &self.code {
            None => {
                let acting = self.record.members().collect();
                history::wanted(&told, highest, (&self.record.past, &acting), removed)
            }
            Some(_) => shards::wanted(&told, highest, &self.record.past, removed),
        };
        let back = shards::rollbacks(&told, &wanted, self.record.members(), removed);
        let mut missing: BTreeMap<OsdId, BTreeMap<ObjectId, Needed>> = BTreeMap::new();
        let (mut uncertain, mut older) = (BTreeSet::new(), BTreeSet::new());
        self.note_choice(cx, &told, &wanted, &back);
        for member in self.record.members() {
            let Some(t) = told.get(&member) else { return };
            let lacks = missing.entry(member).or_default();
            for (o, n) in &wanted {
                if t.has(o, n) || (n.deleted && !t.entries.contains_key(o)) {
                    continue;
                }
                lacks.insert(*o, *n);
                if t.entries.get(o).is_some_and(|e| !e.missing || e.held.is_some()) {
                    older.insert((*o, member));
                }
                if n.uncertain.is_some() {
                    cx.takes(Branch::RollForward);
                    uncertain.insert(*o);
                }
            }
            for (o, e) in &t.entries {
                let unknown = !wanted.contains_key(o) && !is_removed(cx.map, o);
                let held = !e.missing || self.index.objects.contains_key(o) || member != cx.id;
                let goes_back = back.get(&member).is_some_and(|b| b.contains_key(o));
                if unknown && held && !goes_back {
                    cx.takes(Branch::DropUnknown);
                    lacks.insert(*o, Needed::certain(Version::ZERO, true));
                }
            }
        }
        let mut sources: BTreeMap<ObjectId, BTreeSet<OsdId>> = BTreeMap::new();
        for o in missing.values().flat_map(|m| m.keys()) {
            let Some(n) = wanted.get(o) else { continue };
            let holders: BTreeSet<OsdId> =
                told.iter().filter(|(_, t)| t.has(o, n)).map(|(id, _)| *id).collect();
            if holders.is_empty() && !n.deleted {
                cx.takes(Branch::ActivateUnfound);
            }
            sources.insert(*o, holders);
        }
        let pending = shards::pending(&told, &wanted, self.record.members());
        if !pending.is_empty() {
            cx.takes(Branch::KeepPending);
        }
        let unsettled = match self.fills {
            true => shards::unsettled(&told, &wanted, self.record.members()),
            false => BTreeSet::new(),
        };
        let strays = self.shards_of_strays(&told);
        let own_missing = missing.get(&cx.id).cloned().unwrap_or_default();
        let own_back = back.get(&cx.id).cloned().unwrap_or_default();
        // Not as it was told: what is missing may be held after all, when the version goes back to it.
        let base =
            |o: &ObjectId, n: &Needed| self.index.objects.get(o).filter(|h| h.version == n.version)?.base;
        // From here on the index is what the objects should be; what is left of removed volumes is purged from it.
        let beneath = own_missing.iter();
        let beneath = beneath.filter_map(|(o, n)| Some((*o, self.index.objects.get(o)?.beneath(n))));
        let beneath = beneath.collect();
        let kept = wanted.iter().filter(|(o, _)| !own_missing.contains_key(o) && !own_back.contains_key(o));
        let kept: Vec<(ObjectId, Held)> = kept
            .map(|(o, n)| (*o, Held { version: n.version, deleted: n.deleted, base: base(o, n) }))
            .collect();
        self.index.beneath = beneath;
        self.index.objects.retain(|o, _| is_removed(cx.map, o) || own_back.contains_key(o));
        self.index.objects.extend(kept);
        let chosen = Activating {
            missing,
            sources,
            uncertain,
            back,
            pending,
            strays,
            unsettled,
            older,
            ..Activating::default()
        };
        self.activate(cx, chosen, own_missing);
    }

    /// Everybody has the own list, of the same interval, and there is nothing in it to decide about: no version is in doubt, nobody
    /// lacks anything. What [`Pg::choose_history`] would find for each object, without looking at each.
    fn agrees(&self, told: &BTreeMap<OsdId, Told>) -> bool {
        let own = self.meta.activated;
        told.values().all(|t| t.asked.nothing() && t.activated == own) && self.index.is_settled()
    }

    /// Erasure coding: what members of earlier intervals keep.
    fn shards_of_strays(&self, told: &BTreeMap<OsdId, Told>) -> BTreeMap<OsdId, u8> {
        let acting: BTreeSet<OsdId> = self.record.members().collect();
        told.iter().filter(|(o, _)| !acting.contains(o)).filter_map(|(o, t)| Some((*o, t.shard?))).collect()
    }

    fn activate(&mut self, cx: &mut Cx<'_>, mut chosen: Activating, own_missing: BTreeMap<ObjectId, Needed>) {
        chosen.pages = self.record.members().filter(|o| *o != cx.id).map(|o| (o, 0)).collect();
        let own_back = chosen.back.get(&cx.id).cloned().unwrap_or_default();
        self.phase = Phase::Activating(chosen);
        self.submit_activation(cx, own_missing.into_iter(), own_back.into_iter());
        self.activate_on(cx);
    }

    /// What was chosen that is not what everybody has.
    fn note_choice(
        &self,
        cx: &mut Cx<'_>,
        told: &BTreeMap<OsdId, Told>,
        wanted: &BTreeMap<ObjectId, Needed>,
        back: &BTreeMap<OsdId, BTreeMap<ObjectId, Version>>,
    ) {
        if back.values().any(|b| !b.is_empty()) {
            cx.takes(Branch::RollBack);
        }
        // Of shards a version that is given up is rolled back where somebody holds it.
        let given_up = |e: &ObjectEntry| {
            e.missing && e.uncertain.is_some() && wanted.get(&e.object).is_none_or(|n| n.version < e.version)
        };
        if told.values().flat_map(|t| t.entries.values()).any(given_up) {
            cx.takes(Branch::GoBack);
        }
    }

    pub(super) fn activate_ack(&mut self, cx: &mut Cx<'_>, from: OsdId, page: u32) {
        let Phase::Activating(a) = &mut self.phase else { return };
        if a.pages.get(&from) != Some(&page) {
            return;
        }
        let entries = a.entries(from);
        if (page as usize + 1) * LIST_ENTRIES_MAX >= entries {
            a.pages.remove(&from);
        } else {
            a.pages.insert(from, page + 1);
        }
        let more = a.pages.contains_key(&from);
        if more {
            a.sent = None;
        }
        self.activate_on(cx);
    }

    /// Sends pages; when everybody has made the activation durable, tells the monitors.
    pub(super) fn activate_on(&mut self, cx: &mut Cx<'_>) {
        let Phase::Activating(a) = &mut self.phase else { return };
        let everywhere = a.pages.is_empty() || !cx.rules.keep(Rule::ActivationEverywhere);
        if everywhere && a.own {
            if self.fills {
                // The monitors are not told: nothing is written in this interval, so nobody need be found again.
                return self.go_active(cx);
            }
            if !a.reported {
                a.reported = true;
                let request = MonitorRequest::Activated { pg: self.id, interval: self.record.interval };
                self.report(cx, What::ReportActivated, request);
            }
            return;
        }
        if a.sent.is_some_and(|t| cx.now < t + ASK_AGAIN_MS) {
            return;
        }
        if a.sent.is_some() {
            cx.takes(Branch::ActivateAgain);
        }
        a.sent = Some(cx.now);
        let bodies: Vec<(OsdId, PeerBody)> = a
            .pages
            .iter()
            .map(|(o, page)| {
                let start = *page as usize * LIST_ENTRIES_MAX;
                let missing = a.missing.get(o).into_iter().flatten().map(|(o, n)| ObjectEntry {
                    missing: true,
                    uncertain: n.uncertain,
                    ..ObjectEntry::here(*o, n.version, n.deleted)
                });
                let back = a.back.get(o).into_iter().flatten();
                let back = back.map(|(o, v)| ObjectEntry::here(*o, *v, false));
                let missing = missing.chain(back).skip(start).take(LIST_ENTRIES_MAX).collect();
                let last = start + LIST_ENTRIES_MAX >= a.entries(*o);
                (*o, PeerBody::Activate { page: *page, missing, last })
            })
            .collect();
        for (o, body) in bodies {
            self.send(cx, o, body, Bytes::new());
        }
    }

    /// The activation is durable everywhere, the monitors included: serve, and recover.
    pub(super) fn go_active(&mut self, cx: &mut Cx<'_>) {
        let Phase::Activating(a) = &mut self.phase else { return };
        let coded = self.code.as_ref().map(|code| {
            let acting = self.record.acting.iter().copied().zip(0..).filter(|(o, _)| *o != OsdId::NONE);
            recovery::Coded {
                k: usize::from(code.geometry().k),
                acting: acting.collect(),
                strays: std::mem::take(&mut a.strays),
            }
        });
        let recovery = recovery::Recovery::new(
            std::mem::take(&mut a.missing),
            std::mem::take(&mut a.sources),
            std::mem::take(&mut a.uncertain),
            std::mem::take(&mut a.unsettled),
            std::mem::take(&mut a.older),
            coded,
        );
        let active = ops::Active::new(recovery, std::mem::take(&mut a.pending), cx.now);
        self.phase = Phase::Active(Box::new(active));
        self.since = cx.now;
        self.recover(cx);
        self.resume(cx);
    }
}
