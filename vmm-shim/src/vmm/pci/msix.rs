//! MSI-X (PCI 3.0, section 6.8): a table of messages in the card's memory. Each vector is an event
//! descriptor that KVM turns into the message, so whoever signals it needs no one here.
//!
//! A masked vector is a descriptor that is not connected: what is signalled meanwhile stays in it, shows
//! as pending, and is delivered when it is connected again.

use crate::vmm::interrupts::{Interrupts, Message, borrow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

pub const ENTRY_BYTES: u64 = 16;
pub const CAPABILITY_ID: u8 = 0x11;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
pub const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_MASK_ALL;
const VECTOR_MASKED: u32 = 1;

struct Vector {
    fd: EventFd,
    gsi: u32,
    address: u64,
    data: u32,
    control: u32,
    routed: Option<Message>,
    connected: bool,
}

pub struct Msix {
    control: u16,
    vectors: Vec<Vector>,
    interrupts: Arc<dyn Interrupts>,
}

impl Msix {
    pub fn new(count: u16, interrupts: Arc<dyn Interrupts>) -> io::Result<Msix> {
        let mut msix = Msix { control: 0, vectors: Vec::new(), interrupts };
        for _ in 0..count {
            let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            let gsi = msix
                .interrupts
                .allocate()
                .ok_or_else(|| io::Error::other("the machine has no more interrupts"))?;
            msix.vectors.push(Vector {
                fd,
                gsi,
                address: 0,
                data: 0,
                control: VECTOR_MASKED,
                routed: None,
                connected: false,
            });
        }
        Ok(msix)
    }

    pub fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// The descriptor of a vector, for somebody else to signal.
    pub fn signal(&self, vector: u16) -> Option<&EventFd> {
        self.vectors.get(usize::from(vector)).map(|v| &v.fd)
    }

    pub fn set_control(&mut self, control: u16) {
        self.control = control & CONTROL_WRITABLE;
        for index in 0..self.vectors.len() {
            self.settle(index);
        }
    }

    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let mut entry = [0; ENTRY_BYTES as usize];
        let Some(vector) = self.vectors.get((offset / ENTRY_BYTES) as usize) else { return };
        entry[..8].copy_from_slice(&vector.address.to_le_bytes());
        entry[8..12].copy_from_slice(&vector.data.to_le_bytes());
        entry[12..].copy_from_slice(&vector.control.to_le_bytes());
        for (to, from) in data.iter_mut().zip(&entry[(offset % ENTRY_BYTES) as usize..]) {
            *to = *from;
        }
    }

    /// Guests write whole fields: 4 bytes, or 8 that start an entry's half.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        if data.len() == 8 {
            self.table_write(offset, &data[..4]);
            return self.table_write(offset + 4, &data[4..]);
        }
        let index = (offset / ENTRY_BYTES) as usize;
        let (Some(vector), Ok(bytes)) = (self.vectors.get_mut(index), data.try_into()) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset % ENTRY_BYTES {
            0 => vector.address = vector.address & !0xffff_ffff | u64::from(value),
            4 => vector.address = vector.address & 0xffff_ffff | u64::from(value) << 32,
            8 => vector.data = value,
            12 => vector.control = value & VECTOR_MASKED,
            _ => return,
        }
        self.settle(index);
    }

    /// Pending bits, eight vectors a byte.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = at as usize * 8;
            let pending =
                self.vectors.iter().skip(first).take(8).map(|v| !v.connected && is_signalled(&v.fd));
            *byte = pending.enumerate().fold(0, |all, (bit, set)| all | u8::from(set) << bit);
        }
    }

    /// Everything as after power on.
    pub fn reset(&mut self) {
        self.control = 0;
        for index in 0..self.vectors.len() {
            let vector = &mut self.vectors[index];
            (vector.address, vector.data, vector.control) = (0, 0, VECTOR_MASKED);
            self.settle(index);
            // Nothing of an earlier driver is left to interrupt the next; an empty descriptor is no error.
            let _ = self.vectors[index].fd.read();
        }
    }

    /// Brings KVM in line with what the guest programmed.
    fn settle(&mut self, index: usize) {
        let open = self.control & CONTROL_WRITABLE == CONTROL_ENABLE;
        let vector = &mut self.vectors[index];
        let wanted = open && vector.control & VECTOR_MASKED == 0;
        let message = Message { address: vector.address, data: vector.data };
        let result = if wanted {
            let route = match vector.routed == Some(message) {
                true => Ok(()),
                false => self.interrupts.route(vector.gsi, message),
            };
            route.and_then(|()| {
                vector.routed = Some(message);
                if !vector.connected {
                    self.interrupts.connect(&vector.fd, vector.gsi)?;
                    vector.connected = true;
                }
                Ok(())
            })
        } else if vector.connected {
            vector.connected = false;
            self.interrupts.disconnect(&vector.fd, vector.gsi)
        } else {
            Ok(())
        };
        if let Err(error) = result {
            // The guest sees a device that does not interrupt, as with a message that goes nowhere.
            tracing::warn!(vector = index, %error, "KVM does not take an interrupt");
        }
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        for vector in &self.vectors {
            if vector.connected
                && let Err(error) = self.interrupts.disconnect(&vector.fd, vector.gsi)
            {
                tracing::warn!(%error, "KVM keeps an interrupt of a card that is gone");
            }
            self.interrupts.free(vector.gsi);
        }
    }
}

