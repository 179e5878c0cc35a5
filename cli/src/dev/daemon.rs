//! One daemon under supervision: a task that starts it, waits for its end and starts it again.
//!
//! ```text
//!            spawn            exit            restart: after a back-off
//!  Down ───────────▶ Running ──────▶ Ended ────────────────────────────▶ Running
//!   ▲                   │               │ no restart, or stopped on purpose
//!   └───────────────────┴───────────────┘
//! ```

use super::layout::{DaemonState, Kind};
use super::process::Process;
use rustix::process::Signal;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};

const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A daemon that ran for this long starts again without a wait.
const STABLE: Duration = Duration::from_secs(10);
/// How long a daemon may take to stop cleanly.
const STOP_WITHIN: Duration = Duration::from_secs(8);

/// How to run it.
pub struct Spec {
    pub kind: Kind,
    pub id: String,
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub data_dir: PathBuf,
    pub log: PathBuf,
    pub restart: bool,
    /// Data directories of the other monitors.
    pub siblings: Vec<PathBuf>,
}

impl Spec {
    pub fn name(&self) -> String {
        format!("{}.{}", self.kind.name(), self.id)
    }
}

pub enum Order {
    Start,
    /// SIGTERM, then SIGKILL; stays down.
    Stop,
    Kill {
        stay_down: bool,
    },
}

/// An order; the sender gets the process's name back when it is carried out, or why not.
pub type Request = (Order, oneshot::Sender<Result<(), String>>);

/// Something changed; goes to the owner of `supervisor.json`.
pub struct Change {
    pub daemon: DaemonState,
}

/// Runs until `requests` closes, then leaves the daemon as it is.
pub async fn run(spec: Spec, mut requests: mpsc::Receiver<Request>, changes: mpsc::Sender<Change>) {
    let mut daemon = DaemonState {
        kind: spec.kind,
        id: spec.id.clone(),
        data_dir: spec.data_dir.clone(),
        process: None,
        restarts: 0,
        last_exit: None,
    };
    let mut child = None;
    let mut started = Instant::now();
    let mut backoff = BACKOFF_MIN;
    let mut start_at: Option<tokio::time::Instant> = Some(tokio::time::Instant::now());
    loop {
        tokio::select! {
            request = requests.recv() => {
                let Some((order, answer)) = request else { return };
                let result = match (order, &mut child) {
                    (Order::Start, Some(_)) => Ok(()),
                    (Order::Start, None) => {
                        start_at = Some(tokio::time::Instant::now());
                        backoff = BACKOFF_MIN;
                        Ok(())
                    }
                    (Order::Stop, running) => {
                        start_at = None;
                        if let Some(running) = running {
                            daemon.last_exit = Some(stop(running, Signal::TERM).await);
                            daemon.process = None;
                        }
                        child = None;
                        Ok(())
                    }
                    (Order::Kill { stay_down }, Some(running)) => {
                        daemon.last_exit = Some(stop(running, Signal::KILL).await);
                        daemon.process = None;
                        child = None;
                        start_at = (spec.restart && !stay_down).then(|| tokio::time::Instant::now() + BACKOFF_MIN);
                        Ok(())
                    }
                    (Order::Kill { stay_down }, None) => {
                        if stay_down {
                            start_at = None;
                        }
                        Err(format!("{} does not run", spec.name()))
                    }
                };
                // Known before it is answered.
                if changes.send(Change { daemon: daemon.clone() }).await.is_err() {
                    return;
                }
                let _ = answer.send(result);
            }
            status = ended(&mut child) => {
                child = None;
                daemon.process = None;
                daemon.last_exit = Some(describe(status));
                if started.elapsed() >= STABLE {
                    backoff = BACKOFF_MIN;
                }
                start_at = spec.restart.then(|| tokio::time::Instant::now() + backoff);
                backoff = (backoff * 2).min(BACKOFF_MAX);
                tracing::warn!(daemon = spec.name(), exit = daemon.last_exit, restart = spec.restart, "ended by itself");
                if changes.send(Change { daemon: daemon.clone() }).await.is_err() {
                    return;
                }
            }
            () = due(start_at) => {
                start_at = None;
                match spawn(&spec) {
                    Ok(new) => {
                        if daemon.last_exit.is_some() {
                            daemon.restarts += 1;
                        }
                        started = Instant::now();
                        daemon.process = new.id().and_then(Process::of);
                        child = Some(new);
                    }
                    Err(e) => {
                        daemon.last_exit = Some(format!("cannot start {}: {e}", spec.program.display()));
                        start_at = spec.restart.then(|| tokio::time::Instant::now() + backoff);
                        backoff = (backoff * 2).min(BACKOFF_MAX);
                    }
                }
                if changes.send(Change { daemon: daemon.clone() }).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn spawn(spec: &Spec) -> std::io::Result<Child> {
    std::fs::create_dir_all(&spec.data_dir)?;
    // Of the process before: nobody may take it for this one's.
    match std::fs::remove_file(gabion_common::addr_file::path(&spec.data_dir, spec.kind.name())) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let log: File = OpenOptions::new().create(true).append(true).open(&spec.log)?;
    let mut command = Command::new(&spec.program);
    // Asked at every start: a monitor that has its state goes on with it.
    if spec.kind == Kind::Monitor && is_empty(&spec.data_dir)? {
        // One whose data is lost must not make a new cluster while others still are the old one.
        let alone = spec
            .siblings
            .iter()
            .try_fold(true, |alone, dir| Ok::<_, std::io::Error>(alone && is_empty(dir)?))?;
        command.arg(if spec.id == "1" && alone { "--bootstrap" } else { "--join" });
    }
    command.args(&spec.args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

fn is_empty(dir: &Path) -> std::io::Result<bool> {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e),
    }
}

async fn stop(child: &mut Child, signal: Signal) -> String {
    if let Some(process) = child.id().and_then(Process::of) {
        process.signal(signal);
    }
    if let Ok(status) = tokio::time::timeout(STOP_WITHIN, child.wait()).await {
        return describe(status);
    }
    if let Err(e) = child.kill().await {
        return format!("cannot be killed: {e}");
    }
    "killed: it did not stop in time".to_owned()
}

async fn ended(child: &mut Option<Child>) -> std::io::Result<ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}

async fn due(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|e| e.to_string(), |s| s.to_string())
}
