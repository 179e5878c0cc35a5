//! A real disk that is slow for one process only: the kernel lets it have so many requests a second (cgroup v1, `blkio.throttle`).
//!
//! What the process does besides goes on as before. Only I/O that the process itself hands to the disk is counted, as O_DIRECT is.

use anyhow::{Context, Result};
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

const BLKIO: &str = "/sys/fs/cgroup/blkio";

/// One group with one process; the process is as fast as before when this is dropped.
pub struct SlowDisk {
    group: PathBuf,
    pid: i32,
}

/// The whole disk that `path` lies on, as `8:0`: limits are of disks, not of partitions.
fn disk_of(path: &Path) -> Result<String> {
    let device = fs::metadata(path)?.st_dev();
    let entry = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device)));
    let disk = match entry.join("partition").exists() {
        true => fs::canonicalize(&entry)?.parent().context("a partition of no disk")?.to_owned(),
        false => entry,
    };
    let number =
        fs::read_to_string(disk.join("dev")).with_context(|| format!("{} is on no disk", path.display()))?;
    Ok(number.trim().to_owned())
}

impl SlowDisk {
    /// From now on the process gets `per_s` reads and as many writes a second of the disk that `path` lies on. None, and why on the
    /// console: that cannot be done here.
    pub fn of(pid: i32, path: &Path, per_s: u32) -> Result<Option<SlowDisk>> {
        let group = Path::new(BLKIO).join(format!("gabion-test-{pid}"));
        let able = disk_of(path).and_then(|disk| {
            fs::create_dir(&group).with_context(|| group.display().to_string())?;
            Ok(disk)
        });
        let disk = match able {
            Ok(disk) => disk,
            Err(why) => {
                println!(
                    "SKIPPED: no disk can be made slow here (root, cgroup v1 blkio, a real disk): {why:#}"
                );
                return Ok(None);
            }
        };
        let slow = SlowDisk { group, pid };
        for limit in ["blkio.throttle.read_iops_device", "blkio.throttle.write_iops_device"] {
            let file = slow.group.join(limit);
            fs::write(&file, format!("{disk} {per_s}")).with_context(|| file.display().to_string())?;
        }
        fs::write(slow.group.join("cgroup.procs"), pid.to_string()).context("the process is not limited")?;
        Ok(Some(slow))
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        if let Err(e) = fs::write(Path::new(BLKIO).join("cgroup.procs"), self.pid.to_string()) {
            println!("process {} is not moved back: {e}", self.pid);
        }
        if let Err(e) = fs::remove_dir(&self.group) {
            println!("{} stays: {e}", self.group.display());
        }
    }
}
