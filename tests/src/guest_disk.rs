//! A guest's driver of one disk, without a guest: register accesses on the VMM's virtio card, virtqueues in
//! shared memory, and a verified load that goes on only when an interrupt comes, as a guest's does. A lost
//! interrupt, doorbell or request thus hangs the load, and its time limit says where.
//!
//! virtio 1.2, sections 2.7 (split virtqueues, with event indices) and 5.2 (block device).

use anyhow::{Context, Result, bail, ensure};
use gabion_vmm_shim::vmm::interrupts::{Interrupts, Message};
use gabion_vmm_shim::vmm::memory;
use gabion_vmm_shim::vmm::pci::Card;
use gabion_vmm_shim::vmm::vhost::{Event, Events, PCI_CLASS, VIRTIO_BLOCK, open};
use gabion_vmm_shim::vmm::virtio::transport::VirtioCard;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// For one answer, whatever happens to the gateway meanwhile.
pub const LIMIT: Duration = Duration::from_secs(60);
pub const QUEUES: u16 = 2;
pub const BLOCK_BYTES: usize = 4096;
/// Requests that each queue keeps under way.
const SLOTS: u16 = 16;
/// Blocks that each slot writes, one after the other, over and over.
const SLOT_BLOCKS: u64 = 8;
/// What the load needs of the disk.
pub const DISK_BYTES: u64 = QUEUES as u64 * SLOTS as u64 * SLOT_BLOCKS * BLOCK_BYTES as u64;

const MEMORY_BYTES: u64 = 32 << 20;
const BAR: u32 = 0xd000_0000;
const QUEUE_SIZE: u16 = 64;
/// Descriptors of one request: header, data, status.
const PARTS: u16 = 3;
const RINGS: u64 = 0x10_0000;
const RING_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUESTS: u64 = 0x20_0000;
const REQUEST_BYTES: u64 = 0x2000;
const STATUS: u64 = 0x100;
const DATA: u64 = 0x1000;
const SECTOR_BYTES: u64 = 512;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_CAPABILITY: u8 = 0x11;
const EVENT_IDX: u32 = 1 << 29;
const VERSION_1: u32 = 1;

const _: () = assert!(SLOTS * PARTS <= QUEUE_SIZE);

/// Stands for KVM: keeps what it would wait for and what it would signal.
#[derive(Default)]
struct Machine {
    next: AtomicU32,
    interrupts: Mutex<BTreeMap<u32, EventFd>>,
    doorbells: Mutex<BTreeMap<u64, EventFd>>,
}

type KvmResult = Result<(), kvm_ioctls::Error>;

