//! What vCPUs reach when they leave the guest: ports and device memory, and how the machine ends.

use super::layout;
use super::pci::{Bus, Card};
use super::power::{Effect, Power};
use super::serial::Port;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};
use vmm_sys_util::eventfd::EventFd;

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "how", content = "detail")]
pub enum End {
    PoweredOff,
    /// Restarting is whoever started it's decision.
    RestartAsked,
    Failed(String),
}

pub struct Board {
    vm: Arc<VmFd>,
    pub serial: Port,
    // vCPUs leave the guest at the same time, so each part has a lock of its own. No lock is taken
    // inside another.
    power: Mutex<Power>,
    bus: Mutex<Bus>,
    end: Mutex<Option<End>>,
    /// Wakes the main thread when there is an end.
    wake: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Board {
    pub fn new(vm: Arc<VmFd>, serial: Port, wake: EventFd) -> Board {
        Board { vm, serial, power: Mutex::default(), bus: Mutex::default(), end: Mutex::default(), wake }
    }

    pub fn bus(&self) -> MutexGuard<'_, Bus> {
        lock(&self.bus)
    }

    /// Whether there is an end; the first one counts.
    pub fn end(&self) -> Option<End> {
        lock(&self.end).clone()
    }

    pub fn has_ended(&self) -> bool {
        lock(&self.end).is_some()
    }

    fn finish(&self, end: End) {
        lock(&self.end).get_or_insert(end);
        // The main thread looks at `end` whenever it wakes for anything.
        let _ = self.wake.write(1);
    }

    pub fn restart_asked(&self) {
        self.finish(End::RestartAsked);
    }

    pub fn failed(&self, why: String) {
        self.finish(End::Failed(why));
    }

    fn with_power<T>(&self, change: impl FnOnce(&mut Power) -> T) -> T {
        let mut power = lock(&self.power);
        let before = power.interrupt();
        let result = change(&mut power);
        let after = power.interrupt();
        if before != after
            && let Err(error) = self.vm.set_irq_line(layout::SCI_IRQ, after)
        {
            tracing::error!(%error, "cannot set the level of the ACPI interrupt");
        }
        result
    }

    pub fn press_power_button(&self) {
        self.with_power(Power::press_button);
    }

    /// `slot` is free.
    pub fn plug(&self, slot: u8, card: Box<dyn Card>, running: bool) {
        self.bus().insert(slot, card);
        if running {
            self.with_power(|power| power.plugged(slot));
        }
    }

    pub fn ask_to_unplug(&self, slot: u8) {
        self.with_power(|power| power.ask_to_unplug(slot));
    }

    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        if let Some(offset) = serial_register(port) {
            data.iter_mut().for_each(|byte| *byte = self.serial.read(offset));
        } else if Bus::owns(port, data.len()) {
            self.bus().port_read(port, data);
        } else if Power::owns(port) {
            self.with_power(|power| power.read(port, data));
        } else {
            data.fill(0xff);
        }
    }

    pub fn port_write(&self, port: u16, data: &[u8]) {
        if let Some(offset) = serial_register(port) {
            data.iter().for_each(|byte| self.serial.write(offset, *byte));
        } else if Bus::owns(port, data.len()) {
            self.bus().port_write(port, data);
        } else if Power::owns(port) {
            match self.with_power(|power| power.write(port, data)) {
                Effect::None => {}
                Effect::PowerOff => self.finish(End::PoweredOff),
                Effect::Reset => self.finish(End::RestartAsked),
                Effect::Ejected(slots) => self.eject(slots),
            }
        }
    }

    fn eject(&self, slots: u32) {
        for slot in (0..32).filter(|slot| slots & 1 << slot != 0) {
            // The card stops its device when it is dropped, outside of the bus's lock.
            let card = self.bus().remove(slot);
            drop(card);
        }
    }

    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        self.bus().memory_read(address, data);
    }

    pub fn memory_write(&self, address: u64, data: &[u8]) {
        self.bus().memory_write(address, data);
    }
}

fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(layout::SERIAL_PORT).filter(|offset| *offset < 8).map(|offset| offset as u8)
}
