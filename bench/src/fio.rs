//! Runs one fio job and reads its JSON.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::job::Job;
use crate::report::Measured;

/// `secs` of the job, or, where none are given, one pass over the whole size.
pub fn run(args: &[String], job: &Job, size_bytes: u64, secs: Option<f64>) -> Result<Measured> {
    let mut fio = Command::new("fio");
    fio.args(["--thread", "--direct=1", "--norandommap", "--randrepeat=0", "--group_reporting"])
        .arg("--output-format=json")
        .arg(format!("--name={}", job.name))
        .arg(format!("--rw={}", job.pattern.name()))
        .arg(format!("--bs={}", job.block_bytes))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--size={size_bytes}"))
        .args(args);
    if let Some(secs) = secs {
        fio.arg("--time_based").arg(format!("--runtime={}ms", (secs * 1000.0) as u64));
    }
    let out = fio.output().context("fio cannot be started: is it installed?")?;
    let text = String::from_utf8_lossy(&out.stdout);
    if !out.status.success() {
        bail!("fio failed on {}: {} {}", job.name, text.trim(), String::from_utf8_lossy(&out.stderr).trim());
    }
    parse(&text, job)
}

fn parse(text: &str, job: &Job) -> Result<Measured> {
    // fio writes warnings in front of the document.
    let from = text.find('{').context("fio printed no JSON")?;
    let document: Value = serde_json::from_str(&text[from..]).context("fio's JSON cannot be read")?;
    let result = document.pointer("/jobs/0").context("fio's JSON has no job")?;
    if result["error"].as_i64() != Some(0) {
        bail!("fio reports error {} on {}", result["error"], job.name);
    }
    let side = &result[if job.pattern.writes() { "write" } else { "read" }];
    let number = |pointer: &str| {
        side.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("fio's JSON has no {pointer}"))
    };
    Ok(Measured {
        iops: number("/iops")?,
        bandwidth_bytes_per_s: number("/bw_bytes")?,
        latency_mean_us: number("/lat_ns/mean")? / 1e3,
        latency_p50_us: number("/clat_ns/percentile/50.000000")? / 1e3,
        latency_p99_us: number("/clat_ns/percentile/99.000000")? / 1e3,
        operations: number("/total_ios")? as u64,
        bytes: number("/io_bytes")? as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Pattern;

    #[test]
    fn the_side_of_the_job_is_read() {
        let side = r#"{"iops": 10.5, "bw_bytes": 43008, "total_ios": 21, "io_bytes": 86016, "lat_ns": {"mean": 2000.0},
            "clat_ns": {"percentile": {"50.000000": 1500, "99.000000": 9000}}}"#;
        let text = format!(r#"fio: a warning {{"jobs": [{{"error": 0, "write": {side}, "read": {{}}}}]}}"#);
        let job = Job::new("j", Pattern::RandWrite, 4096, 1);
        let text = text.replace("warning ", "warning\n");
        let found = parse(&text, &job).unwrap();
        assert_eq!((found.operations, found.bytes, found.latency_p99_us), (21, 86016, 9.0));
        assert!(parse(&text, &Job::new("j", Pattern::Read, 4096, 1)).is_err());
        assert!(parse(&text.replace("\"error\": 0", "\"error\": 5"), &job).is_err());
    }
}
