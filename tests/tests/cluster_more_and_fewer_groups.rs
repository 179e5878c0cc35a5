//! A pool gets twice as many groups and then half of them under writers that keep a mirror, and an OSD is killed in the middle of both: not one
//! acknowledged byte differs.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until the pool has so many groups, all clean, each in its own place.
fn wait_for_groups(cluster: &Cluster, pgs: u64) -> Result<()> {
    let what = format!("{pgs} clean groups");
    cluster.wait_for(&what, PATIENCE, |status| {
        let states = status["pgs_by_state"].as_object()?;
        let clean = states.get("active+clean").and_then(|n| n.as_u64()) == Some(pgs);
        Some(clean && states.len() == 1)
    })?;
    let pool = cluster.json(&["pool", "show", "p"])?;
    ensure!(pool["pgs"] == pgs && pool["target_pgs"].is_null(), "{pool}");
    Ok(())
}

#[test]
fn groups_become_more_and_fewer_under_writes() -> Result<()> {
    let cluster = Cluster::start(4)?;
    let volume = cluster.volume_in(&["--replicas", "3"], "v", "48M")?;
    let mirror = Mirror::start(&volume.socket, "v", 48 << 20, 6);
    mirror.wait_for_writes(200)?;
    let victims = cluster.names("osd")?;

    let wrong = cluster.run(&["pool", "set", "p", "--pgs", "24"]);
    ensure!(wrong.is_err_and(|e| format!("{e:#}").contains("which can be doubled")), "24 is no multiple");
    cluster.run(&["pool", "set", "p", "--pgs", "32"])?;
    cluster.kill(victims.first().context("an OSD")?, false)?;
    mirror.wait_for_writes(200)?;
    wait_for_groups(&cluster, 32)?;

    cluster.run(&["pool", "set", "p", "--pgs", "16"])?;
    cluster.kill(victims.last().context("an OSD")?, false)?;
    mirror.wait_for_writes(200)?;
    wait_for_groups(&cluster, 16)?;

    // What each disk has now is what it says that it has.
    cluster.kill_all()?;
    mirror.wait_for_writes(100)?;
    let report = mirror.finish()?;
    ensure!(report.reads > 0 && report.writes > 700, "little was done: {report:?}");
    println!("{report:?}");
    Ok(())
}
