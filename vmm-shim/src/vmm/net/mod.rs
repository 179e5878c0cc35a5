//! A network card: virtio-net (virtio 1.2, section 5.1) with one pair of queues, on a tap device.
//!
//! ```text
//!  guest ── doorbell ─► thread "net" ── transmit queue ─► tap     (frames go with the guest's header, so that the
//!  guest ◄─ MSI ◄────── thread "net" ◄─ receive queue ◄── tap      host may do checksums and segmenting, or not)
//! ```
//!
//! A network may lose frames: what does not fit, or what the tap does not take, is dropped. A frame for which the
//! guest has no buffer waits, and the tap with it. A ring that is nonsense is not looked at again before a reset.

mod queue;
pub mod tap;

use super::interrupts::borrow;
use super::seccomp;
use super::virtio::{Device, F_VERSION_1, Rings};
use gabion_proto::nic::MacAddress;
use queue::Running;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use tap::{HEADER_BYTES, Offload, Tap};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub const VIRTIO_NET: u16 = 1;
/// Network controller, Ethernet.
pub const PCI_CLASS: u32 = 0x02_0000;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_EVENT_IDX: u64 = 1 << 29;
const FEATURES: u64 = F_VERSION_1
    | F_EVENT_IDX
    | F_MAC
    | F_CSUM
    | F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_HOST_TSO4
    | F_HOST_TSO6;

/// A whole segment that a card is to cut, its Ethernet header and the virtio header.
const FRAME_BYTES_MAX: usize = 65_550 + HEADER_BYTES;
/// `num_buffers`, the last field of the header: 1 in what a device without mergeable buffers hands over.
const NUM_BUFFERS_AT: usize = 10;
/// Frames of one direction before the other has its turn.
const TURN_FRAMES: usize = 64;
const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// A start and a stop can be outstanding, never more: the transport waits for each stop.
const COMMANDS_MAX: usize = 4;

enum Command {
    Start(Rings),
    Stop,
}

/// The device behind the card. Dropping it ends its thread.
pub struct VirtioNet {
    mac: MacAddress,
    stopped: Arc<AtomicBool>,
    commands: Option<SyncSender<Command>>,
    wake: Arc<EventFd>,
}

impl VirtioNet {
    /// Starts the card's thread.
    pub fn new(tap: Tap, mac: MacAddress, memory: GuestMemoryMmap) -> io::Result<VirtioNet> {
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let stopped = Arc::new(AtomicBool::new(true));
        let (commands, receiver) = sync_channel(COMMANDS_MAX);
        let (ready, is_ready) = sync_channel(1);
        let mut worker = Worker {
            tap,
            memory,
            wake: wake.clone(),
            stopped: stopped.clone(),
            commands: receiver,
            active: None,
            outgoing: vec![0; FRAME_BYTES_MAX],
            incoming: vec![0; FRAME_BYTES_MAX],
            waiting_bytes: 0,
            tap_is_gone: false,
        };
        std::thread::Builder::new().name("net".into()).spawn(move || {
            let restricted = seccomp::restrict(seccomp::Thread::Net).map_err(io::Error::other);
            let may_run = restricted.is_ok();
            // Whoever made the card waits for this.
            if ready.send(restricted).is_ok() && may_run {
                worker.run();
            }
        })?;
        is_ready.recv().map_err(io::Error::other)??;
        Ok(VirtioNet { mac, stopped, commands: Some(commands), wake })
    }

    fn command(&self, command: Command) {
        if let Some(commands) = &self.commands
            && commands.send(command).is_ok()
        {
            // A counter that is full wakes too.
            let _ = self.wake.write(1);
        }
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        self.commands = None;
        let _ = self.wake.write(1);
    }
}

impl Device for VirtioNet {
    fn features(&self) -> u64 {
        FEATURES
    }
    fn queue_count(&self) -> u16 {
        2
    }
    fn config_generation(&self) -> u8 {
        0
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(self.mac.bytes().iter().skip(offset as usize)) {
            *to = *from;
        }
    }
    fn start(&mut self, rings: Rings) {
        self.stopped.store(false, Ordering::Release);
        self.command(Command::Start(rings));
    }
    fn stop(&mut self) {
        self.command(Command::Stop);
    }
    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

struct Worker {
    tap: Tap,
    memory: GuestMemoryMmap,
    wake: Arc<EventFd>,
    stopped: Arc<AtomicBool>,
    commands: Receiver<Command>,
    active: Option<Active>,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    /// Of a received frame that waits in `incoming` for a buffer of the guest; 0: none.
    waiting_bytes: usize,
    tap_is_gone: bool,
}

/// Queues that the guest's driver uses now; a driver may leave one out.
#[derive(Default)]
struct Active {
    receive: Option<Running>,
    transmit: Option<Running>,
}

impl Worker {
    fn run(&mut self) {
        let mut more = false;
        loop {
            self.wait(more);
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Start(rings)) => self.start(rings),
                    Ok(Command::Stop) => {
                        self.active = None;
                        self.waiting_bytes = 0;
                        self.stopped.store(true, Ordering::Release);
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            let Some(mut active) = self.active.take() else { continue };
            more = active.transmit.as_mut().is_some_and(|queue| self.transmit(queue));
            more |= active.receive.as_mut().is_some_and(|queue| self.receive(queue));
            self.active = Some(active);
        }
    }

