//! The 256 bytes of a function's configuration space (PCI 3.0, chapter 6): values, and which bits a
//! guest can change. One memory BAR of 32 bits.

use std::ops::Range;

const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// `class` is base class, subclass and interface.
    pub fn new(vendor: u16, device: u16, class: u32) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        space.set(0, &vendor.to_le_bytes());
        space.set(2, &device.to_le_bytes());
        // The revision is 1: a modern virtio device has at least that.
        space.set(8, &(class << 8 | 1).to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // Cache line size and interrupt line: for the guest to keep.
        space.writable[0x0c] = 0xff;
        space.writable[0x3c] = 0xff;
        space
    }

    pub fn set_subsystem(&mut self, vendor: u16, device: u16) {
        self.set(SUBSYSTEM, &vendor.to_le_bytes());
        self.set(SUBSYSTEM + 2, &device.to_le_bytes());
    }

    /// Gives BAR 0 `bytes` of memory, a power of two of at least 16.
    pub fn set_memory_bar(&mut self, bytes: u32) {
        assert!(bytes.is_power_of_two() && bytes >= 16);
        self.writable[BAR0..BAR0 + 4].copy_from_slice(&(!(bytes - 1)).to_le_bytes());
    }

    /// Appends a capability whose bytes after the link are `body`; `writable` marks bits that the guest
    /// may change, from the start of `body`. Answers where it is.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= SIZE, "the capabilities of our own devices fit");
        self.bytes[self.last_link] = at as u8;
        self.bytes[at] = id;
        self.set(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        let status = self.word(STATUS) | STATUS_CAPABILITIES;
        self.set(STATUS, &status.to_le_bytes());
        at as u8
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub fn read(&self, offset: u8, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..SIZE).zip(data) {
            *byte = self.bytes[at];
        }
    }

    pub fn write(&mut self, offset: u8, data: &[u8]) {
        for (at, byte) in (usize::from(offset)..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    /// What BAR 0 decodes now.
    pub fn window(&self) -> Option<Range<u64>> {
        let le = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let mask = le(&self.writable[BAR0..BAR0 + 4]);
        let start = u64::from(le(&self.bytes[BAR0..BAR0 + 4]) & mask);
        let bytes = u64::from(!mask) + 1;
        let decoded = mask != 0 && start != 0 && self.word(COMMAND) & COMMAND_MEMORY != 0;
        decoded.then(|| start..start + bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = ConfigSpace::new(1, 2, 0x01_8000);
        space.set_memory_bar(0x8000);
        space.write(0x10, &[0xff; 4]);
        let mut bar = [0; 4];
        space.read(0x10, &mut bar);
        assert_eq!(u32::from_le_bytes(bar), 0xffff_8000);
        space.write(0x10, &0xd000_0000u32.to_le_bytes());
        assert_eq!(space.window(), None, "not decoded yet");
        space.write(4, &[2, 0]);
        assert_eq!(space.window(), Some(0xd000_0000..0xd000_8000));
        space.write(0, &[9, 9, 9, 9]);
        let mut id = [0; 4];
        space.read(0, &mut id);
        assert_eq!(id, [1, 0, 2, 0], "identity is fixed");
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = ConfigSpace::new(1, 2, 0);
        let first = space.add_capability(9, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[0, 0], &[0, 0xc0]);
        let byte = |space: &ConfigSpace, at: u8| {
            let mut byte = [0];
            space.read(at, &mut byte);
            byte[0]
        };
        assert_eq!(
            (byte(&space, 0x34), byte(&space, first + 1), byte(&space, second + 1)),
            (first, second, 0)
        );
        assert_eq!(second % 4, 0);
        space.write(second + 2, &[0xff, 0xff]);
        assert_eq!((byte(&space, second + 2), byte(&space, second + 3)), (0, 0xc0));
        space.write(255, &[1, 2, 3, 4]);
    }
}
