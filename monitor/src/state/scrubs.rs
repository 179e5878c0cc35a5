//! When groups were scrubbed, when they are due again, and what scrubs left unrepaired.
//!
//! The state says when; a primary that hears of an order carries it out and reports, and is told again with every
//! heartbeat until it has (`grpc/osds.rs`). So a pass that a new interval ended, or a leader that changed, needs no care.

use super::*;
use gabion_proto::limits::*;

/// Cluster-wide settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubSettings {
    /// 0: never by itself.
    pub interval_s: u64,
    pub deep_interval_s: u64,
    /// At each OSD.
    pub rate_bytes_per_s: u64,
}

impl Default for ScrubSettings {
    fn default() -> ScrubSettings {
        ScrubSettings {
            interval_s: SCRUB_INTERVAL_DEFAULT.as_secs(),
            deep_interval_s: DEEP_SCRUB_INTERVAL_DEFAULT.as_secs(),
            rate_bytes_per_s: SCRUB_RATE_DEFAULT,
        }
    }
}

/// An object without a good copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedObject {
    pub object: ObjectId,
    /// Copies differ and there is no majority; otherwise none can be read whole.
    pub inconsistent: bool,
}

/// What a primary reports of a pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubResult {
    /// Of the order under which it began.
    pub number: u64,
    pub deep: bool,
    pub objects: u64,
    pub findings: u64,
    pub repaired: u64,
    pub damaged_objects: u64,
    pub damaged: Vec<DamagedObject>,
}

/// What is known of one group's scrubs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// When the group was made, or first heard of.
    pub since_unix_ms: u64,
    /// When the last pass ended, and the last deep one; 0: never.
    pub last_unix_ms: u64,
    pub last_deep_unix_ms: u64,
    /// Grows with every pass and every request.
    number: u64,
    /// Asked for by an operator, and the first order that is of after that; `true`: deep.
    requested: Option<(u64, bool)>,
    /// Of the last pass.
    pub last: ScrubResult,
    /// What the last deep pass found damaged, and what light ones since.
    pub damaged_objects: u64,
    pub damaged: Vec<DamagedObject>,
}

impl ScrubRecord {
    /// `true`: deep.
    pub fn requested(&self) -> Option<bool> {
        self.requested.map(|(_, deep)| deep)
    }

    /// With that of a group that becomes part of this one: what was not done for both was not done.
    pub(super) fn unite(&mut self, other: ScrubRecord) {
        self.since_unix_ms = self.since_unix_ms.max(other.since_unix_ms);
        self.last_unix_ms = self.last_unix_ms.min(other.last_unix_ms);
        self.last_deep_unix_ms = self.last_deep_unix_ms.min(other.last_deep_unix_ms);
        self.number = self.number.max(other.number);
        self.requested = match (self.requested, other.requested) {
            (Some((a, deep)), Some((b, also))) => Some((a.max(b), deep || also)),
            (one, other) => one.or(other),
        };
        self.damaged_objects += other.damaged_objects;
        self.damaged.extend(other.damaged);
        self.damaged.truncate(DAMAGED_NAMED_MAX);
    }

    fn due_unix_ms(&self, last_unix_ms: u64, interval_s: u64) -> Option<u64> {
        let last = last_unix_ms.max(self.since_unix_ms);
        (interval_s > 0).then(|| last.saturating_add(interval_s.saturating_mul(1_000)))
    }

    /// How long the group should have been scrubbed, and whether deeply; requests come first.
    fn due(&self, settings: &ScrubSettings, unix_ms: u64) -> Option<(u64, bool)> {
        let overdue = |at: Option<u64>| unix_ms.checked_sub(at?);
        let deep = overdue(self.due_unix_ms(self.last_deep_unix_ms, settings.deep_interval_s));
        if let Some((_, asked_deep)) = self.requested {
            return Some((u64::MAX, asked_deep || deep.is_some()));
        }
        let light = overdue(self.due_unix_ms(self.last_unix_ms, settings.interval_s));
        deep.map(|ms| (ms, true)).or(light.map(|ms| (ms, false)))
    }

    /// Nobody has read everything of the group for two intervals.
    pub fn is_late(&self, settings: &ScrubSettings, unix_ms: u64) -> bool {
        let twice = settings.deep_interval_s.saturating_mul(2);
        self.due_unix_ms(self.last_deep_unix_ms, twice).is_some_and(|at| unix_ms > at)
    }
}

/// A group that its primary is to scrub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubOrder {
    pub pg: PgId,
    pub number: u64,
    pub deep: bool,
}

