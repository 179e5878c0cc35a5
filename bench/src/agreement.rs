//! Real monitors in this process, with their logs on a disk, and OSDs that report all their groups at once: what the monitors
//! agree on in a second when everything peers.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use gabion_common::monitor_client::MonitorClient;
use gabion_common::{addr_file, map_watch};
use gabion_monitor::daemon::{self, Options};
use gabion_monitor::raft::Start;
use gabion_proto::ids::{Epoch, OsdId};
use gabion_proto::limits::{HEARTBEAT, REPORTS_AT_ONCE_MAX};
use gabion_proto::map::ClusterMap;
use gabion_proto::pb::{self, Empty};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::cpu;

const PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks at whether a monitor has started.
const LOOK: Duration = Duration::from_millis(10);

#[derive(Args, Clone, Debug)]
pub struct AgreementOptions {
    /// Where the monitors keep their data; it must not exist.
    #[arg(long)]
    pub dir: PathBuf,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=7))]
    pub monitors: u64,
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub groups: u32,
    /// Each reports the groups that it leads, and follows the map.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u8).range(3..=200))]
    pub osds: u8,
}

/// What a round of reports took.
#[derive(Clone, Debug)]
pub struct Round {
    pub what: &'static str,
    pub reports: usize,
    pub elapsed_s: f64,
    /// The slowest of them.
    pub slowest_s: f64,
    pub epochs: u64,
    /// Of everything: monitors, and OSDs that report and follow the map.
    pub cpu_s: f64,
}

#[derive(Clone, Copy)]
enum Kind {
    Activated,
    Clean,
}

struct Osd {
    id: u32,
    cluster: Vec<u8>,
    disk: Vec<u8>,
    client: MonitorClient,
    map: watch::Receiver<Arc<ClusterMap>>,
    incarnation: watch::Sender<u64>,
    /// As the daemon has them.
    turns: Arc<Semaphore>,
}

struct Monitors {
    stop: watch::Sender<bool>,
    tasks: JoinSet<Result<()>>,
    addrs: Vec<String>,
}

impl Monitors {
    async fn start(dir: &Path, count: u64) -> Result<Monitors> {
        let mut monitors =
            Monitors { stop: watch::Sender::new(false), tasks: JoinSet::new(), addrs: Vec::new() };
        for id in 1..=count {
            let start = if id == 1 { Start::Bootstrap } else { Start::Join };
            let dir = dir.join(id.to_string());
            let options = Options::new(dir.clone(), id, SocketAddr::from(([127, 0, 0, 1], 0)), start);
            monitors.tasks.spawn(daemon::run(options, monitors.stop.subscribe()));
            let begun = Instant::now();
            let addr = loop {
                if let Ok(text) = std::fs::read_to_string(addr_file::path(&dir, "monitor")) {
                    break text.trim().to_owned();
                }
                if let Some(ended) = monitors.tasks.try_join_next() {
                    bail!("monitor {id} does not start: {ended:?}");
                }
                ensure!(begun.elapsed() < PATIENCE, "monitor {id} does not start");
                tokio::time::sleep(LOOK).await;
            };
            monitors.addrs.push(addr.clone());
            if id > 1 {
                let client = MonitorClient::new(&monitors.addrs)?;
                let request = pb::AddMonitorRequest { addr };
                let call = |m: MonitorClient| {
                    let request = request.clone();
                    async move { m.admin().add_monitor(request).await }
                };
                client.until_answered("add", call).await?;
            }
        }
        Ok(monitors)
    }

    async fn end(mut self) -> Result<()> {
        self.stop.send_replace(true);
        while let Some(ended) = self.tasks.join_next().await {
            ended??;
        }
        Ok(())
    }
}

