//! One placement group on one OSD, as a pure state machine (replicated pools).
//!
//! ```text
//!                        new interval (any state)
//!                                 |
//!                                 v
//!   not in acting: STRAY     LOADING  list the store, promise the interval
//!                                 |
//!              replica  +---------+---------+  primary
//!                       v                   v
//!                  waits for            PEERING    Query -> Info (promised), List
//!                  Activate                 |      every acting member, and of each past interval that
//!                       |                   |      may have taken writes a member that was active in it
//!                       v                   v
//!                  activation durable  ACTIVATING  missing maps and `activated` durable everywhere,
//!                       |                   |      then `activated` at the monitors
//!                       v                   v
//!                    ACTIVE <---------- ACTIVE     serves; recovers; reports clean
//! ```
//!
//! An erasure-coded group with too few members to serve may go through the same states without serving, see `shards`.
//!
//! What it owns: the durable [`PgMeta`], the index of objects and the missing map (both also in the store), and at the primary
//! the operations in flight. What it guarantees:
//!
//! - *One history* (P1-P3). Messages belong to one interval and one run of both processes. Only members with
//!   the highest activated interval say what an object's version should be; other copies are compared for inequality. A member
//!   covers a past interval only if it was activated in it (or later): a disk that lost its memory does not count.
//!   What the authority disagrees about is rolled forward, or back when all copies of it are lost (see `history`).
//! - *A whole missing map* (P4). A member's missing map and `activated` change in one transaction, so
//!   a member that claims an interval always knows what it lacks in it.
//! - *Version order* (P2). Each write names its predecessor. A replica holds what comes early and refuses nothing silently; the
//!   primary repeats until it is acknowledged or the interval is over.
//! - *Never answered twice.* When the interval ends, every operation that is still here is answered `Retry`; a client may
//!   repeat it because it has no overlapping write in flight, and the server drops what older connections of the
//!   client still bring (rule C1). An operation of before the interval is refused by its epoch.
//! - *Reads* (P5, P6) need the lease, wait for overlapping writes in flight, and for objects about which the authority disagreed
//!   until every acting member has the same version.

mod division;
mod hedge;
mod history;
mod intake;
mod listing;
mod member;
mod mend;
mod ops;
mod peering;
mod pieces;
mod recovery;
mod scrub;
mod shards;
mod status;
mod writes;

use super::context::{Context, Load, Purpose};
use super::latency::Kind;
use super::{Branch, ClientToken, Effect, Listing, Millis, MonitorRefused, MonitorRequest, Rule, Token};
use crate::erasure::Code;
use crate::store::{Needed, PgMeta, StoreError, Txn, TxnOp};
use bytes::Bytes;
use gabion_proto::ids::*;
use gabion_proto::map::{ClusterMap, PgRecord};
use gabion_proto::msg::*;
use gabion_proto::shared::Shared;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

#[cfg(test)]
pub mod test_pieces {
    pub use super::pieces::digests;
    pub use gabion_proto::limits::PIECE_BLOCKS as PIECE;
}

pub use ops::ClientWork;
pub use status::damaged_object;

type Cx<'a> = Context<'a, What>;

