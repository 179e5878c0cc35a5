//! A disk through io_uring: many requests in flight, a registered file, registered buffers for reads, one system call for a batch.
//!
//! A request's buffers lie in `pending` until all its completions have come, whatever happens to the store.

use super::buffer::{Block, Blocks, BlocksMut};
use super::device::{Access, Completion, Device, Request, Traffic, open_direct};
use super::pool::Pool;
use super::wake::Waker;
use gabion_proto::limits::BLOCK_BYTES;
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use zerocopy::IntoBytes;

const ENTRIES: u32 = 256;
/// Completions taken at a time, and requests that are not kept waiting for more: the disk goes on while they are looked at.
const BATCH: usize = 8;
/// The registered file's place.
const FILE: types::Fixed = types::Fixed(0);
/// Completion of the poll on the waker.
const WAKE: u64 = u64::MAX;
/// Parts of one request are numbered in the low bits of what identifies a completion.
const PART_BITS: u32 = 16;

/// What a request needs to stay alive until it completes.
enum Held {
    Read(BlocksMut),
    Write { _data: Vec<Blocks>, _vectors: Vec<libc::iovec> },
    Flush,
}

struct Pending {
    tag: u64,
    held: Held,
    /// Bytes that each part must move.
    lengths: Vec<u32>,
    left: usize,
    result: io::Result<()>,
}

/// See the module docs.
pub struct UringDevice {
    ring: IoUring,
    file: File,
    blocks: u64,
    pending: HashMap<u64, Pending>,
    next: u64,
    /// Entries that did not fit into the submission queue.
    overflow: VecDeque<squeue::Entry>,
    waker: Waker,
    /// The waker is polled by the ring.
    polled: bool,
    /// Buffers for reads, where the kernel lets them be registered.
    pool: Option<Arc<Pool>>,
    /// What is queued was left for `wait` once, which submits and waits in one system call.
    deferred: bool,
    traffic: Traffic,
}

// SAFETY: the raw pointers are the `iovec`s in `pending`, which point into heap memory that `pending` owns beside
// them; one thread at a time has the device.
unsafe impl Send for UringDevice {}

impl UringDevice {
    /// Opens an existing file or block device. An error of kind `PermissionDenied` or `Unsupported` means that
    /// io_uring is not to be had here.
    pub fn open(path: &Path) -> io::Result<UringDevice> {
        let file = open_direct(path, Access::ReadWrite, 0)?;
        let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
        let ring = IoUring::builder().build(ENTRIES)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let pool = registered(&ring).inspect_err(
            |e| tracing::info!(error = %e, "buffers cannot be registered; reads cost a little more"),
        );
        Ok(UringDevice {
            ring,
            pool: pool.ok(),
            file,
            blocks: size / u64::from(BLOCK_BYTES),
            pending: HashMap::new(),
            next: 0,
            overflow: VecDeque::new(),
            waker: Waker::new()?,
            polled: false,
            deferred: false,
            traffic: Traffic::default(),
        })
    }

    fn push(&mut self, entry: squeue::Entry) {
        self.overflow.push_back(entry);
        self.push_overflow();
    }

    /// Moves entries to the submission queue as far as there is room.
    fn push_overflow(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.overflow.front() {
            // SAFETY: the buffers that the entry names are owned by `pending` until its completion has been seen;
            // the waker's descriptor lives as long as the device.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.overflow.pop_front();
        }
    }

    /// Tells the kernel what is queued; waits for `want` completions.
    fn enter(&mut self, want: usize) {
        loop {
            self.push_overflow();
            match self.ring.submit_and_wait(if self.overflow.is_empty() { want } else { 0 }) {
                Ok(_) if self.overflow.is_empty() => return,
                Ok(_) => {}
                // Completions have to be taken first, or the caller looks again.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    return;
                }
                Err(e) => {
                    // The ring is unusable: what is in flight cannot be awaited, and its memory not be freed.
                    tracing::error!(error = %e, "io_uring failed");
                    std::process::abort();
                }
            }
        }
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let Self { ring, pending, polled, waker, .. } = self;
        for entry in ring.completion().take(BATCH) {
            if entry.user_data() == WAKE {
                *polled = false;
                waker.drain();
                continue;
            }
            let (id, part) = (entry.user_data() >> PART_BITS, entry.user_data() & ((1 << PART_BITS) - 1));
            let Some(p) = pending.get_mut(&id) else { continue };
            if let Err(e) = outcome(entry.result(), p.lengths[part as usize]) {
                p.result = Err(e);
            }
            p.left -= 1;
            if p.left == 0
                && let Some(p) = pending.remove(&id)
            {
                let buffer = if let Held::Read(buffer) = p.held { Some(buffer) } else { None };
                out.push(Completion { tag: p.tag, buffer, result: p.result });
            }
        }
    }
}

/// Tells the task that asks, within a runtime, when a ring has completions.
pub fn watched(ring: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what is answered, so it is open for as long as it is registered.
    unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(io::Error::from)
}

