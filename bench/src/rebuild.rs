//! Rebuilds of real daemons: how fast what a lost OSD held is copied while clients are idle, beside fio reading and writing
//! half and half on the same disk, and what a client that writes feels of one.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::job::{Job, Pattern};
use crate::report::{Measured, median};
use crate::{cpu, fio};

/// Between two looks at the status.
const LOOK: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(900);

#[derive(Args, Clone, Debug)]
pub struct RebuildOptions {
    /// The command line tool to start the cluster with.
    #[arg(long, default_value = "gabion")]
    pub gabion: PathBuf,
    /// Where the cluster and the raw file live: the same disk.
    #[arg(long)]
    pub dir: PathBuf,
    /// One is lost while clients are idle, another under load.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(5..=16))]
    pub osds: u32,
    /// Bytes of the volume, all of them written.
    #[arg(long, default_value_t = 2 << 30)]
    pub size: u64,
    /// An erasure-coded pool instead of three copies.
    #[arg(long, value_name = "K+M")]
    pub ec: Option<String>,
    /// Seconds of one run of fio.
    #[arg(long, default_value_t = 5.0)]
    pub secs: f64,
    /// Writes of 4 KiB that the client has in flight.
    #[arg(long, default_value_t = 1)]
    pub depth: u16,
}

/// What the monitors say.
struct Status {
    not_clean: u64,
    inactive: bool,
    recovered_objects: u64,
    recovered_bytes: u64,
}

pub fn run(options: &RebuildOptions, out: &mut impl Write) -> Result<()> {
    ensure!((0.5..=600.0).contains(&options.secs), "a run takes 0.5 to 600 seconds");
    ensure!(options.size >= 64 << 20, "a rebuild of less than 64 MiB says nothing");
    std::fs::create_dir_all(&options.dir)
        .with_context(|| format!("cannot make {}", options.dir.display()))?;
    let cluster = Cluster { gabion: options.gabion.clone(), dir: options.dir.join("cluster") };
    // Three copies of everything on the three that are left, as much again for what is written anew, and the rest.
    cluster.start(options.osds, options.size * 2 + (2 << 30), &["--no-restart"])?;
    let measured = measure(&cluster, options, out);
    let down = cluster.stop();
    measured.and(down)
}

