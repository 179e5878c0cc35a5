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

    /// Takes in what the report of a clean group says of the OSD's run.
    pub fn recovered(&mut self, state: &MonitorState, osd: OsdId, incarnation: Incarnation, now: Recovered) {
        if state.map.up_osd(osd).is_some_and(|o| o.incarnation == incarnation) {
            self.meter.recovered(osd, incarnation, now);
        }
    }

    /// The first OSD that is up and has not said that `epoch` is in force, of those that `counts` picks.
    pub fn behind(
        &self,
        state: &MonitorState,
        epoch: Epoch,
        counts: impl Fn(&MonitorState, OsdId) -> bool,
    ) -> Option<OsdId> {
        let behind = state.map.osds.iter().filter(|(osd, _)| counts(state, **osd)).find(|(osd, info)| {
            let acked =
                self.osds.get(osd).is_some_and(|r| r.incarnation == info.incarnation && r.acked >= epoch);
            info.up && !acked
        });
        behind.map(|(osd, _)| *osd)
    }
}
