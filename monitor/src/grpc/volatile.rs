//! What daemons report between changes: acknowledged epochs, statistics, states of groups, exports
//! and guests. In memory only; after a restart it is heard again within seconds.
//!
//! Bounded: only OSDs, groups, exports and VMs that exist are kept.

use super::rebuild::{Meter, Recovered};
use crate::decide::slow::Slow;
use crate::state::MonitorState;
use gabion_proto::ids::*;
use gabion_proto::pb;
use std::collections::BTreeMap;

/// A host that is silent for this long is forgotten.
pub(super) const HOST_SILENCE_MS: u64 = 10_000;
/// Objects that a group should have at most, and may after a merge: a quarter of what one activation can name on a large disk.
pub(super) const GROUP_OBJECTS_MAX: u64 = 100_000;
/// Hosts that are listened to.
pub(super) const HOSTS_MAX: usize = 10_000;

/// The last heartbeat of an OSD.
#[derive(Clone, Debug, Default)]
pub(super) struct OsdReport {
    pub incarnation: Incarnation,
    pub acked: Epoch,
    pub stats: pb::OsdStats,
}

#[derive(Default)]
pub(super) struct Volatile {
    pub osds: BTreeMap<OsdId, OsdReport>,
    pub pgs: BTreeMap<PgId, pb::PgStatus>,
    /// By host, with when they were last heard.
    pub gateways: BTreeMap<String, (u64, pb::GatewayReport)>,
    pub agents: BTreeMap<String, (u64, pb::AgentReport)>,
    /// The action number under which a VM was last seen alive.
    pub alive: BTreeMap<String, u64>,
    pub meter: Meter,
    /// Since when this leader knows that a snapshot waits for its volume's holder.
    pub taking: BTreeMap<SnapshotId, u64>,
    /// OSDs that answer much slower than the others, as of the last look.
    pub slow: Vec<Slow>,
    sampled_ms: u64,
}

impl Volatile {
    /// Forgets what is gone and takes samples; answers whether a host was forgotten.
    pub fn tick(&mut self, now_ms: u64, state: &MonitorState) -> bool {
        let before = self.gateways.len() + self.agents.len();
        self.gateways.retain(|_, (at, _)| now_ms < *at + HOST_SILENCE_MS);
        self.agents.retain(|_, (at, _)| now_ms < *at + HOST_SILENCE_MS);
        let forgot = self.gateways.len() + self.agents.len() < before;
        self.osds.retain(|osd, _| state.map.osds.contains_key(osd));
        self.alive.retain(|vm, _| state.vms.contains_key(vm));
        self.pgs.retain(|pg, s| state.map.pgs.get(pg).is_some_and(|r| r.interval.0 == s.interval));
        if now_ms >= self.sampled_ms + 500 {
            self.sampled_ms = now_ms;
            self.meter.sample(now_ms, super::view::totals(state, self));
        }
        forgot
    }

    /// Takes in a heartbeat of an OSD that is known to be up as `incarnation`.
    pub fn heartbeat(&mut self, state: &MonitorState, osd: OsdId, request: pb::HeartbeatRequest) {
        let stats = request.stats.unwrap_or_default();
        let incarnation = Incarnation(request.incarnation);
        self.meter.osd_stats(osd, incarnation, &stats);
        self.osds.insert(osd, OsdReport { incarnation, acked: Epoch(request.acked_epoch), stats });
        for status in request.pgs {
            let pg = PgId { pool: PoolId(status.pool), index: status.index };
            let Some(record) = state.map.pgs.get(&pg) else { continue };
            if record.primary == Some(osd) && record.interval.0 == status.interval {
                self.pgs.insert(pg, status);
            }
        }
    }

