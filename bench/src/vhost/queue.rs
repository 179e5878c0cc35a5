//! One split virtqueue with its memory, driven from the guest's side (virtio 1.2 section 2.7, event index negotiated).
//!
//! | offset | what |
//! |---|---|
//! | 0 | descriptors |
//! | 0x8000 | avail ring |
//! | 0xc000 | used ring |
//! | 0x10000 | header and status of each slot, 32 bytes apart |
//! | 0x100000 | data of each slot |

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const DESCRIPTORS_PER_SLOT: u16 = 3;
const AVAIL: usize = 0x8000;
const USED: usize = 0xc000;
const HEADERS: usize = 0x1_0000;
const HEADER_STRIDE: usize = 32;
const DATA: usize = 0x10_0000;
/// So that three descriptors a slot fit a queue of the largest size that back ends accept.
pub const DEPTH_MAX: u16 = 340;
pub const BLOCK_BYTES_MAX: u32 = 4 << 20;

const F_VERSION_1: u64 = 1 << 32;
const F_PROTOCOL: u64 = 1 << 30;
const F_EVENT_IDX: u64 = 1 << 29;
const F_FLUSH: u64 = 1 << 9;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Read { sector: u64 },
    Write { sector: u64 },
    Flush,
}

pub struct Device {
    front: Frontend,
    map: MmapRegion<()>,
    /// Keeps the descriptor that the back end was given valid while messages may still need it.
    _file: File,
    size: u16,
    block_bytes: u32,
    kick: EventFd,
    call: EventFd,
    avail: u16,
    kicked: u16,
    used: u16,
    event_idx: bool,
    pub capacity_bytes: u64,
}

impl Device {
    /// Connects and starts queue 0 for `depth` slots of `block_bytes` each.
    pub fn connect(socket: &Path, depth: u16, block_bytes: u32) -> Result<Device> {
        ensure!((1..=DEPTH_MAX).contains(&depth), "a depth is 1 to {DEPTH_MAX}");
        ensure!(
            block_bytes.is_multiple_of(512) && (512..=BLOCK_BYTES_MAX).contains(&block_bytes),
            "a block is a multiple of 512 and at most {BLOCK_BYTES_MAX} bytes"
        );
        let size = (depth * DESCRIPTORS_PER_SLOT).next_power_of_two().max(64);
        let bytes = (DATA + usize::from(depth) * block_bytes as usize).next_multiple_of(2 << 20);
        let file = memory(bytes)?;
        let map =
            MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes).context("shared memory")?;
        fill(&map, bytes)?;

