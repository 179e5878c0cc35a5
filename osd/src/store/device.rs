//! The bytes of a disk: requests go in, completions come out, in any order.
//!
//! Every address and length counts blocks, every buffer is made of aligned blocks, and a request owns its buffers until
//! it completes: nothing unaligned and nothing borrowed ever reaches the kernel.

use super::StoreError;
use super::buffer::{Block, Blocks, BlocksMut};
use super::wake::Waker;
use gabion_proto::limits::BLOCK_BYTES;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use zerocopy::IntoBytes;

/// A part of a read: `count` blocks of the device from `block` on go to the buffer's block `at`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPart {
    pub block: u64,
    pub at: usize,
    pub count: usize,
}

/// What a device is asked for.
pub enum Request {
    Read {
        buffer: BlocksMut,
        parts: Vec<ReadPart>,
    },
    /// The runs of `data`, one behind the other, from `block` on. May stay volatile, or tear at sectors in a crash,
    /// until a later flush has completed; with `durable`, only until this request has.
    Write {
        block: u64,
        data: Vec<Blocks>,
        durable: bool,
    },
    /// Makes everything durable that completed before this was submitted.
    Flush,
}

/// The outcome of a request.
pub struct Completion {
    pub tag: u64,
    /// The buffer of a read.
    pub buffer: Option<BlocksMut>,
    /// After a failed write or flush nothing is known about what is on the disk.
    pub result: io::Result<()>,
}

/// What has gone through a device since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub flushes: u64,
    /// Writes that were to be durable by themselves.
    pub durable_writes: u64,
}

impl Traffic {
    pub fn count(&mut self, request: &Request) {
        let block = u64::from(BLOCK_BYTES);
        match request {
            Request::Read { parts, .. } => {
                self.bytes_read += parts.iter().map(|p| p.count as u64).sum::<u64>() * block;
            }
            Request::Write { data, durable, .. } => {
                self.bytes_written += data.iter().map(|d| d.count() as u64).sum::<u64>() * block;
                self.durable_writes += u64::from(*durable);
            }
            Request::Flush => self.flushes += 1,
        }
    }
}

/// A fixed number of blocks.
pub trait Device: Send {
    /// Size in blocks.
    fn blocks(&self) -> u64;
    fn submit(&mut self, tag: u64, request: Request);
    /// Moves what has completed to `out`; does not wait.
    fn complete(&mut self, out: &mut Vec<Completion>);
    /// Waits until there is a completion or the waker was used.
    fn wait(&mut self);
    fn waker(&self) -> Waker;
    /// As [`super::ConcurrentStore::completions`].
    fn completions(&self) -> Option<io::Result<OwnedFd>> {
        None
    }
    /// As [`super::ConcurrentStore::submit`].
    fn hand_over(&mut self) -> bool {
        true
    }
    /// For a read of so many blocks, with anything in it.
    fn buffer(&mut self, count: usize) -> BlocksMut {
        BlocksMut::zeroed(count)
    }
    /// Reads at once, beside everything else.
    fn read_now(&mut self, block: u64, buffer: &mut [Block]) -> io::Result<()>;
    fn traffic(&self) -> Traffic;
}

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    ReadWrite,
    /// The file is made if there is none.
    Create,
}

/// Opens a disk past the page cache.
pub fn open_direct(path: &Path, access: Access, extra_flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(access != Access::Read).create(access == Access::Create).truncate(false);
    match options.clone().custom_flags(libc::O_DIRECT | extra_flags).open(path) {
        // File systems without direct I/O: the promise is kept, the page cache only costs memory.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => options.custom_flags(extra_flags).open(path),
        other => other,
    }
}

/// A file or block device through plain reads and writes: one after the other. The fallback where io_uring is
/// not permitted, and what the offline tools use.
pub struct FileDevice {
    file: File,
    /// The same, every write durable by itself; `None` when it is open for reading only.
    durable: Option<File>,
    blocks: u64,
    done: VecDeque<Completion>,
    waker: Waker,
    traffic: Traffic,
}

