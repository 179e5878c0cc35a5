//! One object store in this process, through its thread as an OSD uses it, beside fio on a preallocated file of the same
//! disk: the same jobs in alternating rounds, with user and system time and the bytes that reach the disk.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use gabion_osd::store::thread::{StoreHandle, StoreThread};
use gabion_osd::store::{self, Engine, Identity, StoreError, Txn, TxnOp};
use gabion_proto::blocks::Content;
use gabion_proto::ids::{ClusterId, LayerId, ObjectId, OsdId, PgId, PoolId, Version, VolumeId};
use gabion_proto::limits::{BLOCK_BYTES, OBJECT_BYTES_DEFAULT};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::cpu;
use crate::fio;
use crate::index;
use crate::job::{Job, Pattern};
use crate::report::{Measured, median};

const PG: PgId = PgId { pool: PoolId(1), index: 0 };
const QUEUE: usize = 1024;

#[derive(Args, Clone, Debug)]
pub struct StoreOptions {
    /// Directory on the disk to measure; the store and fio's file are made in it and removed again.
    pub dir: PathBuf,
    /// How often every job runs on each target.
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
    /// Seconds of one run.
    #[arg(long, default_value_t = 5.0)]
    pub secs: f64,
    /// Bytes of data in use.
    #[arg(long, default_value_t = 1 << 30)]
    pub size: u64,
    /// Only these jobs, by name.
    #[arg(long = "only", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Plain reads and writes instead of io_uring.
    #[arg(long)]
    pub plain: bool,
    /// Instead: start-up and memory with the index records of so many GiB, which are made without their payload.
    #[arg(long, value_name = "GIB", num_args = 0..=1, default_missing_value = "100")]
    pub index: Option<u32>,
}

fn jobs() -> Vec<Job> {
    vec![
        Job::new("durable-4k-qd1", Pattern::RandWrite, 4096, 1),
        Job::new("durable-4k-qd32", Pattern::RandWrite, 4096, 32),
        Job::new("read-4k-qd32", Pattern::RandRead, 4096, 32),
        Job::new("durable-128k-qd8", Pattern::RandWrite, 128 << 10, 8),
        Job::new("write-1m-qd8", Pattern::Write, 1 << 20, 8),
        Job::new("read-1m-qd8", Pattern::Read, 1 << 20, 8),
    ]
}

/// One run of one job on one target.
struct Run {
    job: String,
    target: &'static str,
    measured: Measured,
    user_s: f64,
    system_s: f64,
    /// Bytes that the kernel sent to the disk for each byte written, everything settled.
    amplification: f64,
}

pub fn run(options: &StoreOptions, out: &mut impl Write) -> Result<()> {
    if let Some(gib) = options.index {
        return index::run(&options.dir, gib, out);
    }
    let mut jobs = jobs();
    jobs.retain(|job| options.only.is_empty() || options.only.contains(&job.name));
    if jobs.is_empty() || options.rounds == 0 || options.size < 64 << 20 {
        bail!("a measurement needs a known job, a round and at least 64 MiB");
    }
    let (store_dir, file) = (options.dir.join("bench-store"), options.dir.join("bench-file"));
    for path in [&store_dir, &file] {
        if path.exists() {
            bail!("{} exists: it is left alone", path.display());
        }
    }
    let result = measure(options, &jobs, &store_dir, &file, out);
    let _ = std::fs::remove_dir_all(&store_dir);
    let _ = std::fs::remove_file(&file);
    result
}

