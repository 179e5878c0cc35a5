//! What gateways and host agents should do: exports and virtual machines.
//!
//! A volume is a disk of at most one VM, and is served from one host at a time. Exports of a VM's
//! disks exist from its start until its host says that the guest no longer uses them.

use super::*;
use gabion_proto::limits::*;
use gabion_proto::nic::{MacAddress, NICS_MAX, check_tap_name};

/// What runs guests; none named: what suits the host.
const ENGINES: [&str; 3] = ["", "native", "qemu"];
/// The first is the default.
const CPU_MODELS: [&str; 3] = ["host", "generic", "kvm64"];
/// Longest serial that virtio-blk can show.
const SERIAL_BYTES_MAX: usize = 20;
const KERNEL_ARGS_BYTES_MAX: usize = 2048;

fn check_host(host: &str) -> Result<(), Refusal> {
    match valid_name(host) {
        true => Ok(()),
        false => Err(Refusal::invalid(format!("{host:?} cannot be the name of a host"))),
    }
}

impl MonitorState {
    /// The VM that has this volume as a disk.
    pub fn vm_of(&self, volume: VolumeId) -> Option<&str> {
        let owner = self.vms.iter().find(|(_, vm)| vm.disks.iter().any(|d| d.volume == volume));
        owner.map(|(name, _)| name.as_str())
    }

    fn volume_name(&self, volume: VolumeId) -> String {
        self.volumes.get(&volume).map_or_else(|| volume.to_string(), |v| v.name.clone())
    }

    fn vm_named(&mut self, name: &str) -> Result<&mut Vm, Refusal> {
        self.vms.get_mut(name).ok_or_else(|| Refusal::not_found(format!("there is no VM {name:?}")))
    }

    fn check_exportable(&self, volume: VolumeId, host: &str) -> Result<(), Refusal> {
        let served = |e: &Export| e.volume == volume && e.snapshot.is_none();
        let elsewhere = self.exports.values().find(|e| served(e) && e.host != host);
        match elsewhere {
            None => Ok(()),
            Some(e) => Err(Refusal::precondition(format!(
                "volume {} is served from host {} already",
                self.volume_name(volume),
                e.host
            ))),
        }
    }

    pub(super) fn add_export(
        &mut self,
        volume: &str,
        kind: ExportKind,
        read_only: bool,
        host: String,
    ) -> CommandResult {
        check_host(&host)?;
        if volume.contains('@') {
            // Frozen: read without being attached, wherever it is wanted.
            let snapshot = self.snapshot_named(volume)?;
            let id = self.snapshots[&snapshot].volume;
            let of = |e: &Export| e.snapshot == Some(snapshot) && e.kind == kind && e.host == host;
            if let Some((other, _)) = self.exports.iter().find(|(_, e)| of(e)) {
                return Err(Refusal::exists(format!(
                    "snapshot {volume} has export {other} of this kind there already"
                )));
            }
            let export =
                Export { volume: id, snapshot: Some(snapshot), kind, read_only: true, host, vm: None };
            return self.insert_export(export).map(Reply::Export);
        }
        let id = self.volume_named(volume)?;
        if let Some(vm) = self.vm_of(id) {
            let vm_host = &self.vms[vm].host;
            if *vm_host != host {
                return Err(Refusal::precondition(format!(
                    "volume {volume} is a disk of VM {vm} on host {vm_host}: it cannot be served from host {host}"
                )));
            }
        }
        self.check_exportable(id, &host)?;
        let of = |e: &Export| e.volume == id && e.snapshot.is_none() && e.kind == kind;
        if let Some((other, _)) = self.exports.iter().find(|(_, e)| of(e)) {
            return Err(Refusal::exists(format!("volume {volume} has export {other} of this kind already")));
        }
        self.insert_export(Export { volume: id, snapshot: None, kind, read_only, host, vm: None })
            .map(Reply::Export)
    }

