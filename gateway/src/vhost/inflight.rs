//! The in-flight region of the vhost-user specification ("Inflight I/O tracking", split virtqueues): shared memory that
//! the front end keeps while this process restarts, so that no request is lost or forgotten (rule C4).
//!
//! One queue's part, little-endian on x86-64, 64-byte aligned:
//!
//! | offset | field | |
//! |---|---|---|
//! | 0 | `features` u64 | 0 |
//! | 8 | `version` u16 | 0 until the queue first starts, then 1 |
//! | 10 | `desc_num` u16 | entries that follow |
//! | 12 | `last_batch_head` u16 | head of the last completion |
//! | 14 | `used_idx` u16 | the used index when that completion was fully recorded |
//! | 16 + 16 i | `inflight` u8, 5 bytes unused, `next` u16, `counter` u64 | of head i |
//!
//! A completion is recorded as: batch head, used ring, clear the flag, used index. After a crash between those steps the used
//! index of the ring runs ahead of `used_idx`, and [`InflightQueue::reconcile`] repeats what is missing.
//! The region is shared with another process: every value read from it is checked.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::limits::{INFLIGHT_BYTES_MAX, QUEUE_SIZE_MAX, QUEUES_MAX};

const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const ALIGN: usize = 64;

#[derive(Debug, Error)]
pub enum InflightError {
    #[error("{queues} queues of {entries} entries are beyond the limits")]
    Shape { queues: u16, entries: u16 },
    #[error("the region of {bytes} bytes does not fit its queues")]
    Size { bytes: u64 },
    #[error("the region cannot be created or mapped")]
    Map(#[source] io::Error),
    #[error("the queue's part says version {version} with {entries} entries")]
    Header { version: u16, entries: u16 },
    #[error(
        "a ring of {ring} entries and a record of {entries} requests in flight: with QEMU's microvm, set queue-size={ring}"
    )]
    TooShort { ring: u16, entries: u16 },
    #[error("the used ring is at {ring}, the region at {region}: they are not of one history")]
    Diverged { ring: u16, region: u16 },
}

/// A mapped region.
#[derive(Clone)]
pub struct InflightRegion {
    map: Arc<MmapRegion<()>>,
    queues: u16,
    entries: u16,
}

impl InflightRegion {
    /// A fresh region in anonymous memory for GET_INFLIGHT_FD, with its description and a handle to pass on.
    pub fn create(queues: u16, entries: u16) -> Result<(Self, VhostUserInflight, File), InflightError> {
        check_shape(queues, entries)?;
        let bytes = queue_bytes(entries) * usize::from(queues);
        let file = sealed("gabion-inflight", bytes as u64).map_err(InflightError::Map)?;
        let message = VhostUserInflight::new(bytes as u64, 0, queues, entries);
        let region = Self::map(&message, file.try_clone().map_err(InflightError::Map)?)?;
        Ok((region, message, file))
    }

    /// The region that SET_INFLIGHT_FD names.
    pub fn map(message: &VhostUserInflight, file: File) -> Result<Self, InflightError> {
        let (queues, entries) = (message.num_queues, message.queue_size);
        check_shape(queues, entries)?;
        let bytes = message.mmap_size;
        let needed = (queue_bytes(entries) * usize::from(queues)) as u64;
        if bytes > INFLIGHT_BYTES_MAX || bytes < needed {
            return Err(InflightError::Size { bytes });
        }
        check_backed(&file, message.mmap_offset, bytes).map_err(InflightError::Map)?;
        let map = MmapRegion::from_file(FileOffset::new(file, message.mmap_offset), bytes as usize)
            .map_err(|error| InflightError::Map(io::Error::other(error)))?;
        Ok(InflightRegion { map: Arc::new(map), queues, entries })
    }

    /// The part of one queue; none where the region has no room for it.
    pub fn queue(&self, index: u16) -> Option<InflightQueue> {
        (index < self.queues).then(|| InflightQueue {
            map: self.map.clone(),
            base: queue_bytes(self.entries) * usize::from(index),
            entries: self.entries,
            counter: 0,
        })
    }
}

/// Shared memory that whoever gets its descriptor can change, but not cut short: touching what is not there any more would be a
/// SIGBUS for the whole gateway.
fn sealed(name: &str, bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Refuses a mapping beyond the end of its file: touching it would be a SIGBUS for the whole gateway. That the front end does not
/// make the file smaller later is its word: what QEMU maps from a file system cannot be sealed.
pub fn check_backed(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let backed =
        offset.checked_add(bytes).is_some_and(|end| file.metadata().is_ok_and(|found| end <= found.len()));
    if backed {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the file is smaller than the region that it is to back",
        ))
    }
}