/// Buffers that the kernel keeps mapped; a limit on locked memory may refuse them.
fn registered(ring: &IoUring) -> io::Result<Arc<Pool>> {
    let pool = Pool::new();
    let regions = pool.regions();
    let vectors: Vec<libc::iovec> = regions
        .into_iter()
        .map(|(start, iov_len)| libc::iovec { iov_base: start.cast_mut().cast(), iov_len })
        .collect();
    // SAFETY: each region is a heap allocation of the pool, which never frees or moves one while somebody may name its number:
    // only who has borrowed it does (`BlocksMut::place`), and that keeps the pool alive.
    unsafe { ring.submitter().register_buffers(&vectors)? };
    Ok(Arc::new(pool))
}

/// A request moves everything or has failed: regular files and block devices give less only at their end.
fn outcome(result: i32, want: u32) -> io::Result<()> {
    match u32::try_from(result) {
        Ok(moved) if moved == want => Ok(()),
        Ok(moved) => Err(io::Error::other(format!("{moved} of {want} bytes moved"))),
        Err(_) => Err(io::Error::from_raw_os_error(-result)),
    }
}

impl Device for UringDevice {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn submit(&mut self, tag: u64, request: Request) {
        self.traffic.count(&request);
        let id = self.next;
        self.next = (self.next + 1) & (u64::MAX >> (PART_BITS + 1));
        let offset = |block: u64| block * u64::from(BLOCK_BYTES);
        let user_data = |part: usize| id << PART_BITS | part as u64;
        let mut entries = Vec::with_capacity(1);
        let mut lengths = Vec::with_capacity(1);
        let held = match request {
            Request::Read { mut buffer, parts } => {
                assert!(parts.len() < 1 << PART_BITS, "a read of too many parts");
                let registered = self.pool.as_ref().and_then(|pool| buffer.place()?.number_in(pool));
                for (i, p) in parts.iter().enumerate() {
                    let bytes = buffer.blocks_mut()[p.at..p.at + p.count].as_mut_bytes();
                    let (start, len) = (bytes.as_mut_ptr(), bytes.len() as u32);
                    let entry = match registered {
                        Some(number) => {
                            opcode::ReadFixed::new(FILE, start, len, number).offset(offset(p.block)).build()
                        }
                        None => opcode::Read::new(FILE, start, len).offset(offset(p.block)).build(),
                    };
                    entries.push(entry.user_data(user_data(i)));
                    lengths.push(len);
                }
                Held::Read(buffer)
            }
            Request::Write { block, data, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let vectors: Vec<libc::iovec> = data
                    .iter()
                    .map(|d| libc::iovec {
                        iov_base: d.bytes().as_ptr().cast_mut().cast(),
                        iov_len: d.bytes().len(),
                    })
                    .collect();
                lengths.push(data.iter().map(|d| d.bytes().len() as u32).sum());
                let entry = match data.as_slice() {
                    [one] => opcode::Write::new(FILE, one.bytes().as_ptr(), one.bytes().len() as u32)
                        .offset(offset(block))
                        .rw_flags(flags)
                        .build(),
                    _ => opcode::Writev::new(FILE, vectors.as_ptr(), vectors.len() as u32)
                        .offset(offset(block))
                        .rw_flags(flags)
                        .build(),
                };
                entries.push(entry.user_data(user_data(0)));
                Held::Write { _data: data, _vectors: vectors }
            }
            Request::Flush => {
                let entry = opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC);
                entries.push(entry.build().user_data(user_data(0)));
                lengths.push(0);
                Held::Flush
            }
        };
        let left = entries.len();
        self.pending.insert(id, Pending { tag, held, lengths, left, result: Ok(()) });
        for entry in entries {
            self.push(entry);
        }
    }

    fn complete(&mut self, out: &mut Vec<Completion>) {
        if !self.overflow.is_empty() || !self.ring.submission().is_empty() {
            let few = self.ring.submission().len() < BATCH && self.ring.completion().is_empty();
            self.deferred = !self.deferred && few && self.overflow.is_empty();
            if !self.deferred {
                self.enter(0);
            }
        }
        self.reap(out);
    }

    fn wait(&mut self) {
        if !self.polled {
            self.polled = true;
            let fd: RawFd = self.waker.fd().as_raw_fd();
            let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build().user_data(WAKE);
            self.push(entry);
        }
        if self.ring.completion().is_empty() {
            self.deferred = false;
            self.enter(1);
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn completions(&self) -> Option<io::Result<OwnedFd>> {
        // SAFETY: the ring is open as long as `self` is borrowed.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        Some(ring.try_clone_to_owned())
    }

    fn hand_over(&mut self) -> bool {
        if !self.overflow.is_empty() || !self.ring.submission().is_empty() {
            self.deferred = false;
            self.enter(0);
        }
        self.overflow.is_empty() && self.ring.submission().is_empty()
    }

    fn buffer(&mut self, count: usize) -> BlocksMut {
        let lent = self.pool.as_ref().and_then(|pool| pool.lend(count));
        lent.unwrap_or_else(|| BlocksMut::zeroed(count))
    }

    fn read_now(&mut self, block: u64, buffer: &mut [Block]) -> io::Result<()> {
        self.traffic.bytes_read += size_of_val(buffer) as u64;
        self.file.read_exact_at(buffer.as_mut_bytes(), block * u64::from(BLOCK_BYTES))
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

impl Drop for UringDevice {
    /// The kernel must be done with the buffers before they are freed.
    fn drop(&mut self) {
        let mut out = Vec::new();
        while !self.pending.is_empty() {
            self.enter(1);
            self.reap(&mut out);
        }
    }
}
