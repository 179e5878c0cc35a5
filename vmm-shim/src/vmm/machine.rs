//! A machine from its configuration to its end. The main thread builds it, starts a thread per vCPU and
//! then carries what is not urgent: control clients, console bytes, disks that come and go.

use super::board::{Board, End};
use super::config::{Config, check_volume};
use super::control::{Client, Command, DiskStatus, Event, Request, Status, answer};
use super::interrupts::{KvmInterrupts, borrow};
use super::limits::CONTROL_CLIENTS_MAX;
use super::net::tap::{Tap, TapError};
use super::net::{self, VirtioNet};
use super::seccomp::{self, SeccompError};
use super::serial::Port;
use super::vcpu::{self, VcpuError};
use super::vhost::{self, Events, VhostBlk};
use super::virtio::Device;
use super::virtio::transport::{BAR_BYTES, VirtioCard};
use super::{acpi, boot, layout, memory};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// Between all of a machine's disks at start.
const DISKS_TIMEOUT: Duration = Duration::from_secs(30);
const DISK_EVENTS_MAX: usize = 64;
/// Where cards' memory is before the guest places it: one step a slot.
const BAR_STEP: u32 = 0x1_0000;

const _: () = assert!(BAR_BYTES <= BAR_STEP);

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("{0}")]
    Config(String),
    #[error("KVM: {what}")]
    Kvm { what: &'static str, source: kvm_ioctls::Error },
    #[error("{what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("no descriptor or thread to be had")]
    Resource(#[from] io::Error),
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("{0}")]
    Disk(String),
}

struct Disk {
    volume: String,
    socket: PathBuf,
    slot: u8,
    monitor: vhost::Monitor,
    asked_to_go: bool,
}

/// An attach that waits for its gateway.
struct Pending {
    volume: String,
    socket: PathBuf,
    /// Whom to answer; none: the disks at start.
    client: Option<(u64, u64)>,
}

pub struct Machine {
    config: Config,
    memory: GuestMemoryMmap,
    interrupts: Arc<KvmInterrupts>,
    board: Arc<Board>,
    wake: Arc<EventFd>,
    disks: Vec<Disk>,
    pending: Vec<Pending>,
    events: Events,
    disk_events: Receiver<vhost::Event>,
    control: UnixListener,
    serial: UnixListener,
    clients: Vec<(u64, Client)>,
    next_client: u64,
    viewer: Option<UnixStream>,
    vcpus: Vec<VcpuFd>,
    running: bool,
}

