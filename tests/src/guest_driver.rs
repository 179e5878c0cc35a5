//! A guest's virtio driver, without a guest: register accesses on one of the VMM's cards, virtqueues in shared
//! memory, and waiting for interrupts only, as a guest does. A lost interrupt, doorbell or answer thus hangs what
//! waits for it, and its time limit says where.
//!
//! virtio 1.2, sections 2.7 (split virtqueues, with event indices) and 4.1 (PCI).

use anyhow::{Context, Result, bail, ensure};
use gabion_vmm_shim::vmm::interrupts::{Interrupts, Message};
use gabion_vmm_shim::vmm::memory;
use gabion_vmm_shim::vmm::pci::Card;
use gabion_vmm_shim::vmm::virtio::Device;
use gabion_vmm_shim::vmm::virtio::transport::VirtioCard;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// For one answer, whatever happens meanwhile.
pub const LIMIT: Duration = Duration::from_secs(60);
pub const QUEUE_SIZE: u16 = 64;
/// What a test may put its buffers into, up to the end of the memory.
pub const BUFFERS: u64 = 0x20_0000;
const MEMORY_BYTES: u64 = 32 << 20;
const BAR: u32 = 0xd000_0000;
const RINGS: u64 = 0x10_0000;
const RING_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const DEVICE_CONFIG: u64 = 0x2000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_CAPABILITY: u8 = 0x11;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// The guest's memory, empty.
pub fn guest_memory() -> Result<GuestMemoryMmap> {
    Ok(memory::create(MEMORY_BYTES)?)
}

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

/// A card with its driver.
pub struct Driver {
    card: VirtioCard,
    memory: GuestMemoryMmap,
    machine: Arc<Machine>,
}

impl Driver {
    /// `kind` is the virtio device type, `class` its PCI class. Memory is decoded, MSI-X on, every vector open.
    pub fn new(kind: u16, class: u32, device: Box<dyn Device>, memory: GuestMemoryMmap) -> Result<Driver> {
        let machine = Arc::new(Machine::default());
        let queues = device.queue_count();
        let card = VirtioCard::new(kind, class, BAR, device, memory.clone(), machine.clone())?;
        let mut driver = Driver { card, memory, machine };
        driver.card.config_write(4, &2u16.to_le_bytes());
        let mut head = [0; 4];
        driver.card.config_read(0x34, &mut head[..1]);
        let mut at = head[0];
        while at != 0 {
            driver.card.config_read(at, &mut head);
            if head[0] == MSIX_CAPABILITY {
                driver.card.config_write(at + 2, &(1u16 << 15).to_le_bytes());
                for vector in 0..=u64::from(queues) {
                    driver.write(MSIX_TABLE + vector * 16 + 12, 4, 0);
                }
                return Ok(driver);
            }
            at = head[1];
        }
        bail!("the card has no MSI-X")
    }

    fn read(&mut self, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        self.card.memory_read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, len: usize, value: u32) {
        self.card.memory_write(offset, &value.to_le_bytes()[..len]);
    }

    /// The device's own configuration space from its start.
    pub fn config(&mut self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.card.memory_read(DEVICE_CONFIG, &mut data);
        data
    }

