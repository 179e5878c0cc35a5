//! A rebuild as foreign programs watch it: the example clients in `docs/examples`, over TLS with a certificate
//! that may only watch.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::workload::Fio;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples").join(name)
}

fn start(command: &mut Command) -> Result<Child> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    child.with_context(|| format!("cannot start {command:?}"))
}

/// Saw the rebuild begin and end.
fn saw_it(who: &str, child: Child) -> Result<()> {
    let out = child.wait_with_output()?;
    let (lines, errors) = (String::from_utf8(out.stdout)?, String::from_utf8_lossy(&out.stderr).into_owned());
    ensure!(out.status.success(), "{who}: {}: {errors}\n{lines}", out.status);
    let field = |line: &str, name: &str| -> Result<u64> {
        let value = line.split(' ').find_map(|f| f.strip_prefix(name)?.strip_prefix('='));
        value.with_context(|| format!("{who}: no {name} in {line:?}"))?.parse().context("not a number")
    };
    let lines: Vec<&str> = lines.lines().collect();
    let (first, last) = (lines.first().context("nothing printed")?, lines.last().context("nothing printed")?);
    ensure!(field(first, "pgs_not_clean")? > 0 && field(first, "degraded_objects")? > 0, "{who}: {lines:#?}");
    ensure!(field(last, "pgs_not_clean")? == 0 && field(last, "degraded_objects")? == 0, "{who}: {lines:#?}");
    ensure!(field(last, "recovered_objects")? > 0, "{who}: nothing was recovered: {lines:#?}");
    Ok(())
}

/// The system's Python, if it has what the example needs.
fn python() -> Option<&'static str> {
    let has = |python: &&str| {
        let probe = Command::new(python).args(["-c", "import grpc, grpc_tools.protoc, tomllib"]).output();
        probe.is_ok_and(|out| out.status.success())
    };
    ["/usr/bin/python3", "python3"].into_iter().find(has)
}

#[test]
fn foreign_programs_watch_a_rebuild() -> Result<()> {
    let cluster = Cluster::start_tls_with(3, 4, &["--down-out-secs", "12"])?;
    let volume = cluster.volume("v", "64M")?;
    Fio::verified_write(&volume.uri, "64M", 8000)?.finish()?;
    cluster.wait_clean(Duration::from_secs(60))?;

    // The clients are given a follower first: they have to find the leader.
    let tls = |name: &str| cluster.dir().join("tls").join(name);
    let daemons = cluster.daemons()?;
    let mut monitors: Vec<_> = daemons.iter().filter(|d| d["kind"] == "monitor").collect();
    monitors.sort_by_key(|m| m["leader"] == true);
    let addrs: Vec<_> = monitors.iter().map(|m| m["addr"].to_string()).collect();
    let config = cluster.dir().join("viewer.toml");
    let files = ["ca.crt", "viewer.crt", "viewer.key"].map(|f| tls(f).display().to_string());
    let [ca, cert, key] = &files;
    let text =
        format!("monitors = [{}]\n[tls]\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\n", addrs.join(", "));
    std::fs::write(&config, text)?;

    // An operator's limit: refused where it would stand still, else in the status that everybody sees.
    let refused = cluster.run(&["rebuild", "set", "--max-rate", "1M"]);
    ensure!(refused.is_err_and(|e| format!("{e:#}").contains("4194304 bytes/s at least")), "1M is accepted");
    cluster.run(&["rebuild", "set", "--max-rate", "400M"])?;
    cluster.wait_for("the limit", Duration::from_secs(10), |s| {
        Some(s["rebuild"]["max_rate_bytes_per_s"].as_u64()? == 400 << 20)
    })?;
    let osd = cluster.names("osd")?.remove(0);
    cluster.kill(&osd, true)?;
    cluster.wait_for("objects that lack a copy", Duration::from_secs(60), |s| {
        Some(s["rebuild"]["degraded_objects"].as_u64()? > 0)
    })?;
    let rust = start(Command::new(env!("CARGO_BIN_EXE_gabion-example-rebuilds")).arg(&config))?;
    let python = match python() {
        Some(python) => Some(start(Command::new(python).arg(example("rebuilds.py")).arg(&config))?),
        None => {
            println!("SKIPPED: the Python client: install python3-grpcio and python3-grpc-tools");
            None
        }
    };
    saw_it("the Rust client", rust)?;
    python.map_or(Ok(()), |p| saw_it("the Python client", p))
}
