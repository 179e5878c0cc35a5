//! Results: one JSON line per run, and medians as a table.

use std::io::Write;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::job::Job;

/// What a load generator saw.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    pub iops: f64,
    pub bandwidth_bytes_per_s: f64,
    pub latency_mean_us: f64,
    pub latency_p50_us: f64,
    pub latency_p99_us: f64,
    pub operations: u64,
    pub bytes: u64,
}

/// One run of one job on one target.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    pub target: String,
    pub job: String,
    pub round: u32,
    #[serde(flatten)]
    pub measured: Measured,
    pub daemons_cpu_s: f64,
    pub client_cpu_s: f64,
}

impl Run {
    fn per_cpu_s(&self, amount: f64) -> f64 {
        amount / (self.daemons_cpu_s + self.client_cpu_s).max(0.01)
    }

    pub fn operations_per_cpu_s(&self) -> f64 {
        self.per_cpu_s(self.measured.operations as f64)
    }

    pub fn bytes_per_cpu_s(&self) -> f64 {
        self.per_cpu_s(self.measured.bytes as f64)
    }
}

/// The middle value; the mean of the two middle ones of an even number. None of nothing.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        len if len % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Medians over the rounds, a row per job and target; what has no run says so.
pub fn table(jobs: &[Job], targets: &[&str], runs: &[Run], out: &mut impl Write) -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "job",
        "target",
        "runs",
        "IOPS",
        "MB/s",
        "p50 µs",
        "p99 µs",
        "daemons CPU s",
        "client CPU s",
        "op/CPU-s",
        "MB/CPU-s",
    ]);
    for job in jobs {
        for target in targets {
            let of: Vec<&Run> =
                runs.iter().filter(|run| run.job == job.name && run.target == *target).collect();
            let mut row = vec![job.name.clone(), (*target).to_owned(), of.len().to_string()];
            let middle = |value: fn(&Run) -> f64, digits: usize| {
                median(of.iter().map(|run| value(run)).collect())
                    .map_or_else(|| "not shown".to_owned(), |value| format!("{value:.digits$}"))
            };
            row.push(middle(|run| run.measured.iops, 0));
            row.push(middle(|run| run.measured.bandwidth_bytes_per_s / 1e6, 1));
            row.push(middle(|run| run.measured.latency_p50_us, 0));
            row.push(middle(|run| run.measured.latency_p99_us, 0));
            row.push(middle(|run| run.daemons_cpu_s, 2));
            row.push(middle(|run| run.client_cpu_s, 2));
            row.push(middle(Run::operations_per_cpu_s, 0));
            row.push(middle(|run| run.bytes_per_cpu_s() / 1e6, 1));
            table.add_row(row);
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    writeln!(out, "{table}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
