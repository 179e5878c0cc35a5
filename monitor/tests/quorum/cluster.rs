//! A cluster of monitors in this process. Killing one drops its runtime with everything in it, at
//! whatever point it is: nothing is flushed, said or handed over.

use gabion_common::monitor_client::MonitorClient;
use gabion_monitor::daemon::{self, Options};
use gabion_monitor::raft::{Links, Start};
use gabion_proto::pb;
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;

pub const DEADLINE: Duration = Duration::from_secs(60);

struct Node {
    dir: PathBuf,
    addr: SocketAddr,
    links: Links,
    /// While it runs. Dropping the sender would stop the daemon cleanly.
    running: Option<(Runtime, watch::Sender<bool>)>,
}

pub struct Cluster {
    root: TempDir,
    nodes: BTreeMap<u64, Node>,
    snapshot_every: u64,
    /// Runtimes that end: RocksDB must not be in use when the process does.
    ending: Vec<JoinHandle<()>>,
}

/// Drops everything in a runtime, wherever it is.
fn end(runtime: Runtime) -> JoinHandle<()> {
    std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(10)))
}

fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl Cluster {
    /// `count` monitors that are all part of the cluster.
    pub async fn start(count: u64, snapshot_every: u64) -> Cluster {
        let (root, nodes, ending) = (tempfile::tempdir().unwrap(), BTreeMap::new(), Vec::new());
        let mut cluster = Cluster { root, nodes, snapshot_every, ending };
        cluster.launch(1, Start::Bootstrap).await;
        for id in 2..=count {
            cluster.launch(id, Start::Join).await;
            cluster.add(id).await.unwrap();
        }
        cluster.all_up(count as usize).await;
        cluster
    }

    /// Starts monitor `id` where it was before, or in a new place.
    pub async fn launch(&mut self, id: u64, start: Start) {
        let dir = self.root.path().join(id.to_string());
        let node = self.nodes.entry(id).or_insert_with(|| Node {
            dir,
            addr: free_addr(),
            links: Links::default(),
            running: None,
        });
        assert!(node.running.is_none());
        let options = Options {
            snapshot_every: self.snapshot_every,
            links: node.links.clone(),
            ..Options::new(node.dir.clone(), id, node.addr, start)
        };
        let ready = gabion_common::addr_file::path(&node.dir, "monitor");
        let _ = std::fs::remove_file(&ready);
        let began = Instant::now();
        loop {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .thread_name(format!("monitor-{id}"))
                .build()
                .unwrap();
            let (stop, stopping) = watch::channel(false);
            let task = runtime.spawn(daemon::run(options.clone(), stopping));
            while !ready.exists() && !task.is_finished() {
                assert!(began.elapsed() < DEADLINE, "monitor {id} does not start");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if ready.exists() {
                node.running = Some((runtime, stop));
                return;
            }
            // The threads of the run before may hold the database or the port for a moment more.
            let failed = format!("{:#}", task.await.unwrap().unwrap_err());
            assert!(began.elapsed() < DEADLINE, "monitor {id} does not start: {failed}");
            self.ending.push(end(runtime));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// As SIGKILL.
    pub fn kill(&mut self, id: u64) {
        let (runtime, stop) = self.nodes.get_mut(&id).unwrap().running.take().unwrap();
        self.ending.push(end(runtime));
        drop(stop);
    }

    pub fn is_running(&self, id: u64) -> bool {
        self.nodes[&id].running.is_some()
    }

    /// As if the disk was replaced.
    pub fn wipe(&self, id: u64) {
        assert!(!self.is_running(id));
        std::fs::remove_dir_all(&self.nodes[&id].dir).unwrap();
    }

    /// Nothing goes between `id` and the others any more.
    pub fn cut_off(&self, id: u64) {
        for (other, node) in &self.nodes {
            if *other != id {
                node.links.cut(id);
                self.nodes[&id].links.cut(*other);
            }
        }
    }

    pub fn heal(&self) {
        self.nodes.values().for_each(|n| n.links.heal());
    }

    pub fn addr(&self, id: u64) -> String {
        self.nodes[&id].addr.to_string()
    }

    /// A client that knows all monitors there ever were.
    pub fn client(&self) -> MonitorClient {
        MonitorClient::new(&self.nodes.values().map(|n| n.addr.to_string()).collect::<Vec<_>>()).unwrap()
    }

    /// A client of one monitor that does not follow its advice.
    pub fn client_of(&self, id: u64) -> MonitorClient {
        MonitorClient::new(&[self.addr(id)]).unwrap()
    }

    pub async fn add(&self, id: u64) -> Result<(), tonic::Status> {
        let addr = self.addr(id);
        let client = self.client();
        let call = client.until_answered("add", |m| {
            let request = pb::AddMonitorRequest { addr: addr.clone() };
            async move { m.admin().add_monitor(request).await }
        });
        call.await.map(|m| assert_eq!((m.id, m.voter), (id, true)))
    }

    pub async fn remove(&self, id: u64) -> Result<(), tonic::Status> {
        let client = self.client();
        let call = client.until_answered("remove", |m| async move {
            m.admin().remove_monitor(pb::RemoveMonitorRequest { id }).await
        });
        call.await.map(drop)
    }

    pub async fn members(&self) -> Vec<pb::MonitorStatus> {
        let client = self.client();
        let call =
            client.until_answered("list", |m| async move { m.admin().list_monitors(pb::Empty {}).await });
        call.await.unwrap().monitors
    }

    pub async fn leader(&self) -> u64 {
        eventually("a leader", async || self.members().await.iter().find(|m| m.leader).map(|m| m.id)).await
    }

    /// Waits until `count` monitors vote and are up.
    pub async fn all_up(&self, count: usize) {
        eventually("all monitors up", async || {
            let members = self.members().await;
            (members.len() == count && members.iter().all(|m| m.voter && m.up)).then_some(())
        })
        .await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let running = self.nodes.values_mut().filter_map(|n| n.running.take());
        self.ending.extend(running.map(|(runtime, _)| end(runtime)));
        for ended in self.ending.drain(..) {
            // It only waits; what a monitor panicked with was reported where it did.
            let _ = ended.join();
        }
    }
}

/// Asks until there is an answer.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < DEADLINE, "{what}: not after {} s", DEADLINE.as_secs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
