//! What a monitor shows to Prometheus. The cluster's figures come from the leader alone: a follower hears no
//! heartbeats, and its zeroes would look like a cluster that is gone.

use super::{Monitor, health, view};
use gabion_common::metrics::{Page, Source};
use gabion_proto::pb;
use std::collections::BTreeMap;
use std::fmt;

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Monitor")
    }
}

impl Source for Monitor {
    fn collect(&self, page: &mut Page<'_>) -> fmt::Result {
        let leads = self.0.lead.lock().is_some();
        let state = self.state();
        page.gauge(
            "monitor_leads",
            "Whether this monitor leads: the others show nothing of the cluster",
            leads.into(),
        )?;
        page.gauge("map_epoch", "Epoch of the cluster map", state.map.epoch.0)?;
        if !leads {
            return Ok(());
        }
        let volatile = self.0.volatile.lock();
        let osds = view::osds(&state, &volatile);
        let count = |of: &dyn Fn(&pb::OsdDetail) -> bool| osds.iter().filter(|o| of(o)).count() as u64;
        page.gauge("osds", "OSDs in the map", osds.len() as u64)?;
        page.gauge("osds_up", "OSDs that are up", count(&|o| o.up))?;
        page.gauge("osds_in", "OSDs that hold data by placement", count(&|o| o.r#in))?;
        page.gauge("osds_slow", "OSDs that answer much slower than the others", volatile.slow.len() as u64)?;
        let counted = || osds.iter().filter(|o| o.r#in);
        page.gauge(
            "capacity_bytes",
            "Room of the OSDs that are in",
            counted().map(|o| o.capacity_bytes).sum(),
        )?;
        page.gauge("used_bytes", "Of it used", counted().map(|o| o.used_bytes).sum())?;

        let mut pgs: BTreeMap<&str, u64> = BTreeMap::new();
        for (id, record) in &state.map.pgs {
            let (words, _) = view::pg_state(&state, &volatile, *id, record);
            *pgs.entry(words).or_default() += 1;
        }
        let pgs = pgs.iter().map(|(words, n)| (vec![("state", *words)], *n));
        page.gauges("pgs", "Placement groups by state", pgs)?;
        let rebuild = view::rebuild(&state, &volatile);
        page.gauge(
            "pgs_not_clean",
            "Placement groups that are not active and clean",
            rebuild.pgs_not_clean.into(),
        )?;
        page.gauge(
            "degraded_objects",
            "Objects that members of their groups lack",
            rebuild.degraded_objects,
        )?;
        page.gauge("degraded_bytes", "Bytes of them", rebuild.degraded_bytes)?;
        page.gauge("unfound_objects", "Objects without a usable copy", rebuild.unfound_objects)?;
        page.gauge(
            "rebuild_recovered_objects",
            "Recovered since the rebuild began",
            rebuild.recovered_objects,
        )?;
        page.gauge("rebuild_recovered_bytes", "Bytes of them", rebuild.recovered_bytes)?;

        let scrubs = view::scrubs(&state, &volatile, None);
        let total = |of: &dyn Fn(&pb::PgScrub) -> u64| scrubs.iter().map(of).sum();
        page.gauge("damaged_objects", "Objects without a good copy", total(&|s| s.damaged_objects))?;
        page.gauge(
            "pgs_scrubbing",
            "Placement groups that are being scrubbed",
            total(&|s| u64::from(s.running != "none")),
        )?;
        let now = view::unix_ms();
        let late = state.scrubs.values().filter(|r| r.is_late(&state.scrub_settings, now)).count() as u64;
        page.gauge(
            "pgs_not_scrubbed",
            "Placement groups that were not read as a whole for two deep intervals",
            late,
        )?;

        for (name, help, n) in [
            ("pools", "Pools", state.map.pools.len()),
            ("volumes", "Volumes", state.volumes.len()),
            ("exports", "Exports", state.exports.len()),
            ("vms", "Virtual machines", state.vms.len()),
        ] {
            page.gauge(name, help, n as u64)?;
        }
        let quorum = self.quorum(self.0.consensus.standing().borrow().in_touch);
        let report = health::report(&state, &volatile, &quorum);
        let checks: Vec<(String, u64)> = report
            .checks
            .iter()
            .map(|c| (c.code.clone(), u64::from(c.severity == pb::Severity::Error as i32) + 1))
            .collect();
        let checks = checks.iter().map(|(code, level)| (vec![("code", code.as_str())], *level));
        page.gauges("health_check", "Problems: 1 is a warning, 2 an error", checks)
    }
}