/// What a token of a group is for.
#[derive(Clone, Debug)]
pub enum What {
    Loaded,
    /// The promise of this interval; `to` hears of it.
    Promised,
    Activated,
    Write {
        tid: u64,
    },
    SubWrite {
        tid: u64,
        object: ObjectId,
        version: Version,
    },
    Read {
        token: ClientToken,
    },
    /// A piece of the own copy for the primary.
    ServePull {
        to: OsdId,
        tid: u64,
        object: ObjectId,
        version: Version,
        first_block: u32,
        have: Vec<LeafDigest>,
    },
    /// A piece of the own copy for a member that this primary brings the object to.
    ServePushed {
        to: OsdId,
        tid: u64,
        object: ObjectId,
        version: Version,
        first_block: u32,
        have: Vec<LeafDigest>,
    },
    /// A piece of the own copy, to be compared with what the object is to be.
    OwnPiece {
        object: ObjectId,
        tid: u64,
    },
    PlacePiece {
        object: ObjectId,
        tid: u64,
    },
    PushApplied {
        tid: u64,
        object: ObjectId,
        version: Version,
        deleted: bool,
        beside: Option<Version>,
    },
    Recovered {
        object: ObjectId,
        /// Erasure coding: it was stored beside this version.
        beside: Option<Version>,
    },
    /// The first piece of the own copy, before an object is pushed.
    PushRead {
        object: ObjectId,
        tid: u64,
    },
    /// Erasure coding: rows of the own shard for a gathering of this primary.
    OwnRows {
        tid: u64,
    },
    /// Erasure coding: rows of the own shard for the primary, or its successor.
    ServeRows {
        to: OsdId,
        tid: u64,
    },
    /// Erasure coding: rows of the own parity that a write adds to.
    OldParity {
        object: ObjectId,
        version: Version,
        first_row: u32,
    },
    /// Blocks of the own copy for the primary.
    ServeBlocks {
        to: OsdId,
        tid: u64,
        layers: Vec<ObjectId>,
    },
    /// The copy, or what an earlier place left of one.
    Removed,
    /// The copy is that of more groups than before.
    Divided,
    ReportActivated,
    ReportClean,
    ReportFilled,
    ReportScrubbed,
    /// A copy that a scrub looks at.
    ScrubCopy {
        tid: u64,
        object: ObjectId,
    },
    /// Nothing depends on it beyond its success.
    Housekeeping,
}

impl What {
    /// What tells how fast the own disk answers: small and asked for by clients, here or at another primary.
    pub fn measured(&self) -> Option<Kind> {
        match self {
            What::Write { .. } | What::SubWrite { .. } => Some(Kind::Write),
            What::Read { .. }
            | What::OwnRows { .. }
            | What::ServeRows { .. }
            | What::OldParity { .. }
            | What::ServeBlocks { .. } => Some(Kind::Read),
            _ => None,
        }
    }
}

/// A version as held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub version: Version,
    pub deleted: bool,
    /// Erasure coding: `version` is pending beside this committed one.
    pub base: Option<Version>,
}

impl Held {
    pub fn committed(version: Version, deleted: bool) -> Held {
        Held { version, deleted, base: None }
    }

    /// What of it must stay beneath the version that is needed.
    fn beneath(&self, needed: &Needed) -> Version {
        match needed.uncertain == Some(self.version) {
            true => self.version,
            false => self.base.unwrap_or(self.version),
        }
    }
}

/// What the store has, or will have once everything submitted is done.
#[derive(Debug, Default)]
pub struct Index {
    pub objects: BTreeMap<ObjectId, Held>,
    pub missing: BTreeMap<ObjectId, Needed>,
    /// Erasure coding, at the primary, whose `objects` are what they should be: committed versions that are still here of
    /// those that it misses.
    pub beneath: BTreeMap<ObjectId, Version>,
}

/// Since this run began.
#[derive(Debug, Default)]
pub struct Counters {
    pub reads: u64,
    pub writes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub recovered_objects: u64,
    pub recovered_bytes: u64,
    pub scrubbed_objects: u64,
    pub scrubbed_bytes: u64,
    pub scrub_findings: u64,
    pub scrub_repaired: u64,
    pub hedged_reads: u64,
    pub hedges_won: u64,
}

/// How far the group has come in its interval, on this member.
#[derive(Debug)]
enum Phase {
    /// The store is being listed.
    Loading,
    /// Loaded; not primary. `Some` while pages of an activation come in.
    Member(member::Member),
    /// Primary, not enough members.
    Undersized,
    Peering(peering::Peering),
    Activating(peering::Activating),
    Active(Box<ops::Active>),
    /// The own store refused something that must not be refused; waits for another interval.
    Broken(String),
}

/// A placement group.
pub struct Pg {
    id: PgId,
    /// As durable, or submitted.
    meta: PgMeta,
    /// The store has something of it.
    stored: bool,
    record: Shared<PgRecord>,
    /// Counts intervals seen here: answers to an earlier one's effects are ignored.
    round: u64,
    /// The current interval was begun: this run is the one that the map calls up.
    begun: bool,
    index: Index,
    phase: Phase,
    /// Client operations that have not started, in order of arrival.
    waiting: VecDeque<ClientWork>,
    pub counters: Counters,
    recovered_objects: u64,
    recovered_bytes: u64,
    since: Millis,
    /// This interval should end: some object runs out of versions, or the last copy of a version in doubt is lost.
    wants_interval: bool,
    /// Objects on their way here.
    intakes: BTreeMap<ObjectId, intake::Intake>,
    /// Of these the own copy was not what it seemed to be.
    comes_whole: BTreeSet<ObjectId>,
    /// The primary's question came before what is here was listed.
    asked: bool,
    /// The map's tombstones when nothing of any of them was left here.
    purged: (usize, usize),
    /// Of an erasure-coded pool.
    code: Option<Arc<dyn Code>>,
    /// Erasure coding: this interval has too few members to serve; it only brings them up to date.
    fills: bool,
}