impl MonitorState {
    /// Which of these groups are to be scrubbed now: those that have waited longest, as many as one OSD does at a time.
    pub fn scrub_orders(&self, unix_ms: u64, groups: impl Iterator<Item = PgId>) -> Vec<ScrubOrder> {
        let clean = |pg: &PgId| self.map.pgs.get(pg).is_some_and(|r| r.clean && r.activated);
        let mut due: Vec<(u64, ScrubOrder)> = groups
            .filter(clean)
            .filter_map(|pg| {
                let unknown = ScrubRecord::default();
                let record = self.scrubs.get(&pg).unwrap_or(&unknown);
                let (waited_ms, deep) = record.due(&self.scrub_settings, unix_ms)?;
                // The first number is 1: an OSD has done everything up to 0.
                Some((waited_ms, ScrubOrder { pg, number: record.number + 1, deep }))
            })
            .collect();
        due.sort_by_key(|(waited_ms, order)| (std::cmp::Reverse(*waited_ms), order.pg));
        due.into_iter().map(|(_, order)| order).take(SCRUB_ORDERS_MAX).collect()
    }

    /// Groups that are new count as scrubbed now; those that are gone are forgotten.
    pub(super) fn keep_scrub_records(&mut self, unix_ms: u64) {
        let pgs = &self.map.pgs;
        self.scrubs.retain(|pg, _| pgs.contains_key(pg));
        for pg in pgs.keys() {
            let new = || ScrubRecord { since_unix_ms: unix_ms, ..ScrubRecord::default() };
            self.scrubs.entry(*pg).or_insert_with(new);
        }
    }

    pub(super) fn set_scrub(&mut self, settings: ScrubSettings) -> CommandResult {
        let ScrubSettings { interval_s, deep_interval_s, rate_bytes_per_s } = settings;
        if rate_bytes_per_s < SCRUB_RATE_MIN {
            return Err(Refusal::invalid(format!("scrubs read at least {SCRUB_RATE_MIN} bytes/s")));
        }
        if settings != self.scrub_settings {
            self.scrub_settings = settings;
            let text = format!(
                "scrubs: every {interval_s} s, deep every {deep_interval_s} s, {rate_bytes_per_s} bytes/s at each OSD"
            );
            self.event(EventSeverity::Ok, text);
        }
        Ok(Reply::Done)
    }

    pub(super) fn request_scrub(
        &mut self,
        pool: Option<String>,
        pg: Option<PgId>,
        deep: bool,
    ) -> CommandResult {
        let pool = pool.map(|name| self.pool_named(&name)).transpose()?;
        if let Some(pg) = pg.filter(|pg| !self.map.pgs.contains_key(pg)) {
            return Err(Refusal::not_found(format!("there is no group {pg}")));
        }
        let chosen = |id: &PgId| pool.is_none_or(|p| id.pool == p) && pg.is_none_or(|pg| *id == pg);
        let chosen: Vec<PgId> = self.map.pgs.keys().copied().filter(chosen).collect();
        for id in &chosen {
            let record = self.scrubs.entry(*id).or_default();
            record.number += 1;
            // What was asked for before is included.
            let deep = deep || record.requested() == Some(true);
            // Orders from now on have this number or a greater one.
            record.requested = Some((record.number + 1, deep));
        }
        Ok(Reply::Scrubs(chosen.len() as u32))
    }

