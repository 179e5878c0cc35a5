//! `gabion rebuild`: what is left after a failure, and how fast it goes.

use super::Context;
use crate::args::RebuildVerb;
use crate::output::printable;
use crate::rpc;
use crate::size::human;
use anyhow::Result;
use gabion_proto::pb::{RebuildStatus, SetRebuildRequest, WatchRebuildsRequest};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;

pub async fn run(cx: &Context, verb: RebuildVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    if let RebuildVerb::Set { max_rate } = verb {
        let request = SetRebuildRequest { max_rate_bytes_per_s: max_rate };
        let max_rate = rpc!(monitors, "rebuild", admin.set_rebuild, request)?.max_rate_bytes_per_s;
        return cx.out.done(&limit_text(max_rate), json!({ "max_rate_bytes_per_s": max_rate }));
    }
    let until_clean = !matches!(verb, RebuildVerb::Watch { forever: true, .. });
    let request = WatchRebuildsRequest { until_clean };
    let mut stream = rpc!(monitors, "rebuild", status.watch_rebuilds, request)?;
    if matches!(verb, RebuildVerb::Status) {
        let status = monitors.next("rebuild", &mut stream).await?.unwrap_or_default();
        if !cx.out.is_table() {
            return cx.out.value(&rebuild_json(&status));
        }
        let mut lines = vec![line(&status)];
        if status.max_rate_bytes_per_s > 0 {
            lines.push(limit_text(status.max_rate_bytes_per_s));
        }
        lines.extend(status.pgs.iter().map(|p| {
            let waits = match p.waiting_for.as_str() {
                "" => String::new(),
                what => format!(", waits: {}", printable(what)),
            };
            let state = printable(&p.state);
            format!("  pg {}.{} {state}, {} objects degraded{waits}", p.pool, p.index, p.degraded_objects)
        }));
        return cx.out.text(&lines.join("\n"));
    }
    let bar = (cx.out.is_table() && std::io::stderr().is_terminal()).then(|| {
        let style = ProgressStyle::with_template("{bar:40} {percent:>3} %  {msg}");
        ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    });
    // The whole of it, which grows while peering finds more.
    let mut most_bytes = 0;
    while let Some(status) = monitors.next("rebuild", &mut stream).await? {
        match &bar {
            Some(bar) => {
                most_bytes = most_bytes.max(status.degraded_bytes).max(1);
                bar.set_length(most_bytes);
                bar.set_position(most_bytes - status.degraded_bytes.min(most_bytes));
                bar.set_message(line(&status));
            }
            None if cx.out.is_table() => cx.out.text(&line(&status))?,
            None => cx.out.item(&rebuild_json(&status))?,
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
        cx.out.text("clean: every object has all its copies")?;
    }
    Ok(())
}

fn limit_text(bytes_per_s: u64) -> String {
    match bytes_per_s {
        0 => "rebuilds: as fast as clients allow".to_owned(),
        limit => format!("rebuilds: as fast as clients allow, at most {}/s at each OSD", human(limit)),
    }
}

/// The status in one line.
pub fn line(s: &RebuildStatus) -> String {
    if s.pgs_not_clean == 0 {
        return format!("clean: all {} pgs", s.pgs_total);
    }
    let mut text = format!(
        "{} of {} pgs not clean, {} objects ({}) degraded, {} recovered, {}/s",
        s.pgs_not_clean,
        s.pgs_total,
        s.degraded_objects,
        human(s.degraded_bytes),
        human(s.recovered_bytes),
        human(s.rate_bytes_per_s as u64)
    );
    if s.unfound_objects > 0 {
        text.push_str(&format!(", {} unfound", s.unfound_objects));
    }
    if s.eta_s > 0 {
        text.push_str(&format!(", {} s left", s.eta_s));
    }
    text
}

pub fn rebuild_json(s: &RebuildStatus) -> Value {
    let pgs: Vec<_> = s
        .pgs
        .iter()
        .map(|p| {
            json!({
                "pg": format!("{}.{}", p.pool, p.index),
                "state": p.state,
                "degraded_objects": p.degraded_objects,
                "recovered_objects": p.recovered_objects,
                "waiting_for": p.waiting_for,
            })
        })
        .collect();
    json!({
        "unix_ms": s.unix_ms,
        "pgs_total": s.pgs_total,
        "pgs_not_clean": s.pgs_not_clean,
        "degraded_objects": s.degraded_objects,
        "degraded_bytes": s.degraded_bytes,
        "unfound_objects": s.unfound_objects,
        "recovered_objects": s.recovered_objects,
        "recovered_bytes": s.recovered_bytes,
        "max_rate_bytes_per_s": s.max_rate_bytes_per_s,
        "rate_bytes_per_s": s.rate_bytes_per_s,
        "eta_s": s.eta_s,
        "pgs": pgs,
    })
}
