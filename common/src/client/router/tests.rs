//! The router against scripted OSDs on loopback.

use super::*;
use crate::net::{self, Framed};
use crate::tls::Security;
use gabion_proto::frame::Frame;
use gabion_proto::ids::*;
use gabion_proto::map::{FailureDomain, OsdInfo, PgRecord, Pool, Redundancy};
use gabion_proto::msg::{Hello, Message, Role};
use tokio::net::TcpListener;

const CLUSTER: ClusterId = ClusterId([3; 16]);

struct Osd {
    listener: TcpListener,
    addr: String,
}

impl Osd {
    async fn new() -> Osd {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        Osd { listener, addr }
    }
    async fn accept(&self) -> Framed {
        let role = Role::Osd { id: OsdId(0), incarnation: Incarnation(1) };
        let hello = Hello { cluster: CLUSTER, role, refusal: None };
        net::accept(self.listener.accept().await.unwrap().0, &hello, &Security::plain()).await.unwrap()
    }
}

fn map(epoch: u64, primary: u32, osds: &[&Osd]) -> Arc<ClusterMap> {
    let pool = Pool {
        name: "p".into(),
        redundancy: Redundancy::Replicated { size: 1 },
        min_size: 1,
        failure_domain: FailureDomain::Osd,
        pg_count: 1,
        object_bytes: 4 << 20,
    };
    let info = |addr: &str| OsdInfo {
        host: "h".into(),
        rack: "r".into(),
        addr: addr.into(),
        weight: 1,
        up: true,
        in_cluster: true,
        incarnation: Incarnation(1),
        disk: ClusterId([1; 16]),
        capacity_bytes: 1,
    };
    let mut m = ClusterMap { cluster: CLUSTER, epoch: Epoch(epoch), ..Default::default() };
    m.pools.insert(PoolId(1), pool);
    let acting = vec![OsdId(primary)];
    m.pgs.insert(
        PgId { pool: PoolId(1), index: 0 },
        PgRecord { acting, primary: Some(OsdId(primary)), interval: Epoch(epoch), ..Default::default() }
            .into(),
    );
    for (i, o) in osds.iter().enumerate() {
        m.osds.insert(OsdId(i as u32), info(&o.addr));
    }
    Arc::new(m)
}

fn object() -> ObjectId {
    ObjectId { volume: VolumeId(1), index: 0, layer: LayerId(0) }
}

fn write() -> (OpKind, Bytes) {
    let content = Content::data(0, Bytes::from(vec![5u8; 4096]));
    (OpKind::Write { extents: content.extents }, content.data)
}

async fn answer(osd: &mut Framed, reply: OpReply) -> ClientOp {
    let frame = osd.reader.next().await.unwrap().unwrap();
    let Message::Op(op) = frame.message else { panic!("no operation") };
    osd.writer.write(&[Frame::new(frame.request, Message::OpReply(reply))]).await.unwrap();
    op
}

const DONE: OpReply = OpReply::Done { version: Version::ZERO };

fn client(map: &tokio::sync::watch::Sender<Arc<ClusterMap>>, timeout: Option<Duration>) -> ObjectClient {
    let cluster = ClusterClient::new(map.subscribe(), ClientId(4), Security::plain());
    let attached = Attached::new(VolumeId(9), ClientId(4), Session(2), Generation(6));
    ObjectClient::new(cluster, Arc::new(attached), timeout)
}

#[tokio::test]
async fn follows_the_primary_to_another_osd() {
    let (a, b) = (Osd::new().await, Osd::new().await);
    let (tx, _rx) = watch::channel(map(1, 0, &[&a, &b]));
    let c = client(&tx, None);
    let (kind, data) = write();
    let stale = OpReply::Retry { epoch: Epoch(2), why: RetryWhy::StaleMap };
    let osds = async {
        let first = answer(&mut a.accept().await, stale).await;
        tx.send_replace(map(2, 1, &[&a, &b]));
        (first, answer(&mut b.accept().await, DONE).await)
    };
    let (result, (first, second)) = tokio::join!(c.op(PoolId(1), object(), kind, data), osds);
    result.unwrap();
    assert_eq!((first.epoch, second.epoch), (Epoch(1), Epoch(2)));
    assert_eq!((first.client, first.session, first.generation), (ClientId(4), Session(2), Generation(6)));
}

