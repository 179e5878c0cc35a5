//! Copies that cannot be read, and who else may have one.

use super::*;

/// For what somebody may have instead of what nobody has a new interval is begun no earlier than this.
const INSTEAD_AFTER_MS: Millis = 10_000;

impl Pg {
    /// The own copy cannot be read: it is missing from now on, durably, and comes back from another holder.
    /// While none is known, members of earlier intervals are asked. False when nobody else can have it.
    pub(in super::super) fn lose_own_copy(&mut self, cx: &mut Cx<'_>, object: ObjectId) -> bool {
        let own = cx.id;
        if self.recovery().is_some_and(|r| r.lacks(own, &object)) {
            // It is on its way, or even being stored: a second note would outlive it.
            return true;
        }
        let others = self.others(cx);
        let strays = self.record.all_known().iter().any(|o| *o != cx.id && !others.contains(o));
        let now = cx.now;
        let held = self.index.objects.get(&object).map(|h| h.version);
        let Phase::Active(a) = &mut self.phase else { return false };
        let r = &mut a.recovery;
        // Copies that were to be replaced by this one, because a block of them cannot be read.
        let partly = |o: &&OsdId| {
            r.partly.contains(&(object, **o))
                && held.is_some()
                && r.repairs.get(&(object, **o)).copied() == held
        };
        let partly: BTreeSet<OsdId> =
            others.iter().filter(partly).copied().filter(|_| r.coded.is_none()).collect();
        r.partly.insert((object, cx.id));
        let sources = r.sources.get(&object).into_iter().flatten().copied().filter(|o| *o != cx.id);
        let holders: BTreeSet<OsdId> = others
            .into_iter()
            .filter(|o| !r.missing.get(o).is_some_and(|m| m.contains_key(&object)))
            // Members of the past that had it when this interval began, if it was not written since.
            .chain(sources)
            .filter(|o| !r.bad.contains(&(object, *o)))
            .collect();
        let doubt = r.missing.values().find_map(|m| m.get(&object)).is_some_and(Needed::may_be_given_up);
        if holders.is_empty() && doubt {
            // Nobody was told of this version, and nobody can have it now: the next interval gives it up (rule P3g).
            cx.takes(Branch::LastOfDoubtLost);
            self.wants_interval = true;
            self.replace_own_copy(cx, object, holders);
            return true;
        }
        if holders.is_empty() && !partly.is_empty() {
            // They have what they have.
            for member in &partly {
                r.settle(*member, &object);
            }
            self.assemble(cx, object, partly.into_iter().chain([cx.id]).collect());
            return true;
        }
        if holders.is_empty() {
            cx.takes(Branch::OwnCopyAlone);
            r.own_bad.insert(object, now);
            r.not_before.entry(object).or_insert(now + UNREADABLE_AGAIN_MS);
            if strays {
                r.asked_strays = 0;
            }
            return strays;
        }
        self.replace_own_copy(cx, object, holders);
        true
    }

    /// Nobody but acting members can have the object, and the own copy is at the version that is wanted.
    fn is_held_here_only(&self, object: &ObjectId, needed: Needed) -> bool {
        let strays = self.record.all_known().iter().any(|o| !self.record.acting.contains(o));
        let alone = !strays && !needed.may_be_given_up() && !needed.deleted;
        let held = self.index.objects.get(object).map(|h| h.version);
        alone && held.or(self.index.beneath.get(object).copied()) == Some(needed.version)
    }

    /// No acting member can read some block of an object, and there is nobody else: it is damaged, and not missing any more, so that what can be
    /// read of it is served (see `mend`). The own copy never left; it is at the version that was wanted.
    pub(super) fn keep_if_damaged(&mut self, cx: &mut Cx<'_>, object: ObjectId, needed: Needed) {
        let (held, now) = (self.is_held_here_only(&object, needed), cx.now);
        let others = self.others(cx);
        let Phase::Active(a) = &mut self.phase else { return };
        let r = &mut a.recovery;
        // A scrub found that it is not what it should be.
        let condemned = r.repairs.contains_key(&(object, cx.id)) && !r.partly.contains(&(object, cx.id));
        let cannot = |o: &OsdId| {
            r.unreadable.contains(&(object, *o)) || r.missing.get(o).is_some_and(|m| m.contains_key(&object))
        };
        if !held || condemned || !others.iter().all(cannot) {
            return;
        }
        tracing::error!(pg = %self.id, %object, "no copy can be read whole");
        cx.takes(Branch::KeepDamaged);
        if let Some(m) = r.missing.get_mut(&cx.id) {
            m.remove(&object);
        }
        r.work.remove(&object);
        r.sources.remove(&object);
        r.demanded.remove(&object);
        // Others may lack it: nothing can be brought to them.
        r.not_before.insert(object, now + UNREADABLE_AGAIN_MS);
        r.repairs.remove(&(object, cx.id));
        r.bad.retain(|(o, _)| *o != object);
        r.unreadable.retain(|(o, _)| *o != object);
        r.partly.retain(|(o, _)| *o != object);
        a.scrub.damaged.insert(object, Damage::Unreadable);
        self.index.missing.remove(&object);
        self.index.hold(object, needed);
        self.submit(cx, What::Housekeeping, vec![TxnOp::DropMissing { object }]);
        self.resume(cx);
    }