fn measure(
    options: &StoreOptions,
    jobs: &[Job],
    dir: &Path,
    file: &Path,
    out: &mut impl Write,
) -> Result<()> {
    // Room for whole chunks written anew, the journal and the reserve.
    store::format(dir, options.size / 4 * 5 + (256 << 20), IDENTITY)?;
    let engine = if options.plain { Engine::Plain } else { Engine::Uring };
    let handle = StoreThread::spawn(store::open_with(dir, engine)?, QUEUE, |why| {
        panic!("the store stopped: {why}");
    });
    let state = Arc::new(State::new(handle.clone(), options.size));
    let fill = Job::new("fill", Pattern::Write, 1 << 20, 8);
    let filled = load(&state, &fill, None)?;
    writeln!(out, "# store filled: {:.0} MB/s", filled.bandwidth_bytes_per_s / 1e6)?;
    let filename = format!("--filename={}", file.display());
    let base = [filename, "--ioengine=io_uring".to_owned()];
    fio::run(&base, &fill, options.size, None).context("filling fio's file")?;
    let mut runs = Vec::new();
    for round in 0..options.rounds {
        for job in jobs {
            let mut targets: Vec<(&'static str, Vec<String>)> = vec![("store", Vec::new())];
            let with = |more: &str| base.iter().cloned().chain([more.to_owned()]).collect::<Vec<_>>();
            match job.pattern {
                Pattern::RandWrite | Pattern::Write => {
                    targets.push(("fio dsync", with("--sync=dsync")));
                    if job.depth == 1 {
                        targets.push(("fio fdatasync", with("--fdatasync=1")));
                    }
                }
                _ => targets.push(("fio", base.to_vec())),
            }
            let len = targets.len();
            targets.rotate_left(round as usize % len);
            for (target, args) in targets {
                let run = if target == "store" {
                    run_store(&state, job, options.secs)?
                } else {
                    run_fio(target, &args, job, options)?
                };
                writeln!(
                    out,
                    "{round} {} {}: {:.0} op/s, p50 {:.0} us, user {:.2} s, system {:.2} s, {:.3} B/B",
                    run.job,
                    run.target,
                    run.measured.iops,
                    run.measured.latency_p50_us,
                    run.user_s,
                    run.system_s,
                    run.amplification
                )?;
                out.flush()?;
                runs.push(run);
            }
        }
    }
    table(jobs, &runs, out)?;
    writeln!(out, "resident: {} MiB", resident_bytes()? >> 20)?;
    Ok(())
}

const IDENTITY: Identity = Identity { cluster: ClusterId([1; 16]), osd: OsdId(0), disk: ClusterId([2; 16]) };

fn run_fio(target: &'static str, args: &[String], job: &Job, options: &StoreOptions) -> Result<Run> {
    let before = cpu::of_children_parts_s();
    let measured = fio::run(args, job, options.size, Some(options.secs))?;
    let after = cpu::of_children_parts_s();
    Ok(Run {
        job: job.name.clone(),
        target,
        measured,
        user_s: after.0 - before.0,
        system_s: after.1 - before.1,
        amplification: 1.0,
    })
}

fn run_store(state: &Arc<State>, job: &Job, secs: f64) -> Result<Run> {
    state.settle()?;
    let (cpu_before, written_before) = (cpu::of_self_parts_s(), written_bytes()?);
    let measured = load(state, job, Some(secs))?;
    // What the run left to be done counts.
    state.settle()?;
    let (cpu_after, written) = (cpu::of_self_parts_s(), written_bytes()? - written_before);
    Ok(Run {
        job: job.name.clone(),
        target: "store",
        amplification: if job.pattern.writes() { written as f64 / measured.bytes as f64 } else { 0.0 },
        measured,
        user_s: cpu_after.0 - cpu_before.0,
        system_s: cpu_after.1 - cpu_before.1,
    })
}

/// What this process has sent to the disk (proc(5), `/proc/self/io`).
fn written_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/io")?;
    let line = text.lines().find_map(|l| l.strip_prefix("write_bytes: "));
    Ok(line.context("/proc/self/io has no write_bytes")?.trim().parse()?)
}

fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split_whitespace().nth(1).context("/proc/self/statm is short")?.parse()?;
    Ok(pages * 4096)
}

/// What one run needs.
struct Load {
    job: Job,
    /// Operations to issue, or none to go on until the end.
    left: Option<u64>,
    end: Option<Instant>,
    next: u64,
    in_flight: u32,
    latencies_us: Vec<f64>,
    error: Option<StoreError>,
    done: Sender<()>,
    rng: SmallRng,
}

struct State {
    handle: StoreHandle,
    size: u64,
    /// The store's thread and the one that starts a run take turns.
    load: Mutex<Option<Load>>,
    /// Version of each object as of what was issued.
    versions: Mutex<Vec<u64>>,
    data: Bytes,
}

impl State {
    fn new(handle: StoreHandle, size: u64) -> State {
        // Aligned, as large data comes from a connection, and as fio's is.
        let mut data = vec![0u8; (1 << 20) + BLOCK_BYTES as usize];
        SmallRng::seed_from_u64(1).fill(&mut data[..]);
        let skip = data.as_ptr().align_offset(BLOCK_BYTES as usize);
        let data = Bytes::from(data).slice(skip..skip + (1 << 20));
        let objects = size.div_ceil(u64::from(OBJECT_BYTES_DEFAULT)) as usize;
        State { handle, size, load: Mutex::new(None), versions: Mutex::new(vec![0; objects]), data }
    }

    fn settle(&self) -> Result<()> {
        let (tx, rx) = channel();
        self.handle.settle(move |result| {
            let _ = tx.send(result);
        });
        rx.recv()??;
        Ok(())
    }
}

