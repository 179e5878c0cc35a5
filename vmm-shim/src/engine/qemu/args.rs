//! The command line of QEMU for a machine. Guest memory is shared, so that the gateway reads and
//! writes it directly; each disk has a PCIe root port of its own, so that it can be unplugged.

use crate::engine::Machine;
use crate::vmm::cpuid::CpuModel;
use std::ffi::OsString;
use std::path::Path;

/// Root ports beyond the disks at start, for disks attached later.
const SPARE_PORTS: usize = 4;
const FUNCTIONS_PER_SLOT: usize = 8;
/// First PCI slot of the root ports; q35 itself uses 0 and 31.
const FIRST_SLOT: usize = 4;
const QUEUES_MAX: u32 = 4;
/// First PCI slot of the network cards, beyond all root ports.
const NIC_SLOT: usize = 0x18;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    Tcg,
}

pub fn ports(disks: usize) -> usize {
    disks + SPARE_PORTS
}

pub fn queues(vcpus: u32) -> u32 {
    vcpus.clamp(1, QUEUES_MAX)
}

/// Arguments after the program's name.
pub fn arguments(machine: &Machine, accelerator: Accelerator) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: String| {
        args.push(option.into());
        args.push(value.into());
    };
    let path = |p: &Path| escape(&p.to_string_lossy());
    let in_dir = |name: &str| path(&machine.dir.join(name));
    add("-name", format!("guest={}", escape(&machine.name)));
    add("-machine", "q35,memory-backend=mem,vmport=off".into());
    match accelerator {
        Accelerator::Kvm => {
            add("-accel", "kvm".into());
        }
        Accelerator::Tcg => {
            add("-accel", "tcg,thread=multi".into());
        }
    }
    add("-cpu", processor(machine.cpu_model, accelerator).into());
    add("-smp", machine.vcpus.to_string());
    add("-m", format!("{}B", machine.memory_bytes));
    add("-object", format!("memory-backend-memfd,id=mem,size={},share=on", machine.memory_bytes));
    add("-display", "none".into());
    add("-chardev", format!("socket,id=qmp,path={},server=on,wait=off", in_dir("qmp.sock")));
    add("-mon", "chardev=qmp,mode=control".into());
    add(
        "-chardev",
        format!(
            "socket,id=serial,path={},server=on,wait=off,logfile={},logappend=on",
            in_dir("serial.sock"),
            in_dir("console.log")
        ),
    );
    add("-device", "isa-serial,chardev=serial".into());
    add("-object", "rng-random,id=rng,filename=/dev/urandom".into());
    add("-device", "virtio-rng-pci,rng=rng,addr=0x3".into());
    for port in 0..ports(machine.disks.len()) {
        let (slot, function) = (FIRST_SLOT + port / FUNCTIONS_PER_SLOT, port % FUNCTIONS_PER_SLOT);
        add(
            "-device",
            format!(
                "pcie-root-port,id=port{port},chassis={},addr={slot:#x}.{function},multifunction=on",
                port + 1
            ),
        );
    }
    for (port, disk) in machine.disks.iter().enumerate() {
        add("-chardev", format!("socket,id=char{port},path={},reconnect=1", path(&disk.socket)));
        add(
            "-device",
            format!(
                "vhost-user-blk-pci,id=disk{port},chardev=char{port},bus=port{port},num-queues={}",
                queues(machine.vcpus)
            ),
        );
    }
    for (n, nic) in machine.nics.iter().enumerate() {
        // Names and addresses were checked: no comma is in them.
        add("-netdev", format!("tap,id=net{n},ifname={},script=no,downscript=no", nic.tap));
        add("-device", format!("virtio-net-pci,netdev=net{n},mac={},addr={:#x}", nic.mac, NIC_SLOT + n));
    }
    // These three are taken as they are, commas and all.
    add("-append", machine.kernel_args.clone());
    args.push("-kernel".into());
    args.push(machine.kernel.clone().into());
    if let Some(initrd) = &machine.initrd {
        args.push("-initrd".into());
        args.push(initrd.clone().into());
    }
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    args
}

/// QEMU's name for a model: Westmere is the x86-64-v2 level and AES.
fn processor(model: CpuModel, accelerator: Accelerator) -> &'static str {
    match (model, accelerator) {
        (CpuModel::Host, Accelerator::Kvm) => "host",
        // The emulator's own, and its cheapest.
        (CpuModel::Host, Accelerator::Tcg) => "qemu64",
        (CpuModel::Generic, _) => "Westmere",
        (CpuModel::Kvm64, _) => "kvm64",
    }
}

/// QEMU's option lists are split at commas; a doubled one is literal.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Disk, Nic};

    fn command_line(accelerator: Accelerator) -> String {
        line_of(accelerator, CpuModel::Host)
    }

    fn line_of(accelerator: Accelerator, cpu_model: CpuModel) -> String {
        let disk = |n: u32| Disk { volume: format!("v{n}"), socket: format!("/run/a,b/{n}.sock").into() };
        let machine = Machine {
            name: "guest".into(),
            vcpus: 2,
            memory_bytes: 512 << 20,
            cpu_model,
            engine: None,
            kernel: "/k".into(),
            initrd: Some("/i".into()),
            kernel_args: "root=/dev/vda console=ttyS0".into(),
            disks: vec![disk(0), disk(1)],
            nics: vec![Nic { tap: "tap0".into(), mac: "02:00:00:00:00:01".into() }],
            dir: "/run/vm".into(),
        };
        let args = arguments(&machine, accelerator);
        args.iter().map(|a| a.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn disks_are_vhost_user_on_ports_of_their_own() {
        let line = command_line(Accelerator::Tcg);
        for n in 0..2 {
            assert!(
                line.contains(&format!("socket,id=char{n},path=/run/a,,b/{n}.sock,reconnect=1")),
                "{line}"
            );
            assert!(
                line.contains(&format!(
                    "vhost-user-blk-pci,id=disk{n},chardev=char{n},bus=port{n},num-queues=2"
                )),
                "{line}"
            );
        }
        assert!(line.contains("-netdev tap,id=net0,ifname=tap0,script=no,downscript=no"), "{line}");
        assert!(line.contains("virtio-net-pci,netdev=net0,mac=02:00:00:00:00:01,addr=0x18"), "{line}");
        assert!(line.contains("memory-backend-memfd,id=mem,size=536870912,share=on"), "{line}");
        assert_eq!(line.matches("pcie-root-port").count(), 2 + SPARE_PORTS);
        assert!(line.contains("-append root=/dev/vda console=ttyS0 -kernel /k -initrd /i"), "{line}");
    }

    #[test]
    fn the_accelerator_is_what_was_asked_for() {
        assert!(command_line(Accelerator::Tcg).contains("-accel tcg,thread=multi"));
        assert!(command_line(Accelerator::Kvm).contains("-accel kvm -cpu host"));
        for accelerator in [Accelerator::Kvm, Accelerator::Tcg] {
            assert!(line_of(accelerator, CpuModel::Generic).contains("-cpu Westmere"));
            assert!(line_of(accelerator, CpuModel::Kvm64).contains("-cpu kvm64"));
        }
    }
}