    pub(in super::super) fn replace_own_copy(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        holders: BTreeSet<OsdId>,
    ) {
        let Some(needed) = self.miss_own_copy(cx, object, holders) else { return };
        self.submit(cx, What::Housekeeping, vec![TxnOp::AddMissing { object, needed }]);
        self.recover(cx);
    }

    /// In this interval.
    fn miss_own_copy(&mut self, cx: &Cx<'_>, object: ObjectId, holders: BTreeSet<OsdId>) -> Option<Needed> {
        let held = self.index.objects.get(&object).copied()?;
        let own = cx.id;
        let Phase::Active(a) = &mut self.phase else { return None };
        let r = &mut a.recovery;
        // What was uncertain stays so.
        let uncertain = r.missing.values().find_map(|m| m.get(&object)).and_then(|n| n.uncertain);
        let needed = Needed { uncertain, ..Needed::certain(held.version, held.deleted) };
        r.missing.entry(own).or_default().insert(object, needed);
        r.sources.insert(object, holders);
        r.spare_is_known = false;
        r.own_bad.remove(&object);
        r.not_before.remove(&object);
        r.demand(object);
        a.clean_reported = false;
        self.index.missing.insert(object, needed);
        Some(needed)
    }

    /// A scrub has found a block of every copy unreadable; of these nothing else is known to be wrong. What can be read of them is put together.
    pub(in super::super) fn assemble(&mut self, cx: &mut Cx<'_>, object: ObjectId, partly: BTreeSet<OsdId>) {
        if !cx.rules.keep(Rule::ScrubRepairs) {
            return;
        }
        let own = cx.id;
        let held = self.index.objects.get(&object).map_or(Version::ZERO, |h| h.version);
        let Some(r) = self.recovery() else { return };
        r.replace_copy(own, object, held, None);
        r.partly.extend(partly.iter().map(|o| (object, *o)));
        let others: BTreeSet<OsdId> = partly.iter().copied().filter(|o| *o != own).collect();
        match partly.contains(&own) {
            // The next interval must find it: blocks may be in no other copy.
            true => {
                if self.miss_own_copy(cx, object, others).is_some() {
                    self.recover(cx);
                }
            }
            false => self.replace_own_copy(cx, object, others),
        }
    }

    /// That is all that a scrub found wrong with it.
    pub(in super::super) fn copy_is_partly_readable(&mut self, member: OsdId, object: ObjectId) {
        if let Some(r) = self.recovery().filter(|r| r.lacks(member, &object)) {
            r.partly.insert((object, member));
        }
    }

    /// Some block of what was to replace the own copy cannot be read either: what is here may be needed, and the next interval must find
    /// it. Unless somebody else may be heard of: then it waits for them instead.
    pub(in super::super) fn partly_readable(&mut self, cx: &mut Cx<'_>, object: ObjectId, from: OsdId) {
        let own = cx.id;
        let Some(r) = self.recovery() else { return };
        let first = r.partly.insert((object, from));
        let here = r.partly.contains(&(object, own));
        let Some(needed) = r.missing.get(&own).and_then(|m| m.get(&object)).copied() else { return };
        if first && here && self.is_held_here_only(&object, needed) {
            self.submit(cx, What::Housekeeping, vec![TxnOp::DropMissing { object }]);
        }
    }

    /// Copies of other members of which some block could not be read, now that the own one is whole.
    pub(super) fn replace_partly_read(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        needed: Needed,
        partly: BTreeSet<OsdId>,
    ) {
        let others = self.others(cx);
        let Phase::Active(a) = &mut self.phase else { return };
        for member in others.into_iter().filter(|o| partly.contains(o)) {
            if !a.recovery.lacks(member, &object) {
                a.recovery.replace_copy(member, object, needed.version, Some(needed));
                a.clean_reported = false;
            }
        }
        a.recovery.partly.retain(|(o, _)| *o != object);
    }

