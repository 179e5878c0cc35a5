//! What members miss, who has it, and what is under way.

use super::*;
use gabion_proto::limits::{PIECE_BLOCKS, PIECE_BYTES};

/// Objects under way at once in one group.
pub(super) const AT_ONCE: usize = 4;
/// Bytes that this OSD moves at once for all its groups: recovery must not fill the queues that clients' operations
/// wait in. What clients wait for may exceed it.
pub const BYTES_AT_ONCE: u64 = 32 << 20;
/// What went wrong is tried again after this long.
pub(super) const AGAIN_MS: Millis = 2_000;
/// What the own disk cannot read is left alone for longer: every try costs it seconds.
pub(super) const UNREADABLE_AGAIN_MS: Millis = 10_000;
/// A source that does not answer for this long is changed.
pub(super) const PULL_PATIENCE_MS: Millis = 4_000;
/// A push that is not answered is sent again after this long: longer than a busy disk takes for it.
pub(super) const PUSH_PATIENCE_MS: Millis = 6_000;
/// So often recovery of an object begins anew because a client writes it. Then the write waits.
const GIVES_WAY_MAX: u32 = 3;
/// What a member did not answer this long ago is not held against it.
const FORGIVEN_MS: Millis = 15_000;
/// The other side is late after this long: a message was lost, or its disk is slow. Other objects do not wait for it any more.
pub const PASSED_MS: Millis = 300;
/// So many may be late at once, at this OSD, without the others waiting: whoever is slow has no more of it in its queue.
const LATE_AT_ONCE: usize = 4;
/// An offer that nobody answers is made again after this long, then ever later: it, or the answer, was lost.
const OFFER_AGAIN_MS: Millis = 1_000;

#[derive(Debug)]
pub(super) enum Stage {
    Pulling {
        from: OsdId,
    },
    /// Erasure coding: enough shards are being read.
    Gathering,
    Replacing,
    /// The first piece of what is to be pushed.
    Reading,
    Pushing {
        waiting: BTreeSet<OsdId>,
    },
}

/// What is under way to one receiver.
#[derive(Debug)]
pub(super) struct Leg {
    /// A piece of the object; else the object was offered only.
    piece: bool,
    /// The other side has had its turn since then. Not while the own disk reads or stores the piece: who waits for that is not late.
    there: Option<Millis>,
    /// The last time that it was offered.
    offered: Millis,
    /// Others do not wait for it.
    late: bool,
}

impl Leg {
    /// A piece that this OSD has in hand.
    pub(super) fn here(now: Millis) -> Leg {
        Leg { piece: true, there: None, offered: now, late: false }
    }

    /// Sent, or asked for.
    pub(super) fn there(piece: bool, now: Millis) -> Leg {
        Leg { piece, there: Some(now), offered: now, late: false }
    }
}

#[derive(Debug)]
pub(super) struct Work {
    pub(super) stage: Stage,
    pub(super) since: Millis,
    pub(super) tid: u64,
    /// By receiver; none of those whose turn has not come.
    pub(super) legs: BTreeMap<OsdId, Leg>,
    /// Erasure coding: all shards that have not come are late.
    gathers_late: bool,
    /// Erasure coding: the shards that were computed.
    pub(super) computed: BTreeMap<OsdId, Content>,
    /// Somebody was given the last piece.
    pub(super) ends: bool,
}

impl Work {
    pub(super) fn new(stage: Stage, tid: u64, now: Millis) -> Work {
        let (legs, computed) = (BTreeMap::new(), BTreeMap::new());
        Work { stage, since: now, tid, legs, gathers_late: false, computed, ends: false }
    }

    /// A piece of an object that ends at block `end` goes to somebody.
    pub(super) fn goes(&mut self, first_block: u32, end: u32) {
        self.ends |= first_block.saturating_add(PIECE_BLOCKS) >= end;
    }

