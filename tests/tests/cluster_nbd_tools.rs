//! The tools that people use, on an export of a real cluster.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use std::process::Command;

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
    Ok(())
}
