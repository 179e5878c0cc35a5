//! One running virtqueue: a task that owns the ring's indices, everything fetched from it and everything not yet answered.
//!
//! ```text
//!  spawn ── replay what the in-flight region holds ── fetch ⇄ wait(kick | completion | stop) ── drain ── next_avail
//!                                                       └ broken (the ring itself is nonsense): completions only
//! ```
//!
//! Requests run concurrently inside the task and complete in any order. A head that is in flight cannot be fetched again, so
//! a ring holds at most its size in requests, and it stops fetching, what is replayed too, above `RING_BYTES_MAX` of payload. A
//! malformed chain is answered with an error; a malformed ring (indices or a head out of range) stops fetching until the front
//! end resets it. A guest that always has something more cannot keep the thread that all exports share: after `TURN_EVENTS`
//! others have their turn.
//! Stopping drains; when the whole export stops, or the front end is to connect again, draining has a deadline, and what is open
//! then stays recorded in the in-flight region for the next start.

use std::collections::VecDeque;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio_util::sync::CancellationToken;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::disk::Disk;
use super::event::{Call, Kick};
use super::execute::{Done, execute};
use super::inflight::InflightQueue;
use super::limits::RING_BYTES_MAX;
use super::request::{Geometry, Request};

const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// How long the end of an export, or of a connection that is to be made anew, waits for I/O that is still running.
const STOP_DRAIN: Duration = Duration::from_secs(5);
/// Completions and kicks that a ring takes before other tasks have their turn.
const TURN_EVENTS: usize = 64;

pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

pub struct Ring {
    pub index: u16,
    pub queue: Queue,
    pub memory: GuestMemory,
    pub kick: Kick,
    pub call: Arc<Call>,
    pub inflight: Option<InflightQueue>,
    /// Heads to run before anything is fetched.
    pub replay: VecDeque<u16>,
    pub read_only: bool,
    /// Ends this ring's run after draining.
    pub stop: CancellationToken,
    /// The front end is sent away, or the whole export ends: draining has a deadline.
    pub hurry: CancellationToken,
}

/// How a ring's run has ended.
pub struct Ended {
    /// Where the avail ring goes on.
    pub next_avail: u16,
    /// Requests were given up: they are on record, and may still be under way in the disk.
    pub left_open: bool,
}

/// What the task knows of the ring while it runs.
struct State {
    ring: Ring,
    busy: Vec<bool>,
    held_bytes: u64,
    broken: bool,
    chain_faults: u64,
}

impl Ring {
    /// Runs until stopped.
    pub async fn run<D: Disk>(self, disk: Arc<D>) -> Ended {
        let (stop, hurry) = (self.stop.clone(), self.hurry.clone());
        let busy = vec![false; usize::from(self.queue.size())];
        let mut state = State { ring: self, busy, held_bytes: 0, broken: false, chain_faults: 0 };
        let mut pending = FuturesUnordered::new();
        let mut fetched = Vec::new();

        // A completion whose interrupt was lost with the last process must not wait for the next one.
        state.ring.call.signal();

        let (mut stopping, mut events) = (false, 0);
        let deadline = async {
            hurry.cancelled().await;
            tokio::time::sleep(STOP_DRAIN).await;
        };
        tokio::pin!(deadline);
        loop {
            state.fetch_replay(disk.size_bytes(), &mut fetched);
            if !stopping {
                state.fetch(disk.size_bytes(), &mut fetched);
            }
            if !fetched.is_empty() {
                let mem = state.memory();
                pending.extend(fetched.drain(..).map(|request| execute(disk.clone(), request, mem.clone())));
            }
            if stopping && pending.is_empty() {
                break;
            }
            if events >= TURN_EVENTS {
                events = 0;
                tokio::task::yield_now().await;
            }
            events += 1;
            tokio::select! {
                biased;
                () = stop.cancelled(), if !stopping => stopping = true,
                Some(done) = pending.next(), if !pending.is_empty() => {
                    state.complete(done);
                    while let Some(Some(done)) = pending.next().now_or_never() {
                        state.complete(done);
                        events += 1;
                    }
                    state.notify();
                }
                kicked = state.ring.kick.wait(), if !stopping && !state.broken => {
                    if let Err(error) = kicked {
                        state.break_ring(format_args!("its kick descriptor fails: {error}"));
                    }
                }
                () = &mut deadline, if stopping => {
                    tracing::warn!(ring = state.ring.index, open = pending.len(), "vhost-user ring stops with I/O still open");
                    break;
                }
            }
        }
        Ended { next_avail: state.ring.queue.next_avail(), left_open: !pending.is_empty() }
    }
}

