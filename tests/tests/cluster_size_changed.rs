//! Two copies become three and three two under verified writes; then a disk is lost, declared lost, and the rest is whole again.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use std::time::Duration;

const CLEAN: Duration = Duration::from_secs(120);

#[test]
fn a_pool_gets_more_and_fewer_copies_and_loses_a_disk() -> Result<()> {
    let cluster = Cluster::start(4)?;
    let volume = cluster.volume_in(&["--replicas", "2", "--min-size", "1"], "v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 8);
    mirror.wait_for_writes(300)?;
    for copies in ["3", "2", "3"] {
        cluster.run(&["pool", "set", "p", "--replicas", copies])?;
        mirror.wait_for_writes(300)?;
        cluster.wait_clean(CLEAN)?;
    }
    let osds = cluster.names("osd")?;
    let lost = osds[0].trim_start_matches("osd.");
    cluster.kill(&osds[0], true)?;
    cluster.wait_for("it is called down", Duration::from_secs(30), |s| Some(s["osds_up"] == 3))?;
    let refused = cluster.run(&["--yes", "osd", "rm", "--force", lost]);
    ensure!(refused.is_err(), "one that is in is not forgotten");
    cluster.run(&["osd", "out", lost])?;
    cluster.run(&["--yes", "osd", "rm", "--force", lost])?;
    mirror.wait_for_writes(300)?;
    cluster.wait_for("it is forgotten", Duration::from_secs(30), |s| Some(s["osds"] == 3))?;
    cluster.wait_clean(CLEAN)?;
    let report = mirror.finish()?;
    println!("{report:?}");
    ensure!(report.reconnects == 0, "clients noticed: {report:?}");
    Ok(())
}
