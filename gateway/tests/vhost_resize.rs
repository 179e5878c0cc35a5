//! A volume that grows while a guest uses it: the front end hears of it, one way or the other.

mod vhost_frontend;

use futures::FutureExt;
use futures::future::BoxFuture;
use gabion_gateway::vhost::serve;
use gabion_gateway::volume::{Backend, MemoryBackend, Shape, Volume, VolumeError};
use gabion_proto::blocks::Content;
use gabion_proto::ids::VolumeId;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use vhost::VhostBackend;
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost_frontend::*;

const MIB: u64 = 1 << 20;

fn capacity_bytes(front: &mut Frontend) -> u64 {
    u64::from_le_bytes(config_space(front)[..8].try_into().unwrap()) * 512
}

struct Channel(RawFd);

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

#[derive(Default)]
struct Told(AtomicU32);

impl VhostUserFrontendReqHandler for Told {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(0)
    }
}

/// As QEMU does it: the front end gives the device a channel.
#[test]
fn a_front_end_with_a_channel_is_told() {
    let (rt, dir) = (runtime(), tempfile::tempdir().unwrap());
    let volume = rt.block_on(async { Volume::in_memory(8 * MIB) });
    let socket = dir.path().join("v.sock");
    let export = serve(volume.clone(), socket.clone(), false, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    let mut front = guest.connect(&socket);
    let told = Arc::new(Told::default());
    let mut listener = FrontendReqHandler::new(told.clone()).unwrap();
    front.set_backend_request_fd(&Channel(listener.get_tx_raw_fd())).unwrap();
    // Its answer means that the message before it was taken in.
    assert_eq!(capacity_bytes(&mut front), 8 * MIB);
    let beyond = 8 * MIB / 512;
    assert_eq!(guest.request(0, OUT, beyond, &[1; 512], 0).0, IOERR);
    for (n, size) in [9 * MIB, 1 << 40].into_iter().enumerate() {
        volume.grow(size);
        listener.handle_request().unwrap();
        assert_eq!(told.0.load(Ordering::SeqCst), n as u32 + 1);
        assert_eq!(capacity_bytes(&mut front), size);
    }
    assert_eq!(guest.request(0, OUT, beyond, &[1; 512], 0).0, OK);
    assert_eq!(guest.request(0, IN, beyond, &[], 512), (OK, vec![1; 512]));
    volume.grow(MIB);
    assert_eq!(volume.size_bytes(), 1 << 40, "a volume does not shrink");
    rt.block_on(export.stop());
}

/// A front end without one connects again by itself, because it keeps a record of what is in flight.
#[test]
fn a_front_end_without_a_channel_connects_again() {
    let (rt, dir) = (runtime(), tempfile::tempdir().unwrap());
    let volume = rt.block_on(async { Volume::in_memory(8 * MIB) });
    let socket = dir.path().join("v.sock");
    let export = serve(volume.clone(), socket.clone(), false, 1, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(1);
    let mut front = guest.connect(&socket);
    assert_eq!(guest.request(0, OUT, 0, &[7; 512], 0).0, OK);
    assert_eq!(capacity_bytes(&mut front), 8 * MIB);
    volume.grow(9 * MIB);
    until("the connection ends", || front.get_features().is_err());
    drop(front);
    let mut front = guest.connect(&socket);
    assert_eq!(capacity_bytes(&mut front), 9 * MIB);
    assert_eq!(guest.request(0, IN, 0, &[], 512), (OK, vec![7; 512]));
    assert_eq!(guest.request(0, OUT, 8 * MIB / 512, &[1; 512], 0).0, OK);
    rt.block_on(export.stop());
}

/// In memory; writes of object 0 wait while it is held.
struct Held {
    memory: MemoryBackend,
    held: watch::Receiver<bool>,
    waiting: Arc<AtomicU32>,
}

impl Backend for Held {
    fn read(&self, o: u32, f: u32, n: u32) -> BoxFuture<'_, Result<Content, VolumeError>> {
        self.memory.read(o, f, n)
    }
    fn write(&self, o: u32, c: Content) -> BoxFuture<'_, Result<(), VolumeError>> {
        async move {
            if o == 0 {
                self.waiting.fetch_add(1, Ordering::SeqCst);
                let mut held = self.held.clone();
                held.wait_for(|held| !held).await.map_err(|_| VolumeError::Io)?;
            }
            self.memory.write(o, c).await
        }
        .boxed()
    }
    fn zero(&self, o: u32, f: u32, n: u32, d: bool) -> BoxFuture<'_, Result<(), VolumeError>> {
        self.memory.zero(o, f, n, d)
    }
    fn check(&self) -> Result<(), VolumeError> {
        self.memory.check()
    }
}

