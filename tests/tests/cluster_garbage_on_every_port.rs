//! Garbage on every port: every daemon keeps running, under the same pid.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

#[test]
fn garbage_on_every_port() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let before = cluster.daemons()?;
    for daemon in &before {
        let addr = daemon["addr"].as_str().with_context(|| format!("no address: {daemon}"))?;
        for seed in 0..20u8 {
            let mut stream = TcpStream::connect(addr)?;
            stream.set_write_timeout(Some(Duration::from_secs(5)))?;
            let garbage: Vec<u8> =
                (0..65_536u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect();
            // A daemon that hangs up in the middle does the right thing.
            let _ = stream.write_all(&garbage);
        }
    }
    cluster.wait_for("every OSD up", Duration::from_secs(20), |s| Some(s["osds_up"] == s["osds"]))?;
    for (old, new) in before.iter().zip(cluster.daemons()?) {
        ensure!(old["pid"] == new["pid"] && new["state"] == "running", "was {old}, is {new}");
    }
    Ok(())
}
