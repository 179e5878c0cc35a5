//! One front end's connection: the control messages, the memory table and the rings' configuration.
//!
//! A ring runs (see [`super::ring`]) while it has its addresses and a kick descriptor and is enabled; any message that takes one of
//! these away, and the end of the connection, stops it and waits until it has drained (with a deadline, if it is this side that
//! ends the connection). Messages arrive on a thread of their own, one at a time, so that this wait blocks nobody else.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

use super::config;
use super::disk::Disk;
use super::event::{Call, Kick};
use super::inflight::{InflightRegion, check_backed};
use super::limits::{MEMORY_REGIONS_MAX, QUEUE_SIZE_MAX};
use super::notice::Notice;
use super::ring::{self, Ended, GuestMemory, Ring};

/// What an export fixes for all its connections.
pub struct Device<D> {
    pub disk: Arc<D>,
    pub read_only: bool,
    pub num_queues: u16,
    pub rt: Handle,
    pub abort: CancellationToken,
    /// The rings, one bit each, that ended with requests open: these may still be under way in the disk, and nobody has repeated them.
    pub left_open: AtomicU64,
}

/// A piece of guest memory, known by guest-physical address and by the front end's own address.
struct Region {
    user_addr: u64,
    bytes: u64,
    guest_addr: u64,
    map: Arc<GuestRegionMmap>,
}

/// Addresses as the front end gave them, in its own address space.
#[derive(Clone, Copy)]
struct RingAddresses {
    descriptors: u64,
    avail: u64,
    used: u64,
}

#[derive(Default)]
struct RingSlot {
    size: u16,
    base: u16,
    addresses: Option<RingAddresses>,
    kick: Option<File>,
    call: Arc<Call>,
    enabled: bool,
    running: Option<Running>,
}

struct Running {
    stop: CancellationToken,
    task: JoinHandle<Ended>,
}

pub struct Session<D: Disk> {
    device: Arc<Device<D>>,
    notice: Arc<Notice>,
    /// This front end is sent away, or the whole export ends.
    hurry: CancellationToken,
    rings: Vec<RingSlot>,
    regions: Vec<Region>,
    memory: GuestMemory,
    inflight: Option<InflightRegion>,
    acked_features: u64,
    owned: bool,
}

fn refused(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(why))
}

impl<D: Disk> Session<D> {
    pub fn new(device: Arc<Device<D>>, notice: Arc<Notice>, hurry: CancellationToken) -> Self {
        let rings = (0..device.num_queues).map(|_| RingSlot::default()).collect();
        Session {
            device,
            notice,
            hurry,
            rings,
            regions: Vec::new(),
            memory: GuestMemory::new(GuestMemoryMmap::new()),
            inflight: None,
            acked_features: 0,
            owned: false,
        }
    }

    /// Stops every ring and waits until their I/O has ended. Not to be called on a runtime's thread.
    pub fn close(&mut self) {
        for slot in &self.rings {
            if let Some(running) = &slot.running {
                running.stop.cancel();
            }
        }
        for index in 0..self.rings.len() {
            self.stop_ring(index);
        }
    }

    fn slot(&mut self, index: u32) -> Result<&mut RingSlot> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn stop_ring(&mut self, index: usize) {
        let slot = &mut self.rings[index];
        if let Some(Running { stop, task }) = slot.running.take() {
            stop.cancel();
            match self.device.rt.block_on(task) {
                Ok(ended) => {
                    slot.base = ended.next_avail;
                    if ended.left_open {
                        self.device.left_open.fetch_or(1 << index, Ordering::Relaxed);
                    }
                }
                Err(error) => tracing::error!(ring = index, %error, "vhost-user ring task failed"),
            }
        }
    }

    /// What an earlier front end left open must not surface after something that this one has read. One that has it on record repeats
    /// it, and hears of it when both are over; another one waits here, as it would have before it could connect. False: it is to go
    /// before that.
    fn await_left_open(&self) -> bool {
        let left_open = &self.device.left_open;
        if left_open.load(Ordering::Relaxed) == 0 || self.repeats_left_open() {
            return true;
        }
        let settled = self.settled();
        if settled {
            left_open.store(0, Ordering::Relaxed);
        }
        settled
    }

    fn repeats_left_open(&self) -> bool {
        let left_open = self.device.left_open.load(Ordering::Relaxed);
        (0..self.device.num_queues).filter(|index| left_open & 1 << index != 0).all(|index| {
            let record = self.inflight.as_ref().and_then(|region| region.queue(index));
            record.is_some_and(|record| record.has_open())
        })
    }

    fn settled(&self) -> bool {
        self.device.rt.block_on(async {
            tokio::select! {
                () = self.device.disk.settle() => true,
                () = self.hurry.cancelled() => false,
            }
        })
    }

