//! One connection to a gateway (the vhost-user protocol of QEMU's documentation, front-end side).

use crate::vmm::limits::QUEUE_SIZE_MAX;
use crate::vmm::virtio::{F_VERSION_1, Ring, Rings};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// `struct virtio_blk_config` as far as gateways fill it.
const CONFIG_BYTES: u32 = 60;
const QUEUES_ASKED: u64 = 64;
/// Of the handshake only: a running gateway may take its time to drain I/O.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("the gateway answers wrongly at {0}")]
    Protocol(&'static str, #[source] vhost::Error),
    #[error("what listens there lacks protocol features that a disk needs")]
    Features,
    #[error("the gateway offers less than the one before")]
    Lacking,
    #[error("a virtqueue is not in the guest's memory")]
    Ring,
}

/// The shared record of requests under way.
pub struct Inflight {
    message: VhostUserInflight,
    file: File,
}

pub struct Link {
    front: Frontend,
    stream: UnixStream,
    features: u64,
    pub queues: u16,
    pub config: Vec<u8>,
}

fn at(step: &'static str) -> impl FnOnce(vhost::Error) -> LinkError {
    move |error| LinkError::Protocol(step, error)
}

impl Link {
    pub fn connect(socket: &Path, memory: &GuestMemoryMmap) -> Result<Link, LinkError> {
        let stream = UnixStream::connect(socket).map_err(LinkError::Connect)?;
        let timeouts = |limit| {
            stream
                .set_read_timeout(limit)
                .and_then(|()| stream.set_write_timeout(limit))
                .map_err(LinkError::Connect)
        };
        timeouts(Some(HANDSHAKE_TIMEOUT))?;
        let mut front = Frontend::from_stream(stream.try_clone().map_err(LinkError::Connect)?, QUEUES_ASKED);
        front.set_owner().map_err(at("SET_OWNER"))?;
        let features = front.get_features().map_err(at("GET_FEATURES"))?;
        if features & F_VERSION_1 == 0 || features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(LinkError::Features);
        }
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let offered = front.get_protocol_features().map_err(at("GET_PROTOCOL_FEATURES"))?;
        if !offered.contains(wanted) {
            return Err(LinkError::Features);
        }
        front.set_protocol_features(wanted).map_err(at("SET_PROTOCOL_FEATURES"))?;
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let queues = front.get_queue_num().map_err(at("GET_QUEUE_NUM"))?.clamp(1, QUEUES_ASKED) as u16;
        let empty = [0; CONFIG_BYTES as usize];
        let (_, config) = front
            .get_config(0, CONFIG_BYTES, VhostUserConfigFlags::empty(), &empty)
            .map_err(at("GET_CONFIG"))?;
        let regions: Result<Vec<_>, _> =
            memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        front.set_mem_table(&regions.map_err(at("SET_MEM_TABLE"))?).map_err(at("SET_MEM_TABLE"))?;
        timeouts(None)?;
        Ok(Link { front, stream, features, queues, config })
    }

    /// For waiting: nothing is read from it.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub fn guest_features(&self) -> u64 {
        self.features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// Starts the rings, with the record of what is under way: a fresh one if there is none.
    pub fn start(
        &mut self,
        memory: &GuestMemoryMmap,
        rings: &Rings,
        queues: u16,
        inflight: &mut Option<Inflight>,
    ) -> Result<(), LinkError> {
        let features = rings.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.front.set_features(features).map_err(at("SET_FEATURES"))?;
        let resumed = inflight.is_some();
        let record = match inflight {
            Some(record) => record,
            None => {
                let asked = VhostUserInflight::new(0, 0, queues, QUEUE_SIZE_MAX);
                let (message, file) = self.front.get_inflight_fd(&asked).map_err(at("GET_INFLIGHT_FD"))?;
                inflight.insert(Inflight { message, file })
            }
        };
        self.front
            .set_inflight_fd(&record.message, record.file.as_raw_fd())
            .map_err(at("SET_INFLIGHT_FD"))?;
        for ring in &rings.rings {
            self.start_ring(memory, ring, resumed)?;
        }
        Ok(())
    }

    fn start_ring(&mut self, memory: &GuestMemoryMmap, ring: &Ring, resumed: bool) -> Result<(), LinkError> {
        let index = usize::from(ring.index);
        let here = |address: u64| {
            memory.get_host_address(GuestAddress(address)).map(|p| p as u64).map_err(|_| LinkError::Ring)
        };
        // After a gateway went away only the used ring tells how far it came; the in-flight record has
        // the rest.
        let base = match resumed {
            true => memory
                .load::<u16>(GuestAddress(ring.used + 2), Ordering::Acquire)
                .map_err(|_| LinkError::Ring)?,
            false => 0,
        };
        let addresses = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: here(ring.descriptors)?,
            used_ring_addr: here(ring.used)?,
            avail_ring_addr: here(ring.available)?,
            log_addr: None,
        };
        self.front.set_vring_num(index, ring.size).map_err(at("SET_VRING_NUM"))?;
        self.front.set_vring_base(index, base).map_err(at("SET_VRING_BASE"))?;
        self.front.set_vring_addr(index, &addresses).map_err(at("SET_VRING_ADDR"))?;
        self.front.set_vring_call(index, &ring.call).map_err(at("SET_VRING_CALL"))?;
        self.front.set_vring_kick(index, &ring.kick).map_err(at("SET_VRING_KICK"))?;
        self.front.set_vring_enable(index, true).map_err(at("SET_VRING_ENABLE"))
    }

    /// Returns when the gateway has ended all I/O on the rings.
    pub fn stop(&mut self, rings: &Rings) -> Result<(), LinkError> {
        for ring in &rings.rings {
            self.front.get_vring_base(usize::from(ring.index)).map_err(at("GET_VRING_BASE"))?;
        }
        Ok(())
    }
}
