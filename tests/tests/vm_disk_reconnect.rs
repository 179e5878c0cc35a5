//! The VMM's disk against the gateway's export, without a guest: a driver made of register accesses
//! writes through the virtio transport; the gateway dies with writes open and a new one takes over; the
//! driver resets the device while nobody is there; the card goes.

use bytes::Bytes;
use gabion_gateway::vhost::{Disk, serve};
use gabion_vmm_shim::vmm::interrupts::{Interrupts, Message};
use gabion_vmm_shim::vmm::memory;
use gabion_vmm_shim::vmm::pci::Card;
use gabion_vmm_shim::vmm::vhost::{Event, Events, PCI_CLASS, VIRTIO_BLOCK, open};
use gabion_vmm_shim::vmm::virtio::transport::VirtioCard;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const LIMIT: Duration = Duration::from_secs(60);
const DISK_BYTES: usize = 1 << 20;
const QUEUE: u64 = 0x10_0000;
const QUEUE_SIZE: u64 = 16;
const REQUESTS: u64 = 0x20_0000;
const DOORBELL: u64 = 0x3000;

/// A disk in memory whose writes can be held.
struct MemoryDisk {
    data: Mutex<Vec<u8>>,
    held: watch::Sender<bool>,
    waiting: AtomicUsize,
}

impl MemoryDisk {
    fn new(held: bool) -> Arc<MemoryDisk> {
        let data = Mutex::new(vec![0; DISK_BYTES]);
        Arc::new(MemoryDisk { data, held: watch::Sender::new(held), waiting: AtomicUsize::new(0) })
    }
}

impl Disk for MemoryDisk {
    type Error = io::Error;
    fn size_bytes(&self) -> u64 {
        DISK_BYTES as u64
    }
    fn serial(&self) -> String {
        "memory".into()
    }
    async fn read(&self, offset: u64, len: u32) -> io::Result<Bytes> {
        let at = offset as usize;
        Ok(self.data.lock().unwrap()[at..at + len as usize].to_vec().into())
    }
    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.held.subscribe().wait_for(|held| !held).await.map_err(io::Error::other)?;
        self.data.lock().unwrap()[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        Ok(())
    }
    async fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
    async fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Stands for KVM: doorbells come the slow way, interrupts are looked for in the ring.
#[derive(Default)]
struct Nowhere(AtomicU32);

impl Interrupts for Nowhere {
    fn allocate(&self) -> Option<u32> {
        Some(self.0.fetch_add(1, Ordering::Relaxed))
    }
    fn free(&self, _: u32) {}
    fn route(&self, _: u32, _: Message) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }
    fn connect(&self, _: &EventFd, _: u32) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }
    fn disconnect(&self, _: &EventFd, _: u32) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }
    fn ring_on_write(&self, _: &EventFd, _: u64) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }
    fn stop_ringing(&self, _: &EventFd, _: u64) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Driver {
    card: VirtioCard,
    memory: GuestMemoryMmap,
    offered: u16,
}

impl Driver {
    fn read(&mut self, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        self.card.memory_read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }
    fn write(&mut self, offset: u64, len: usize, value: u32) {
        self.card.memory_write(offset, &value.to_le_bytes()[..len]);
    }

    /// From reset to a running queue 0, without any optional feature.
    fn start(&mut self) {
        for status in [1, 3] {
            self.write(0x14, 1, status);
        }
        self.write(0x08, 4, 1);
        self.write(0x0c, 4, 1);
        self.write(0x14, 1, 11);
        assert_eq!(self.read(0x14, 1), 11, "features accepted");
        self.memory.write_slice(&[0; 0x3000], GuestAddress(QUEUE)).unwrap();
        self.offered = 0;
        self.write(0x16, 2, 0);
        self.write(0x18, 2, QUEUE_SIZE as u32);
        for (register, at) in [(0x20, QUEUE), (0x28, QUEUE + 0x1000), (0x30, QUEUE + 0x2000)] {
            self.write(register, 4, at as u32);
        }
        self.write(0x1c, 2, 1);
        self.write(0x14, 1, 15);
    }

