//! One OSD's core in situations that a review found, driven effect by effect.
//!
//! [`Rig`] is osd.1 and its store. It answers store transactions, lists and monitor reports at once unless told to
//! hold them; reads, messages and answers to clients are collected.

mod credits;
mod delta;
mod denied;
mod dirty;
mod division;
mod fills;
mod frozen;
mod full;
mod goes_on;
mod hedge;
mod intake;
mod listed;
mod maps;
mod mend;
mod noted;
mod parity;
mod pieces;
mod places;
mod removed;
mod rescued;
mod scrub;
mod stalls;
mod stops;
mod strays;
mod stuck;
mod uncertain;
mod waits;

use super::*;
use crate::erasure::{Block, Geometry, ReedSolomon, Rows};
use crate::store::{Piece, Placed, TxnOp};
use gabion_proto::map::*;
use gabion_proto::msg::{ObjectEntry, OpKind, PeerBody, PieceImage, RetryWhy, SubResult, SubWriteKind};
use gabion_proto::shared::Shared;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub const PG: PgId = PgId { pool: PoolId(1), index: 0 };
pub const CLUSTER: ClusterId = ClusterId([9; 16]);
pub const VOLUME: VolumeId = VolumeId(1);
pub const CLIENT: ClientId = ClientId(5);

pub fn object(index: u32) -> ObjectId {
    ObjectId { volume: VOLUME, index, layer: LayerId(0) }
}

pub fn version(interval: u64, counter: u32) -> Version {
    Version::new(Epoch(interval), counter).unwrap()
}

/// What a member says that it holds.
pub fn has(index: u32, version: Version) -> ObjectEntry {
    ObjectEntry::here(object(index), version, false)
}

pub fn osd(n: u32) -> OsdInfo {
    OsdInfo {
        host: format!("host{n}"),
        rack: String::new(),
        addr: format!("10.0.0.{n}:7000"),
        weight: 65_536,
        up: true,
        in_cluster: true,
        incarnation: Incarnation(u64::from(n)),
        disk: ClusterId([n as u8; 16]),
        capacity_bytes: 1 << 40,
    }
}

pub fn past(interval: u64, acting: &[u32]) -> PastInterval {
    let acting: Vec<OsdId> = acting.iter().map(|o| OsdId(*o)).collect();
    PastInterval { interval: Epoch(interval), primary: acting.first().copied(), acting }
}

pub struct Rig {
    pub core: OsdCore,
    pub now: Millis,
    pub map: ClusterMap,
    /// What the store lists.
    pub listing: Listing,
    /// Transactions, oldest first.
    pub commits: Vec<Vec<TxnOp>>,
    /// While set, clients' writes wait in the store: their tokens.
    pub hold_writes: bool,
    /// While set, what recovery stores waits there.
    pub hold_pushes: bool,
    /// The store does not remove groups.
    pub refuse_removals: bool,
    pub held: VecDeque<Token>,
    /// Messages sent and not yet taken.
    pub sent: Vec<(OsdId, PeerBody)>,
    pub replies: Vec<(ClientToken, OpReply)>,
    /// Reads and whole-object reads that wait for their answer.
    pub reads: VecDeque<(Token, ObjectId)>,
    /// Erasure coding: the last of them is of what is pending.
    pub newest_read: bool,
    /// Blocks of every one of them: the first, and how many.
    pub ranges: VecDeque<(u32, u32)>,
    pub object_reads: VecDeque<(Token, ObjectId)>,
    /// Content that was placed.
    pub placed: Vec<Content>,
    /// Which of them are of pieces.
    pieces: BTreeSet<Token>,
    pub digests: VecDeque<(Token, ObjectId)>,
    pub reports: Vec<MonitorRequest>,
    next_client: u64,
    /// Whom messages and operations are about.
    pub pg: PgId,
}

impl Rig {
    /// A store with the group last activated in interval 5.
    pub fn new(objects: &[(u32, Version)]) -> Rig {
        Rig::booted(objects, Epoch(1))
    }