    /// Starts the ring if nothing that it needs is missing.
    fn start_ring(&mut self, index: usize) -> Result<()> {
        let slot = &self.rings[index];
        let (Some(addresses), Some(kick)) = (slot.addresses, &slot.kick) else { return Ok(()) };
        if !slot.enabled || slot.running.is_some() || self.hurry.is_cancelled() {
            return Ok(());
        }
        let kick = kick.try_clone().map_err(Error::ReqHandlerError)?;
        let mem = self.memory.memory().into_inner();
        let mut queue = Queue::new(QUEUE_SIZE_MAX).map_err(|error| refused(error.to_string()))?;
        self.place(&mut queue, slot.size, addresses).map_err(|error| refused(error.to_string()))?;
        queue.set_event_idx(config::event_idx(self.acked_features));
        queue.set_ready(true);
        if !queue.is_valid(&*mem) {
            return Err(refused(format!("ring {index} does not lie inside guest memory")));
        }
        let used = ring::used_idx(&mem, &queue).map_err(|error| refused(error.to_string()))?;
        queue.set_next_used(used);
        let mut inflight = self.inflight.as_ref().and_then(|region| region.queue(index as u16));
        let resume = match &mut inflight {
            Some(inflight) => inflight.reconcile(slot.size, used).map_err(refused)?,
            None => Default::default(),
        };
        queue.set_next_avail(resume.next_avail.unwrap_or(slot.base));
        if !resume.replay.is_empty() {
            tracing::info!(
                ring = index,
                requests = resume.replay.len(),
                "replaying requests that were in flight"
            );
        }

        if !self.await_left_open() {
            return Ok(());
        }
        if !resume.replay.is_empty() {
            self.device.left_open.fetch_and(!(1 << index), Ordering::Relaxed);
        }
        let stop = CancellationToken::new();
        let kick = {
            let _runtime = self.device.rt.enter();
            Kick::new(kick).map_err(Error::ReqHandlerError)?
        };
        // Without a record the front end could not repeat what is given up.
        let hurry = if inflight.is_some() { &self.hurry } else { &self.device.abort }.clone();
        let ring = Ring {
            index: index as u16,
            queue,
            memory: self.memory.clone(),
            kick,
            call: slot.call.clone(),
            inflight,
            replay: resume.replay.into(),
            read_only: self.device.read_only,
            stop: stop.clone(),
            hurry,
        };
        let task = self.device.rt.spawn(ring.run(self.device.disk.clone()));
        self.rings[index].running = Some(Running { stop, task });
        Ok(())
    }

    fn place(
        &self,
        queue: &mut Queue,
        size: u16,
        addresses: RingAddresses,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        queue.try_set_size(size)?;
        queue.try_set_desc_table_address(self.guest_address(addresses.descriptors)?)?;
        queue.try_set_avail_ring_address(self.guest_address(addresses.avail)?)?;
        queue.try_set_used_ring_address(self.guest_address(addresses.used)?)?;
        Ok(())
    }

    fn guest_address(&self, user_addr: u64) -> std::result::Result<GuestAddress, String> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = user_addr.checked_sub(region.user_addr)?;
                (offset < region.bytes).then(|| GuestAddress(region.guest_addr + offset))
            })
            .ok_or_else(|| format!("address {user_addr:#x} lies in no memory region"))
    }

    fn region(message: &VhostUserMemoryRegion, file: File) -> Result<Region> {
        let (user_addr, bytes, guest_addr) =
            (message.user_addr, message.memory_size, message.guest_phys_addr);
        if bytes == 0 || guest_addr.checked_add(bytes).is_none() || user_addr.checked_add(bytes).is_none() {
            return Err(Error::InvalidParam);
        }
        check_backed(&file, message.mmap_offset, bytes).map_err(Error::ReqHandlerError)?;
        let map = GuestRegionMmap::new(message.mmap_region(file)?, GuestAddress(guest_addr))
            .ok_or(Error::InvalidParam)?;
        Ok(Region { user_addr, bytes, guest_addr, map: Arc::new(map) })
    }

    /// Makes `regions` the memory that the rings see; requests under way keep the mapping that they began with.
    fn set_regions(&mut self, mut regions: Vec<Region>) -> Result<()> {
        if regions.len() > MEMORY_REGIONS_MAX {
            return Err(Error::InvalidParam);
        }
        regions.sort_by_key(|region| region.guest_addr);
        let maps = regions.iter().map(|region| region.map.clone()).collect();
        let memory = GuestMemoryMmap::from_arc_regions(maps).map_err(|error| refused(error.to_string()))?;
        match self.memory.lock() {
            Ok(guard) => guard.replace(memory),
            Err(poisoned) => poisoned.into_inner().replace(memory),
        }
        self.regions = regions;
        Ok(())
    }

    fn reset_rings(&mut self) {
        self.close();
        for slot in &mut self.rings {
            *slot = RingSlot { call: slot.call.clone(), ..RingSlot::default() };
        }
    }
}

