//! A thin pool fills up: health warns before, a write that finds no room says ENOSPC, what was
//! acknowledged is there, and after a discard writes go on. No daemon ends.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use nbd::client::{NbdClient, handshake};
use serde_json::Value;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn has(status: &Value, code: &str) -> Option<bool> {
    Some(status["health"]["checks"].as_array()?.iter().any(|c| c["code"] == code))
}

fn pattern(mib: usize) -> Vec<u8> {
    (0..MIB).map(|i| (i / 8 + mib * 31) as u8 | 1).collect()
}

#[test]
#[ignore = "takes a minute or more: a member that overran its reserve on so small a disk is left out, sometimes twice; run with --run-ignored all"]
fn a_full_pool_refuses_and_recovers() -> Result<()> {
    let cluster = Cluster::start_sized(3, "256M")?;
    let volume = cluster.volume("v", "1G")?;
    let before = cluster.daemons()?;
    let mut stream = UnixStream::connect(&volume.socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let export = handshake(&mut stream, b"v")?;
    let mut client = NbdClient::new(stream, &export);

    // Below the warning there is nothing to say; the groups are not equally full.
    let osds = cluster.json(&["osd", "ls"])?;
    let room_bytes = osds["osds"][0]["capacity_bytes"].as_u64().context("an OSD without a capacity")?;
    // Every OSD has a copy of everything.
    let room = room_bytes as usize / MIB;
    let mut written = 0;
    let mut refused = None;
    while written < 2 * room {
        if let Err(e) = client.write_all(&pattern(written)) {
            refused = Some(e);
            break;
        }
        written += 1;
        if written == room * 90 / 100 {
            cluster.wait_for("a warning before it is full", Duration::from_secs(30), |s| {
                has(s, "OSD_NEARFULL")
            })?;
        }
    }
    let refused = refused.context("more was written than there is room for")?;
    ensure!(refused.to_string().contains("ENOSPC"), "the refusal says {refused}");
    ensure!(written >= room * 90 / 100, "refused already after {written} MiB");
    cluster.wait_for("health says that OSDs are full", Duration::from_secs(30), |s| has(s, "OSD_FULL"))?;

    let mut bytes = vec![0; MIB];
    client.seek(SeekFrom::Start(0))?;
    for mib in 0..written {
        client.read_exact(&mut bytes)?;
        ensure!(bytes == pattern(mib), "MiB {mib} is not what was acknowledged");
    }

    let discarded = room / 2;
    let qemu_io = Command::new("qemu-io")
        .args(["-f", "raw", "-d", "unmap", "-c", &format!("discard 0 {discarded}M"), &volume.uri])
        .output()
        .context("cannot start qemu-io: install qemu-utils")?;
    ensure!(qemu_io.status.success(), "qemu-io: {qemu_io:?}");
    cluster.wait_for("health forgets it", Duration::from_secs(30), |s| Some(!has(s, "OSD_FULL")?))?;
    client.seek(SeekFrom::Start(0))?;
    for mib in 0..discarded {
        client.read_exact(&mut bytes)?;
        ensure!(bytes.iter().all(|b| *b == 0), "MiB {mib} was discarded and is not zero");
    }
    // The members' word that they are full counts for some seconds more.
    let started = Instant::now();
    for mib in written..written + 16 {
        loop {
            client.seek(SeekFrom::Start((mib * MIB) as u64))?;
            match client.write_all(&pattern(mib)) {
                Ok(()) => break,
                Err(e) if e.to_string().contains("ENOSPC") && started.elapsed() < PATIENCE => {}
                Err(e) => return Err(e).context("writing after the discard"),
            }
        }
    }
    for (old, new) in before.iter().zip(cluster.daemons()?) {
        ensure!(old["pid"] == new["pid"], "was {old}, is {new}");
    }
    // On disks this small one write may overrun the reserve of a member, which then sits out for a minute.
    cluster.wait_clean(Duration::from_secs(180))
}