impl FileDevice {
    /// Opens a file or block device. What is open for reading only answers every write and flush with an error.
    pub fn open(path: &Path, access: Access) -> Result<FileDevice, StoreError> {
        let fatal = |e: io::Error| StoreError::Fatal(format!("{}: {e}", path.display()));
        let file = open_direct(path, access, 0).map_err(fatal)?;
        let durable = match access {
            Access::Read => None,
            _ => Some(open_direct(path, Access::ReadWrite, libc::O_DSYNC).map_err(fatal)?),
        };
        let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(fatal)?;
        Ok(FileDevice {
            file,
            durable,
            blocks: size / u64::from(BLOCK_BYTES),
            done: VecDeque::new(),
            waker: Waker::new().map_err(fatal)?,
            traffic: Traffic::default(),
        })
    }

    /// Writes zeros over the first `size` bytes, so that space is allocated and no later write needs
    /// the file system to allocate any.
    pub fn preallocate(&mut self, size: u64) -> io::Result<()> {
        const PIECE_BYTES: u64 = 1 << 20;
        let zeros = BlocksMut::zeroed((PIECE_BYTES / u64::from(BLOCK_BYTES)) as usize);
        let mut offset = 0;
        while offset < size {
            let len = PIECE_BYTES.min(size - offset);
            self.file.write_all_at(&zeros.bytes()[..len as usize], offset)?;
            offset += len;
        }
        self.blocks = self.blocks.max(size / u64::from(BLOCK_BYTES));
        self.file.sync_all()
    }

    fn execute(&mut self, request: Request) -> (Option<BlocksMut>, io::Result<()>) {
        let offset = |block: u64| block * u64::from(BLOCK_BYTES);
        match request {
            Request::Read { mut buffer, parts } => {
                let result = parts.iter().try_for_each(|p| {
                    let into = buffer.blocks_mut()[p.at..p.at + p.count].as_mut_bytes();
                    self.file.read_exact_at(into, offset(p.block))
                });
                (Some(buffer), result)
            }
            Request::Write { .. } | Request::Flush if self.durable.is_none() => {
                (None, Err(io::ErrorKind::ReadOnlyFilesystem.into()))
            }
            Request::Write { mut block, data, durable } => {
                let file = self.durable.as_ref().filter(|_| durable).unwrap_or(&self.file);
                let result = data.iter().try_for_each(|d| {
                    let at = offset(block);
                    block += d.count() as u64;
                    file.write_all_at(d.bytes(), at)
                });
                (None, result)
            }
            Request::Flush => (None, self.file.sync_data()),
        }
    }
}

impl Device for FileDevice {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn submit(&mut self, tag: u64, request: Request) {
        self.traffic.count(&request);
        let (buffer, result) = self.execute(request);
        self.done.push_back(Completion { tag, buffer, result });
    }

    fn complete(&mut self, out: &mut Vec<Completion>) {
        out.extend(self.done.drain(..));
    }

    fn wait(&mut self) {
        if self.done.is_empty() {
            wait_readable(&self.waker);
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn read_now(&mut self, block: u64, buffer: &mut [Block]) -> io::Result<()> {
        self.traffic.bytes_read += size_of_val(buffer) as u64;
        self.file.read_exact_at(buffer.as_mut_bytes(), block * u64::from(BLOCK_BYTES))
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

/// Waits until somebody used the waker.
pub fn wait_readable(waker: &Waker) {
    let fd = waker.fd();
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    // Interrupted: the caller looks again anyway.
    if rustix::event::poll(&mut fds, None).is_ok() {
        waker.drain();
    }
}

/// Requests that [`run_all`] keeps in flight.
const RUN_MAX: usize = 64;

/// One request to the end; the device must have nothing else in flight.
pub fn run(device: &mut impl Device, request: Request) -> io::Result<()> {
    run_all(device, [request].into())
}

/// Requests that do not depend on each other to the end; the device must have nothing else in flight.
pub fn run_all(device: &mut impl Device, mut requests: VecDeque<Request>) -> io::Result<()> {
    let (mut in_flight, mut result, mut out) = (0, Ok(()), Vec::new());
    loop {
        while in_flight < RUN_MAX
            && let Some(request) = requests.pop_front()
        {
            in_flight += 1;
            device.submit(0, request);
        }
        if in_flight == 0 {
            return result;
        }
        device.complete(&mut out);
        if out.is_empty() {
            let waker = device.waker();
            waker.arm();
            device.wait();
            waker.disarm();
        }
        for done in out.drain(..) {
            in_flight -= 1;
            if done.result.is_err() {
                requests.clear();
                result = done.result;
            }
        }
    }
}
