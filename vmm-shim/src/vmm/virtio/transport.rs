//! virtio over PCI, modern only (virtio 1.2, section 4.1). BAR 0:
//!
//! | offset | |
//! |---|---|
//! | 0 | common configuration |
//! | 0x1000 | ISR status (always 0: there is no INTx, only MSI-X) |
//! | 0x2000 | the device's own configuration |
//! | 0x3000 | doorbells, 4 bytes a queue |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |
//!
//! ```text
//!  reset ──ACKNOWLEDGE, DRIVER, FEATURES_OK──► negotiated ──DRIVER_OK──► running
//!    ▲                                             │ (rings not in RAM: NEEDS_RESET)  │
//!    └── stopping: status keeps its value until the device touches no ring ◄──status 0┘
//! ```
//!
//! A driver waits until it reads status 0 after a reset, so a device can take its time to stop while no
//! vCPU waits for it.

use super::{Device, F_VERSION_1, Ring, Rings};
use crate::vmm::interrupts::Interrupts;
use crate::vmm::limits::{QUEUE_SIZE_MAX, QUEUES_MAX};
use crate::vmm::memory;
use crate::vmm::pci::Card;
use crate::vmm::pci::config::ConfigSpace;
use crate::vmm::pci::msix::{self, Msix};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
pub const BAR_BYTES: u32 = 0x8000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const OWN: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const REGION_BYTES: u64 = 0x1000;
const COMMON_BYTES: usize = 0x40;
const DOORBELL_BYTES: u64 = 4;
const NO_VECTOR: u16 = 0xffff;

const ACKNOWLEDGE_AND_DRIVER: u8 = 1 | 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

const CAPABILITY_VENDOR: u8 = 0x09;
/// Where the fields of the "access through configuration space" capability are from its start.
const ACCESS_OFFSET: u8 = 8;
const ACCESS_DATA: u8 = 16;

struct Queue {
    size: u16,
    enabled: bool,
    vector: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    kick: EventFd,
}

pub struct VirtioCard {
    config: ConfigSpace,
    msix: Msix,
    msix_at: u8,
    access_at: u8,
    device: Box<dyn Device>,
    memory: GuestMemoryMmap,
    interrupts: Arc<dyn Interrupts>,
    queues: Vec<Queue>,
    /// Where the doorbells are registered.
    doorbells_at: Option<u64>,
    status: u8,
    stopping: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
}

