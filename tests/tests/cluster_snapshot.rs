//! Snapshots of a volume that is written all the time, with gateway and monitor killed in the middle: each that exists is what
//! the volume was at one moment. Then clones, rollback, and what may not be removed.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::history::{Cut, History, Writers};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

const WRITTEN: u64 = 2 << 20;

/// When each was asked for, and when that was answered.
type Asked = BTreeMap<String, (u64, u64)>;

fn take(cluster: &Cluster, writers: &Writers, name: &str, asked: &mut Asked) -> Result<()> {
    let from = writers.now();
    let taken = cluster.run(&["snapshot", "create", name]);
    // Refused, it may have been taken all the same: then at some moment of its own.
    let until = if taken.is_ok() { writers.now() } else { u64::MAX };
    asked.insert(name.to_owned(), (from, until));
    taken.map(drop)
}

fn names(cluster: &Cluster) -> Result<Vec<String>> {
    let listed = cluster.json(&["snapshot", "ls", "v"])?;
    let list = listed["snapshots"].as_array().context("no list")?;
    Ok(list.iter().filter_map(|s| s["snapshot"].as_str().map(str::to_owned)).collect())
}

fn image(cluster: &Cluster, name: &str) -> Result<Vec<u8>> {
    let file = cluster.dir().join("image.raw");
    cluster.run(&["volume", "export", name, &file.display().to_string()])?;
    let mut bytes = std::fs::read(&file)?;
    ensure!(bytes.len() == 8 << 20, "{name} has another size");
    ensure!(bytes.split_off(WRITTEN as usize).iter().all(|b| *b == 0), "{name} holds what nobody wrote");
    Ok(bytes)
}

fn refused(cluster: &Cluster, args: &[&str], why: &str) -> Result<()> {
    match cluster.run(&[&["--yes"], args].concat()) {
        Ok(_) => anyhow::bail!("{args:?} was done"),
        Err(e) => ensure!(e.to_string().contains(why), "{args:?}: {e}"),
    }
    Ok(())
}

fn qemu_io(uri: &str, commands: &[&str]) -> Result<()> {
    let args: Vec<&str> = commands.iter().flat_map(|c| ["-c", c]).collect();
    let out = Command::new("qemu-io").args(["-f", "raw", "-d", "unmap"]).args(args).arg(uri).output()?;
    let said = String::from_utf8_lossy(&out.stdout);
    ensure!(out.status.success() && !said.contains("failed"), "qemu-io {commands:?}: {said}");
    Ok(())
}

#[test]
fn snapshots_under_load_are_consistent_cuts() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let volume = cluster.volume("v", "8M")?;
    let writers = Writers::start(&volume.socket, "v", WRITTEN, 4);
    let mut asked = Asked::new();
    for n in 0..3 {
        writers.wait_for_writes(150)?;
        take(&cluster, &writers, &format!("v@quiet{n}"), &mut asked)?;
    }
    for (n, daemon) in ["gateway.host1", "gateway.host1", "monitor.1"].into_iter().enumerate() {
        writers.wait_for_writes(100)?;
        std::thread::scope(|scope| {
            let killer = scope.spawn(|| cluster.kill(daemon, false));
            let taken = take(&cluster, &writers, &format!("v@killed{n}"), &mut asked);
            println!("{daemon} killed: {:?}", taken.map_err(|e| e.to_string()));
            killer.join().expect("does not panic")
        })?;
    }
    cluster.wait_for("the monitor answers again", Duration::from_secs(60), |_| Some(true))?;
    writers.wait_for_writes(100)?;
    take(&cluster, &writers, "v@last", &mut asked)?;
    writers.wait_for_writes(50)?;
    let history = writers.stop()?;
    println!("{} writes, {} lost connections", history.writes(), history.reconnects);
    ensure!(history.reconnects > 0, "no writer noticed that the gateway was killed");

    let taken = names(&cluster)?;
    ensure!(taken.len() >= 4, "too few snapshots: {taken:?}");
    let mut cuts = BTreeMap::new();
    for name in &taken {
        let (from, until) = asked[name];
        let cut = history.cut(&image(&cluster, name)?, from, until).with_context(|| name.clone())?;
        println!("{name}: {cut:?}");
        cuts.insert(name.clone(), cut);
    }
    for pair in taken.windows(2) {
        let (a, b) = (&cuts[&pair[0]].0, &cuts[&pair[1]].0);
        ensure!(a.iter().zip(b).all(|(a, b)| a <= b), "{} is older than {}", pair[1], pair[0]);
    }
    let now = history.cut(&image(&cluster, "v")?, u64::MAX - 1, u64::MAX)?;
    ensure!(now.0.iter().sum::<usize>() == history.writes(), "an answered write is not there");
    clones(&cluster, &history, &cuts)?;
    rollback(&cluster, &history, &cuts["v@quiet1"])
}

