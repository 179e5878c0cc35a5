//! `gabion host`.

use super::Context;
use crate::args::HostVerb;
use crate::rpc;
use anyhow::{Result, bail};
use gabion_proto::pb::{self, HostInfo};
use serde_json::{Value, json};

pub async fn run(cx: &Context, verb: HostVerb) -> Result<()> {
    let hosts = rpc!(cx.monitors()?, "host list", admin.list_hosts, pb::Empty {})?.hosts;
    match verb {
        HostVerb::Ls => {
            let rows = hosts.iter().map(host_json).collect();
            let columns = ["name", "gateway_up", "agent_up", "cpus", "memory_bytes", "accelerator", "vms"];
            cx.out.list("hosts", rows, &columns)
        }
        HostVerb::Show { name } => match hosts.iter().find(|h| h.name == name) {
            Some(host) => cx.out.show(&host_json(host)),
            None => bail!("host {name}: no gateway or agent ever reported from it; see gabion host ls"),
        },
    }
}

fn host_json(h: &HostInfo) -> Value {
    json!({
        "name": h.name,
        "gateway_up": h.gateway_up,
        "agent_up": h.agent_up,
        "agent_addr": h.agent_addr,
        "cpus": h.cpus,
        "memory_bytes": h.memory_bytes,
        "accelerator": h.accelerator,
        "vms": h.vms,
    })
}
