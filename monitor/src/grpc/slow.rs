//! Slow OSDs and what is done about them, as people see it.

use super::Monitor;
use super::volatile::Volatile;
use crate::decide::slow::Slow;
use crate::state::MonitorState;
use gabion_common::clock::boottime_ms;
use gabion_proto::pb;

pub(super) fn policy(state: &MonitorState, volatile: &Volatile) -> pb::SlowPolicy {
    let p = state.slow_policy;
    let osds = volatile.slow.iter().map(|s| one(state, s)).collect();
    pb::SlowPolicy { evict_after_s: p.evict_after_s, limit_ms: p.limit_ms, osds }
}

fn one(state: &MonitorState, s: &Slow) -> pb::SlowOsd {
    let e = &s.evidence;
    pb::SlowOsd {
        id: s.osd.0,
        host: state.map.osds.get(&s.osd).map(|o| o.host.clone()).unwrap_or_default(),
        slow_for_ms: boottime_ms().saturating_sub(s.since_ms),
        reads: e.reads,
        mean_us: e.mean_us,
        others_mean_us: e.others_us,
        accusers: e.accusers as u32,
        witnesses: e.witnesses as u32,
    }
}

/// `osd.3 on host h: a write takes 210.0 ms, with the others 2.1 ms; slow by the word of 2 of 2 peers, for 45 s`
pub(super) fn words(state: &MonitorState, slow: &Slow) -> String {
    let s = one(state, slow);
    let what = if s.reads { "read" } else { "write" };
    let ms = |us: u64| format!("{}.{} ms", us / 1_000, us % 1_000 / 100);
    let by = match s.accusers {
        0 => "its own word".to_owned(),
        n => format!("the word of {n} of {} peers", s.witnesses),
    };
    format!(
        "osd.{} on host {}: a {what} takes {}, with the others {}; slow by {by}, for {} s",
        s.id,
        s.host,
        ms(s.mean_us),
        ms(s.others_mean_us),
        s.slow_for_ms / 1_000
    )
}

impl Monitor {
    pub(super) fn slow_policy(&self) -> pb::SlowPolicy {
        policy(&self.state(), &self.0.volatile.lock())
    }
}
