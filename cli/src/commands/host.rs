//! `gabion host`.

use super::Context;
use crate::args::HostVerb;
use crate::rpc;
use anyhow::{Result, bail};
use gabion_common::host_offer::HostOffer;
use gabion_proto::admission::HOST_RESERVE_BYTES;
use gabion_proto::pb::{self, HostInfo};
use serde_json::{Value, json};
use std::path::PathBuf;

pub async fn run(cx: &Context, verb: HostVerb) -> Result<()> {
    if matches!(verb, HostVerb::Check) {
        return check(cx);
    }
    let hosts = rpc!(cx.monitors()?, "host list", admin.list_hosts, pb::Empty {})?.hosts;
    match verb {
        HostVerb::Ls => {
            let rows = hosts.iter().map(host_json).collect();
            let columns = ["name", "gateway_up", "agent_up", "cpus", "memory_bytes", "accelerator", "vms"];
            cx.out.list("hosts", rows, &columns)
        }
        HostVerb::Check => Ok(()),
        HostVerb::Show { name } => match hosts.iter().find(|h| h.name == name) {
            Some(host) => cx.out.show(&host_json(host)),
            None => bail!("host {name}: no gateway or agent ever reported from it; see gabion host ls"),
        },
    }
}

/// What this machine offers; an error when no guest can run.
fn check(cx: &Context) -> Result<()> {
    let offer = HostOffer::of_this_host();
    let engine = offer.engine();
    let (name, why) = match &engine {
        Ok((engine, why)) => (engine.name(), why),
        Err(why) => ("none", why),
    };
    cx.out.show(&check_json(&offer, name, why))?;
    match &engine {
        Ok(_) => Ok(()),
        Err(why) => bail!("no guest can run on this host: {why}; install gabion-host with qemu-system-x86"),
    }
}

fn check_json(offer: &HostOffer, engine: &str, why: &str) -> Value {
    let path = |program: &Option<PathBuf>| program.as_ref().map(|p| p.display().to_string());
    json!({
        "engine": engine,
        "engine_reason": why,
        "kvm": offer.kvm.as_ref().map_or_else(|why| format!("does not open: {why}"), |()| "opens".into()),
        "virtualization": offer.virtualization,
        "gabion_vmm": path(&offer.vmm),
        "qemu": path(&offer.qemu),
        "cpus": offer.cpus,
        "memory_bytes": offer.memory_bytes,
        "guest_memory_bytes": offer.memory_bytes.saturating_sub(HOST_RESERVE_BYTES),
    })
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
