//! A pass over a group at its primary.

use super::compare::{Verdict, judge};
use super::parity::Parity;
use super::{Damage, Reading, ScrubReport};
use crate::core::pg::*;
use gabion_proto::limits::{DAMAGED_NAMED_MAX, SCRUB_ENTRIES_MAX};
use gabion_proto::pb;

/// Unanswered questions are asked again after this long: members look only as fast as their budget allows.
const ASK_AGAIN_MS: Millis = 5_000;
/// An object that was written to meanwhile is looked at again after this long, then ever later.
const PUT_OFF_MS: Millis = 200;
/// After so many tries its writes wait meanwhile.
const TRIES_MAX: u32 = 5;
/// But no longer than this: then they have this long to themselves.
const HOLD_MS: Millis = 3_000;
const LET_GO_MS: Millis = 30_000;

#[derive(Debug, Default)]
pub struct Scrub {
    /// The own part of the batch that is being looked at.
    pub(super) own: Option<Reading>,
    pass: Option<Pass>,
    /// Erasure coding: the object whose shards are being read.
    pub(super) parity: Option<Parity>,
    /// The order that the last pass of this interval carried out.
    done: u64,
    /// Objects without a good copy.
    pub damaged: BTreeMap<ObjectId, Damage>,
}

#[derive(Debug)]
struct Pass {
    number: u64,
    deep: bool,
    /// Everything up to here was judged or put off.
    reached: Option<ObjectId>,
    at_end: bool,
    batch: Option<Batch>,
    again: BTreeMap<ObjectId, Again>,
    /// Erasure coding: objects whose parity is to be computed, next.
    unread: VecDeque<ObjectId>,
    /// Its new writes wait, since then.
    held: Option<(ObjectId, Millis)>,
    objects: u64,
    findings: u64,
    repaired_before: u64,
    reporting: bool,
}

/// An object that is looked at once more.
#[derive(Clone, Copy, Debug, Default)]
struct Again {
    tries: u32,
    due: Millis,
    deep: bool,
}

#[derive(Debug)]
struct Batch {
    tid: u64,
    range: ScrubRange,
    deep: bool,
    /// What the objects were when it began, and those of which writes were in flight.
    began: BTreeMap<ObjectId, Held>,
    busy: BTreeSet<ObjectId>,
    asked: Millis,
    waiting: BTreeSet<OsdId>,
    copies: BTreeMap<OsdId, Copies>,
}

/// A member's part of a batch.
#[derive(Debug)]
struct Copies {
    entries: BTreeMap<ObjectId, ScrubEntry>,
    last: bool,
}

impl Scrub {
    /// Bytes that are being read here.
    pub fn bytes(&self) -> u64 {
        self.own.as_ref().map_or(0, Reading::bytes)
    }

    /// Whether new writes of the object wait.
    pub fn holds(&self, object: &ObjectId) -> bool {
        self.pass.as_ref().is_some_and(|p| p.held.is_some_and(|(o, _)| o == *object))
    }

    /// Everybody has a good copy again.
    pub fn recovered(&mut self, object: &ObjectId) {
        if self.damaged.get(object) == Some(&Damage::Unreadable) {
            self.damaged.remove(object);
        }
    }

    pub(super) fn found(&mut self, count: u64) {
        if let Some(pass) = &mut self.pass {
            pass.findings += count;
        }
    }

    /// It was written to meanwhile, or is to be looked at again when it is repaired.
    pub(super) fn put_off(&mut self, object: ObjectId, now: Millis) {
        if let Some(pass) = &mut self.pass {
            pass.put_off(object, now, false);
        }
    }

    pub fn progress(&self, repaired: u64) -> Option<pb::ScrubProgress> {
        let p = self.pass.as_ref()?;
        Some(pb::ScrubProgress {
            deep: p.deep,
            objects_done: p.objects,
            findings: p.findings,
            repaired: repaired - p.repaired_before,
        })
    }

    /// The first of the damaged objects.
    pub fn damaged_named(&self) -> Vec<(ObjectId, Damage)> {
        self.damaged.iter().take(DAMAGED_NAMED_MAX).map(|(o, d)| (*o, *d)).collect()
    }
}

impl Pass {
    fn put_off(&mut self, object: ObjectId, now: Millis, deep: bool) {
        let again = self.again.entry(object).or_default();
        again.tries += 1;
        again.due = now + PUT_OFF_MS * Millis::from(again.tries);
        again.deep |= deep;
    }
}

impl Pg {
    fn pass(&mut self) -> Option<&mut Pass> {
        match &mut self.phase {
            Phase::Active(a) => a.scrub.pass.as_mut(),
            _ => None,
        }
    }

