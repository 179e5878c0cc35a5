//! Recovery at the primary: what members miss is brought to them, object by object (rule P4).
//!
//! An object that misses on the primary is pulled from somebody who has exactly the needed version; what others
//! miss is then pushed. Reads and writes wait while the primary misses the object, or while it is *uncertain* (the authority
//! disagreed about it). Writes go on while others miss it, as long as enough members have it: who misses it notes the version
//! that it is at now. They wait while it is under way, and it is under way only while no write of it is. Wanted objects go first.

use super::member::{replace_ops, sub_result};
use super::*;
use crate::core::Damage;
use crate::store::ObjectState;
use gabion_proto::blocks::Content;

/// Objects under way at once in one group.
const AT_ONCE: usize = 4;
/// Bytes that this OSD moves at once for all its groups: recovery must not fill the queues that clients' operations
/// wait in. What clients wait for may exceed it.
pub const BYTES_AT_ONCE: u64 = 32 << 20;
/// What went wrong is tried again after this long.
const AGAIN_MS: Millis = 2_000;
/// What the own disk cannot read is left alone for longer: every try costs it seconds.
const UNREADABLE_AGAIN_MS: Millis = 10_000;
/// A source that does not answer for this long is changed.
const PULL_PATIENCE_MS: Millis = 4_000;
/// A push that is not answered is sent again after this long: longer than a busy disk takes for it.
const PUSH_PATIENCE_MS: Millis = 6_000;
/// What a member did not answer this long ago is not held against it.
const FORGIVEN_MS: Millis = 15_000;

#[derive(Debug)]
enum Stage {
    Pulling {
        from: OsdId,
    },
    /// Erasure coding: enough shards are being read.
    Gathering,
    Replacing,
    Reading,
    Pushing {
        waiting: BTreeSet<OsdId>,
    },
}

#[derive(Debug)]
struct Work {
    stage: Stage,
    since: Millis,
    tid: u64,
}

#[derive(Debug)]
pub struct Recovery {
    /// What each acting member lacks.
    missing: BTreeMap<OsdId, BTreeMap<ObjectId, Needed>>,
    /// Who has the needed version of what somebody lacks.
    sources: BTreeMap<ObjectId, BTreeSet<OsdId>>,
    /// Sources that could not read it.
    bad: BTreeSet<(ObjectId, OsdId)>,
    /// Objects that the own store cannot read and of which no other copy is known, and since when. The own copy
    /// stays until there is one: its other blocks may be all that is left.
    own_bad: BTreeMap<ObjectId, Millis>,
    uncertain: BTreeSet<ObjectId>,
    /// Erasure coding, while the group does not serve: objects about which only more members can decide. They are left alone.
    unsettled: BTreeSet<ObjectId>,
    demanded: BTreeSet<ObjectId>,
    /// Objects whose turn it is, and of which writes in flight must end first. New ones wait.
    draining: BTreeSet<ObjectId>,
    work: BTreeMap<ObjectId, Work>,
    /// Not tried again before then: it has just failed.
    not_before: BTreeMap<ObjectId, Millis>,
    /// Who was asked for something and has answered nothing since: first and last time of asking.
    owing: BTreeMap<OsdId, (Millis, Millis)>,
    asked_strays: Millis,
    /// How many removed volumes the map named when their objects were last taken out.
    forgotten: (usize, usize),
    /// What one object under way may move.
    object_bytes: u64,
    coded: Option<Coded>,
    /// Copies that a scrub found wrong, and the version that they are at.
    repairs: BTreeMap<(ObjectId, OsdId), Version>,
    /// Members that could not read an object that the own store cannot read either.
    unreadable: BTreeSet<(ObjectId, OsdId)>,
    /// Erasure coding: shards of acting members of which some row could not be read.
    damaged: BTreeSet<(ObjectId, OsdId)>,
}