impl VirtioCard {
    /// `kind` is the virtio device type, `class` its PCI class; `at` is where BAR 0 is before the guest
    /// places it itself.
    pub fn new(
        kind: u16,
        class: u32,
        at: u32,
        device: Box<dyn Device>,
        memory: GuestMemoryMmap,
        interrupts: Arc<dyn Interrupts>,
    ) -> io::Result<VirtioCard> {
        let queue_count = device.queue_count().min(QUEUES_MAX);
        let msix = Msix::new(queue_count + 1, interrupts.clone())?;
        let mut queues = Vec::new();
        for _ in 0..queue_count {
            queues.push(Queue::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?));
        }
        let mut config = ConfigSpace::new(VENDOR, DEVICE_BASE + kind, class);
        config.set_subsystem(VENDOR, DEVICE_BASE + kind);
        config.set_memory_bar(BAR_BYTES);
        config.write(0x10, &at.to_le_bytes());
        for (cfg_type, offset, bytes) in [
            (1, COMMON, COMMON_BYTES as u64),
            (3, ISR, REGION_BYTES),
            (4, OWN, REGION_BYTES),
            (2, DOORBELLS, u64::from(queue_count) * DOORBELL_BYTES),
        ] {
            let extra: &[u8] = if cfg_type == 2 { &[DOORBELL_BYTES as u8, 0, 0, 0] } else { &[] };
            config.add_capability(CAPABILITY_VENDOR, &capability(cfg_type, offset, bytes, extra), &[]);
        }
        let access = capability(5, 0, 0, &[0; 4]);
        // The BAR's number, the offset and the length are the driver's.
        let access_writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let access_at = config.add_capability(CAPABILITY_VENDOR, &access, &access_writable);
        let mut body = queue_count.to_le_bytes().to_vec();
        body.extend((MSIX_TABLE as u32).to_le_bytes());
        body.extend((MSIX_PENDING as u32).to_le_bytes());
        let writable = msix::CONTROL_WRITABLE.to_le_bytes();
        let msix_at = config.add_capability(msix::CAPABILITY_ID, &body, &writable);
        Ok(VirtioCard {
            config,
            msix,
            msix_at,
            access_at,
            device,
            memory,
            interrupts,
            queues,
            doorbells_at: None,
            status: 0,
            stopping: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
        })
    }

    /// Keeps the doorbells where the guest put the BAR.
    fn place_doorbells(&mut self) {
        let now = self.config.window().map(|w| w.start + DOORBELLS);
        if now == self.doorbells_at {
            return;
        }
        let old = std::mem::replace(&mut self.doorbells_at, now);
        for (queue, offset) in self.queues.iter().zip((0..).step_by(DOORBELL_BYTES as usize)) {
            let stopped = old.map_or(Ok(()), |at| self.interrupts.stop_ringing(&queue.kick, at + offset));
            let rings = now.map_or(Ok(()), |at| self.interrupts.ring_on_write(&queue.kick, at + offset));
            if let Err(error) = stopped.and(rings) {
                // Writes then come here and are passed on, only slower.
                tracing::warn!(%error, "KVM does not take a doorbell");
            }
        }
    }

    fn common(&mut self) -> [u8; COMMON_BYTES] {
        if self.stopping && self.device.is_stopped() {
            self.stopping = false;
            self.status = 0;
        }
        let word = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut raw = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &word(self.device.features(), self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &word(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status, self.device.config_generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        raw
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        if let (0x20 | 0x28 | 0x30, 8) = (offset, data.len()) {
            self.write_common(offset, &data[..4]);
            return self.write_common(offset + 4, &data[4..]);
        }
        let value = match *data {
            [a] => u32::from(a),
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return,
        };
        let vector = |value: u32| if value < u32::from(self.msix.count()) { value as u16 } else { NO_VECTOR };
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value,
            (0x08, 4) => self.driver_feature_select = value,
            (0x0c, 4) => self.set_driver_features(value),
            (0x10, 2) => self.config_vector = vector(value),
            (0x14, 1) => self.set_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) => {
                let vector = vector(value);
                if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
                    queue.vector = vector;
                }
            }
            _ => self.write_queue(offset, data.len(), value),
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        // Fixed once negotiated.
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features = self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u32) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        // A queue that is enabled does not move.
        if queue.enabled {
            return;
        }
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match (offset, len) {
            (0x18, 2) if value.is_power_of_two() && value <= u32::from(QUEUE_SIZE_MAX) => {
                queue.size = value as u16;
            }
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20, 4) => queue.descriptors = low(queue.descriptors),
            (0x24, 4) => queue.descriptors = high(queue.descriptors),
            (0x28, 4) => queue.available = low(queue.available),
            (0x2c, 4) => queue.available = high(queue.available),
            (0x30, 4) => queue.used = low(queue.used),
            (0x34, 4) => queue.used = high(queue.used),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        if self.stopping {
            return;
        }
        let mut value = value;
        let newly = value & !self.status;
        if newly & FEATURES_OK != 0 {
            let acceptable = self.driver_features & !self.device.features() == 0
                && self.driver_features & F_VERSION_1 != 0
                && value & ACKNOWLEDGE_AND_DRIVER == ACKNOWLEDGE_AND_DRIVER;
            if !acceptable {
                value &= !FEATURES_OK;
            }
        }
        // Bits are only ever added; NEEDS_RESET is ours.
        self.status |= value & !NEEDS_RESET;
        if newly & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
            match self.rings() {
                Ok(rings) => self.device.start(rings),
                Err(why) => {
                    tracing::warn!(why, "a guest's driver set its device up wrongly");
                    self.status |= NEEDS_RESET;
                }
            }
        }
    }

    fn rings(&self) -> Result<Rings, &'static str> {
        let mut rings = Vec::new();
        for (index, queue) in self.queues.iter().enumerate().filter(|(_, q)| q.enabled) {
            let size = u64::from(queue.size);
            let parts = [
                (queue.descriptors, 16 * size, 16),
                (queue.available, 6 + 2 * size, 2),
                (queue.used, 6 + 8 * size, 4),
            ];
            let sound = |(at, bytes, align): (u64, u64, u64)| {
                at.is_multiple_of(align) && memory::holds(&self.memory, at, bytes)
            };
            if !parts.into_iter().all(sound) {
                return Err("a virtqueue is not in RAM");
            }
            let clone = |fd: &EventFd| fd.try_clone().map_err(|_| "no more descriptors");
            let call = match self.msix.signal(queue.vector) {
                Some(fd) => clone(fd)?,
                // A queue without interrupts.
                None => EventFd::new(libc::EFD_NONBLOCK).map_err(|_| "no more descriptors")?,
            };
            rings.push(Ring {
                index: index as u16,
                size: queue.size,
                descriptors: queue.descriptors,
                available: queue.available,
                used: queue.used,
                kick: clone(&queue.kick)?,
                call,
            });
        }
        let config_call = self.msix.signal(self.config_vector).and_then(|fd| fd.try_clone().ok());
        Ok(Rings { features: self.driver_features, rings, config_call })
    }

    fn reset(&mut self) {
        if self.status & DRIVER_OK != 0 && !self.stopping {
            self.device.stop();
            self.stopping = true;
        }
        if !self.stopping {
            self.status = 0;
        }
        self.driver_features = 0;
        (self.device_feature_select, self.driver_feature_select) = (0, 0);
        self.config_vector = NO_VECTOR;
        self.queue_select = 0;
        for queue in &mut self.queues {
            (queue.size, queue.enabled, queue.vector) = (QUEUE_SIZE_MAX, false, NO_VECTOR);
            (queue.descriptors, queue.available, queue.used) = (0, 0, 0);
        }
    }

    fn access(&self) -> (u64, usize) {
        let le32 = |at: u8| {
            let mut raw = [0; 4];
            self.config.read(self.access_at + at, &mut raw);
            u32::from_le_bytes(raw)
        };
        (u64::from(le32(ACCESS_OFFSET)), le32(ACCESS_OFFSET + 4) as usize)
    }

    fn is_access(&self, offset: u8, len: usize) -> bool {
        offset == self.access_at + ACCESS_DATA
            && matches!(self.access(), (_, wanted @ (1 | 2 | 4)) if wanted <= len)
    }
}