    /// The monitors' order. What is under way goes on; they repeat what is not done.
    pub fn order_scrub(&mut self, cx: &mut Cx<'_>, number: u64, deep: bool) {
        let repaired_before = self.counters.scrub_repaired;
        let Phase::Active(a) = &mut self.phase else { return };
        if !a.clean_confirmed || a.scrub.pass.is_some() || number <= a.scrub.done {
            return;
        }
        tracing::debug!(pg = %self.id, number, deep, "scrub begins");
        a.scrub.pass = Some(Pass {
            number,
            deep,
            reached: None,
            at_end: false,
            batch: None,
            again: BTreeMap::new(),
            unread: VecDeque::new(),
            held: None,
            objects: 0,
            findings: 0,
            repaired_before,
            reporting: false,
        });
        self.scrub_on(cx);
    }

    /// Begins the next batch once there is nothing left to repair; reports when nothing is left to look at.
    pub(in super::super) fn scrub_on(&mut self, cx: &mut Cx<'_>) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(pass) = a.scrub.pass.as_mut().filter(|p| !p.reporting) else { return };
        if let Some((object, _)) = pass.held.take_if(|(_, since)| cx.now >= *since + HOLD_MS) {
            // Somebody does not answer, or its writes do not end.
            cx.takes(Branch::ScrubLetsGo);
            pass.unread.retain(|o| *o != object);
            pass.again.insert(object, Again { tries: TRIES_MAX, due: cx.now + LET_GO_MS, deep: pass.deep });
            pass.batch = None;
            (a.scrub.own, a.scrub.parity) = (None, None);
            return self.resume(cx);
        }
        if let Some(batch) = &mut pass.batch {
            if cx.now >= batch.asked + ASK_AGAIN_MS {
                batch.asked = cx.now;
                let (tid, range, deep) = (batch.tid, batch.range, batch.deep);
                for o in batch.waiting.clone() {
                    self.send(cx, o, PeerBody::ScrubRead { tid, range, deep }, Bytes::new());
                }
            }
            return;
        }
        if a.scrub.parity.is_some() {
            return self.parity_on(cx);
        }
        let (now, again) = (cx.now, &pass.again);
        let its_turn =
            |o: &ObjectId| pass.unread.front() == Some(o) || again.get(o).is_some_and(|a| now >= a.due);
        let waits = a.recovery.misses_more_than(&a.scrub.damaged);
        if pass.held.is_some_and(|(o, _)| waits || !its_turn(&o)) {
            pass.held = None;
            // Its writes go on.
            self.resume(cx);
        }
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(pass) = &mut a.scrub.pass else { return };
        if a.recovery.misses_more_than(&a.scrub.damaged) {
            return;
        }
        if let Some(object) = pass.unread.front().copied() {
            if a.writes.values().any(|w| w.object == object) {
                if pass.held.is_none() {
                    pass.unread.pop_front();
                    pass.put_off(object, cx.now, false);
                }
                return;
            }
            if self.begin_parity(cx, object)
                && let Some(pass) = self.pass()
            {
                pass.unread.pop_front();
            }
            return;
        }
        if !pass.at_end {
            let (range, deep) = (ScrubRange::After(pass.reached), pass.deep);
            return self.begin_batch(cx, range, deep);
        }
        // The one that has waited longest.
        let Some((object, again)) = pass.again.iter().min_by_key(|(_, a)| a.due).map(|(o, a)| (*o, *a))
        else {
            return self.report_scrub(cx);
        };
        if cx.now < again.due {
            return;
        }
        if again.tries >= TRIES_MAX {
            pass.held.get_or_insert((object, cx.now));
            cx.takes(Branch::ScrubHoldsWrites);
            if a.writes.values().any(|w| w.object == object) {
                // They end first, new ones wait.
                return;
            }
        }
        let deep = again.deep || pass.deep;
        self.begin_batch(cx, ScrubRange::One(object), deep);
    }

    fn begin_batch(&mut self, cx: &mut Cx<'_>, range: ScrubRange, deep: bool) {
        let others = self.others(cx);
        // Shards are like no other ones: they are compared row by row, afterwards.
        let deep = deep && self.code.is_none();
        let Phase::Active(a) = &mut self.phase else { return };
        let tid = a.next_tid();
        let own = self.range_to_read(cx, tid, range, deep);
        let Phase::Active(a) = &mut self.phase else { return };
        let began = own.objects().filter_map(|o| Some((o, *self.index.objects.get(&o)?))).collect();
        let busy = a.writes.values().map(|w| w.object).collect();
        a.scrub.own = Some(own);
        if let Some(pass) = &mut a.scrub.pass {
            let waiting = others.iter().copied().chain([cx.id]).collect();
            let copies = BTreeMap::new();
            pass.batch = Some(Batch { tid, range, deep, began, busy, asked: cx.now, waiting, copies });
        }
        for o in others {
            self.send(cx, o, PeerBody::ScrubRead { tid, range, deep }, Bytes::new());
        }
        self.look_on(cx);
    }

