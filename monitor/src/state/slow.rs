//! What is done about OSDs that stay slow. Who is slow is not agreed on, it is found out by the leader (`decide/slow.rs`); whether
//! one may be taken out for it is asked of the state when it comes to that.

use super::*;
use gabion_proto::limits::{SLOW_EVICT_MAX, SLOW_EVICT_MIN, SUBOP_STUCK, SUBOP_STUCK_MAX, SUBOP_STUCK_MIN};
use gabion_proto::map::PgRecord;

/// Cluster-wide settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlowPolicy {
    /// Who is slow for this long is taken out; 0: nobody is, health warns.
    pub evict_after_s: u64,
    /// How long a member may owe a sub-operation before its group goes on without it (rule P8).
    pub limit_ms: u64,
}

impl Default for SlowPolicy {
    fn default() -> SlowPolicy {
        SlowPolicy { evict_after_s: 0, limit_ms: SUBOP_STUCK.as_millis() as u64 }
    }
}

impl MonitorState {
    pub(super) fn set_slow_policy(&mut self, policy: SlowPolicy) -> CommandResult {
        let evict = SLOW_EVICT_MIN.as_secs()..=SLOW_EVICT_MAX.as_secs();
        if policy.evict_after_s > 0 && !evict.contains(&policy.evict_after_s) {
            return Err(Refusal::invalid(format!(
                "slow OSDs are taken out after {} to {} s; 0 is never",
                evict.start(),
                evict.end()
            )));
        }
        let limit = SUBOP_STUCK_MIN.as_millis() as u64..=SUBOP_STUCK_MAX.as_millis() as u64;
        if !limit.contains(&policy.limit_ms) {
            return Err(Refusal::invalid(format!(
                "one member may delay writes for {} to {} s: who is down is noticed sooner by its lease",
                limit.start() / 1_000,
                limit.end() / 1_000
            )));
        }
        if std::mem::replace(&mut self.slow_policy, policy) != policy {
            let evict = match policy.evict_after_s {
                0 => "health warns".to_owned(),
                after => format!("taken out after {after} s"),
            };
            let text = format!("slow OSDs: {evict}; one delays writes for at most {} ms", policy.limit_ms);
            self.event(EventSeverity::Ok, text);
        }
        Ok(Reply::Done)
    }

    /// Why a slow OSD is not taken out now. Redundancy comes first: nothing else may be wrong, every group must be left with
    /// what it needs to serve, and the one before must have been dealt with.
    pub fn evictable(&self, osd: OsdId, incarnation: Incarnation) -> Result<(), Refusal> {
        if self.slow_policy.evict_after_s == 0 {
            return Err(Refusal::precondition("slow OSDs are not taken out"));
        }
        let info = self.osd(osd)?;
        if !info.up || info.incarnation != incarnation || !info.in_cluster {
            return Err(Refusal::aborted(format!("{osd} is not up and in as {incarnation}")));
        }
        let evicted = self.osd_flags.iter().find(|(o, f)| f.slow_out && self.is_out(**o));
        if let Some((other, _)) = evicted {
            return Err(Refusal::precondition(format!(
                "{other} was taken out before: remove it or take it in"
            )));
        }
        for (pg, record) in &self.map.pgs {
            let Some(pool) = self.map.pools.get(&pg.pool) else { continue };
            let left_out = record.up.contains(&osd) && !record.acting.contains(&osd);
            let whole = record.members().count() + usize::from(left_out) == pool.redundancy.width();
            if !(record.activated && record.clean && whole) {
                return Err(Refusal::precondition(format!("group {pg} is not clean")));
            }
            let others = |r: &PgRecord| r.members().filter(|o| *o != osd).count();
            if others(record) < pool.min_size as usize {
                return Err(Refusal::precondition(format!("group {pg} cannot serve without {osd}")));
            }
        }
        Ok(())
    }

    fn is_out(&self, osd: OsdId) -> bool {
        self.map.osds.get(&osd).is_some_and(|o| !o.in_cluster)
    }

