//! `gabion status`, `health` and `events`.

use super::Context;
use super::monitor::monitor_json;
use super::osd::{slow_json, slow_text};
use super::rebuild::rebuild_json;
use crate::output::{Paint, printable};
use crate::rpc;
use crate::size::human;
use anyhow::Result;
use gabion_proto::pb::{self, Severity};
use serde_json::{Value, json};

pub async fn status(cx: &Context) -> Result<()> {
    let monitors = cx.monitors()?;
    let s = monitors.latest("status", |c| async move { c.status().get_status(pb::Empty {}).await }).await?;
    if !cx.out.is_table() {
        return cx.out.value(&status_json(&s));
    }
    let mut lines = vec![format!("cluster   {}  epoch {}", s.cluster, s.epoch)];
    lines.push(format!("health    {}", health_text(cx, s.health.as_ref())));
    let leader = s.monitors.iter().find(|m| m.leader).map_or("none".to_owned(), |m| m.id.to_string());
    let up = s.monitors.iter().filter(|m| m.up).count();
    let quorum = if s.stale { "; NO QUORUM: all else is what was last known" } else { "" };
    lines.push(format!("monitors  {up} of {} up, leader {leader}{quorum}", s.monitors.len()));
    lines.push(format!("osds      {} of {} up, {} in", s.osds_up, s.osds, s.osds_in));
    let share =
        if s.capacity_bytes == 0 { 0.0 } else { s.used_bytes as f64 * 100.0 / s.capacity_bytes as f64 };
    lines.push(format!(
        "capacity  {} of {} used ({share:.1} %)",
        human(s.used_bytes),
        human(s.capacity_bytes)
    ));
    let mut pgs: Vec<_> = s.pgs_by_state.iter().collect();
    pgs.sort();
    let pgs: Vec<_> = pgs.iter().map(|(state, n)| format!("{n} {}", printable(state))).collect();
    lines.push(format!("pgs       {}", if pgs.is_empty() { "none".to_owned() } else { pgs.join(", ") }));
    lines.push(format!(
        "things    {} pools, {} volumes, {} exports, {} vms",
        s.pools, s.volumes, s.exports, s.vms
    ));
    if let Some(io) = &s.client_io {
        lines.push(format!(
            "client    {:.0} reads/s ({}/s), {:.0} writes/s ({}/s)",
            io.reads_per_s,
            human(io.read_bytes_per_s as u64),
            io.writes_per_s,
            human(io.write_bytes_per_s as u64)
        ));
    }
    match &s.rebuild {
        Some(r) if r.pgs_not_clean > 0 => lines.push(format!("rebuild   {}", super::rebuild::line(r))),
        _ => lines.push("rebuild   nothing to do".to_owned()),
    }
    if let Some(policy) = &s.slow_policy {
        lines.push(format!("policy    {}", slow_text(policy)));
    }
    for check in s.health.iter().flat_map(|h| &h.checks) {
        lines.push(format!("  {}: {}", printable(&check.code), printable(&check.summary)));
    }
    for pg in s.rebuild.iter().flat_map(|r| &r.pgs).filter(|p| !p.waiting_for.is_empty()).take(5) {
        lines.push(format!("  pg {}.{} waits: {}", pg.pool, pg.index, printable(&pg.waiting_for)));
    }
    cx.out.text(&lines.join("\n"))
}

pub async fn health(cx: &Context) -> Result<()> {
    let monitors = cx.monitors()?;
    let report =
        monitors.latest("health", |c| async move { c.status().get_health(pb::Empty {}).await }).await?;
    if !cx.out.is_table() {
        return cx.out.value(&health_json(&report));
    }
    let mut lines = vec![health_text(cx, Some(&report))];
    for check in &report.checks {
        let paint = if check.severity() == Severity::Error { Paint::Bad } else { Paint::Warn };
        lines.push(format!(
            "{}: {}",
            cx.out.paint(paint, &printable(&check.code)),
            printable(&check.summary)
        ));
        lines.extend(check.details.iter().map(|d| format!("    {}", printable(d))));
        lines.push(format!("    remedy: {}", printable(&check.remedy)));
    }
    cx.out.text(&lines.join("\n"))
}