    /// What may be moving of it, and what of that waits for others who are late.
    fn load(&self, object_bytes: u64) -> Load {
        let piece = u64::from(PIECE_BYTES);
        match &self.stage {
            Stage::Gathering if self.gathers_late => {
                Load { late: object_bytes, late_count: 1, ..Load::of(object_bytes) }
            }
            Stage::Gathering => Load::of(object_bytes),
            Stage::Reading => Load::of(piece),
            Stage::Replacing | Stage::Pulling { .. } | Stage::Pushing { .. } => {
                let (mut load, legs) = (Load::default(), self.legs.values());
                for leg in legs {
                    let bytes = if leg.piece { piece } else { 0 };
                    load += match leg.late {
                        true => Load { late: bytes, late_count: 1, ..Load::of(bytes) },
                        false => Load::of(bytes),
                    };
                }
                load
            }
        }
    }

    /// It goes on when somebody answers who is late, and not before.
    fn is_stalled(&self) -> bool {
        let late = |o: &OsdId| self.legs.get(o).is_some_and(|l| l.late);
        match &self.stage {
            // To this OSD, and nobody else.
            Stage::Pulling { .. } => self.legs.values().any(|l| l.late),
            Stage::Pushing { waiting } => waiting.iter().all(late),
            Stage::Gathering => self.gathers_late,
            Stage::Replacing | Stage::Reading => false,
        }
    }
}

/// A piece whose turn has not come.
#[derive(Debug)]
pub(super) struct Wish {
    pub object: ObjectId,
    pub to: OsdId,
    pub tid: u64,
    pub version: Version,
    pub first_block: u32,
    pub have: Vec<LeafDigest>,
}

#[derive(Debug)]
pub struct Recovery {
    /// What each acting member lacks.
    pub(super) missing: BTreeMap<OsdId, BTreeMap<ObjectId, Needed>>,
    /// Who has the needed version of what somebody lacks.
    pub(super) sources: BTreeMap<ObjectId, BTreeSet<OsdId>>,
    /// Sources that could not read it.
    pub(super) bad: BTreeSet<(ObjectId, OsdId)>,
    /// Objects that the own store cannot read and of which no other copy is known, and since when. The own copy
    /// stays until there is one: its other blocks may be all that is left.
    pub(super) own_bad: BTreeMap<ObjectId, Millis>,
    pub(super) uncertain: BTreeSet<ObjectId>,
    /// Erasure coding, while the group does not serve: objects about which only more members can decide. They are left alone.
    pub(super) unsettled: BTreeSet<ObjectId>,
    pub(super) demanded: BTreeSet<ObjectId>,
    /// Objects whose turn it is, and of which writes in flight must end first. New ones wait.
    pub(super) draining: BTreeSet<ObjectId>,
    pub(super) work: BTreeMap<ObjectId, Work>,
    /// How often that of an object was given up because a client wrote it.
    gave_way: BTreeMap<ObjectId, u32>,
    /// Not tried again before then: it has just failed.
    pub(super) not_before: BTreeMap<ObjectId, Millis>,
    /// Pieces that wait until clients leave room, in order.
    pub(super) wishes: VecDeque<Wish>,
    /// Who has an older copy of what it lacks.
    older: BTreeSet<(ObjectId, OsdId)>,
    /// Who was asked for something and has answered nothing since: first and last time of asking.
    pub(super) owing: BTreeMap<OsdId, (Millis, Millis)>,
    pub(super) asked_strays: Millis,
    /// How many removed volumes the map named when their objects were last taken out.
    pub(super) forgotten: (usize, usize),
    /// What one object under way may move.
    pub(super) object_bytes: u64,
    pub(super) coded: Option<Coded>,
    /// Copies that a scrub found wrong, and the version that they are at.
    pub(super) repairs: BTreeMap<(ObjectId, OsdId), Version>,
    /// Members that could not read an object that the own store cannot read either.
    pub(super) unreadable: BTreeSet<(ObjectId, OsdId)>,
    /// Erasure coding: shards of acting members of which some row could not be read.
    pub(super) damaged: BTreeSet<(ObjectId, OsdId)>,
    /// How few more copies may be lost is what this OSD's turns know of the group.
    pub(super) spare_is_known: bool,
    /// Copies at the version that the object is to be at of which some block could not be read, and nothing else is known to be wrong.
    pub(in super::super) partly: BTreeSet<(ObjectId, OsdId)>,
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
        older: BTreeSet<(ObjectId, OsdId)>,
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
            gave_way: BTreeMap::new(),
            not_before: BTreeMap::new(),
            wishes: VecDeque::new(),
            older,
            owing: BTreeMap::new(),
            asked_strays: 0,
            forgotten: (0, 0),
            object_bytes: 0,
            coded,
            repairs: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            damaged: BTreeSet::new(),
            spare_is_known: false,
            partly: BTreeSet::new(),
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
        self.work.insert(object, Work::new(Stage::Gathering, tid, now));
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

