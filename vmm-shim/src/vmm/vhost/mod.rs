//! A disk that a gateway serves: the vhost-user-blk front end. The guest's virtqueues go straight to the
//! gateway: it maps guest memory, the guest's doorbell is a descriptor that it waits for, and its
//! completions are descriptors that KVM turns into interrupts. The thread here only sets that up.
//!
//! ```text
//!  connecting ──handshake──► idle ──Start──► running ──Stop──► idle (GET_VRING_BASE: all I/O has ended)
//!      ▲                      │                 │
//!      └──── gateway gone ────┴─────────────────┘   running: the in-flight region is kept and handed to the
//!                                                   next gateway, which repeats what was under way
//! ```
//!
//! While the gateway is away the guest's I/O waits. A driver that resets the device meanwhile also waits:
//! only a new handshake proves that the old gateway no longer touches guest memory.

mod link;

use super::interrupts::borrow;
use super::limits::QUEUES_MAX;
use super::seccomp;
use super::virtio::{Device, Rings};
use link::{Inflight, Link, LinkError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Block device, as a PCI class: mass storage, other.
pub const VIRTIO_BLOCK: u16 = 2;
pub const PCI_CLASS: u32 = 0x01_8000;
const RECONNECT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// A start and a stop can be outstanding, never more: the transport waits for each stop.
const COMMANDS_MAX: usize = 4;

enum Command {
    Start(Rings),
    Stop,
}

/// What the disk's thread tells the main thread.
pub enum Event {
    Opened {
        volume: String,
        result: Result<VhostBlk, String>,
    },
    /// The guest let go of the disk and the gateway no longer touches its memory.
    Closed {
        volume: String,
    },
}

/// Where disks report; wakes its reader.
#[derive(Clone)]
pub struct Events {
    pub queue: SyncSender<Event>,
    pub wake: Arc<EventFd>,
}

impl Events {
    fn send(&self, event: Event) {
        // Without a reader the process is ending.
        if self.queue.send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

struct Config {
    bytes: Vec<u8>,
    generation: u8,
}

struct Shared {
    // The disk's thread replaces it after a reconnect while vCPUs read it.
    config: Mutex<Config>,
    stopped: AtomicBool,
    connected: AtomicBool,
}

impl Shared {
    fn config(&self) -> std::sync::MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A view of the disk that outlives its card.
#[derive(Clone)]
pub struct Monitor(Arc<Shared>);

impl Monitor {
    pub fn is_connected(&self) -> bool {
        self.0.connected.load(Ordering::Relaxed)
    }
}

/// The device behind the card. Dropping it ends its thread.
pub struct VhostBlk {
    features: u64,
    queues: u16,
    shared: Arc<Shared>,
    commands: Option<SyncSender<Command>>,
    wake: Arc<EventFd>,
}

/// Opens a disk on a thread of its own; `events` gets the outcome.
pub fn open(volume: String, socket: PathBuf, memory: GuestMemoryMmap, events: Events) -> io::Result<()> {
    let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    std::thread::Builder::new().name("disk".into()).spawn(move || {
        let opened = seccomp::restrict(seccomp::Thread::Disk)
            .map_err(|e| e.to_string())
            .and_then(|()| Link::connect(&socket, &memory).map_err(|e| chain(&e)));
        let link = match opened {
            Ok(link) => link,
            Err(why) => {
                let why = format!("{} at {}: {why}", volume, socket.display());
                return events.send(Event::Opened { volume, result: Err(why) });
            }
        };
        let (commands, receiver) = sync_channel(COMMANDS_MAX);
        let shared = Arc::new(Shared {
            config: Mutex::new(Config { bytes: link.config.clone(), generation: 0 }),
            stopped: AtomicBool::new(true),
            connected: AtomicBool::new(true),
        });
        let device = VhostBlk {
            features: link.guest_features(),
            queues: link.queues.min(QUEUES_MAX),
            shared: shared.clone(),
            commands: Some(commands),
            wake: wake.clone(),
        };
        let queues = device.queues;
        events.send(Event::Opened { volume: volume.clone(), result: Ok(device) });
        let mut worker = Worker {
            volume: volume.clone(),
            socket,
            memory,
            queues,
            shared,
            commands: receiver,
            wake,
            link: Some(link),
            active: None,
            stop_waits: false,
            last_failure: String::new(),
        };
        worker.run();
        events.send(Event::Closed { volume });
    })?;
    Ok(())
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

impl VhostBlk {
    pub fn monitor(&self) -> Monitor {
        Monitor(self.shared.clone())
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

impl Drop for VhostBlk {
    fn drop(&mut self) {
        self.commands = None;
        let _ = self.wake.write(1);
    }
}

impl Device for VhostBlk {
    fn features(&self) -> u64 {
        self.features
    }
    fn queue_count(&self) -> u16 {
        self.queues
    }
    fn config_generation(&self) -> u8 {
        self.shared.config().generation
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.shared.config();
        for (to, from) in data.iter_mut().zip(config.bytes.iter().skip(offset as usize)) {
            *to = *from;
        }
    }
    fn start(&mut self, rings: Rings) {
        self.shared.stopped.store(false, Ordering::Release);
        self.command(Command::Start(rings));
    }
    fn stop(&mut self) {
        self.command(Command::Stop);
    }
    fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }
}

/// Rings that the guest's driver uses now.
struct Active {
    rings: Rings,
    /// Made with the first gateway, kept for the next.
    inflight: Option<Inflight>,
}

struct Worker {
    volume: String,
    socket: PathBuf,
    memory: GuestMemoryMmap,
    queues: u16,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    link: Option<Link>,
    active: Option<Active>,
    /// The driver has reset the device while no gateway was there.
    stop_waits: bool,
    last_failure: String,
}

impl Worker {
    fn run(&mut self) {
        loop {
            let gone = self.wait();
            if gone {
                self.lost("the gateway closed the connection");
            }
            if self.link.is_none() {
                self.reconnect();
            }
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Start(rings)) => self.start(rings),
                    Ok(Command::Stop) => self.stop(),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return self.halt(),
                }
            }
        }
    }

    /// Until there is something to do; true when the gateway has hung up.
    fn wait(&self) -> bool {
        let mut fds = vec![PollFd::from_borrowed_fd(borrow(&self.wake), PollFlags::IN)];
        // A back end without a channel of its own never speaks first: readable means gone.
        fds.extend(self.link.as_ref().map(|link| PollFd::new(link.stream(), PollFlags::IN)));
        let timeout = self.link.is_none().then_some(&RECONNECT);
        if poll(&mut fds, timeout).is_err() {
            return false;
        }
        let gone = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        // Not signalled is fine.
        let _ = self.wake.read();
        gone
    }

    fn lost(&mut self, why: &str) {
        if self.link.take().is_some() {
            tracing::warn!(volume = self.volume, why, "the disk's gateway is away; its I/O waits");
        }
        self.shared.connected.store(false, Ordering::Relaxed);
    }

    fn reconnect(&mut self) {
        let linked = Link::connect(&self.socket, &self.memory).and_then(|mut link| {
            let acked = self.active.as_ref().map_or(0, |active| active.rings.features);
            if acked & !link.guest_features() != 0 || link.queues < self.queues {
                return Err(LinkError::Lacking);
            }
            if let Some(active) = &mut self.active {
                link.start(&self.memory, &active.rings, self.queues, &mut active.inflight)?;
            }
            Ok(link)
        });
        match linked {
            Ok(link) => {
                tracing::info!(volume = self.volume, "the disk's gateway is back");
                self.last_failure.clear();
                self.refresh(&link);
                self.link = Some(link);
                self.shared.connected.store(true, Ordering::Relaxed);
                if std::mem::take(&mut self.stop_waits) {
                    self.shared.stopped.store(true, Ordering::Release);
                }
            }
            Err(error) => {
                let text = chain(&error);
                if text != self.last_failure {
                    tracing::warn!(volume = self.volume, error = text, "no gateway for the disk; trying on");
                    self.last_failure = text;
                }
            }
        }
    }

    /// Takes over a changed configuration (the disk's size) and tells the guest.
    fn refresh(&self, link: &Link) {
        let mut config = self.shared.config();
        if config.bytes == link.config {
            return;
        }
        config.bytes.clone_from(&link.config);
        config.generation = config.generation.wrapping_add(1);
        drop(config);
        if let Some(call) = self.active.as_ref().and_then(|active| active.rings.config_call.as_ref()) {
            let _ = call.write(1);
        }
    }

    fn start(&mut self, rings: Rings) {
        let mut active = Active { rings, inflight: None };
        if let Some(link) = &mut self.link
            && let Err(error) = link.start(&self.memory, &active.rings, self.queues, &mut active.inflight)
        {
            self.lost(&chain(&error));
        }
        self.active = Some(active);
    }

    fn stop(&mut self) {
        let Some(active) = self.active.take() else {
            return self.shared.stopped.store(true, Ordering::Release);
        };
        if let Some(link) = &mut self.link
            && let Err(error) = link.stop(&active.rings)
        {
            self.lost(&chain(&error));
        }
        match self.link {
            Some(_) => self.shared.stopped.store(true, Ordering::Release),
            None => self.stop_waits = true,
        }
    }

    /// The card is gone. Rings that were not reset are stopped all the same.
    fn halt(&mut self) {
        if let (Some(active), Some(link)) = (self.active.take(), &mut self.link)
            && let Err(error) = link.stop(&active.rings)
        {
            tracing::warn!(volume = self.volume, error = chain(&error), "the gateway ended with the disk");
        }
    }
}
