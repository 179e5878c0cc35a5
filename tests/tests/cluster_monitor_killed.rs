//! The monitor is killed under a verified write load and comes back with everything it knew.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::workload::Fio;
use std::time::Duration;

#[test]
fn monitor_killed_under_verified_writes() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let volume = cluster.volume("v", "32M")?;
    let mut fio = Fio::verified_write(&volume.uri, "32M", 1000)?;
    let busy = |s: &serde_json::Value| Some(s["client_io"]["writes_per_s"].as_f64()? > 0.0);
    cluster.wait_for("writes arrive", Duration::from_secs(20), busy)?;
    cluster.kill("monitor.1", false)?;
    ensure!(fio.is_running()?, "fio ended before the monitor was killed");
    fio.finish()?;
    cluster.wait_clean(Duration::from_secs(60))?;
    let shown = cluster.json(&["volume", "show", "v"])?;
    ensure!(shown["size_bytes"] == 32 << 20, "the volume is not what it was: {shown}");
    Ok(())
}