    fn insert_export(&mut self, export: Export) -> Result<u64, Refusal> {
        if self.exports.len() >= EXPORTS_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {EXPORTS_MAX} exports")));
        }
        self.counters.export += 1;
        self.exports.insert(self.counters.export, export);
        self.host_revision += 1;
        Ok(self.counters.export)
    }

    pub(super) fn remove_export(&mut self, id: u64) -> CommandResult {
        let export = self.exports.get(&id);
        let export = export.ok_or_else(|| Refusal::not_found(format!("there is no export {id}")))?;
        if let Some(vm) = &export.vm {
            return Err(Refusal::precondition(format!(
                "export {id} belongs to VM {vm}: detach the disk or stop the VM"
            )));
        }
        self.exports.remove(&id);
        self.host_revision += 1;
        Ok(Reply::Done)
    }

    fn check_disk(&self, request: &DiskRequest) -> Result<Disk, Refusal> {
        let volume = self.volume_named(&request.volume)?;
        if let Some(vm) = self.vm_of(volume) {
            return Err(Refusal::precondition(format!(
                "volume {} is a disk of VM {vm} already",
                request.volume
            )));
        }
        let serial = match request.serial.as_str() {
            "" => format!("gabion-{:x}", volume.0),
            given => given.to_owned(),
        };
        if serial.len() > SERIAL_BYTES_MAX || !serial.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Refusal::invalid(format!(
                "a serial has at most {SERIAL_BYTES_MAX} printable ASCII characters, {serial:?} does not"
            )));
        }
        Ok(Disk { volume, serial, leaving: false })
    }

    /// Cards with their addresses; no tap device of a host and no address is given twice.
    fn check_nics(&self, vm: &str, host: &str, nics: Vec<Nic>) -> Result<Vec<Nic>, Refusal> {
        if nics.len() > NICS_MAX {
            return Err(Refusal::invalid(format!(
                "a VM has at most {NICS_MAX} network cards, not {}",
                nics.len()
            )));
        }
        let mut checked: Vec<Nic> = Vec::new();
        for (index, Nic { tap, mac }) in nics.into_iter().enumerate() {
            check_tap_name(&tap).map_err(Refusal::invalid)?;
            let mac = match mac.as_str() {
                "" => MacAddress::derived(vm, index),
                text => text.parse().map_err(Refusal::invalid)?,
            }
            .to_string();
            let own = checked.iter().map(|other| (vm, host, other));
            let others = self
                .vms
                .iter()
                .flat_map(|(name, v)| v.nics.iter().map(move |nic| (name.as_str(), v.host.as_str(), nic)));
            for (name, its_host, other) in own.chain(others) {
                if other.tap == tap && its_host == host {
                    return Err(Refusal::invalid(format!(
                        "VM {name} has the tap device {tap} of host {host}"
                    )));
                }
                if other.mac == mac {
                    return Err(Refusal::invalid(format!("VM {name} has a card with the address {mac}")));
                }
            }
            checked.push(Nic { tap, mac });
        }
        Ok(checked)
    }

    // One argument per field of the command.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn create_vm(
        &mut self,
        name: String,
        cpus: u32,
        memory_bytes: u64,
        disks: Vec<DiskRequest>,
        host: String,
        kernel_args: String,
        engine: String,
        cpu_model: String,
        nics: Vec<Nic>,
    ) -> CommandResult {
        if !valid_name(&name) {
            return Err(Refusal::invalid(format!("{name:?} cannot be the name of a VM")));
        }
        check_host(&host)?;
        if self.vms.contains_key(&name) {
            return Err(Refusal::exists(format!("there is a VM {name:?} already")));
        }
        if !(1..=VM_CPUS_MAX).contains(&cpus) {
            return Err(Refusal::invalid(format!("a VM has 1 to {VM_CPUS_MAX} CPUs, not {cpus}")));
        }
        if !(VM_MEMORY_BYTES_MIN..=VM_MEMORY_BYTES_MAX).contains(&memory_bytes) {
            return Err(Refusal::invalid(format!(
                "a VM has {VM_MEMORY_BYTES_MIN} to {VM_MEMORY_BYTES_MAX} bytes of memory, not {memory_bytes}"
            )));
        }
        if disks.is_empty() || disks.len() > VM_DISKS_MAX {
            return Err(Refusal::invalid(format!("a VM has 1 to {VM_DISKS_MAX} disks, not {}", disks.len())));
        }
        if kernel_args.len() > KERNEL_ARGS_BYTES_MAX || kernel_args.bytes().any(|b| b.is_ascii_control()) {
            return Err(Refusal::invalid(format!(
                "kernel arguments are one line of at most {KERNEL_ARGS_BYTES_MAX} bytes"
            )));
        }
        if !ENGINES.contains(&engine.as_str()) {
            return Err(Refusal::invalid(format!("an engine is native or qemu, not {engine:?}")));
        }
        let cpu_model = if cpu_model.is_empty() { CPU_MODELS[0].to_owned() } else { cpu_model };
        if !CPU_MODELS.contains(&cpu_model.as_str()) {
            return Err(Refusal::invalid(format!(
                "a CPU model is {}, not {cpu_model:?}",
                CPU_MODELS.join(", ")
            )));
        }
        let nics = self.check_nics(&name, &host, nics)?;
        if self.vms.len() >= VMS_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {VMS_MAX} VMs")));
        }
        let disks = disks.iter().map(|d| self.check_disk(d)).collect::<Result<Vec<_>, _>>()?;
        for (i, disk) in disks.iter().enumerate() {
            if disks[..i].iter().any(|d| d.volume == disk.volume) {
                return Err(Refusal::invalid(format!(
                    "volume {} is named twice",
                    self.volume_name(disk.volume)
                )));
            }
            if disks[..i].iter().any(|d| d.serial == disk.serial) {
                return Err(Refusal::invalid(format!("serial {} is given twice", disk.serial)));
            }
        }
        let vm = Vm {
            cpus,
            memory_bytes,
            disks,
            host,
            kernel_args,
            engine,
            cpu_model,
            nics,
            wanted_running: false,
            action: VmAction::Stop,
            action_number: 0,
        };
        self.vms.insert(name, vm);
        self.host_revision += 1;
        Ok(Reply::Done)
    }

    pub(super) fn set_vm_state(&mut self, name: &str, action: VmAction) -> CommandResult {
        let vm = self.vm_named(name)?.clone();
        if action == VmAction::Start {
            for disk in &vm.disks {
                self.check_exportable(disk.volume, &vm.host)?;
            }
            for disk in &vm.disks {
                self.export_disk(name, &vm.host, disk.volume)?;
            }
        }
        let vm = self.vm_named(name)?;
        vm.wanted_running = action == VmAction::Start;
        vm.action = action;
        vm.action_number += 1;
        self.host_revision += 1;
        let what = match action {
            VmAction::Start => "start",
            VmAction::Stop => "shut down",
            VmAction::Kill => "be switched off",
        };
        self.event(EventSeverity::Ok, format!("VM {name} should {what}"));
        Ok(Reply::Done)
    }

    fn export_disk(&mut self, vm: &str, host: &str, volume: VolumeId) -> Result<(), Refusal> {
        let there = self.exports.values().any(|e| e.volume == volume && e.vm.as_deref() == Some(vm));
        if !there {
            self.insert_export(Export {
                volume,
                snapshot: None,
                kind: ExportKind::VhostUser,
                read_only: false,
                host: host.to_owned(),
                vm: Some(vm.to_owned()),
            })?;
        }
        Ok(())
    }

    /// Whether the guest may be using its disks.
    fn vm_has_exports(&self, name: &str) -> bool {
        self.exports.values().any(|e| e.vm.as_deref() == Some(name))
    }

    pub(super) fn attach_disk(&mut self, name: &str, request: DiskRequest) -> CommandResult {
        let disk = self.check_disk(&request)?;
        let vm = self.vm_named(name)?.clone();
        if vm.disks.len() >= VM_DISKS_MAX {
            return Err(Refusal::exhausted(format!("a VM has at most {VM_DISKS_MAX} disks")));
        }
        if vm.disks.iter().any(|d| d.serial == disk.serial) {
            return Err(Refusal::exists(format!("VM {name} has a disk of serial {} already", disk.serial)));
        }
        self.check_exportable(disk.volume, &vm.host)?;
        if vm.wanted_running {
            self.export_disk(name, &vm.host, disk.volume)?;
        }
        self.vm_named(name)?.disks.push(disk);
        self.host_revision += 1;
        Ok(Reply::Done)
    }

    pub(super) fn detach_disk(&mut self, name: &str, volume: &str) -> CommandResult {
        let id = self.volume_named(volume)?;
        let in_use = self.vm_has_exports(name);
        let vm = self.vm_named(name)?;
        let at = vm.disks.iter().position(|d| d.volume == id);
        let at = at.ok_or_else(|| Refusal::not_found(format!("VM {name} has no disk {volume}")))?;
        if at == 0 {
            return Err(Refusal::precondition(format!("{volume} is the boot disk of VM {name}")));
        }
        match in_use {
            true => vm.disks[at].leaving = true,
            false => drop(vm.disks.remove(at)),
        }
        self.host_revision += 1;
        Ok(Reply::Done)
    }

    pub(super) fn vm_stopped(&mut self, name: &str, action_number: u64) -> CommandResult {
        let vm = self.vm_named(name)?;
        if vm.action_number != action_number {
            return Err(Refusal::aborted(format!("VM {name} was asked for something newer")));
        }
        let by_itself = std::mem::replace(&mut vm.wanted_running, false);
        vm.disks.retain(|d| !d.leaving);
        if by_itself {
            vm.action = VmAction::Stop;
            vm.action_number += 1;
            self.event(EventSeverity::Ok, format!("VM {name} has shut down by itself"));
        }
        self.exports.retain(|_, e| e.vm.as_deref() != Some(name));
        self.host_revision += 1;
        Ok(Reply::Done)
    }

    pub(super) fn disk_released(&mut self, name: &str, volume: VolumeId) -> CommandResult {
        let vm = self.vm_named(name)?;
        let before = vm.disks.len();
        vm.disks.retain(|d| d.volume != volume || !d.leaving);
        if vm.disks.len() < before {
            self.exports.retain(|_, e| e.vm.as_deref() != Some(name) || e.volume != volume);
            self.host_revision += 1;
        }
        Ok(Reply::Done)
    }

    pub(super) fn remove_vm(&mut self, name: &str) -> CommandResult {
        if self.vm_named(name)?.wanted_running || self.vm_has_exports(name) {
            return Err(Refusal::precondition(format!("VM {name} is not stopped")));
        }
        self.vms.remove(name);
        self.host_revision += 1;
        Ok(Reply::Done)
    }
}
