//! Bytes rot on the disks of OSDs that are stopped. A deep scrub replaces what has a good copy, on the disk itself; what has
//! none is never read as something else, and health says where it is.

use anyhow::{Context, Result, bail, ensure};
use gabion_tests::cluster::Cluster;
use nbd::client::{NbdClient, handshake};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const BLOCKS: usize = 12 * 256;
const PATIENCE: Duration = Duration::from_secs(120);

/// Like no other block, and not compressible by a shift of a few bytes.
fn pattern(block: usize) -> Vec<u8> {
    let word = |i: usize| ((block as u64) << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..BLOCK / 8).flat_map(|i| word(i).to_le_bytes()).collect()
}

type Nbd = NbdClient<UnixStream>;

fn connect(socket: &Path) -> Result<Nbd> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let export = handshake(&mut stream, b"v")?;
    Ok(NbdClient::new(stream, &export))
}

fn read(client: &mut Nbd, block: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; BLOCK];
    client.seek(SeekFrom::Start((block * BLOCK) as u64))?;
    client.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn data_dir(cluster: &Cluster, osd: &str) -> Result<PathBuf> {
    let daemons = cluster.daemons()?;
    let found = daemons
        .iter()
        .find(|d| d["kind"] == "osd" && osd == format!("osd.{}", d["id"].as_str().unwrap_or("")));
    let dir =
        found.and_then(|d| d["data_dir"].as_str()).with_context(|| format!("{osd} has no directory"))?;
    Ok(dir.into())
}

/// The check of a stopped OSD's disk, which changes nothing.
fn fsck(cluster: &Cluster, osd: &str, deep: bool) -> Result<bool> {
    let mut command = Command::new(cluster.binary("gabion-osd"));
    command.arg("fsck").args(deep.then_some("--deep")).arg(data_dir(cluster, osd)?);
    Ok(command.output()?.status.success())
}

/// Wherever the disk has these blocks: also where one was before it was replaced.
fn find(cluster: &Cluster, osd: &str, blocks: &[usize]) -> Result<Vec<Vec<u64>>> {
    let mut file = File::open(data_dir(cluster, osd)?.join("block"))?;
    let wanted: Vec<Vec<u8>> = blocks.iter().map(|b| pattern(*b)).collect();
    let mut found = vec![Vec::new(); blocks.len()];
    let (mut buffer, mut at) = (vec![0; 1 << 20], 0);
    while file.read_exact(&mut buffer).is_ok() {
        for (i, bytes) in buffer.chunks_exact(BLOCK).enumerate() {
            if let Some(n) = wanted.iter().position(|w| w == bytes) {
                found[n].push(at + (i * BLOCK) as u64);
            }
        }
        at += buffer.len() as u64;
    }
    ensure!(found.iter().all(|at| !at.is_empty()), "{osd} does not have all of {blocks:?}: {found:?}");
    Ok(found)
}

