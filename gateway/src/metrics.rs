//! What a gateway shows to Prometheus.

use crate::exports::Exports;
use gabion_common::metrics::{Labels, Page, Source};
use gabion_proto::pb::ExportState;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// See the module's documentation.
pub struct Figures(pub Arc<Exports>);

impl fmt::Debug for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Figures")
    }
}

impl Source for Figures {
    fn collect(&self, page: &mut Page<'_>) -> fmt::Result {
        let volumes = self.0.volumes();
        page.gauge("gateway_volumes", "Volumes attached here", volumes.len() as u64)?;
        let states = self.0.states();
        let ready = states.iter().filter(|e| e.state == ExportState::Ready as i32).count();
        page.gauge("gateway_exports", "Exports of this host", states.len() as u64)?;
        page.gauge("gateway_exports_ready", "Those that serve", ready as u64)?;
        let of = |figure: fn(&crate::volume::Counts) -> &AtomicU64| {
            let all: Vec<(Labels<'_>, u64)> = volumes
                .iter()
                .map(|v| (vec![("volume", v.name())], figure(v.counts()).load(Relaxed)))
                .collect();
            all
        };
        page.counters("volume_reads", "Reads, since the volume was attached here", of(|c| &c.reads))?;
        page.counters("volume_writes", "Writes", of(|c| &c.writes))?;
        page.counters("volume_read_bytes", "Bytes read", of(|c| &c.read_bytes))?;
        page.counters("volume_written_bytes", "Bytes written", of(|c| &c.written_bytes))?;
        page.counters("volume_errors", "Reads and writes that failed", of(|c| &c.errors))
    }
}
