//! `gabion dev status`: every daemon with its pid and address.

use super::layout::{Kind, Layout};
use crate::commands::Context as Cli;
use crate::rpc::Monitors;
use anyhow::{Context, Result};
use gabion_proto::pb;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const LEADER_WITHIN: Duration = Duration::from_secs(2);

pub async fn run(cli: &Cli, dir: &Path) -> Result<()> {
    let layout = Layout::new(dir)?;
    let state = layout
        .state()?
        .with_context(|| format!("no cluster in {}; start one with gabion dev up", layout.dir.display()))?;
    let leader = leader(&layout).await;
    let rows: Vec<Value> = state
        .daemons
        .iter()
        .map(|d| {
            let running = d.is_running();
            let mut row = json!({
                "kind": d.kind.name(),
                "id": d.id,
                "state": if running { "running" } else { "down" },
                "pid": d.process.filter(|_| running).map(|p| p.pid),
                "addr": d.addr().filter(|_| running),
                "metrics_addr": d.metrics_addr().filter(|_| running),
                "data_dir": d.data_dir,
                "restarts": d.restarts,
                "last_exit": d.last_exit,
            });
            if d.kind == Kind::Monitor {
                row["leader"] = json!(running && leader.map(|id| id.to_string()).as_ref() == Some(&d.id));
            }
            row
        })
        .collect();
    cli.out.list("daemons", rows, &["kind", "id", "state", "pid", "addr", "leader", "restarts", "data_dir"])
}

/// None when no monitor answers.
async fn leader(layout: &Layout) -> Option<u64> {
    let monitors = Monitors::new(crate::config::read(&layout.client_toml()).ok()?).ok()?;
    let call = async { crate::rpc!(monitors, "status", status.get_status, pb::Empty {}) };
    let status = tokio::time::timeout(LEADER_WITHIN, call).await.ok()?.ok()?;
    status.monitors.iter().find(|m| m.leader).map(|m| m.id)
}
