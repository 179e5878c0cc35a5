//! What runs count, and the report of many.

use gabion_osd::core::Branch;
use std::collections::BTreeMap;

type Counts = BTreeMap<&'static str, u64>;

/// Counters of one run.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub redundancy: String,
    pub client_ops: u64,
    pub reads_checked: u64,
    /// Blocks that were read with a byte that nobody wrote, before a scrub found it.
    pub harmed_reads: u64,
    /// Each by kind.
    pub faults: Counts,
    /// What operators changed in the map.
    pub changes: Counts,
    /// What operators and clients did otherwise: snapshots, take-overs.
    pub work: Counts,
    pub messages: Counts,
    pub map_epochs: u64,
    pub virtual_ms: u64,
    /// Its last reads were repeated without as many shards as the code can spare.
    pub degraded_checks: u64,
    /// How often everything healed and was clean.
    pub calms: u64,
    pub scrubs: u64,
    pub scrub_findings: u64,
    pub scrub_repaired: u64,
    /// Reads that were asked of somebody else as well, and those that were answered so.
    pub hedged_reads: u64,
    pub hedges_won: u64,
    pub written_blocks: u64,
    /// What recovery has moved.
    pub recovered_bytes: u64,
    /// OSDs that were slow when the monitors looked.
    pub called_slow: u64,
    pub branches: BTreeMap<Branch, u64>,
}

impl Tally {
    pub fn fault_count(&self) -> u64 {
        self.faults.values().sum()
    }

    pub fn change_count(&self) -> u64 {
        self.changes.values().sum()
    }
}

fn add<K: Ord + Copy>(sum: &mut BTreeMap<K, u64>, more: &BTreeMap<K, u64>) {
    for (kind, n) in more {
        *sum.entry(*kind).or_default() += n;
    }
}

/// Sums of many runs.
#[derive(Default)]
pub struct Report {
    sum: Tally,
    by_redundancy: BTreeMap<String, u64>,
    /// One of each per run.
    operations: Vec<u64>,
    faults: Vec<u64>,
    changes: Vec<u64>,
    virtual_s: Vec<u64>,
}

/// The least, the median and the most.
fn spread(values: &[u64]) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    match sorted[..] {
        [] => "none".into(),
        [least, ..] => format!("{least} / {} / {}", sorted[sorted.len() / 2], sorted[sorted.len() - 1]),
    }
}

fn list<K: std::fmt::Debug>(counts: &BTreeMap<K, u64>) -> String {
    let parts = counts.iter().map(|(kind, n)| format!("{kind:?} {n}").replace('"', ""));
    parts.collect::<Vec<_>>().join(", ")
}

impl Report {
    pub fn add(&mut self, run: &Tally) {
        *self.by_redundancy.entry(run.redundancy.clone()).or_default() += 1;
        self.operations.push(run.client_ops);
        self.faults.push(run.fault_count());
        self.changes.push(run.change_count());
        self.virtual_s.push(run.virtual_ms / 1_000);
        let sum = &mut self.sum;
        sum.client_ops += run.client_ops;
        sum.reads_checked += run.reads_checked;
        sum.harmed_reads += run.harmed_reads;
        sum.map_epochs += run.map_epochs;
        sum.virtual_ms += run.virtual_ms;
        sum.degraded_checks += run.degraded_checks;
        sum.calms += run.calms;
        sum.scrubs += run.scrubs;
        sum.scrub_findings += run.scrub_findings;
        sum.scrub_repaired += run.scrub_repaired;
        sum.hedged_reads += run.hedged_reads;
        sum.hedges_won += run.hedges_won;
        sum.written_blocks += run.written_blocks;
        sum.recovered_bytes += run.recovered_bytes;
        sum.called_slow += run.called_slow;
        add(&mut sum.faults, &run.faults);
        add(&mut sum.changes, &run.changes);
        add(&mut sum.work, &run.work);
        add(&mut sum.messages, &run.messages);
        add(&mut sum.branches, &run.branches);
    }

    pub fn runs(&self) -> usize {
        self.operations.len()
    }

    pub fn print(&self) {
        let sum = &self.sum;
        println!(
            "{} seeds without a finding: {} client operations, {} block reads checked, {} faults, {} map changes, {} map epochs, {:.1} virtual hours",
            self.runs(),
            sum.client_ops,
            sum.reads_checked,
            sum.fault_count(),
            sum.change_count(),
            sum.map_epochs,
            sum.virtual_ms as f64 / 3_600_000.0
        );
        println!(
            "each (least / median / most): operations {}; faults {}; map changes {}; virtual seconds {}",
            spread(&self.operations),
            spread(&self.faults),
            spread(&self.changes),
            spread(&self.virtual_s)
        );
        println!(
            "seeds: {}; healed and clean {} times; {} read back without shards",
            list(&self.by_redundancy),
            sum.calms,
            sum.degraded_checks
        );
        println!(
            "scrubs: {} passes, {} findings, {} repaired; {} blocks were read wrong before they were found",
            sum.scrubs, sum.scrub_findings, sum.scrub_repaired, sum.harmed_reads
        );
        println!(
            "reads: {} hedged, {} answered so; somebody slow {} times when the monitors looked",
            sum.hedged_reads, sum.hedges_won, sum.called_slow
        );
        println!("recovery: {} MiB moved, {} blocks written", sum.recovered_bytes >> 20, sum.written_blocks);
        println!("faults: {}", list(&sum.faults));
        println!("map changes: {}", list(&sum.changes));
        println!("besides: {}", list(&sum.work));
        println!("messages: {}", list(&sum.messages));
        println!("ways through the core: {}", list(&sum.branches));
        let never: Vec<String> =
            Branch::ALL.iter().filter(|b| !sum.branches.contains_key(b)).map(|b| format!("{b:?}")).collect();
        println!("never taken: {}", if never.is_empty() { "none".into() } else { never.join(", ") });
    }
}