fn is_signalled(fd: &EventFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(borrow(fd), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Remembers what KVM would have been told.
    #[derive(Default)]
    pub struct Recorder {
        pub calls: Mutex<Vec<String>>,
        next: Mutex<u32>,
    }

    impl Recorder {
        pub fn take(&self) -> Vec<String> {
            std::mem::take(&mut self.calls.lock().unwrap())
        }
        fn note(&self, call: String) -> Result<(), kvm_ioctls::Error> {
            self.calls.lock().unwrap().push(call);
            Ok(())
        }
    }

    impl Interrupts for Recorder {
        fn allocate(&self) -> Option<u32> {
            let mut next = self.next.lock().unwrap();
            *next += 1;
            Some(*next)
        }
        fn free(&self, _gsi: u32) {}
        fn route(&self, gsi: u32, m: Message) -> Result<(), kvm_ioctls::Error> {
            self.note(format!("route {gsi} {:#x} {:#x}", m.address, m.data))
        }
        fn connect(&self, _fd: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error> {
            self.note(format!("connect {gsi}"))
        }
        fn disconnect(&self, _fd: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error> {
            self.note(format!("disconnect {gsi}"))
        }
        fn ring_on_write(&self, _fd: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error> {
            self.note(format!("ring {address:#x}"))
        }
        fn stop_ringing(&self, _fd: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error> {
            self.note(format!("stop {address:#x}"))
        }
    }

    #[test]
    fn a_vector_is_connected_only_while_it_is_unmasked() {
        let recorder = Arc::new(Recorder::default());
        let mut msix = Msix::new(2, recorder.clone()).unwrap();
        msix.table_write(16, &0xfee0_1000u32.to_le_bytes());
        msix.table_write(24, &0x41u32.to_le_bytes());
        msix.table_write(28, &0u32.to_le_bytes());
        assert!(recorder.take().is_empty(), "not enabled yet");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(recorder.take(), ["route 2 0xfee01000 0x41", "connect 2"]);
        msix.set_control(CONTROL_WRITABLE);
        assert_eq!(recorder.take(), ["disconnect 2"]);
        msix.signal(1).unwrap().write(1).unwrap();
        let mut pending = [0; 8];
        msix.pending_read(0, &mut pending);
        assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(recorder.take(), ["connect 2"], "the route is known");
        msix.reset();
        assert_eq!(recorder.take(), ["disconnect 2"]);
        assert!(msix.signal(1).unwrap().read().is_err(), "drained");
        assert!(msix.signal(2).is_none());
    }
}
