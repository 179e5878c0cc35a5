//! The PCI bus: one bus, one host bridge, cards with a single function, configuration mechanism #1
//! (PCI 3.0, section 3.2.2.3.2).

pub mod config;
pub mod msix;

use super::layout;
use super::limits::{SLOT_FIRST, SLOT_LAST};
use config::ConfigSpace;
use std::ops::Range;

const ENABLE: u32 = 1 << 31;
/// A made-up host bridge of the vendor that virtio devices have too.
const BRIDGE_VENDOR: u16 = 0x1b36;
const BRIDGE_DEVICE: u16 = 0x0008;
const BRIDGE_CLASS: u32 = 0x06_0000;

/// A card with one function.
pub trait Card: Send {
    fn config_read(&mut self, offset: u8, data: &mut [u8]);
    fn config_write(&mut self, offset: u8, data: &[u8]);
    /// Where its memory is now, if it is decoded.
    fn window(&self) -> Option<Range<u64>>;
    fn memory_read(&mut self, offset: u64, data: &mut [u8]);
    fn memory_write(&mut self, offset: u64, data: &[u8]);
}

pub struct Bus {
    address: u32,
    bridge: ConfigSpace,
    slots: Vec<Option<Box<dyn Card>>>,
}

impl Default for Bus {
    fn default() -> Bus {
        Bus {
            address: 0,
            bridge: ConfigSpace::new(BRIDGE_VENDOR, BRIDGE_DEVICE, BRIDGE_CLASS),
            slots: (0..=SLOT_LAST).map(|_| None).collect(),
        }
    }
}

impl Bus {
    pub fn free_slot(&self) -> Option<u8> {
        (SLOT_FIRST..=SLOT_LAST).find(|slot| self.slots[usize::from(*slot)].is_none())
    }

    /// `slot` must be a free one.
    pub fn insert(&mut self, slot: u8, card: Box<dyn Card>) {
        self.slots[usize::from(slot)] = Some(card);
    }

    pub fn remove(&mut self, slot: u8) -> Option<Box<dyn Card>> {
        self.slots.get_mut(usize::from(slot))?.take()
    }

    pub fn card(&mut self, slot: u8) -> Option<&mut Box<dyn Card>> {
        self.slots.get_mut(usize::from(slot))?.as_mut()
    }

    /// Whether a port belongs to the configuration mechanism. One byte inside the address register is
    /// not a part of it: the reset port.
    pub fn owns(port: u16, len: usize) -> bool {
        (port == layout::PCI_ADDRESS_PORT && len == 4)
            || (layout::PCI_DATA_PORT..layout::PCI_DATA_PORT + 4).contains(&port)
    }

    pub fn port_read(&mut self, port: u16, data: &mut [u8]) {
        if port == layout::PCI_ADDRESS_PORT {
            return copy(&self.address.to_le_bytes(), data);
        }
        data.fill(0xff);
        match self.target(port, data.len()) {
            Some((0, offset)) => self.bridge.read(offset, data),
            Some((slot, offset)) => {
                if let Some(card) = self.card(slot) {
                    card.config_read(offset, data);
                }
            }
            None => {}
        }
    }

    pub fn port_write(&mut self, port: u16, data: &[u8]) {
        if port == layout::PCI_ADDRESS_PORT {
            if let Ok(bytes) = data.try_into() {
                self.address = u32::from_le_bytes(bytes);
            }
            return;
        }
        match self.target(port, data.len()) {
            Some((0, offset)) => self.bridge.write(offset, data),
            Some((slot, offset)) => {
                if let Some(card) = self.card(slot) {
                    card.config_write(offset, data);
                }
            }
            None => {}
        }
    }

    /// Slot and register behind the data port; none where nothing can be.
    fn target(&self, port: u16, len: usize) -> Option<(u8, u8)> {
        let within = port.checked_sub(layout::PCI_DATA_PORT)?;
        let (bus, slot) = (self.address >> 16 & 0xff, (self.address >> 11 & 0x1f) as u8);
        let function = self.address >> 8 & 7;
        let fits = usize::from(within) + len <= 4;
        let offset = (self.address & 0xfc) as u8 + within as u8;
        (self.address & ENABLE != 0 && bus == 0 && function == 0 && fits).then_some((slot, offset))
    }

    pub fn memory_read(&mut self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((card, offset)) = self.at(address, data.len()) {
            card.memory_read(offset, data);
        }
    }

    pub fn memory_write(&mut self, address: u64, data: &[u8]) {
        if let Some((card, offset)) = self.at(address, data.len()) {
            card.memory_write(offset, data);
        }
    }

    fn at(&mut self, address: u64, len: usize) -> Option<(&mut Box<dyn Card>, u64)> {
        let end = address.checked_add(len as u64)?;
        self.slots.iter_mut().flatten().find_map(|card| {
            let window = card.window()?;
            (window.start <= address && end <= window.end).then(|| (card, address - window.start))
        })
    }
}

/// As much of `from` as `to` takes; the rest of `to` stays.
fn copy(from: &[u8], to: &mut [u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read32(bus: &mut Bus, slot: u32, offset: u32) -> u32 {
        bus.port_write(layout::PCI_ADDRESS_PORT, &(ENABLE | slot << 11 | offset).to_le_bytes());
        let mut data = [0; 4];
        bus.port_read(layout::PCI_DATA_PORT, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_bridge_is_there_and_empty_slots_read_as_ones() {
        let mut bus = Bus::default();
        assert_eq!(read32(&mut bus, 0, 0), u32::from(BRIDGE_DEVICE) << 16 | u32::from(BRIDGE_VENDOR));
        assert_eq!(read32(&mut bus, 0, 8) >> 8, BRIDGE_CLASS);
        assert_eq!(read32(&mut bus, 3, 0), !0);
        assert_eq!(read32(&mut bus, 31, 0), !0);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(ops in proptest::collection::vec((any::<bool>(), 0xcf0u16..0xd08, 0usize..9, any::<u32>()), 0..200)) {
            let mut bus = Bus::default();
            for (write, port, len, value) in ops {
                let mut data = value.to_le_bytes().repeat(2);
                data.truncate(len);
                if !Bus::owns(port, len) { continue; }
                if write { bus.port_write(port, &data) } else { bus.port_read(port, &mut data) }
                bus.memory_read(u64::from(value), &mut data);
                bus.memory_write(u64::MAX - 2, &data);
            }
        }
    }
}
