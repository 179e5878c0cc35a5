//! The host that has a volume attached is gone for good: the volume is taken away from it, and the
//! operations that it still sends are refused.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;

#[test]
fn a_volume_is_taken_away_from_a_dead_gateway() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let volume = cluster.volume("v", "4M")?;
    Mirror::start(&volume.socket, "v", 4 << 20, 2).finish()?;
    let refused = cluster.run(&["--yes", "volume", "detach", "v"]);
    ensure!(refused.is_err(), "it is exported");
    cluster.kill("gateway.host1", true)?;
    cluster.run(&["--yes", "export", "rm", "v"])?;
    let refused = cluster.run(&["--yes", "volume", "rm", "v"]).map_err(|e| e.to_string());
    ensure!(
        refused.as_ref().is_err_and(|e| e.contains("attached")),
        "the gateway still holds it: {refused:?}"
    );
    cluster.run(&["--yes", "volume", "detach", "v"])?;
    cluster.run(&["--yes", "volume", "rm", "v"])?;
    Ok(())
}
