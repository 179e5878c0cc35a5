//! `gabion osd`.

use super::Context;
use crate::args::OsdVerb;
use crate::output::{printable, removed};
use crate::rpc;
use crate::rpc::Monitors;
use crate::size::human_exact;
use anyhow::{Result, bail};
use gabion_proto::pb::{self, OsdDetail, OsdRequest, SlowOsd, SlowPolicy};
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub async fn run(cx: &Context, verb: OsdVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    match verb {
        OsdVerb::Ls => {
            let osds = list(&monitors).await?;
            let rows = osds.iter().map(|o| osd_json(o, &osds)).collect();
            let columns = [
                "id",
                "host",
                "rack",
                "addr",
                "up",
                "in",
                "share_percent",
                "used_bytes",
                "capacity_bytes",
                "pgs",
            ];
            cx.out.list("osds", rows, &columns)
        }
        OsdVerb::Tree => tree(cx, &list(&monitors).await?),
        OsdVerb::Show { id } => {
            let osds = list(&monitors).await?;
            match osds.iter().find(|o| o.id == id.0) {
                Some(osd) => cx.out.show(&osd_json(osd, &osds)),
                None => bail!("osd {}: there is no such OSD; see gabion osd ls", id.0),
            }
        }
        OsdVerb::Out { id } => {
            rpc!(monitors, format!("osd {}", id.0), admin.out_osd, OsdRequest { id: id.0 })?;
            done(cx, &monitors, id.0, "is out: its data moves to the others; see gabion rebuild watch").await
        }
        OsdVerb::In { id } => {
            rpc!(monitors, format!("osd {}", id.0), admin.in_osd, OsdRequest { id: id.0 })?;
            done(cx, &monitors, id.0, "is in").await
        }
        OsdVerb::Reweight { id, weight } => {
            let request = pb::ReweightOsdRequest { id: id.0, weight };
            rpc!(monitors, format!("osd {}", id.0), admin.reweight_osd, request)?;
            done(cx, &monitors, id.0, "has its new weight").await
        }
        OsdVerb::SlowPolicy { evict_after, limit } => {
            let policy = if evict_after.is_none() && limit.is_none() {
                rpc!(monitors, "osd slow-policy", admin.get_slow_policy, pb::Empty {})?
            } else {
                let limit_ms = limit.map(|s| s.saturating_mul(1_000));
                let request = pb::SetSlowPolicyRequest { evict_after_s: evict_after, limit_ms };
                rpc!(monitors, "osd slow-policy", admin.set_slow_policy, request)?
            };
            let lines: Vec<_> =
                std::iter::once(slow_text(&policy)).chain(policy.osds.iter().map(slow_line)).collect();
            cx.out.done(&lines.join("\n"), slow_json(&policy))
        }
        OsdVerb::Rm { id, force } => {
            if force {
                cx.confirm(&format!("osd {}: --force declares its data lost", id.0))?;
            }
            let request = pb::RemoveOsdRequest { id: id.0, force };
            rpc!(monitors, format!("osd {}", id.0), admin.remove_osd, request)?;
            cx.out.done(&format!("osd.{} removed", id.0), removed(id.0))
        }
    }
}

async fn list(monitors: &Monitors) -> Result<Vec<OsdDetail>> {
    let mut osds = rpc!(monitors, "osd list", admin.list_osds, pb::Empty {})?.osds;
    osds.sort_by_key(|o| o.id);
    Ok(osds)
}

async fn done(cx: &Context, monitors: &Monitors, id: u32, what: &str) -> Result<()> {
    if cx.out.is_table() {
        return cx.out.text(&format!("osd.{id} {what}"));
    }
    let osds = list(monitors).await?;
    match osds.iter().find(|o| o.id == id) {
        Some(osd) => cx.out.value(&osd_json(osd, &osds)),
        None => bail!("osd {id}: it is gone meanwhile"),
    }
}