    /// From reset to `queues` running queues, with `features` beside those of the virtqueues.
    pub fn start(&mut self, features: u64, queues: u16) -> Result<Vec<Virtqueue>> {
        for status in [1, 3] {
            self.write(0x14, 1, status);
        }
        let features = features | EVENT_IDX | VERSION_1;
        for (select, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x08, 4, select);
            self.write(0x0c, 4, word);
        }
        self.write(0x14, 1, 11);
        ensure!(self.read(0x14, 1) == 11, "the features are not accepted");
        ensure!(self.read(0x12, 2) >= u32::from(queues), "the device has too few queues");
        let mut running = Vec::new();
        for index in 0..queues {
            let at = RINGS + u64::from(index) * RING_BYTES;
            self.memory.write_slice(&[0; RING_BYTES as usize], GuestAddress(at))?;
            self.write(0x16, 2, u32::from(index));
            self.write(0x18, 2, u32::from(QUEUE_SIZE));
            self.write(0x1a, 2, u32::from(index) + 1);
            for (register, part) in [(0x20, 0), (0x28, AVAILABLE), (0x30, USED)] {
                self.write(register, 4, (at + part) as u32);
            }
            self.write(0x1c, 2, 1);
            let doorbell = u64::from(BAR) + 0x3000 + u64::from(index) * 4;
            let doorbell =
                lock(&self.machine.doorbells).get(&doorbell).context("no doorbell")?.try_clone()?;
            // Interrupts are numbered in the order of the vectors.
            let interrupts = lock(&self.machine.interrupts);
            let interrupt = interrupts.get(&(u32::from(index) + 1)).context("no interrupt")?.try_clone()?;
            let memory = self.memory.clone();
            running.push(Virtqueue { memory, index, at, doorbell, interrupt, offered: 0, seen: 0 });
        }
        self.write(0x14, 1, 15);
        Ok(running)
    }

    /// Resets the device and waits until it touches no ring.
    pub fn reset(&mut self) -> Result<()> {
        self.write(0x14, 1, 0);
        let end = Instant::now() + LIMIT;
        while self.read(0x14, 1) != 0 {
            ensure!(Instant::now() < end, "the device does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub at: u64,
    pub len: usize,
    pub device_writes: bool,
}

/// One virtqueue's driver.
pub struct Virtqueue {
    pub memory: GuestMemoryMmap,
    pub index: u16,
    at: u64,
    doorbell: EventFd,
    interrupt: EventFd,
    offered: u16,
    seen: u16,
}

impl Virtqueue {
    fn load(&self, at: u64) -> Result<u16> {
        Ok(self.memory.load(GuestAddress(self.at + at), Ordering::SeqCst)?)
    }

    /// Offers a chain in the descriptors from `head` on.
    pub fn offer(&mut self, head: u16, buffers: &[Buffer]) -> Result<()> {
        for (n, buffer) in (0..).zip(buffers) {
            let index = head + n;
            let more = usize::from(n) + 1 < buffers.len();
            let flags = u64::from(more) | u64::from(buffer.device_writes) << 1;
            let next = if more { u64::from(index) + 1 } else { 0 };
            let descriptor = self.at + u64::from(index) * 16;
            self.memory.write_obj(buffer.at, GuestAddress(descriptor))?;
            let rest = buffer.len as u64 | flags << 32 | next << 48;
            self.memory.write_obj(rest, GuestAddress(descriptor + 8))?;
        }
        let entry = self.at + AVAILABLE + 4 + u64::from(self.offered % QUEUE_SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry))?;
        let before = self.offered;
        self.advance(1)?;
        fence(Ordering::SeqCst);
        let event = self.load(USED + 4 + 8 * u64::from(QUEUE_SIZE))?;
        // Section 2.7.10: the doorbell is due when this index was crossed.
        if self.offered.wrapping_sub(event).wrapping_sub(1) < self.offered.wrapping_sub(before) {
            self.doorbell.write(1)?;
        }
        Ok(())
    }

    /// Moves the index of what is available, as a driver that lost its mind may do by more than it should.
    pub fn advance(&mut self, by: u16) -> Result<()> {
        self.offered = self.offered.wrapping_add(by);
        Ok(self.memory.store(self.offered, GuestAddress(self.at + AVAILABLE + 2), Ordering::SeqCst)?)
    }

    pub fn ring(&self) -> Result<()> {
        Ok(self.doorbell.write(1)?)
    }

    /// The next answered head with the bytes written to it; waits for an interrupt when there is none.
    pub fn answer(&mut self) -> Result<(u16, u32)> {
        let end = Instant::now() + LIMIT;
        loop {
            if self.load(USED + 2)? != self.seen {
                let element = self.at + USED + 4 + u64::from(self.seen % QUEUE_SIZE) * 8;
                let head: u32 = self.memory.read_obj(GuestAddress(element))?;
                let bytes = self.memory.read_obj(GuestAddress(element + 4))?;
                self.seen = self.seen.wrapping_add(1);
                return Ok((u16::try_from(head)?, bytes));
            }
            let used_event = self.at + AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE);
            self.memory.store(self.seen, GuestAddress(used_event), Ordering::SeqCst)?;
            fence(Ordering::SeqCst);
            if self.load(USED + 2)? == self.seen && !signalled(&self.interrupt, end)? {
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
fn signalled(fd: &EventFd, end: Instant) -> Result<bool> {
    let left = end.saturating_duration_since(Instant::now()).as_millis() as i32;
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives on this frame.
    let ready = unsafe { libc::poll(&mut poll, 1, left) };
    ensure!(ready >= 0, "poll: {}", std::io::Error::last_os_error());
    Ok(ready > 0 && fd.read().is_ok())
}