    pub fn booted(objects: &[(u32, Version)], epoch: Epoch) -> Rig {
        let meta = PgMeta { promised: Epoch(5), activated: Epoch(5), shard: None, pg_count: 0 };
        let boot = Boot { cluster: CLUSTER, id: OsdId(1), incarnation: Incarnation(1), epoch };
        let pool = Pool {
            name: "p".into(),
            redundancy: Redundancy::Replicated { size: 3 },
            min_size: 2,
            failure_domain: FailureDomain::Host,
            pg_count: 1,
            object_bytes: 1 << 20,
        };
        let attachment = Attachment {
            generation: Generation(1),
            client: CLIENT,
            session: Session(1),
            root: VOLUME,
            top: object(0).layer,
            size_bytes: 1 << 30,
            snapshot: None,
        };
        let state = |v: &Version| ObjectState { version: *v, deleted: false, pending: None };
        Rig {
            // Two groups are there; most maps name only the first.
            core: OsdCore::new(boot, (0..2).map(|index| (PgId { index, ..PG }, meta)).collect(), 0),
            now: 0,
            map: ClusterMap {
                cluster: CLUSTER,
                osds: (1..=4).map(|n| (OsdId(n), osd(n))).collect(),
                pools: [(PoolId(1), pool)].into(),
                attachments: [(VOLUME, attachment)].into(),
                ..Default::default()
            },
            listing: Listing {
                meta: Some(meta),
                objects: objects.iter().map(|(o, v)| (object(*o), state(v))).collect(),
                missing: Vec::new(),
            },
            commits: Vec::new(),
            hold_writes: false,
            hold_pushes: false,
            refuse_removals: false,
            held: VecDeque::new(),
            sent: Vec::new(),
            replies: Vec::new(),
            reads: VecDeque::new(),
            newest_read: false,
            ranges: VecDeque::new(),
            object_reads: VecDeque::new(),
            placed: Vec::new(),
            pieces: BTreeSet::new(),
            digests: VecDeque::new(),
            reports: Vec::new(),
            next_client: 0,
            pg: PG,
        }
    }

