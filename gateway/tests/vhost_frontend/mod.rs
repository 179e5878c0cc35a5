//! A vhost-user front end with hand-made virtqueues, and a volume in memory: what the vhost tests share.
#![allow(dead_code)] // each test file uses its part

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use gabion_gateway::vhost::Disk;
use parking_lot::Mutex;
use tokio::sync::watch;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const DISK_BYTES: u64 = 8 << 20;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// Put into the status byte before a request, so that an unanswered one shows.
pub const UNANSWERED: u8 = 0xee;
pub const QUEUE_SIZE: u16 = 16;
pub const EVENT_IDX: u64 = 1 << 29;

const GUEST_BASE: u64 = 0x10_0000;
const MEMORY_BYTES: usize = 32 << 20;
const QUEUE_STRIDE: u64 = 0x1_0000;
const SCRATCH: u64 = GUEST_BASE + 0x80_0000;
const DEADLINE: Duration = Duration::from_secs(10);

/// A volume in memory; while it is held, writes wait.
pub struct MemoryDisk {
    pub data: Mutex<Vec<u8>>,
    pub flushes: AtomicU64,
    pub writes: AtomicU64,
    pub fail: AtomicBool,
    held: watch::Sender<bool>,
    pub waiting: AtomicU64,
}

impl MemoryDisk {
    pub fn new() -> Arc<Self> {
        Arc::new(MemoryDisk {
            data: Mutex::new(vec![0x5a; DISK_BYTES as usize]),
            flushes: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            fail: AtomicBool::new(false),
            held: watch::Sender::new(false),
            waiting: AtomicU64::new(0),
        })
    }

    pub fn hold_writes(&self) {
        self.held.send_replace(true);
    }

    pub fn release_writes(&self) {
        self.held.send_replace(false);
    }

    fn check(&self) -> io::Result<()> {
        if self.fail.load(Ordering::SeqCst) { Err(io::Error::other("asked to fail")) } else { Ok(()) }
    }

    fn fill(&self, offset: u64, len: u64, byte: u8) {
        self.data.lock()[offset as usize..(offset + len) as usize].fill(byte);
    }
}

impl Disk for MemoryDisk {
    type Error = io::Error;

    fn size_bytes(&self) -> u64 {
        DISK_BYTES
    }

    fn serial(&self) -> String {
        "vol-0123456789abcdef-too-long".to_owned()
    }

    async fn read(&self, offset: u64, len: u32) -> io::Result<Bytes> {
        self.check()?;
        Ok(Bytes::copy_from_slice(&self.data.lock()[offset as usize..offset as usize + len as usize]))
    }

    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        if *self.held.borrow() {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            self.held.subscribe().wait_for(|held| !held).await.map_err(io::Error::other)?;
        }
        self.check()?;
        self.data.lock()[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        self.writes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check()?;
        assert!(may_unmap, "the tests set the flag");
        self.fill(offset, len, 0);
        Ok(())
    }

    async fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check()?;
        self.fill(offset, len, 0);
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        self.check()?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Waits until `condition` holds; panics with `what` at the deadline.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "gave up waiting: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub struct Queue {
    pub avail_idx: u16,
    pub used_seen: u16,
    pub kick: EventFd,
    pub call: EventFd,
}

/// A guest: its memory and its queues outlive any connection.
pub struct Guest {
    pub mem: GuestMemoryMmap,
    pub queues: Vec<Queue>,
    pub inflight: Option<(VhostUserInflight, File)>,
    pub features: u64,
}

