//! The gateway is killed under verified writes, twice: clients come back to the same socket, and what
//! was acknowledged is there.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;

#[test]
fn gateway_killed_under_verified_writes() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let volume = cluster.volume("v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 8);
    mirror.wait_for_writes(300)?;
    for _ in 0..2 {
        cluster.kill("gateway.host1", false)?;
        mirror.wait_for_writes(300)?;
    }
    let report = mirror.finish()?;
    ensure!(report.reconnects >= 8, "no client noticed: {report:?}");
    println!("{report:?}");
    Ok(())
}
