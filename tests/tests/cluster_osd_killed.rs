//! One OSD is killed under a verified write load: no error, nothing lost, clean again.

use anyhow::{Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::workload::Fio;
use std::time::Duration;

#[test]
fn osd_killed_under_verified_writes() -> Result<()> {
    let cluster = Cluster::start(4)?;
    let volume = cluster.volume("v", "32M")?;
    let mut fio = Fio::verified_write(&volume.uri, "32M", 1000)?;
    let busy = |s: &serde_json::Value| Some(s["client_io"]["writes_per_s"].as_f64()? > 0.0);
    cluster.wait_for("writes arrive", Duration::from_secs(20), busy)?;
    cluster.kill(&cluster.names("osd")?[0], false)?;
    ensure!(fio.is_running()?, "fio ended before the OSD was killed");
    fio.finish()?;
    cluster.wait_clean(Duration::from_secs(60))
}
