//! Copies that cannot be read, and who else may have one.

use super::*;

impl Pg {
    /// The own copy cannot be read: it is missing from now on, durably, and comes back from another holder.
    /// While none is known, members of earlier intervals are asked. False when nobody else can have it.
    pub(in super::super) fn lose_own_copy(&mut self, cx: &mut Cx<'_>, object: ObjectId) -> bool {
        let others = self.others(cx);
        let strays = self.record.all_known().iter().any(|o| *o != cx.id && !others.contains(o));
        let now = cx.now;
        let Phase::Active(a) = &mut self.phase else { return false };
        let r = &mut a.recovery;
        let sources = r.sources.get(&object).into_iter().flatten().copied().filter(|o| *o != cx.id);
        let holders: BTreeSet<OsdId> = others
            .into_iter()
            .filter(|o| !r.missing.get(o).is_some_and(|m| m.contains_key(&object)))
            // Members of the past that had it when this interval began, if it was not written since.
            .chain(sources)
            .filter(|o| !r.bad.contains(&(object, *o)))
            .collect();
        let doubt = r.missing.values().find_map(|m| m.get(&object)).is_some_and(|n| n.uncertain.is_some());
        if holders.is_empty() && doubt {
            // Nobody was told of this version, and nobody can have it now: the next interval gives it up (rule P3g).
            cx.takes(Branch::LastOfDoubtLost);
            self.wants_interval = true;
            self.replace_own_copy(cx, object, holders);
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

    /// No acting member can read an object, and there is nobody else: it is damaged, and not missing any more, so that what can be
    /// read of the own copy is served. That copy never left; it is at the version that was wanted.
    pub(super) fn keep_if_damaged(&mut self, cx: &mut Cx<'_>, object: ObjectId, needed: Needed) {
        let strays = self.record.all_known().iter().any(|o| !self.record.acting.contains(o));
        let alone = !strays && needed.uncertain.is_none() && !needed.deleted;
        let held = self.index.objects.get(&object).map(|h| h.version);
        let held = held.or(self.index.beneath.get(&object).copied()) == Some(needed.version);
        let others = self.others(cx);
        let Phase::Active(a) = &mut self.phase else { return };
        let r = &mut a.recovery;
        let cannot = |o: &OsdId| {
            r.unreadable.contains(&(object, *o)) || r.missing.get(o).is_some_and(|m| m.contains_key(&object))
        };
        if !alone || !held || !others.iter().all(cannot) {
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
        r.not_before.remove(&object);
        r.repairs.remove(&(object, cx.id));
        r.bad.retain(|(o, _)| *o != object);
        r.unreadable.retain(|(o, _)| *o != object);
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
        let Some(held) = self.index.objects.get(&object).copied() else { return };
        let own = cx.id;
        let Phase::Active(a) = &mut self.phase else { return };
        let r = &mut a.recovery;
        // What was uncertain stays so.
        let uncertain = r.missing.values().find_map(|m| m.get(&object)).and_then(|n| n.uncertain);
        let needed = Needed { uncertain, ..Needed::certain(held.version, held.deleted) };
        r.missing.entry(own).or_default().insert(object, needed);
        r.sources.insert(object, holders);
        r.own_bad.remove(&object);
        r.not_before.remove(&object);
        r.demand(object);
        a.clean_reported = false;
        self.index.missing.insert(object, needed);
        self.submit(cx, What::Housekeeping, vec![TxnOp::AddMissing { object, needed }]);
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
        let Some(r) = self.recovery() else { return };
        for e in &entries {
            let wanted = match r.coded.is_some() {
                true => r.missing.values().find_map(|m| m.get(&e.object)),
                false => r.missing.get(&own).and_then(|m| m.get(&e.object)),
            };
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