fn tree(cx: &Context, all: &[OsdDetail]) -> Result<()> {
    let mut racks: BTreeMap<&str, BTreeMap<&str, Vec<&OsdDetail>>> = BTreeMap::new();
    for osd in all {
        racks.entry(&osd.rack).or_default().entry(&osd.host).or_default().push(osd);
    }
    if !cx.out.is_table() {
        let racks: Vec<_> = racks
            .iter()
            .map(|(rack, hosts)| {
                let hosts: Vec<_> = hosts
                    .iter()
                    .map(|(host, osds)| {
                        json!({ "host": host, "osds": osds.iter().map(|o| osd_json(o, all)).collect::<Vec<_>>() })
                    })
                    .collect();
                json!({ "rack": rack, "hosts": hosts })
            })
            .collect();
        return cx.out.value(&json!({ "racks": racks }));
    }
    let mut lines = Vec::new();
    for (rack, hosts) in racks {
        lines.push(format!("rack {}", if rack.is_empty() { "-" } else { rack }));
        for (host, osds) in hosts {
            lines.push(format!("  host {host}"));
            lines.extend(osds.iter().map(|o| {
                let up = if o.up { "up" } else { "down" };
                let within = if o.r#in { "in" } else { "out" };
                let share = share_percent(o, all);
                let (used, size) = (human_exact(o.used_bytes), human_exact(o.capacity_bytes));
                format!("    osd.{}  {up}, {within}, {share} % of the weight, {used} of {size}", o.id)
            }));
        }
    }
    cx.out.text(&lines.join("\n"))
}

/// A weight says little by itself: what part of all weight it is, to a tenth of a percent.
fn share_percent(osd: &OsdDetail, all: &[OsdDetail]) -> f64 {
    let total: u64 = all.iter().map(|o| u64::from(o.weight)).sum();
    (u64::from(osd.weight) * 1000 + total / 2).checked_div(total).unwrap_or(0) as f64 / 10.0
}

fn osd_json(o: &OsdDetail, all: &[OsdDetail]) -> Value {
    json!({
        "id": o.id,
        "host": o.host,
        "rack": o.rack,
        "addr": o.addr,
        "up": o.up,
        "in": o.r#in,
        "weight": f64::from(o.weight) / 65_536.0,
        "share_percent": share_percent(o, all),
        "incarnation": o.incarnation,
        "capacity_bytes": o.capacity_bytes,
        "used_bytes": o.used_bytes,
        "pgs": o.pgs,
        "primary_pgs": o.primary_pgs,
        "fatal": o.fatal,
    })
}

/// The policy in one line.
pub fn slow_text(p: &SlowPolicy) -> String {
    let evict = match p.evict_after_s {
        0 => "only a warning".to_owned(),
        after => format!("taken out after {after} s"),
    };
    format!("slow OSDs: {evict}; one delays a write for at most {} s", p.limit_ms.div_ceil(1_000))
}

fn slow_line(s: &SlowOsd) -> String {
    let what = if s.reads { "read" } else { "write" };
    let ms = |us: u64| us as f64 / 1_000.0;
    format!(
        "  osd.{} on host {}: a {what} takes {:.1} ms, with the others {:.1} ms, for {} s",
        s.id,
        printable(&s.host),
        ms(s.mean_us),
        ms(s.others_mean_us),
        s.slow_for_ms / 1_000
    )
}

pub fn slow_json(p: &SlowPolicy) -> Value {
    let osds: Vec<_> = p
        .osds
        .iter()
        .map(|s| {
            json!({
                "id": s.id,
                "host": s.host,
                "slow_for_s": s.slow_for_ms / 1_000,
                "operation": if s.reads { "read" } else { "write" },
                "mean_us": s.mean_us,
                "others_mean_us": s.others_mean_us,
                "accusers": s.accusers,
                "witnesses": s.witnesses,
            })
        })
        .collect();
    json!({ "evict_after_s": p.evict_after_s, "limit_s": p.limit_ms.div_ceil(1_000), "osds": osds })
}
