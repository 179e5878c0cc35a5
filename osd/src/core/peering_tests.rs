//! What peering must never believe: half a list, and an activation that did not become durable.

use super::*;
use crate::store::TxnOp;
use gabion_proto::map::*;
use gabion_proto::msg::{ObjectEntry, PeerBody};

const PG: PgId = PgId { pool: PoolId(1), index: 0 };
const OBJECT: ObjectId = ObjectId { volume: VolumeId(1), index: 0, layer: LayerId(0) };

fn osd(n: u32, up: bool) -> OsdInfo {
    OsdInfo {
        host: format!("host{n}"),
        rack: String::new(),
        addr: format!("10.0.0.{n}:7000"),
        weight: 65_536,
        up,
        in_cluster: true,
        incarnation: Incarnation(u64::from(n)),
        disk: ClusterId([n as u8; 16]),
        capacity_bytes: 1 << 40,
    }
}

/// Group of osd.1 (primary) and osd.2; osd.3 was a member of the activated interval 5.
fn map(epoch: u64, interval: u64, third_up: bool) -> Arc<ClusterMap> {
    let pool = Pool {
        name: "p".into(),
        redundancy: Redundancy::Replicated { size: 3 },
        min_size: 2,
        failure_domain: FailureDomain::Host,
        pg_count: 1,
        object_bytes: 1 << 20,
    };
    let past = PastInterval {
        interval: Epoch(5),
        acting: vec![OsdId(2), OsdId(1), OsdId(3)],
        primary: Some(OsdId(2)),
    };
    let record = PgRecord {
        up: vec![OsdId(1), OsdId(2)],
        acting: vec![OsdId(1), OsdId(2)],
        primary: Some(OsdId(1)),
        interval: Epoch(interval),
        activated: false,
        clean: false,
        past: vec![past],
    };
    Arc::new(ClusterMap {
        epoch: Epoch(epoch),
        osds: (1..=3).map(|n| (OsdId(n), osd(n, n != 3 || third_up))).collect(),
        pools: [(PoolId(1), pool)].into(),
        pgs: [(PG, record.into())].into(),
        ..Default::default()
    })
}

fn version() -> Version {
    Version::new(Epoch(5), 1).unwrap()
}

const META: PgMeta = PgMeta { promised: Epoch(5), activated: Epoch(5), shard: None, pg_count: 0 };

struct Driver {
    core: OsdCore,
    epoch: u64,
    interval: u64,
}

impl Driver {
    fn new() -> Driver {
        let meta = META;
        let (cluster, epoch) = (ClusterId::default(), Epoch(0));
        let boot = Boot { cluster, id: OsdId(1), incarnation: Incarnation(1), epoch };
        Driver { core: OsdCore::new(boot, vec![(PG, meta)], 0), epoch: 0, interval: 0 }
    }

    fn step(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        self.core.step(0, event, &mut out);
        out
    }

    /// A new map, up to the durable promise of its interval.
    fn map(&mut self, epoch: u64, interval: u64, third_up: bool) -> Vec<Effect> {
        (self.epoch, self.interval) = (epoch, interval);
        self.step(Event::Map(map(epoch, interval, third_up)))
    }

    fn load(&mut self, effects: &[Effect]) -> Vec<Effect> {
        let token = effects.iter().find_map(|e| match e {
            Effect::List { token, .. } => Some(*token),
            _ => None,
        });
        let state = ObjectState { version: version(), deleted: false, pending: None };
        let listing = Listing { meta: Some(META), objects: vec![(OBJECT, state)], missing: Vec::new() };
        self.step(Event::Listed { token: token.expect("lists its store"), result: Ok(listing) })
    }

    fn commit(&mut self, effects: &[Effect], result: Result<(), StoreError>) -> Vec<Effect> {
        let (token, _) = txn(effects);
        self.step(Event::Committed { token, result })
    }

    fn hear(&mut self, from: u32, body: PeerBody) -> Vec<Effect> {
        let msg = PeerMsg {
            from: OsdId(from),
            from_incarnation: Incarnation(u64::from(from)),
            to: OsdId(1),
            to_incarnation: Incarnation(1),
            epoch: Epoch(self.epoch),
            pg: PG,
            interval: Epoch(self.interval),
            body,
        };
        self.step(Event::Peer { msg, data: Bytes::new() })
    }

    fn info(&mut self, from: u32, activated: u64) {
        self.hear(
            from,
            PeerBody::Info {
                activated: Epoch(activated),
                object_count: 1,
                missing_count: 0,
                shard: None,
                parts: Vec::new(),
            },
        );
    }

    fn list(&mut self, from: u32) -> Vec<Effect> {
        let entry = ObjectEntry::here(OBJECT, version(), false);
        self.hear(from, PeerBody::List { after: None, entries: vec![entry], last: true })
    }
}

fn txn(effects: &[Effect]) -> (Token, Vec<TxnOp>) {
    effects
        .iter()
        .find_map(|e| match e {
            Effect::Store { token, txn } => Some((*token, txn.ops.clone())),
            _ => None,
        })
        .expect("a store transaction")
}

/// A member of a past interval says that it was activated later than anybody, and is gone before it has
/// listed anything. Its silence is not the news that the group is empty.
#[test]
fn half_a_list_is_no_authority() {
    let mut d = Driver::new();
    let begun = d.map(10, 10, true);
    let promise = d.load(&begun);
    d.commit(&promise, Ok(()));
    d.info(3, 8);
    d.info(2, 5);
    d.list(2);
    // osd.3 goes down: not acting, so the interval stays.
    let mut effects = d.map(11, 10, false);
    effects.extend(d.step(Event::Tick));
    let pages: Vec<_> = effects
        .iter()
        .filter_map(|e| match e {
            Effect::Send { msg, .. } => match &msg.body {
                PeerBody::Activate { missing, .. } => Some(missing.clone()),
                _ => None,
            },
            _ => None,
        })
        .collect();
    assert!(!pages.is_empty(), "goes on without osd.3");
    assert!(pages.iter().all(Vec::is_empty), "osd.2 is told to give up good objects: {pages:?}");
    let (_, own) = txn(&effects);
    assert!(
        !own.iter().any(|op| matches!(op, TxnOp::AddMissing { .. })),
        "gives up its own objects: {own:?}"
    );
}

/// Rules P3 and P4: an activation that the store refused was never made, and a later promise must not claim it.
#[test]
fn a_refused_activation_is_not_claimed_later() {
    let mut d = Driver::new();
    let begun = d.map(10, 10, false);
    let promise = d.load(&begun);
    d.commit(&promise, Ok(()));
    d.info(2, 5);
    let activation = d.list(2);
    assert!(txn(&activation).1.contains(&TxnOp::ClearMissing), "activates");
    d.commit(&activation, Err(StoreError::NoSpace));
    let begun = d.map(12, 12, false);
    let promise = d.load(&begun);
    let promised = PgMeta { promised: Epoch(12), activated: Epoch(5), shard: None, pg_count: 1 };
    assert_eq!(txn(&promise).1, vec![TxnOp::SetMeta(promised)]);
}
