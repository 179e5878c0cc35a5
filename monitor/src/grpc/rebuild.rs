//! Counting what rebuilds and clients do, from counters that start over with every process and every
//! interval.

use gabion_proto::ids::*;
use gabion_proto::pb;
use std::collections::{BTreeMap, VecDeque};

/// Rates are taken over this long.
const WINDOW_MS: u64 = 5_000;

/// What is missing in the whole cluster.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub pgs: u32,
    pub not_clean: u32,
    pub degraded_objects: u64,
    pub degraded_bytes: u64,
    pub unfound_objects: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    at_ms: u64,
    recovered_bytes: u64,
    io: [u64; 4],
}

#[derive(Default)]
pub(super) struct Meter {
    pgs: BTreeMap<PgId, (u64, u64, u64)>,
    osds: BTreeMap<OsdId, (Incarnation, [u64; 4])>,
    /// Since the rebuild began.
    pub recovered_objects: u64,
    pub recovered_bytes: u64,
    total_recovered_bytes: u64,
    io: [u64; 4],
    rebuilding: bool,
    samples: VecDeque<Sample>,
}

impl Meter {
    pub fn pg_status(&mut self, pg: PgId, status: &pb::PgStatus) {
        let (objects, bytes) = (status.recovered_objects, status.recovered_bytes);
        let last = self.pgs.insert(pg, (status.interval, objects, bytes));
        let (had_objects, had_bytes) = match last {
            Some((interval, o, b)) if interval == status.interval => (o, b),
            _ => (0, 0),
        };
        self.recovered_objects += objects.saturating_sub(had_objects);
        self.recovered_bytes += bytes.saturating_sub(had_bytes);
        self.total_recovered_bytes += bytes.saturating_sub(had_bytes);
    }

    pub fn osd_stats(&mut self, osd: OsdId, incarnation: Incarnation, stats: &pb::OsdStats) {
        let now = [stats.reads, stats.writes, stats.read_bytes, stats.write_bytes];
        // What a process counted before this monitor first heard of it is not news.
        let last = match self.osds.insert(osd, (incarnation, now)) {
            Some((run, last)) if run == incarnation => last,
            Some(_) => [0; 4],
            None => now,
        };
        for i in 0..4 {
            self.io[i] += now[i].saturating_sub(last[i]);
        }
    }

    pub fn sample(&mut self, at_ms: u64, totals: Totals) {
        let rebuilding = totals.not_clean > 0;
        if rebuilding && !self.rebuilding {
            (self.recovered_objects, self.recovered_bytes) = (0, 0);
        }
        self.rebuilding = rebuilding;
        self.samples.push_back(Sample { at_ms, recovered_bytes: self.total_recovered_bytes, io: self.io });
        while self.samples.front().is_some_and(|s| s.at_ms + WINDOW_MS < at_ms) {
            self.samples.pop_front();
        }
    }

    /// Recovered bytes per second, and reads, writes, read bytes, written bytes per second.
    pub fn rates(&self) -> (f64, [f64; 4]) {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return (0.0, [0.0; 4]);
        };
        let seconds = (last.at_ms - first.at_ms) as f64 / 1000.0;
        if seconds <= 0.0 {
            return (0.0, [0.0; 4]);
        }
        let rate = |new: u64, old: u64| (new - old) as f64 / seconds;
        let io = std::array::from_fn(|i| rate(last.io[i], first.io[i]));
        (rate(last.recovered_bytes, first.recovered_bytes), io)
    }
}
