//! An erasure-coded volume under writers that keep a mirror: everything is killed at once, then an OSD is lost for
//! good and its shards are rebuilt on the fourth; not one acknowledged byte differs.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use std::time::Duration;

#[test]
fn an_osd_of_an_erasure_coded_pool_is_lost_for_good() -> Result<()> {
    let cluster = Cluster::start(4)?;
    let volume = cluster.volume_in(&["--ec", "2+1"], "v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 6);
    mirror.wait_for_writes(300)?;
    cluster.kill_all()?;
    mirror.wait_for_writes(300)?;
    cluster.wait_clean(Duration::from_secs(120))?;
    let lost = cluster.names("osd")?[0].clone();
    cluster.kill(&lost, true)?;
    // Reads of what was on it are decoded, writes go on with what is left.
    mirror.wait_for_writes(300)?;
    cluster.run(&["osd", "out", &lost])?;
    cluster.wait_for("shards rebuilt on three", Duration::from_secs(120), |status| {
        let states = status["pgs_by_state"].as_object()?;
        let clean = states.len() == 1 && states.contains_key("active+clean");
        Some(clean && status["osds_up"].as_u64()? + 1 == status["osds"].as_u64()?)
    })?;
    mirror.wait_for_writes(100)?;
    let report = mirror.finish()?;
    ensure!(report.reads > 0 && report.writes > 1000, "little was done: {report:?}");
    println!("{report:?}");
    Ok(())
}