/// The body of a virtio vendor capability: what follows identity and link.
fn capability(cfg_type: u8, offset: u64, bytes: u64, extra: &[u8]) -> Vec<u8> {
    const FIXED_BYTES: usize = 16;
    let mut body = vec![(FIXED_BYTES + extra.len()) as u8, cfg_type, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((bytes as u32).to_le_bytes());
    body.extend(extra);
    body
}

impl Queue {
    fn new(kick: EventFd) -> Queue {
        Queue {
            size: QUEUE_SIZE_MAX,
            enabled: false,
            vector: NO_VECTOR,
            descriptors: 0,
            available: 0,
            used: 0,
            kick,
        }
    }
}

impl Card for VirtioCard {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        if self.is_access(offset, data.len()) {
            let (at, len) = self.access();
            return self.memory_read(at, &mut data[..len]);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u8, data: &[u8]) {
        if self.is_access(offset, data.len()) {
            let (at, len) = self.access();
            return self.memory_write(at, &data[..len]);
        }
        self.config.write(offset, data);
        self.place_doorbells();
        let mut control = [0; 2];
        self.config.read(self.msix_at + 2, &mut control);
        self.msix.set_control(u16::from_le_bytes(control));
    }

    fn window(&self) -> Option<Range<u64>> {
        self.config.window()
    }

    fn memory_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % REGION_BYTES;
        match offset - within {
            COMMON => {
                let common = self.common();
                for (to, from) in data.iter_mut().zip(common.iter().skip(within as usize)) {
                    *to = *from;
                }
            }
            OWN => self.device.config_read(within, data),
            MSIX_TABLE => self.msix.table_read(within, data),
            MSIX_PENDING => self.msix.pending_read(within, data),
            _ => {}
        }
    }

    fn memory_write(&mut self, offset: u64, data: &[u8]) {
        let within = offset % REGION_BYTES;
        match offset - within {
            COMMON => self.write_common(within, data),
            DOORBELLS => {
                if let Some(queue) = self.queues.get((within / DOORBELL_BYTES) as usize) {
                    // A counter that is full is a doorbell that rings already.
                    let _ = queue.kick.write(1);
                }
            }
            MSIX_TABLE => self.msix.table_write(within, data),
            _ => {}
        }
    }
}

impl Drop for VirtioCard {
    fn drop(&mut self) {
        let Some(at) = self.doorbells_at else { return };
        for (queue, offset) in self.queues.iter().zip((0..).step_by(DOORBELL_BYTES as usize)) {
            if let Err(error) = self.interrupts.stop_ringing(&queue.kick, at + offset) {
                tracing::warn!(%error, "KVM keeps a doorbell of a card that is gone");
            }
        }
    }
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
