//! fio with verified writes over NBD.

use anyhow::{Context, Result, bail};
use std::process::{Child, Command, Stdio};

/// A fio job that runs.
pub struct Fio {
    child: Child,
}

impl Fio {
    /// Writes the whole volume at random, 4 KiB each, then reads everything back and compares.
    /// Reconnects are the gateway's and the client's affair: fio itself ends on the first error.
    pub fn verified_write(uri: &str, size: &str, rate_iops: u32) -> Result<Fio> {
        let child = Command::new("fio")
            .args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16"])
            .args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"])
            .args([format!("--uri={uri}"), format!("--size={size}"), format!("--rate_iops={rate_iops}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start fio: install the package fio")?;
        Ok(Fio { child })
    }

    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for the end; an error when a write failed or a read did not match.
    pub fn finish(self) -> Result<()> {
        let out = self.child.wait_with_output()?;
        if !out.status.success() {
            bail!("fio: {}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        }
        Ok(())
    }
}
