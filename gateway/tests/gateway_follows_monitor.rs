//! The gateway's process between a scripted monitor and a scripted OSD: it exports what the monitor
//! wants, goes on without it, and detaches what is no longer wanted.

use bytes::Bytes;
use futures::Stream;
use gabion_common::net;
use gabion_common::tls::Security;
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::frame::Frame;
use gabion_proto::ids::*;
use gabion_proto::map::*;
use gabion_proto::msg::{ClientOp, Hello, Message, OpKind, OpReply, Role};
use gabion_proto::pb::client_service_server::{ClientService, ClientServiceServer};
use gabion_proto::pb::host_service_server::{HostService, HostServiceServer};
use gabion_proto::pb::map_service_server::{MapService, MapServiceServer};
use gabion_proto::pb::{self, ExportInfo, ExportKind, ExportState};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

const CLUSTER: ClusterId = ClusterId([9; 16]);
const SIZE: u64 = 16 << 20;
const CLIENT: u64 = 41;
const SESSION: u64 = 7;
const GENERATION: u64 = 5;
const DEADLINE: Duration = Duration::from_secs(30);

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One message now and none after it, until the monitor goes.
fn once_and_wait<T: Send + 'static>(first: T) -> Streamed<T> {
    use futures::StreamExt;
    Box::pin(futures::stream::iter([Ok(first)]).chain(futures::stream::pending()))
}

#[derive(Clone)]
struct Monitor {
    map: ClusterMap,
    exports: Vec<ExportInfo>,
    /// Attachments are in force from so many epochs after the only map that it sends.
    ahead: u64,
    reports: watch::Sender<Vec<ExportInfo>>,
    detached: mpsc::Sender<pb::DetachVolumeRequest>,
}

#[tonic::async_trait]
impl MapService for Monitor {
    type WatchMapStream = Streamed<pb::MapUpdate>;
    async fn watch_map(
        &self,
        _: Request<pb::WatchMapRequest>,
    ) -> Result<Response<Self::WatchMapStream>, Status> {
        let update = Some(pb::map_update::Update::Full((&self.map).into()));
        Ok(Response::new(once_and_wait(pb::MapUpdate { update })))
    }
}

#[tonic::async_trait]
impl HostService for Monitor {
    type WatchHostStream = Streamed<pb::HostSpec>;
    async fn watch_host(
        &self,
        r: Request<pb::WatchHostRequest>,
    ) -> Result<Response<Self::WatchHostStream>, Status> {
        assert_eq!(r.into_inner().host, "h1");
        Ok(Response::new(once_and_wait(pb::HostSpec {
            revision: 1,
            exports: self.exports.clone(),
            vms: vec![],
        })))
    }
    async fn report_host(&self, r: Request<pb::HostReport>) -> Result<Response<pb::Empty>, Status> {
        if let Some(pb::host_report::Reporter::Gateway(g)) = r.into_inner().reporter {
            assert_eq!(g.client, CLIENT);
            self.reports.send_replace(g.exports);
        }
        Ok(Response::new(pb::Empty {}))
    }
}

#[tonic::async_trait]
impl ClientService for Monitor {
    async fn open_session(
        &self,
        r: Request<pb::OpenSessionRequest>,
    ) -> Result<Response<pb::OpenSessionReply>, Status> {
        assert_eq!(r.into_inner().client, 0, "a new gateway has no id");
        let cluster = CLUSTER.0.to_vec();
        Ok(Response::new(pb::OpenSessionReply { client: CLIENT, session: SESSION, cluster }))
    }
    async fn attach_volume(
        &self,
        r: Request<pb::AttachVolumeRequest>,
    ) -> Result<Response<pb::AttachVolumeReply>, Status> {
        let r = r.into_inner();
        assert_eq!((r.client, r.session, r.take_over), (CLIENT, SESSION, false));
        Ok(Response::new(pb::AttachVolumeReply {
            volume: 3,
            generation: GENERATION,
            epoch: self.map.epoch.0 + self.ahead,
            size_bytes: SIZE,
            pool: 1,
            layers: vec![0],
            read_only: false,
            root: 3,
        }))
    }
    async fn seal_snapshot(
        &self,
        _: Request<pb::SealSnapshotRequest>,
    ) -> Result<Response<pb::SealSnapshotReply>, Status> {
        Err(Status::internal("nobody asked for one"))
    }
    async fn detach_volume(
        &self,
        r: Request<pb::DetachVolumeRequest>,
    ) -> Result<Response<pb::Empty>, Status> {
        self.detached.send(r.into_inner()).await.map_err(|_| Status::internal("nobody listens"))?;
        Ok(Response::new(pb::Empty {}))
    }
}

