//! `gabion dev down`: the supervisor stops its daemons; what outlives it is stopped by pid and start
//! time.

use super::layout::{DaemonState, Kind, Layout, State};
use crate::commands::Context as Cli;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// Four kinds of daemons, each with its own deadline inside the supervisor.
const SUPERVISOR_WITHIN: Duration = Duration::from_secs(45);
const DAEMON_WITHIN: Duration = Duration::from_secs(8);
const KILL_WITHIN: Duration = Duration::from_secs(5);

pub async fn run(cli: &Cli, dir: &Path, wipe: bool) -> Result<()> {
    let layout = Layout::new(dir)?;
    let stopped = match layout.state()? {
        Some(state) => stop(&layout, &state).await?,
        None => 0,
    };
    if wipe && layout.dir.exists() {
        // Never removes a directory that is not ours.
        ensure!(
            layout.dev_toml().exists() || layout.state_file().exists(),
            "{}: not the directory of a development cluster (no dev.toml); nothing is removed",
            layout.dir.display()
        );
        std::fs::remove_dir_all(&layout.dir)
            .with_context(|| format!("cannot remove {}", layout.dir.display()))?;
    }
    let and = if wipe { "; its data is removed" } else { "" };
    let sentence = match stopped {
        0 => format!("no cluster runs in {}{and}", layout.dir.display()),
        n => format!("stopped {n} daemons in {}{and}", layout.dir.display()),
    };
    cli.out.done(&sentence, json!({ "stopped": stopped, "wiped": wipe }))
}

/// Stops everything that `state` knows; how many daemons ran.
pub async fn stop(layout: &Layout, state: &State) -> Result<usize> {
    let running = state.daemons.iter().filter(|d| d.is_running()).count();
    if state.supervisor.is_alive() {
        state.supervisor.signal(Signal::TERM);
        if !state.supervisor.gone_within(SUPERVISOR_WITHIN).await {
            state.supervisor.signal(Signal::KILL);
            state.supervisor.gone_within(KILL_WITHIN).await;
        }
    }
    // Daemons that it started meanwhile are in the file, too.
    let state = layout.state()?.unwrap_or_else(|| state.clone());
    for kind in [Kind::Host, Kind::Gateway, Kind::Osd, Kind::Monitor] {
        let left: Vec<&DaemonState> =
            state.daemons.iter().filter(|d| d.kind == kind && d.is_running()).collect();
        let processes: Vec<_> = left.iter().filter_map(|d| d.process).collect();
        processes.iter().for_each(|p| p.signal(Signal::TERM));
        for process in processes {
            if !process.gone_within(DAEMON_WITHIN).await {
                process.signal(Signal::KILL);
                if !process.gone_within(KILL_WITHIN).await {
                    bail!("process {} does not end even when killed; see dmesg for a hung disk", process.pid);
                }
            }
        }
    }
    // The socket of a supervisor that is gone.
    match std::fs::remove_file(layout.socket()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(running),
    }
}
