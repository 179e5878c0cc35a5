//! Every daemon is killed at once under verified writes, as in a power cut of the whole rack but for what
//! the kernel still holds; they come back, and what was acknowledged is there.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use std::time::Duration;

#[test]
fn everything_killed_under_verified_writes() -> Result<()> {
    let cluster = Cluster::start(4)?;
    let volume = cluster.volume("v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 8);
    mirror.wait_for_writes(300)?;
    for _ in 0..2 {
        cluster.kill_all()?;
        mirror.wait_for_writes(300)?;
    }
    cluster.wait_clean(Duration::from_secs(120))?;
    let report = mirror.finish()?;
    ensure!(report.reconnects >= 8, "no client noticed: {report:?}");
    println!("{report:?}");
    Ok(())
}
