//! Interrupts that need no exit: event descriptors that KVM turns into MSIs, and the table of where
//! each goes.

use super::layout::FIRST_MSI_GSI;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// As many as KVM takes (`KVM_MAX_IRQ_ROUTES`).
const GSI_END: u32 = 4096;
const IO_APIC_PINS: u32 = 24;
const PIC_PINS: u32 = 16;

/// For waiting on it.
pub fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `fd` is borrowed, and that is what is answered.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Where a message-signalled interrupt goes (PCI 3.0, section 6.8.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

/// What devices need of the machine: interrupts and doorbells without exits.
pub trait Interrupts: Send + Sync {
    /// A free interrupt number; none when they have run out.
    fn allocate(&self) -> Option<u32>;
    fn free(&self, gsi: u32);
    fn route(&self, gsi: u32, message: Message) -> Result<(), kvm_ioctls::Error>;
    /// From now on the descriptor raises the interrupt, at once if it was signalled before.
    fn connect(&self, fd: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error>;
    fn disconnect(&self, fd: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error>;
    /// A guest's write to `address` signals the descriptor.
    fn ring_on_write(&self, fd: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error>;
    fn stop_ringing(&self, fd: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error>;
}

pub struct KvmInterrupts {
    vm: Arc<VmFd>,
    // Devices are programmed by any vCPU; KVM takes the table as a whole.
    routes: Mutex<BTreeMap<u32, Option<Message>>>,
}

impl KvmInterrupts {
    pub fn new(vm: Arc<VmFd>) -> KvmInterrupts {
        KvmInterrupts { vm, routes: Mutex::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Option<Message>>> {
        self.routes.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn irqchip_entry(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

/// The whole table: the fixed chips and every message.
fn table(messages: &BTreeMap<u32, Option<Message>>) -> Vec<kvm_irq_routing_entry> {
    let mut entries: Vec<_> = (0..IO_APIC_PINS).map(|p| irqchip_entry(p, KVM_IRQCHIP_IOAPIC, p)).collect();
    entries.extend((0..PIC_PINS).map(|pin| match pin {
        0..8 => irqchip_entry(pin, KVM_IRQCHIP_PIC_MASTER, pin),
        _ => irqchip_entry(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8),
    }));
    for (gsi, message) in messages {
        let Some(message) = message else { continue };
        let mut entry = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi.address_lo = message.address as u32;
        entry.u.msi.address_hi = (message.address >> 32) as u32;
        entry.u.msi.data = message.data;
        entries.push(entry);
    }
    entries
}

impl Interrupts for KvmInterrupts {
    fn allocate(&self) -> Option<u32> {
        let mut routes = self.lock();
        let gsi = (FIRST_MSI_GSI..GSI_END).find(|gsi| !routes.contains_key(gsi))?;
        routes.insert(gsi, None);
        Some(gsi)
    }

    fn free(&self, gsi: u32) {
        self.lock().remove(&gsi);
    }

    fn route(&self, gsi: u32, message: Message) -> Result<(), kvm_ioctls::Error> {
        let mut routes = self.lock();
        routes.insert(gsi, Some(message));
        let table =
            KvmIrqRouting::from_entries(&table(&routes)).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        self.vm.set_gsi_routing(&table)
    }

    fn connect(&self, fd: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error> {
        self.vm.register_irqfd(fd, gsi)
    }

    fn disconnect(&self, fd: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error> {
        self.vm.unregister_irqfd(fd, gsi)
    }

    fn ring_on_write(&self, fd: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error> {
        self.vm.register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
    }

    fn stop_ringing(&self, fd: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error> {
        self.vm.unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
    }
}