/// Keeps the OSD up for as long as somebody holds the other end.
async fn beat(
    client: MonitorClient,
    id: u32,
    map: watch::Receiver<Arc<ClusterMap>>,
    run: watch::Receiver<u64>,
) {
    let mut tick = tokio::time::interval(HEARTBEAT);
    while run.has_changed().is_ok() {
        tick.tick().await;
        let (incarnation, acked_epoch) = (*run.borrow(), map.borrow().epoch.0);
        let request = pb::HeartbeatRequest { id, incarnation, acked_epoch, ..Default::default() };
        // One that fails is followed by the next.
        let _ = client.osd().heartbeat(request).await;
    }
}

impl Osd {
    async fn add(addrs: &[String], n: u8) -> Result<Osd> {
        let client = MonitorClient::new(addrs)?;
        let disk = vec![n + 1; 16];
        let request = pb::AddOsdRequest {
            disk: disk.clone(),
            host: format!("h{n}"),
            capacity_bytes: 1 << 40,
            ..Default::default()
        };
        let call = |m: MonitorClient| {
            let request = request.clone();
            async move { m.admin().add_osd(request).await }
        };
        let added = client.until_answered("add", call).await?;
        let map = map_watch::follow(client.clone());
        let incarnation = watch::Sender::new(0);
        let turns = Arc::new(Semaphore::new(REPORTS_AT_ONCE_MAX));
        Ok(Osd { id: added.id, cluster: added.cluster, disk, client, map, incarnation, turns })
    }

    async fn boot(&self) -> Result<()> {
        let request = pb::BootRequest {
            id: self.id,
            cluster: self.cluster.clone(),
            disk: self.disk.clone(),
            addr: format!("10.0.0.{}:7000", self.id + 1),
            host: format!("h{}", self.id),
            rack: String::new(),
            capacity_bytes: 1 << 40,
        };
        let call = |m: MonitorClient| {
            let request = request.clone();
            async move { m.osd().boot(request).await }
        };
        let booted = self.client.until_answered("boot", call).await?;
        if self.incarnation.send_replace(booted.incarnation) == 0 {
            let run = self.incarnation.subscribe();
            tokio::spawn(beat(self.client.clone(), self.id, self.map.clone(), run));
        }
        Ok(())
    }
}

/// Waits for a map of every OSD that is like that.
async fn all_see(osds: &[Osd], what: &str, like: impl Fn(&ClusterMap) -> bool) -> Result<()> {
    for osd in osds {
        let mut map = osd.map.clone();
        let seen = tokio::time::timeout(PATIENCE, map.wait_for(|m| like(m))).await;
        seen.with_context(|| format!("{what}: not seen by every OSD"))?.context("nobody follows the map")?;
    }
    Ok(())
}

/// Every primary reports each of its groups at once, as after a power cut; done when all are answered and seen in every map.
async fn round(osds: &[Osd], what: &'static str, kind: Kind) -> Result<Round> {
    let map = osds[0].map.borrow().clone();
    let (begun, cpu) = (Instant::now(), cpu::of_self_s());
    let mut calls = JoinSet::new();
    for (pg, record) in &map.pgs {
        let osd = osds.iter().find(|o| Some(OsdId(o.id)) == record.primary);
        let osd = osd.with_context(|| format!("group {pg} has no primary"))?;
        let report = pb::PgIntervalReport {
            osd: osd.id,
            incarnation: *osd.incarnation.borrow(),
            pool: pg.pool.0,
            index: pg.index,
            interval: record.interval.0,
            ..Default::default()
        };
        let (client, turns) = (osd.client.clone(), osd.turns.clone());
        calls.spawn(async move {
            let _turn = turns.acquire().await?;
            let call = |m: MonitorClient| async move {
                match kind {
                    Kind::Activated => m.osd().pg_activated(report).await,
                    Kind::Clean => m.osd().pg_clean(report).await,
                }
            };
            let answered: Result<Empty, _> = client.until_answered("report", call).await;
            answered?;
            anyhow::Ok(begun.elapsed().as_secs_f64())
        });
    }
    let (mut reports, mut slowest_s) = (0, 0.0f64);
    while let Some(answered) = calls.join_next().await {
        slowest_s = slowest_s.max(answered??);
        reports += 1;
    }
    all_see(osds, what, |m| match kind {
        Kind::Activated => m.pgs.values().all(|r| r.activated),
        Kind::Clean => m.pgs.values().all(|r| r.clean),
    })
    .await?;
    let epochs = osds[0].map.borrow().epoch.0 - map.epoch.0;
    let elapsed_s = begun.elapsed().as_secs_f64();
    Ok(Round { what, reports, elapsed_s, slowest_s, epochs, cpu_s: cpu::of_self_s() - cpu })
}