fn event_fd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// A virtual machine with memory, interrupt controllers and a timer.
pub fn create_vm(memory: &GuestMemoryMmap) -> Result<(Kvm, VmFd), MachineError> {
    let kvm_error = |what| move |source| MachineError::Kvm { what, source };
    let kvm = Kvm::new().map_err(kvm_error("cannot open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(kvm_error("cannot create a machine"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm_error("identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(kvm_error("task state"))?;
    vm.create_irq_chip().map_err(kvm_error("cannot create interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(kvm_error("cannot create the timer"))?;
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping belongs to `memory`, which lives for as long as vCPUs run (see
        // `Machine::run`); slots and addresses of its regions do not overlap.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm_error("guest memory"))?;
    }
    Ok((kvm, vm))
}

impl Machine {
    /// Everything up to the first instruction.
    pub fn new(config: Config) -> Result<Machine, MachineError> {
        config.check().map_err(MachineError::Config)?;
        let memory = memory::create(config.memory_bytes)?;
        let (kvm, vm) = create_vm(&memory)?;
        let vm = Arc::new(vm);
        let wake = Arc::new(event_fd()?);
        let line = event_fd()?;
        vm.register_irqfd(&line, layout::SERIAL_IRQ)
            .map_err(|source| MachineError::Kvm { what: "serial interrupt", source })?;
        let log = config.dir.join("console.log");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(|source| MachineError::Io { what: "cannot open", path: log, source })?;
        let port = Port::new(line, log, wake.try_clone()?);
        let board = Arc::new(Board::new(vm.clone(), port, wake.try_clone()?));
        let (sender, disk_events) = sync_channel(DISK_EVENTS_MAX);
        let mut machine = Machine {
            control: listen(&config, "control.sock")?,
            serial: listen(&config, "serial.sock")?,
            memory,
            interrupts: Arc::new(KvmInterrupts::new(vm.clone())),
            board,
            events: Events { queue: sender, wake: wake.clone() },
            wake,
            disks: Vec::new(),
            pending: Vec::new(),
            disk_events,
            clients: Vec::new(),
            next_client: 0,
            viewer: None,
            vcpus: Vec::new(),
            running: false,
            config,
        };
        machine.open_disks()?;
        machine.plug_nics()?;
        machine.create_vcpus(&kvm, &vm)?;
        Ok(machine)
    }

    fn open_disks(&mut self) -> Result<(), MachineError> {
        for disk in self.config.disks.clone() {
            let pending = Pending { volume: disk.volume.clone(), socket: disk.socket.clone(), client: None };
            self.pending.push(pending);
            vhost::open(disk.volume, disk.socket, self.memory.clone(), self.events.clone())?;
        }
        // They answer in any order; the guest sees them in the order of the configuration.
        let mut opened = Vec::new();
        while opened.len() < self.config.disks.len() {
            match self.disk_events.recv_timeout(DISKS_TIMEOUT) {
                Ok(vhost::Event::Opened { volume, result }) => {
                    opened.push((volume, result.map_err(MachineError::Disk)?));
                }
                Ok(vhost::Event::Closed { volume }) => {
                    return Err(MachineError::Disk(format!("{volume} went away")));
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(MachineError::Disk("a gateway does not answer".into()));
                }
            }
        }
        for pending in std::mem::take(&mut self.pending) {
            let Some(at) = opened.iter().position(|(volume, _)| *volume == pending.volume) else { continue };
            let (_, device) = opened.swap_remove(at);
            self.plug(pending.volume, pending.socket, device).map_err(MachineError::Disk)?;
        }
        Ok(())
    }

    /// After the disks, in the order of the configuration.
    fn plug_nics(&mut self) -> Result<(), MachineError> {
        for nic in self.config.nics.clone() {
            let mac = nic.mac.parse().map_err(MachineError::Config)?;
            let device = VirtioNet::new(Tap::open(&nic.tap)?, mac, self.memory.clone())?;
            self.plug_card(net::VIRTIO_NET, net::PCI_CLASS, Box::new(device)).map_err(MachineError::Disk)?;
        }
        Ok(())
    }

    fn create_vcpus(&mut self, kvm: &Kvm, vm: &VmFd) -> Result<(), MachineError> {
        let config = &self.config;
        let rsdp = acpi::write(&self.memory, config.vcpus)?;
        let entry =
            boot::load(&self.memory, &config.kernel, config.initrd.as_deref(), &config.kernel_args, rsdp)?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| MachineError::Kvm { what: "supported CPUID", source })?;
        for id in 0..config.vcpus {
            let vcpu = vm
                .create_vcpu(u64::from(id))
                .map_err(|source| MachineError::Kvm { what: "cannot create a vCPU", source })?;
            vcpu::set_up(&vcpu, &supported, config.cpu_model, id, config.vcpus)?;
            if id == 0 {
                vcpu::enter_kernel(&vcpu, &self.memory, entry)?;
            }
            self.vcpus.push(vcpu);
        }
        Ok(())
    }

    fn plug(&mut self, volume: String, socket: PathBuf, device: VhostBlk) -> Result<(), String> {
        let monitor = device.monitor();
        let slot = self.plug_card(vhost::VIRTIO_BLOCK, vhost::PCI_CLASS, Box::new(device))?;
        self.disks.push(Disk { volume, socket, slot, monitor, asked_to_go: false });
        Ok(())
    }

    fn plug_card(&mut self, kind: u16, class: u32, device: Box<dyn Device>) -> Result<u8, String> {
        let slot = self.board.bus().free_slot().ok_or("no free slot for another card")?;
        let at = layout::PCI_WINDOW.start as u32 + u32::from(slot) * BAR_STEP;
        let (memory, interrupts) = (self.memory.clone(), self.interrupts.clone());
        let card = VirtioCard::new(kind, class, at, device, memory, interrupts).map_err(|e| e.to_string())?;
        self.board.plug(slot, Box::new(card), self.running);
        Ok(slot)
    }

    /// Runs the guest to its end.
    pub fn run(mut self) -> Result<End, MachineError> {
        self.running = true;
        // vCPUs may be inside the guest until the process ends, also when this has returned.
        std::mem::forget(self.memory.clone());
        for (vcpu, id) in std::mem::take(&mut self.vcpus).into_iter().zip(0..) {
            let board = self.board.clone();
            std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
                match seccomp::restrict(seccomp::Thread::Vcpu) {
                    Ok(()) => vcpu::run(vcpu, &board, id),
                    Err(error) => board.failed(error.to_string()),
                }
            })?;
        }
        seccomp::restrict(seccomp::Thread::Main)?;
        loop {
            self.wait_and_serve()?;
            if let Some(end) = self.board.end() {
                self.board.serial.drain();
                self.record(&end)?;
                self.tell_all(&Event::Ended(end.clone()));
                return Ok(end);
            }
        }
    }

    /// Before anybody is told: whoever hears of the end may end this process.
    fn record(&self, end: &End) -> Result<(), MachineError> {
        let path = self.config.dir.join("ended.json");
        let written =
            serde_json::to_vec(end).map_err(io::Error::other).and_then(|b| std::fs::write(&path, b));
        written.map_err(|source| MachineError::Io { what: "cannot write", path, source })
    }

    fn wait_and_serve(&mut self) -> Result<(), MachineError> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(borrow(&self.wake), PollFlags::IN),
            PollFd::new(&self.control, PollFlags::IN),
            PollFd::new(&self.serial, PollFlags::IN),
        ];
        // Typing waits while the port is full; the guest's reading of it is not an event, so a full port
        // is looked at again with every other one.
        let hears = self.board.serial.room() > 0;
        if let Some(viewer) = &self.viewer {
            fds.push(PollFd::new(viewer, if hears { PollFlags::IN } else { PollFlags::HUP }));
        }
        let first_client = fds.len();
        for (_, client) in &self.clients {
            let flags = if client.wants_to_write() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            fds.push(PollFd::new(&client.stream, flags));
        }
        let again = rustix::event::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        let timeout = (self.viewer.is_some() && !hears).then_some(&again);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(MachineError::Resource(error.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[0] {
            // A wake-up that somebody else took is no error.
            let _ = self.wake.read();
            self.board.serial.drain();
            self.disk_news();
        }
        if ready[1] {
            self.accept_client();
        }
        if ready[2] {
            self.accept_viewer();
        }
        if first_client > 3 && ready[3] && self.viewer.is_some() {
            self.typed();
        }
        let called: Vec<u64> = self
            .clients
            .iter()
            .zip(&ready[first_client..])
            .filter(|(_, r)| **r)
            .map(|((id, _), _)| *id)
            .collect();
        called.into_iter().for_each(|id| self.client_news(id));
        Ok(())
    }

    fn accept_viewer(&mut self) {
        let Ok((stream, _)) = self.serial.accept() else { return };
        // One viewer at a time; the newest counts.
        let copies = stream.set_nonblocking(true).and_then(|()| stream.try_clone());
        if let Ok(output) = copies {
            self.board.serial.set_viewer(Some(output));
            self.viewer = Some(stream);
        }
    }

    fn typed(&mut self) {
        let Some(viewer) = &mut self.viewer else { return };
        let mut buffer = [0; 64];
        let room = self.board.serial.room().min(buffer.len());
        // With a full port only the viewer's end was waited for; an empty read ends it here.
        match viewer.read(&mut buffer[..room]) {
            Ok(n) if n > 0 => {
                self.board.serial.type_in(&buffer[..n]);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            _ => {
                self.viewer = None;
                self.board.serial.set_viewer(None);
            }
        }
    }

    fn accept_client(&mut self) {
        let Ok((stream, _)) = self.control.accept() else { return };
        // One too many is closed at once.
        if self.clients.len() < CONTROL_CLIENTS_MAX
            && let Ok(client) = Client::new(stream)
        {
            self.clients.push((self.next_client, client));
            self.next_client += 1;
        }
    }

    fn client_news(&mut self, id: u64) {
        let Some((_, client)) = self.clients.iter_mut().find(|(known, _)| *known == id) else { return };
        let requests = client.flush().and_then(|()| client.receive());
        match requests {
            Ok(requests) => requests.into_iter().for_each(|request| self.serve(id, request)),
            Err(_) => self.clients.retain(|(known, _)| *known != id),
        }
    }

    fn serve(&mut self, client: u64, request: Request) {
        let result = match request.command {
            Command::Status => Ok(json!(self.status())),
            Command::PowerButton => {
                self.board.press_power_button();
                Ok(Value::Null)
            }
            Command::Detach { volume } => self.detach(&volume).map(|()| Value::Null),
            Command::Attach { volume, socket } => match self.attach(volume, socket, (client, request.id)) {
                // Answered when the gateway has.
                Ok(()) => return,
                Err(error) => Err(error),
            },
        };
        self.tell(client, &answer(request.id, result));
    }

    fn status(&self) -> Status {
        let disk = |disk: &Disk| DiskStatus {
            volume: disk.volume.clone(),
            socket: disk.socket.clone(),
            slot: disk.slot,
            connected: disk.monitor.is_connected(),
        };
        let mut disks: Vec<_> = self.disks.iter().map(disk).collect();
        disks.sort_by_key(|d| d.slot);
        Status {
            pid: std::process::id(),
            vcpus: self.config.vcpus,
            memory_bytes: self.config.memory_bytes,
            disks,
        }
    }

    fn attach(&mut self, volume: String, socket: PathBuf, client: (u64, u64)) -> Result<(), String> {
        check_volume(&volume)?;
        let has = self.disks.iter().any(|d| d.volume == volume);
        if has || self.pending.iter().any(|p| p.volume == volume) {
            return Err(format!("the guest has {volume} already"));
        }
        vhost::open(volume.clone(), socket.clone(), self.memory.clone(), self.events.clone())
            .map_err(|e| e.to_string())?;
        self.pending.push(Pending { volume, socket, client: Some(client) });
        Ok(())
    }

    fn detach(&mut self, volume: &str) -> Result<(), String> {
        let boot = self.disks.iter().map(|d| d.slot).min();
        let disk = self.disks.iter_mut().find(|d| d.volume == volume);
        let disk = disk.ok_or_else(|| format!("the guest does not have {volume}"))?;
        if Some(disk.slot) == boot && self.config.disks.first().is_some_and(|d| d.volume == volume) {
            return Err(format!("{volume} is the boot disk of a running guest"));
        }
        disk.asked_to_go = true;
        self.board.ask_to_unplug(disk.slot);
        Ok(())
    }

    fn disk_news(&mut self) {
        while let Ok(event) = self.disk_events.try_recv() {
            match event {
                vhost::Event::Opened { volume, result } => self.opened(&volume, result),
                vhost::Event::Closed { volume } => self.closed(volume),
            }
        }
    }

    fn opened(&mut self, volume: &str, result: Result<VhostBlk, String>) {
        let Some(at) = self.pending.iter().position(|p| p.volume == *volume) else { return };
        let pending = self.pending.remove(at);
        let result = result.and_then(|device| self.plug(pending.volume, pending.socket, device));
        if let Some((client, id)) = pending.client {
            self.tell(client, &answer(id, result.map(|()| Value::Null)));
        }
    }

    fn closed(&mut self, volume: String) {
        if let Some(at) = self.disks.iter().position(|d| d.volume == volume) {
            let disk = self.disks.remove(at);
            if !disk.asked_to_go {
                tracing::warn!(volume, "the guest let go of a disk by itself");
            }
            self.tell_all(&Event::Detached { volume });
        }
    }

    fn tell(&mut self, id: u64, message: &Value) {
        let Some((_, client)) = self.clients.iter_mut().find(|(known, _)| *known == id) else { return };
        if client.send(message).is_err() {
            self.clients.retain(|(known, _)| *known != id);
        }
    }

    fn tell_all(&mut self, event: &Event) {
        self.clients.retain_mut(|(_, client)| client.send(event).is_ok());
    }
}

fn listen(config: &Config, name: &str) -> Result<UnixListener, MachineError> {
    let path = config.dir.join(name);
    let failed = |source| MachineError::Io { what: "cannot listen on", path: path.clone(), source };
    // One process per directory: what is there is of an earlier guest.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
