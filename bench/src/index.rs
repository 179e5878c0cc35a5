//! Start-up and memory of a store whose index has the records of a full disk. Each opening is a process of its own.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};
use gabion_osd::store::{self, Identity, Store};
use gabion_proto::ids::{ClusterId, ObjectId, OsdId};
use gabion_proto::limits::OBJECT_BYTES_DEFAULT;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{cpu, resident};

const IDENTITY: Identity = Identity { cluster: ClusterId([1; 16]), osd: OsdId(0), disk: ClusterId([2; 16]) };
const ROUNDS: usize = 3;
/// Objects looked up one by one after the start.
const LOOKUPS: usize = 20_000;

/// What one opening took.
#[derive(Debug, Serialize, Deserialize)]
struct Opened {
    objects: u64,
    open_s: f64,
    /// User and system time of it.
    open_cpu_s: f64,
    resident_open_bytes: u64,
    list_s: f64,
    /// After everything was listed and many objects were looked up.
    resident_used_bytes: u64,
    resident_peak_bytes: u64,
}

/// Makes the store in `dir`, opens it with warm and with cold pages, and removes it.
pub fn run(dir: &Path, gib: u32, out: &mut impl Write) -> Result<()> {
    let store_dir = dir.join("bench-index");
    ensure!(!store_dir.exists(), "{} exists: it is left alone", store_dir.display());
    let result = measure(&store_dir, gib, out);
    let _ = std::fs::remove_dir_all(&store_dir);
    result
}

fn measure(dir: &Path, gib: u32, out: &mut impl Write) -> Result<()> {
    let objects = u64::from(gib) << 30 >> OBJECT_BYTES_DEFAULT.trailing_zeros();
    let begun = Instant::now();
    store::synthetic_index(dir, u32::try_from(objects)?, IDENTITY)?;
    let index_bytes: u64 = files(&dir.join("index"))?.iter().map(|(_, len)| len).sum();
    let (mib, took) = (index_bytes >> 20, begun.elapsed().as_secs());
    writeln!(out, "# {gib} GiB: {objects} objects, an index of {mib} MiB, made in {took} s")?;
    for round in 0..ROUNDS {
        for cold in [false, true] {
            if cold {
                forget_pages(dir)?;
            }
            let opened = open_in_a_process(dir)?;
            ensure!(opened.objects == objects, "{} objects were found, not {objects}", opened.objects);
            writeln!(
                out,
                "{round} {}: open {:.2} s ({:.2} s of CPU), resident {:.1} MiB; listed in {:.2} s, then resident {:.1} MiB; peak {:.1} MiB",
                if cold { "cold" } else { "warm" },
                opened.open_s,
                opened.open_cpu_s,
                opened.resident_open_bytes as f64 / f64::from(1 << 20),
                opened.list_s,
                opened.resident_used_bytes as f64 / f64::from(1 << 20),
                opened.resident_peak_bytes as f64 / f64::from(1 << 20)
            )?;
            out.flush()?;
        }
    }
    Ok(())
}

fn open_in_a_process(dir: &Path) -> Result<Opened> {
    let done = Command::new(std::env::current_exe()?).arg("store-open").arg(dir).output()?;
    ensure!(
        done.status.success(),
        "the store did not open: {}",
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(serde_json::from_slice(&done.stdout)?)
}

/// The other process: opens, lists, looks up.
pub fn open(dir: &Path, out: &mut impl Write) -> Result<()> {
    let (begun, cpu) = (Instant::now(), cpu::of_self_s());
    let mut store = store::open(dir)?;
    let (open_s, open_cpu_s) = (begun.elapsed().as_secs_f64(), cpu::of_self_s() - cpu);
    let resident_open_bytes = resident::now_bytes()?;
    let begun = Instant::now();
    let (mut objects, mut sample) = (0, Vec::new());
    for (pg, _) in store.pgs()? {
        let mut after: Option<ObjectId> = None;
        loop {
            let page = store.list(pg, after, 1000)?;
            objects += page.len() as u64;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            sample.push((pg, *last));
        }
    }
    let list_s = begun.elapsed().as_secs_f64();
    let mut rng = SmallRng::seed_from_u64(1);
    for _ in 0..LOOKUPS {
        let (pg, object) = sample[rng.random_range(0..sample.len())];
        let index = object.index - rng.random_range(0..object.index % 256 + 1);
        let found = store.object(pg, ObjectId { index, ..object })?;
        ensure!(found.is_some(), "object {object} was listed and is not there");
    }
    let resident_used_bytes = resident::now_bytes()?;
    let resident_peak_bytes = resident::peak_bytes()?;
    let opened = Opened {
        objects,
        open_s,
        open_cpu_s,
        resident_open_bytes,
        list_s,
        resident_used_bytes,
        resident_peak_bytes,
    };
    Ok(writeln!(out, "{}", serde_json::to_string(&opened)?)?)
}

fn files(dir: &Path) -> Result<Vec<(std::path::PathBuf, u64)>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            out.push((entry.path(), entry.metadata()?.len()));
        }
    }
    Ok(out)
}

/// Lets the kernel drop what it has of the index.
fn forget_pages(dir: &Path) -> Result<()> {
    for (path, _) in files(&dir.join("index"))? {
        let file = std::fs::File::open(&path)?;
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}