    fn start(&mut self, rings: Rings) {
        let has = |bit: u64| rings.features & bit != 0;
        let offload = Offload {
            checksum: has(F_GUEST_CSUM),
            segment_ipv4: has(F_GUEST_TSO4),
            segment_ipv6: has(F_GUEST_TSO6),
        };
        if let Err(error) = self.tap.set_offload(offload) {
            tracing::warn!(%error, "the tap device goes on with its earlier offloads");
        }
        let event_idx = has(F_EVENT_IDX);
        let mut active = Active::default();
        for ring in rings.rings {
            let place = match ring.index {
                RECEIVE => &mut active.receive,
                TRANSMIT => &mut active.transmit,
                _ => continue,
            };
            let device_writes = ring.index == RECEIVE;
            match Running::new(ring, event_idx, device_writes, &self.memory) {
                Ok(queue) => *place = Some(queue),
                Err(why) => tracing::warn!(why, "a queue of a network card does not start"),
            }
        }
        self.active = Some(active);
    }

    fn wait(&self, more: bool) {
        let mut fds = vec![PollFd::from_borrowed_fd(borrow(&self.wake), PollFlags::IN)];
        if let Some(active) = &self.active {
            for queue in [&active.receive, &active.transmit].into_iter().flatten() {
                fds.push(PollFd::from_borrowed_fd(borrow(queue.doorbell()), PollFlags::IN));
            }
            if self.waiting_bytes == 0
                && !self.tap_is_gone
                && active.receive.as_ref().is_some_and(Running::is_sound)
            {
                fds.push(PollFd::new(&self.tap, PollFlags::IN));
            }
        }
        // A failure looks like nothing: what is due is looked for after each wait.
        let _ = poll(&mut fds, more.then_some(&NO_WAIT));
        let _ = self.wake.read();
        if let Some(active) = &self.active {
            for queue in [&active.receive, &active.transmit].into_iter().flatten() {
                let _ = queue.doorbell().read();
            }
        }
    }

    /// Whether there is more to do.
    fn transmit(&mut self, queue: &mut Running) -> bool {
        let mut frames = 0;
        while frames < TURN_FRAMES
            && let Some(chain) = queue.take(&self.memory)
        {
            // What is made wrongly or does not go out is lost, as on a wire.
            if let Some(bytes) = chain.gather(&self.memory, &mut self.outgoing)
                && bytes > HEADER_BYTES
            {
                let _ = self.tap.send(&self.outgoing[..bytes]);
            }
            queue.give_back(&self.memory, chain.head, 0);
            frames += 1;
        }
        queue.notify(&self.memory);
        frames == TURN_FRAMES
    }

    /// Whether there is more to do.
    fn receive(&mut self, queue: &mut Running) -> bool {
        let mut frames = 0;
        while frames < TURN_FRAMES && (self.waiting_bytes > 0 || !self.tap_is_gone && self.fill()) {
            let Some(chain) = queue.take(&self.memory) else { break };
            let frame = &self.incoming[..std::mem::take(&mut self.waiting_bytes)];
            let bytes = if chain.scatter(&self.memory, frame) { frame.len() } else { 0 };
            queue.give_back(&self.memory, chain.head, bytes);
            frames += 1;
        }
        queue.notify(&self.memory);
        frames == TURN_FRAMES
    }

    /// Reads the next frame from the tap; false when there is none.
    fn fill(&mut self) -> bool {
        match self.tap.receive(&mut self.incoming) {
            Ok(bytes) if bytes > HEADER_BYTES => {
                self.incoming[NUM_BUFFERS_AT..HEADER_BYTES].copy_from_slice(&1u16.to_le_bytes());
                self.waiting_bytes = bytes;
                true
            }
            Ok(0) => {
                self.lost(&"it ended");
                false
            }
            // Less than a frame: the next wait finds what follows.
            Ok(_) => false,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                false
            }
            Err(error) => {
                self.lost(&error);
                false
            }
        }
    }

    fn lost(&mut self, why: &dyn std::fmt::Display) {
        tracing::warn!(%why, "a network card's tap device is gone: nothing more is received");
        self.tap_is_gone = true;
    }
}