#[tokio::test]
async fn sends_again_over_a_new_connection_when_the_old_one_is_lost() {
    let a = Osd::new().await;
    let (tx, _rx) = watch::channel(map(1, 0, &[&a]));
    let c = client(&tx, None);
    let (kind, data) = write();
    let osd = async {
        let mut first = a.accept().await;
        assert!(first.reader.next().await.unwrap().is_some());
        drop(first);
        answer(&mut a.accept().await, DONE).await
    };
    let (result, _) = tokio::join!(c.op(PoolId(1), object(), kind, data), osd);
    result.unwrap();
}

#[tokio::test]
async fn leaves_an_osd_that_hangs_when_the_map_has_it_down() {
    let (a, b) = (Osd::new().await, Osd::new().await);
    let (tx, _rx) = watch::channel(map(1, 0, &[&a, &b]));
    let c = client(&tx, None);
    let (kind, data) = write();
    let osds = async {
        let mut hung = a.accept().await;
        assert!(hung.reader.next().await.unwrap().is_some());
        let mut next = ClusterMap::clone(&map(2, 1, &[&a, &b]));
        next.osds.get_mut(&OsdId(0)).unwrap().up = false;
        tx.send_replace(Arc::new(next));
        answer(&mut b.accept().await, DONE).await;
        // The old connection was closed before.
        assert!(hung.reader.next().await.unwrap().is_none());
    };
    let (result, ()) = tokio::join!(c.op(PoolId(1), object(), kind, data), osds);
    result.unwrap();
}

#[tokio::test]
async fn a_fence_is_final() {
    let a = Osd::new().await;
    let (tx, _rx) = watch::channel(map(1, 0, &[&a]));
    let c = client(&tx, None);
    let (kind, data) = write();
    let osd = async { answer(&mut a.accept().await, OpReply::Failed(OpError::Fenced)).await };
    let (result, _) = tokio::join!(c.op(PoolId(1), object(), kind.clone(), data.clone()), osd);
    assert_eq!(result, Err(OpError::Fenced.into()));
    // Nobody answers now: it must not be asked.
    assert_eq!(c.op(PoolId(1), object(), kind, data).await, Err(OpError::Fenced.into()));
}

#[tokio::test]
async fn damaged_and_foreign_answers_are_not_believed() {
    let a = Osd::new().await;
    let (tx, _rx) = watch::channel(map(1, 0, &[&a]));
    let c = client(&tx, None);
    let read = OpKind::Read { first_block: 1, block_count: 1, below: vec![] };
    let good = Content::data(1, Bytes::from(vec![9u8; 4096]));
    let osd = async {
        let mut conn = a.accept().await;
        let damaged = Bytes::from(vec![8u8; 4096]);
        let elsewhere = Content::data(2, good.data.clone());
        for (extents, data) in [
            (good.extents.clone(), damaged),
            (good.extents.clone(), good.data.clone()),
            (elsewhere.extents, elsewhere.data),
        ] {
            let request = conn.reader.next().await.unwrap().unwrap().request;
            let message = Message::OpReply(OpReply::Data { extents });
            conn.writer.write(&[Frame { request, message, data }]).await.unwrap();
        }
        conn
    };
    let ops = async {
        (
            c.op(PoolId(1), object(), read.clone(), Bytes::new()).await,
            c.op(PoolId(1), object(), read.clone(), Bytes::new()).await,
        )
    };
    let ((first, second), _conn) = tokio::join!(ops, osd);
    assert_eq!(first.unwrap(), good, "asked again after the damaged one");
    assert_eq!(second, Err(ObjectError::BadAnswer));
}

#[tokio::test]
async fn a_timeout_ends_the_waiting() {
    let a = Osd::new().await;
    let mut nobody = ClusterMap::clone(&map(1, 0, &[&a]));
    nobody.pgs.values_mut().for_each(|p| p.primary = None);
    let (tx, _rx) = watch::channel(Arc::new(nobody));
    let c = client(&tx, Some(Duration::from_millis(60)));
    let (kind, data) = write();
    assert_eq!(c.op(PoolId(1), object(), kind, data).await, Err(ObjectError::TimedOut));
}