impl<D: Disk> Drop for Session<D> {
    fn drop(&mut self) {
        // `close` has waited in the orderly case; here the tasks are only told.
        for slot in &self.rings {
            if let Some(running) = &slot.running {
                running.stop.cancel();
            }
        }
    }
}

impl<D: Disk> VhostUserBackendReqHandlerMut for Session<D> {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(Error::InvalidOperation("the device already has its owner"));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_rings();
        self.owned = false;
        self.acked_features = 0;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset_rings();
        self.acked_features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(self.device.read_only))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config::features(self.device.read_only) != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked_features = features;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for index in 0..self.rings.len() {
                self.rings[index].enabled = true;
                self.start_ring(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        if postcopy_listening.is_some() {
            return Err(Error::InvalidOperation("postcopy is not offered"));
        }
        if regions.len() != files.len() {
            return Err(Error::InvalidParam);
        }
        let regions = regions.iter().zip(files).map(|(region, file)| Self::region(region, file));
        self.set_regions(regions.collect::<Result<_>>()?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let slot = self.slot(index)?;
        if num == 0 || num > u32::from(QUEUE_SIZE_MAX) || !num.is_power_of_two() || slot.running.is_some() {
            return Err(Error::InvalidParam);
        }
        slot.size = num as u16;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let slot = self.slot(index)?;
        if slot.running.is_some() {
            return Err(Error::InvalidOperation("a running ring does not move"));
        }
        slot.addresses = Some(RingAddresses { descriptors: descriptor, avail: available, used });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let slot = self.slot(index)?;
        if slot.running.is_some() {
            return Err(Error::InvalidOperation("a running ring keeps its base"));
        }
        slot.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.slot(index)?;
        self.stop_ring(index as usize);
        let slot = self.slot(index)?;
        slot.kick = None;
        slot.addresses = None;
        slot.call.set(None).map_err(Error::ReqHandlerError)?;
        Ok(VhostUserVringState::new(index, u32::from(slot.base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.slot(u32::from(index))?;
        let Some(file) = file else {
            return Err(Error::InvalidOperation("a ring without a kick descriptor would have to be polled"));
        };
        Kick::check(&file).map_err(Error::ReqHandlerError)?;
        self.stop_ring(usize::from(index));
        self.slot(u32::from(index))?.kick = Some(file);
        self.start_ring(usize::from(index))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.slot(u32::from(index))?.call.set(file).map_err(Error::ReqHandlerError)
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        self.slot(u32::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !config::protocol_features().bits() != 0 {
            return Err(Error::InvalidParam);
        }
        let comes_back = features & VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits() != 0;
        self.notice.comes_back.store(comes_back, Ordering::Relaxed);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.device.num_queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if self.acked_features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Error::InactiveFeature(VhostUserVirtioFeatures::PROTOCOL_FEATURES));
        }
        self.slot(index)?.enabled = enable;
        if enable {
            self.start_ring(index as usize)
        } else {
            self.stop_ring(index as usize);
            Ok(())
        }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // The message's decoder bounds both to the 256 bytes of a configuration space.
        Ok(config::space(self.device.disk.size_bytes(), self.device.num_queues, offset, size))
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("no field of the configuration space is writable"))
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        if asked.num_queues > self.device.num_queues {
            return Err(Error::InvalidParam);
        }
        let (region, message, file) =
            InflightRegion::create(asked.num_queues, asked.queue_size).map_err(refused)?;
        self.inflight = Some(region);
        Ok((message, file))
    }

    fn set_inflight_fd(&mut self, message: &VhostUserInflight, file: File) -> Result<()> {
        if self.rings.iter().any(|slot| slot.running.is_some()) {
            return Err(Error::InvalidOperation("running rings keep their in-flight region"));
        }
        self.inflight = Some(InflightRegion::map(message, file).map_err(refused)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if postcopy_listening.is_some() {
            return Err(Error::InvalidOperation("postcopy is not offered"));
        }
        let added = Self::region(region, file)?;
        let mut regions = std::mem::take(&mut self.regions);
        let before = regions.iter().map(Region::share).collect();
        regions.push(added);
        self.set_regions(regions).inspect_err(|_| self.regions = before)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (user_addr, bytes, guest_addr) = (region.user_addr, region.memory_size, region.guest_phys_addr);
        let kept: Vec<_> = self
            .regions
            .iter()
            .filter(|known| {
                (known.user_addr, known.bytes, known.guest_addr) != (user_addr, bytes, guest_addr)
            })
            .map(Region::share)
            .collect();
        if kept.len() == self.regions.len() {
            return Err(Error::InvalidParam);
        }
        self.set_regions(kept)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("shared objects are not offered"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("state transfer is not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("state transfer is not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory regions are not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("dirty logging is not offered"))
    }
}

impl Region {
    fn share(&self) -> Region {
        Region { map: self.map.clone(), ..*self }
    }
}
