//! The OSD with the only newest copies dies, and its disk is only readable: its groups are exported, imported into a new
//! disk that takes its place, and everything that was acknowledged is there.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

#[test]
fn groups_are_rescued_from_a_readable_disk() -> Result<()> {
    let cluster = Cluster::start(2)?;
    let volume = cluster.volume_in(&["--replicas", "2", "--min-size", "1"], "v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 8);
    mirror.wait_for_writes(300)?;
    let osds = cluster.names("osd")?;
    let (behind, newest) = (&osds[0], &osds[1]);
    cluster.kill(behind, true)?;
    // These are on one disk only.
    mirror.wait_for_writes(300)?;
    cluster.kill(newest, true)?;
    cluster.revive(behind)?;
    let waits = |s: &serde_json::Value| {
        let inactive = s["health"]["checks"].as_array()?.iter().any(|c| c["code"] == "PG_INACTIVE");
        Some(inactive && s["osds_up"] == 1)
    };
    cluster.wait_for("the groups wait for the newest copy", Duration::from_secs(60), waits)?;

    let data = data_dir(&cluster, newest)?;
    let (data, old) = (Path::new(&data), Path::new(&data).with_extension("old"));
    std::fs::rename(data, &old)?;
    let tool = |args: &[&str]| -> Result<String> {
        let out = Command::new(cluster.binary("gabion-osd")).args(args).output()?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), "gabion-osd {}: {said}", args.join(" "));
        Ok(String::from_utf8(out.stdout)?)
    };
    let (old_dir, new_dir) = (old.to_str().context("a path")?, data.to_str().context("a path")?);
    tool(&["fsck", "--deep", old_dir])?;
    let listed: serde_json::Value =
        serde_json::from_str(&tool(&["dump", "--data-dir", old_dir, "-o", "json"])?)?;
    // Also those without an object: the cluster waits for them, too.
    let groups = listed["groups"].as_array().context("a list of groups")?;
    let groups: BTreeSet<&str> = groups.iter().filter_map(|g| g["pg"].as_str()).collect();
    ensure!(!groups.is_empty(), "the disk has no group: {listed}");
    let osd = newest.trim_start_matches("osd.");
    for (n, pg) in groups.iter().enumerate() {
        let file = cluster.dir().join(format!("{pg}.export"));
        let file = file.to_str().context("a path")?;
        tool(&["export", "--data-dir", old_dir, "--pg", pg, "--retire", file])?;
        let place = ["--as-osd", osd, "--size", "512M"];
        let place = if n == 0 { &place[..] } else { &[] };
        tool(&[&["import", "--data-dir", new_dir], place, &[file]].concat())?;
    }
    tool(&["fsck", "--deep", new_dir])?;
    cluster.revive(newest)?;
    mirror.wait_for_writes(300)?;
    cluster.wait_clean(Duration::from_secs(120))?;
    // Reads back whatever was acknowledged.
    println!("{} groups: {:?}", groups.len(), mirror.finish()?);
    let served = Command::new(cluster.binary("gabion-osd"))
        .args([
            "run",
            "--data-dir",
            old_dir,
            "--monitors",
            "127.0.0.1:1",
            "--listen",
            "127.0.0.1:0",
            "--host",
            "h",
        ])
        .output()?;
    let said = String::from_utf8_lossy(&[served.stdout, served.stderr].concat()).into_owned();
    ensure!(!served.status.success() && said.contains("retired"), "the old disk is served again: {said}");
    Ok(())
}

fn data_dir(cluster: &Cluster, daemon: &str) -> Result<String> {
    let daemons = cluster.daemons()?;
    let id = daemon.trim_start_matches("osd.");
    let found = daemons.iter().find(|d| d["kind"] == "osd" && d["id"] == id);
    let dir = found.and_then(|d| d["data_dir"].as_str());
    dir.map(str::to_owned).with_context(|| format!("{daemon} has no directory"))
}
