//! Networks of real hosts (namespaces) fall apart under verified writes and come together again: one host alone, the leading monitor's,
//! one way only, and into halves.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use std::thread::sleep;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
/// The clients' and the operator's.
const OPERATOR: u8 = 0;

/// Three monitors and four OSDs on hosts 1 to 4.
fn start() -> Result<Option<(Cluster, Mirror)>> {
    let Some(cluster) = Cluster::spread(3, 4)? else { return Ok(None) };
    let volume = cluster.volume("v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 8);
    mirror.wait_for_writes(300)?;
    Ok(Some((cluster, mirror)))
}

/// Everything is as it was, and not a byte is wrong.
fn ends_well(cluster: &Cluster, mirror: Mirror) -> Result<()> {
    mirror.wait_for_writes(300)?;
    cluster.wait_clean(PATIENCE)?;
    let report = mirror.finish()?;
    println!("{report:?}");
    ensure!(report.reconnects == 0, "clients noticed: {report:?}");
    Ok(())
}

#[test]
fn one_host_is_cut_off() -> Result<()> {
    let Some((cluster, mirror)) = start()? else { return Ok(()) };
    cluster.net()?.isolate(4)?;
    cluster.wait_for("it is called down", PATIENCE, |s| Some(s["osds_up"] == 3))?;
    mirror.wait_for_writes(300)?;
    cluster.net()?.heal()?;
    ends_well(&cluster, mirror)
}

#[test]
#[ignore = "takes minutes: cargo xtask test-faults"]
fn the_host_of_the_leading_monitor_is_cut_off() -> Result<()> {
    let Some((cluster, mirror)) = start()? else { return Ok(()) };
    let old = cluster.leader()?;
    cluster.net()?.isolate(cluster.host(&old)?)?;
    cluster.wait_for("its OSD is called down", PATIENCE, |s| Some(s["osds_up"] == 3))?;
    ensure!(cluster.leader()? != old, "{old} leads and nobody hears it");
    mirror.wait_for_writes(300)?;
    cluster.net()?.heal()?;
    ends_well(&cluster, mirror)
}

/// An OSD does not hear another one any more; everybody else hears both.
#[test]
#[ignore = "takes minutes: cargo xtask test-faults"]
fn one_osd_does_not_hear_another() -> Result<()> {
    let Some((cluster, mirror)) = start()? else { return Ok(()) };
    cluster.net()?.cut(&[3], &[4])?;
    mirror.wait_for_writes(600)?;
    cluster.net()?.heal()?;
    ends_well(&cluster, mirror)
}

/// Nobody who has the clients has a majority of the monitors: they wait. Those on the other side must not go on without them.
#[test]
#[ignore = "takes minutes: cargo xtask test-faults"]
fn clients_are_with_the_smaller_half() -> Result<()> {
    let Some((cluster, mirror)) = start()? else { return Ok(()) };
    cluster.net()?.part(&[1, 2], &[3, 4, OPERATOR])?;
    sleep(Duration::from_secs(30));
    cluster.net()?.heal()?;
    ends_well(&cluster, mirror)
}

/// Clients reach the monitors and every OSD but one, which everybody else reaches.
#[test]
#[ignore = "takes minutes: cargo xtask test-faults"]
fn clients_do_not_reach_one_osd() -> Result<()> {
    let Some((cluster, mirror)) = start()? else { return Ok(()) };
    cluster.net()?.part(&[OPERATOR], &[4])?;
    sleep(Duration::from_secs(30));
    cluster.net()?.heal()?;
    ends_well(&cluster, mirror)
}