fn clones(cluster: &Cluster, history: &History, cuts: &BTreeMap<String, Cut>) -> Result<()> {
    let is = |name: &str, cut: &Cut| -> Result<()> {
        let found = history.cut(&image(cluster, name)?, 0, u64::MAX).with_context(|| name.to_owned())?;
        ensure!(found == *cut, "{name} is {found:?}, not {cut:?}");
        Ok(())
    };
    let cut = &cuts["v@quiet0"];
    cluster.run(&["volume", "clone", "v@quiet0", "c"])?;
    is("c", cut)?;
    let export = cluster.json(&["export", "add", "c", "--nbd"])?;
    let uri = export["uri"].as_str().context("no uri")?;
    // Part of a block, a discard and the neighbours of both: what is not written shows what is below.
    let below = image(cluster, "v@quiet0")?;
    qemu_io(uri, &["write -P 0x5a 4000 200", "discard 64k 64k", "write -z 256k 4k", "flush"])?;
    let mut wanted = below.clone();
    wanted[4000..4200].fill(0x5a);
    wanted[64 << 10..128 << 10].fill(0);
    wanted[256 << 10..260 << 10].fill(0);
    ensure!(image(cluster, "c")? == wanted, "the clone is not what was written to it");
    ensure!(image(cluster, "v@quiet0")? == below, "a write to the clone changed its snapshot");
    // A snapshot of the clone, in use: what lies between is seen by diff, and by a clone of it.
    cluster.run(&["snapshot", "create", "c@one"])?;
    qemu_io(uri, &["discard 0 64k", "write -P 7 1M 4k"])?;
    let diff = cluster.json(&["snapshot", "diff", "c@one"])?;
    let ranges: Vec<_> = diff["changes"].as_array().context("no changes")?.iter().collect();
    ensure!(ranges.len() == 2, "{diff}");
    ensure!(ranges[0]["kind"] == "zero" && ranges[0]["length_bytes"] == 64 << 10, "{diff}");
    ensure!(ranges[1]["kind"] == "data" && ranges[1]["offset_bytes"] == 1 << 20, "{diff}");
    cluster.run(&["volume", "clone", "c@one", "d"])?;
    ensure!(image(cluster, "d")? == wanted, "a clone of a clone is something else");

    refused(cluster, &["snapshot", "rm", "v@quiet0"], "clones c")?;
    refused(cluster, &["snapshot", "rm", "c@one"], "clones d")?;
    refused(cluster, &["volume", "rm", "v"], "exported")?;
    refused(cluster, &["volume", "clone", "v@none", "x"], "v@none")?;
    cluster.run(&["--yes", "volume", "rm", "d"])?;
    cluster.run(&["--yes", "snapshot", "rm", "c@one"])?;
    cluster.run(&["export", "rm", "c"])?;
    cluster.removed("c")?;
    is("v@quiet0", cut)?;
    is("v@quiet2", &cuts["v@quiet2"])
}

fn rollback(cluster: &Cluster, history: &History, cut: &Cut) -> Result<()> {
    refused(cluster, &["snapshot", "rollback", "v@quiet1"], "exported")?;
    cluster.run(&["export", "rm", "v"])?;
    cluster.detached("v")?;
    let later = image(cluster, "v@last")?;
    cluster.run(&["--yes", "snapshot", "rollback", "v@quiet1"])?;
    let found = history.cut(&image(cluster, "v")?, 0, u64::MAX)?;
    ensure!(found == *cut, "rolled back to {found:?}, not {cut:?}");
    ensure!(image(cluster, "v@last")? == later, "a later snapshot was changed");
    cluster.detached("v")?;
    refused(cluster, &["volume", "rm", "v"], "snapshots")?;
    for name in names(cluster)? {
        cluster.run(&["--yes", "snapshot", "rm", &name])?;
    }
    cluster.run(&["--yes", "volume", "rm", "v"])?;
    Ok(())
}