    /// One event and everything that the store and the monitors answer to it.
    pub fn step(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut out = Vec::new();
            self.core.step(self.now, event, &mut out);
            events.extend(out.into_iter().filter_map(|e| self.execute(e)));
        }
    }

    fn execute(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Store { token, txn } => {
                let write = txn.ops.iter().any(|op| matches!(op, TxnOp::Write { .. } | TxnOp::Zero { .. }));
                if self.refuse_removals && txn.ops.contains(&TxnOp::RemovePg) {
                    return Some(Event::Committed { token, result: Err(StoreError::NoSpace) });
                }
                for op in &txn.ops {
                    match op {
                        TxnOp::SetMeta(meta) => self.listing.meta = Some(*meta),
                        TxnOp::RemovePg => self.listing = Listing::default(),
                        _ => {}
                    }
                }
                self.commits.push(txn.ops);
                let push = self.commits.last().is_some_and(|t| {
                    t.iter().any(|op| matches!(op, TxnOp::Replace { .. } | TxnOp::Assemble { .. }))
                });
                if (write && self.hold_writes) || (push && self.hold_pushes) {
                    self.held.push_back(token);
                    return None;
                }
                return Some(Event::Committed { token, result: Ok(()) });
            }
            Effect::List { token, .. } => {
                return Some(Event::Listed { token, result: Ok(self.listing.clone()) });
            }
            Effect::Monitor { token, request } => {
                self.reports.push(request);
                return Some(Event::Monitor { token, result: Ok(()) });
            }
            Effect::Send { msg, .. } => self.sent.push((msg.to, msg.body)),
            Effect::Reply { token, reply, .. } => self.replies.push((token, reply)),
            Effect::Read { token, object, first_block, block_count, .. } => {
                self.reads.push_back((token, object));
                self.ranges.push_back((first_block, block_count));
                self.newest_read = false;
            }
            Effect::ReadPending { token, object, first_block, block_count, .. } => {
                self.reads.push_back((token, object));
                self.ranges.push_back((first_block, block_count));
                self.newest_read = true;
            }
            Effect::ReadObject { token, object, .. } => self.object_reads.push_back((token, object)),
            Effect::ReadPiece { token, object, .. } => {
                self.pieces.insert(token);
                self.object_reads.push_back((token, object));
            }
            Effect::Place { token, content, .. } => {
                self.placed.push(content);
                return Some(Event::PiecePlaced { token, result: Ok(Placed::nowhere()) });
            }
            Effect::Digest { token, object, .. } => self.digests.push_back((token, object)),
            Effect::WantMap { .. } => {}
        }
        None
    }

    /// A map in which a new interval of the group begins.
    pub fn interval(&mut self, epoch: u64, acting: &[u32], past: Vec<PastInterval>) {
        self.led(acting.first().copied().unwrap_or_default(), epoch, acting, past);
    }

    /// One that is led by this OSD.
    pub fn led(&mut self, primary: u32, epoch: u64, acting: &[u32], past: Vec<PastInterval>) {
        let acting: Vec<OsdId> = acting.iter().map(|o| OsdId(*o)).collect();
        let record = Shared::from(PgRecord {
            up: acting.clone(),
            primary: Some(OsdId(primary)),
            acting,
            interval: Epoch(epoch),
            activated: false,
            clean: false,
            past,
        });
        self.map.epoch = Epoch(epoch);
        let groups = 0..self.map.pools[&PG.pool].pg_count;
        self.map.pgs = groups.map(|index| (PgId { index, ..PG }, record.clone())).collect();
        self.publish();
    }

    pub fn publish(&mut self) {
        self.step(Event::Map(Arc::new(self.map.clone())));
        let until = self.now + 1_000_000;
        self.step(Event::Lease { until, epoch: self.map.epoch });
    }

    pub fn hear(&mut self, from: u32, body: PeerBody) {
        self.hear_data(from, body, Bytes::new());
    }

    pub fn hear_data(&mut self, from: u32, body: PeerBody, data: Bytes) {
        self.hear_of(self.map.epoch, from, body, data);
    }

    /// From somebody who has the map of `epoch`.
    pub fn hear_of(&mut self, epoch: Epoch, from: u32, body: PeerBody, data: Bytes) {
        let msg = PeerMsg {
            from: OsdId(from),
            from_incarnation: Incarnation(u64::from(from)),
            to: OsdId(1),
            to_incarnation: Incarnation(1),
            epoch,
            pg: self.pg,
            interval: self.map.pgs[&self.pg].interval,
            body,
        };
        self.step(Event::Peer { msg, data });
    }

    /// A member's answers to peering.
    pub fn tells(&mut self, from: u32, activated: u64, entries: &[ObjectEntry]) {
        self.hear(
            from,
            PeerBody::Info {
                activated: Epoch(activated),
                object_count: 0,
                missing_count: 0,
                shard: None,
                parts: Vec::new(),
            },
        );
        self.hear(from, PeerBody::List { after: None, entries: entries.to_vec(), last: true });
    }

    pub fn activates(&mut self, from: u32) {
        self.hear(from, PeerBody::ActivateAck { page: 0 });
    }

    /// osd.1 as primary of `acting`, whose other members hold what it holds.
    pub fn active(objects: &[(u32, Version)], acting: &[u32]) -> Rig {
        let mut rig = Rig::new(objects);
        rig.interval(10, acting, vec![past(5, acting)]);
        let entries: Vec<ObjectEntry> = objects.iter().map(|(o, v)| has(*o, *v)).collect();
        for other in &acting[1..] {
            rig.tells(*other, 5, &entries);
        }
        for other in &acting[1..] {
            rig.activates(*other);
        }
        assert_eq!(
            rig.reports.first(),
            Some(&MonitorRequest::Activated { pg: PG, interval: Epoch(10) }),
            "active"
        );
        rig
    }

    /// osd.1 as primary of a 2+2 group in which everybody has a shard of object 0, of two blocks filled with these bytes; all shards.
    pub fn two_and_two(fills: [u8; 2]) -> (Rig, BTreeMap<u8, Rows>) {
        let mut rig = Rig::new(&[(0, version(5, 1))]);
        if let Some(pool) = rig.map.pools.get_mut(&PG.pool) {
            (pool.redundancy, pool.min_size) = (Redundancy::Erasure { k: 2, m: 2 }, 3);
        }
        let acting = [1, 2, 3, 4];
        rig.interval(10, &acting, vec![past(5, &acting)]);
        acting[1..].iter().for_each(|o| rig.tells(*o, 5, &[has(0, version(5, 1))]));
        acting[1..].iter().for_each(|o| rig.activates(*o));
        let rows = fills.map(|fill| vec![Block::of(vec![fill; 4096].into())]);
        let mut shards: BTreeMap<u8, Rows> = (0..).zip(rows).collect();
        let code = ReedSolomon::shared(Geometry { k: 2, m: 2 }).unwrap();
        shards.extend(code.compute(&shards, &[2, 3]).unwrap());
        (rig, shards)
    }

    /// Whom it has asked for rows of shards since it was last looked at, and under which numbers.
    pub fn asked_for_shards(&mut self) -> Vec<(OsdId, u64)> {
        let asked = |(to, b)| match b {
            PeerBody::ShardRead { tid, .. } => Some((to, tid)),
            _ => None,
        };
        self.take_sent().into_iter().filter_map(asked).collect()
    }

    pub fn tick(&mut self, ms: u64) {
        self.now += ms;
        self.step(Event::Tick);
    }

    pub fn client(&mut self, index: u32, kind: OpKind, data: Bytes) -> ClientToken {
        self.client_of(index, object(index).layer, kind, data)
    }

    pub fn client_of(&mut self, index: u32, layer: LayerId, kind: OpKind, data: Bytes) -> ClientToken {
        let token = ClientToken(self.next_client);
        self.next_client += 1;
        let op = ClientOp {
            epoch: self.map.epoch,
            pg: self.pg,
            client: CLIENT,
            session: Session(1),
            generation: Generation(1),
            volume: VOLUME,
            object: ObjectId { layer, ..object(index) },
            kind,
        };
        self.step(Event::Client { token, op, data });
        token
    }

    pub fn read(&mut self, index: u32, first_block: u32) -> ClientToken {
        self.client(index, OpKind::Read { first_block, block_count: 1, below: Vec::new() }, Bytes::new())
    }

    pub fn write(&mut self, index: u32, first_block: u32) -> ClientToken {
        let content = Content::data(first_block, vec![3; 4096].into());
        self.client(index, OpKind::Write { extents: content.extents }, content.data)
    }

    pub fn answer_read(&mut self, result: Result<Content, StoreError>) {
        let (token, _) = self.reads.pop_front().expect("a read waits");
        self.step(Event::ReadDone { token, result });
    }

    pub fn answer_object(&mut self, result: Result<(ObjectState, Content), StoreError>) {
        let (token, _) = self.object_reads.pop_front().expect("a whole-object read waits");
        if self.pieces.remove(&token) {
            let end = |c: &Content| c.extents.last().map_or(0, |e| e.first_block + e.block_count);
            let piece =
                |(state, content): (ObjectState, Content)| Piece { state, end: end(&content), content };
            return self.step(Event::PieceRead { token, result: result.map(piece) });
        }
        self.step(Event::ObjectRead { token, result });
    }

    /// The answer to a client, if there is one.
    pub fn reply(&self, token: ClientToken) -> Option<&OpReply> {
        self.replies.iter().find(|(t, _)| *t == token).map(|(_, r)| r)
    }

    pub fn take_sent(&mut self) -> Vec<(OsdId, PeerBody)> {
        std::mem::take(&mut self.sent)
    }

    pub fn ops(&self) -> impl Iterator<Item = &TxnOp> {
        self.commits.iter().flatten()
    }
}
