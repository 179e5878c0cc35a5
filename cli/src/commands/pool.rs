//! `gabion pool`.

use super::Context;
use crate::args::{Domain, PoolVerb};
use crate::output::removed;
use crate::rpc;
use anyhow::{Result, bail};
use gabion_proto::pb::{
    self, CreatePoolRequest, ErasureCode, FailureDomain, NameRequest, PoolInfo, Redundancy, SetPoolRequest,
    redundancy,
};
use serde_json::{Value, json};

pub async fn run(cx: &Context, verb: PoolVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    match verb {
        PoolVerb::Create { name, replicas, ec, min_size, failure_domain, pgs, object_size } => {
            let kind = match (replicas, ec) {
                (Some(n), _) => redundancy::Kind::Replicas(n),
                (None, Some((k, m))) => redundancy::Kind::Erasure(ErasureCode { k, m }),
                (None, None) => bail!("pool {name}: give --replicas N or --ec K+M"),
            };
            let domain = match failure_domain {
                Domain::Osd => FailureDomain::Osd,
                Domain::Host => FailureDomain::Host,
                Domain::Rack => FailureDomain::Rack,
            };
            let request = CreatePoolRequest {
                name: name.clone(),
                redundancy: Some(Redundancy { kind: Some(kind) }),
                min_size,
                failure_domain: domain.into(),
                pg_count: pgs,
                object_bytes: object_size,
            };
            let pool = rpc!(monitors, format!("pool {name}"), admin.create_pool, request)?;
            let sentence = format!(
                "pool {name} created: {}, min-size {}, {} placement groups",
                redundancy_text(&pool),
                pool.min_size,
                pool.pg_count
            );
            cx.out.done(&sentence, pool_json(&pool))
        }
        PoolVerb::Ls => {
            let pools = rpc!(monitors, "pool list", admin.list_pools, pb::Empty {})?.pools;
            let rows = pools.iter().map(pool_json).collect();
            let columns = [
                "id",
                "name",
                "redundancy",
                "min_size",
                "failure_domain",
                "pgs",
                "volumes",
                "provisioned_bytes",
            ];
            cx.out.list("pools", rows, &columns)
        }
        PoolVerb::Show { name } => {
            let pools = rpc!(monitors, "pool list", admin.list_pools, pb::Empty {})?.pools;
            match pools.iter().find(|p| p.name == name) {
                Some(pool) => cx.out.show(&pool_json(pool)),
                None => bail!("pool {name}: there is no such pool; see gabion pool ls"),
            }
        }
        PoolVerb::Set { name, replicas, min_size, pgs } => {
            let request = SetPoolRequest { name: name.clone(), replicas, min_size, pg_count: pgs };
            let pool = rpc!(monitors, format!("pool {name}"), admin.set_pool, request)?;
            let sentence = match pgs {
                Some(_) if pool.target_pg_count > 0 => format!(
                    "pool {name}: its {} placement groups become {} when all are clean; {} are not yet, or not where they will be",
                    pool.pg_count, pool.target_pg_count, pool.merge_waits_for
                ),
                Some(_) => format!("pool {name} has {} placement groups", pool.pg_count),
                None => format!("pool {name} has {}, min-size {}", redundancy_text(&pool), pool.min_size),
            };
            cx.out.done(&sentence, pool_json(&pool))
        }
        PoolVerb::Rm { name } => {
            let request = NameRequest { name: name.clone() };
            rpc!(monitors, format!("pool {name}"), admin.remove_pool, request)?;
            cx.out.done(&format!("pool {name} removed"), removed(name))
        }
    }
}

fn redundancy_text(pool: &PoolInfo) -> String {
    match pool.redundancy.as_ref().and_then(|r| r.kind.as_ref()) {
        Some(redundancy::Kind::Replicas(n)) => format!("{n} copies"),
        Some(redundancy::Kind::Erasure(code)) => format!("{}+{}", code.k, code.m),
        None => "unknown".to_owned(),
    }
}

fn pool_json(pool: &PoolInfo) -> Value {
    let (replicas, erasure) = match pool.redundancy.as_ref().and_then(|r| r.kind.as_ref()) {
        Some(redundancy::Kind::Replicas(n)) => (Some(*n), None),
        Some(redundancy::Kind::Erasure(code)) => (None, Some(json!({ "k": code.k, "m": code.m }))),
        None => (None, None),
    };
    let domain = match pool.failure_domain() {
        FailureDomain::Osd => "osd",
        FailureDomain::Host => "host",
        FailureDomain::Rack => "rack",
        FailureDomain::Unspecified => "unknown",
    };
    json!({
        "id": pool.id,
        "name": pool.name,
        "redundancy": redundancy_text(pool),
        "replicas": replicas,
        "erasure": erasure,
        "min_size": pool.min_size,
        "failure_domain": domain,
        "pgs": pool.pg_count,
        "placed_pgs": pool.placed_pg_count,
        "target_pgs": (pool.target_pg_count > 0).then_some(pool.target_pg_count),
        "merge_waits_for": pool.merge_waits_for,
        "object_bytes": pool.object_bytes,
        "volumes": pool.volumes,
        "provisioned_bytes": pool.provisioned_bytes,
    })
}
