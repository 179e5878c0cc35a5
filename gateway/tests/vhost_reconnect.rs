//! Connections that end: by the guest, by the front end, by the gateway, in the middle of I/O.

mod vhost_frontend;

use std::sync::atomic::Ordering;

use gabion_gateway::vhost::limits::RING_BYTES_MAX;
use gabion_gateway::vhost::serve;
use vhost::VhostBackend;
use vhost_frontend::*;
use vm_memory::{Bytes as _, GuestAddress};

#[test]
fn the_socket_listens_again_after_a_disconnect() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let export = serve(disk.clone(), socket.clone(), false, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    for round in 0..3u8 {
        let front = guest.connect(&socket);
        assert_eq!(guest.request(0, OUT, 0, &[round; 512], 0).0, OK);
        assert_eq!(disk.data.lock()[0], round);
        drop(front);
    }
    rt.block_on(export.stop());
}

#[test]
fn stopping_a_ring_waits_for_its_requests() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let _export = serve(disk.clone(), socket.clone(), false, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    let front = guest.connect(&socket);
    disk.hold_writes();
    guest.lay_out(0, 0, OUT, 0, &[9; 4096], 0);
    guest.offer(0, 0);
    until("the write is under way", || disk.waiting.load(Ordering::SeqCst) == 1);
    let stopping = std::thread::spawn(move || (front.get_vring_base(0).unwrap(), front));
    assert!(!stopping.is_finished());
    disk.release_writes();
    let (base, _front) = stopping.join().unwrap();
    assert_eq!(base, 1);
    assert_eq!((guest.used_idx(0), guest.status(0, 0)), (1, OK), "answered before the ring's base was");
}

/// Rule C4: the gateway dies with one request done, two open and one not yet fetched.
#[test]
fn a_new_gateway_replays_what_was_in_flight_and_repeats_nothing() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let mut guest = Guest::new(1);

    let first = runtime();
    let export = serve(disk.clone(), socket.clone(), false, 1, first.handle().clone()).unwrap();
    let front = guest.connect(&socket);
    assert_eq!(guest.request(0, OUT, 0, &[1; 512], 0).0, OK);
    disk.hold_writes();
    guest.lay_out(0, 0, OUT, 8, &[2; 512], 0);
    guest.lay_out(0, 4, OUT, 16, &[3; 512], 0);
    guest.offer(0, 4);
    guest.offer(0, 0);
    until("both writes are under way", || disk.waiting.load(Ordering::SeqCst) == 2);
    // Every task of the old gateway is dropped where it stands, as by a crash.
    first.shutdown_timeout(std::time::Duration::from_secs(5));
    std::mem::forget(export);
    drop(front);
    assert_eq!(guest.used_idx(0), 1);

    let fresh = MemoryDisk::new();
    guest.lay_out(0, 8, OUT, 24, &[4; 512], 0);
    guest.offer(0, 8);
    let second = runtime();
    let export = serve(fresh.clone(), socket.clone(), false, 1, second.handle().clone()).unwrap();
    let _front = guest.connect(&socket);
    let mut answered: Vec<u32> = (0..3).map(|_| guest.wait(0).0).collect();
    answered.sort_unstable();
    assert_eq!(answered, [0, 4, 8]);
    for (head, sector, byte) in [(0, 8, 2), (4, 16, 3), (8, 24, 4)] {
        assert_eq!(guest.status(0, head), OK);
        assert_eq!(fresh.data.lock()[sector * 512], byte);
    }
    assert_eq!(fresh.data.lock()[0], 0x5a, "the request that was answered is not run again");
    assert_eq!(fresh.writes.load(Ordering::SeqCst), 3);
    assert_eq!(guest.request(0, IN, 24, &[], 512), (OK, vec![4; 512]));
    second.block_on(export.stop());
}

/// One request of one descriptor at `head`, through an indirect table: so a queue holds as many as it has entries.
fn lay_out_indirect(guest: &Guest, head: u16, data_bytes: u32) {
    let at = guest.scratch(0, head);
    let table = at + 0x1000;
    let data = guest.scratch(0, QUEUE_SIZE);
    let mut header = OUT.to_le_bytes().to_vec();
    header.extend([0; 12]);
    guest.mem.write_slice(&header, GuestAddress(at)).unwrap();
    guest.put_descriptor(table, 0, at, 16, NEXT, 1);
    guest.put_descriptor(table, 1, data, data_bytes, NEXT, 2);
    guest.put_descriptor(table, 2, at + 0x100, 1, WRITE, 0);
    guest.put_descriptor(guest.table(0), head, table, 48, INDIRECT, 0);
}

#[test]
fn a_replay_of_more_than_a_ring_may_hold_takes_it_bit_by_bit() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let mut guest = Guest::new(1);
    let first = runtime();
    let export = serve(disk.clone(), socket.clone(), false, 1, first.handle().clone()).unwrap();
    let front = guest.connect(&socket);
    disk.hold_writes();
    for head in 0..QUEUE_SIZE {
        lay_out_indirect(&guest, head, 512);
        guest.offer(0, head);
    }
    until("all are under way", || disk.waiting.load(Ordering::SeqCst) == u64::from(QUEUE_SIZE));
    first.shutdown_timeout(std::time::Duration::from_secs(5));
    std::mem::forget(export);
    drop(front);

    let bytes = 4u32 << 20;
    for head in 0..QUEUE_SIZE {
        lay_out_indirect(&guest, head, bytes);
    }
    let fresh = MemoryDisk::new();
    fresh.hold_writes();
    let second = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = second.handle().clone();
    std::thread::spawn(move || second.block_on(std::future::pending::<()>()));
    let _export = serve(fresh.clone(), socket.clone(), false, 1, handle.clone()).unwrap();
    let _front = guest.connect(&socket);
    until("some are under way", || fresh.waiting.load(Ordering::SeqCst) > 0);
    // Another task of the only thread has its turn when the ring has taken what it takes.
    let (turn, came) = std::sync::mpsc::channel();
    handle.spawn(async move { turn.send(()) });
    came.recv().unwrap();
    let held = fresh.waiting.load(Ordering::SeqCst) * u64::from(bytes);
    assert!(held <= RING_BYTES_MAX, "{held} bytes are held");

    fresh.release_writes();
    let mut answered: Vec<u32> = (0..QUEUE_SIZE).map(|_| guest.wait(0).0).collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..u32::from(QUEUE_SIZE)).collect::<Vec<_>>());
    assert_eq!(fresh.writes.load(Ordering::SeqCst), u64::from(QUEUE_SIZE), "each once");
}

#[test]
fn stopping_the_export_disconnects_and_gives_up_on_stuck_requests() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let export = serve(disk.clone(), socket.clone(), false, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    let front = guest.connect(&socket);
    disk.hold_writes();
    guest.lay_out(0, 0, OUT, 0, &[9; 4096], 0);
    guest.offer(0, 0);
    until("the write is under way", || disk.waiting.load(Ordering::SeqCst) == 1);
    rt.block_on(async {
        tokio::time::timeout(std::time::Duration::from_secs(20), export.stop()).await.expect("stop ends");
    });
    assert!(!socket.exists());
    assert!(front.get_features().is_err());
    assert_eq!((guest.used_idx(0), guest.status(0, 0)), (0, UNANSWERED));
}