impl Monitor {
    /// Serves on `addr` until what is returned is dropped; then every connection is cut.
    async fn start(self, addr: SocketAddr) -> (SocketAddr, Running) {
        let (stop, stopped) = oneshot::channel::<()>();
        let (bound, address) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::bind(addr).await.unwrap();
                bound.send(listener.local_addr().unwrap()).unwrap();
                let serving = tonic::transport::Server::builder()
                    .add_service(MapServiceServer::new(self.clone()))
                    .add_service(HostServiceServer::new(self.clone()))
                    .add_service(ClientServiceServer::new(self))
                    .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
                tokio::select! {
                    served = serving => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        (address.await.unwrap(), Running { stop: Some(stop), thread: Some(thread) })
    }
}

struct Running {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the monitor's thread failed");
    }
}

/// An OSD that keeps blocks in memory, for one client connection.
async fn osd(listener: TcpListener) {
    let role = Role::Osd { id: OsdId(0), incarnation: Incarnation(1) };
    let hello = Hello { cluster: CLUSTER, role, refusal: None };
    let mut c = net::accept(listener.accept().await.unwrap().0, &hello, &Security::plain()).await.unwrap();
    assert_eq!(c.peer.role, Role::Client { id: ClientId(CLIENT) });
    let mut blocks: BTreeMap<(u32, u32), (Bytes, u32)> = BTreeMap::new();
    while let Ok(Some(frame)) = c.reader.next().await {
        let Message::Op(op) = frame.message else { panic!("no operation") };
        assert_eq!((op.session, op.generation), (Session(SESSION), Generation(GENERATION)));
        let (reply, data) = apply(&mut blocks, op, frame.data);
        let reply = Frame { request: frame.request, message: Message::OpReply(reply), data };
        c.writer.write(&[reply]).await.unwrap();
    }
}

fn apply(blocks: &mut BTreeMap<(u32, u32), (Bytes, u32)>, op: ClientOp, data: Bytes) -> (OpReply, Bytes) {
    let object = op.object.index;
    match op.kind {
        OpKind::Write { extents } => {
            let content = Content { extents, data };
            content.validate(true).unwrap();
            for (block, bytes, crc) in content.data_blocks() {
                blocks.insert((object, block), (Bytes::copy_from_slice(bytes), crc));
            }
        }
        OpKind::Zero { first_block, block_count, .. } => {
            blocks.retain(|(o, b), _| *o != object || !(first_block..first_block + block_count).contains(b));
        }
        OpKind::Read { first_block, block_count, .. } => {
            let (mut extents, mut data) = (Vec::new(), Vec::new());
            for ((_, block), (bytes, crc)) in
                blocks.range((object, first_block)..(object, first_block + block_count))
            {
                let kind = ExtentKind::Data { crcs: vec![*crc] };
                extents.push(Extent { first_block: *block, block_count: 1, kind });
                data.extend_from_slice(bytes);
            }
            return (OpReply::Data { extents }, data.into());
        }
    }
    (OpReply::Done { version: Version::ZERO }, Bytes::new())
}

fn map(osd: SocketAddr) -> ClusterMap {
    let mut m = ClusterMap { cluster: CLUSTER, epoch: Epoch(4), ..Default::default() };
    m.pools.insert(
        PoolId(1),
        Pool {
            name: "p".into(),
            redundancy: Redundancy::Replicated { size: 1 },
            min_size: 1,
            failure_domain: FailureDomain::Osd,
            pg_count: 1,
            object_bytes: 4 << 20,
        },
    );
    let acting = vec![OsdId(0)];
    m.pgs.insert(
        PgId { pool: PoolId(1), index: 0 },
        PgRecord {
            up: acting.clone(),
            acting,
            primary: Some(OsdId(0)),
            interval: Epoch(4),
            ..Default::default()
        }
        .into(),
    );
    m.osds.insert(
        OsdId(0),
        OsdInfo {
            host: "h1".into(),
            rack: "r1".into(),
            addr: osd.to_string(),
            weight: 65536,
            up: true,
            in_cluster: true,
            incarnation: Incarnation(1),
            disk: ClusterId([1; 16]),
            capacity_bytes: 1 << 30,
        },
    );
    m
}

/// The oldest way to speak NBD: export name, one request at a time.
struct Nbd(TcpStream);

impl Nbd {
    async fn connect(uri: &str) -> Nbd {
        let (addr, name) = uri.strip_prefix("nbd://").unwrap().split_once('/').unwrap();
        let mut s = TcpStream::connect(addr).await.unwrap();
        s.read_exact(&mut [0; 18]).await.unwrap();
        s.write_u32(3).await.unwrap();
        s.write_all(b"IHAVEOPT").await.unwrap();
        s.write_u32(1).await.unwrap();
        s.write_u32(name.len() as u32).await.unwrap();
        s.write_all(name.as_bytes()).await.unwrap();
        assert_eq!(s.read_u64().await.unwrap(), SIZE);
        s.read_u16().await.unwrap();
        Nbd(s)
    }
    async fn request(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) {
        let s = &mut self.0;
        s.write_u32(0x2560_9513).await.unwrap();
        s.write_u16(0).await.unwrap();
        s.write_u16(command).await.unwrap();
        s.write_u64(1).await.unwrap();
        s.write_u64(offset).await.unwrap();
        s.write_u32(len).await.unwrap();
        s.write_all(data).await.unwrap();
        assert_eq!(s.read_u32().await.unwrap(), 0x6744_6698);
        assert_eq!(s.read_u32().await.unwrap(), 0, "the request failed");
        s.read_u64().await.unwrap();
    }
    async fn write(&mut self, offset: u64, data: &[u8]) {
        self.request(1, offset, data.len() as u32, data).await;
    }
    async fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.request(0, offset, len as u32, &[]).await;
        let mut out = vec![0; len];
        self.0.read_exact(&mut out).await.unwrap();
        out
    }
}

