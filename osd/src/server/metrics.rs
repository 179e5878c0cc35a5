//! What an OSD shows to Prometheus: the figures of its last heartbeat, twice a second, and of its store.

use crate::store::Stats;
use gabion_common::metrics::{Page, Source};
use gabion_proto::ids::OsdId;
use gabion_proto::pb::{LatencyFigures, LatencyWindow, OsdStats, PeerLatency};
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// Written by the one task that owns the OSD, read by scrapes; held to copy it only.
#[derive(Clone, Debug)]
pub struct Figures {
    osd: OsdId,
    last: Arc<Mutex<(OsdStats, Stats, u64, LatencyWindow)>>,
}

impl Figures {
    pub fn new(osd: OsdId) -> Figures {
        Figures { osd, last: Arc::default() }
    }

    pub fn set(&self, stats: OsdStats, store: Stats, primary_pgs: u64, latency: LatencyWindow) {
        *self.last.lock() = (stats, store, primary_pgs, latency);
    }
}

impl Source for Figures {
    fn collect(&self, page: &mut Page<'_>) -> fmt::Result {
        let (stats, store, primary_pgs, latency) = self.last.lock().clone();
        let osd = self.osd.0.to_string();
        page.gauges("osd_info", "The number of this OSD", [(vec![("osd", osd.as_str())], 1)])?;
        page.counter("osd_reads", "Reads of clients", stats.reads)?;
        page.counter("osd_writes", "Writes of clients", stats.writes)?;
        page.counter("osd_read_bytes", "Bytes read by clients", stats.read_bytes)?;
        page.counter("osd_written_bytes", "Bytes written by clients", stats.write_bytes)?;
        page.counter("osd_recovered_objects", "Objects recovered as primary", stats.recovered_objects)?;
        page.counter("osd_recovered_bytes", "Bytes of them", stats.recovered_bytes)?;
        page.counter(
            "osd_scrubbed_objects",
            "Objects that scrubs of this primary looked at",
            stats.scrubbed_objects,
        )?;
        page.counter("osd_scrubbed_bytes", "Bytes that scrubs read from this disk", stats.scrubbed_bytes)?;
        page.counter(
            "osd_scrub_findings",
            "Copies that scrubs of this primary found bad",
            stats.scrub_findings,
        )?;
        page.counter("osd_scrub_repaired", "Of them replaced", stats.scrub_repaired)?;
        page.counter(
            "osd_checksum_errors",
            "Blocks that did not match their checksum",
            stats.checksum_errors,
        )?;
        page.counter(
            "osd_hedged_reads",
            "Reads of this primary that were asked of another OSD as well, because the first one was late",
            stats.hedged_reads,
        )?;
        page.counter("osd_hedges_won", "Of them answered that way", stats.hedges_won)?;
        let writes = |p: &PeerLatency| p.writes;
        let reads = |p: &PeerLatency| p.reads;
        latencies(
            page,
            "osd_peer_write_mean_us",
            "Mean time until a write was durable at an OSD",
            &latency,
            writes,
        )?;
        latencies(page, "osd_peer_read_mean_us", "Mean time of a read at an OSD", &latency, reads)?;
        page.gauge("osd_capacity_bytes", "Room on the disk", stats.capacity_bytes)?;
        page.gauge("osd_used_bytes", "Of it used", stats.used_bytes)?;
        page.gauge("osd_objects", "Objects on the disk", stats.objects)?;
        page.gauge("osd_primary_pgs", "Groups that this OSD leads", primary_pgs)?;
        page.counter("store_commits", "Records committed to the journal", store.records)?;
        page.counter("store_data_bytes", "Bytes of data made durable", store.data_bytes)?;
        page.counter("store_checkpoints", "Times that the journal was trimmed", store.checkpoints)?;
        page.counter("store_index_bytes", "Bytes handed to the index", store.index_bytes)?;
        page.gauge("store_journal_bytes", "Size of the journal", store.journal_bytes)?;
        page.gauge("store_journal_used_bytes", "Of it in use", store.journal_used_bytes)?;
        page.counter("device_read_bytes", "Bytes read from the disk", store.traffic.bytes_read)?;
        page.counter("device_written_bytes", "Bytes written to the disk", store.traffic.bytes_written)?;
        page.counter("device_flushes", "Flushes of the disk", store.traffic.flushes)?;
        page.counter(
            "device_durable_writes",
            "Writes that were durable by themselves",
            store.traffic.durable_writes,
        )
    }
}

/// Of the last whole window, by OSD: this one, and those that it works with.
fn latencies(
    page: &mut Page<'_>,
    name: &str,
    help: &str,
    window: &LatencyWindow,
    of: impl Fn(&PeerLatency) -> Option<LatencyFigures>,
) -> fmt::Result {
    let figures = window.peers.iter().filter_map(|p| Some((p.osd.to_string(), of(p)?.mean_us)));
    let figures: Vec<(String, u64)> = figures.collect();
    page.gauges(name, help, figures.iter().map(|(osd, us)| (vec![("osd", osd.as_str())], *us)))
}
