//! A whole monitor in-process on a temporary directory, driven over gRPC as OSDs, gateways and operators do.

use gabion_monitor::daemon::{self, Options};
use gabion_monitor::raft::Start;
use gabion_proto::map::{ClusterMap, MapIncrement};
use gabion_proto::pb::admin_service_client::AdminServiceClient;
use gabion_proto::pb::client_service_client::ClientServiceClient;
use gabion_proto::pb::host_service_client::HostServiceClient;
use gabion_proto::pb::map_service_client::MapServiceClient;
use gabion_proto::pb::osd_service_client::OsdServiceClient;
use gabion_proto::pb::status_service_client::StatusServiceClient;
use gabion_proto::pb::{self, map_update::Update};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::transport::Channel;

struct Running {
    stop: watch::Sender<bool>,
    task: JoinHandle<anyhow::Result<()>>,
    channel: Channel,
}

impl Running {
    async fn start(dir: &Path, bootstrap: bool) -> Running {
        let file = gabion_common::addr_file::path(dir, "monitor");
        // The daemon removes it itself, but this test must not read the old one before that.
        let _ = std::fs::remove_file(&file);
        let (stop, stopping) = watch::channel(false);
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let start = if bootstrap { Start::Bootstrap } else { Start::Resume };
        let options = Options::new(dir.into(), 1, listen, start);
        let task = tokio::spawn(daemon::run(options, stopping));
        let deadline = Instant::now() + Duration::from_secs(30);
        let addr = loop {
            match std::fs::read_to_string(&file) {
                Ok(addr) => break addr.trim().to_owned(),
                Err(_) if task.is_finished() => panic!("the monitor did not start: {:?}", task.await),
                Err(_) => {
                    assert!(Instant::now() < deadline, "the monitor does not start");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        };
        let channel = Channel::from_shared(format!("http://{addr}")).unwrap().connect().await.unwrap();
        Running { stop, task, channel }
    }

    async fn stop(self) {
        self.stop.send(true).unwrap();
        drop(self.channel);
        self.task.await.unwrap().unwrap();
    }

    fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel.clone())
    }
    fn osd(&self) -> OsdServiceClient<Channel> {
        OsdServiceClient::new(self.channel.clone())
    }
    fn clients(&self) -> ClientServiceClient<Channel> {
        ClientServiceClient::new(self.channel.clone())
    }

    /// Adds and boots OSD `n`; answers its incarnation.
    async fn boot(&self, n: u8) -> u64 {
        let added = pb::AddOsdRequest {
            disk: vec![n; 16],
            host: format!("h{n}"),
            capacity_bytes: 1 << 34,
            ..Default::default()
        };
        let added = self.admin().add_osd(added).await.unwrap().into_inner();
        let boot = pb::BootRequest {
            id: added.id,
            cluster: added.cluster,
            disk: vec![n; 16],
            addr: format!("127.0.0.1:{}", 7100 + u16::from(n)),
            host: format!("h{n}"),
            rack: String::new(),
            capacity_bytes: 1 << 34,
        };
        self.osd().boot(boot).await.unwrap().into_inner().incarnation
    }

    async fn heartbeat(&self, id: u32, incarnation: u64, acked_epoch: u64) -> Result<u64, Code> {
        let beat = pb::HeartbeatRequest { id, incarnation, acked_epoch, ..Default::default() };
        let reply = self.osd().heartbeat(beat).await;
        reply.map(|r| r.into_inner().epoch).map_err(|s| s.code())
    }

    async fn make_pool(&self, size: u32) {
        let kind = Some(pb::redundancy::Kind::Replicas(size));
        let redundancy = Some(pb::Redundancy { kind });
        let pool = pb::CreatePoolRequest { name: "p".into(), redundancy, pg_count: 4, ..Default::default() };
        let made = self.admin().create_pool(pool).await.unwrap().into_inner();
        assert_eq!((made.min_size, made.object_bytes), (size / 2 + 1, 4 << 20));
    }

    async fn make_volume(&self, name: &str) -> Result<pb::VolumeInfo, Code> {
        let volume = pb::CreateVolumeRequest { name: name.into(), pool: "p".into(), size_bytes: 1 << 30 };
        self.admin().create_volume(volume).await.map(|r| r.into_inner()).map_err(|s| s.code())
    }

