//! A guest's disk, without a guest: the VMM's disk on a gateway's socket, its driver ([`crate::guest_driver`]), and a
//! load that verifies every block it writes (virtio 1.2, section 5.2).

use crate::guest_driver::{BUFFERS, Buffer, Driver, LIMIT, QUEUE_SIZE, Virtqueue, guest_memory};
use anyhow::{Result, bail, ensure};
use gabion_vmm_shim::vmm::vhost::{Event, Events, PCI_CLASS, VIRTIO_BLOCK, open};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub const QUEUES: u16 = 2;
pub const BLOCK_BYTES: usize = 4096;
/// Requests that each queue keeps under way.
const SLOTS: u16 = 16;
/// Blocks that each slot writes, one after the other, over and over.
const SLOT_BLOCKS: u64 = 8;
/// What the load needs of the disk.
pub const DISK_BYTES: u64 = QUEUES as u64 * SLOTS as u64 * SLOT_BLOCKS * BLOCK_BYTES as u64;

/// Descriptors of one request: header, data, status.
const PARTS: u16 = 3;
const REQUEST_BYTES: u64 = 0x2000;
const STATUS: u64 = 0x100;
const DATA: u64 = 0x1000;
const SECTOR_BYTES: u64 = 512;

const _: () = assert!(SLOTS * PARTS <= QUEUE_SIZE);

/// The disk's card, kept for as long as its queues are used.
pub struct GuestDisk {
    driver: Driver,
    events: Receiver<Event>,
}

/// Opens the disk that a gateway serves at `socket` and starts its driver.
pub fn attach(socket: &Path) -> Result<(GuestDisk, Vec<Queue>)> {
    let (queue, events) = sync_channel(8);
    let memory = guest_memory()?;
    let reports = Events { queue, wake: Arc::new(EventFd::new(libc::EFD_NONBLOCK)?) };
    open("disk".into(), socket.to_owned(), memory.clone(), reports)?;
    let device = match events.recv_timeout(LIMIT)? {
        Event::Opened { result: Ok(device), .. } => device,
        Event::Opened { result: Err(why), .. } => bail!(why),
        Event::Closed { .. } => bail!("the disk is closed"),
    };
    let mut driver = Driver::new(VIRTIO_BLOCK, PCI_CLASS, Box::new(device), memory)?;
    let queues = driver.start(0, QUEUES)?.into_iter().map(Queue).collect();
    Ok((GuestDisk { driver, events }, queues))
}

impl GuestDisk {
    /// Takes the card out; answers when its gateway has let go.
    pub fn detach(self) -> Result<()> {
        drop(self.driver);
        match self.events.recv_timeout(LIMIT)? {
            Event::Closed { .. } => Ok(()),
            Event::Opened { .. } => bail!("the disk is opened again"),
        }
    }
}

/// One virtqueue with its requests.
pub struct Queue(Virtqueue);

impl Queue {
    fn request(&self, slot: u16) -> u64 {
        BUFFERS + u64::from(self.0.index * SLOTS + slot) * REQUEST_BYTES
    }

    /// Offers a write of `data`, or a read, of one block.
    fn offer(&mut self, slot: u16, block: u64, data: Option<&[u8]>) -> Result<()> {
        let (at, memory) = (self.request(slot), &self.0.memory);
        memory.write_obj(u64::from(data.is_some()), GuestAddress(at))?;
        memory.write_obj(block * BLOCK_BYTES as u64 / SECTOR_BYTES, GuestAddress(at + 8))?;
        memory.write_obj(0xeeu8, GuestAddress(at + STATUS))?;
        memory.write_slice(data.unwrap_or(&[0xee; BLOCK_BYTES]), GuestAddress(at + DATA))?;
        let buffers = [
            Buffer { at, len: 16, device_writes: false },
            Buffer { at: at + DATA, len: BLOCK_BYTES, device_writes: data.is_none() },
            Buffer { at: at + STATUS, len: 1, device_writes: true },
        ];
        self.0.offer(slot * PARTS, &buffers)
    }

    /// The next answered slot with its status.
    fn answer(&mut self) -> Result<(u16, u8)> {
        let (head, _) = self.0.answer()?;
        let slot = head / PARTS;
        ensure!(slot < SLOTS && head == slot * PARTS, "head {head} was not offered");
        Ok((slot, self.0.memory.read_obj(GuestAddress(self.request(slot) + STATUS))?))
    }
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
    let first = u64::from(queue.0.index * SLOTS) * SLOT_BLOCKS;
    let block_of = |slot: u16, round: u64| first + u64::from(slot) * SLOT_BLOCKS + round % SLOT_BLOCKS;
    let mut slots: Vec<Slot> = (0..SLOTS).map(|_| Slot { round: 0, reading: false }).collect();
    for slot in 0..SLOTS {
        queue.offer(slot, block_of(slot, 0), Some(&pattern(block_of(slot, 0), 0)))?;
    }
    let mut open = SLOTS;
    let check = |queue: &Queue, slot: u16, block: u64, round: u64| -> Result<()> {
        let mut found = vec![0; BLOCK_BYTES];
        queue.0.memory.read_slice(&mut found, GuestAddress(queue.request(slot) + DATA))?;
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
