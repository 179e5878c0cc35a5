//! The tools that people use, against an NBD export over a Unix socket.
//!
//! A tool that is not installed is counted and named; the test fails when none is there.

use gabion_gateway::nbd;
use gabion_gateway::volume::Volume;
use std::path::Path;
use std::process::{Command, Output};

const SIZE: u64 = 64 << 20;

struct Tools {
    missing: Vec<String>,
    ran: usize,
}

impl Tools {
    /// Runs a tool; `None` when it is not installed.
    async fn run(&mut self, dir: &Path, tool: &str, args: &[&str]) -> Option<Output> {
        let mut command = Command::new(tool);
        command.args(args).current_dir(dir);
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap();
        match output {
            Ok(output) => {
                self.ran += 1;
                Some(output)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                self.missing.push(tool.to_owned());
                None
            }
            Err(e) => panic!("{tool}: {e}"),
        }
    }

    async fn ok(&mut self, dir: &Path, tool: &str, args: &[&str]) -> Option<String> {
        let output = self.run(dir, tool, args).await?;
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{tool} {args:?}: {}\n{out}\n{err}", output.status);
        Some(out + &err)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbd_tools_work() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let socket = dir.join("nbd.sock");
    let export = nbd::Export::new(Volume::in_memory(SIZE), false);
    nbd::listen_unix(socket.clone(), export.clone()).unwrap();
    let uri = format!("nbd+unix:///vol?socket={}", socket.display());
    let uri = uri.as_str();
    let mut t = Tools { missing: Vec::new(), ran: 0 };

    if let Some(info) = t.ok(dir, "nbdinfo", &[uri]).await {
        for want in
            ["newstyle-fixed", &SIZE.to_string(), "can_multi_conn: true", "can_fua: true", "can_trim: true"]
        {
            assert!(info.contains(want), "no {want:?} in {info}");
        }
    }
    t.ok(dir, "nbdinfo", &["--list", uri]).await;

    let image: Vec<u8> = (0..SIZE as usize / 2).map(|i| (i / 4096 * 31 + i % 253) as u8).collect();
    std::fs::write(dir.join("in.img"), &image).unwrap();
    if t.ok(dir, "nbdcopy", &["in.img", uri]).await.is_some() {
        t.ok(dir, "nbdcopy", &[uri, "out.img"]).await;
        let out = std::fs::read(dir.join("out.img")).unwrap();
        assert!(out.len() as u64 == SIZE && out[..image.len()] == image[..], "nbdcopy changed the image");
    }
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "in.img", uri];
    if t.ok(dir, "qemu-img", &convert).await.is_some() {
        t.ok(dir, "qemu-img", &["convert", "-f", "raw", "-O", "raw", uri, "back.img"]).await;
        let back = std::fs::read(dir.join("back.img")).unwrap();
        assert!(back.len() as u64 == SIZE && back[..image.len()] == image[..], "qemu-img changed the image");
    }

    // Odd offsets, FUA, zeroes, discard; patterns are read back and compared by qemu-io itself.
    let script = [
        "write -P 0x11 0 1M",
        "write -P 0x22 513 1023",
        "write -f -P 0x33 4M 8192",
        "flush",
        "write -z 65536 4608",
        "discard 128k 64k",
        "read -P 0x22 513 1023",
        "read -P 0x33 4M 8192",
        "read -P 0 65536 4608",
        "read -P 0 128k 64k",
        "read -P 0x11 192k 64k",
        "read -P 0x11 0 513",
    ];
    let mut args = vec!["-f", "raw", "-d", "unmap"];
    for line in &script {
        args.extend(["-c", line]);
    }
    args.push(uri);
    if let Some(out) = t.ok(dir, "qemu-io", &args).await {
        assert!(!out.contains("verification failed") && !out.contains("error"), "{out}");
    }

    let target = format!("--uri={uri}");
    let fio = [
        "--name=v",
        "--ioengine=nbd",
        &target,
        "--rw=randrw",
        "--bs=512-128k",
        "--bsrange=512-128k",
        "--blockalign=512",
        "--size=32m",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--norandommap=0",
    ];
    if let Some(out) = t.run(dir, "fio", &fio).await {
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && !text.contains("verify: bad"), "{text}");
    }

    export.close().await;
    assert!(!socket.exists(), "the socket goes with its export");
    println!("{} tool runs, missing: {:?}", t.ran, t.missing);
    assert!(t.ran > 0, "none of the tools is installed: {:?}", t.missing);
}
