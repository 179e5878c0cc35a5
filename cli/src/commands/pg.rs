//! `gabion pg`.

use super::Context;
use crate::args::PgVerb;
use crate::rpc;
use anyhow::{Result, bail};
use gabion_proto::pb::{ListPgsRequest, PgDetail};
use serde_json::{Value, json};

/// A hole in an acting set.
const NOBODY: u32 = u32::MAX;

pub async fn run(cx: &Context, verb: PgVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    match verb {
        PgVerb::Ls { pool, not_clean } => {
            let request = ListPgsRequest { pool: pool.clone().unwrap_or_default() };
            let thing = pool.map_or("pg list".to_owned(), |p| format!("pool {p}"));
            let pgs = rpc!(monitors, thing, admin.list_pgs, request)?.pgs;
            let rows =
                pgs.iter().filter(|p| !(not_clean && p.state == "active+clean")).map(pg_json).collect();
            let columns = ["pg", "state", "acting", "primary", "objects", "degraded_objects", "waiting_for"];
            cx.out.list("pgs", rows, &columns)
        }
        PgVerb::Show { pg } => {
            let (pool, index) = parse_pg(&pg)?;
            let pgs = rpc!(monitors, "pg list", admin.list_pgs, ListPgsRequest::default())?.pgs;
            match pgs.iter().find(|p| p.pool == pool && p.index == index) {
                Some(found) => cx.out.show(&pg_json(found)),
                None => bail!("pg {pg}: there is no such group; see gabion pg ls"),
            }
        }
    }
}

/// `POOL.INDEX`
pub fn parse_pg(pg: &str) -> Result<(u32, u32)> {
    let parts = pg.split_once('.').and_then(|(p, i)| Some((p.parse().ok()?, i.parse().ok()?)));
    match parts {
        Some(parts) => Ok(parts),
        None => bail!("pg {pg}: not a placement group; write POOL.INDEX as gabion pg ls shows them"),
    }
}

fn members(osds: &[u32]) -> Vec<Option<u32>> {
    osds.iter().map(|o| (*o != NOBODY).then_some(*o)).collect()
}

fn pg_json(p: &PgDetail) -> Value {
    json!({
        "pg": format!("{}.{}", p.pool, p.index),
        "pool_id": p.pool,
        "index": p.index,
        "state": p.state,
        "up": members(&p.up),
        "acting": members(&p.acting),
        "primary": p.primary,
        "interval": p.interval,
        "objects": p.objects,
        "degraded_objects": p.degraded_objects,
        "unfound_objects": p.unfound_objects,
        "waiting_for": p.waiting_for,
    })
}
