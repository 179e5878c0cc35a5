//! A development cluster of real daemons in a temporary directory, driven through the `gabion`
//! command only, as an operator would.
//!
//! The binaries are those beside the test in `target/<profile>/`. Dropping the cluster stops it.
//!
//! [`Cluster::spread`] makes one whose daemons run on hosts with networks of their own (`net`) instead, started by the test itself.

use crate::net::Net;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const POLL: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Cluster {
    gabion: PathBuf,
    dir: TempDir,
    /// None: they are supervised by `gabion dev`.
    spread: Option<Spread>,
}

/// Daemons on hosts of their own: the gateway, and who operates the cluster, on host 0, OSDs on the others, monitors on as many of them.
struct Spread {
    net: Net,
    /// By name, as `osd.1`.
    daemons: BTreeMap<String, Daemon>,
}

struct Daemon {
    host: u8,
    process: Child,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended, or it ends now.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Where an exported volume is served.
pub struct Exported {
    /// Over TCP.
    pub uri: String,
    /// The same over a Unix socket: its path outlives a restart of the gateway.
    pub socket: PathBuf,
}

/// The daemons of a cluster and the command itself.
const BINARIES: [&str; 4] = ["gabion", "gabion-monitor", "gabion-osd", "gabion-gateway"];

impl Cluster {
    /// Starts 1 monitor and `osds` OSDs of 512 MiB, each on a host of its own.
    pub fn start(osds: u32) -> Result<Cluster> {
        Cluster::start_with(1, osds, "512M")
    }

    /// The same with TLS between all daemons.
    pub fn start_tls(monitors: u32, osds: u32) -> Result<Cluster> {
        Cluster::start_tls_with(monitors, osds, &[])
    }

    /// The same with more options of `gabion dev up`.
    pub fn start_tls_with(monitors: u32, osds: u32, more: &[&str]) -> Result<Cluster> {
        Cluster::up(monitors, osds, "512M", &[&["--tls"], more].concat())
    }

    pub fn start_sized(osds: u32, osd_size: &str) -> Result<Cluster> {
        Cluster::start_with(1, osds, osd_size)
    }

    /// The same with 1, 3 or 5 monitors.
    pub fn start_with(monitors: u32, osds: u32, osd_size: &str) -> Result<Cluster> {
        Cluster::up(monitors, osds, osd_size, &[])
    }

    fn at(spread: Option<Spread>) -> Result<Cluster> {
        // .../target/PROFILE/deps/TEST
        let test = std::env::current_exe()?;
        let bin = test.ancestors().nth(2).context("the test is not in a target directory")?;
        for name in BINARIES {
            let path = bin.join(name);
            ensure!(path.exists(), "{} is missing: run `cargo build --bins` first", path.display());
        }
        let dir = tempfile::Builder::new().prefix("gab").tempdir()?;
        Ok(Cluster { gabion: bin.join("gabion"), dir, spread })
    }

    fn up(monitors: u32, osds: u32, osd_size: &str, more: &[&str]) -> Result<Cluster> {
        let cluster = Cluster::at(None)?;
        let n = osds.to_string();
        let monitors = monitors.to_string();
        let args = [
            "dev",
            "up",
            "--dir",
            cluster.path(),
            "--monitors",
            &monitors,
            "--osds",
            &n,
            "--hosts",
            &n,
            "--osd-size",
            osd_size,
        ];
        cluster.run(&[&args, more].concat())?;
        Ok(cluster)
    }

    /// The gateway on host 0, OSDs on hosts 1 to `osds`, monitors on the first of these. None, and why on the console: that cannot
    /// be done here.
    pub fn spread(monitors: u8, osds: u8) -> Result<Option<Cluster>> {
        let Some(net) = Net::of(osds + 1)? else { return Ok(None) };
        let mut cluster = Cluster::at(Some(Spread { net, daemons: BTreeMap::new() }))?;
        let addrs: Vec<String> = (1..=monitors).map(|host| format!("{}:7000", Net::addr(host))).collect();
        fs::create_dir(cluster.dir.path().join("log"))?;
        fs::write(cluster.dir.path().join("client.toml"), format!("monitors = {addrs:?}\n"))?;
        for (id, addr) in (1..).zip(&addrs) {
            let begin = if id == 1 { "--bootstrap" } else { "--join" };
            let args = ["--insecure", "--id", &id.to_string(), "--listen", addr, begin, "--data-dir"];
            cluster.launch(id, &format!("monitor.{id}"), &args)?;
        }
        for addr in &addrs[1..] {
            cluster.until("the monitor is added", |c| c.run(&["monitor", "add", addr]))?;
        }
        for host in 1..=osds {
            let addrs = addrs.join(",");
            let (name, listen) = (format!("osd.{host}"), format!("{}:7100", Net::addr(host)));
            let common = ["--monitors", &addrs, "--host", &format!("host{host}"), "--data-dir"];
            let format = [&["format", "--size", "512M"], &common[..]].concat();
            let mut command = cluster.command_at(host, &cluster.binary("gabion-osd"));
            let out = command.args(format).arg(cluster.dir.path().join(&name)).output()?;
            ensure!(out.status.success(), "format: {}", String::from_utf8_lossy(&out.stderr));
            cluster.launch(
                host,
                &name,
                &[&["run", "--insecure", "--listen", &listen], &common[..]].concat(),
            )?;
        }
        let addrs = addrs.join(",");
        // Clients come by its Unix sockets, which know no hosts.
        let args = ["--monitors", &addrs, "--host", "host0", "--run-dir"];
        cluster.launch(0, "gateway.host0", &args)?;
        cluster.wait_for("every OSD is up", PATIENCE, |s| Some(s["osds_up"] == u64::from(osds)))?;
        Ok(Some(cluster))
    }