/// Issues one more operation; at the end says so.
fn issue(state: &Arc<State>) {
    let mut guard = state.load.lock().expect("no run panics");
    let Some(load) = guard.as_mut() else { return };
    let over =
        load.error.is_some() || load.left == Some(0) || load.end.is_some_and(|end| Instant::now() >= end);
    if over {
        if load.in_flight == 0 {
            let _ = load.done.send(());
        }
        return;
    }
    load.left = load.left.map(|n| n - 1);
    let bytes = u64::from(load.job.block_bytes);
    let places = state.size / bytes;
    let place = if load.job.pattern.random() { load.rng.random_range(0..places) } else { load.next % places };
    load.next += 1;
    load.in_flight += 1;
    let offset = place * bytes;
    let (index, first) = (offset / u64::from(OBJECT_BYTES_DEFAULT), offset % u64::from(OBJECT_BYTES_DEFAULT));
    let object = ObjectId { volume: VolumeId(1), index: index as u32, layer: LayerId(0) };
    let first = (first / u64::from(BLOCK_BYTES)) as u32;
    let (started, again) = (Instant::now(), state.clone());
    let ended = move |error: Option<StoreError>| {
        {
            let mut guard = again.load.lock().expect("no run panics");
            if let Some(load) = guard.as_mut() {
                load.in_flight -= 1;
                load.latencies_us.push(started.elapsed().as_secs_f64() * 1e6);
                load.error = load.error.take().or(error);
            }
        }
        issue(&again);
    };
    if load.job.pattern.writes() {
        let shift = load.rng.random_range(0..=(state.data.len() - bytes as usize) / 4096) * 4096;
        let content = Content::data(first, state.data.slice(shift..shift + bytes as usize));
        // The lock is held until the transaction is in the queue: versions must arrive in order.
        let mut versions = state.versions.lock().expect("no run panics");
        let prev = &mut versions[index as usize];
        let op = TxnOp::Write {
            object,
            prev: Version::from_raw(*prev),
            version: Version::from_raw(*prev + 1),
            content,
        };
        *prev += 1;
        state.handle.commit(Txn { pg: PG, ops: vec![op], reserve: false }, move |r| ended(r.err()));
    } else {
        let count = load.job.block_bytes / BLOCK_BYTES;
        state.handle.read(PG, object, Vec::new(), first, count, move |r| ended(r.err()));
    }
}

/// `secs` of the job, or one pass over the whole size.
fn load(state: &Arc<State>, job: &Job, secs: Option<f64>) -> Result<Measured> {
    let (done, ended) = channel();
    let begin = Instant::now();
    *state.load.lock().expect("no run panics") = Some(Load {
        job: job.clone(),
        left: if secs.is_none() { Some(state.size / u64::from(job.block_bytes)) } else { None },
        end: secs.map(|s| begin + Duration::from_secs_f64(s)),
        next: 0,
        in_flight: 0,
        latencies_us: Vec::new(),
        error: None,
        done,
        rng: SmallRng::seed_from_u64(begin.elapsed().subsec_nanos().into()),
    });
    for _ in 0..job.depth {
        issue(state);
    }
    ended.recv()?;
    let elapsed = begin.elapsed().as_secs_f64();
    let load = state.load.lock().expect("no run panics").take().context("the run is gone")?;
    if let Some(e) = load.error {
        return Err(e.into());
    }
    let mut latencies = load.latencies_us;
    latencies.sort_by(f64::total_cmp);
    let operations = latencies.len() as u64;
    let at = |share: f64| latencies.get((operations as f64 * share) as usize).copied().unwrap_or(0.0);
    let bytes = operations * u64::from(job.block_bytes);
    Ok(Measured {
        iops: operations as f64 / elapsed,
        bandwidth_bytes_per_s: bytes as f64 / elapsed,
        latency_mean_us: latencies.iter().sum::<f64>() / operations.max(1) as f64,
        latency_p50_us: at(0.5),
        latency_p99_us: at(0.99),
        operations,
        bytes,
    })
}

fn table(jobs: &[Job], runs: &[Run], out: &mut impl Write) -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "job",
        "target",
        "IOPS",
        "MB/s",
        "p50 µs",
        "p99 µs",
        "user µs/op",
        "system µs/op",
        "op/CPU-s",
        "B/B",
    ]);
    for job in jobs {
        for target in ["store", "fio", "fio dsync", "fio fdatasync"] {
            let of: Vec<&Run> = runs.iter().filter(|r| r.job == job.name && r.target == target).collect();
            if of.is_empty() {
                continue;
            }
            let middle = |value: &dyn Fn(&Run) -> f64, digits: usize| {
                let value = median(of.iter().map(|r| value(r)).collect()).unwrap_or(0.0);
                format!("{value:.digits$}")
            };
            let per_op = |s: f64, r: &Run| s * 1e6 / r.measured.operations as f64;
            table.add_row([
                job.name.clone(),
                target.to_owned(),
                middle(&|r| r.measured.iops, 0),
                middle(&|r| r.measured.bandwidth_bytes_per_s / 1e6, 1),
                middle(&|r| r.measured.latency_p50_us, 0),
                middle(&|r| r.measured.latency_p99_us, 0),
                middle(&|r| per_op(r.user_s, r), 1),
                middle(&|r| per_op(r.system_s, r), 1),
                middle(&|r| r.measured.operations as f64 / (r.user_s + r.system_s).max(1e-3), 0),
                middle(&|r| r.amplification, 3),
            ]);
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    writeln!(out, "{table}")?;
    Ok(())
}
