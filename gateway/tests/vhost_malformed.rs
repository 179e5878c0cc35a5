//! What a guest's nonsense does: an error for the request, at worst a dead ring, never more.

mod vhost_frontend;

use bytes::Bytes;
use gabion_gateway::vhost::{Disk, serve};
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use vhost_frontend::*;
use vm_memory::{Bytes as _, GuestAddress};

#[test]
fn bad_requests_are_answered_and_the_ring_lives_on() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let _export = serve(disk.clone(), socket.clone(), false, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    let _front = guest.connect(&socket);
    let end = DISK_BYTES / 512;
    let sector = [7u8; 512];

    for (what, kind, at, out, in_bytes, expected) in [
        ("unaligned write", OUT, 0, &sector[..511], 0, IOERR),
        ("unaligned read", IN, 0, &[][..], 513, IOERR),
        ("write behind the end", OUT, end, &sector[..], 0, IOERR),
        ("read across the end", IN, end - 1, &[][..], 1024, IOERR),
        ("sector that overflows", IN, u64::MAX, &[][..], 512, IOERR),
        ("sector that wraps to 0", OUT, 1 << 55, &sector[..], 0, IOERR),
        ("empty write", OUT, 0, &[][..], 0, IOERR),
        ("empty read", IN, 0, &[][..], 0, IOERR),
        ("unknown kind", 77, 0, &[][..], 512, UNSUPP),
        ("half a range", DISCARD, 0, &sector[..8], 0, IOERR),
        ("too many ranges", DISCARD, 0, &[0; 16 * 33][..], 0, IOERR),
    ] {
        assert_eq!(guest.request(0, kind, at, out, in_bytes).0, expected, "{what}");
    }
    for (what, raw, expected) in [
        ("discard behind the end", range(end, 8, 0), IOERR),
        ("discard of too much", range(0, u32::MAX, 0), IOERR),
        ("discard with a flag", range(0, 8, 1), UNSUPP),
    ] {
        assert_eq!(guest.request(0, DISCARD, 0, &raw, 0).0, expected, "{what}");
    }

    let table = guest.table(0);
    let at = guest.scratch(0, 0);
    let status = at + 0x100;
    let header = |guest: &mut Guest| guest.lay_out(0, 0, IN, 0, &[], 512);

    header(&mut guest);
    guest.put_descriptor(table, 1, 1 << 50, 512, WRITE | NEXT, 2);
    guest.offer(0, 0);
    assert_eq!(guest.wait(0).0, 0);
    assert_eq!(guest.status(0, 0), IOERR, "a buffer outside memory");

    header(&mut guest);
    guest.put_descriptor(table, 1, at, u32::MAX, WRITE | NEXT, 2);
    guest.offer(0, 0);
    assert_eq!(guest.wait(0).0, 0);
    assert_eq!(guest.status(0, 0), IOERR, "a giant buffer");

    header(&mut guest);
    guest.put_descriptor(table, 0, at, 8, NEXT, 2);
    guest.offer(0, 0);
    assert_eq!(guest.wait(0), (0, 1));
    assert_eq!(guest.status(0, 0), IOERR, "half a header");

    for (what, first, second) in [
        ("a loop", (at, 16, NEXT, 1), (at, 16, NEXT, 0)),
        ("an index out of range", (at, 16, NEXT, 999), (0, 0, 0, 0)),
        ("an empty buffer", (at, 16, NEXT, 1), (at, 0, WRITE, 0)),
        ("a buffer that wraps", (at, 16, NEXT, 1), (u64::MAX, 16, WRITE, 0)),
        ("an indirect table of no whole entries", (at, 17, INDIRECT, 0), (0, 0, 0, 0)),
        ("an indirect table that is itself", (table, 16, INDIRECT, 0), (0, 0, 0, 0)),
        ("an indirect table outside memory", (1 << 45, 64, INDIRECT, 0), (0, 0, 0, 0)),
        ("no place for a status", (at, 16, 0, 0), (0, 0, 0, 0)),
    ] {
        guest.put_descriptor(table, 0, first.0, first.1, first.2, first.3);
        guest.put_descriptor(table, 1, second.0, second.1, second.2, second.3);
        guest.offer(0, 0);
        assert_eq!(guest.wait(0), (0, 0), "{what}");
    }

    // A sound request through an indirect table, after all that.
    header(&mut guest);
    let indirect = at + 0x3_0000;
    let mut raw = vec![0; 48];
    guest.mem.read_slice(&mut raw, GuestAddress(table)).unwrap();
    guest.mem.write_slice(&raw, GuestAddress(indirect)).unwrap();
    guest.put_descriptor(table, 0, indirect, 48, INDIRECT, 0);
    guest.mem.write_obj(UNANSWERED, GuestAddress(status)).unwrap();
    guest.offer(0, 0);
    assert_eq!(guest.wait(0), (0, 513));
    assert_eq!((guest.status(0, 0), guest.data(0, 0, 512)), (OK, vec![0x5a; 512]));
    assert!(disk.data.lock().iter().all(|&byte| byte == 0x5a));
}

