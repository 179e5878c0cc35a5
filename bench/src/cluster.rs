//! A development cluster to measure: started by `gabion dev up`, two volumes, one export of each kind.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::harness::{self, Plan};
use crate::job::{Job, Pattern};
use crate::target::{Kind, Target};

const READY: Duration = Duration::from_secs(60);

#[derive(Args, Clone, Debug)]
pub struct ClusterOptions {
    /// The command line tool to start the cluster with.
    #[arg(long, default_value = "gabion")]
    pub gabion: PathBuf,
    /// Where the cluster and the raw file live; the same disk for both, or they do not compare.
    #[arg(long)]
    pub dir: PathBuf,
    #[arg(long, default_value_t = 3)]
    pub osds: u32,
    /// Volumes in an erasure-coded pool instead of three copies.
    #[arg(long, value_name = "K+M")]
    pub ec: Option<String>,
    /// Leave the cluster running at the end.
    #[arg(long)]
    pub keep: bool,
    /// A Ceph cluster to compare with: arguments for fio, such as "--ioengine=rbd --clientname=admin --pool=p --rbdname=i".
    #[arg(long, requires = "ceph_pids")]
    pub ceph: Option<String>,
    /// Its daemons, as PID,PID.
    #[arg(long, value_delimiter = ',')]
    pub ceph_pids: Vec<i32>,
}

pub fn run(options: &ClusterOptions, plan: &Plan, out: &mut impl Write) -> Result<()> {
    plan.jobs()?;
    std::fs::create_dir_all(&options.dir)
        .with_context(|| format!("cannot make {}", options.dir.display()))?;
    let cluster = Cluster { gabion: options.gabion.clone(), dir: options.dir.join("cluster") };
    // Room for both volumes' copies on each OSD, and as much again for journal, index and slack.
    cluster.start(options.osds, plan.size * 4 + (4 << 30), &[])?;
    let volumes = ["bench-nbd", "bench-vhost"];
    let made = volumes.iter().try_for_each(|name| cluster.volume(options.ec.as_deref(), name, plan.size));
    let result = made.and_then(|()| cluster.measure(options, plan, out));
    if options.keep {
        writeln!(out, "# the cluster in {} keeps running", cluster.dir.display())?;
        return result;
    }
    result.and(cluster.stop())
}

pub struct Cluster {
    pub gabion: PathBuf,
    pub dir: PathBuf,
}

impl Cluster {
    pub fn dir_text(&self) -> Result<String> {
        self.dir.to_str().map(str::to_owned).context("the directory's name is not UTF-8")
    }

    /// A cluster of `osds` OSDs, each on a host of its own.
    pub fn start(&self, osds: u32, osd_bytes: u64, more: &[&str]) -> Result<()> {
        let (osds, size) = (osds.to_string(), osd_bytes.to_string());
        let dir = self.dir_text()?;
        let args = ["dev", "up", "--dir", &dir, "--osds", &osds, "--hosts", &osds, "--osd-size", &size];
        self.gabion(&[&args, more].concat()).map(|_| ())
    }

    pub fn stop(&self) -> Result<()> {
        self.gabion(&["dev", "down", "--wipe", "--dir", &self.dir_text()?]).map(|_| ())
    }

    /// A volume in the pool `bench`, which is made where it is not there: three copies or that code.
    pub fn volume(&self, code: Option<&str>, name: &str, bytes: u64) -> Result<()> {
        let redundancy = match code {
            Some(code) => ["--ec", code],
            None => ["--replicas", "3"],
        };
        let pools: Value = serde_json::from_str(&self.gabion(&["-o", "json", "pool", "ls"])?)
            .context("pool ls did not answer JSON")?;
        let there = pools["pools"].as_array().is_some_and(|p| p.iter().any(|p| p["name"] == "bench"));
        if !there {
            self.gabion(&[&["pool", "create", "bench"], &redundancy[..]].concat())?;
        }
        self.gabion(&["volume", "create", name, "--size", &bytes.to_string(), "--pool", "bench"])?;
        Ok(())
    }

