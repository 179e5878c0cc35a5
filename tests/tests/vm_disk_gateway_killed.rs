//! The VMM's disk against gateway processes that are killed at any moment, under a load that verifies
//! every block and goes on by interrupts only: under full load, and as early as in the handshake.

use anyhow::{Context, Result};
use bytes::Bytes;
use gabion_gateway::vhost::{Disk, serve};
use gabion_tests::guest_disk::{self, Load};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const CHILD: &str = "GABION_TEST_GATEWAY_DIR";
const NAME: &str = "no_request_is_lost_and_none_hangs_when_gateways_are_killed";
const LISTENING: &str = "gateway listens";
const KILLS: u64 = 40;

/// A file that answers after a moment, not in the order of the questions: so there is always something
/// under way when the process is killed.
struct SlowFile {
    file: File,
    operations: AtomicU64,
}

impl SlowFile {
    async fn take_a_moment(&self) {
        let n = self.operations.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_micros(n * 7919 % 3000)).await;
    }
}

impl Disk for SlowFile {
    type Error = io::Error;
    fn size_bytes(&self) -> u64 {
        guest_disk::DISK_BYTES
    }
    fn serial(&self) -> String {
        "file".into()
    }
    async fn read(&self, offset: u64, len: u32) -> io::Result<Bytes> {
        self.take_a_moment().await;
        let mut data = vec![0; len as usize];
        self.file.read_exact_at(&mut data, offset)?;
        Ok(data.into())
    }
    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        self.take_a_moment().await;
        self.file.write_all_at(&data, offset)?;
        self.take_a_moment().await;
        Ok(())
    }
    async fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    async fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The child's part: serves until it is killed.
fn serve_file(dir: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let file = File::options().read(true).write(true).open(dir.join("disk"))?;
    let disk = Arc::new(SlowFile { file, operations: AtomicU64::new(0) });
    let _export = serve(disk, dir.join("socket"), false, guest_disk::QUEUES, runtime.handle().clone())
        .context("serve")?;
    println!("{LISTENING}");
    runtime.block_on(std::future::pending())
}

struct Gateway(Child);

impl Gateway {
    /// Returns when it listens.
    fn start(dir: &Path) -> Result<Gateway> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", NAME, "--nocapture"])
            .env(CHILD, dir)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("its output")?;
        let gateway = Gateway(child);
        let mut lines = BufReader::new(output).lines();
        lines.find(|line| line.as_ref().map_or(true, |l| l.ends_with(LISTENING))).context("it listens")??;
        Ok(gateway)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn no_request_is_lost_and_none_hangs_when_gateways_are_killed() -> Result<()> {
    if let Some(dir) = std::env::var_os(CHILD) {
        return serve_file(Path::new(&dir));
    }
    let dir = tempfile::tempdir()?;
    File::create(dir.path().join("disk"))?.set_len(guest_disk::DISK_BYTES)?;
    let mut gateway = Gateway::start(dir.path())?;
    let (disk, queues) = guest_disk::attach(&dir.path().join("socket"))?;
    let load = Load::start(queues);
    for kill in 0..KILLS {
        match kill % 4 {
            // Somewhere in the connecting, the handshake or the replay.
            3 => std::thread::sleep(Duration::from_micros(kill * 7919 % 120_000)),
            _ => load.wait_for(1 + kill * 7919 % 200)?,
        }
        drop(gateway);
        gateway = Gateway::start(dir.path())?;
    }
    load.wait_for(500)?;
    let verified = load.finish()?;
    println!("{verified} blocks verified while {KILLS} gateways were killed");
    disk.detach()
}
