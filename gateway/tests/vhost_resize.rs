//! A volume that grows while a guest uses it: the front end hears of it, one way or the other.

mod vhost_frontend;

use gabion_gateway::vhost::serve;
use gabion_gateway::volume::Volume;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
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