    fn measure(&self, options: &ClusterOptions, plan: &Plan, out: &mut impl Write) -> Result<()> {
        let pids = self.pids()?;
        let raw = options.dir.join("raw.img");
        let uri = self.export("bench-nbd", "--nbd", "uri")?;
        let socket = PathBuf::from(self.export("bench-vhost", "--vhost-user", "socket")?);
        wait_for(&socket)?;
        let fio = |args: Vec<String>| Kind::Fio(args);
        let mut targets = vec![
            Target {
                name: "raw".to_owned(),
                kind: fio(vec![
                    "--ioengine=io_uring".into(),
                    format!("--filename={}", raw.display()),
                    "--sync=dsync".into(),
                ]),
                pids: Vec::new(),
            },
            Target {
                name: "gabion-nbd".to_owned(),
                kind: fio(vec!["--ioengine=nbd".into(), format!("--uri={uri}")]),
                pids: pids.clone(),
            },
            Target { name: "gabion-vhost".to_owned(), kind: Kind::Vhost(socket), pids },
        ];
        match &options.ceph {
            Some(args) => targets.push(Target {
                name: "ceph".to_owned(),
                kind: fio(args.split_whitespace().map(str::to_owned).collect()),
                pids: options.ceph_pids.clone(),
            }),
            None => writeln!(out, "# ceph: not shown (no --ceph cluster given)")?,
        }
        // Written once even where the rest is not filled: an unwritten file makes every flush a journal commit of the file system.
        if plan.no_fill {
            let fill = Job::new("fill", Pattern::Write, 1 << 20, 8);
            if let Kind::Fio(args) = &targets[0].kind {
                crate::fio::run(args, &fill, plan.size, None)?;
            }
        }
        let runs = harness::run(&targets, plan, out);
        let _ = std::fs::remove_file(raw);
        let runs = runs?;
        let single = plan.jobs()?.into_iter().find(|job| job.pattern == Pattern::RandWrite && job.depth == 1);
        if let Some(job) = single.filter(|_| options.ec.is_none()) {
            crate::floor::compare(&options.dir, &job, &runs, (plan.rounds, plan.secs, plan.size), out)?;
        }
        Ok(())
    }

    pub fn export(&self, volume: &str, kind: &str, field: &str) -> Result<String> {
        let answer = self.gabion(&["-o", "json", "export", "add", volume, kind])?;
        let answer: Value = serde_json::from_str(&answer).context("export add did not answer JSON")?;
        let value = answer[field].as_str().filter(|value| !value.is_empty());
        Ok(value.with_context(|| format!("export add answered no {field}: {answer}"))?.to_owned())
    }

    pub fn pids(&self) -> Result<Vec<i32>> {
        let status = self.gabion(&["-o", "json", "dev", "status", "--dir", &self.dir_text()?])?;
        let status: Value = serde_json::from_str(&status).context("dev status did not answer JSON")?;
        let daemons = status["daemons"].as_array().context("dev status lists no daemons")?;
        // One that stays down has none.
        let running = daemons.iter().filter(|daemon| !daemon["pid"].is_null());
        running
            .map(|daemon| {
                let pid = daemon["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
                pid.with_context(|| format!("a daemon without a pid: {daemon}"))
            })
            .collect()
    }

    pub fn gabion(&self, args: &[&str]) -> Result<String> {
        let out = Command::new(&self.gabion)
            .env("GABION_CONFIG", self.dir.join("client.toml"))
            .args(args)
            .output()
            .with_context(|| format!("cannot start {}", self.gabion.display()))?;
        if !out.status.success() {
            bail!("gabion {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

fn wait_for(socket: &Path) -> Result<()> {
    let end = Instant::now() + READY;
    while !socket.exists() {
        if Instant::now() > end {
            bail!("{} did not appear in {} s", socket.display(), READY.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