    /// A member's answer, or what the own store has.
    pub(in super::super) fn copies_came(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        entries: Vec<ScrubEntry>,
        last: bool,
    ) {
        let Some(pass) = self.pass() else { return };
        let Some(batch) = pass.batch.as_mut().filter(|b| b.tid == tid) else { return };
        let ordered = entries.is_sorted_by(|a, b| a.object < b.object);
        let within = entries.iter().all(|e| batch.range.contains(&e.object));
        let sane = entries.len() <= SCRUB_ENTRIES_MAX && ordered && within && (last || !entries.is_empty());
        if !batch.waiting.contains(&from) || !sane {
            return;
        }
        batch.waiting.remove(&from);
        let entries = entries.into_iter().map(|e| (e.object, e)).collect();
        batch.copies.insert(from, Copies { entries, last });
        if batch.waiting.is_empty() {
            self.judge_batch(cx);
        }
    }

    /// Everybody has answered.
    fn judge_batch(&mut self, cx: &mut Cx<'_>) {
        let Phase::Active(a) = &mut self.phase else { return };
        let writing: BTreeSet<ObjectId> = a.writes.values().map(|w| w.object).collect();
        let Some(pass) = &mut a.scrub.pass else { return };
        let Some(batch) = pass.batch.take() else { return };
        // As far as everybody's answer goes.
        let ends = batch.copies.values().filter(|c| !c.last);
        let upto = ends.filter_map(|c| c.entries.keys().next_back().copied()).min();
        let objects: BTreeSet<ObjectId> =
            batch.copies.values().flat_map(|c| c.entries.keys().copied()).collect();
        match batch.range {
            ScrubRange::One(o) => _ = pass.again.get_mut(&o).map(|a| a.due = cx.now),
            ScrubRange::After(_) => (pass.reached, pass.at_end) = (upto, upto.is_none()),
        }
        let enough = self.code.as_ref().map_or(1, |c| usize::from(c.geometry().k));
        let judged: Vec<_> = objects.into_iter().filter(|o| upto.is_none_or(|u| *o <= u)).collect();
        let one = match batch.range {
            ScrubRange::One(o) => Some(o),
            ScrubRange::After(_) => None,
        };
        // Gone meanwhile, everywhere.
        if let Some(one) = one.filter(|_| judged.is_empty())
            && let Some(pass) = self.pass()
        {
            pass.again.remove(&one);
        }
        for object in judged {
            let now = self.index.objects.get(&object).map(|h| (h.version, h.deleted));
            let began = batch.began.get(&object).map(|h| (h.version, h.deleted));
            let idle = now == began && !writing.contains(&object) && !batch.busy.contains(&object);
            // Whoever misses it, of whole copies, has nothing to say: what is there may have been found wrong before.
            let coded = self.code.is_some();
            let Phase::Active(a) = &self.phase else { return };
            let heard = |o: &OsdId| coded || !a.recovery.lacks(*o, &object);
            let entry = |o: &OsdId, c: &Copies| c.entries.get(&object).copied().filter(|_| heard(o));
            let copies: BTreeMap<OsdId, Option<ScrubEntry>> =
                batch.copies.iter().map(|(o, c)| (*o, entry(o, c))).collect();
            let Some(pass) = self.pass() else { return };
            if one.is_none() {
                pass.objects += 1;
                self.counters.scrubbed_objects += 1;
            }
            if !idle {
                cx.takes(Branch::ScrubPutOff);
                if let Some(pass) = self.pass() {
                    pass.put_off(object, cx.now, batch.deep);
                }
                continue;
            }
            // Of shards the records say all that can be compared here.
            let deep = batch.deep || self.code.is_some();
            let verdict = match is_removed(cx.map, &object) {
                true => Verdict::Good,
                false => judge(now, &copies, deep, enough),
            };
            let partly = |c: &ScrubEntry| c.unreadable.is_some() && now == Some((c.version, false));
            let partly = copies.iter().filter(|(_, c)| c.as_ref().is_some_and(partly));
            let partly: Vec<OsdId> = partly.map(|(o, _)| *o).filter(|_| !coded).collect();
            self.act_on(cx, object, now, verdict, batch.deep);
            for member in partly {
                self.copy_is_partly_readable(member, object);
            }
        }
    }

