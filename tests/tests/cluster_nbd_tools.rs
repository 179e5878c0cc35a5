//! The tools that people use, on an export of a real cluster.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn run(tool: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(tool).args(args).output().with_context(|| format!("cannot start {tool}"))?;
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    ensure!(out.status.success(), "{tool} {}: {said}", args.join(" "));
    Ok(said)
}

#[test]
fn tools_agree_on_a_volume() -> Result<()> {
    let cluster = Cluster::start(3)?;
    let uri = cluster.volume("v", "64M")?.uri;
    let path = |name: &str| cluster.dir().join(name).display().to_string();
    let (image, back, qcow) = (path("image.raw"), path("back.raw"), path("image.qcow2"));

    let info = run("nbdinfo", &[&uri])?;
    for want in [
        "newstyle-fixed",
        "67108864",
        "can_multi_conn: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
    ] {
        ensure!(info.contains(want), "no {want:?} in {info}");
    }
    // Data, a hole and odd edges.
    let mut bytes: Vec<u8> = (0..64u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
    bytes[5_000_001..20_000_003].fill(0);
    std::fs::write(&image, &bytes)?;
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &image, &uri])?;
    run("nbdcopy", &[&uri, &back])?;
    ensure!(std::fs::read(&back)? == bytes, "nbdcopy reads something else than qemu-img wrote");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &qcow])?;
    ensure!(run("qemu-img", &["compare", &image, &qcow])?.contains("identical"), "the qcow2 differs");

    let io = |commands: &[&str]| {
        let args: Vec<&str> = commands.iter().flat_map(|c| ["-c", c]).collect();
        run("qemu-io", &[&["-f", "raw", "-d", "unmap"], args.as_slice(), &[uri.as_str()]].concat())
    };
    io(&[
        "write -P 0x5a 12345 70001",
        "write -f -P 0xa5 40M 1M",
        "flush",
        "discard 8M 4M",
        "write -z -u 30M 2M",
    ])?;
    let said =
        io(&["read -P 0x5a 12345 70001", "read -P 0xa5 40M 1M", "read -P 0 8M 4M", "read -P 0 30M 2M"])?;
    ensure!(!said.contains("verification failed"), "{said}");

    let fio =
        ["--name=v", "--ioengine=nbd", "--rw=randrw", "--bsrange=512-64k", "--iodepth=16", "--size=16M"];
    let verify = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"];
    run("fio", &[fio.as_slice(), verify.as_slice(), &[&format!("--uri={uri}")]].concat())?;

    // It grows while it is exported; who connects from then on sees it.
    cluster.run(&["volume", "resize", "v", "--size", "96M"])?;
    let info = || run("nbdinfo", &["--size", &uri]);
    until("the export has grown", || Ok(info()?.trim() == "100663296"))?;
    let said = io(&["write -P 0x77 90M 1M", "read -P 0x77 90M 1M", "read -P 0 80M 1M"])?;
    ensure!(!said.contains("verification failed"), "{said}");
    let shrunk = cluster.run(&["volume", "resize", "v", "--size", "64M"]);
    ensure!(shrunk.is_err_and(|e| e.to_string().contains("does not shrink")), "it shrank");
    images(&cluster, &path)
}

fn until(what: &str, condition: impl Fn() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !condition()? {
        ensure!(started.elapsed() < Duration::from_secs(60), "not so after a minute: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A gateway of another host; killed when dropped.
struct Gateway(Child);

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Images in and out where there are several gateways, with their holes.
fn images(cluster: &Cluster, path: &dyn Fn(&str) -> String) -> Result<()> {
    let status = cluster.json(&["status"])?;
    let monitor = status["monitors"][0]["addr"].as_str().context("no monitor")?;
    let gateway = Command::new(cluster.binary("gabion-gateway"))
        .args(["--monitors", monitor, "--host", "host2", "--run-dir", &path("gateway.host2")])
        .stderr(Stdio::null())
        .spawn()?;
    let _gateway = Gateway(gateway);
    let up = |host: &Value| host["name"] == "host2" && host["gateway_up"] == true;
    let reported =
        || Ok(cluster.json(&["host", "ls"])?["hosts"].as_array().is_some_and(|h| h.iter().any(up)));
    until("the second gateway reports", reported)?;

    let (qcow, raw, back) = (path("golden.qcow2"), path("golden.raw"), path("golden-back.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &qcow, "64M"])?;
    let write = ["-f", "qcow2", "-c", "write -P 0x11 1M 512k", "-c", "write -P 0x22 40M 4k", &qcow];
    run("qemu-io", &write)?;
    cluster.run(&["volume", "import", &qcow, "golden", "--pool", "p"])?;
    cluster.run(&["snapshot", "create", "golden@base"])?;
    cluster.run(&["volume", "clone", "golden@base", "guest"])?;
    cluster.run(&["volume", "export", "guest", &raw, "--host", "host2"])?;
    ensure!(run("qemu-img", &["compare", &qcow, &raw])?.contains("identical"), "the raw image differs");
    ensure!(std::fs::metadata(&raw)?.blocks() * 512 < 4 << 20, "the raw image is not sparse");
    cluster.run(&["volume", "export", "golden@base", &back, "--format", "qcow2", "--gateway", "host1"])?;
    ensure!(run("qemu-img", &["compare", &qcow, &back])?.contains("identical"), "the qcow2 image differs");
    // What an import writes is what the image holds, not its holes.
    cluster.run(&["volume", "create", "empty", "--size", "64M", "--pool", "p"])?;
    cluster.run(&["snapshot", "create", "empty@before"])?;
    cluster.run(&["volume", "import", &qcow, "empty", "--host", "host2"])?;
    let diff = cluster.json(&["snapshot", "diff", "empty@before"])?;
    let changes = diff["changes"].as_array().context("no changes")?;
    let data = changes.iter().filter(|c| c["kind"] == "data");
    let data: u64 = data.filter_map(|c| c["length_bytes"].as_u64()).sum();
    ensure!((516 << 10..4 << 20).contains(&data), "{data} bytes were written for 516 KiB: {diff}");
    Ok(())
}
