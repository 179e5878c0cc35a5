//! What the group tells the monitors.

use super::ops::PATIENCE_MS;
use super::*;
use crate::core::Damage;
use gabion_proto::pb;

/// As the monitors hear of it.
pub fn damaged_object((object, damage): (ObjectId, Damage)) -> pb::DamagedObject {
    pb::DamagedObject {
        volume: object.volume.0,
        index: object.index,
        layer: object.layer.0,
        inconsistent: damage == Damage::Inconsistent,
    }
}

impl Pg {
    /// From its primary only.
    pub fn status(&self, own: OsdId, map: &ClusterMap) -> Option<pb::PgStatus> {
        let record = map.pgs.get(&self.id)?;
        if record.interval != self.record.interval || record.primary != Some(own) {
            return None;
        }
        let pool = map.pools.get(&self.id.pool)?;
        let width = pool.redundancy.width();
        let mut status = pb::PgStatus {
            pool: self.id.pool.0,
            index: self.id.index,
            interval: self.record.interval.0,
            objects: self.index.objects.len() as u64,
            recovered_objects: self.recovered_objects,
            recovered_bytes: self.recovered_bytes,
            ..Default::default()
        };
        let (state, waiting_for) = match &self.phase {
            Phase::Loading => (pb::PgState::Peering, "its own disk".to_owned()),
            Phase::Member(_) => return None,
            Phase::Undersized => {
                let have = self.record.members().count();
                (pb::PgState::UndersizedInactive, format!("{} members, {have} are up", pool.min_size))
            }
            Phase::Peering(p) if p.waiting_for().starts_with("a member of interval") => {
                (pb::PgState::Incomplete, p.waiting_for().to_owned())
            }
            Phase::Peering(p) => (pb::PgState::Peering, p.waiting_for().to_owned()),
            Phase::Activating(a) => {
                (pb::PgState::Peering, format!("the activation by {:?}", a.waiting_for()))
            }
            Phase::Broken(why) => (pb::PgState::Down, why.clone()),
            Phase::Active(a) => {
                // Every object lacks the copies of places that nobody holds.
                let vacant = width.saturating_sub(self.record.members().count()) as u64;
                status.degraded_objects = a.recovery.degraded() + vacant * status.objects;
                let k = self.code.as_ref().map_or(1, |c| u64::from(c.geometry().k));
                status.degraded_bytes = status.degraded_objects * u64::from(pool.object_bytes) / k;
                status.unfound_objects = a.recovery.unfound(own);
                status.scrub = a.scrub.progress(self.counters.scrub_repaired);
                status.damaged_objects = a.scrub.damaged.len() as u64;
                status.damaged = a.scrub.damaged_named().into_iter().map(damaged_object).collect();
                let state = if self.fills {
                    pb::PgState::UndersizedInactive
                } else if !a.recovery.is_done() {
                    pb::PgState::ActiveRecovering
                } else if self.record.members().count() < width {
                    pb::PgState::ActiveDegraded
                } else {
                    pb::PgState::ActiveClean
                };
                let unfound = status.unfound_objects;
                let text = if self.fills {
                    self.fill_waits_for(&a.recovery, pool.min_size, own)
                } else if unfound > 0 {
                    format!("a holder of {unfound} unfound objects")
                } else {
                    String::new()
                };
                (state, text)
            }
        };
        status.state = state.into();
        status.waiting_for = waiting_for;
        Some(status)
    }

    /// While the group brings its members, too few to serve, up to date.
    fn fill_waits_for(&self, r: &recovery::Recovery, min_size: u32, own: OsdId) -> String {
        let have = self.record.members().count();
        let (missing, unfound, unsettled) = (r.degraded(), r.unfound(own), r.unsettled());
        let then: Vec<String> = self.record.held_back().map(|o| o.to_string()).collect();
        let first = match (unfound, unsettled) {
            (0, 0) => format!("{missing} shards to be rebuilt"),
            (0, _) => format!("a member of an earlier interval, about {unsettled} objects"),
            _ => format!("a holder of {unfound} unfound objects"),
        };
        format!("{min_size} members, {have} are up; before {} may join: {first}", then.join(", "))
    }

    /// Members that owe this primary something for long enough to be reported, and the primary itself when it cannot
    /// go on.
    pub fn stuck(&self, own: OsdId, now: Millis, limit_ms: Millis, map: &ClusterMap) -> Vec<pb::StuckPeer> {
        let mut late = self.late_members(now, limit_ms);
        // Peering and activation wait for every acting member, too; they take what they take.
        let age = now.saturating_sub(self.since);
        let age = if age < PATIENCE_MS { 0 } else { age };
        match &self.phase {
            Phase::Peering(p) => late.extend(p.silent_members(&self.record).into_iter().map(|o| (o, age))),
            Phase::Activating(a) => late.extend(a.waiting_for().into_iter().map(|o| (o, age))),
            _ => {}
        }
        late.extend(self.own_fault(own, (age, limit_ms), map).map(|age| (own, age)));
        late.into_iter()
            .filter(|(_, age)| *age >= limit_ms)
            .filter_map(|(o, age_ms)| {
                let incarnation = map.up_osd(o)?.incarnation;
                Some(pb::StuckPeer {
                    pool: self.id.pool.0,
                    pg: self.id.index,
                    interval: self.record.interval.0,
                    peer: o.0,
                    peer_incarnation: incarnation.0,
                    age_ms,
                })
            })
            .collect()
    }

    /// For how long the group has needed an interval without its own primary.
    fn own_fault(&self, own: OsdId, (age, at_once): (Millis, Millis), map: &ClusterMap) -> Option<Millis> {
        let enough = map.pools.get(&self.id.pool)?.min_size as usize;
        let others_go_on = self.record.members().count() > enough;
        match &self.phase {
            Phase::Broken(_) if self.record.primary != Some(own) => None,
            Phase::Broken(_) if others_go_on => Some(at_once),
            // Not at once: the group stands still without it, and this may go on for as long as the disk is bad.
            Phase::Broken(_) => Some(age),
            Phase::Active(_) if self.wants_interval => Some(at_once),
            _ => None,
        }
    }
}