impl Pg {
    /// A group that the store holds.
    pub fn stored(id: PgId, meta: PgMeta) -> Pg {
        Pg { meta, stored: true, ..Pg::empty(id) }
    }

    pub fn empty(id: PgId) -> Pg {
        Pg {
            id,
            meta: PgMeta::default(),
            stored: false,
            record: Shared::default(),
            round: 0,
            begun: false,
            index: Index::default(),
            phase: Phase::Loading,
            waiting: VecDeque::new(),
            counters: Counters::default(),
            recovered_objects: 0,
            recovered_bytes: 0,
            since: 0,
            wants_interval: false,
            intakes: BTreeMap::new(),
            comes_whole: BTreeSet::new(),
            asked: false,
            purged: (0, 0),
            code: None,
            fills: false,
        }
    }

    /// Bytes that recovery may be moving for this group, and scrubs reading.
    pub fn recovery_load(&self) -> Load {
        match &self.phase {
            Phase::Active(a) => {
                let mut load = a.recovery.load();
                load += Load::of(a.scrub.bytes());
                load
            }
            Phase::Member(m) => Load::of(m.scrub.as_ref().map_or(0, scrub::Reading::bytes)),
            _ => Load::default(),
        }
    }

    pub fn id(&self) -> PgId {
        self.id
    }

    pub fn round(&self) -> u64 {
        self.round
    }

    fn token(&self, cx: &mut Cx<'_>, what: What) -> Token {
        cx.tokens.issue(Purpose { pg: self.id, round: self.round, since: cx.now, what })
    }

    fn submit(&mut self, cx: &mut Cx<'_>, what: What, ops: Vec<TxnOp>) {
        self.stored = true;
        let token = self.token(cx, what);
        // Room was checked where the client's write was accepted; what was accepted must not fail here.
        cx.out.push(Effect::Store { token, txn: Txn { pg: self.id, ops, reserve: true } });
    }

    fn send(&self, cx: &mut Cx<'_>, to: OsdId, body: PeerBody, data: Bytes) {
        cx.send(to, self.id, self.record.interval, body, data);
    }

    fn others(&self, cx: &Cx<'_>) -> Vec<OsdId> {
        self.record.members().filter(|o| *o != cx.id).collect()
    }

    /// A newer map: a new interval starts over; otherwise only what the map says of this one is
    /// taken over.
    pub fn new_map(&mut self, cx: &mut Cx<'_>, current: bool) {
        let Some(record) = cx.map.pgs.get(&self.id) else {
            self.leave_map(cx, current);
            return;
        };
        if record.interval == self.record.interval && self.begun {
            self.record = record.clone();
            self.drop_stray(cx);
            match self.phase {
                Phase::Peering(_) => self.peer_on(cx),
                // Somebody may be held back now.
                Phase::Undersized => self.start_peering(cx),
                Phase::Active(_) if self.fills => self.fill_again(cx),
                _ => {}
            }
            return;
        }
        self.abandon(cx);
        self.record = record.clone();
        self.choose_code(cx);
        self.round += 1;
        self.index = Index::default();
        self.phase = Phase::Loading;
        self.intakes.clear();
        self.comes_whole.clear();
        self.recovered_objects = 0;
        self.recovered_bytes = 0;
        self.since = cx.now;
        self.wants_interval = false;
        self.asked = false;
        self.purged = (0, 0);
        if current {
            self.load(cx);
        }
        // Otherwise this run is not the one that the map calls up; begin when it is.
        self.begun = current;
    }

    fn load(&mut self, cx: &mut Cx<'_>) {
        let token = self.token(cx, What::Loaded);
        cx.out.push(Effect::List { token, pg: self.id });
    }

