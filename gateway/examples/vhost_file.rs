//! A file as a vhost-user-blk device: what the front end costs without a cluster behind it, and something to
//! kill and restart under a running guest. The page cache stands for the disk; nothing is synced before a flush.
//!
//!     cargo run --release -p gabion-gateway --example vhost_file -- SOCKET FILE

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use gabion_gateway::vhost::{Disk, serve};

struct FileDisk {
    file: File,
    bytes: u64,
}

impl Disk for FileDisk {
    type Error = io::Error;

    fn size_bytes(&self) -> u64 {
        self.bytes
    }

    fn serial(&self) -> String {
        "file".to_owned()
    }

    async fn read(&self, offset: u64, len: u32) -> io::Result<Bytes> {
        let mut data = vec![0; len as usize];
        self.file.read_exact_at(&mut data, offset)?;
        Ok(data.into())
    }

    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        self.file.write_all_at(&data, offset)
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        let zeroes = vec![0; 1 << 20];
        let end = offset + len;
        for at in (offset..end).step_by(zeroes.len()) {
            self.file.write_all_at(&zeroes[..zeroes.len().min((end - at) as usize)], at)?;
        }
        Ok(())
    }

    async fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let usage = "usage: vhost_file SOCKET FILE";
    let (socket, path) = (args.next().context(usage)?, args.next().context(usage)?);
    let file =
        File::options().read(true).write(true).open(&path).with_context(|| format!("{}", path.display()))?;
    let bytes = file.metadata()?.len() / 512 * 512;
    let export =
        serve(Arc::new(FileDisk { file, bytes }), socket, false, 4, tokio::runtime::Handle::current())?;
    writeln!(io::stdout(), "{}", export.socket().display())?;
    tokio::signal::ctrl_c().await?;
    export.stop().await;
    Ok(())
}
