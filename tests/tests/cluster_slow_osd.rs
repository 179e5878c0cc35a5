//! The disk of one OSD becomes slow, and stays so: the kernel gives its process a few requests a second. Health must name it, reads must go
//! around it, nothing else may happen, and nothing that was written is lost.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use gabion_tests::scrape;
use gabion_tests::slow_disk::SlowDisk;
use serde_json::Value;
use std::time::{Duration, Instant};

/// Requests a second.
const SLOW: u32 = 30;
const PATIENCE: Duration = Duration::from_secs(180);
const VOLUME_BYTES: u64 = 16 << 20;
const WORKERS: usize = 6;

fn pid(cluster: &Cluster, osd: &str) -> Result<i32> {
    let daemons = cluster.daemons()?;
    let found = daemons
        .iter()
        .find(|d| d["kind"] == "osd" && osd == format!("osd.{}", d["id"].as_str().unwrap_or_default()));
    let pid = found.and_then(|d| d["pid"].as_i64()).with_context(|| format!("{osd} does not run"))?;
    Ok(i32::try_from(pid)?)
}

fn slow(status: &Value) -> Vec<u64> {
    let osds = status["slow_policy"]["osds"].as_array();
    osds.into_iter().flatten().filter_map(|o| o["id"].as_u64()).collect()
}

/// Reads that others answered in place of one OSD.
fn hedges_won(cluster: &Cluster, id: u64) -> Result<f64> {
    let pages = scrape::of(cluster, "osd")?;
    let info = format!("gabion_osd_info{{osd=\"{id}\"}}");
    let page = pages.iter().find(|p| p.contains_key(&info)).context("it has no metrics")?;
    page.get("gabion_osd_hedges_won_total").copied().context("it does not count them")
}

#[test]
fn a_slow_disk_is_named_by_health_and_read_around() -> Result<()> {
    let cluster = Cluster::start(4)?;
    let volume = cluster.volume("v", "16M")?;
    // However busy this machine is, nobody is left out of its groups meanwhile.
    cluster.run(&["osd", "slow-policy", "--limit", "120s"])?;
    let mirror = Mirror::start(&volume.socket, "v", VOLUME_BYTES, WORKERS);
    mirror.wait_for_writes(500)?;
    let osd = cluster.names("osd")?.remove(1);
    let id: u64 = osd.trim_start_matches("osd.").parse()?;
    let Some(disk) = SlowDisk::of(pid(&cluster, &osd)?, cluster.dir(), SLOW)? else {
        return mirror.finish().map(drop);
    };
    let started = Instant::now();
    cluster.wait_for("it is called slow, and nobody else", PATIENCE, |s| Some(slow(s) == [id]))?;
    println!("{osd} is called slow after {:.1} s", started.elapsed().as_secs_f64());

    let health = cluster.json(&["health"])?;
    let check = health["checks"].as_array().into_iter().flatten().find(|c| c["code"] == "OSD_SLOW");
    let check = check.with_context(|| format!("health does not say so: {health}"))?;
    let details: Vec<&str> =
        check["details"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(details.len() == 1 && details[0].starts_with(&format!("{osd} on host ")), "{check}");
    println!("{}", details[0]);

    // It leads groups, and so others answer what it is asked.
    let before = hedges_won(&cluster, id)?;
    let started = Instant::now();
    while hedges_won(&cluster, id)? < before + 5.0 {
        ensure!(started.elapsed() < PATIENCE, "reads do not go around {osd}");
        mirror.wait_for_writes(10)?;
    }
    println!(
        "{} reads answered by others in {:.1} s",
        hedges_won(&cluster, id)? - before,
        started.elapsed().as_secs_f64()
    );
    let status = cluster.json(&["status"])?;
    ensure!(status["osds_up"] == 4 && status["osds_in"] == 4, "only shown: {status}");
    cluster.wait_clean(PATIENCE)?;
    drop(disk);
    let report = mirror.finish()?;
    println!("{report:?}");
    ensure!(report.reconnects == 0, "{report:?}");
    Ok(())
}
