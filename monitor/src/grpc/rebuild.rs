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

/// Counters of one run of an OSD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    /// Reads, writes, read bytes, written bytes of clients.
    io: [u64; 4],
    recovered: Recovered,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Recovered {
    pub objects: u64,
    pub bytes: u64,
}

impl Recovered {
    fn add_growth(&mut self, last: &mut Recovered, now: Recovered) {
        // A report may come after a newer one.
        self.objects += now.objects.saturating_sub(last.objects);
        self.bytes += now.bytes.saturating_sub(last.bytes);
        *last = Recovered { objects: last.objects.max(now.objects), bytes: last.bytes.max(now.bytes) };
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    at_ms: u64,
    recovered_bytes: u64,
    recovered_objects: u64,
    io: [u64; 4],
}

#[derive(Default)]
pub(super) struct Meter {
    osds: BTreeMap<OsdId, (Incarnation, Counted)>,
    /// All that was ever heard of.
    total: Recovered,
    /// `total` when everything was last seen clean, and before the rebuild that is on or was the last.
    at_rest: Recovered,
    base: Recovered,
    io: [u64; 4],
    rebuilding: bool,
    samples: VecDeque<Sample>,
}

impl Meter {
    /// The counters at the last report of this run of the OSD; none when it is the first that this monitor hears of.
    fn last(&mut self, osd: OsdId, incarnation: Incarnation) -> Option<&mut Counted> {
        match self.osds.get(&osd) {
            Some((run, _)) if *run == incarnation => {}
            Some(_) => _ = self.osds.insert(osd, (incarnation, Counted::default())),
            None => return None,
        }
        self.osds.get_mut(&osd).map(|(_, counted)| counted)
    }

    pub fn osd_stats(&mut self, osd: OsdId, incarnation: Incarnation, stats: &pb::OsdStats) {
        let io = [stats.reads, stats.writes, stats.read_bytes, stats.write_bytes];
        let recovered = Recovered { objects: stats.recovered_objects, bytes: stats.recovered_bytes };
        let Some(last) = self.last(osd, incarnation) else {
            // What a process counted before this monitor first heard of it is not news.
            self.osds.insert(osd, (incarnation, Counted { io, recovered }));
            return;
        };
        let had = std::mem::replace(&mut last.io, io);
        for i in 0..4 {
            self.io[i] += io[i].saturating_sub(had[i]);
        }
        self.recovered(osd, incarnation, recovered);
    }

    /// What this run of the OSD has recovered in all.
    pub fn recovered(&mut self, osd: OsdId, incarnation: Incarnation, now: Recovered) {
        let mut total = self.total;
        if let Some(last) = self.last(osd, incarnation) {
            total.add_growth(&mut last.recovered, now);
        }
        self.total = total;
    }

    /// Since the rebuild began that is on or was the last.
    pub fn rebuilt(&self) -> Recovered {
        Recovered {
            objects: self.total.objects - self.base.objects,
            bytes: self.total.bytes - self.base.bytes,
        }
    }

    pub fn sample(&mut self, at_ms: u64, totals: Totals) {
        let rebuilding = totals.not_clean > 0;
        if rebuilding && !self.rebuilding {
            self.base = self.at_rest;
        }
        if !rebuilding {
            self.at_rest = self.total;
        }
        self.rebuilding = rebuilding;
        self.samples.push_back(Sample {
            at_ms,
            recovered_bytes: self.total.bytes,
            recovered_objects: self.total.objects,
            io: self.io,
        });
        while self.samples.front().is_some_and(|s| s.at_ms + WINDOW_MS < at_ms) {
            self.samples.pop_front();
        }
    }

    /// Recovered objects per second: what is moved of one depends on how much of it is elsewhere already.
    pub fn objects_per_s(&self) -> f64 {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return 0.0 };
        let seconds = (last.at_ms - first.at_ms) as f64 / 1000.0;
        let objects = (last.recovered_objects - first.recovered_objects) as f64;
        if seconds > 0.0 { objects / seconds } else { 0.0 }
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

#[cfg(test)]
mod tests {
    use super::*;

    const OSD: OsdId = OsdId(1);

    fn stats(objects: u64) -> pb::OsdStats {
        pb::OsdStats { recovered_objects: objects, recovered_bytes: objects << 20, ..Default::default() }
    }

    fn not_clean(pgs: u32) -> Totals {
        Totals { pgs: 16, not_clean: pgs, ..Default::default() }
    }

    #[test]
    fn a_rebuild_is_counted_from_its_beginning_to_its_last_object() {
        let mut m = Meter::default();
        m.osd_stats(OSD, Incarnation(1), &stats(100));
        m.sample(500, not_clean(0));
        assert_eq!(m.rebuilt(), Recovered::default(), "counted before this monitor heard of it");
        // Quicker than one sample: begun, and objects counted, before it is seen.
        m.osd_stats(OSD, Incarnation(1), &stats(103));
        m.sample(1000, not_clean(13));
        assert_eq!(m.rebuilt().objects, 3);
        // The report of being clean counts, and an older heartbeat that comes after it does not count again.
        m.recovered(OSD, Incarnation(1), Recovered { objects: 110, bytes: 110 << 20 });
        m.osd_stats(OSD, Incarnation(1), &stats(105));
        m.osd_stats(OSD, Incarnation(1), &stats(110));
        m.sample(1500, not_clean(0));
        assert_eq!(m.rebuilt(), Recovered { objects: 10, bytes: 10 << 20 });
        assert!(m.rates().0 > 0.0);
        // A new run begins at nothing; the next rebuild leaves out what the last one had.
        m.osd_stats(OSD, Incarnation(2), &stats(2));
        m.sample(2000, not_clean(1));
        assert_eq!(m.rebuilt().objects, 2);
    }
}
