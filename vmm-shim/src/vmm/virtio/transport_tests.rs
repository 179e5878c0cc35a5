use super::*;
use crate::vmm::pci::msix::tests::Recorder;
use proptest::prelude::*;
use std::sync::Mutex;

#[derive(Default)]
struct Log {
    started: Option<Rings>,
    stopped: bool,
}

/// A device that notes what it is told and stops when the test says so.
struct Fake(Arc<Mutex<Log>>);

impl Device for Fake {
    fn features(&self) -> u64 {
        F_VERSION_1 | 0x20
    }
    fn queue_count(&self) -> u16 {
        2
    }
    fn config_generation(&self) -> u8 {
        7
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = at as u8;
        }
    }
    fn start(&mut self, rings: Rings) {
        let mut log = self.0.lock().unwrap();
        (log.started, log.stopped) = (Some(rings), false);
    }
    fn stop(&mut self) {}
    fn is_stopped(&self) -> bool {
        self.0.lock().unwrap().stopped
    }
}

fn card() -> (VirtioCard, Arc<Mutex<Log>>, Arc<Recorder>) {
    let (log, recorder) = (Arc::new(Mutex::new(Log::default())), Arc::new(Recorder::default()));
    let memory = memory::create(32 << 20).unwrap();
    let fake = Box::new(Fake(log.clone()));
    let card = VirtioCard::new(2, 0x01_8000, 0xd000_0000, fake, memory, recorder.clone()).unwrap();
    (card, log, recorder)
}

fn read(card: &mut VirtioCard, offset: u64, len: usize) -> u32 {
    let mut data = [0; 4];
    card.memory_read(offset, &mut data[..len]);
    u32::from_le_bytes(data)
}

fn write(card: &mut VirtioCard, offset: u64, len: usize, value: u32) {
    card.memory_write(offset, &value.to_le_bytes()[..len]);
}

fn negotiate(card: &mut VirtioCard, features: u64) -> u8 {
    write(card, 0x14, 1, 1);
    write(card, 0x14, 1, 3);
    for half in 0..2 {
        write(card, 0x08, 4, half);
        write(card, 0x0c, 4, (features >> (32 * half)) as u32);
    }
    write(card, 0x14, 1, 11);
    read(card, 0x14, 1) as u8
}

fn set_up_queue(card: &mut VirtioCard, index: u32, at: u32) {
    write(card, 0x16, 2, index);
    write(card, 0x18, 2, 64);
    write(card, 0x1a, 2, index + 1);
    for (register, offset) in [(0x20, 0), (0x28, 0x1000), (0x30, 0x2000)] {
        write(card, register, 4, at + offset);
    }
    write(card, 0x1c, 2, 1);
}

#[test]
fn a_driver_finds_its_way_and_starts_the_device() {
    let (mut card, log, recorder) = card();
    assert_eq!(negotiate(&mut card, F_VERSION_1), 11);
    assert_eq!(read(&mut card, 0x12, 2), 2);
    assert_eq!(read(&mut card, 0x15, 1), 7);
    card.config_write(4, &[2, 0]);
    assert_eq!(recorder.take(), ["ring 0xd0003000", "ring 0xd0003004"]);
    card.config_write(0x10, &0xd010_0000u32.to_le_bytes());
    assert_eq!(recorder.take(), ["stop 0xd0003000", "ring 0xd0103000", "stop 0xd0003004", "ring 0xd0103004"]);
    set_up_queue(&mut card, 1, 0x10_0000);
    write(&mut card, 0x14, 1, 15);
    let started = log.lock().unwrap().started.take().expect("started");
    assert_eq!((started.features, started.rings.len(), started.rings[0].index), (F_VERSION_1, 1, 1));
    assert_eq!((started.rings[0].size, started.rings[0].used), (64, 0x10_2000));
    // A slow doorbell rings too.
    write(&mut card, 0x3004, 2, 1);
    assert_eq!(started.rings[0].kick.read().unwrap(), 1);
    drop(card);
    assert_eq!(recorder.take(), ["stop 0xd0103000", "stop 0xd0103004"]);
}

#[test]
fn a_reset_is_over_when_the_device_has_stopped() {
    let (mut card, log, _) = card();
    negotiate(&mut card, F_VERSION_1);
    set_up_queue(&mut card, 0, 0x10_0000);
    write(&mut card, 0x14, 1, 15);
    write(&mut card, 0x14, 1, 0);
    assert_eq!(read(&mut card, 0x14, 1), 15, "still stopping");
    log.lock().unwrap().stopped = true;
    assert_eq!(read(&mut card, 0x14, 1), 0);
    write(&mut card, 0x16, 2, 0);
    assert_eq!(read(&mut card, 0x1c, 2), 0, "queues are as new");
    assert_eq!(negotiate(&mut card, F_VERSION_1), 11);
}

#[test]
fn a_wrong_setup_is_refused() {
    let (mut card, log, _) = card();
    assert_eq!(negotiate(&mut card, F_VERSION_1 | 1 << 40), 3, "a feature that is not offered");
    write(&mut card, 0x14, 1, 0);
    assert_eq!(negotiate(&mut card, 0x20), 3, "an old driver");
    write(&mut card, 0x14, 1, 0);
    negotiate(&mut card, F_VERSION_1);
    set_up_queue(&mut card, 0, 0x8000_0000);
    write(&mut card, 0x14, 1, 15);
    assert_eq!(read(&mut card, 0x14, 1), 15 | u32::from(NEEDS_RESET));
    assert!(log.lock().unwrap().started.is_none());
    write(&mut card, 0x16, 2, 9);
    assert_eq!(read(&mut card, 0x18, 2), 0, "no such queue");
}

#[test]
fn configuration_space_reaches_the_registers() {
    let (mut card, ..) = card();
    // Find the capability of type 5.
    let mut byte = [0];
    card.config_read(0x34, &mut byte);
    let at = loop {
        let here = byte[0];
        let mut head = [0; 4];
        card.config_read(here, &mut head);
        if head[0] == 9 && head[3] == 5 {
            break here;
        }
        byte[0] = head[1];
        assert_ne!(byte[0], 0, "not found");
    };
    card.config_write(at + 8, &0x12u32.to_le_bytes());
    card.config_write(at + 12, &2u32.to_le_bytes());
    let mut value = [0; 4];
    card.config_read(at + 16, &mut value);
    assert_eq!(value, [2, 0, 0, 0], "number of queues");
}

proptest! {
    #[test]
    fn any_access_is_answered(ops in proptest::collection::vec((0u8..4, any::<u64>(), 0usize..9, any::<u64>()), 0..300)) {
        let (mut card, ..) = card();
        for (kind, offset, len, value) in ops {
            let mut data = value.to_le_bytes()[..len.min(8)].to_vec();
            match kind {
                0 => card.config_read(offset as u8, &mut data),
                1 => card.config_write(offset as u8, &data),
                2 => card.memory_read(offset % 0x9000, &mut data),
                _ => card.memory_write(offset % 0x9000, &data),
            }
        }
    }
}
