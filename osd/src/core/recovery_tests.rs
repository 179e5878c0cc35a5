//! Bad blocks and what is left of removed volumes, at an active primary.

use super::*;
use crate::store::{Piece, TxnOp};
use gabion_proto::map::*;
use gabion_proto::msg::{ObjectEntry, OpKind, PeerBody, SubResult};

const PG: PgId = PgId { pool: PoolId(1), index: 0 };
const VOLUME: VolumeId = VolumeId(1);
const OBJECT: ObjectId = ObjectId { volume: VOLUME, index: 0, layer: LayerId(0) };
const REMOVED: ObjectId = ObjectId { volume: VolumeId(2), index: 0, layer: LayerId(0) };

fn version() -> Version {
    Version::new(Epoch(5), 1).unwrap()
}

/// Group of osd.1 (primary) and osd.2; osd.3 is a member of the past.
fn map() -> Arc<ClusterMap> {
    let osd = |n: u32| OsdInfo {
        host: format!("host{n}"),
        rack: String::new(),
        addr: format!("10.0.0.{n}:7000"),
        weight: 65_536,
        up: true,
        in_cluster: true,
        incarnation: Incarnation(u64::from(n)),
        disk: ClusterId([n as u8; 16]),
        capacity_bytes: 1 << 40,
    };
    let pool = Pool {
        name: "p".into(),
        redundancy: Redundancy::Replicated { size: 2 },
        min_size: 2,
        failure_domain: FailureDomain::Host,
        pg_count: 1,
        object_bytes: 1 << 20,
    };
    let past = PastInterval { interval: Epoch(5), acting: vec![OsdId(1), OsdId(3)], primary: Some(OsdId(1)) };
    let record = PgRecord {
        up: vec![OsdId(1), OsdId(2)],
        acting: vec![OsdId(1), OsdId(2)],
        primary: Some(OsdId(1)),
        interval: Epoch(10),
        activated: false,
        clean: false,
        past: vec![past],
    };
    Arc::new(ClusterMap {
        epoch: Epoch(10),
        osds: (1..=3).map(|n| (OsdId(n), osd(n))).collect(),
        pools: [(PoolId(1), pool)].into(),
        pgs: [(PG, record.into())].into(),
        attachments: [(
            VOLUME,
            Attachment {
                generation: Generation(1),
                client: ClientId(1),
                session: Session(1),
                root: VOLUME,
                top: OBJECT.layer,
                size_bytes: 1 << 30,
                snapshot: None,
            },
        )]
        .into(),
        removed_volumes: [REMOVED.volume].into(),
        ..Default::default()
    })
}

struct Driver {
    core: OsdCore,
    now: Millis,
}