    /// Whether a pool may have fewer groups, by what its groups last reported; else why not. A group's activation names in one transaction what a
    /// member lacks, which may be all of it, and a disk must be able to store that.
    pub fn may_merge(&self, state: &MonitorState, name: &str, target: u32) -> Result<(), String> {
        let Some((id, pool)) = state.map.pools.iter().find(|(_, p)| p.name == name) else { return Ok(()) };
        if target == 0 || target >= pool.pg_count {
            return Ok(());
        }
        let mut merged: BTreeMap<u32, u64> = BTreeMap::new();
        for (pg, status) in self.pgs.range(PgId { pool: *id, index: 0 }..=PgId { pool: *id, index: u32::MAX })
        {
            let objects = merged.entry(pg.index % target).or_default();
            *objects = objects.saturating_add(status.objects);
        }
        match merged.into_iter().max_by_key(|(_, objects)| *objects) {
            Some((index, objects)) if objects > GROUP_OBJECTS_MAX => Err(format!(
                "with {target} groups, group {index} of pool {name} would have about {objects} objects, and groups are merged up to \
                 {GROUP_OBJECTS_MAX}"
            )),
            _ => Ok(()),
        }
    }

    /// Takes in what the report of a clean group says of the OSD's run.
    pub fn recovered(&mut self, state: &MonitorState, osd: OsdId, incarnation: Incarnation, now: Recovered) {
        if state.map.up_osd(osd).is_some_and(|o| o.incarnation == incarnation) {
            self.meter.recovered(osd, incarnation, now);
        }
    }

    /// The first OSD that is up and has not said that `epoch` is in force, of those that `counts` picks. Whom it picks is asked of a state that
    /// is at that epoch: an OSD may know of it before this monitor, a new leader maybe, has carried out itself what the log says.
    pub fn behind(
        &self,
        state: &MonitorState,
        epoch: Epoch,
        counts: impl Fn(&MonitorState, OsdId) -> bool,
    ) -> Option<String> {
        if state.map.epoch < epoch {
            return Some("this monitor".to_owned());
        }
        let behind = state.map.osds.iter().filter(|(osd, _)| counts(state, **osd)).find(|(osd, info)| {
            let acked =
                self.osds.get(osd).is_some_and(|r| r.incarnation == info.incarnation && r.acked >= epoch);
            info.up && !acked
        });
        behind.map(|(osd, _)| osd.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gabion_proto::map::{FailureDomain, Pool, Redundancy};

    /// Rule P6: a new leader that has not carried out yet what began the interval knows of no earlier primaries of it.
    #[test]
    fn what_this_monitor_does_not_know_of_is_not_in_force() {
        let mut state = MonitorState::default();
        let (volatile, epoch) = (Volatile::default(), state.map.epoch.next());
        assert!(volatile.behind(&state, epoch, |_, _| false).is_some());
        state.map.epoch = epoch;
        assert!(volatile.behind(&state, epoch, |_, _| false).is_none());
    }

    #[test]
    fn groups_are_merged_only_up_to_a_size() {
        let pool = Pool {
            name: "p".into(),
            redundancy: Redundancy::Replicated { size: 3 },
            min_size: 2,
            failure_domain: FailureDomain::Host,
            pg_count: 8,
            object_bytes: 1 << 20,
        };
        let mut state = MonitorState::default();
        state.map.pools.insert(PoolId(1), pool);
        let mut volatile = Volatile::default();
        let mut report = |pool, index, objects| {
            let status = pb::PgStatus { pool, index, objects, ..Default::default() };
            volatile.pgs.insert(PgId { pool: PoolId(pool), index }, status);
        };
        for index in 0..8 {
            report(1, index, 40_000);
            report(2, index, 1 << 40);
        }
        assert_eq!(volatile.may_merge(&state, "p", 4), Ok(()), "80,000 each");
        let why = volatile.may_merge(&state, "p", 2).expect_err("160,000 each");
        assert!(why.contains("160000 objects"), "{why}");
        for any in [0, 8, 16] {
            assert_eq!(volatile.may_merge(&state, "p", any), Ok(()), "{any} is no merge");
        }
        assert_eq!(volatile.may_merge(&state, "another", 1), Ok(()), "refused elsewhere");
    }
}