/// Erasure coding: who keeps which shard.
#[derive(Debug)]
pub struct Coded {
    pub k: usize,
    pub acting: BTreeMap<OsdId, u8>,
    /// Members of earlier intervals.
    pub strays: BTreeMap<OsdId, u8>,
}

impl Recovery {
    pub fn new(
        missing: BTreeMap<OsdId, BTreeMap<ObjectId, Needed>>,
        sources: BTreeMap<ObjectId, BTreeSet<OsdId>>,
        uncertain: BTreeSet<ObjectId>,
        unsettled: BTreeSet<ObjectId>,
        coded: Option<Coded>,
    ) -> Recovery {
        Recovery {
            missing,
            sources,
            bad: BTreeSet::new(),
            own_bad: BTreeMap::new(),
            uncertain,
            unsettled,
            demanded: BTreeSet::new(),
            draining: BTreeSet::new(),
            work: BTreeMap::new(),
            not_before: BTreeMap::new(),
            owing: BTreeMap::new(),
            asked_strays: 0,
            forgotten: (0, 0),
            object_bytes: 0,
            coded,
            repairs: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            damaged: BTreeSet::new(),
        }
    }

    /// Erasure coding: who can read which shard of an object as it should be. Members of earlier intervals stand in where no acting one can.
    /// A damaged shard may still have other rows than the one that could not be read.
    pub fn holders(&self, object: &ObjectId, damaged: bool) -> BTreeMap<u8, OsdId> {
        let Some(coded) = &self.coded else { return BTreeMap::new() };
        let lacks = |o: &OsdId| {
            let lacks = self.missing.get(o).is_some_and(|m| m.contains_key(object));
            lacks && !(damaged && self.damaged.contains(&(*object, *o)))
        };
        let good = |o: &OsdId| !self.bad.contains(&(*object, *o));
        let strays = self.sources.get(object).into_iter().flatten();
        let strays = strays.filter_map(|o| Some((*coded.strays.get(o)?, *o)));
        let acting = coded.acting.iter().filter(|(o, _)| !lacks(o)).map(|(o, n)| (*n, *o));
        strays.chain(acting).filter(|(_, o)| good(o)).collect()
    }

    /// Whether some acting member lacks the object.
    pub fn is_missing(&self, object: &ObjectId) -> bool {
        self.missing.values().any(|m| m.contains_key(object))
    }

    /// Erasure coding: some row of some shard of the object could not be read.
    pub fn is_damaged(&self, object: &ObjectId) -> bool {
        self.damaged.iter().any(|(o, _)| o == object)
    }

    /// Erasure coding: a member of an earlier interval does not answer for this object.
    pub fn give_up(&mut self, object: ObjectId, member: OsdId) -> bool {
        let stray = self.coded.as_ref().is_some_and(|c| !c.acting.contains_key(&member));
        stray && self.bad.insert((object, member))
    }

    /// Erasure coding: the object may have to go back to the version before, as long as somebody lacks it.
    pub fn is_uncertain(&self, object: &ObjectId) -> bool {
        self.uncertain.contains(object) && self.is_missing(object)
    }

    /// Erasure coding: who lacks the object, by shard.
    pub fn lacking(&self, object: &ObjectId) -> BTreeMap<u8, (OsdId, Needed)> {
        let Some(coded) = &self.coded else { return BTreeMap::new() };
        let lacking = self.missing.iter().filter_map(|(o, m)| Some((o, m.get(object)?)));
        lacking.filter_map(|(o, n)| Some((*coded.acting.get(o)?, (*o, *n)))).collect()
    }

    /// Erasure coding: shards of an object are read to compute those that are lacking. Writes in flight have ended:
    /// what could not be read before may be at a later version by now.
    pub fn begin_gathering(&mut self, object: ObjectId, tid: u64, held: Option<Version>, now: Millis) {
        self.work.insert(object, Work { stage: Stage::Gathering, since: now, tid });
        if let Some(version) = held {
            let lacking = self.missing.values_mut().filter_map(|m| m.get_mut(&object));
            lacking.filter(|n| !n.deleted).for_each(|n| n.version = version);
        }
    }