fn check_shape(queues: u16, entries: u16) -> Result<(), InflightError> {
    if (1..=QUEUES_MAX).contains(&queues) && (1..=QUEUE_SIZE_MAX).contains(&entries) {
        Ok(())
    } else {
        Err(InflightError::Shape { queues, entries })
    }
}

fn queue_bytes(entries: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(entries)).next_multiple_of(ALIGN)
}

/// One queue's record of what it has fetched and not yet answered.
pub struct InflightQueue {
    map: Arc<MmapRegion<()>>,
    base: usize,
    entries: u16,
    counter: u64,
}

/// What is left to do after a reconnect.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resume {
    /// Heads to run again, in the order in which they were fetched.
    pub replay: Vec<u16>,
    /// Where the avail ring goes on; none for a queue that the region does not know yet.
    pub next_avail: Option<u16>,
}

impl InflightQueue {
    fn u8(&self, at: usize) -> &AtomicU8 {
        self.map.get_atomic_ref(self.base + at).expect("inside the mapped region by construction")
    }

    fn u16(&self, at: usize) -> &AtomicU16 {
        self.map.get_atomic_ref(self.base + at).expect("inside the mapped region and aligned by construction")
    }

    fn u64(&self, at: usize) -> &AtomicU64 {
        self.map.get_atomic_ref(self.base + at).expect("inside the mapped region and aligned by construction")
    }

    fn version(&self) -> &AtomicU16 {
        self.u16(8)
    }

    fn desc_num(&self) -> &AtomicU16 {
        self.u16(10)
    }

    fn last_batch_head(&self) -> &AtomicU16 {
        self.u16(12)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.u16(14)
    }

    fn flag(&self, head: u16) -> &AtomicU8 {
        self.u8(HEADER_BYTES + ENTRY_BYTES * usize::from(head))
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16(HEADER_BYTES + ENTRY_BYTES * usize::from(head) + 6)
    }

    fn fetched_at(&self, head: u16) -> &AtomicU64 {
        self.u64(HEADER_BYTES + ENTRY_BYTES * usize::from(head) + 8)
    }

    /// Brings the region up to the used ring of a queue of `queue_size` that starts (again), and tells what to replay.
    pub fn reconcile(&mut self, queue_size: u16, ring_used_idx: u16) -> Result<Resume, InflightError> {
        let (version, entries) =
            (self.version().load(Ordering::Acquire), self.desc_num().load(Ordering::Acquire));
        if queue_size > self.entries {
            return Err(InflightError::TooShort { ring: queue_size, entries: self.entries });
        }
        if version != 0 && (version != VERSION || entries != self.entries) {
            return Err(InflightError::Header { version, entries });
        }
        if version == 0 {
            self.desc_num().store(self.entries, Ordering::Release);
            self.used_idx().store(ring_used_idx, Ordering::Release);
            self.version().store(VERSION, Ordering::Release);
            return Ok(Resume::default());
        }
        let mut open: Vec<u16> =
            (0..queue_size).filter(|&head| self.flag(head).load(Ordering::Acquire) != 0).collect();
        let region = self.used_idx().load(Ordering::Acquire);
        let missed = ring_used_idx.wrapping_sub(region);
        if missed > queue_size && !open.is_empty() {
            return Err(InflightError::Diverged { ring: ring_used_idx, region });
        }
        if missed > queue_size {
            // Nothing is open and the ring starts over: the guest's driver was reset while this queue was stopped.
            self.used_idx().store(ring_used_idx, Ordering::Release);
            return Ok(Resume::default());
        }
        let mut head = self.last_batch_head().load(Ordering::Acquire);
        for _ in 0..missed {
            if head >= queue_size {
                return Err(InflightError::Diverged { ring: ring_used_idx, region });
            }
            self.flag(head).store(0, Ordering::Release);
            open.retain(|&other| other != head);
            head = self.next(head).load(Ordering::Acquire);
        }
        self.used_idx().store(ring_used_idx, Ordering::Release);
        open.sort_by_key(|&head| self.fetched_at(head).load(Ordering::Acquire));
        self.counter =
            open.last().map_or(0, |&head| self.fetched_at(head).load(Ordering::Acquire).wrapping_add(1));
        let next_avail = ring_used_idx.wrapping_add(open.len() as u16);
        Ok(Resume { replay: open, next_avail: Some(next_avail) })
    }

