//! One guest on this host. One task owns it.
//!
//! ```text
//!  stopped ──start──► starting (exports ready? admitted? boot files?) ──► running ──stop──► stopping
//!     ▲                   │ refused                                          │ ends            │
//!     └───────────────────┴──────────────► stopped or failed ◄───────────────┴─────────────────┘
//! ```

use super::record::Record;
use super::{Host, Wanted};
use crate::boot::{self, disk::VolumeDisk};
use crate::console::Hub;
use crate::engine::choice::EngineKind;
use crate::engine::{Disk, Exit, Guest, Machine, Nic};
use crate::vmm::cpuid::CpuModel;
use gabion_common::client::reader::VolumeReader;
use gabion_proto::admission::Resources;
use gabion_proto::pb::{self, VmAction, VmState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Between tries of what can succeed later without a new wish: a disk that would not attach.
const RETRY: Duration = Duration::from_secs(5);
const BOOT_READ_TIMEOUT: Duration = Duration::from_secs(30);

struct Vm {
    host: Arc<Host>,
    name: String,
    dir: PathBuf,
    record_path: PathBuf,
    record: Record,
    state: VmState,
    error: String,
    guest: Option<Box<dyn Guest>>,
    last: pb::VmInfo,
}

/// Runs until the monitors no longer know the guest and it does not run.
pub(super) async fn run(host: Arc<Host>, name: String, mut wanted: watch::Receiver<Wanted>) {
    let mut vm = Vm::load(host, name).await;
    loop {
        let now = wanted.borrow_and_update().clone();
        if now.spec.is_none() && vm.guest.is_none() {
            vm.forget();
            return;
        }
        vm.step(&now).await;
        vm.publish();
        let mut exit = vm.guest.as_ref().map(|g| g.exit());
        let ended = async {
            match &mut exit {
                Some(exit) => exit.wait_for(Option::is_some).await.map_or_else(
                    |_| Exit::Failed("the engine lost sight of it".into()),
                    |how| how.clone().unwrap_or(Exit::Stopped(String::new())),
                ),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            how = ended => vm.ended(how),
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

impl Vm {
    async fn load(host: Arc<Host>, name: String) -> Vm {
        let dir = host.run_dir.join("vms").join(&name);
        let record_path = host.state_dir.join(format!("{name}.vm.json"));
        let mut vm = Vm {
            last: pb::VmInfo { name: name.clone(), ..Default::default() },
            host,
            name,
            dir,
            record_path,
            record: Record::default(),
            state: VmState::Stopped,
            error: String::new(),
            guest: None,
        };
        match Record::load(&vm.record_path) {
            Ok(record) => vm.record = record,
            Err(error) => {
                tracing::error!(vm = vm.name, %error, "the agent's record of a guest is not readable");
                vm.error = format!("{}: {error}", vm.record_path.display());
            }
        }
        match vm.host.engine.adopt(&vm.dir).await {
            Ok(Some(guest)) => {
                tracing::info!(vm = vm.name, "adopted a running guest");
                vm.running(guest);
            }
            Ok(None) if vm.record.run && vm.dir.join("machine.json").exists() => {
                vm.ended(Exit::Stopped("it ended while the host agent was away".into()));
            }
            Ok(None) => {}
            Err(error) => {
                vm.state = VmState::Failed;
                vm.record.run = false;
                vm.error = format!("it runs but its engine cannot be reached: {}", chain(&error));
            }
        }
        vm
    }

    async fn step(&mut self, wanted: &Wanted) {
        let Some(spec) = &wanted.spec else {
            self.error = "the monitors do not know this guest; it runs on".into();
            return;
        };
        let Some(info) = &spec.vm else { return };
        self.last = info.clone();
        if self.guest.is_some() {
            // Also one that was adopted.
            let given = Resources { cpus: info.cpus, memory_bytes: info.memory_bytes };
            self.host.ledger.enter(&self.name, given);
        }
        if spec.action_number > self.record.action_number {
            self.act(spec).await;
        }
        if self.guest.is_some() {
            if self.state == VmState::Running {
                self.match_disks(info, &wanted.exports).await;
            }
        } else if self.record.run {
            self.start(info, &wanted.exports).await;
        }
    }

    async fn act(&mut self, spec: &pb::VmSpec) {
        let action = spec.action();
        let run = match action {
            VmAction::Start => true,
            VmAction::Stop | VmAction::Kill => false,
            VmAction::Unspecified => self.record.run,
        };
        let record = Record { action_number: spec.action_number, run };
        if let Err(error) = record.save(&self.record_path) {
            self.error = format!("cannot write {}: {error}", self.record_path.display());
            return;
        }
        self.record = record;
        self.error.clear();
        tracing::info!(vm = self.name, ?action, number = spec.action_number, "asked to act");
        let done = match (&self.guest, action) {
            (Some(guest), VmAction::Stop) => {
                self.state = VmState::Stopping;
                guest.stop().await
            }
            (Some(guest), VmAction::Kill) => {
                self.state = VmState::Stopping;
                guest.kill().await
            }
            (None, VmAction::Stop | VmAction::Kill) => {
                self.state = VmState::Stopped;
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = done {
            self.error = chain(&error);
        }
    }

    async fn start(&mut self, info: &pb::VmInfo, exports: &[pb::ExportInfo]) {
        self.state = VmState::Starting;
        let mut disks = Vec::new();
        self.error.clear();
        for disk in &info.disks {
            match ready(exports, &disk.volume) {
                Ok(Some(disk)) => disks.push(disk),
                Ok(None) => return,
                Err(error) => {
                    self.error = error;
                    return;
                }
            }
        }
        self.publish();
        match self.try_start(info, disks).await {
            Ok(guest) => {
                tracing::info!(vm = self.name, engine = guest.engine(), "guest started");
                self.running(guest);
            }
            Err(error) => {
                tracing::warn!(vm = self.name, error, "guest did not start");
                self.ended(Exit::Failed(error));
            }
        }
    }

    async fn try_start(&self, info: &pb::VmInfo, disks: Vec<Disk>) -> Result<Box<dyn Guest>, String> {
        let wants = Resources { cpus: info.cpus, memory_bytes: info.memory_bytes };
        self.host.ledger.admit(&self.name, wants)?;
        let boot = disks.first().ok_or("it has no disk to boot from")?;
        std::fs::create_dir_all(&self.dir).map_err(|e| format!("{}: {e}", self.dir.display()))?;
        let (kernel, initrd) = (self.dir.join("kernel"), self.dir.join("initrd"));
        let reader = VolumeReader::connect(&self.host.monitors, &boot.volume, Some(BOOT_READ_TIMEOUT))
            .await
            .map_err(|e| chain(&e))?;
        let (disk, volume) = (Arc::new(VolumeDisk::new(reader)), boot.volume.clone());
        let (k, i) = (kernel.clone(), initrd.clone());
        let (root, has_initrd) = tokio::task::spawn_blocking(move || {
            let files = boot::find(disk, &volume).map_err(|e| chain(&e))?;
            let write = |path: &Path, bytes: &[u8]| {
                std::fs::write(path, bytes).map_err(|e| format!("{}: {e}", path.display()))
            };
            write(&k, &files.kernel)?;
            if let Some(initrd) = &files.initrd {
                write(&i, initrd)?;
            }
            Ok::<_, String>((files.root, files.initrd.is_some()))
        })
        .await
        .map_err(|e| format!("reading the boot files failed: {e}"))??;
        let engine = match info.engine_wanted.as_str() {
            "" => None,
            name => Some(name.parse::<EngineKind>()?),
        };
        let cpu_model = match info.cpu_model.as_str() {
            "" => CpuModel::default(),
            name => name.parse()?,
        };
        let machine = Machine {
            name: self.name.clone(),
            vcpus: info.cpus,
            memory_bytes: info.memory_bytes,
            cpu_model,
            engine,
            kernel,
            initrd: has_initrd.then_some(initrd),
            kernel_args: format!("root={root} ro console=ttyS0 panic=-1 {}", info.kernel_args).trim().into(),
            disks,
            nics: info.nics.iter().map(|nic| Nic { tap: nic.tap.clone(), mac: nic.mac.clone() }).collect(),
            dir: self.dir.clone(),
        };
        self.host.engine.start(machine).await.map_err(|e| chain(&e))
    }

    /// Attaches and detaches until the guest has the disks of its record.
    async fn match_disks(&mut self, info: &pb::VmInfo, exports: &[pb::ExportInfo]) {
        let Some(guest) = &mut self.guest else { return };
        let has = guest.volumes();
        let mut problem = String::new();
        for volume in has.iter().filter(|v| info.disks.iter().all(|d| d.volume != **v)) {
            if let Err(error) = guest.detach(volume).await {
                problem = format!("cannot detach {volume}: {}", chain(&error));
            }
        }
        for disk in info.disks.iter().filter(|d| !has.contains(&d.volume)) {
            let outcome = match ready(exports, &disk.volume) {
                Ok(Some(ready)) => guest.attach(ready).await.map_err(|e| chain(&e)),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                problem = format!("cannot attach {}: {error}", disk.volume);
            }
        }
        self.error = problem;
    }

    fn running(&mut self, guest: Box<dyn Guest>) {
        self.host.consoles.insert(&self.name, Hub::open(guest.serial_socket(), guest.serial_log()));
        self.guest = Some(guest);
        self.state = VmState::Running;
        self.error.clear();
    }

    fn ended(&mut self, how: Exit) {
        tracing::info!(vm = self.name, ?how, "guest ended");
        self.host.consoles.remove(&self.name);
        self.host.ledger.leave(&self.name);
        self.guest = None;
        self.record.run = false;
        (self.state, self.error) = match how {
            Exit::Stopped(text) => (VmState::Stopped, text),
            Exit::Failed(text) => (VmState::Failed, text),
        };
        if let Err(error) = self.record.save(&self.record_path) {
            tracing::error!(vm = self.name, %error, "cannot record that a guest ended");
        }
        self.publish();
    }

    fn publish(&self) {
        let volumes = self.guest.as_ref().map(|g| g.volumes()).unwrap_or_default();
        let mut info = self.last.clone();
        for disk in &mut info.disks {
            disk.attached = volumes.contains(&disk.volume);
        }
        // What it still has although it should not: the monitor keeps the export until it is gone.
        for volume in volumes {
            if info.disks.iter().all(|d| d.volume != volume) {
                info.disks.push(pb::VmDisk { volume, serial: String::new(), attached: true });
            }
        }
        info.state = self.state.into();
        info.error = self.error.clone();
        info.engine = self.guest.as_ref().map_or_else(|| self.host.engine.name(), |guest| guest.engine());
        info.host = self.host.name.clone();
        info.agent_addr = self.host.agent_addr.to_string();
        self.host.reports.set(info);
    }

    fn forget(&self) {
        self.host.reports.remove(&self.name);
        for result in [std::fs::remove_dir_all(&self.dir), std::fs::remove_file(&self.record_path)] {
            if let Err(error) = result
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(vm = self.name, %error, "cannot clear away a removed guest");
            }
        }
    }
}

/// The disk behind `volume` when its export is served; `None` while it is not yet.
fn ready(exports: &[pb::ExportInfo], volume: &str) -> Result<Option<Disk>, String> {
    let of_volume = |e: &&pb::ExportInfo| e.volume == volume && e.kind() == pb::ExportKind::VhostUser;
    match exports.iter().find(of_volume) {
        Some(e) if e.state() == pb::ExportState::Failed => Err(format!("export of {volume}: {}", e.error)),
        Some(e) if e.state() == pb::ExportState::Ready && !e.socket.is_empty() => {
            Ok(Some(Disk { volume: volume.into(), socket: e.socket.clone().into() }))
        }
        _ => Ok(None),
    }
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