fn start_gateway(monitor: SocketAddr, run_dir: &Path) -> tokio::process::Child {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_gabion-gateway"))
        .args(["--monitors", &monitor.to_string(), "--host", "h1", "--run-dir"])
        .arg(run_dir)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn scenario() {
    let dir = tempfile::tempdir().unwrap();
    let osd_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let map = map(osd_listener.local_addr().unwrap());
    tokio::spawn(osd(osd_listener));
    let (reports, mut reported) = watch::channel(Vec::new());
    let (detached, mut detaches) = mpsc::channel(4);
    let mut export = ExportInfo { id: 12, volume: "t/vol".into(), host: "h1".into(), ..Default::default() };
    export.set_kind(ExportKind::Nbd);
    let monitor = Monitor { map, exports: vec![export], ahead: 0, reports, detached };
    let (addr, serving) = monitor.clone().start("127.0.0.1:0".parse().unwrap()).await;

    let run_dir = dir.path().join("run");
    let mut gateway = start_gateway(addr, &run_dir);
    let ready = |e: &Vec<ExportInfo>| e.len() == 1 && e[0].state() == ExportState::Ready;
    let served = reported.wait_for(ready).await.unwrap()[0].clone();
    assert_eq!(served.socket, run_dir.canonicalize().unwrap().join("nbd-12.sock").to_str().unwrap());
    assert_eq!(std::fs::read_to_string(run_dir.join("client-id")).unwrap().trim(), CLIENT.to_string());
    let listening = std::fs::read_to_string(run_dir.join("gateway.addr")).unwrap();
    assert_eq!(served.uri, format!("nbd://{}/t/vol", listening.trim()));

    let mut nbd = Nbd::connect(&served.uri).await;
    let data: Vec<u8> = (0..20_000).map(|i| (i % 249) as u8).collect();
    // Unaligned, and over the border of two objects.
    let at = (4 << 20) - 7001;
    nbd.write(at, &data).await;
    assert!(nbd.read(at, data.len()).await == data);

    drop(serving);
    nbd.write(100, &data).await;
    assert!(Nbd::connect(&served.uri).await.read(100, data.len()).await == data, "served without a monitor");

    // The monitor returns and wants nothing any more.
    let (_, _serving) = Monitor { exports: vec![], ..monitor }.start(addr).await;
    let request = detaches.recv().await.unwrap();
    assert_eq!((request.volume.as_str(), request.client, request.generation), ("t/vol", CLIENT, GENERATION));
    reported.wait_for(Vec::is_empty).await.unwrap();
    assert!(!run_dir.join("nbd-12.sock").exists());
    let mut end = Vec::new();
    nbd.0.read_to_end(&mut end).await.unwrap();
    assert!(end.is_empty(), "the connection was closed");

    let pid = i32::try_from(gateway.id().unwrap()).unwrap();
    // SAFETY: signals a child that was not waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    assert!(gateway.wait().await.unwrap().success(), "SIGTERM is a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_follows_monitor() {
    tokio::time::timeout(DEADLINE, scenario()).await.expect("the scenario hangs");
}

async fn granted_in_vain() {
    let dir = tempfile::tempdir().unwrap();
    let (reports, mut reported) = watch::channel(Vec::new());
    let (detached, mut detaches) = mpsc::channel(4);
    let mut export = ExportInfo { id: 12, volume: "t/vol".into(), host: "h1".into(), ..Default::default() };
    export.set_kind(ExportKind::Nbd);
    // Nobody answers there, and nobody is asked.
    let map = map("127.0.0.1:1".parse().unwrap());
    let monitor = Monitor { map, exports: vec![export], ahead: 1, reports, detached };
    let (addr, serving) = monitor.clone().start("127.0.0.1:0".parse().unwrap()).await;
    let _gateway = start_gateway(addr, &dir.path().join("run"));
    reported.wait_for(|e| e.len() == 1 && e[0].state() == ExportState::Failed).await.unwrap();

    drop(serving);
    let (_, _serving) = Monitor { exports: vec![], ..monitor }.start(addr).await;
    let request = detaches.recv().await.unwrap();
    assert_eq!((request.volume.as_str(), request.client, request.generation), ("t/vol", CLIENT, GENERATION));
    reported.wait_for(Vec::is_empty).await.unwrap();
}

/// The map that the attachment is in force with never comes, and then the export is not wanted any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_attached_in_vain_is_detached_when_its_export_goes() {
    tokio::time::timeout(4 * DEADLINE, granted_in_vain()).await.expect("the attachment stays");
}