fn copy(fd: &EventFd) -> Result<EventFd, kvm_ioctls::Error> {
    fd.try_clone().map_err(|_| kvm_ioctls::Error::last())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Interrupts for Machine {
    fn allocate(&self) -> Option<u32> {
        Some(self.next.fetch_add(1, Ordering::Relaxed))
    }
    fn free(&self, _: u32) {}
    fn route(&self, _: u32, _: Message) -> KvmResult {
        Ok(())
    }
    fn connect(&self, fd: &EventFd, gsi: u32) -> KvmResult {
        lock(&self.interrupts).insert(gsi, copy(fd)?);
        Ok(())
    }
    fn disconnect(&self, _: &EventFd, gsi: u32) -> KvmResult {
        lock(&self.interrupts).remove(&gsi);
        Ok(())
    }
    fn ring_on_write(&self, fd: &EventFd, address: u64) -> KvmResult {
        lock(&self.doorbells).insert(address, copy(fd)?);
        Ok(())
    }
    fn stop_ringing(&self, _: &EventFd, address: u64) -> KvmResult {
        lock(&self.doorbells).remove(&address);
        Ok(())
    }
}

/// The disk's card, kept for as long as its queues are used.
pub struct GuestDisk {
    card: VirtioCard,
    events: Receiver<Event>,
}

/// Opens the disk that a gateway serves at `socket` and starts its driver.
pub fn attach(socket: &Path) -> Result<(GuestDisk, Vec<Queue>)> {
    let (queue, events) = sync_channel(8);
    let memory = memory::create(MEMORY_BYTES)?;
    let reports = Events { queue, wake: Arc::new(EventFd::new(libc::EFD_NONBLOCK)?) };
    open("disk".into(), socket.to_owned(), memory.clone(), reports)?;
    let device = match events.recv_timeout(LIMIT)? {
        Event::Opened { result: Ok(device), .. } => device,
        Event::Opened { result: Err(why), .. } => bail!(why),
        Event::Closed { .. } => bail!("the disk is closed"),
    };
    let machine = Arc::new(Machine::default());
    let card =
        VirtioCard::new(VIRTIO_BLOCK, PCI_CLASS, BAR, Box::new(device), memory.clone(), machine.clone())?;
    let mut disk = GuestDisk { card, events };
    let queues = disk.start(&memory, &machine)?;
    Ok((disk, queues))
}

impl GuestDisk {
    fn read(&mut self, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        self.card.memory_read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, len: usize, value: u32) {
        self.card.memory_write(offset, &value.to_le_bytes()[..len]);
    }

    /// Memory decoded, MSI-X on, every vector open.
    fn enable(&mut self) -> Result<()> {
        self.card.config_write(4, &2u16.to_le_bytes());
        let mut head = [0; 4];
        self.card.config_read(0x34, &mut head[..1]);
        let mut at = head[0];
        while at != 0 {
            self.card.config_read(at, &mut head);
            if head[0] == MSIX_CAPABILITY {
                self.card.config_write(at + 2, &(1u16 << 15).to_le_bytes());
                for vector in 0..=u64::from(QUEUES) {
                    self.write(MSIX_TABLE + vector * 16 + 12, 4, 0);
                }
                return Ok(());
            }
            at = head[1];
        }
        bail!("the card has no MSI-X")
    }

    fn start(&mut self, memory: &GuestMemoryMmap, machine: &Machine) -> Result<Vec<Queue>> {
        self.enable()?;
        for status in [1, 3] {
            self.write(0x14, 1, status);
        }
        for (select, features) in [(0, EVENT_IDX), (1, VERSION_1)] {
            self.write(0x08, 4, select);
            self.write(0x0c, 4, features);
        }
        self.write(0x14, 1, 11);
        ensure!(self.read(0x14, 1) == 11, "the features are not accepted");
        ensure!(self.read(0x12, 2) >= u32::from(QUEUES), "the disk has too few queues");
        let mut queues = Vec::new();
        for index in 0..QUEUES {
            let at = RINGS + u64::from(index) * RING_BYTES;
            self.write(0x16, 2, u32::from(index));
            self.write(0x18, 2, u32::from(QUEUE_SIZE));
            self.write(0x1a, 2, u32::from(index) + 1);
            for (register, part) in [(0x20, 0), (0x28, AVAILABLE), (0x30, USED)] {
                self.write(register, 4, (at + part) as u32);
            }
            self.write(0x1c, 2, 1);
            let doorbell = u64::from(BAR) + 0x3000 + u64::from(index) * 4;
            let doorbell = lock(&machine.doorbells).get(&doorbell).context("no doorbell")?.try_clone()?;
            // Interrupts are numbered in the order of the vectors.
            let interrupt = lock(&machine.interrupts)
                .get(&(u32::from(index) + 1))
                .context("no interrupt")?
                .try_clone()?;
            queues.push(Queue {
                memory: memory.clone(),
                index,
                at,
                doorbell,
                interrupt,
                offered: 0,
                seen: 0,
            });
        }
        self.write(0x14, 1, 15);
        Ok(queues)
    }

    /// Takes the card out; answers when its gateway has let go.
    pub fn detach(self) -> Result<()> {
        drop(self.card);
        match self.events.recv_timeout(LIMIT)? {
            Event::Closed { .. } => Ok(()),
            Event::Opened { .. } => bail!("the disk is opened again"),
        }
    }
}

/// One virtqueue's driver.
pub struct Queue {
    memory: GuestMemoryMmap,
    pub index: u16,
    at: u64,
    doorbell: EventFd,
    interrupt: EventFd,
    offered: u16,
    seen: u16,
}

impl Queue {
    fn load(&self, at: u64) -> Result<u16> {
        Ok(self.memory.load(GuestAddress(self.at + at), Ordering::SeqCst)?)
    }

    fn request(&self, slot: u16) -> u64 {
        REQUESTS + u64::from(self.index * SLOTS + slot) * REQUEST_BYTES
    }

    /// Offers a write of `data`, or a read, of one block.
    fn offer(&mut self, slot: u16, block: u64, data: Option<&[u8]>) -> Result<()> {
        let at = self.request(slot);
        self.memory.write_obj(u64::from(data.is_some()), GuestAddress(at))?;
        self.memory.write_obj(block * BLOCK_BYTES as u64 / SECTOR_BYTES, GuestAddress(at + 8))?;
        self.memory.write_obj(0xeeu8, GuestAddress(at + STATUS))?;
        match data {
            Some(data) => self.memory.write_slice(data, GuestAddress(at + DATA))?,
            None => self.memory.write_slice(&[0xee; BLOCK_BYTES], GuestAddress(at + DATA))?,
        }
        let device_writes = u64::from(data.is_none()) * 2;
        let parts =
            [(at, 16u64, 1u64), (at + DATA, BLOCK_BYTES as u64, 1 | device_writes), (at + STATUS, 1, 2)];
        let head = slot * PARTS;
        for (index, (address, len, flags)) in (u64::from(head)..).zip(parts) {
            self.memory.write_obj(address, GuestAddress(self.at + index * 16))?;
            let rest = len | flags << 32 | (index + 1) << 48;
            self.memory.write_obj(rest, GuestAddress(self.at + index * 16 + 8))?;
        }
        let entry = self.at + AVAILABLE + 4 + u64::from(self.offered % QUEUE_SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry))?;
        let before = self.offered;
        self.offered = before.wrapping_add(1);
        self.memory.store(self.offered, GuestAddress(self.at + AVAILABLE + 2), Ordering::SeqCst)?;
        fence(Ordering::SeqCst);
        let event = self.load(USED + 4 + 8 * u64::from(QUEUE_SIZE))?;
        // Section 2.7.10: the doorbell is due when this index was crossed.
        if self.offered.wrapping_sub(event).wrapping_sub(1) < self.offered.wrapping_sub(before) {
            self.doorbell.write(1)?;
        }
        Ok(())
    }

    /// The next answered slot with its status; waits for an interrupt when there is none.
    fn answer(&mut self) -> Result<(u16, u8)> {
        let end = Instant::now() + LIMIT;
        loop {
            if self.load(USED + 2)? != self.seen {
                let element = self.at + USED + 4 + u64::from(self.seen % QUEUE_SIZE) * 8;
                let head: u32 = self.memory.read_obj(GuestAddress(element))?;
                self.seen = self.seen.wrapping_add(1);
                let slot = u16::try_from(head)? / PARTS;
                ensure!(slot < SLOTS && head == u32::from(slot * PARTS), "head {head} was not offered");
                return Ok((slot, self.memory.read_obj(GuestAddress(self.request(slot) + STATUS))?));
            }
            let used_event = self.at + AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE);
            self.memory.store(self.seen, GuestAddress(used_event), Ordering::SeqCst)?;
            fence(Ordering::SeqCst);
            if self.load(USED + 2)? == self.seen && !readable(&self.interrupt, end)? {
                bail!(
                    "queue {}: no interrupt within {} s; offered {}, used {}, seen {}, doorbell asked for at {}",
                    self.index,
                    LIMIT.as_secs(),
                    self.offered,
                    self.load(USED + 2)?,
                    self.seen,
                    self.load(USED + 4 + 8 * u64::from(QUEUE_SIZE))?
                );
            }
        }
    }
}