    pub(super) fn pg_scrubbed(
        &mut self,
        unix_ms: u64,
        (osd, incarnation): (OsdId, Incarnation),
        pg: PgId,
        interval: Epoch,
        result: ScrubResult,
    ) -> CommandResult {
        self.current_group(osd, incarnation, pg, interval)?;
        let record = self.scrubs.entry(pg).or_default();
        record.last_unix_ms = unix_ms;
        let known = record.damaged_objects;
        if result.deep {
            record.last_deep_unix_ms = unix_ms;
            record.damaged.clear();
            record.damaged_objects = 0;
        }
        for d in &result.damaged {
            record.damaged.retain(|k| k.object != d.object);
            record.damaged.push(*d);
        }
        record.damaged.truncate(DAMAGED_NAMED_MAX);
        record.damaged_objects =
            record.damaged_objects.max(result.damaged_objects).max(record.damaged.len() as u64);
        // A request that came later, or asked for more, stands.
        record.requested = record.requested.filter(|(n, deep)| *n > result.number || (*deep && !result.deep));
        record.number = record.number.max(result.number) + 1;
        let (findings, repaired, damaged) = (result.findings, result.repaired, record.damaged_objects);
        record.last = ScrubResult { damaged: Vec::new(), ..result };
        if damaged > known {
            let text = format!("the scrub of group {pg} found {damaged} objects without a good copy");
            self.event(EventSeverity::Error, text);
        }
        if repaired > 0 {
            let text = format!("the scrub of group {pg} found {findings} bad copies and replaced {repaired}");
            self.event(EventSeverity::Warn, text);
        }
        Ok(Reply::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gabion_proto::map::{OsdInfo, PgRecord};

    const DAY_MS: u64 = 24 * 3_600_000;
    const PG: PgId = PgId { pool: PoolId(1), index: 0 };

    fn state() -> MonitorState {
        let mut state = MonitorState::default();
        let record = PgRecord { primary: Some(OsdId(1)), clean: true, activated: true, ..Default::default() };
        let osd = OsdInfo {
            host: String::new(),
            rack: String::new(),
            addr: String::new(),
            weight: 1,
            up: true,
            in_cluster: true,
            incarnation: Incarnation(3),
            disk: ClusterId::default(),
            capacity_bytes: 0,
        };
        state.map.osds.insert(OsdId(1), osd);
        state.map.pgs = (0..9).map(|index| (PgId { index, ..PG }, record.clone().into())).collect();
        state.keep_scrub_records(1_000);
        state
    }

    fn orders(state: &MonitorState, unix_ms: u64) -> Vec<ScrubOrder> {
        state.scrub_orders(unix_ms, state.map.pgs.keys().copied())
    }

    fn ends(state: &mut MonitorState, unix_ms: u64, order: ScrubOrder, result: ScrubResult) {
        let result = ScrubResult { number: order.number, deep: order.deep, ..result };
        state.pg_scrubbed(unix_ms, (OsdId(1), Incarnation(3)), order.pg, Epoch(0), result).unwrap();
    }

    #[test]
    fn light_every_day_and_deep_every_week() {
        let mut state = state();
        assert_eq!(orders(&state, DAY_MS), []);
        let (mut light, mut deep) = (0, 0);
        for hour in 0..24 * 7 * 4 {
            let now = 1_000 + hour * DAY_MS / 24;
            for order in orders(&state, now) {
                *(if order.deep { &mut deep } else { &mut light }) += 1;
                ends(&mut state, now, order, ScrubResult::default());
            }
        }
        // Four at an hour: a pass comes a little later each time.
        assert_eq!(deep, 9 * 3);
        assert!((9 * 22..=9 * 24).contains(&light), "{light}");
    }

    #[test]
    fn a_request_stands_until_a_pass_that_began_after_it() {
        let mut state = state();
        state.map.pgs.retain(|pg, _| *pg == PG);
        let begun = {
            state.request_scrub(None, None, false).unwrap();
            orders(&state, 2_000)[0]
        };
        assert!(!begun.deep);
        state.request_scrub(None, Some(PG), true).unwrap();
        ends(&mut state, 3_000, begun, ScrubResult::default());
        let next = orders(&state, 3_000)[0];
        assert!(next.deep && next.number > begun.number);
        ends(&mut state, 4_000, next, ScrubResult::default());
        assert_eq!(orders(&state, 4_000), []);
        let none = PgId { index: 77, ..PG };
        assert!(state.request_scrub(None, Some(none), true).is_err());
    }

    #[test]
    fn damage_is_remembered_until_a_deep_pass_finds_none() {
        let mut state = state();
        let object = ObjectId { volume: VolumeId(1), index: 2, layer: LayerId(0) };
        let damaged = vec![DamagedObject { object, inconsistent: false }];
        let found = ScrubResult { damaged_objects: 1, damaged, ..ScrubResult::default() };
        let order = |deep| ScrubOrder { pg: PG, number: 9, deep };
        ends(&mut state, 2_000, order(true), found);
        ends(&mut state, 3_000, order(false), ScrubResult::default());
        assert_eq!(state.scrubs[&PG].damaged_objects, 1);
        ends(&mut state, 4_000, order(true), ScrubResult::default());
        assert_eq!((state.scrubs[&PG].damaged_objects, state.scrubs[&PG].damaged.len()), (0, 0));
        assert_eq!(state.events.iter().filter(|e| e.severity == EventSeverity::Error).count(), 1);
    }

    #[test]
    fn a_report_of_another_interval_does_not_count() {
        let mut state = state();
        let report = ScrubResult { number: 1, deep: true, ..ScrubResult::default() };
        let stale = state.pg_scrubbed(9, (OsdId(1), Incarnation(3)), PG, Epoch(4), report.clone());
        assert!(stale.is_err());
        assert!(state.pg_scrubbed(9, (OsdId(1), Incarnation(2)), PG, Epoch(0), report).is_err());
        assert_eq!(state.scrubs[&PG].last_unix_ms, 0);
    }

    #[test]
    fn what_is_never_read_is_late() {
        let state = state();
        let late = |unix_ms| state.scrubs[&PG].is_late(&state.scrub_settings, unix_ms);
        assert!(!late(14 * DAY_MS));
        assert!(late(14 * DAY_MS + 2_000));
    }
}
