//! Daemons stand still under verified writes and go on later, without knowing it: 3 s, which everybody else waits for, and 80 s, after
//! which the others have gone on. Nobody is told what is old by then.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use serde_json::Value;
use std::thread::sleep;
use std::time::{Duration, Instant};

const SHORT: Duration = Duration::from_secs(3);
const LONG: Duration = Duration::from_secs(80);

fn is_down(status: &Value) -> Option<bool> {
    Some(status["osds_up"].as_u64()? < status["osds"].as_u64()?)
}

#[test]
fn each_daemon_pauses_for_three_seconds() -> Result<()> {
    let cluster = Cluster::start(4)?;
    let volume = cluster.volume("v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 8);
    mirror.wait_for_writes(300)?;
    let osds = cluster.names("osd")?;
    for daemon in osds.iter().map(String::as_str).chain(["monitor.1", "gateway.host1"]) {
        cluster.pause(daemon)?;
        sleep(SHORT);
        cluster.resume(daemon)?;
        mirror.wait_for_writes(200).context(daemon.to_owned())?;
    }
    cluster.wait_clean(Duration::from_secs(60))?;
    let report = mirror.finish()?;
    println!("{report:?}");
    ensure!(report.reconnects == 0, "clients noticed: {report:?}");
    Ok(())
}

/// Three monitors, the one that leads pauses first; then an OSD that leads groups, then the gateway.
#[test]
#[ignore = "takes minutes: cargo xtask test-faults"]
fn each_kind_of_daemon_pauses_for_eighty_seconds() -> Result<()> {
    let cluster = Cluster::start_with(3, 4, "512M")?;
    let volume = cluster.volume("v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 8);
    mirror.wait_for_writes(300)?;
    let monitor = cluster.leader()?;
    let osd = cluster.names("osd")?.into_iter().next().context("no OSD")?;
    for daemon in [monitor.as_str(), osd.as_str()] {
        let begun = Instant::now();
        cluster.pause(daemon)?;
        if daemon == osd {
            cluster.wait_for("it is called down", Duration::from_secs(60), is_down)?;
        }
        // The others go on without it.
        mirror.wait_for_writes(300).with_context(|| format!("without {daemon}"))?;
        ensure!(begun.elapsed() < LONG, "the others waited for {daemon}");
        sleep(LONG.saturating_sub(begun.elapsed()));
        cluster.resume(daemon)?;
        mirror.wait_for_writes(300).with_context(|| format!("after {daemon}"))?;
        cluster.wait_clean(Duration::from_secs(60))?;
    }
    cluster.pause("gateway.host1")?;
    sleep(LONG);
    cluster.resume("gateway.host1")?;
    mirror.wait_for_writes(300).context("after the gateway")?;
    cluster.wait_clean(Duration::from_secs(60))?;
    let report = mirror.finish()?;
    println!("{report:?}");
    ensure!(report.reconnects == 0, "clients noticed: {report:?}");
    Ok(())
}
