//! virtio devices (virtio 1.2): the PCI transport that is the same for all, and what it asks of each.

pub mod transport;

use vmm_sys_util::eventfd::EventFd;

pub const F_VERSION_1: u64 = 1 << 32;

/// One virtqueue as the driver set it up: checked to lie in RAM.
pub struct Ring {
    pub index: u16,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// The guest's doorbell.
    pub kick: EventFd,
    /// Interrupts the guest.
    pub call: EventFd,
}

/// What a device gets when its driver is ready.
pub struct Rings {
    pub features: u64,
    pub rings: Vec<Ring>,
    /// Interrupts the guest because the configuration changed.
    pub config_call: Option<EventFd>,
}

/// A device behind the transport. None of these waits for anybody: a vCPU calls them.
pub trait Device: Send {
    fn features(&self) -> u64;
    fn queue_count(&self) -> u16;
    fn config_generation(&self) -> u8;
    /// Reads the device's own configuration space; beyond its end are zeros.
    fn config_read(&self, offset: u64, data: &mut [u8]);
    fn start(&mut self, rings: Rings);
    /// Begins to stop; [`Device::is_stopped`] tells when no ring is touched any more.
    fn stop(&mut self);
    fn is_stopped(&self) -> bool;
}
