//! The load: a fixed number of requests in flight until the time is over, or one pass over the device.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::queue::{Device, Request, xorshift};
use crate::job::Job;
use crate::report::Measured;

const STALL: Duration = Duration::from_secs(30);
/// Latencies that are kept; a longer run keeps the first so many.
const SAMPLES_MAX: usize = 32 << 20;

pub struct Load {
    pub socket: PathBuf,
    pub job: Job,
    /// 0: one pass over the size instead of a time.
    pub secs: f64,
    /// 0: the whole device.
    pub size_bytes: u64,
    /// 0: never.
    pub flush_every: u64,
}

pub fn run(load: &Load) -> Result<Measured> {
    let Job { pattern, block_bytes, depth, .. } = load.job;
    let mut device = Device::connect(&load.socket, depth, block_bytes)?;
    let size = match load.size_bytes {
        0 => device.capacity_bytes,
        size => size.min(device.capacity_bytes),
    };
    let blocks = size / u64::from(block_bytes);
    ensure!(blocks > 0, "the device of {} bytes holds no block", device.capacity_bytes);

    let mut seed = 0x2545_f491_4f6c_dd1d ^ u64::from(std::process::id()) << 20 | 1;
    let mut free: Vec<u16> = (0..depth).rev().collect();
    let mut started = vec![Instant::now(); usize::from(depth)];
    let mut flushing = vec![false; usize::from(depth)];
    let mut samples_ns: Vec<u32> = Vec::new();
    let (mut issued, mut done, mut sum_ns, mut unflushed, mut flush_open) = (0u64, 0u64, 0u128, 0u64, false);
    let begin = Instant::now();
    let end = (load.secs > 0.0).then(|| begin + Duration::from_secs_f64(load.secs));
    let mut now = begin;
    let more = |issued: u64, now: Instant| end.map_or(issued < blocks, |end| now < end);
    while more(issued, now) || free.len() < usize::from(depth) {
        while more(issued, now) && !flush_open {
            let idle = free.len() == usize::from(depth);
            let due = load.flush_every > 0 && pattern.writes() && unflushed >= load.flush_every;
            if due && !idle {
                break;
            }
            let Some(slot) = free.pop() else { break };
            let at = usize::from(slot);
            (started[at], flushing[at]) = (Instant::now(), due);
            if due {
                device.submit(slot, Request::Flush)?;
                (flush_open, unflushed) = (true, 0);
                continue;
            }
            let block = if pattern.random() { xorshift(&mut seed) % blocks } else { issued % blocks };
            let sector = block * u64::from(block_bytes / 512);
            device.submit(
                slot,
                if pattern.writes() { Request::Write { sector } } else { Request::Read { sector } },
            )?;
            issued += 1;
            unflushed += 1;
        }
        device.publish()?;
        if free.len() < usize::from(depth) {
            device.wait(STALL)?;
        }
        now = Instant::now();
        while let Some(slot) = device.completed()? {
            free.push(slot);
            let at = usize::from(slot);
            if std::mem::take(&mut flushing[at]) {
                flush_open = false;
                continue;
            }
            let took_ns = now.duration_since(started[at]).as_nanos();
            sum_ns += took_ns;
            done += 1;
            if samples_ns.len() < SAMPLES_MAX {
                samples_ns.push(u32::try_from(took_ns).unwrap_or(u32::MAX));
            }
        }
    }
    device.stop()?;
    ensure!(done > 0, "nothing was completed");
    let elapsed_s = now.duration_since(begin).as_secs_f64();
    samples_ns.sort_unstable();
    let percentile_us = |percent: usize| f64::from(samples_ns[(samples_ns.len() - 1) * percent / 100]) / 1e3;
    Ok(Measured {
        iops: done as f64 / elapsed_s,
        bandwidth_bytes_per_s: (done * u64::from(block_bytes)) as f64 / elapsed_s,
        latency_mean_us: sum_ns as f64 / done as f64 / 1e3,
        latency_p50_us: percentile_us(50),
        latency_p99_us: percentile_us(99),
        operations: done,
        bytes: done * u64::from(block_bytes),
    })
}