impl Guest {
    pub fn new(queues: usize) -> Guest {
        // SAFETY: a NUL-terminated literal; the descriptor is owned by the file alone.
        let file = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        file.set_len(MEMORY_BYTES as u64).unwrap();
        let mem = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(GUEST_BASE),
            MEMORY_BYTES,
            Some(FileOffset::new(file, 0)),
        )])
        .unwrap();
        let queues = (0..queues)
            .map(|_| Queue {
                avail_idx: 0,
                used_seen: 0,
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                call: EventFd::new(EFD_NONBLOCK).unwrap(),
            })
            .collect();
        Guest { mem, queues, inflight: None, features: !EVENT_IDX }
    }

    fn host(&self, at: u64) -> u64 {
        self.mem.get_host_address(GuestAddress(at)).unwrap() as u64
    }

    pub fn table(&self, queue: usize) -> u64 {
        GUEST_BASE + QUEUE_STRIDE * queue as u64
    }

    pub fn avail(&self, queue: usize) -> u64 {
        self.table(queue) + 0x4000
    }

    pub fn used(&self, queue: usize) -> u64 {
        self.table(queue) + 0x8000
    }

    /// Scratch memory of one head of one queue: 256 KiB.
    pub fn scratch(&self, queue: usize, head: u16) -> u64 {
        SCRATCH + ((queue as u64 * 8) + u64::from(head)) * 0x4_0000
    }

    pub fn put_descriptor(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(table + u64::from(index) * 16);
        let mut raw = addr.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.mem.write_slice(&raw, at).unwrap();
    }

    /// Connects as QEMU does: negotiation, memory, the in-flight region, rings, enabling.
    pub fn connect(&mut self, socket: &Path) -> Frontend {
        let mut front = Frontend::connect(socket, self.queues.len() as u64).unwrap();
        front.set_owner().unwrap();
        let features = front.get_features().unwrap() & self.features;
        front.set_features(features).unwrap();
        let offered = front.get_protocol_features().unwrap();
        assert!(
            offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::CONFIG)
        );
        front.set_protocol_features(offered).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(front.get_queue_num().unwrap() >= self.queues.len() as u64);
        let region = self.mem.iter().next().unwrap();
        front.set_mem_table(&[VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()]).unwrap();
        if self.inflight.is_none() {
            let asked = VhostUserInflight::new(0, 0, self.queues.len() as u16, QUEUE_SIZE);
            self.inflight = Some(front.get_inflight_fd(&asked).unwrap());
        }
        let (message, file) = self.inflight.as_ref().unwrap();
        front.set_inflight_fd(message, file.as_raw_fd()).unwrap();
        for (index, queue) in self.queues.iter().enumerate() {
            front.set_vring_num(index, QUEUE_SIZE).unwrap();
            // What QEMU knows after a back end vanished: the used index.
            front.set_vring_base(index, self.used_idx(index)).unwrap();
            front
                .set_vring_addr(
                    index,
                    &VringConfigData {
                        queue_max_size: QUEUE_SIZE,
                        queue_size: QUEUE_SIZE,
                        flags: 0,
                        desc_table_addr: self.host(self.table(index)),
                        used_ring_addr: self.host(self.used(index)),
                        avail_ring_addr: self.host(self.avail(index)),
                        log_addr: None,
                    },
                )
                .unwrap();
            front.set_vring_call(index, &queue.call).unwrap();
            front.set_vring_kick(index, &queue.kick).unwrap();
            front.set_vring_enable(index, true).unwrap();
        }
        front
    }

    pub fn used_idx(&self, queue: usize) -> u16 {
        self.mem.load(GuestAddress(self.used(queue) + 2), Ordering::SeqCst).unwrap()
    }

    pub fn offer(&mut self, queue: usize, head: u16) {
        let at = self.queues[queue].avail_idx;
        let slot = self.avail(queue) + 4 + u64::from(at % QUEUE_SIZE) * 2;
        self.mem.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.queues[queue].avail_idx = at.wrapping_add(1);
        self.mem.store(at.wrapping_add(1), GuestAddress(self.avail(queue) + 2), Ordering::SeqCst).unwrap();
        self.queues[queue].kick.write(1).unwrap();
    }

    /// Waits for the next completion by its interrupt; head and length as the used ring shows them.
    pub fn wait(&mut self, queue: usize) -> (u32, u32) {
        let end = Instant::now() + DEADLINE;
        loop {
            let seen = self.queues[queue].used_seen;
            if self.used_idx(queue) != seen {
                let at = self.used(queue) + 4 + u64::from(seen % QUEUE_SIZE) * 8;
                self.queues[queue].used_seen = seen.wrapping_add(1);
                let pair: [u32; 2] = self.mem.read_obj(GuestAddress(at)).unwrap();
                return (pair[0], pair[1]);
            }
            assert!(Instant::now() < end, "no completion on queue {queue}");
            let mut poll =
                libc::pollfd { fd: self.queues[queue].call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd that lives on this frame.
            unsafe { libc::poll(&mut poll, 1, 1000) };
            let _ = self.queues[queue].call.read();
        }
    }

    /// Lays out a request at `head` (three descriptors from there) without offering it.
    pub fn lay_out(&mut self, queue: usize, head: u16, kind: u32, sector: u64, out: &[u8], in_bytes: u32) {
        let at = self.scratch(queue, head);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.mem.write_slice(&header, GuestAddress(at)).unwrap();
        self.mem.write_obj(UNANSWERED, GuestAddress(at + 0x100)).unwrap();
        let table = self.table(queue);
        let data = at + 0x200;
        let mut index = head;
        let mut put = |addr, len, flags: u16| {
            let more = addr != at + 0x100;
            self.put_descriptor(table, index, addr, len, flags | if more { NEXT } else { 0 }, index + 1);
            index += 1;
        };
        put(at, 16, 0);
        if !out.is_empty() {
            put(data, out.len() as u32, 0);
        }
        if in_bytes > 0 {
            put(data, in_bytes, WRITE);
        }
        put(at + 0x100, 1, WRITE);
        self.mem.write_slice(out, GuestAddress(data)).unwrap();
    }

    pub fn status(&self, queue: usize, head: u16) -> u8 {
        self.mem.read_obj(GuestAddress(self.scratch(queue, head) + 0x100)).unwrap()
    }

    pub fn data(&self, queue: usize, head: u16, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, GuestAddress(self.scratch(queue, head) + 0x200)).unwrap();
        data
    }

    /// One request from start to end on head 0.
    pub fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        out: &[u8],
        in_bytes: u32,
    ) -> (u8, Vec<u8>) {
        self.lay_out(queue, 0, kind, sector, out, in_bytes);
        self.offer(queue, 0);
        let (head, len) = self.wait(queue);
        assert_eq!(head, 0);
        let status = self.status(queue, 0);
        if status == OK {
            assert_eq!(len, in_bytes + 1, "used length");
        }
        (status, self.data(queue, 0, in_bytes as usize))
    }
}

pub fn config_space(front: &mut Frontend) -> Vec<u8> {
    front.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap().1
}

pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut raw = sector.to_le_bytes().to_vec();
    raw.extend(sectors.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