    /// Whether any head is recorded as under way.
    pub fn has_open(&self) -> bool {
        (0..self.entries).any(|head| self.flag(head).load(Ordering::Acquire) != 0)
    }

    /// Before a fetched head is worked on.
    pub fn fetched(&mut self, head: u16) {
        self.fetched_at(head).store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        self.flag(head).store(1, Ordering::Release);
    }

    /// Before a completion enters the used ring.
    pub fn completing(&self, head: u16) {
        self.next(head).store(self.last_batch_head().load(Ordering::Acquire), Ordering::Release);
        self.last_batch_head().store(head, Ordering::Release);
    }

    /// After it has.
    pub fn completed(&self, head: u16, ring_used_idx: u16) {
        self.flag(head).store(0, Ordering::Release);
        self.used_idx().store(ring_used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> (InflightRegion, VhostUserInflight, File) {
        InflightRegion::create(2, 8).unwrap()
    }

    #[test]
    fn a_clean_history_resumes_at_the_used_index() {
        let (region, message, file) = fresh();
        let mut queue = region.queue(1).unwrap();
        assert_eq!(queue.reconcile(8, 0).unwrap(), Resume::default());
        queue.fetched(3);
        queue.completing(3);
        queue.completed(3, 1);
        let mut again = InflightRegion::map(&message, file).unwrap().queue(1).unwrap();
        assert_eq!(again.reconcile(8, 1).unwrap(), Resume { replay: vec![], next_avail: Some(1) });
    }

    #[test]
    fn open_heads_are_replayed_in_the_order_of_their_fetch() {
        let (region, ..) = fresh();
        let mut queue = region.queue(0).unwrap();
        queue.reconcile(8, 0).unwrap();
        for head in [5, 2, 7] {
            queue.fetched(head);
        }
        queue.completing(2);
        queue.completed(2, 1);
        let mut again = region.queue(0).unwrap();
        assert_eq!(again.reconcile(8, 1).unwrap(), Resume { replay: vec![5, 7], next_avail: Some(3) });
    }

    #[test]
    fn a_crash_at_each_step_of_a_completion_neither_loses_nor_repeats_what_the_ring_shows() {
        for step in 0..3 {
            let (region, ..) = fresh();
            let mut queue = region.queue(0).unwrap();
            queue.reconcile(8, 0).unwrap();
            queue.fetched(1);
            queue.fetched(4);
            queue.completing(1);
            let ring_used_idx = u16::from(step > 0);
            if step > 1 {
                queue.flag(1).store(0, Ordering::Release);
            }
            let resume = region.queue(0).unwrap().reconcile(8, ring_used_idx).unwrap();
            let expected = if step == 0 { vec![1, 4] } else { vec![4] };
            assert_eq!(resume, Resume { replay: expected, next_avail: Some(2) }, "step {step}");
        }
    }

    #[test]
    fn a_region_of_another_history_is_refused_unless_it_is_idle() {
        let (region, ..) = fresh();
        let mut queue = region.queue(0).unwrap();
        queue.reconcile(8, 100).unwrap();
        assert_eq!(region.queue(0).unwrap().reconcile(8, 0).unwrap(), Resume::default());
        queue.fetched(1);
        assert!(matches!(region.queue(0).unwrap().reconcile(8, 60), Err(InflightError::Diverged { .. })));
        assert!(matches!(region.queue(0).unwrap().reconcile(16, 0), Err(InflightError::TooShort { .. })));
    }

    #[test]
    fn shapes_and_sizes_from_outside_are_bounded() {
        assert!(InflightRegion::create(0, 8).is_err());
        assert!(InflightRegion::create(2, QUEUE_SIZE_MAX + 1).is_err());
        let (_, message, file) = fresh();
        let small = VhostUserInflight::new(message.mmap_size - 1, 0, 2, 8);
        assert!(InflightRegion::map(&small, file.try_clone().unwrap()).is_err());
        let beyond = VhostUserInflight::new(message.mmap_size, 4096, 2, 8);
        assert!(InflightRegion::map(&beyond, file).is_err());
    }

    #[test]
    fn whoever_gets_the_region_cannot_cut_it_short() {
        let (region, message, file) = fresh();
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(message.mmap_size + 1).is_err());
        region.queue(0).unwrap().fetched(3);
    }
}