impl State {
    fn memory(&self) -> Arc<GuestMemoryMmap> {
        self.ring.memory.memory().into_inner()
    }

    fn break_ring(&mut self, why: std::fmt::Arguments<'_>) {
        if !self.broken {
            tracing::warn!(ring = self.ring.index, "vhost-user ring stops until it is reset: {why}");
        }
        self.broken = true;
    }

    /// Takes what was in flight before, in its order, as far as the payload limit allows. A guest may have made its buffers larger
    /// since. It is not forgotten when the ring stops: the avail ring goes on behind it.
    fn fetch_replay(&mut self, size_bytes: u64, into: &mut Vec<Request>) {
        if self.ring.replay.is_empty() {
            return;
        }
        let mem = self.memory();
        while self.held_bytes < RING_BYTES_MAX
            && let Some(head) = self.ring.replay.pop_front()
        {
            let request = self.accept(head, &mem, size_bytes);
            into.push(request);
        }
    }

    /// Takes what is available, as far as the payload limit allows, once everything is replayed.
    fn fetch(&mut self, size_bytes: u64, into: &mut Vec<Request>) {
        if !self.ring.replay.is_empty() {
            return;
        }
        let mem = self.memory();
        while !self.broken {
            if let Err(error) = self.ring.queue.disable_notification(&*mem) {
                return self.break_ring(format_args!("{error}"));
            }
            loop {
                if self.held_bytes >= RING_BYTES_MAX {
                    // A completion comes back here; the guest need not kick meanwhile.
                    return;
                }
                let head = match self.ring.queue.iter(&*mem) {
                    Ok(mut heads) => heads.next().map(|chain| chain.head_index()),
                    Err(error) => return self.break_ring(format_args!("{error}")),
                };
                let Some(head) = head else { break };
                match self.busy.get(usize::from(head)) {
                    Some(false) => {}
                    Some(true) => return self.break_ring(format_args!("head {head} is offered twice")),
                    None => return self.break_ring(format_args!("head {head} is out of range")),
                }
                if let Some(inflight) = &mut self.ring.inflight {
                    inflight.fetched(head);
                }
                let request = self.accept(head, &mem, size_bytes);
                into.push(request);
            }
            match self.ring.queue.enable_notification(&*mem) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.break_ring(format_args!("{error}")),
            }
        }
    }

    fn accept(&mut self, head: u16, mem: &GuestMemoryMmap, size_bytes: u64) -> Request {
        let queue = &self.ring.queue;
        let geometry = Geometry { size_bytes, read_only: self.ring.read_only };
        let request = Request::parse(mem, GuestAddress(queue.desc_table()), queue.size(), head, geometry);
        if let Some(fault) = &request.fault {
            if self.chain_faults == 0 {
                tracing::warn!(ring = self.ring.index, head, "the guest offers a malformed request: {fault}");
            }
            self.chain_faults += 1;
        }
        self.busy[usize::from(head)] = true;
        self.held_bytes += request.held_bytes();
        request
    }

    fn complete(&mut self, done: Done) {
        self.busy[usize::from(done.head)] = false;
        self.held_bytes -= done.held_bytes;
        let mem = self.memory();
        if let Some(inflight) = &self.ring.inflight {
            inflight.completing(done.head);
        }
        if let Err(error) = self.ring.queue.add_used(&*mem, done.head, done.used_bytes) {
            return self.break_ring(format_args!("{error}"));
        }
        if let Some(inflight) = &self.ring.inflight {
            inflight.completed(done.head, self.ring.queue.next_used());
        }
    }

    /// Interrupts the guest unless it asked not to be.
    fn notify(&mut self) {
        let mem = self.memory();
        // Also puts the fence between the used index and what is read below.
        let wanted = self.ring.queue.needs_notification(&*mem).unwrap_or(true);
        let wanted = wanted && (self.ring.queue.event_idx_enabled() || !no_interrupt(&mem, &self.ring.queue));
        if wanted {
            self.ring.call.signal();
        }
    }
}

fn no_interrupt(mem: &GuestMemoryMmap, queue: &Queue) -> bool {
    fence(Ordering::SeqCst);
    let flags: Result<u16, _> = mem.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed);
    flags.is_ok_and(|flags| u16::from_le(flags) & AVAIL_F_NO_INTERRUPT != 0)
}

/// The used index that the ring in guest memory shows.
pub fn used_idx(mem: &GuestMemoryMmap, queue: &Queue) -> Result<u16, virtio_queue::Error> {
    queue.used_idx(mem, Ordering::Acquire).map(|Wrapping(idx)| idx)
}