    /// Erasure coding: what was computed is kept until who lacks it has it.
    pub fn keep_computed(&mut self, object: &ObjectId, shards: BTreeMap<OsdId, Content>) {
        if let Some(w) = self.work.get_mut(object) {
            w.computed = shards;
        }
    }

    /// A member was offered an object, perhaps with a piece of it.
    pub fn offered(&mut self, object: &ObjectId, member: OsdId, piece: bool, now: Millis) {
        if let Some(w) = self.work.get_mut(object) {
            w.legs.insert(member, Leg::there(piece, now));
        }
    }

    /// The piece for this receiver is with the other side now: it was sent, or asked for.
    pub(super) fn piece_goes(&mut self, object: &ObjectId, receiver: OsdId, now: Millis) {
        if let Some(leg) = self.work.get_mut(object).and_then(|w| w.legs.get_mut(&receiver)) {
            *leg = Leg::there(true, now);
        }
    }

    /// The piece for this OSD has come.
    pub(super) fn piece_is_here(&mut self, object: &ObjectId, own: OsdId, now: Millis) {
        if let Some(leg) = self.work.get_mut(object).and_then(|w| w.legs.get_mut(&own)) {
            *leg = Leg::here(now);
        }
    }

    /// Erasure coding: a member cannot read its shard; it is computed from the others.
    pub fn lose_shard(&mut self, member: OsdId, object: ObjectId, version: Version) {
        match self.coded.as_ref().is_some_and(|c| c.acting.contains_key(&member)) {
            true => {
                self.spare_is_known = false;
                self.damaged.insert((object, member));
                self.missing.entry(member).or_default().insert(object, Needed::certain(version, false));
            }
            false => _ = self.bad.insert((object, member)),
        }
    }

    /// A member's copy is wrong, at whatever version it is held.
    pub fn replace_copy(&mut self, member: OsdId, object: ObjectId, held: Version, missing: Option<Needed>) {
        self.repairs.insert((object, member), held);
        self.partly.remove(&(object, member));
        if let Some(needed) = missing {
            self.spare_is_known = false;
            self.missing.entry(member).or_default().insert(object, needed);
        }
    }

    /// Whose copies of an object are wrong, and the versions that they are at.
    pub fn repairs_of(&self, object: &ObjectId) -> BTreeMap<OsdId, Version> {
        let repairs = self.repairs.range((*object, OsdId(0))..=(*object, OsdId::NONE));
        repairs.map(|((_, o), v)| (*o, *v)).collect()
    }

    /// Whose copies of an object could be read in part.
    pub(super) fn partly_read(&self, object: &ObjectId) -> BTreeSet<OsdId> {
        let partly = self.partly.range((*object, OsdId(0))..=(*object, OsdId::NONE));
        partly.map(|(_, o)| *o).collect()
    }

