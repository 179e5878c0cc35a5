//! Two of three copies are gone: writes wait without an error, status says so, and they go on when
//! one returns.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::workload::Fio;
use std::time::Duration;

#[test]
fn writes_wait_for_a_second_copy() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let volume = cluster.volume("v", "16M")?;
    let mut fio = Fio::verified_write(&volume.uri, "16M", 200)?;
    let busy = |s: &serde_json::Value| Some(s["client_io"]["writes_per_s"].as_f64()? > 0.0);
    cluster.wait_for("writes arrive", Duration::from_secs(20), busy)?;
    let osds = cluster.names("osd")?;
    cluster.kill(&osds[0], true)?;
    cluster.kill(&osds[1], true)?;
    cluster.wait_for("health says that groups are inactive", Duration::from_secs(20), |s| {
        Some(s["health"]["checks"].as_array()?.iter().any(|c| c["code"] == "PG_INACTIVE"))
    })?;
    ensure!(fio.is_running()?, "fio ended although its writes cannot be acknowledged");
    cluster.revive(&osds[0])?;
    fio.finish()?;
    cluster.revive(&osds[1])?;
    cluster.wait_clean(Duration::from_secs(60))
}
