//! One running virtqueue of a network card: takes chains, gives them back, interrupts. Nothing in a ring or a
//! descriptor is believed.

use crate::vmm::virtio::Ring;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Buffers of one chain.
const SEGMENTS_MAX: usize = 256;

#[derive(Debug, Clone, Copy)]
struct Segment {
    at: GuestAddress,
    bytes: usize,
}

/// The buffers of one frame: all for the device to read, or all for it to write.
#[derive(Debug)]
pub struct Chain {
    pub head: u16,
    /// None: the guest made it wrongly.
    segments: Option<Vec<Segment>>,
}

pub struct Running {
    queue: Queue,
    doorbell: EventFd,
    call: EventFd,
    device_writes: bool,
    broken: bool,
    given_back: bool,
}

impl Running {
    /// `device_writes` tells which kind of buffers this queue has.
    pub fn new(
        ring: Ring,
        event_idx: bool,
        device_writes: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<Running, &'static str> {
        let mut queue = Queue::new(ring.size).map_err(|_| "its size is wrong")?;
        let address = |at: u64| GuestAddress(at);
        let placed = queue
            .try_set_desc_table_address(address(ring.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(address(ring.available)))
            .and_then(|()| queue.try_set_used_ring_address(address(ring.used)));
        placed.map_err(|_| "it is not aligned")?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err("it is not in memory");
        }
        let Ring { kick, call, .. } = ring;
        Ok(Running { queue, doorbell: kick, call, device_writes, broken: false, given_back: false })
    }

    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    pub fn is_sound(&self) -> bool {
        !self.broken
    }

    fn break_off(&mut self, why: &dyn std::fmt::Display) {
        tracing::warn!(%why, "a network card's queue stops until it is reset");
        self.broken = true;
    }

    /// The next chain; after `None` the doorbell rings when there is one.
    pub fn take(&mut self, memory: &GuestMemoryMmap) -> Option<Chain> {
        while !self.broken {
            let chain = match self.queue.iter(memory) {
                Ok(mut chains) => chains.next(),
                Err(error) => {
                    self.break_off(&error);
                    return None;
                }
            };
            if let Some(chain) = chain {
                let head = chain.head_index();
                if head >= self.queue.size() {
                    self.break_off(&"a head beyond its table");
                    return None;
                }
                let mut segments = Vec::new();
                let mut sound = true;
                for part in chain {
                    sound &= part.is_write_only() == self.device_writes && segments.len() < SEGMENTS_MAX;
                    if !sound {
                        break;
                    }
                    segments.push(Segment { at: part.addr(), bytes: part.len() as usize });
                }
                return Some(Chain { head, segments: sound.then_some(segments) });
            }
            match self.queue.enable_notification(memory) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => self.break_off(&error),
            }
        }
        None
    }

    /// Gives a chain back with what was written to it.
    pub fn give_back(&mut self, memory: &GuestMemoryMmap, head: u16, bytes: usize) {
        match self.queue.add_used(memory, head, bytes as u32) {
            Ok(()) => self.given_back = true,
            Err(error) => self.break_off(&error),
        }
    }

    /// Interrupts the guest if it wants to know of what was given back.
    pub fn notify(&mut self, memory: &GuestMemoryMmap) {
        if std::mem::take(&mut self.given_back) && self.queue.needs_notification(memory).unwrap_or(true) {
            // A counter that is full interrupts already.
            let _ = self.call.write(1);
        }
    }
}

impl Chain {
    /// Copies the frame out; its length, unless it does not fit or is made wrongly.
    pub fn gather(&self, memory: &GuestMemoryMmap, into: &mut [u8]) -> Option<usize> {
        let mut filled = 0usize;
        for segment in self.segments.as_ref()? {
            let to = into.get_mut(filled..filled.checked_add(segment.bytes)?)?;
            memory.read_slice(to, segment.at).ok()?;
            filled += segment.bytes;
        }
        Some(filled)
    }

    /// Copies a frame in; false when the buffers are too small for it.
    pub fn scatter(&self, memory: &GuestMemoryMmap, frame: &[u8]) -> bool {
        let Some(segments) = &self.segments else { return false };
        let mut rest = frame;
        for segment in segments {
            let (now, later) = rest.split_at(rest.len().min(segment.bytes));
            if memory.write_slice(now, segment.at).is_err() {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }
}
