//! The bytes of a disk: a preallocated file or a block device, past the page cache.

use super::StoreError;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Buffers and offsets of direct I/O are multiples of this.
pub const ALIGN_BYTES: usize = 4096;

/// Random access to a fixed number of bytes. Offsets and lengths are whole blocks.
pub trait Device: Send {
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// May stay volatile, or tear at sectors in a crash, until [`Device::flush`] returns.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes every earlier write durable. After an error nothing is known about them.
    fn flush(&mut self) -> io::Result<()>;
    fn size(&self) -> u64;
}

/// A reusable buffer whose start is aligned for direct I/O.
#[derive(Default)]
struct AlignedBuffer(Vec<u8>);

impl AlignedBuffer {
    fn get(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len + ALIGN_BYTES {
            self.0 = vec![0; len + ALIGN_BYTES];
        }
        let start = self.0.as_ptr().align_offset(ALIGN_BYTES);
        &mut self.0[start..start + len]
    }
}

/// A file or block device, opened with O_DIRECT where the file system has it.
pub struct FileDevice {
    file: File,
    size: u64,
    buffer: AlignedBuffer,
}

impl FileDevice {
    /// Opens an existing file or block device; `create` makes the file if there is none.
    pub fn open(path: &Path, create: bool) -> Result<FileDevice, StoreError> {
        let fatal = |e: io::Error| StoreError::Fatal(format!("{}: {e}", path.display()));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(create);
        let file = match options.clone().custom_flags(libc::O_DIRECT).open(path) {
            // tmpfs of older kernels: fdatasync keeps the promise, the page cache only costs memory.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => options.open(path),
            other => other,
        }
        .map_err(fatal)?;
        let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(fatal)?;
        Ok(FileDevice { file, size, buffer: AlignedBuffer::default() })
    }

    /// Writes zeros over the first `size` bytes, so that space is allocated and no later write needs
    /// the file system to allocate any.
    pub fn preallocate(&mut self, size: u64) -> io::Result<()> {
        const PIECE_BYTES: u64 = 1 << 20;
        let zeros = vec![0u8; PIECE_BYTES as usize];
        let mut offset = 0;
        while offset < size {
            let len = PIECE_BYTES.min(size - offset);
            self.write_at(offset, &zeros[..len as usize])?;
            offset += len;
        }
        self.size = self.size.max(size);
        self.file.sync_all()
    }
}

impl Device for FileDevice {
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bounce = self.buffer.get(buf.len());
        self.file.read_exact_at(bounce, offset)?;
        buf.copy_from_slice(bounce);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let bounce = self.buffer.get(data.len());
        bounce.copy_from_slice(data);
        self.file.write_all_at(bounce, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn size(&self) -> u64 {
        self.size
    }
}