    /// It stays out, also after a boot, until an operator takes it in.
    pub(super) fn evict_slow(&mut self, osd: OsdId, incarnation: Incarnation) -> CommandResult {
        self.evictable(osd, incarnation)?;
        let flags = self.osd_flags.entry(osd).or_default();
        (flags.automatic_out, flags.slow_out) = (false, true);
        self.change_groups(true, |map| {
            if let Some(info) = map.osds.get_mut(&osd) {
                info.in_cluster = false;
            }
        });
        let after = self.slow_policy.evict_after_s;
        let text = format!("{osd} is out, because it was slow for {after} s: its data moves elsewhere");
        self.event(EventSeverity::Warn, text);
        Ok(Reply::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{activate, clean, cluster, down, pg};
    use super::*;

    const POLICY: SlowPolicy = SlowPolicy { evict_after_s: 60, limit_ms: 10_000 };

    fn ready(osds: u8, groups: u32) -> MonitorState {
        let mut state = cluster(osds, groups);
        all_clean(&mut state, groups);
        state.apply(0, Command::SetSlowPolicy(POLICY)).unwrap();
        state
    }

    fn all_clean(state: &mut MonitorState, groups: u32) {
        for index in 0..groups {
            activate(state, pg(index));
            clean(state, pg(index));
        }
    }

    fn evict(state: &mut MonitorState, n: u32) -> CommandResult {
        let osd = OsdId(n);
        let incarnation = state.map.osds[&osd].incarnation;
        state.apply(0, Command::EvictSlow { osd, incarnation })
    }

    #[test]
    fn only_by_policy() {
        let mut state = ready(4, 4);
        state.apply(0, Command::SetSlowPolicy(SlowPolicy::default())).unwrap();
        assert!(evict(&mut state, 1).is_err());
        state.apply(0, Command::SetSlowPolicy(POLICY)).unwrap();
        evict(&mut state, 1).unwrap();
        assert!(!state.map.osds[&OsdId(1)].in_cluster);
        assert!(state.map.pgs.values().all(|r| !r.acting.contains(&OsdId(1)) && r.members().count() == 3));
    }

    #[test]
    fn one_at_a_time_and_only_while_all_else_is_well() {
        let mut state = ready(5, 8);
        down(&mut state, 0);
        assert!(evict(&mut state, 1).is_err(), "another one is down");
        let mut state = ready(5, 8);
        evict(&mut state, 1).unwrap();
        assert!(evict(&mut state, 2).is_err(), "its data still moves");
        all_clean(&mut state, 8);
        assert!(evict(&mut state, 2).is_err(), "the first one is still there");
        let stale = Command::EvictSlow { osd: OsdId(2), incarnation: Incarnation(99) };
        assert!(state.apply(0, stale).is_err());
        state.apply(0, Command::InOsd { osd: OsdId(1) }).unwrap();
        all_clean(&mut state, 8);
        evict(&mut state, 2).unwrap();
    }

    #[test]
    fn down_to_min_size_and_no_further() {
        let mut state = ready(3, 4);
        state.apply(0, Command::SetPool { name: "p".into(), min_size: Some(3) }).unwrap();
        all_clean(&mut state, 4);
        assert!(evict(&mut state, 1).is_err());
        state.apply(0, Command::SetPool { name: "p".into(), min_size: Some(2) }).unwrap();
        all_clean(&mut state, 4);
        evict(&mut state, 1).unwrap();
        assert!(state.map.pgs.values().all(|r| r.members().count() == 2));
    }

    /// What made it slow may be there after a boot, too.
    #[test]
    fn a_boot_does_not_bring_it_back() {
        let mut state = ready(4, 4);
        evict(&mut state, 1).unwrap();
        super::super::tests::boot(&mut state, 1).unwrap();
        assert!(!state.map.osds[&OsdId(1)].in_cluster);
        state.apply(0, Command::InOsd { osd: OsdId(1) }).unwrap();
        assert!(state.map.osds[&OsdId(1)].in_cluster && !state.osd_flags[&OsdId(1)].slow_out);
    }

    #[test]
    fn settings_have_bounds() {
        let mut state = cluster(3, 1);
        let mut set = |evict_after_s, limit_ms| {
            state.apply(0, Command::SetSlowPolicy(SlowPolicy { evict_after_s, limit_ms })).is_ok()
        };
        for (evict_after_s, limit_ms, good) in [
            (0, 10_000, true),
            (60, 4_000, true),
            (1, 10_000, false),
            (u64::MAX, 10_000, false),
            (0, 3_999, false),
            (0, 0, false),
            (0, 600_001, false),
            (604_800, 600_000, true),
        ] {
            assert_eq!(set(evict_after_s, limit_ms), good, "{evict_after_s} s, {limit_ms} ms");
        }
    }
}