    /// Deletes what the store has of the group and lists it anew: only what the store says then is believed.
    fn remove_copy(&mut self, cx: &mut Cx<'_>, then: Option<PgMeta>) {
        self.phase = Phase::Loading;
        self.index = Index::default();
        self.intakes.clear();
        // What was asked of the copy is read after it is gone, maybe: nothing, which would be taken for zeros.
        self.round += 1;
        let ops = std::iter::once(TxnOp::RemovePg).chain(then.map(TxnOp::SetMeta)).collect();
        self.submit(cx, What::Removed, ops);
    }

    /// The map does not mention the group. Only the tombstone of its pool lets it be deleted (invariant 7).
    fn leave_map(&mut self, cx: &mut Cx<'_>, current: bool) {
        self.abandon(cx);
        let remove = self.stored && current && cx.map.removed_pools.contains(&self.id.pool);
        self.round += 1;
        if remove {
            tracing::info!(pg = %self.id, osd = %cx.id, "pool removed, group deleted");
            self.submit(cx, What::Housekeeping, vec![TxnOp::RemovePg]);
        }
        let kept = Pg {
            round: self.round,
            stored: self.stored && !remove,
            counters: std::mem::take(&mut self.counters),
            ..Pg::empty(self.id)
        };
        let meta = if remove { PgMeta::default() } else { self.meta };
        *self = Pg { meta, ..kept };
    }

    /// Ends the interval: whoever waits is told to come again.
    fn abandon(&mut self, cx: &mut Cx<'_>) {
        let mut tokens: Vec<ClientToken> = self.waiting.drain(..).map(|w| w.token).collect();
        if let Phase::Active(active) = &mut self.phase {
            tokens.extend(active.take_tokens());
        }
        let retry = OpReply::Retry { epoch: cx.map.epoch, why: RetryWhy::StaleMap };
        for token in tokens {
            cx.out.push(Effect::Reply { token, reply: retry.clone(), data: Bytes::new() });
        }
    }

    pub fn listed(&mut self, cx: &mut Cx<'_>, what: What, result: Result<Listing, StoreError>) {
        let (What::Loaded, Phase::Loading) = (what, &self.phase) else { return };
        let listing = match result {
            Ok(l) => l,
            Err(e) => return self.fail(cx, format!("the store cannot list the group: {e}")),
        };
        // Not what was submitted: a refused deletion leaves objects of the shard that they were, not of the next one.
        self.stored = listing.meta.is_some() || !listing.objects.is_empty() || !listing.missing.is_empty();
        self.meta = listing.meta.unwrap_or_default();
        if !self.is_divided(cx) {
            return;
        }
        self.index.objects = listing
            .objects
            .into_iter()
            .map(|(o, s)| match s.pending {
                Some(version) => (o, Held { version, deleted: false, base: Some(s.version) }),
                None => (o, Held::committed(s.version, s.deleted)),
            })
            .filter(|(_, h)| h.version != Version::ZERO)
            .collect();
        self.index.missing = listing.missing.into_iter().collect();
        if !self.take_place(cx) {
            return;
        }
        if self.record.primary == Some(cx.id) {
            self.start_peering(cx);
        } else {
            self.phase = Phase::Member(member::Member::default());
            if std::mem::take(&mut self.asked) {
                self.query(cx);
            }
            self.drop_stray(cx);
        }
    }

    /// Invariant 8: only the monitors' durable word that the group is clean without this OSD lets it
    /// delete its copy.
    fn drop_stray(&mut self, cx: &mut Cx<'_>) {
        let needed = self.record.acting.contains(&cx.id) || self.record.up.contains(&cx.id);
        let loaded = matches!(self.phase, Phase::Member(_));
        // An empty position may be this OSD's again: its shard is better than none.
        let needed = needed || (self.code.is_some() && self.record.acting.contains(&OsdId::NONE));
        let clean = (self.record.clean && self.record.activated) || !cx.rules.keep(Rule::StraysStay);
        if self.stored && loaded && !needed && clean {
            tracing::info!(pg = %self.id, interval = %self.record.interval, "clean elsewhere, copy is deleted");
            cx.takes(Branch::DropStray);
            self.remove_copy(cx, None);
        }
    }

