//! A guest's disk, from the VMM's vhost-user front end to three OSDs, under a load that verifies every
//! block: the gateway is killed again and again, then an OSD, then both at once.

use anyhow::{Context, Result};
use gabion_tests::cluster::Cluster;
use gabion_tests::guest_disk::{self, Load};
use std::path::Path;
use std::time::Duration;

#[test]
fn a_guests_disk_survives_its_gateway_and_an_osd() -> Result<()> {
    let cluster = Cluster::start(3)?;
    cluster.run(&["pool", "create", "p", "--replicas", "3", "--pgs", "16"])?;
    cluster.run(&["volume", "create", "v", "--size", "16M", "--pool", "p"])?;
    let export = cluster.json(&["export", "add", "v", "--vhost-user"])?;
    let socket = export["socket"].as_str().context("export add answers a socket")?;
    let gateway = cluster.names("gateway")?.into_iter().next().context("a gateway")?;
    let (disk, queues) = guest_disk::attach(Path::new(socket))?;
    let load = Load::start(queues);
    load.wait_for(200)?;
    for _ in 0..3 {
        cluster.kill(&gateway, false)?;
        load.wait_for(200)?;
    }
    cluster.kill("osd.1", true)?;
    load.wait_for(200)?;
    cluster.kill(&gateway, false)?;
    cluster.revive("osd.1")?;
    load.wait_for(200)?;
    cluster.wait_clean(Duration::from_secs(60))?;
    let verified = load.finish()?;
    println!("{verified} blocks verified");
    disk.detach()
}
