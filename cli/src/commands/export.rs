//! `gabion export`: volumes served by a gateway.

use super::Context;
use crate::args::ExportVerb;
use crate::output::removed;
use crate::rpc;
use crate::rpc::Monitors;
use anyhow::{Result, bail};
use gabion_proto::pb::{self, AddExportRequest, ExportInfo, ExportKind, ExportRequest, ExportState};
use serde_json::{Value, json};
use std::time::Duration;

const POLL: Duration = Duration::from_millis(50);

pub async fn run(cx: &Context, verb: ExportVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    match verb {
        ExportVerb::Add { volume, nbd: _, vhost_user, read_only, host, timeout_secs } => {
            let kind = if vhost_user { ExportKind::VhostUser } else { ExportKind::Nbd };
            let request =
                AddExportRequest { volume, kind: kind.into(), read_only, host: host.unwrap_or_default() };
            let export = add(&monitors, request, Duration::from_secs(timeout_secs)).await?;
            let place = if vhost_user { &export.socket } else { &export.uri };
            cx.out.done(place, export_json(&export))
        }
        ExportVerb::Ls => {
            let rows = list(&monitors).await?.iter().map(export_json).collect();
            let columns =
                ["id", "volume", "kind", "read_only", "host", "state", "uri", "socket", "vm", "error"];
            cx.out.list("exports", rows, &columns)
        }
        ExportVerb::Rm { export } => {
            let exports = list(&monitors).await?;
            let id = match export.parse::<u64>() {
                Ok(id) => id,
                Err(_) => match exports.iter().filter(|e| e.volume == export).collect::<Vec<_>>()[..] {
                    [one] => one.id,
                    [] => bail!("export {export}: no export of that volume; see gabion export ls"),
                    _ => bail!(
                        "export {export}: the volume has several; name one by its id (gabion export ls)"
                    ),
                },
            };
            rpc!(monitors, format!("export {id}"), admin.remove_export, ExportRequest { id })?;
            cx.out.done(&format!("export {id} removed"), removed(id))
        }
    }
}

pub async fn list(monitors: &Monitors) -> Result<Vec<ExportInfo>> {
    Ok(rpc!(monitors, "export list", admin.list_exports, pb::Empty {})?.exports)
}

/// Adds an export and waits until its gateway serves it; takes it back when that fails.
pub async fn add(monitors: &Monitors, request: AddExportRequest, timeout: Duration) -> Result<ExportInfo> {
    let volume = request.volume.clone();
    let export = rpc!(monitors, format!("volume {volume}"), admin.add_export, request)?;
    let id = export.id;
    let ready = async {
        loop {
            match list(monitors).await?.into_iter().find(|e| e.id == id) {
                Some(e) if e.state() == ExportState::Ready => return Ok(e),
                Some(e) if e.state() == ExportState::Failed => {
                    bail!("volume {volume}: host {} cannot serve it: {}", e.host, e.error)
                }
                None => bail!("volume {volume}: its export was removed meanwhile"),
                Some(_) => tokio::time::sleep(POLL).await,
            }
        }
    };
    let interrupted = tokio::signal::ctrl_c();
    let result = tokio::select! {
        ready = tokio::time::timeout(timeout, ready) => ready.unwrap_or_else(|_| Err(anyhow::anyhow!(
            "volume {volume}: the gateway on host {} does not serve it after {} s; is it up? (gabion host ls)",
            export.host,
            timeout.as_secs()
        ))),
        _ = interrupted => Err(anyhow::anyhow!("volume {volume}: interrupted, the export is removed again")),
    };
    if result.is_err() {
        // The first error is the one to tell.
        let _ = remove(monitors, id).await;
    }
    result
}

pub async fn remove(monitors: &Monitors, id: u64) -> Result<()> {
    rpc!(monitors, format!("export {id}"), admin.remove_export, ExportRequest { id })?;
    Ok(())
}

fn export_json(e: &ExportInfo) -> Value {
    let kind = match e.kind() {
        ExportKind::Nbd => "nbd",
        ExportKind::VhostUser => "vhost-user",
        ExportKind::Unspecified => "unknown",
    };
    let state = match e.state() {
        ExportState::Pending => "pending",
        ExportState::Ready => "ready",
        ExportState::Failed => "failed",
        ExportState::Unspecified => "unknown",
    };
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "id": e.id,
        "volume": e.volume,
        "kind": kind,
        "read_only": e.read_only,
        "host": e.host,
        "state": state,
        "uri": given(&e.uri),
        "socket": given(&e.socket),
        "error": e.error,
        "vm": e.vm,
    })
}