/// Takes a signal; false when none came until `end`.
fn readable(fd: &EventFd, end: Instant) -> Result<bool> {
    let left = end.saturating_duration_since(Instant::now()).as_millis() as i32;
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives on this frame.
    let ready = unsafe { libc::poll(&mut poll, 1, left) };
    ensure!(ready >= 0, "poll: {}", std::io::Error::last_os_error());
    Ok(ready > 0 && fd.read().is_ok())
}

/// What a load has done so far.
#[derive(Default)]
pub struct Progress {
    stop: AtomicBool,
    /// Blocks written and read back alike.
    verified: AtomicU64,
}

/// Verified writes on every queue of a disk, each queue from a thread of its own.
pub struct Load {
    progress: Arc<Progress>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// Content of a block after its `round`th write.
fn pattern(block: u64, round: u64) -> Vec<u8> {
    let mut word = (block << 32 | round).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut words = || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    };
    (0..BLOCK_BYTES / 8).flat_map(|_| words()).collect()
}

impl Load {
    pub fn start(queues: Vec<Queue>) -> Load {
        let progress = Arc::new(Progress::default());
        let of_queue = |queue| {
            let progress = progress.clone();
            std::thread::spawn(move || run(queue, &progress))
        };
        let threads = queues.into_iter().map(of_queue).collect();
        Load { progress, threads }
    }