    pub fn gathering_failed(&mut self, object: ObjectId, not_before: Millis) {
        self.work.remove(&object);
        self.not_before.insert(object, not_before);
    }

    /// The lacking shards of `version` are computed: who gets which, and the number of the transfer.
    pub fn begin_pushing(
        &mut self,
        object: &ObjectId,
        version: Version,
        now: Millis,
    ) -> Option<(u64, BTreeMap<u8, OsdId>)> {
        let lacking = self.lacking(object).into_iter();
        let lacking: BTreeMap<u8, OsdId> =
            lacking.filter(|(_, (_, n))| n.version == version).map(|(n, (o, _))| (n, o)).collect();
        let work = self.work.get_mut(object).filter(|w| matches!(w.stage, Stage::Gathering))?;
        work.stage = Stage::Pushing { waiting: lacking.values().copied().collect() };
        work.since = now;
        let tid = work.tid;
        if lacking.is_empty() {
            self.work.remove(object);
        }
        lacking.values().for_each(|o| self.asked(*o, now));
        Some((tid, lacking))
    }

    /// Erasure coding: a member cannot read its shard; it is computed from the others.
    pub fn lose_shard(&mut self, member: OsdId, object: ObjectId, version: Version) {
        match self.coded.as_ref().is_some_and(|c| c.acting.contains_key(&member)) {
            true => {
                self.damaged.insert((object, member));
                self.missing.entry(member).or_default().insert(object, Needed::certain(version, false));
            }
            false => _ = self.bad.insert((object, member)),
        }
    }

    /// A member's copy is wrong, at whatever version it is held.
    pub fn replace_copy(&mut self, member: OsdId, object: ObjectId, held: Version, missing: Option<Needed>) {
        self.repairs.insert((object, member), held);
        if let Some(needed) = missing {
            self.missing.entry(member).or_default().insert(object, needed);
        }
    }

    /// Whose copies of an object are wrong, and the versions that they are at.
    pub fn repairs_of(&self, object: &ObjectId) -> BTreeMap<OsdId, Version> {
        let repairs = self.repairs.range((*object, OsdId(0))..=(*object, OsdId::NONE));
        repairs.map(|((_, o), v)| (*o, *v)).collect()
    }

    /// Whether somebody misses an object that is not one of these.
    pub fn misses_more_than<T>(&self, known: &BTreeMap<ObjectId, T>) -> bool {
        self.missing.values().flat_map(|m| m.keys()).any(|o| !known.contains_key(o))
    }

    /// Whether a read of the object must wait.
    pub fn blocks_reads(&self, own: OsdId, object: &ObjectId, doubts: bool) -> bool {
        match doubts && self.uncertain.contains(object) {
            true => self.is_missing(object),
            false => self.missing.get(&own).is_some_and(|m| m.contains_key(object)),
        }
    }

    /// Whether a write of the object must wait (rule P4), in a group of so many members of which `enough` must have it. Who
    /// misses it must know that, and at which version it is; so must the primary, and nobody may have a doubt about it.
    pub fn blocks_writes(&self, own: OsdId, object: &ObjectId, members: usize, enough: usize) -> bool {
        let mut lacking = self.missing.iter().filter_map(|(o, m)| Some((*o, m.get(object)?))).peekable();
        if lacking.peek().is_none() {
            return false;
        }
        let taken = self.work.contains_key(object) || self.draining.contains(object);
        if taken || self.coded.is_some() || !self.repairs_of(object).is_empty() {
            return true;
        }
        let mut hold = members;
        for (o, needed) in lacking {
            if o == own || needed.deleted || needed.uncertain.is_some() {
                return true;
            }
            hold = hold.saturating_sub(1);
        }
        hold < enough || self.uncertain.contains(object)
    }