    /// Starts a daemon at a host; the last argument is its directory.
    fn launch(&mut self, host: u8, name: &str, args: &[&str]) -> Result<()> {
        let dir = self.dir.path().join(name);
        fs::create_dir_all(&dir)?;
        let log = fs::File::create(self.dir.path().join("log").join(format!("{name}.log")))?;
        let kind = name.split('.').next().unwrap_or(name);
        let mut command = self.command_at(host, &self.binary(&format!("gabion-{kind}")));
        command.args(args).arg(dir).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().context("cannot start ip: install iproute2")?;
        let spread = self.spread.as_mut().context("only daemons that are spread are started here")?;
        spread.daemons.insert(name.to_owned(), Daemon { host, process });
        Ok(())
    }

    /// A program at a host, if there are any.
    fn command_at(&self, host: u8, program: &Path) -> Command {
        let Some(spread) = &self.spread else { return Command::new(program) };
        let enter = spread.net.enter(host);
        let mut command = Command::new(&enter[0]);
        command.args(&enter[1..]).arg(program);
        command
    }

    /// What daemons that are spread send each other.
    pub fn net(&self) -> Result<&Net> {
        Ok(&self.spread.as_ref().context("all daemons are on one host")?.net)
    }

    /// Where a daemon runs.
    pub fn host(&self, daemon: &str) -> Result<u8> {
        let known = self.spread.as_ref().and_then(|s| s.daemons.get(daemon));
        Ok(known.with_context(|| format!("there is no {daemon} on a host of its own"))?.host)
    }