        let mut front =
            Frontend::connect(socket, 1).with_context(|| format!("connecting to {}", socket.display()))?;
        front.set_owner()?;
        let features = front.get_features()?;
        ensure!(features & F_VERSION_1 != 0, "the back end is no virtio 1 device");
        ensure!(
            features & F_PROTOCOL != 0,
            "the back end offers no protocol features, so no configuration space"
        );
        let features = features & (F_VERSION_1 | F_PROTOCOL | F_EVENT_IDX | F_FLUSH);
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ;
        let protocol = front.get_protocol_features()? & wanted;
        ensure!(
            protocol.contains(VhostUserProtocolFeatures::CONFIG),
            "the back end offers no configuration space"
        );
        front.set_protocol_features(protocol)?;
        front.set_features(features)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let (_, space) = front.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60])?;
        let sectors: [u8; 8] =
            space.get(..8).and_then(|raw| raw.try_into().ok()).context("short configuration")?;

        let base = map.as_ptr() as u64;
        front.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: base,
            memory_size: bytes as u64,
            userspace_addr: base,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        }])?;
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        front.set_vring_num(0, size)?;
        front.set_vring_base(0, 0)?;
        front.set_vring_addr(
            0,
            &VringConfigData {
                queue_max_size: size,
                queue_size: size,
                flags: 0,
                desc_table_addr: base,
                used_ring_addr: base + USED as u64,
                avail_ring_addr: base + AVAIL as u64,
                log_addr: None,
            },
        )?;
        front.set_vring_call(0, &call)?;
        front.set_vring_kick(0, &kick)?;
        front.set_vring_enable(0, true)?;
        Ok(Device {
            front,
            map,
            _file: file,
            size,
            block_bytes,
            kick,
            call,
            avail: 0,
            kicked: 0,
            used: 0,
            event_idx: features & F_EVENT_IDX != 0,
            capacity_bytes: u64::from_le_bytes(sectors).saturating_mul(512),
        })
    }

    fn u16(&self, at: usize) -> Result<&AtomicU16> {
        Ok(self.map.get_atomic_ref(at)?)
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, at: usize) -> Result<()> {
        self.map.get_ref(at)?.store(value);
        Ok(())
    }

    /// Puts a request into `slot`; [`Device::publish`] makes it visible.
    pub fn submit(&mut self, slot: u16, request: Request) -> Result<()> {
        let base = self.map.as_ptr() as u64;
        let header = HEADERS + usize::from(slot) * HEADER_STRIDE;
        let (kind, sector, data_flags) = match request {
            Request::Read { sector } => (0u64, sector, NEXT | WRITE),
            Request::Write { sector } => (1, sector, NEXT),
            Request::Flush => (4, 0, 0),
        };
        self.put(kind, header)?;
        self.put(sector, header + 8)?;
        self.put(0xffu8, header + 16)?;
        let first = slot * DESCRIPTORS_PER_SLOT;
        let flush = request == Request::Flush;
        let data = base + (DATA + usize::from(slot) * self.block_bytes as usize) as u64;
        self.descriptor(first, base + header as u64, 16, NEXT, first + if flush { 2 } else { 1 })?;
        if !flush {
            self.descriptor(first + 1, data, self.block_bytes, data_flags, first + 2)?;
        }
        self.descriptor(first + 2, base + header as u64 + 16, 1, WRITE, 0)?;
        self.put(first, AVAIL + 4 + usize::from(self.avail % self.size) * 2)?;
        self.avail = self.avail.wrapping_add(1);
        Ok(())
    }

    fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) -> Result<()> {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.put([addr, rest], usize::from(index) * 16)
    }

    /// Shows what was submitted to the device, and kicks it if it wants to be.
    pub fn publish(&mut self) -> Result<()> {
        if self.avail == self.kicked {
            return Ok(());
        }
        self.u16(AVAIL + 2)?.store(self.avail, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.u16(USED + 4 + usize::from(self.size) * 8)?.load(Ordering::Relaxed);
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(self.kicked)
        } else {
            self.u16(USED)?.load(Ordering::Relaxed) & 1 == 0
        };
        self.kicked = self.avail;
        if wanted {
            self.kick.write(1)?;
        }
        Ok(())
    }

    /// The slot of the next completion, if there is one; an error if the device failed it.
    pub fn completed(&mut self) -> Result<Option<u16>> {
        if self.u16(USED + 2)?.load(Ordering::Acquire) == self.used {
            return Ok(None);
        }
        let head: u32 = self.map.get_ref(USED + 4 + usize::from(self.used % self.size) * 8)?.load();
        self.used = self.used.wrapping_add(1);
        ensure!(head < u32::from(self.size), "the device completed request {head}, which does not exist");
        let slot = head as u16 / DESCRIPTORS_PER_SLOT;
        let status: u8 = self.map.get_ref(HEADERS + usize::from(slot) * HEADER_STRIDE + 16)?.load();
        ensure!(status == 0, "the device answered status {status}");
        Ok(Some(slot))
    }

    /// Waits for the interrupt of the next completion.
    pub fn wait(&mut self, timeout: Duration) -> Result<()> {
        if self.event_idx {
            self.u16(AVAIL + 4 + usize::from(self.size) * 2)?.store(self.used, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        if self.u16(USED + 2)?.load(Ordering::Acquire) != self.used {
            return Ok(());
        }
        let mut poll = libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives on this frame.
        let ready = unsafe { libc::poll(&mut poll, 1, timeout.as_millis().min(60_000) as i32) };
        if ready == 0 {
            bail!("the device completed nothing for {} s", timeout.as_secs());
        }
        let _ = self.call.read();
        Ok(())
    }

    /// Stops the queue in order.
    pub fn stop(self) -> Result<()> {
        self.front.get_vring_base(0)?;
        Ok(())
    }
}

fn memory(bytes: usize) -> Result<File> {
    // SAFETY: a NUL-terminated literal; the descriptor that comes back is owned by the file alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"gabion-bench".as_ptr(), libc::MFD_CLOEXEC);
        ensure!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    };
    file.set_len(bytes as u64)?;
    Ok(file)
}

/// Data that neither compresses nor repeats within a block.
fn fill(map: &MmapRegion<()>, bytes: usize) -> Result<()> {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut page = Vec::with_capacity(4096);
    for at in (DATA..bytes).step_by(4096) {
        page.clear();
        while page.len() < 4096 {
            page.extend(xorshift(&mut seed).to_le_bytes());
        }
        map.get_slice(at, 4096)?.write_slice(&page, 0)?;
    }
    Ok(())
}

pub fn xorshift(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}
