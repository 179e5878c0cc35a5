//! What a durable write of three copies cannot be faster than on one disk: three durable writers at once, and two round
//! trips over the loopback (to the primary, and from there to the others).

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::fio;
use crate::job::{Job, Pattern};
use crate::report::{Run, median};

const COPIES: usize = 3;
const ANSWER_BYTES: usize = 64;

/// Prints the floor and how far above it the runs of `job` are, by target.
pub fn compare(
    dir: &Path,
    job: &Job,
    runs: &[Run],
    (rounds, secs, size): (u32, f64, u64),
    out: &mut impl Write,
) -> Result<()> {
    let files: Vec<_> = (0..COPIES).map(|n| dir.join(format!("floor.{n}"))).collect();
    let args = [
        "--ioengine=io_uring".to_owned(),
        "--sync=dsync".to_owned(),
        format!("--directory={}", dir.display()),
        "--filename_format=floor.$jobnum".to_owned(),
        format!("--numjobs={COPIES}"),
    ];
    let measured = (|| {
        fio::run(&args, &Job::new("fill", Pattern::Write, 1 << 20, 8), size, None)?;
        let mut writers = Vec::new();
        let mut trips = Vec::new();
        for _ in 0..rounds {
            writers.push(fio::run(&args, job, size, Some(secs))?.latency_p50_us);
            trips.push(round_trip_us(job.block_bytes as usize, Duration::from_secs_f64(secs))?);
        }
        Ok::<_, anyhow::Error>((writers, trips))
    })();
    for file in files {
        let _ = std::fs::remove_file(file);
    }
    let (writers, trips) = measured?;
    let (writers, trip) = (median(writers).unwrap_or(0.0), median(trips).unwrap_or(0.0));
    let floor = writers + 2.0 * trip;
    writeln!(
        out,
        "{}: three durable writers at once {writers:.0} us, a round trip {trip:.0} us: floor {floor:.0} us",
        job.name
    )?;
    let mut names: Vec<&str> = runs.iter().map(|run| run.target.as_str()).collect();
    names.dedup();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let of = runs.iter().filter(|run| run.target == name && run.job == job.name);
        if let Some(p50) = median(of.map(|run| run.measured.latency_p50_us).collect()) {
            writeln!(out, "{} {name}: p50 {p50:.0} us, {:.2} of the floor", job.name, p50 / floor)?;
        }
    }
    Ok(())
}

/// The median time of sending `bytes` to another thread that answers.
fn round_trip_us(bytes: usize, time: Duration) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut request = vec![0; bytes];
        // Until the other side hangs up.
        while stream.read_exact(&mut request).is_ok() {
            stream.write_all(&[0; ANSWER_BYTES])?;
        }
        Ok(())
    });
    let mut stream = TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    let (request, mut answer) = (vec![0; bytes], [0; ANSWER_BYTES]);
    let (end, mut trips) = (Instant::now() + time, Vec::new());
    while Instant::now() < end {
        let began = Instant::now();
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
        trips.push(began.elapsed().as_secs_f64() * 1e6);
    }
    drop(stream);
    let served = server.join().map_err(|_| anyhow::anyhow!("the other side of the round trip is gone"))?;
    served.context("answering round trips")?;
    median(trips).context("no round trip was made")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_takes_some_time() {
        let us = round_trip_us(4096, Duration::from_millis(20)).unwrap();
        assert!(us > 0.0);
    }
}