/// Waits until the OSDs have brought so many copies of everything from their journals to its place, as they do when nothing comes in: a
/// record that is still to be replayed and does not find what it names is a write that was lost, and not rot.
fn settled(cluster: &Cluster, copies: usize) -> Result<()> {
    let figures = |addr: &str| -> Result<(f64, f64)> {
        let mut stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        let figure = |name: &str| -> Result<f64> {
            let line = page.lines().find(|l| l.starts_with(name));
            Ok(line.and_then(|l| l.rsplit(' ').next()).with_context(|| name.to_owned())?.parse()?)
        };
        // Of one moment, some of it a heartbeat ago.
        Ok((figure("gabion_store_journal_used_bytes")?, figure("gabion_store_data_bytes_total")?))
    };
    let started = Instant::now();
    loop {
        let daemons = cluster.daemons()?;
        let addrs = daemons.iter().filter(|d| d["kind"] == "osd").filter_map(|d| d["metrics_addr"].as_str());
        let all = addrs.map(figures).collect::<Result<Vec<_>>>()?;
        let written: f64 = all.iter().map(|(_, written)| written).sum();
        if all.iter().all(|(used, _)| *used == 0.0) && written >= (copies * BLOCKS * BLOCK) as f64 {
            return Ok(());
        }
        ensure!(started.elapsed() < PATIENCE, "journals are not empty: {all:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The first of these blocks is zeroed, of the others one bit flips.
fn rot(cluster: &Cluster, osd: &str, blocks: &[usize]) -> Result<()> {
    ensure!(fsck(cluster, osd, true)?, "{osd} is bad before anything was done to it");
    let places = find(cluster, osd, blocks)?;
    let file = OpenOptions::new().write(true).open(data_dir(cluster, osd)?.join("block"))?;
    for (n, (block, at)) in blocks.iter().zip(places).enumerate() {
        let mut bytes = pattern(*block);
        if n == 0 {
            bytes.fill(0);
        } else {
            bytes[1000] ^= 8;
        }
        for at in at {
            file.write_all_at(&bytes, at)?;
        }
    }
    file.sync_all()?;
    ensure!(!fsck(cluster, osd, true)?, "{osd} does not notice");
    Ok(())
}

/// A deep scrub of everything; what it answers when it is done.
fn scrub(cluster: &Cluster) -> Result<Vec<Value>> {
    cluster.run(&["scrub", "start", "--deep"])?;
    let started = Instant::now();
    loop {
        let mut status = cluster.json(&["scrub", "status"])?;
        let Value::Array(pgs) = status["pgs"].take() else { bail!("no groups: {status}") };
        if pgs.iter().all(|p| p["requested"] == "none" && p["running"] == "none") {
            ensure!(pgs.iter().all(|p| p["last_deep_unix_ms"].as_u64().is_some()), "{pgs:?}");
            return Ok(pgs);
        }
        ensure!(started.elapsed() < PATIENCE, "the scrub does not end: {pgs:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn sum(pgs: &[Value], field: &str) -> u64 {
    pgs.iter().filter_map(|p| p[field].as_u64()).sum()
}

fn damage_in_health(cluster: &Cluster) -> Result<Option<Value>> {
    let health = cluster.json(&["health"])?;
    let checks = health["checks"].as_array().context("no checks")?;
    Ok(checks.iter().find(|c| c["code"] == "OBJECT_DAMAGED").cloned())
}

#[test]
fn what_rots_is_replaced_and_what_is_lost_is_never_read() -> Result<()> {
    let cluster = Cluster::start_sized(3, "256M")?;
    let volume = cluster.volume("v", "16M")?;
    let mut client = connect(&volume.socket)?;
    for mib in 0..BLOCKS / 256 {
        let bytes: Vec<u8> = (0..256).flat_map(|b| pattern(mib * 256 + b)).collect();
        client.write_all(&bytes)?;
    }
    let osds = cluster.names("osd")?;

    // One copy of three objects.
    settled(&cluster, 3)?;
    let (one, blocks) = (&osds[1], [7, 1024 + 300, 2048 + 5]);
    cluster.run(&["dev", "stop", one, "--dir", cluster.dir().to_str().context("a path")?])?;
    rot(&cluster, one, &blocks)?;
    cluster.revive(one)?;
    cluster.wait_clean(PATIENCE)?;
    let pgs = scrub(&cluster)?;
    ensure!(sum(&pgs, "findings") == 3 && sum(&pgs, "repaired") == 3, "{pgs:?}");
    ensure!(sum(&pgs, "objects") == 3 && sum(&pgs, "damaged_objects") == 0, "{pgs:?}");
    cluster.run(&["dev", "stop", one, "--dir", cluster.dir().to_str().context("a path")?])?;
    ensure!(fsck(&cluster, one, true)?, "{one} is still bad");
    find(&cluster, one, &blocks)?;
    cluster.revive(one)?;
    cluster.wait_clean(PATIENCE)?;
    for block in 0..BLOCKS {
        ensure!(read(&mut client, block)? == pattern(block), "block {block}");
    }

    // The same block everywhere.
    let lost = 1024 + 77;
    // The one that was started anew counts anew, and has opened its store without a journal left.
    settled(&cluster, 2)?;
    for osd in &osds {
        cluster.run(&["dev", "stop", osd, "--dir", cluster.dir().to_str().context("a path")?])?;
    }
    for osd in &osds {
        rot(&cluster, osd, &[lost])?;
    }
    for osd in &osds {
        cluster.revive(osd)?;
    }
    cluster.wait_clean(PATIENCE)?;
    // Also before any scrub has seen it.
    let refused = read(&mut client, lost).err().context("read something that is nowhere")?;
    ensure!(refused.to_string().contains("EIO"), "the refusal says {refused}");
    let pgs = scrub(&cluster)?;
    ensure!(sum(&pgs, "damaged_objects") == 1 && sum(&pgs, "repaired") == 0, "{pgs:?}");
    let damage = damage_in_health(&cluster)?.context("health does not list it")?;
    ensure!(
        damage["severity"] == "error" && damage["details"].to_string().contains("of volume v"),
        "{damage}"
    );
    for block in (0..BLOCKS).filter(|b| *b != lost) {
        ensure!(read(&mut client, block)? == pattern(block), "block {block}");
    }
    ensure!(read(&mut client, lost).is_err(), "read something that is nowhere");

    // Written anew it is whole again.
    client.seek(SeekFrom::Start((lost * BLOCK) as u64))?;
    client.write_all(&pattern(lost))?;
    ensure!(read(&mut client, lost)? == pattern(lost), "not what was written");
    scrub(&cluster)?;
    // The primary says so with its next heartbeat.
    cluster.wait_for("health forgets what is whole", PATIENCE, |s| {
        Some(s["health"]["checks"].as_array()?.iter().all(|c| c["code"] != "OBJECT_DAMAGED"))
    })
}