    /// Offers a write of `byte` to the sector of that number: three descriptors from `head`.
    fn offer(&mut self, head: u16, sector: u64, byte: u8) {
        let at = REQUESTS + u64::from(head) * 0x1000;
        let put = |value: u64, at| self.memory.write_obj(value, GuestAddress(at)).unwrap();
        put(1, at);
        put(sector, at + 8);
        self.memory.write_slice(&[byte; 512], GuestAddress(at + 0x200)).unwrap();
        self.memory.write_obj(0xeeu8, GuestAddress(at + 0x100)).unwrap();
        let parts = [(at, 16u64, 1u64), (at + 0x200, 512, 1), (at + 0x100, 1, 2)];
        for (index, (address, len, flags)) in (u64::from(head)..).zip(parts) {
            put(address, QUEUE + index * 16);
            put(len | flags << 32 | (index + 1) << 48, QUEUE + index * 16 + 8);
        }
        let slot = QUEUE + 0x1004 + u64::from(self.offered) % QUEUE_SIZE * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.offered += 1;
        self.memory.store(self.offered, GuestAddress(QUEUE + 0x1002), Ordering::SeqCst).unwrap();
        self.write(DOORBELL, 2, 0);
    }
    fn used(&self) -> u16 {
        self.memory.load(GuestAddress(QUEUE + 0x2002), Ordering::SeqCst).unwrap()
    }
    fn status_of(&self, head: u16) -> u8 {
        self.memory.read_obj(GuestAddress(REQUESTS + u64::from(head) * 0x1000 + 0x100)).unwrap()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn attach(socket: &std::path::Path) -> (Driver, Receiver<Event>) {
    let (queue, events) = sync_channel(8);
    let memory = memory::create(32 << 20).unwrap();
    let reports = Events { queue, wake: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()) };
    open("v".into(), socket.to_owned(), memory.clone(), reports).unwrap();
    let device = match events.recv_timeout(LIMIT).unwrap() {
        Event::Opened { result: Ok(device), .. } => device,
        Event::Opened { result: Err(why), .. } => panic!("{why}"),
        Event::Closed { .. } => panic!("closed"),
    };
    let (interrupts, device) = (Arc::new(Nowhere::default()), Box::new(device));
    let card = VirtioCard::new(VIRTIO_BLOCK, PCI_CLASS, 0, device, memory.clone(), interrupts).unwrap();
    (Driver { card, memory, offered: 0 }, events)
}

#[test]
fn open_writes_survive_their_gateway_and_resets_wait_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let (first, disk) = (runtime(), MemoryDisk::new(false));
    let export = serve(disk.clone(), socket.clone(), false, 1, first.handle().clone()).unwrap();
    let (mut driver, events) = attach(&socket);
    assert_eq!(driver.read(0x2000, 4) as usize, DISK_BYTES / 512, "sectors");
    driver.start();
    driver.offer(0, 1, 1);
    until("a write is answered", || driver.used() == 1);
    assert_eq!((driver.status_of(0), disk.data.lock().unwrap()[512]), (0, 1));

    // Two writes are open when the gateway dies; a third is offered while there is none.
    disk.held.send_replace(true);
    driver.offer(3, 2, 2);
    driver.offer(6, 3, 3);
    until("both are under way", || disk.waiting.load(Ordering::SeqCst) == 3);
    // The export gives up on them, as a process that ends does.
    first.block_on(export.stop());
    driver.offer(9, 4, 4);
    assert_eq!(driver.used(), 1);

    let (second, disk) = (runtime(), MemoryDisk::new(false));
    let export = serve(disk.clone(), socket.clone(), false, 1, second.handle().clone()).unwrap();
    until("all are answered", || driver.used() == 4);
    for (head, sector) in [(3, 2), (6, 3), (9, 4)] {
        assert_eq!((driver.status_of(head), disk.data.lock().unwrap()[sector * 512]), (0, sector as u8));
    }
    assert_eq!(disk.data.lock().unwrap()[512], 0, "what was answered is not repeated");

    // A driver that resets the device without a gateway learns that it has stopped only from the next.
    second.block_on(export.stop());
    driver.write(0x14, 1, 0);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(driver.read(0x14, 1), 15);
    let (third, disk) = (runtime(), MemoryDisk::new(false));
    let _export = serve(disk.clone(), socket.clone(), false, 1, third.handle().clone()).unwrap();
    until("the reset is over", || driver.read(0x14, 1) == 0);
    driver.start();
    driver.offer(0, 5, 5);
    until("it works again", || driver.used() == 1);
    assert_eq!(disk.data.lock().unwrap()[5 * 512], 5);

    drop(driver);
    match events.recv_timeout(LIMIT).unwrap() {
        Event::Closed { volume } => assert_eq!(volume, "v"),
        Event::Opened { .. } => panic!("opened twice"),
    }
}
