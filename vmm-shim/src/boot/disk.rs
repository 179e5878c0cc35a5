//! A volume as bytes at offsets, for readers that block, with large aligned reads kept for a while:
//! filesystem readers ask block by block.

use ext4_view::Ext4Read;
use gabion_common::client::reader::VolumeReader;
use std::collections::VecDeque;
use std::error::Error;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

const WINDOW_BYTES: u64 = 1 << 20;
const WINDOWS_KEPT: usize = 16;

pub trait DiskRead: Send + Sync {
    fn size_bytes(&self) -> u64;
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

impl DiskRead for std::fs::File {
    fn size_bytes(&self) -> u64 {
        self.metadata().map_or(0, |m| m.len())
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }
}

/// A volume of the cluster. Its reads must not run on a thread of the async runtime.
pub struct VolumeDisk {
    reader: VolumeReader,
    runtime: tokio::runtime::Handle,
    // Held across a read: one thread reads at a time.
    windows: Mutex<VecDeque<(u64, Vec<u8>)>>,
}

impl VolumeDisk {
    pub fn new(reader: VolumeReader) -> VolumeDisk {
        VolumeDisk { reader, runtime: tokio::runtime::Handle::current(), windows: Mutex::default() }
    }
}

impl DiskRead for VolumeDisk {
    fn size_bytes(&self) -> u64 {
        self.reader.size_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size_bytes()) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "beyond the end of the volume"));
        }
        let mut windows = self.windows.lock().unwrap_or_else(|e| e.into_inner());
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let start = at / WINDOW_BYTES * WINDOW_BYTES;
            if !windows.iter().any(|w| w.0 == start) {
                let mut bytes = vec![0; WINDOW_BYTES.min(self.size_bytes() - start) as usize];
                self.runtime.block_on(self.reader.read_at(start, &mut bytes)).map_err(io::Error::other)?;
                windows.push_front((start, bytes));
                windows.truncate(WINDOWS_KEPT);
            }
            let Some((_, bytes)) = windows.iter().find(|w| w.0 == start) else { continue };
            let from = (at - start) as usize;
            let len = rest.len().min(bytes.len() - from);
            let (now, later) = rest.split_at_mut(len);
            now.copy_from_slice(&bytes[from..from + len]);
            at += len as u64;
            rest = later;
        }
        Ok(())
    }
}

/// A stretch of a disk as a filesystem reader wants it.
pub struct Part {
    disk: Arc<dyn DiskRead>,
    offset: u64,
    size_bytes: u64,
}

impl Part {
    pub fn new(disk: Arc<dyn DiskRead>, offset: u64, size_bytes: u64) -> Part {
        Part { disk, offset, size_bytes }
    }
}

impl Ext4Read for Part {
    fn read(&mut self, start: u64, dst: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        if start.checked_add(dst.len() as u64).is_none_or(|end| end > self.size_bytes) {
            return Err("the filesystem reaches beyond its partition".into());
        }
        Ok(self.disk.read_at(self.offset + start, dst)?)
    }
}