    fn act_on(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        wanted: Option<(Version, bool)>,
        verdict: Verdict,
        deep: bool,
    ) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(pass) = &mut a.scrub.pass else { return };
        let first_look = !pass.again.contains_key(&object);
        if verdict != Verdict::LookCloser {
            pass.again.remove(&object);
        }
        match verdict {
            Verdict::Good => {
                if self.code.is_some() && pass.deep {
                    pass.unread.push_back(object);
                } else if deep {
                    a.scrub.damaged.remove(&object);
                }
            }
            Verdict::LookCloser if first_look => {
                cx.takes(Branch::ScrubCloser);
                pass.again.insert(object, Again { tries: 0, due: cx.now, deep: true });
            }
            Verdict::LookCloser => pass.put_off(object, cx.now, true),
            Verdict::Replace { bad, good } => {
                let count = bad.len() as u64;
                pass.findings += count;
                self.counters.scrub_findings += count;
                a.scrub.damaged.remove(&object);
                tracing::warn!(pg = %self.id, %object, ?bad, ?good, "a scrub found copies to replace");
                cx.takes(Branch::ScrubReplaces);
                self.replace_copies(cx, object, wanted, bad, good);
            }
            Verdict::Assemble { partly } => {
                let count = partly.len() as u64;
                pass.findings += count;
                self.counters.scrub_findings += count;
                // Until it is known to be: see `keep_if_damaged`.
                a.scrub.damaged.remove(&object);
                tracing::warn!(pg = %self.id, %object, ?partly, "a scrub found no copy whole");
                cx.takes(Branch::ScrubAssembles);
                self.assemble(cx, object, partly);
            }
            Verdict::Damaged(damage) => {
                pass.findings += 1;
                self.counters.scrub_findings += 1;
                tracing::error!(pg = %self.id, %object, ?damage, "a scrub found no good copy");
                a.scrub.damaged.insert(object, damage);
                cx.takes(Branch::ScrubDamaged);
            }
        }
    }

    /// Bad copies are missing from now on; recovery replaces them.
    pub(super) fn replace_copies(
        &mut self,
        cx: &mut Cx<'_>,
        object: ObjectId,
        wanted: Option<(Version, bool)>,
        bad: BTreeMap<OsdId, Version>,
        good: BTreeSet<OsdId>,
    ) {
        let coded = self.code.is_some();
        let Phase::Active(a) = &mut self.phase else { return };
        if !cx.rules.keep(Rule::ScrubRepairs) {
            return;
        }
        let (version, deleted) = wanted.unwrap_or((Version::ZERO, true));
        let needed = Needed::certain(version, deleted);
        // Whoever misses it gets another one anyway: a second note would outlive that.
        let bad: BTreeMap<OsdId, Version> =
            bad.into_iter().filter(|(o, _)| coded || !a.recovery.lacks(*o, &object)).collect();
        for (member, held) in &bad {
            // The own copy is lost below, durably: it serves nothing until it is replaced.
            let missing = (*member != cx.id || coded).then_some(needed);
            a.recovery.replace_copy(*member, object, *held, missing);
        }
        a.clean_reported = false;
        if bad.contains_key(&cx.id) && !coded {
            self.replace_own_copy(cx, object, good);
        }
        self.recover(cx);
    }

    fn report_scrub(&mut self, cx: &mut Cx<'_>) {
        let repaired = self.counters.scrub_repaired;
        let Phase::Active(a) = &mut self.phase else { return };
        a.scrub.damaged.retain(|o, _| self.index.objects.contains_key(o));
        let damaged = a.scrub.damaged_named();
        let damaged_objects = a.scrub.damaged.len() as u64;
        let Some(pass) = &mut a.scrub.pass else { return };
        pass.reporting = true;
        let report = ScrubReport {
            number: pass.number,
            deep: pass.deep,
            objects: pass.objects,
            findings: pass.findings,
            repaired: repaired - pass.repaired_before,
            damaged_objects,
            damaged,
        };
        tracing::info!(pg = %self.id, deep = report.deep, objects = report.objects, findings = report.findings, repaired = report.repaired, damaged = damaged_objects, "scrubbed");
        let request = MonitorRequest::Scrubbed { pg: self.id, interval: self.record.interval, report };
        self.report(cx, What::ReportScrubbed, request);
    }

    /// The monitors have it, or the interval is over.
    pub(in super::super) fn scrub_reported(&mut self) {
        let Phase::Active(a) = &mut self.phase else { return };
        if let Some(pass) = a.scrub.pass.take() {
            a.scrub.done = pass.number;
        }
    }
}
