//! A real scrape of every daemon: the figures are there, and they move with what the cluster does.

use anyhow::{Context, Result, bail, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::scrape::{Page, of, sum};
use gabion_tests::workload::Fio;
use std::time::{Duration, Instant};

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !done()? {
        if started.elapsed() > Duration::from_secs(60) {
            bail!("not so after 60 s: {what}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn every_daemon_is_scraped() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let volume = cluster.volume("v", "16M")?;
    Fio::verified_write(&volume.uri, "16M", 4000)?.finish()?;

    let gateway = of(&cluster, "gateway")?;
    let (reads, writes) =
        ("gabion_volume_reads_total{volume=\"v\"}", "gabion_volume_writes_total{volume=\"v\"}");
    let written = sum(&gateway, "gabion_volume_written_bytes_total{volume=\"v\"}");
    ensure!(sum(&gateway, reads) > 0.0 && sum(&gateway, writes) > 0.0, "{gateway:?}");
    ensure!(written >= f64::from(16 << 20), "{gateway:?}");
    ensure!(sum(&gateway, "gabion_gateway_exports_ready") == 1.0, "{gateway:?}");
    ensure!(sum(&gateway, "gabion_volume_errors_total{volume=\"v\"}") == 0.0, "{gateway:?}");

    // Three copies of each byte; the figures are those of the last heartbeat.
    wait("the OSDs count what was written", || {
        let osds = of(&cluster, "osd")?;
        let stored = sum(&osds, "gabion_store_data_bytes_total");
        Ok(osds.len() == 3
            && sum(&osds, "gabion_osd_written_bytes_total") >= written
            && stored >= 3.0 * written
            && sum(&osds, "gabion_store_commits_total") > 0.0
            && sum(&osds, "gabion_device_written_bytes_total") >= stored
            && sum(&osds, "gabion_osd_used_bytes") > 0.0)
    })?;
    let osds = of(&cluster, "osd")?;
    for osd in &osds {
        ensure!(osd["gabion_store_journal_used_bytes"] <= osd["gabion_store_journal_bytes"], "{osd:?}");
        ensure!(osd["gabion_osd_used_bytes"] < osd["gabion_osd_capacity_bytes"], "{osd:?}");
    }

    let host = of(&cluster, "host")?;
    ensure!(host.iter().all(|p| p["gabion_host_guests"] == 0.0), "{host:?}");

    let monitor = || -> Result<Page> { of(&cluster, "monitor")?.pop().context("no monitor") };
    let page = monitor()?;
    for (name, value) in [("osds_up", 3.0), ("volumes", 1.0), ("exports", 1.0), ("monitor_leads", 1.0)] {
        ensure!(page[&format!("gabion_{name}")] == value, "{name}: {page:?}");
    }
    wait("16 groups are clean", || Ok(monitor()?.get("gabion_pgs{state=\"active+clean\"}") == Some(&16.0)))?;
    let osd = cluster.names("osd")?.remove(0);
    cluster.kill(&osd, true)?;
    wait("the monitor shows what is missing", || {
        let page = monitor()?;
        Ok(page["gabion_osds_up"] == 2.0
            && page["gabion_pgs_not_clean"] == 16.0
            && page.get("gabion_health_check{code=\"OSD_DOWN\"}").is_some_and(|v| *v >= 1.0))
    })
}