const OBJECT_BYTES: u64 = 4 * MIB;

/// A guest without a channel whose write of object 0 waits, on its second queue, when its volume grows; it is disconnected for that.
fn grown_with_a_write_open(
    rt: &tokio::runtime::Runtime,
    socket: &Path,
) -> (Guest, watch::Sender<bool>, gabion_gateway::vhost::VhostExport) {
    let (hold, held) = watch::channel(true);
    let waiting = Arc::new(AtomicU32::new(0));
    let backend = Held { memory: MemoryBackend::default(), held, waiting: waiting.clone() };
    let shape =
        Shape { id: VolumeId(1), name: "v".into(), size_bytes: 8 * MIB, object_bytes: OBJECT_BYTES as u32 };
    let volume = rt.block_on(async { Volume::new(shape, Box::new(backend)) });
    let export = serve(volume.clone(), socket.to_owned(), false, 2, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(2);
    let front = guest.connect(socket);
    guest.lay_out(1, 0, OUT, 0, &[7; 4096], 0);
    guest.offer(1, 0);
    until("the write is under way", || waiting.load(Ordering::SeqCst) == 1);
    volume.grow(9 * MIB);
    until("the connection ends", || front.get_features().is_err());
    (guest, hold, export)
}

#[test]
fn a_write_that_waits_does_not_keep_the_disk_when_it_grows() {
    let (rt, dir) = (runtime(), tempfile::tempdir().unwrap());
    let socket = dir.path().join("v.sock");
    let (mut guest, hold, export) = grown_with_a_write_open(&rt, &socket);
    let (connected, connection) = std::sync::mpsc::channel();
    let path = socket.clone();
    std::thread::spawn(move || {
        let mut front = guest.connect(&path);
        let capacity = capacity_bytes(&mut front);
        connected.send((guest, front, capacity))
    });
    let (mut guest, _front, capacity) =
        connection.recv_timeout(Duration::from_secs(20)).expect("it connects");
    assert_eq!(capacity, 9 * MIB);
    let elsewhere = OBJECT_BYTES / 512;
    guest.lay_out(1, 4, OUT, elsewhere, &[5; 512], 0);
    guest.offer(1, 4);
    assert_eq!(guest.wait(1).0, 4, "another object's write ends meanwhile");
    assert_eq!((guest.status(1, 4), guest.status(1, 0)), (OK, UNANSWERED));
    assert_eq!(guest.request(0, IN, elsewhere, &[], 512), (OK, vec![5; 512]));

    hold.send_replace(false);
    assert_eq!(guest.wait(1).0, 0);
    assert_eq!(guest.status(1, 0), OK);
    assert_eq!(guest.request(0, OUT, 0, &[8; 4096], 0).0, OK);
    assert_eq!(guest.request(0, IN, 0, &[], 4096), (OK, vec![8; 4096]), "nothing old comes after it");
    rt.block_on(export.stop());
}

/// As a machine that is started anew: it knows nothing of the write, which must not surface after it has read.
#[test]
fn who_has_no_record_of_a_write_left_open_waits_for_it() {
    let (rt, dir) = (runtime(), tempfile::tempdir().unwrap());
    let socket = dir.path().join("v.sock");
    let (_old, hold, export) = grown_with_a_write_open(&rt, &socket);
    let (read, bytes) = std::sync::mpsc::channel();
    let path = socket.clone();
    let reader = std::thread::spawn(move || {
        let mut guest = Guest::new(2);
        let front = guest.connect(&path);
        read.send(guest.request(0, IN, 0, &[], 512)).unwrap();
        front
    });
    // Longer than the rings of the last front end drain.
    assert!(bytes.recv_timeout(Duration::from_secs(7)).is_err(), "nothing is read meanwhile");
    hold.send_replace(false);
    assert_eq!(bytes.recv_timeout(Duration::from_secs(10)).unwrap(), (OK, vec![7; 512]));
    drop(reader.join().unwrap());
    rt.block_on(export.stop());
}