    /// A write of an object begins that these may lack. Who does, will: what it must get is that version from now on, and members of
    /// earlier intervals do not have it.
    pub fn note_write(&mut self, object: &ObjectId, version: Version, others: &[OsdId]) -> BTreeSet<OsdId> {
        let mut lacking = BTreeSet::new();
        for (o, m) in &mut self.missing {
            if let Some(n) = m.get_mut(object) {
                n.version = version;
                lacking.insert(*o);
            }
        }
        if !lacking.is_empty()
            && let Some(s) = self.sources.get_mut(object)
        {
            s.retain(|o| others.contains(o));
        }
        lacking
    }

    /// Whether a member lacks the object, as far as is known.
    pub fn lacks(&self, member: OsdId, object: &ObjectId) -> bool {
        self.missing.get(&member).is_some_and(|m| m.contains_key(object))
    }

    pub fn demand(&mut self, object: ObjectId) {
        self.demanded.insert(object);
    }

    /// What is under way may move that many bytes.
    pub fn bytes(&self) -> u64 {
        self.work.len() as u64 * self.object_bytes
    }

    pub fn is_done(&self) -> bool {
        self.missing.values().all(BTreeMap::is_empty)
    }

    /// Erasure coding: objects of which only more members can say what they should be.
    pub fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    pub fn degraded(&self) -> u64 {
        self.missing.values().map(|m| m.len() as u64).sum()
    }

    /// The needed version is with nobody who can be reached.
    fn is_unfound(&self, own: OsdId, object: &ObjectId) -> bool {
        if let Some(coded) = &self.coded {
            let needed = self.missing.values().find_map(|m| m.get(object));
            return needed.is_some_and(|n| !n.deleted) && self.holders(object, true).len() < coded.k;
        }
        let needed = self.missing.get(&own).and_then(|m| m.get(object));
        needed.is_some_and(|n| !n.deleted)
            && !self.sources.get(object).is_some_and(|s| s.iter().any(|o| !self.bad.contains(&(*object, *o))))
    }

    pub fn unfound(&self, own: OsdId) -> u64 {
        if self.coded.is_some() {
            let missing: BTreeSet<&ObjectId> = self.missing.values().flat_map(|m| m.keys()).collect();
            return missing.into_iter().filter(|o| self.is_unfound(own, o)).count() as u64;
        }
        let missing = self.missing.get(&own).into_iter().flat_map(|m| m.keys());
        (missing.filter(|o| self.is_unfound(own, o)).count() + self.own_bad.len()) as u64
    }

