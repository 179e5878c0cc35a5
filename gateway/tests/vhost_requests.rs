//! What a guest's requests do, on one and on several queues.

mod vhost_frontend;

use std::sync::atomic::Ordering;

use gabion_gateway::vhost::serve;
use vhost_frontend::*;
use vm_memory::{Bytes as _, GuestAddress};

#[test]
fn every_kind_of_request() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let export = serve(disk.clone(), socket.clone(), false, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    let mut front = guest.connect(&socket);

    let space = config_space(&mut front);
    assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), DISK_BYTES / 512);

    let data: Vec<u8> = (0..8192u32).map(|i| i as u8).collect();
    assert_eq!(guest.request(0, OUT, 3, &data, 0).0, OK);
    assert_eq!(disk.data.lock()[1536..1536 + 8192], data);
    assert_eq!(guest.request(0, IN, 3, &[], 8192), (OK, data.clone()));
    assert_eq!(guest.request(0, FLUSH, 0, &[], 0).0, OK);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);

    let two = [range(8, 8, 0), range(32, 8, 0)].concat();
    assert_eq!(guest.request(0, DISCARD, 0, &two, 0).0, OK);
    assert_eq!(disk.data.lock()[8 * 512..16 * 512], [0; 4096]);
    assert_eq!(disk.data.lock()[32 * 512..40 * 512], [0; 4096]);
    assert_eq!(guest.request(0, WRITE_ZEROES, 0, &range(64, 16, 1), 0).0, OK);
    assert_eq!(disk.data.lock()[64 * 512..80 * 512], [0; 8192]);
    assert_eq!(disk.data.lock()[80 * 512], 0x5a);

    assert_eq!(guest.request(0, GET_ID, 0, &[], 20), (OK, b"vol-0123456789abcdef".to_vec()));

    disk.fail.store(true, Ordering::SeqCst);
    for (kind, out, len) in [(OUT, &data[..512], 0), (IN, &[][..], 512), (FLUSH, &[][..], 0)] {
        assert_eq!(guest.request(0, kind, 0, out, len).0, IOERR, "kind {kind}");
    }
    drop(front);
    rt.block_on(export.stop());
    assert!(!socket.exists());
}

#[test]
fn many_queues_complete_out_of_order_with_event_idx() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let _export = serve(disk.clone(), socket.clone(), false, 4, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(4);
    guest.features = u64::MAX;
    let _front = guest.connect(&socket);
    for queue in 0..4 {
        let sector = queue as u64 * 64;
        disk.hold_writes();
        guest.lay_out(queue, 0, OUT, sector, &[queue as u8 + 1; 4096], 0);
        guest.offer(queue, 0);
        until("the write is under way", || disk.waiting.load(Ordering::SeqCst) > queue as u64);
        guest.lay_out(queue, 4, IN, sector, &[], 4096);
        guest.offer(queue, 4);
        assert_eq!(guest.wait(queue).0, 4, "the read overtakes the held write");
        assert_eq!(guest.status(queue, 4), OK);
        let used_event = GuestAddress(guest.avail(queue) + 4 + u64::from(QUEUE_SIZE) * 2);
        guest.mem.write_obj(1u16, used_event).unwrap();
        disk.release_writes();
        assert_eq!(guest.wait(queue).0, 0);
        assert_eq!(guest.status(queue, 0), OK);
        assert_eq!(disk.data.lock()[queue * 64 * 512], queue as u8 + 1);
    }
}

#[test]
fn a_read_only_device_refuses_changes() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let _export = serve(disk.clone(), socket.clone(), true, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    let _front = guest.connect(&socket);
    assert_eq!(guest.request(0, OUT, 0, &[0; 512], 0).0, IOERR);
    assert_eq!(guest.request(0, DISCARD, 0, &range(0, 8, 0), 0).0, IOERR);
    assert_eq!(guest.request(0, WRITE_ZEROES, 0, &range(0, 8, 1), 0).0, IOERR);
    assert_eq!(guest.request(0, IN, 0, &[], 512), (OK, vec![0x5a; 512]));
    assert_eq!(guest.request(0, FLUSH, 0, &[], 0).0, OK);
    assert!(disk.data.lock().iter().all(|&byte| byte == 0x5a));
}

#[test]
fn a_suppressed_interrupt_is_not_sent() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let _export = serve(disk, socket.clone(), false, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    let _front = guest.connect(&socket);
    assert_eq!(guest.request(0, FLUSH, 0, &[], 0).0, OK);
    // The interrupts of the start and of the first request are both taken before the flag is set.
    until("no interrupt is left", || guest.queues[0].call.read().is_err());
    guest.mem.write_obj(1u16, GuestAddress(guest.avail(0))).unwrap();
    guest.lay_out(0, 0, FLUSH, 0, &[], 0);
    guest.offer(0, 0);
    until("the flush is done", || guest.used_idx(0) == 2);
    guest.queues[0].used_seen = 2;
    guest.mem.write_obj(0u16, GuestAddress(guest.avail(0))).unwrap();
    // Ring order: had the second request interrupted, its signal would precede this one's and the count would be two.
    guest.lay_out(0, 0, FLUSH, 0, &[], 0);
    guest.offer(0, 0);
    until("the third flush is done", || guest.used_idx(0) == 3);
    until("its interrupt", || guest.queues[0].call.read().is_ok_and(|count| count == 1));
}