#[test]
fn a_broken_ring_stops_alone_and_comes_back_after_a_reset() {
    let (rt, dir, disk) = (runtime(), tempfile::tempdir().unwrap(), MemoryDisk::new());
    let socket = dir.path().join("v.sock");
    let _export = serve(disk, socket.clone(), false, 2, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(2);
    let front = guest.connect(&socket);
    guest.offer(0, 9999);
    assert_eq!(guest.request(1, FLUSH, 0, &[], 0).0, OK, "the other ring is unharmed");
    drop(front);
    assert_eq!(guest.used_idx(0), 0, "nonsense is not answered");
    guest.mem.write_obj(0u16, GuestAddress(guest.avail(0) + 2)).unwrap();
    guest.queues[0].avail_idx = 0;
    let _front = guest.connect(&socket);
    assert_eq!(guest.request(0, FLUSH, 0, &[], 0).0, OK);
}

/// A disk whose guest is as fast as can be: whatever was answered is offered again before the next request is.
struct Tireless {
    guest: Mutex<Option<Guest>>,
    asked: AtomicU64,
    tired: AtomicBool,
}

impl Disk for Tireless {
    type Error = io::Error;

    fn size_bytes(&self) -> u64 {
        DISK_BYTES
    }
    fn serial(&self) -> String {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if let Some(guest) = &mut *self.guest.lock() {
            while !self.tired.load(Ordering::SeqCst) && guest.used_idx(0) != guest.queues[0].used_seen {
                let (head, _) = guest.wait(0);
                guest.offer(0, head as u16);
            }
        }
        String::new()
    }
    async fn read(&self, _: u64, _: u32) -> io::Result<Bytes> {
        Err(io::ErrorKind::Unsupported.into())
    }
    async fn write(&self, _: u64, _: Bytes) -> io::Result<()> {
        Ok(())
    }
    async fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
    async fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_guest_that_always_has_something_more_does_not_keep_the_thread() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let disk = Arc::new(Tireless {
        guest: Mutex::default(),
        asked: AtomicU64::new(0),
        tired: AtomicBool::new(false),
    });
    // The gateway has one thread, too.
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = rt.handle().clone();
    std::thread::spawn(move || rt.block_on(std::future::pending::<()>()));
    let _export = serve(disk.clone(), socket.clone(), false, 1, handle.clone()).unwrap();
    let mut guest = Guest::new(1);
    let _front = guest.connect(&socket);
    for head in [0, 3, 6] {
        guest.lay_out(0, head, GET_ID, 0, &[], 20);
    }
    {
        let mut kept = disk.guest.lock();
        let guest = kept.insert(guest);
        for head in [0, 3, 6] {
            guest.offer(0, head);
        }
    }
    until("the guest is at it", || disk.asked.load(Ordering::SeqCst) > 1000);
    let (rang, bell) = std::sync::mpsc::channel();
    handle.spawn(async move {
        tokio::time::sleep(Duration::from_millis(10)).await;
        rang.send(()).unwrap();
    });
    let rung = bell.recv_timeout(Duration::from_secs(1));
    disk.tired.store(true, Ordering::SeqCst);
    rung.expect("other tasks have their turn");
}