    /// Members that owe an answer, and since when.
    pub fn late(&self) -> impl Iterator<Item = (OsdId, Millis)> + '_ {
        let working = |o: &OsdId| {
            self.work.values().any(|w| match &w.stage {
                Stage::Pulling { from } => from == o,
                Stage::Pushing { waiting } => waiting.contains(o),
                Stage::Replacing | Stage::Reading | Stage::Gathering => false,
            })
        };
        self.owing.iter().map(|(o, (since, _))| (*o, *since)).filter(move |(o, _)| working(o))
    }

    fn asked(&mut self, member: OsdId, now: Millis) {
        let (since, last) = self.owing.entry(member).or_insert((now, now));
        if now > *last + FORGIVEN_MS {
            *since = now;
        }
        *last = now;
    }

    /// True: a scrub had found the copy wrong.
    fn settle(&mut self, member: OsdId, object: &ObjectId) -> bool {
        if let Some(m) = self.missing.get_mut(&member) {
            m.remove(object);
        }
        self.damaged.remove(&(*object, member));
        if !self.missing.values().any(|m| m.contains_key(object)) {
            self.uncertain.remove(object);
            self.demanded.remove(object);
            self.sources.remove(object);
            self.own_bad.remove(object);
            self.not_before.remove(object);
            self.bad.retain(|(o, _)| o != object);
            self.unreadable.retain(|(o, _)| o != object);
        }
        self.repairs.remove(&(*object, member)).is_some()
    }

    /// The next object to start: in demand first, then uncertain ones, then the one that most members lack. None of which writes are
    /// in flight, as long as there is another one.
    fn next(
        &self,
        own: OsdId,
        now: Millis,
        demanded_only: bool,
        written: &BTreeSet<ObjectId>,
    ) -> Option<ObjectId> {
        let quiet = self.next_but(own, now, demanded_only, |o| written.contains(o));
        quiet.or_else(|| self.next_but(own, now, demanded_only, |_| false))
    }

    fn next_but(
        &self,
        own: OsdId,
        now: Millis,
        demanded_only: bool,
        but: impl Fn(&ObjectId) -> bool,
    ) -> Option<ObjectId> {
        let lacking = |o: &ObjectId| self.missing.values().filter(|m| m.contains_key(o)).count();
        let due = |o: &ObjectId| self.not_before.get(o).is_none_or(|t| now >= *t);
        let free = |o: &&ObjectId| {
            !self.unsettled.contains(*o)
                && !self.work.contains_key(o)
                && !self.draining.contains(*o)
                && !but(o)
                && due(o)
                && !self.is_unfound(own, o)
                && lacking(o) > 0
        };
        let demanded = self.demanded.iter().find(free);
        if demanded_only || demanded.is_some() {
            return demanded.copied();
        }
        // Nobody may read or write these, and if the only copy is lost the write goes with it.
        if let Some(o) = self.uncertain.iter().find(free) {
            return Some(*o);
        }
        // A window, so that a long list is not searched for each object.
        const WINDOW: usize = 32;
        self.missing
            .values()
            .flat_map(|m| m.keys().filter(free).take(WINDOW))
            .max_by_key(|o| (lacking(o), std::cmp::Reverse(**o)))
            .copied()
    }
}

impl Pg {
    fn recovery(&mut self) -> Option<&mut Recovery> {
        match &mut self.phase {
            Phase::Active(a) => Some(&mut a.recovery),
            _ => None,
        }
    }

    /// Starts what there is room for; reports clean when nothing is left.
    pub(super) fn recover(&mut self, cx: &mut Cx<'_>) {
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

    pub(super) fn pulled(
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

    pub(super) fn own_recovered(
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

    pub(super) fn count_moved(&mut self, cx: &mut Cx<'_>, bytes: u64) {
        self.recovered_bytes += bytes;
        self.counters.recovered_bytes += bytes;
        cx.throttle.spend(bytes);
    }

    pub(super) fn push_ack(&mut self, cx: &mut Cx<'_>, from: OsdId, tid: u64, result: SubResult) {
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

    /// The own copy cannot be read: it is missing from now on, durably, and comes back from another holder.
    /// While none is known, members of earlier intervals are asked. False when nobody else can have it.
    pub(super) fn lose_own_copy(&mut self, cx: &mut Cx<'_>, object: ObjectId) -> bool {
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
    fn keep_if_damaged(&mut self, cx: &mut Cx<'_>, object: ObjectId, needed: Needed) {
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

    pub(super) fn replace_own_copy(&mut self, cx: &mut Cx<'_>, object: ObjectId, holders: BTreeSet<OsdId>) {
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

    /// While something is unfound, members of earlier intervals are asked again: one may have come back.
    fn ask_strays(&mut self, cx: &mut Cx<'_>) {
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
        for o in known.difference(&acting) {
            self.send(cx, *o, PeerBody::Query, Bytes::new());
        }
    }

    pub(super) fn late_source_speaks(&mut self, cx: &mut Cx<'_>, from: OsdId, shard: Option<u8>) {
        if let (Some(coded), Some(n)) = (self.recovery().and_then(|r| r.coded.as_mut()), shard)
            && !coded.acting.contains_key(&from)
        {
            coded.strays.insert(from, n);
        }
        self.send(cx, from, PeerBody::ListRequest { after: None }, Bytes::new());
    }

    pub(super) fn late_source_lists(
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
            self.send(cx, from, PeerBody::ListRequest { after: Some(after) }, Bytes::new());
        }
        self.recover(cx);
    }
}
