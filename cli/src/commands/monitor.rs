//! `gabion monitor`.

use super::Context;
use crate::args::MonitorVerb;
use crate::output::removed;
use crate::rpc;
use anyhow::Result;
use gabion_proto::pb::{self, AddMonitorRequest, MonitorStatus, RemoveMonitorRequest};
use serde_json::{Value, json};

pub async fn run(cx: &Context, verb: MonitorVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    match verb {
        MonitorVerb::Ls => {
            let all = rpc!(monitors, "monitor list", admin.list_monitors, pb::Empty {})?.monitors;
            let rows = all.iter().map(monitor_json).collect();
            cx.out.list("monitors", rows, &["id", "addr", "leader", "up", "voter", "error"])
        }
        MonitorVerb::Add { addr } => {
            let request = AddMonitorRequest { addr: addr.to_string() };
            let added = rpc!(monitors, format!("monitor at {addr}"), admin.add_monitor, request)?;
            let sentence = format!("monitor {} at {} added", added.id, added.addr);
            cx.out.done(&sentence, monitor_json(&added))
        }
        MonitorVerb::Rm { id } => {
            let request = RemoveMonitorRequest { id: id.0 };
            rpc!(monitors, format!("monitor {}", id.0), admin.remove_monitor, request)?;
            cx.out.done(&format!("monitor {} removed", id.0), removed(id.0))
        }
    }
}

pub fn monitor_json(m: &MonitorStatus) -> Value {
    json!({
        "id": m.id,
        "addr": m.addr,
        "leader": m.leader,
        "up": m.up,
        "voter": m.voter,
        "error": Some(&m.error).filter(|e| !e.is_empty()),
    })
}