    pub fn committed(&mut self, cx: &mut Cx<'_>, what: What, result: Result<(), StoreError>) {
        match what {
            What::Promised if result.is_ok() => self.promise_durable(cx),
            What::Activated if result.is_ok() => self.activation_durable(cx),
            What::Removed if result.is_ok() => self.load(cx),
            What::Write { tid } => self.own_write_done(cx, tid, result),
            What::SubWrite { tid, object, version } => self.sub_write_done(cx, tid, object, version, result),
            What::PushApplied { tid, object, version, deleted, beside } => {
                self.push_applied(cx, tid, object, (version, deleted, beside), result);
            }
            What::Recovered { object, beside } => self.own_recovered(cx, object, beside, result),
            What::Housekeeping if result.is_ok() => {}
            _ => {
                if let Err(e) = result {
                    self.fail(cx, format!("the store refused: {e}"));
                }
            }
        }
    }

    /// The own store does not do what the group needs: nothing is served in this interval any more. A primary
    /// asks the monitors for another one (see `status`); any other member is reported by its primary.
    fn fail(&mut self, cx: &mut Cx<'_>, why: String) {
        tracing::error!(pg = %self.id, osd = %cx.id, why, "group stopped");
        cx.takes(Branch::Broken);
        self.abandon(cx);
        self.intakes.clear();
        self.phase = Phase::Broken(why);
        self.since = cx.now;
    }

    pub fn monitor_answered(&mut self, cx: &mut Cx<'_>, what: What, result: Result<(), MonitorRefused>) {
        match (what, result) {
            (What::ReportActivated, Ok(())) => self.go_active(cx),
            (What::ReportClean, Ok(())) => {
                if let Phase::Active(a) = &mut self.phase {
                    a.clean_confirmed = true;
                }
            }
            (What::ReportScrubbed, _) => self.scrub_reported(),
            // The interval is over; the map will say so.
            (_, Err(MonitorRefused)) => cx.takes(Branch::ReportRefused),
            _ => {}
        }
    }

    fn report(&mut self, cx: &mut Cx<'_>, what: What, request: MonitorRequest) {
        let token = self.token(cx, what);
        cx.out.push(Effect::Monitor { token, request });
    }

    pub fn tick(&mut self, cx: &mut Cx<'_>) {
        self.purge_removed(cx);
        self.expire_waiting(cx);
        match self.phase {
            Phase::Peering(_) => self.peer_on(cx),
            Phase::Activating(_) => self.activate_on(cx),
            Phase::Member(_) => {
                self.tell_full(cx);
                self.pull_on(cx);
                self.look_on(cx);
            }
            Phase::Active(_) => {
                self.resend_writes(cx);
                self.gather_again(cx);
                self.pull_on(cx);
                self.hedge(cx);
                self.mend_again(cx);
                self.commit_lazily(cx);
                self.recover(cx);
                self.resume(cx);
                self.look_on(cx);
                self.scrub_on(cx);
            }
            _ => {}
        }
    }

    /// A message of the current interval from a current process.
    pub fn peer(&mut self, cx: &mut Cx<'_>, msg: PeerMsg, data: Bytes) {
        let (from, is_primary) = (msg.from, self.record.primary == Some(msg.from));
        match msg.body {
            PeerBody::Query if is_primary => self.query(cx),
            PeerBody::ListRequest { after, parts } if is_primary => self.list_request(cx, from, after, parts),
            PeerBody::Activate { page, missing, last } if is_primary => {
                self.activate_page(cx, from, page, missing, last)
            }
            PeerBody::SubWrite { tid, object, version, prev, write } if is_primary => {
                self.sub_write(cx, from, member::Early { tid, object, version, prev, write, data });
            }
            PeerBody::Push { tid, object, version, deleted, over, piece } if is_primary => {
                self.push(cx, from, tid, (object, version, over), deleted, piece.map(|p| (p, data)));
            }
            PeerBody::ScrubRead { tid, range, deep } if is_primary => self.scrub_asked(cx, tid, range, deep),
            // With a newer map it may have purged what is still whole here. It is asked again.
            PeerBody::ScrubInfo { tid, entries, last } if msg.epoch <= cx.map.epoch => {
                self.copies_came(cx, from, tid, entries, last);
                self.scrub_on(cx);
            }
            PeerBody::Pull { tid, object, version, first_block, have } => match is_primary {
                true => self.serve_pull(cx, from, tid, (object, version), (first_block, have)),
                false => self.piece_wanted(cx, from, tid, (object, version), (first_block, have)),
            },
            PeerBody::ShardRead { tid, object, version, first_row, row_count } if is_primary => {
                self.serve_rows(cx, from, tid, object, version, (first_row, row_count));
            }
            PeerBody::ShardData { tid, result } => self.rows_came(cx, from, tid, result, data),
            PeerBody::BlockRead { tid, object, below, first_block, block_count } if is_primary => {
                self.serve_blocks(cx, from, tid, (object, below), (first_block, block_count));
            }
            PeerBody::BlockData { tid, result } => self.blocks_came(cx, from, tid, result, data),
            PeerBody::Commit { objects } if is_primary => self.commit_told(cx, from, objects),
            PeerBody::CommitAck { objects } => self.commit_acked(from, &objects),
            PeerBody::Info { activated, shard, parts, .. } => self.info(cx, from, activated, shard, &parts),
            PeerBody::List { after, entries, last } => self.list_page(cx, from, after, entries, last),
            PeerBody::ActivateAck { page } => self.activate_ack(cx, from, page),
            PeerBody::SubWriteAck { tid, result } => self.sub_write_ack(cx, from, tid, result),
            PeerBody::PullReply { tid, object, version, first_block, piece } => {
                let what = (tid, object, version, first_block);
                if !self.mending_piece_came(cx, from, what, &piece, &data) {
                    self.piece_came(cx, from, what, piece, data);
                }
            }
            PeerBody::Full => self.member_full(cx, from),
            PeerBody::PushAck { tid, result } => self.push_ack(cx, from, tid, result),
            // The other side has a newer map; ours will come. Or a command from somebody who is not primary.
            _ => {}
        }
    }