pub async fn measure(o: &AgreementOptions, mut told: impl FnMut(&Round) -> Result<()>) -> Result<()> {
    ensure!(!o.dir.exists(), "{} exists: it is left alone", o.dir.display());
    let monitors = Monitors::start(&o.dir, o.monitors).await?;
    let mut osds = Vec::new();
    for n in 0..o.osds {
        osds.push(Osd::add(&monitors.addrs, n).await?);
    }
    for osd in &osds {
        osd.boot().await?;
    }
    let pool = pb::CreatePoolRequest {
        name: "p".into(),
        redundancy: Some(pb::Redundancy { kind: Some(pb::redundancy::Kind::Replicas(3)) }),
        pg_count: o.groups,
        ..Default::default()
    };
    let call = |m: MonitorClient| {
        let pool = pool.clone();
        async move { m.admin().create_pool(pool).await }
    };
    osds[0].client.until_answered("create", call).await?;
    for (activated, clean) in
        [("made: active", "made: clean"), ("booted again: active", "booted again: clean")]
    {
        let epoch = osds[0].map.borrow().epoch;
        if epoch > Epoch(0) && activated.starts_with("booted") {
            for osd in &osds {
                osd.boot().await?;
            }
        }
        let ready = |m: &ClusterMap| {
            let current = |id: &OsdId| {
                let osd = osds.iter().find(|o| OsdId(o.id) == *id);
                osd.zip(m.up_osd(*id)).is_some_and(|(o, up)| *o.incarnation.borrow() == up.incarnation.0)
            };
            m.osds.keys().all(current)
                && m.pgs.len() == o.groups as usize
                && m.pgs.values().all(|r| !r.activated)
        };
        all_see(&osds, "new intervals", ready).await?;
        told(&round(&osds, activated, Kind::Activated).await?)?;
        told(&round(&osds, clean, Kind::Clean).await?)?;
    }
    drop(osds);
    monitors.end().await
}

pub fn run(o: &AgreementOptions, out: &mut impl Write) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    writeln!(out, "# {} monitors, {} groups, {} OSDs that follow the map", o.monitors, o.groups, o.osds)?;
    let result = runtime.block_on(measure(o, |r| {
        writeln!(
            out,
            "{}: {} reports in {:.2} s, {:.0} a second (slowest answer after {:.2} s), {} epochs, {:.2} s of CPU of everything",
            r.what,
            r.reports,
            r.elapsed_s,
            r.reports as f64 / r.elapsed_s,
            r.slowest_s,
            r.epochs,
            r.cpu_s
        )?;
        Ok(out.flush()?)
    }));
    drop(runtime);
    let _ = std::fs::remove_dir_all(&o.dir);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn three_monitors_agree_on_all_reports_of_many_groups() {
        let root = tempfile::tempdir().unwrap();
        let o = AgreementOptions { dir: root.path().join("m"), monitors: 3, groups: 64, osds: 4 };
        let mut rounds = Vec::new();
        measure(&o, |r| {
            rounds.push((r.what, r.reports, r.epochs));
            Ok(())
        })
        .await
        .unwrap();
        let whats: Vec<_> = rounds.iter().map(|r| r.0).collect();
        assert_eq!(whats, ["made: active", "made: clean", "booted again: active", "booted again: clean"]);
        assert!(rounds.iter().all(|(_, reports, epochs)| (*reports, *epochs) == (64, 64)), "{rounds:?}");
    }
}