    /// Somebody else who has the object as it is to be, to be asked for a piece of it.
    pub(in super::super) fn source_but(
        &self,
        object: &ObjectId,
        but: &BTreeSet<OsdId>,
        map: &ClusterMap,
    ) -> Option<OsdId> {
        let good = |o: &OsdId| !self.bad.contains(&(*object, *o)) && map.up_osd(*o).is_some();
        self.sources.get(object)?.iter().copied().find(|o| good(o) && !but.contains(o))
    }

    /// A source has no good copy.
    pub(in super::super) fn refused(&mut self, object: ObjectId, from: OsdId, why: SubResult) {
        self.bad.insert((object, from));
        if why == SubResult::Io {
            self.unreadable.insert((object, from));
        }
    }

    /// The object comes from somebody else from now on.
    pub(in super::super) fn pull_from(&mut self, object: &ObjectId, source: OsdId, now: Millis) {
        if let Some(w) = self.work.get_mut(object)
            && let Stage::Pulling { from } = &mut w.stage
        {
            (*from, w.since) = (source, now);
        }
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

    /// Whether a write of the object must wait (rule P4), in a group of so many members of which `enough` must have it.
    pub fn blocks_writes(&self, own: OsdId, object: &ObjectId, members: usize, enough: usize) -> bool {
        let taken = self.work.contains_key(object) || self.draining.contains(object);
        self.is_missing(object) && (taken || self.may_not_be_written(own, object, members, enough))
    }

    /// Who misses the object must know that, and at which version it is; so must the primary, and nobody may have a doubt about it.
    fn may_not_be_written(&self, own: OsdId, object: &ObjectId, members: usize, enough: usize) -> bool {
        if self.coded.is_some() || !self.repairs_of(object).is_empty() {
            return true;
        }
        let mut hold = members;
        for (o, m) in &self.missing {
            let Some(needed) = m.get(object) else { continue };
            if *o == own || needed.deleted || needed.uncertain.is_some() {
                return true;
            }
            hold = hold.saturating_sub(1);
        }
        hold < enough || self.uncertain.contains(object)
    }

    /// A write of an object that is on its way to others need not wait for that (rule P4b): it can be given up and begin anew later,
    /// unless it is about to end, or that has happened too often.
    pub fn may_give_way(&self, own: OsdId, object: &ObjectId, members: usize, enough: usize) -> bool {
        let early = |w: &Work| matches!(w.stage, Stage::Reading | Stage::Pushing { .. }) && !w.ends;
        let seldom = self.gave_way.get(object).is_none_or(|n| *n < GIVES_WAY_MAX);
        self.work.get(object).is_some_and(early)
            && seldom
            && !self.draining.contains(object)
            && !self.may_not_be_written(own, object, members, enough)
    }

    pub fn is_under_way(&self, object: &ObjectId, tid: u64) -> bool {
        self.work.get(object).is_some_and(|w| w.tid == tid)
    }

    pub fn give_way(&mut self, object: ObjectId) {
        self.work.remove(&object);
        *self.gave_way.entry(object).or_default() += 1;
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
    pub fn load(&self) -> Load {
        self.work.values().fold(Load::default(), |mut sum, w| {
            sum += w.load(self.object_bytes);
            sum.objects += usize::from(!w.is_stalled());
            sum
        })
    }

    /// Others need not wait for what has waited for too long, as long as that is not too much; `elsewhere`: what of it is in other groups.
    /// `gathers`: objects all of whose shards that have not come are late. True: some is late only now.
    pub(super) fn mark_late(&mut self, now: Millis, elsewhere: usize, gathers: &BTreeSet<ObjectId>) -> bool {
        for (o, w) in &mut self.work {
            // Asked again: what comes then takes its place.
            w.gathers_late &= matches!(w.stage, Stage::Gathering) && gathers.contains(o);
        }
        let mut room = LATE_AT_ONCE.saturating_sub(elsewhere + self.load().late_count);
        let before = room;
        for (o, w) in &mut self.work {
            if matches!(w.stage, Stage::Gathering) && gathers.contains(o) && !w.gathers_late && room > 0 {
                w.gathers_late = true;
                room -= 1;
            }
            let legs =
                w.legs.values_mut().filter(|l| !l.late && l.there.is_some_and(|t| now >= t + PASSED_MS));
            for leg in legs.take(room) {
                leg.late = true;
                room -= 1;
            }
        }
        room < before
    }

    /// What is to be offered again to members that have not answered: under which number, and as what. Not what a member would take
    /// again though it has it.
    pub(super) fn offers(&mut self, now: Millis) -> Vec<(OsdId, u64, ObjectId, Needed)> {
        let (mut again, coded) = (Vec::new(), self.coded.is_some());
        for (object, w) in &mut self.work {
            let Stage::Pushing { waiting } = &w.stage else { continue };
            for (member, leg) in &mut w.legs {
                let Some(needed) = self.missing.get(member).and_then(|m| m.get(object)) else { continue };
                let repaired = self.repairs.contains_key(&(*object, *member));
                let Some(there) = leg.there.filter(|_| !coded && !repaired && waiting.contains(member))
                else {
                    continue;
                };
                if now >= leg.offered + OFFER_AGAIN_MS.max(leg.offered.saturating_sub(there)) {
                    leg.offered = now;
                    again.push((*member, w.tid, *object, *needed));
                }
            }
        }
        again
    }

    /// Whether a member has something of an object that it lacks, and that a scrub did not find wrong.
    pub fn has_older(&self, member: OsdId, object: &ObjectId) -> bool {
        self.older.contains(&(*object, member)) && !self.repairs.contains_key(&(*object, member))
    }

    /// The next piece whose turn it is: those of objects in demand first.
    pub(super) fn next_wish(&mut self, allowed: bool) -> Option<Wish> {
        let (work, demanded) = (&self.work, &self.demanded);
        self.wishes.retain(|w| work.get(&w.object).is_some_and(|work| work.tid == w.tid));
        let first = self.wishes.iter().position(|w| demanded.contains(&w.object));
        self.wishes.remove(first.or(allowed.then_some(0))?)
    }

    pub(super) fn wishes_for(&self, object: &ObjectId) -> bool {
        self.wishes.iter().any(|w| w.object == *object)
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
    pub(super) fn is_unfound(&self, own: OsdId, object: &ObjectId) -> bool {
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

    pub(super) fn asked(&mut self, member: OsdId, now: Millis) {
        let (since, last) = self.owing.entry(member).or_insert((now, now));
        if now > *last + FORGIVEN_MS {
            *since = now;
        }
        *last = now;
    }

    /// True: a scrub had found the copy wrong.
    pub(super) fn settle(&mut self, member: OsdId, object: &ObjectId) -> bool {
        if let Some(m) = self.missing.get_mut(&member) {
            m.remove(object);
        }
        self.damaged.remove(&(*object, member));
        self.partly.remove(&(*object, member));
        if !self.missing.values().any(|m| m.contains_key(object)) {
            self.uncertain.remove(object);
            self.demanded.remove(object);
            self.sources.remove(object);
            self.own_bad.remove(object);
            self.not_before.remove(object);
            self.gave_way.remove(object);
            self.bad.retain(|(o, _)| o != object);
            self.unreadable.retain(|(o, _)| o != object);
        }
        self.repairs.remove(&(*object, member)).is_some()
    }

    /// How many more copies or shards of an object may be lost.
    pub(super) fn spare(&self, object: &ObjectId, members: usize) -> usize {
        let lacking = self.missing.values().filter(|m| m.contains_key(object)).count();
        members.saturating_sub(lacking + self.coded.as_ref().map_or(1, |c| c.k))
    }

    /// The next object to start: in demand first, then uncertain ones, then the one that most members lack. None of which writes are
    /// in flight, as long as there is another one.
    pub(super) fn next(
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