pub async fn events(cx: &Context, follow: bool, last: u32) -> Result<()> {
    let monitors = cx.monitors()?;
    let request = pb::WatchEventsRequest { follow, last };
    let mut stream = rpc!(monitors, "events", status.watch_events, request)?;
    let mut all = Vec::new();
    while let Some(event) = monitors.next("events", &mut stream).await? {
        let value = json!({
            "unix_ms": event.unix_ms,
            "epoch": event.epoch,
            "severity": severity(event.severity()),
            "text": event.text,
        });
        if cx.out.is_table() {
            let at = clock_text(event.unix_ms);
            let line = format!("{at}  {:5}  {}", severity(event.severity()), printable(&event.text));
            cx.out.text(&line)?;
        } else if follow {
            cx.out.item(&value)?;
        } else {
            all.push(value);
        }
    }
    if cx.out.is_table() || follow { Ok(()) } else { cx.out.value(&json!({ "events": all })) }
}

/// `2026-01-31T12:00:00Z`, from the civil calendar (days since 1970-03-01 in 400-year eras).
pub fn clock_text(unix_ms: u64) -> String {
    let secs = unix_ms / 1000;
    let days = secs / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (h, m, s) = (secs / 3600 % 24, secs / 60 % 60, secs % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
}

fn health_text(cx: &Context, report: Option<&pb::HealthReport>) -> String {
    match report.map_or(Severity::Unspecified, |r| r.severity()) {
        Severity::Ok => cx.out.paint(Paint::Good, "ok"),
        Severity::Warn => cx.out.paint(Paint::Warn, "warn"),
        Severity::Error => cx.out.paint(Paint::Bad, "error"),
        Severity::Unspecified => "unknown".to_owned(),
    }
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Ok => "ok",
        Severity::Warn => "warn",
        Severity::Error => "error",
        Severity::Unspecified => "unknown",
    }
}

fn health_json(report: &pb::HealthReport) -> Value {
    let checks: Vec<_> = report
        .checks
        .iter()
        .map(|c| {
            json!({
                "code": c.code,
                "severity": severity(c.severity()),
                "summary": c.summary,
                "remedy": c.remedy,
                "details": c.details,
            })
        })
        .collect();
    json!({ "severity": severity(report.severity()), "checks": checks })
}

fn status_json(s: &pb::ClusterStatus) -> Value {
    let monitors: Vec<_> = s.monitors.iter().map(monitor_json).collect();
    let io = s.client_io.unwrap_or_default();
    json!({
        "cluster": s.cluster,
        "epoch": s.epoch,
        "health": s.health.as_ref().map(health_json),
        "monitors": monitors,
        "quorum": !s.stale,
        "osds": s.osds,
        "osds_up": s.osds_up,
        "osds_in": s.osds_in,
        "capacity_bytes": s.capacity_bytes,
        "used_bytes": s.used_bytes,
        "pools": s.pools,
        "volumes": s.volumes,
        "exports": s.exports,
        "vms": s.vms,
        "pgs_by_state": s.pgs_by_state,
        "client_io": {
            "reads_per_s": io.reads_per_s,
            "writes_per_s": io.writes_per_s,
            "read_bytes_per_s": io.read_bytes_per_s,
            "write_bytes_per_s": io.write_bytes_per_s,
        },
        "rebuild": s.rebuild.as_ref().map(rebuild_json),
        "slow_policy": s.slow_policy.as_ref().map(slow_json),
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn prints_utc() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (1_798_761_599_999, "2026-12-31T23:59:59Z"),
        ] {
            assert_eq!(super::clock_text(ms), text);
        }
    }
}