    /// Does something again until it is done.
    fn until<T>(&self, what: &str, act: impl Fn(&Cluster) -> Result<T>) -> Result<T> {
        let started = Instant::now();
        loop {
            match act(self) {
                Ok(done) => return Ok(done),
                Err(e) if started.elapsed() > PATIENCE => return Err(e.context(what.to_owned())),
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// A pool with three copies and a volume in it, exported by NBD.
    pub fn volume(&self, name: &str, size: &str) -> Result<Exported> {
        self.volume_in(&["--replicas", "3"], name, size)
    }

    /// A pool with that redundancy and a volume in it, exported by NBD.
    pub fn volume_in(&self, redundancy: &[&str], name: &str, size: &str) -> Result<Exported> {
        self.run(&[&["pool", "create", "p", "--pgs", "16"], redundancy].concat())?;
        self.run(&["volume", "create", name, "--size", size, "--pool", "p"])?;
        let export = self.json(&["export", "add", name, "--nbd"])?;
        let field = |name: &str| {
            export[name]
                .as_str()
                .map(str::to_owned)
                .with_context(|| format!("export add answered no {name}: {export}"))
        };
        Ok(Exported { uri: field("uri")?, socket: field("socket")?.into() })
    }

    /// The path of a daemon's binary.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.gabion.with_file_name(name)
    }

    /// Runs `gabion` and answers what it printed.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        self.run_by(&self.dir.path().join("client.toml"), args)
    }

    /// The same with another config file.
    pub fn run_by(&self, config: &Path, args: &[&str]) -> Result<String> {
        let out = self
            .command_at(0, &self.gabion)
            .args(args)
            .env("GABION_CONFIG", config)
            .env_remove("GABION_MONITORS")
            .stdin(Stdio::null())
            .output()?;
        if !out.status.success() {
            bail!("gabion {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(String::from_utf8(out.stdout)?)
    }

    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.run(&[&["-o", "json"], args].concat())?;
        serde_json::from_str(&text).with_context(|| format!("gabion {} is not JSON", args.join(" ")))
    }

    /// The daemons as `gabion dev status` lists them.
    pub fn daemons(&self) -> Result<Vec<Value>> {
        let mut status = self.json(&["dev", "status", "--dir", self.path()])?;
        match status["daemons"].take() {
            Value::Array(daemons) => Ok(daemons),
            other => bail!("dev status lists no daemons: {other}"),
        }
    }

    /// SIGKILL; `stay_down` until [`Cluster::revive`].
    pub fn kill(&self, daemon: &str, stay_down: bool) -> Result<()> {
        let mut args = vec!["dev", "kill", daemon, "--dir", self.path()];
        if stay_down {
            args.push("--stay-down");
        }
        self.run(&args).map(drop)
    }

    /// SIGKILL to every daemon at once; the supervisor starts them again.
    pub fn kill_all(&self) -> Result<()> {
        self.daemons()?.iter().for_each(|d| signal(d, libc::SIGKILL));
        Ok(())
    }

    /// SIGSTOP: it does nothing until [`Cluster::resume`], and does not know it.
    pub fn pause(&self, daemon: &str) -> Result<()> {
        signal(&self.daemon(daemon)?, libc::SIGSTOP);
        Ok(())
    }

    /// SIGCONT.
    pub fn resume(&self, daemon: &str) -> Result<()> {
        signal(&self.daemon(daemon)?, libc::SIGCONT);
        Ok(())
    }

    pub fn revive(&self, daemon: &str) -> Result<()> {
        self.run(&["dev", "start", daemon, "--dir", self.path()]).map(drop)
    }

    /// The names of the daemons of one kind, as `osd.1`.
    pub fn names(&self, kind: &str) -> Result<Vec<String>> {
        let daemons = self.daemons()?;
        let of_kind = daemons.iter().filter(|d| d["kind"] == kind);
        of_kind.map(|d| Ok(format!("{kind}.{}", d["id"].as_str().context("a daemon without id")?))).collect()
    }

    /// The monitor that leads.
    pub fn leader(&self) -> Result<String> {
        let monitors = self.json(&["monitor", "ls"])?;
        let monitors = monitors["monitors"].as_array().context("monitor ls")?;
        let leads = monitors.iter().find(|m| m["leader"] == true).context("no monitor leads")?;
        Ok(format!("monitor.{}", leads["id"]))
    }

    /// Waits until every group is active and clean and every OSD is up.
    pub fn wait_clean(&self, within: Duration) -> Result<()> {
        self.wait_for("every group active+clean", within, |status| {
            let states = status["pgs_by_state"].as_object()?;
            let clean = states.len() == 1 && states.contains_key("active+clean");
            Some(clean && status["osds_up"] == status["osds"])
        })
    }

    /// Waits until `condition` holds of the answer of `gabion status`.
    pub fn wait_for(
        &self,
        what: &str,
        within: Duration,
        condition: impl Fn(&Value) -> Option<bool>,
    ) -> Result<()> {
        let started = Instant::now();
        loop {
            let status = self.json(&["status"]);
            if status.as_ref().is_ok_and(|s| condition(s) == Some(true)) {
                return Ok(());
            }
            if started.elapsed() > within {
                bail!("{what}: not so after {} s; status: {status:?}", within.as_secs());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until no host has the volume attached.
    pub fn detached(&self, volume: &str) -> Result<()> {
        let started = Instant::now();
        loop {
            let shown = self.json(&["volume", "show", volume])?;
            if shown["attached_host"] == "" {
                return Ok(());
            }
            ensure!(started.elapsed() < PATIENCE, "volume {volume} stays attached: {shown}");
            std::thread::sleep(POLL);
        }
    }

    /// Removes a volume whose export was just removed.
    pub fn removed(&self, volume: &str) -> Result<()> {
        self.detached(volume)?;
        self.run(&["--yes", "volume", "rm", volume]).map(drop)
    }

    /// What a daemon has printed so far.
    pub fn log(&self, daemon: &str) -> Result<String> {
        let path = self.dir.path().join("log").join(format!("{daemon}.log"));
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// What `gabion dev status` says of a daemon.
    fn daemon(&self, daemon: &str) -> Result<Value> {
        let (kind, id) = daemon.split_once('.').context("not KIND.ID")?;
        let found = self.daemons()?.into_iter().find(|d| d["kind"] == kind && d["id"] == id);
        found.with_context(|| format!("there is no {daemon}"))
    }

    /// Where a daemon listens.
    pub fn addr(&self, daemon: &str) -> Result<String> {
        let found = self.daemon(daemon)?;
        found["addr"].as_str().map(str::to_owned).with_context(|| format!("{daemon} has no address"))
    }

    fn path(&self) -> &str {
        // Temporary directories that are made here have ASCII names below TMPDIR.
        self.dir.path().to_str().unwrap_or_default()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = std::fs::read_dir(self.dir.path().join("log")).into_iter().flatten().flatten();
            for log in logs {
                let text = std::fs::read_to_string(log.path()).unwrap_or_default();
                let lines: Vec<_> = text.lines().collect();
                let tail = lines[lines.len().saturating_sub(15)..].join("\n");
                println!("== {}\n{tail}", log.file_name().display());
            }
        }
        if self.spread.is_some() {
            return;
        }
        if let Err(e) = self.run(&["dev", "down", "--dir", self.path()]) {
            println!("the cluster in {} is not stopped: {e:#}", self.dir.path().display());
        }
    }
}

/// To a daemon as `gabion dev status` lists it.
fn signal(daemon: &Value, signal: i32) {
    if let Some(pid) = daemon["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()) {
        // SAFETY: a signal to a process of this cluster, which its supervisor has not reaped before.
        unsafe { libc::kill(pid, signal) };
    }
}
