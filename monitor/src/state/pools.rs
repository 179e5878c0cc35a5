//! Pools: created, changed, removed.

use super::*;
use gabion_proto::limits::*;
use gabion_proto::map::{FailureDomain, Pool, Redundancy};

/// Groups of a pool for which none are asked.
pub const PG_COUNT_DEFAULT: u32 = 32;
/// Groups of all pools together: the map carries every one.
pub(super) const PGS_MAX: usize = 262_144;

/// Replicated: more than half. Erasure coded: one more than decodes, so that what is acknowledged survives another loss;
/// with a single parity shard that would leave no loss at all, so such a pool goes on without any to spare.
fn min_size_default(redundancy: Redundancy) -> u32 {
    match redundancy {
        Redundancy::Replicated { size } => size / 2 + 1,
        Redundancy::Erasure { k, m } => k + u32::from(m > 1),
    }
}

pub(super) fn check(pool: &Pool) -> Result<(), Refusal> {
    gabion_proto::convert::check_pool(pool).map_err(|e| Refusal::invalid(e.to_string()))
}

impl MonitorState {
    pub(super) fn create_pool(
        &mut self,
        name: String,
        redundancy: Redundancy,
        min_size: u32,
        failure_domain: FailureDomain,
        pg_count: u32,
        object_bytes: u32,
    ) -> CommandResult {
        if self.map.pools.values().any(|p| p.name == name) {
            return Err(Refusal::exists(format!("there is a pool {name:?} already")));
        }
        let default_to = |value: u32, default: u32| if value == 0 { default } else { value };
        let pool = Pool {
            name,
            redundancy,
            min_size: default_to(min_size, min_size_default(redundancy)),
            failure_domain,
            pg_count: default_to(pg_count, PG_COUNT_DEFAULT),
            object_bytes: default_to(object_bytes, OBJECT_BYTES_DEFAULT),
        };
        check(&pool)?;
        if self.map.pools.len() >= POOLS_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {POOLS_MAX} pools")));
        }
        if self.map.pgs.len() + pool.pg_count as usize > PGS_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {PGS_MAX} placement groups")));
        }
        self.counters.pool += 1;
        let id = PoolId(self.counters.pool);
        self.event(EventSeverity::Ok, format!("pool {} was created", pool.name));
        self.change_groups(true, |map| {
            map.pools.insert(id, pool);
        });
        Ok(Reply::Pool(id))
    }

    pub(super) fn set_pool(
        &mut self,
        name: &str,
        replicas: Option<u32>,
        min_size: Option<u32>,
    ) -> CommandResult {
        let id = self.pool_named(name)?;
        let before = &self.map.pools[&id];
        let mut pool = before.clone();
        match (replicas, pool.redundancy) {
            (Some(size), Redundancy::Replicated { .. }) => pool.redundancy = Redundancy::Replicated { size },
            (Some(_), Redundancy::Erasure { .. }) => {
                return Err(Refusal::invalid(format!(
                    "pool {name} is erasure coded: it keeps shards, and their number does not change"
                )));
            }
            (None, _) => {}
        }
        if let Some(min_size) = min_size {
            pool.min_size = min_size;
        }
        check(&pool)?;
        let (resized, changed) = (pool.redundancy != before.redundancy, pool != *before);
        if let (true, Redundancy::Replicated { size }) = (resized, pool.redundancy) {
            let text = format!("pool {name} keeps {size} copies, min-size {}", pool.min_size);
            self.event(EventSeverity::Ok, text);
        } else if changed {
            self.event(EventSeverity::Ok, format!("pool {name} has min-size {}", pool.min_size));
        }
        if changed {
            self.change_groups(resized, |map| {
                map.pools.insert(id, pool);
            });
        }
        Ok(Reply::Pool(id))
    }

    pub(super) fn remove_pool(&mut self, name: &str) -> CommandResult {
        let id = self.pool_named(name)?;
        let mut volumes = self.volumes.values().filter(|v| v.pool == id);
        if let Some(volume) = volumes.next() {
            let more = match volumes.count() {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            return Err(Refusal::precondition(format!("pool {name} holds volume {}{more}", volume.name)));
        }
        self.placed.remove(&id);
        self.merging.remove(&id);
        self.change_groups(true, |map| {
            map.pools.remove(&id);
            map.removed_pools.insert(id);
            map.pgs.retain(|pg, _| pg.pool != id);
        });
        self.event(EventSeverity::Ok, format!("pool {name} was removed"));
        Ok(Reply::Done)
    }
}
