//! `gabion scrub`: comparing copies, and reading everything that nobody reads.

use super::Context;
use super::cluster::clock_text;
use super::pg::parse_pg;
use crate::args::ScrubVerb;
use crate::rpc;
use crate::size::human;
use anyhow::{Result, bail};
use gabion_proto::pb::{ListPgsRequest, PgName, PgScrub, ScrubSettings, SetScrubRequest, StartScrubRequest};
use serde_json::{Value, json};

pub async fn run(cx: &Context, verb: ScrubVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    match verb {
        ScrubVerb::Start { pool, pg, deep } => {
            let name = pg.as_deref().map(parse_pg).transpose()?;
            let thing = match (&pool, &pg) {
                (Some(pool), _) => format!("pool {pool}"),
                (None, Some(pg)) => format!("pg {pg}"),
                (None, None) => "scrub".to_owned(),
            };
            let request = StartScrubRequest {
                pool: pool.clone().unwrap_or_default(),
                pg: name.map(|(pool, index)| PgName { pool, index }),
                deep,
            };
            let pgs = rpc!(monitors, thing, admin.start_scrub, request)?.pgs;
            let depth = if deep { "deep" } else { "light" };
            let sentence =
                format!("{pgs} placement groups will be scrubbed ({depth}); see gabion scrub status");
            cx.out.done(&sentence, json!({ "pgs": pgs, "deep": deep }))
        }
        ScrubVerb::Status { pool } => {
            let thing = pool.as_ref().map_or("scrub status".to_owned(), |p| format!("pool {p}"));
            let request = ListPgsRequest { pool: pool.unwrap_or_default() };
            let reply = rpc!(monitors, thing, admin.list_scrubs, request)?;
            let settings = reply.settings.unwrap_or_default();
            if !cx.out.is_table() {
                let pgs: Vec<_> = reply.pgs.iter().map(pg_json).collect();
                return cx.out.value(&json!({ "settings": settings_json(&settings), "pgs": pgs }));
            }
            cx.out.text(&settings_text(&settings))?;
            let columns = [
                "pg",
                "running",
                "requested",
                "last",
                "last_deep",
                "objects",
                "findings",
                "repaired",
                "damaged_objects",
            ];
            let rows = reply.pgs.iter().map(pg_row).collect();
            cx.out.list("pgs", rows, &columns)?;
            let damaged = reply.pgs.iter().flat_map(|p| p.damaged.iter().map(move |d| (p, d)));
            let lines: Vec<_> = damaged
                .map(|(p, d)| format!("pg {}.{}: {}", p.pool, p.index, crate::output::printable(d)))
                .collect();
            if lines.is_empty() { Ok(()) } else { cx.out.text(&lines.join("\n")) }
        }
        ScrubVerb::Set { interval, deep_interval, max_rate } => {
            if interval.is_none() && deep_interval.is_none() && max_rate.is_none() {
                bail!("scrub set: give --interval, --deep-interval or --max-rate");
            }
            let request = SetScrubRequest {
                interval_s: interval,
                deep_interval_s: deep_interval,
                max_rate_bytes_per_s: max_rate,
            };
            let settings = rpc!(monitors, "scrub", admin.set_scrub, request)?;
            cx.out.done(&settings_text(&settings), settings_json(&settings))
        }
    }
}

/// `90 s`, `24 h`, `7 d`; `never` for 0.
fn every(seconds: u64) -> String {
    for (unit, length) in [("d", 86_400), ("h", 3_600), ("min", 60)] {
        if seconds >= 2 * length && seconds.is_multiple_of(length) {
            return format!("every {} {unit}", seconds / length);
        }
    }
    if seconds == 0 { "never by itself".to_owned() } else { format!("every {seconds} s") }
}

fn settings_text(s: &ScrubSettings) -> String {
    format!(
        "scrubs: {}, deep {}, at most {}/s at each OSD",
        every(s.interval_s),
        every(s.deep_interval_s),
        human(s.max_rate_bytes_per_s)
    )
}

fn settings_json(s: &ScrubSettings) -> Value {
    json!({
        "interval_s": s.interval_s,
        "deep_interval_s": s.deep_interval_s,
        "max_rate_bytes_per_s": s.max_rate_bytes_per_s,
    })
}

fn pg_json(p: &PgScrub) -> Value {
    let at = |unix_ms: u64| (unix_ms > 0).then_some(unix_ms);
    json!({
        "pg": format!("{}.{}", p.pool, p.index),
        "last_unix_ms": at(p.last_unix_ms),
        "last_deep_unix_ms": at(p.last_deep_unix_ms),
        "requested": p.requested,
        "running": p.running,
        "objects": p.objects,
        "findings": p.findings,
        "repaired": p.repaired,
        "damaged_objects": p.damaged_objects,
        "damaged": p.damaged,
    })
}

fn pg_row(p: &PgScrub) -> Value {
    let at = |unix_ms: u64| if unix_ms > 0 { clock_text(unix_ms) } else { "never".to_owned() };
    let mut row = pg_json(p);
    row["last"] = at(p.last_unix_ms).into();
    row["last_deep"] = at(p.last_deep_unix_ms).into();
    row
}

#[cfg(test)]
mod tests {
    #[test]
    fn intervals_are_said_in_the_unit_that_fits() {
        for (seconds, text) in [
            (0, "never by itself"),
            (59, "every 59 s"),
            (86_400, "every 24 h"),
            (604_800, "every 7 d"),
            (86_401, "every 86401 s"),
        ] {
            assert_eq!(super::every(seconds), text);
        }
    }
}
