//! `gabion snapshot`: what a volume was at one moment.

use super::{Context, volume::volume_json};
use crate::args::{SnapshotName, SnapshotVerb};
use crate::output::removed;
use crate::rpc;
use crate::size::human_exact;
use anyhow::Result;
use gabion_common::client::reader::{Change, VolumeReader};
use gabion_proto::pb::{ListSnapshotsRequest, SnapshotInfo, SnapshotRequest};
use serde_json::{Value, json};
use std::time::Duration;

const READ_WITHIN: Duration = Duration::from_secs(60);

pub async fn run(cx: &Context, verb: SnapshotVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    let request = |name: &SnapshotName| SnapshotRequest { snapshot: name.to_string() };
    match verb {
        SnapshotVerb::Create { snapshot } => {
            let info =
                rpc!(monitors, format!("snapshot {snapshot}"), admin.create_snapshot, request(&snapshot))?;
            cx.out.done(&format!("snapshot {snapshot} taken"), snapshot_json(&info))
        }
        SnapshotVerb::Ls { volume } => {
            let request = ListSnapshotsRequest { volume: volume.unwrap_or_default() };
            let found = rpc!(monitors, "snapshot list", admin.list_snapshots, request)?.snapshots;
            let rows = found.iter().map(snapshot_json).collect();
            cx.out.list("snapshots", rows, &["snapshot", "size_bytes", "unix_ms", "clones"])
        }
        SnapshotVerb::Rm { snapshot } => {
            cx.confirm(&format!("snapshot {snapshot}: what only it holds is destroyed"))?;
            rpc!(monitors, format!("snapshot {snapshot}"), admin.remove_snapshot, request(&snapshot))?;
            cx.out.done(&format!("snapshot {snapshot} removed"), removed(snapshot.to_string()))
        }
        SnapshotVerb::Rollback { snapshot } => {
            let volume = &snapshot.volume;
            cx.confirm(&format!("volume {volume}: what was written since {snapshot} is destroyed"))?;
            let info =
                rpc!(monitors, format!("snapshot {snapshot}"), admin.rollback_volume, request(&snapshot))?;
            cx.out.done(&format!("volume {volume} is again what {snapshot} holds"), volume_json(&info))
        }
        SnapshotVerb::Diff { snapshot, other } => {
            let other = other.unwrap_or_else(|| snapshot.volume.clone());
            let client = monitors.client();
            let base = VolumeReader::connect(client, &snapshot.to_string(), Some(READ_WITHIN)).await?;
            let newer = VolumeReader::connect(client, &other, Some(READ_WITHIN)).await?;
            let changes = newer.changes_since(&base).await?;
            let data: u64 = changes.iter().filter(|c| !c.zero).map(|c| c.len).sum();
            let total: u64 = changes.iter().map(|c| c.len).sum();
            if !cx.out.is_table() {
                return cx.out.value(&json!({ "changes": changes.iter().map(change).collect::<Vec<_>>() }));
            }
            cx.out.list(
                "changes",
                changes.iter().map(change).collect(),
                &["offset_bytes", "length_bytes", "kind"],
            )?;
            cx.out.text(&format!(
                "{other} differs from {snapshot} in up to {}, {} of them data",
                human_exact(total),
                human_exact(data)
            ))
        }
    }
}

fn change(c: &Change) -> Value {
    let kind = if c.zero { "zero" } else { "data" };
    json!({ "offset_bytes": c.offset, "length_bytes": c.len, "kind": kind })
}

fn snapshot_json(s: &SnapshotInfo) -> Value {
    json!({
        "id": s.id,
        "snapshot": format!("{}@{}", s.volume, s.name),
        "volume": s.volume,
        "name": s.name,
        "size_bytes": s.size_bytes,
        "layers": s.layers,
        "unix_ms": s.unix_ms,
        "clones": s.clones,
    })
}