fn store_token(effects: &[Effect]) -> (Token, Vec<TxnOp>) {
    let found = effects.iter().find_map(|e| match e {
        Effect::Store { token, txn } => Some((*token, txn.ops.clone())),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("no transaction in {effects:?}"))
}

fn sent(effects: &[Effect]) -> Vec<(OsdId, PeerBody)> {
    let bodies = effects.iter().filter_map(|e| match e {
        Effect::Send { msg, .. } => Some((msg.to, msg.body.clone())),
        _ => None,
    });
    bodies.collect()
}

impl Driver {
    fn step(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        self.core.step(self.now, event, &mut out);
        out
    }

    fn commit(&mut self, effects: &[Effect]) -> Vec<Effect> {
        let (token, _) = store_token(effects);
        self.step(Event::Committed { token, result: Ok(()) })
    }

    fn hear(&mut self, from: u32, body: PeerBody) -> Vec<Effect> {
        let msg = PeerMsg {
            from: OsdId(from),
            from_incarnation: Incarnation(u64::from(from)),
            to: OsdId(1),
            to_incarnation: Incarnation(1),
            epoch: Epoch(10),
            pg: PG,
            interval: Epoch(10),
            body,
        };
        self.step(Event::Peer { msg, data: Bytes::new() })
    }

    /// Active: osd.1 holds both objects, osd.2 nothing; osd.3 has not answered yet.
    fn active() -> Driver {
        let meta = PgMeta { promised: Epoch(5), activated: Epoch(5), shard: None, pg_count: 0 };
        let core = {
            let boot = Boot {
                cluster: ClusterId::default(),
                id: OsdId(1),
                incarnation: Incarnation(1),
                epoch: Epoch(1),
            };
            OsdCore::new(boot, vec![(PG, meta)], 0)
        };
        let mut d = Driver { core, now: 10_000 };
        d.step(Event::Lease { until: 1_000_000, epoch: Epoch(10) });
        let effects = d.step(Event::Map(map()));
        let token = effects.iter().find_map(|e| match e {
            Effect::List { token, .. } => Some(*token),
            _ => None,
        });
        let state = ObjectState { version: version(), deleted: false, pending: None };
        let objects = vec![(OBJECT, state), (REMOVED, state)];
        let result = Ok(Listing { meta: Some(meta), objects, missing: Vec::new() });
        let effects = d.step(Event::Listed { token: token.expect("lists"), result });
        d.commit(&effects);
        d.hear(
            2,
            PeerBody::Info {
                activated: Epoch(0),
                object_count: 0,
                missing_count: 0,
                shard: None,
                parts: Vec::new(),
            },
        );
        let effects = d.hear(2, PeerBody::List { after: None, entries: Vec::new(), last: true });
        d.commit(&effects);
        let effects = d.hear(2, PeerBody::ActivateAck { page: 0 });
        let report = effects.iter().find_map(|e| match e {
            Effect::Monitor { token, request: MonitorRequest::Activated { .. } } => Some(*token),
            _ => None,
        });
        let effects = d.step(Event::Monitor { token: report.expect("reports"), result: Ok(()) });
        d.own_read(&effects);
        d
    }

    /// The own copy is read for osd.2, and is bad.
    fn own_read(&mut self, effects: &[Effect]) -> Vec<Effect> {
        let token = effects.iter().find_map(|e| match e {
            Effect::ReadPiece { token, object: OBJECT, .. } => Some(*token),
            _ => None,
        });
        let why = "checksum mismatch".into();
        let result = Err(StoreError::Unreadable { object: OBJECT, block: 0, why, rest: None });
        self.step(Event::PieceRead { token: token.expect("reads its copy"), result })
    }
}

/// A block of the last acting copy is bad, but a member of the past has a good one: it is asked, and the copy replaced.
#[test]
fn a_bad_copy_is_repaired_from_a_stray() {
    let mut d = Driver::active();
    d.now += 2_100;
    let effects = d.step(Event::Tick);
    assert!(sent(&effects).contains(&(OsdId(3), PeerBody::Query)), "asks osd.3: {effects:?}");
    d.hear(
        3,
        PeerBody::Info {
            activated: Epoch(5),
            object_count: 1,
            missing_count: 0,
            shard: None,
            parts: Vec::new(),
        },
    );
    let entry = ObjectEntry::here(OBJECT, version(), false);
    let effects = d.hear(3, PeerBody::List { after: None, entries: vec![entry], last: true });
    let needed = Needed::certain(version(), false);
    assert_eq!(store_token(&effects).1, vec![TxnOp::AddMissing { object: OBJECT, needed }]);
    let pulls = |(to, body): &(OsdId, PeerBody)| {
        *to == OsdId(3) && matches!(body, PeerBody::Pull { object: OBJECT, .. })
    };
    assert!(sent(&effects).iter().any(pulls), "pulls from osd.3: {effects:?}");
}

/// Without another holder the own copy stays, and is not read again and again.
#[test]
fn a_bad_copy_that_is_the_only_one_stays() {
    let mut d = Driver::active();
    for _ in 0..10 {
        d.now += 100;
        let effects = d.step(Event::Tick);
        let busy = |e: &Effect| matches!(e, Effect::ReadPiece { .. });
        let loses = |e: &Effect| matches!(e, Effect::Store { txn, .. } if txn.ops.iter().any(|o| matches!(o, TxnOp::AddMissing { .. })));
        assert!(!effects.iter().any(|e| busy(e) || loses(e)), "{effects:?}");
    }
    assert_eq!(d.core.pg_statuses()[0].unfound_objects, 1);
}

/// What is left of a removed volume goes away on the primary, too.
#[test]
fn a_primary_purges_removed_volumes() {
    let mut d = Driver::active();
    let effects = d.step(Event::Tick);
    let (_, ops) = store_token(&effects);
    assert!(ops.contains(&TxnOp::Purge { object: REMOVED }), "{ops:?}");
}

/// While a write is in flight its version is nowhere else yet: a bad block read meanwhile must not
/// make the object missed at that version.
#[test]
fn a_bad_block_waits_for_writes_in_flight() {
    let mut d = Driver::active();
    let op = |kind| ClientOp {
        epoch: Epoch(10),
        pg: PG,
        client: ClientId(1),
        session: Session(1),
        generation: Generation(1),
        volume: VOLUME,
        object: ObjectId { index: 1, ..OBJECT },
        kind,
    };
    let zero = OpKind::Zero { first_block: 8, block_count: 1, discard: false };
    d.step(Event::Client { token: ClientToken(1), op: op(zero), data: Bytes::new() });
    let read = OpKind::Read { first_block: 0, block_count: 1, below: Vec::new() };
    let effects = d.step(Event::Client { token: ClientToken(2), op: op(read), data: Bytes::new() });
    let token = effects.iter().find_map(|e| match e {
        Effect::Read { token, .. } => Some(*token),
        _ => None,
    });
    let object = ObjectId { index: 1, ..OBJECT };
    let result =
        Err(StoreError::Unreadable { object, block: 0, why: "checksum mismatch".into(), rest: None });
    let effects = d.step(Event::ReadDone { token: token.expect("reads"), result });
    assert!(!effects.iter().any(|e| matches!(e, Effect::Store { .. })), "{effects:?}");
    assert!(
        effects.iter().any(|e| matches!(e, Effect::Reply { reply: OpReply::Retry { .. }, .. })),
        "{effects:?}"
    );
}

/// A member without room is not sent the same object again at once.
#[test]
fn a_push_that_was_refused_waits() {
    let mut d = Driver::active();
    d.now += 11_000;
    let effects = d.step(Event::Tick);
    let token = effects.iter().find_map(|e| match e {
        Effect::ReadPiece { token, object: OBJECT, .. } => Some(*token),
        _ => None,
    });
    let state = ObjectState { version: version(), deleted: false, pending: None };
    let result = Ok(Piece { state, content: Content::zero(0, 1), end: 1 });
    let effects = d.step(Event::PieceRead { token: token.expect("reads again later"), result });
    let tid = sent(&effects).into_iter().find_map(|(_, body)| match body {
        PeerBody::Push { tid, .. } => Some(tid),
        _ => None,
    });
    let effects = d.hear(2, PeerBody::PushAck { tid: tid.expect("pushes"), result: SubResult::NoSpace });
    assert!(!effects.iter().any(|e| matches!(e, Effect::ReadPiece { .. })), "{effects:?}");
}