    /// Some block of an object can be read nowhere, as far as members have answered.
    pub(in super::super) fn assembly_failed(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        asked: BTreeSet<OsdId>,
    ) {
        let own = cx.id;
        let Some(r) = self.recovery() else { return };
        let Some(needed) = r.missing.get(&own).and_then(|m| m.get(&object)).copied() else { return };
        r.work.remove(&object);
        for o in asked.into_iter().filter(|o| *o != own) {
            r.bad.insert((object, o));
            if r.partly.contains(&(object, o)) {
                r.unreadable.insert((object, o));
            }
        }
        tracing::warn!(pg = %self.id, %object, "a block cannot be read in any copy");
        cx.takes(Branch::SourceBad);
        self.keep_if_damaged(cx, object, needed);
        self.recover(cx);
    }

    /// While something is unfound, members of earlier intervals are asked again: one may have come back.
    pub(super) fn ask_strays(&mut self, cx: &mut Cx<'_>) {
        let (own, known) = (cx.id, self.record.all_known());
        let acting: BTreeSet<OsdId> = self.record.members().collect();
        let Some(r) = self.recovery() else { return };
        if cx.now < r.asked_strays + AGAIN_MS || r.unfound(own) == 0 {
            return;
        }
        r.asked_strays = cx.now;
        cx.takes(Branch::AskStrays);
        // What could not be read may be readable again after a restart there.
        r.bad.clear();
        r.own_bad.retain(|o, since| cx.now < *since + 10 * AGAIN_MS && !is_removed(cx.map, o));
        // Whole copies only.
        let missing = r.missing.get(&own).filter(|_| r.coded.is_none()).into_iter().flatten();
        let unfound: Vec<_> = missing.filter(|(o, _)| r.is_unfound(own, o)).map(|(o, n)| (*o, *n)).collect();
        for o in known.difference(&acting) {
            self.send(cx, *o, PeerBody::Query, Bytes::new());
        }
        // Nobody will ever have it.
        for (o, n) in unfound {
            self.keep_if_damaged(cx, o, n);
        }
    }

    pub(in super::super) fn late_source_speaks(&mut self, cx: &mut Cx<'_>, from: OsdId, shard: Option<u8>) {
        if let (Some(coded), Some(n)) = (self.recovery().and_then(|r| r.coded.as_mut()), shard)
            && !coded.acting.contains_key(&from)
        {
            coded.strays.insert(from, n);
        }
        self.send(cx, from, PeerBody::ListRequest { after: None, parts: ListParts::ALL }, Bytes::new());
    }

    pub(in super::super) fn late_source_lists(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        entries: Vec<ObjectEntry>,
        last: bool,
    ) {
        let own = cx.id;
        let next = entries.last().map(|e| e.object).filter(|_| !last);
        let held = |o: &ObjectId| self.index.objects.get(o).copied();
        let same: Vec<ObjectId> = entries
            .iter()
            .filter(|e| !e.missing && held(&e.object) == Some(Held::committed(e.version, e.deleted)))
            .map(|e| e.object)
            .collect();
        let Phase::Active(a) = &mut self.phase else { return };
        // Writes in flight end first: what the object is now must be what was read there.
        let repairable: Vec<ObjectId> = same
            .into_iter()
            .filter(|o| a.recovery.own_bad.contains_key(o) && !a.has_writes(o))
            .filter(|o| !a.recovery.bad.contains(&(*o, from)))
            .collect();
        for object in repairable {
            self.replace_own_copy(cx, object, [from].into());
        }
        let Phase::Active(a) = &mut self.phase else { return };
        let r = &mut a.recovery;
        for e in &entries {
            let wanted = match r.coded.is_some() {
                true => r.missing.values().find_map(|m| m.get(&e.object)),
                false => r.missing.get(&own).and_then(|m| m.get(&e.object)),
            };
            // Nobody has it. This it may be instead, which the next interval decides (rule P3g).
            if r.coded.is_none()
                && cx.now >= self.since + INSTEAD_AFTER_MS
                && r.is_unfound(own, &e.object)
                && wanted.zip(e.copy()).is_some_and(|(n, (version, _))| n.may_become(version))
            {
                cx.takes(Branch::LateInstead);
                self.wants_interval = true;
            }
            let beside = |n: &Needed| !e.missing && e.base == Some(n.version);
            if wanted.is_some_and(|n| e.copy() == Some((n.version, n.deleted)) || beside(n)) {
                cx.takes(Branch::LateSource);
                r.sources.entry(e.object).or_default().insert(from);
            }
        }
        if let Some(after) = next {
            self.send(
                cx,
                from,
                PeerBody::ListRequest { after: Some(after), parts: ListParts::ALL },
                Bytes::new(),
            );
        }
        self.recover(cx);
    }
}