    async fn health(&self) -> Vec<String> {
        let report = StatusServiceClient::new(self.channel.clone()).get_health(pb::Empty {}).await.unwrap();
        report.into_inner().checks.into_iter().map(|c| c.code).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_from_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let m = Running::start(dir.path(), true).await;
    let mut updates = MapServiceClient::new(m.channel.clone())
        .watch_map(pb::WatchMapRequest { have_epoch: 0 })
        .await
        .unwrap()
        .into_inner();
    let mut incs = Vec::new();
    for n in 0..3 {
        incs.push(m.boot(n).await);
    }
    m.make_pool(3).await;
    assert_eq!(m.make_volume("v").await.unwrap().layers, [0]);
    assert_eq!(m.make_volume("v").await.unwrap_err(), Code::AlreadyExists);
    let erasure =
        pb::Redundancy { kind: Some(pb::redundancy::Kind::Erasure(pb::ErasureCode { k: 2, m: 1 })) };
    let erasure = pb::CreatePoolRequest { name: "e".into(), redundancy: Some(erasure), ..Default::default() };
    m.admin().create_pool(erasure).await.unwrap();
    m.admin().remove_pool(pb::NameRequest { name: "e".into() }).await.unwrap();

    // Followed by increments, the map arrives where the monitor is.
    let epoch = m.heartbeat(0, incs[0], 0).await.unwrap();
    let mut map = match updates.message().await.unwrap().unwrap().update.unwrap() {
        Update::Full(full) => ClusterMap::try_from(full).unwrap(),
        other => panic!("{other:?}"),
    };
    while map.epoch.0 < epoch {
        match updates.message().await.unwrap().unwrap().update.unwrap() {
            Update::Increment(i) => MapIncrement::try_from(i).unwrap().apply(&mut map).unwrap(),
            Update::Full(full) => map = ClusterMap::try_from(full).unwrap(),
        }
    }
    assert_eq!(map.pgs.len(), 4);
    assert!(map.pgs.values().all(|r| r.acting.len() == 3));

    // Activated, then clean: nothing is wrong.
    assert!(m.health().await.contains(&"PG_INACTIVE".to_owned()));
    for (pg, record) in &map.pgs {
        let osd = record.primary.unwrap();
        let report = pb::PgIntervalReport {
            osd: osd.0,
            incarnation: map.osds[&osd].incarnation.0,
            pool: pg.pool.0,
            index: pg.index,
            interval: record.interval.0,
            ..Default::default()
        };
        let early = pb::PgIntervalReport { interval: report.interval - 1, ..report };
        assert_eq!(m.osd().pg_activated(early).await.unwrap_err().code(), Code::Aborted);
        m.osd().pg_activated(report).await.unwrap();
        m.osd().pg_clean(report).await.unwrap();
    }
    assert_eq!(m.health().await, Vec::<String>::new());
    // A group that has so many objects that it could once not be rebuilt.
    let (pg, record) = map.pgs.first_key_value().unwrap();
    let osd = record.primary.unwrap();
    let incarnation = map.osds[&osd].incarnation.0;
    for (objects, codes) in [(100_001, vec!["PG_LARGE"]), (100_000, vec![])] {
        let (pool, index, interval) = (pg.pool.0, pg.index, record.interval.0);
        let state = pb::PgState::ActiveClean.into();
        let status = pb::PgStatus { pool, index, interval, state, objects, ..Default::default() };
        let beat = pb::HeartbeatRequest { id: osd.0, incarnation, pgs: vec![status], ..Default::default() };
        m.osd().heartbeat(beat).await.unwrap();
        assert_eq!(m.health().await, codes);
    }
    let until = pb::WatchRebuildsRequest { until_clean: true };
    let mut rebuilds =
        StatusServiceClient::new(m.channel.clone()).watch_rebuilds(until).await.unwrap().into_inner();
    assert_eq!(rebuilds.message().await.unwrap().unwrap().pgs_not_clean, 0);
    assert!(rebuilds.message().await.unwrap().is_none());

    // A goodbye counts at once.
    m.osd().goodbye(pb::GoodbyeRequest { id: 2, incarnation: incs[2] }).await.unwrap();
    assert_eq!(m.heartbeat(2, incs[2], 0).await.unwrap_err(), Code::Aborted);
    let codes = m.health().await;
    assert!(codes.contains(&"OSD_DOWN".to_owned()), "{codes:?}");
    m.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attach_waits_for_the_fence() {
    let dir = tempfile::tempdir().unwrap();
    let m = Running::start(dir.path(), true).await;
    let inc = m.boot(0).await;
    m.make_pool(1).await;
    m.make_volume("v").await.unwrap();
    let open = pb::OpenSessionRequest { client: 0, host: "h0".into() };
    let session = m.clients().open_session(open).await.unwrap().into_inner();
    let request = pb::AttachVolumeRequest {
        volume: "v".into(),
        client: session.client,
        session: session.session,
        take_over: false,
    };
    let before = m.heartbeat(0, inc, 0).await.unwrap();
    let mut clients = m.clients();
    let attach = tokio::spawn(async move { clients.attach_volume(request).await });
    let deadline = Instant::now() + Duration::from_secs(10);
    let fenced = loop {
        let epoch = m.heartbeat(0, inc, before).await.unwrap();
        if epoch > before {
            break epoch;
        }
        assert!(Instant::now() < deadline);
    };
    // It goes on waiting while the OSD reports the older epoch.
    for _ in 0..20 {
        m.heartbeat(0, inc, before).await.unwrap();
        assert!(!attach.is_finished(), "attached before the fence was in force");
    }
    m.heartbeat(0, inc, fenced).await.unwrap();
    let attached = attach.await.unwrap().unwrap().into_inner();
    assert_eq!((attached.epoch, attached.size_bytes), (fenced, 1 << 30));
    let volume = m.admin().get_volume(pb::NameRequest { name: "v".into() }).await.unwrap().into_inner();
    assert_eq!(volume.attached_host, "h0");
    m.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_everything_and_waits_a_lease() {
    let dir = tempfile::tempdir().unwrap();
    let m = Running::start(dir.path(), true).await;
    m.boot(0).await;
    m.make_pool(1).await;
    m.make_volume("v").await.unwrap();
    let add =
        pb::AddExportRequest { volume: "v".into(), kind: pb::ExportKind::Nbd as i32, ..Default::default() };
    let refused = m.admin().add_export(add.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "no gateway yet");
    let add = pb::AddExportRequest { host: "h0".into(), ..add };
    let export = m.admin().add_export(add).await.unwrap().into_inner();
    assert_eq!(export.state(), pb::ExportState::Pending);
    let status =
        StatusServiceClient::new(m.channel.clone()).get_status(pb::Empty {}).await.unwrap().into_inner();
    m.stop().await;

    let restarted = Instant::now();
    let m = Running::start(dir.path(), false).await;
    let again =
        StatusServiceClient::new(m.channel.clone()).get_status(pb::Empty {}).await.unwrap().into_inner();
    assert_eq!((&again.cluster, again.epoch), (&status.cluster, status.epoch));
    assert_eq!((again.volumes, again.exports, again.osds_up), (1, 1, 1));
    // Nobody sends heartbeats: the OSD goes down, but not before a whole lease.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let osds = m.admin().list_osds(pb::Empty {}).await.unwrap().into_inner().osds;
        if !osds[0].up {
            break;
        }
        assert!(Instant::now() < deadline, "it never goes down");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(restarted.elapsed() >= gabion_proto::limits::LEASE, "down after {:?}", restarted.elapsed());
    m.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_hears_of_its_exports() {
    let dir = tempfile::tempdir().unwrap();
    let m = Running::start(dir.path(), true).await;
    m.boot(0).await;
    m.make_pool(1).await;
    m.make_volume("v").await.unwrap();
    let mut hosts = HostServiceClient::new(m.channel.clone());
    let mut specs = hosts.watch_host(pb::WatchHostRequest { host: "h0".into() }).await.unwrap().into_inner();
    let first = specs.message().await.unwrap().unwrap();
    assert_eq!(first.exports, vec![]);
    let report = |exports| pb::HostReport {
        host: "h0".into(),
        reporter: Some(pb::host_report::Reporter::Gateway(pb::GatewayReport { client: 1, exports })),
    };
    hosts.report_host(report(vec![])).await.unwrap();
    let add =
        pb::AddExportRequest { volume: "v".into(), kind: pb::ExportKind::Nbd as i32, ..Default::default() };
    let export = m.admin().add_export(add).await.unwrap().into_inner();
    assert_eq!(export.host, "h0", "the only gateway there is");
    let second = specs.message().await.unwrap().unwrap();
    assert!(second.revision > first.revision);
    assert_eq!(second.exports, vec![export.clone()]);
    let ready = pb::ExportInfo {
        state: pb::ExportState::Ready as i32,
        uri: "nbd://127.0.0.1:10809/v".into(),
        ..export.clone()
    };
    hosts.report_host(report(vec![ready.clone()])).await.unwrap();
    assert_eq!(specs.message().await.unwrap().unwrap().exports, vec![ready]);
    m.admin().remove_export(pb::ExportRequest { id: export.id }).await.unwrap();
    assert_eq!(specs.message().await.unwrap().unwrap().exports, vec![]);
    m.stop().await;
}