    /// Deletes objects of removed volumes and layers, some at a time (invariant 7: the ids in the map are the tombstone).
    fn purge_removed(&mut self, cx: &mut Cx<'_>) {
        const AT_ONCE: usize = 64;
        let known = cx.map.tombstones();
        if self.purged == known || matches!(self.phase, Phase::Loading | Phase::Broken(_)) {
            return;
        }
        let gone = removed_objects(cx.map, &self.index.objects)
            .chain(removed_objects(cx.map, &self.index.missing))
            .take(AT_ONCE)
            .collect::<BTreeSet<ObjectId>>();
        if gone.is_empty() {
            self.purged = known;
            return;
        }
        cx.takes(Branch::Purge);
        let ops = gone
            .iter()
            .flat_map(|o| [TxnOp::Purge { object: *o }, TxnOp::DropMissing { object: *o }])
            .collect();
        for o in &gone {
            self.index.objects.remove(o);
            self.index.missing.remove(o);
        }
        self.submit(cx, What::Housekeeping, ops);
    }

    /// Something of the object enters the index. Who sent it may not know yet that it was removed: then it is purged again.
    fn comes(&mut self, cx: &Cx<'_>, object: &ObjectId) {
        if is_removed(cx.map, object) {
            self.purged = (0, 0);
        }
    }

    fn pool_min_size(&self, cx: &Cx<'_>) -> Option<usize> {
        Some(cx.map.pools.get(&self.id.pool)?.min_size as usize)
    }
}

/// Objects of removed volumes and layers: a volume is looked for once, not once an object.
fn removed_objects<'a, T>(
    map: &'a ClusterMap,
    objects: &'a BTreeMap<ObjectId, T>,
) -> impl Iterator<Item = ObjectId> + 'a {
    let first = |volume| ObjectId { volume, index: 0, layer: LayerId(0) };
    let mut from = objects.keys().next().map(|o| o.volume);
    let volumes = std::iter::from_fn(move || {
        let volume = objects.range(first(from?)..).next().map(|(o, _)| o.volume)?;
        from = volume.0.checked_add(1).map(VolumeId);
        Some(volume)
    });
    let layers = |v| map.removed_layers.range((v, LayerId(0))..=(v, LayerId(u32::MAX))).next().is_some();
    volumes
        .filter(move |v| map.removed_volumes.contains(v) || layers(*v))
        .flat_map(move |v| objects.range(first(v)..).map(|(o, _)| *o).take_while(move |o| o.volume == v))
        .filter(|o| is_removed(map, o))
}

/// Whether an object belongs to a volume or a layer that was removed: peering and recovery ignore it.
fn is_removed(map: &ClusterMap, object: &ObjectId) -> bool {
    map.is_removed(object)
}