    /// Waits until `more` blocks have been verified from now on.
    pub fn wait_for(&self, more: u64) -> Result<()> {
        let (from, end) = (self.progress.verified.load(Ordering::SeqCst), Instant::now() + LIMIT);
        while self.progress.verified.load(Ordering::SeqCst) < from + more {
            ensure!(Instant::now() < end, "{more} more blocks were not verified in time");
            // A thread that has failed says more than the missing progress.
            if self.threads.iter().any(|t| t.is_finished()) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Ends the load and reads everything back once more; how many blocks it had verified.
    pub fn finish(self) -> Result<u64> {
        self.progress.stop.store(true, Ordering::SeqCst);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow::anyhow!("a load's thread panicked"))??;
        }
        Ok(self.progress.verified.load(Ordering::SeqCst))
    }
}

fn run(mut queue: Queue, progress: &Progress) -> Result<()> {
    struct Slot {
        round: u64,
        reading: bool,
    }
    let first = u64::from(queue.index * SLOTS) * SLOT_BLOCKS;
    let block_of = |slot: u16, round: u64| first + u64::from(slot) * SLOT_BLOCKS + round % SLOT_BLOCKS;
    let mut slots: Vec<Slot> = (0..SLOTS).map(|_| Slot { round: 0, reading: false }).collect();
    for slot in 0..SLOTS {
        queue.offer(slot, block_of(slot, 0), Some(&pattern(block_of(slot, 0), 0)))?;
    }
    let mut open = SLOTS;
    let check = |queue: &Queue, slot: u16, block: u64, round: u64| -> Result<()> {
        let mut found = vec![0; BLOCK_BYTES];
        queue.memory.read_slice(&mut found, GuestAddress(queue.request(slot) + DATA))?;
        ensure!(found == pattern(block, round), "block {block} is not as written in round {round}");
        Ok(())
    };
    while open > 0 {
        let (slot, status) = queue.answer()?;
        let state = &mut slots[usize::from(slot)];
        let block = block_of(slot, state.round);
        ensure!(status == 0, "block {block} in round {}: status {status}", state.round);
        if !state.reading {
            state.reading = true;
            queue.offer(slot, block, None)?;
            continue;
        }
        check(&queue, slot, block, state.round)?;
        progress.verified.fetch_add(1, Ordering::SeqCst);
        if progress.stop.load(Ordering::SeqCst) {
            open -= 1;
            continue;
        }
        (state.round, state.reading) = (state.round + 1, false);
        let block = block_of(slot, state.round);
        queue.offer(slot, block, Some(&pattern(block, state.round)))?;
    }
    // Also what was written long ago.
    for (slot, state) in (0..).zip(&slots) {
        for round in state.round.saturating_sub(SLOT_BLOCKS - 1)..=state.round {
            queue.offer(slot, block_of(slot, round), None)?;
            ensure!(queue.answer()? == (slot, 0), "reading back slot {slot}");
            check(&queue, slot, block_of(slot, round), round)?;
        }
    }
    Ok(())
}