fn measure(cluster: &Cluster, options: &RebuildOptions, out: &mut impl Write) -> Result<()> {
    cluster.volume(options.ec.as_deref(), "bench", options.size)?;
    let uri = cluster.export("bench", "--nbd", "uri")?;
    let client = ["--ioengine=nbd".to_owned(), format!("--uri={uri}")];
    let fill = Job::new("fill", Pattern::Write, 1 << 20, 8);
    let filled = fio::run(&client, &fill, options.size, None)?;
    writeln!(out, "# filled: {:.0} MB/s", filled.bandwidth_bytes_per_s / 1e6)?;
    until(cluster, |s| s.not_clean == 0)?;

    let raw = raw(options, &fill)?;
    let lost = options.osds - 1;
    cluster.gabion(&["dev", "kill", &format!("osd.{lost}"), "--stay-down", "--dir", &cluster.dir_text()?])?;
    until(cluster, |s| s.not_clean > 0 && !s.inactive)?;
    let pids = cluster.pids()?;
    let cpu_before = cpu::of_pids_s(&pids)?;
    let begin = Instant::now();
    cluster.gabion(&["osd", "out", &format!("osd.{lost}")])?;
    let end = until(cluster, |s| s.not_clean == 0)?;
    let (took, cpu_s) = (begin.elapsed().as_secs_f64(), cpu::of_pids_s(&pids)? - cpu_before);
    let rate = end.recovered_bytes as f64 / took;
    writeln!(
        out,
        "idle clients: {} objects, {:.2} GB in {took:.1} s: {:.0} MB/s, {cpu_s:.1} CPU-s of the daemons",
        end.recovered_objects,
        end.recovered_bytes as f64 / 1e9,
        rate / 1e6
    )?;
    writeln!(
        out,
        "fio --rw=rw --rwmixread=50 --bs=1M on the same disk: reads {:.0} MB/s; the rebuild is {:.2} of that",
        raw / 1e6,
        rate / raw
    )?;

    let job = Job::new("client", Pattern::RandWrite, 4096, options.depth);
    // Chunks that are written for the first time after a start cost more: they are not what is compared.
    fio::run(&client, &job, options.size, Some(options.secs))?;
    let mut healthy = Vec::new();
    for _ in 0..3 {
        healthy.push(fio::run(&client, &job, options.size, Some(options.secs))?);
    }
    let lost = options.osds - 2;
    cluster.gabion(&["dev", "kill", &format!("osd.{lost}"), "--stay-down", "--dir", &cluster.dir_text()?])?;
    until(cluster, |s| s.not_clean > 0 && !s.inactive)?;
    let begin = Instant::now();
    cluster.gabion(&["osd", "out", &format!("osd.{lost}")])?;
    let mut during = Vec::new();
    let end = loop {
        let run = fio::run(&client, &job, options.size, Some(options.secs))?;
        let status = look(cluster)?;
        if status.not_clean == 0 {
            // The last run was in part after the rebuild: it counts only where there is no other.
            if during.is_empty() {
                writeln!(out, "# the rebuild was over within one run of the client: take a larger --size")?;
                during.push(run);
            }
            break status;
        }
        during.push(run);
        ensure!(begin.elapsed() < PATIENCE, "no end of the rebuild in {} s", PATIENCE.as_secs());
    };
    let took = begin.elapsed().as_secs_f64();
    writeln!(
        out,
        "under load: {} objects, {:.2} GB in {took:.1} s (to the end of the client's last run): {:.0} MB/s",
        end.recovered_objects,
        end.recovered_bytes as f64 / 1e9,
        end.recovered_bytes as f64 / took / 1e6
    )?;
    type Figure = fn(&Measured) -> f64;
    let middle = |runs: &[Measured], of: Figure| {
        median(runs.iter().map(of).collect()).context("a client that did not run")
    };
    let figures: [(&str, Figure); 4] = [
        ("mean us", |m| m.latency_mean_us),
        ("p50 us", |m| m.latency_p50_us),
        ("p99 us", |m| m.latency_p99_us),
        ("IOPS", |m| m.iops),
    ];
    for (name, of) in figures {
        let (before, now) = (middle(&healthy, of)?, middle(&during, of)?);
        writeln!(
            out,
            "4k random write, depth {}, {name}: healthy {before:.0}, during the rebuild {now:.0} ({:.2}); medians of {} and {} runs",
            options.depth,
            now / before,
            healthy.len(),
            during.len()
        )?;
    }
    Ok(())
}

/// What fio reads per second while it writes as much, on a file beside the cluster.
fn raw(options: &RebuildOptions, fill: &Job) -> Result<f64> {
    let file = options.dir.join("raw.img");
    let base = ["--ioengine=io_uring".to_owned(), format!("--filename={}", file.display())];
    let mixed = [&base[..], &["--rw=rw".to_owned(), "--rwmixread=50".to_owned()]].concat();
    let job = Job::new("mixed", Pattern::Read, 1 << 20, 8);
    let measured = (|| {
        fio::run(&base, fill, options.size, None)?;
        let mut rates = Vec::new();
        for _ in 0..3 {
            rates.push(fio::run(&mixed, &job, options.size, Some(options.secs))?.bandwidth_bytes_per_s);
        }
        median(rates).context("fio did not run")
    })();
    let _ = std::fs::remove_file(file);
    measured
}

fn look(cluster: &Cluster) -> Result<Status> {
    let status: Value = serde_json::from_str(&cluster.gabion(&["-o", "json", "rebuild", "status"])?)
        .context("rebuild status did not answer JSON")?;
    let number = |name: &str| {
        status[name].as_u64().with_context(|| format!("rebuild status answered no {name}: {status}"))
    };
    let pgs = status["pgs"].as_array().context("rebuild status lists no pgs")?;
    let active = |pg: &Value| pg["state"].as_str().is_some_and(|s| s.starts_with("active"));
    Ok(Status {
        not_clean: number("pgs_not_clean")?,
        inactive: !pgs.iter().all(active),
        recovered_objects: number("recovered_objects")?,
        recovered_bytes: number("recovered_bytes")?,
    })
}

fn until(cluster: &Cluster, is_so: impl Fn(&Status) -> bool) -> Result<Status> {
    let begin = Instant::now();
    loop {
        let status = look(cluster)?;
        if is_so(&status) {
            return Ok(status);
        }
        if begin.elapsed() > PATIENCE {
            bail!("after {} s {} groups are not clean", PATIENCE.as_secs(), status.not_clean);
        }
        std::thread::sleep(LOOK);
    }
}
