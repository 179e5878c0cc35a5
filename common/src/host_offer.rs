//! What this machine offers to guests, and which engine suits it: for the host agent and for whoever asks
//! the machine itself (`gabion host check`).

use std::fs;
use std::path::PathBuf;

pub const KVM_DEVICE: &str = "/dev/kvm";
pub const VMM_PROGRAM: &str = "gabion-vmm";
pub const QEMU_PROGRAM: &str = "qemu-system-x86_64";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    Native,
    Qemu,
}

impl EngineKind {
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::Native => "native",
            EngineKind::Qemu => "qemu",
        }
    }
}

impl std::str::FromStr for EngineKind {
    type Err = String;
    fn from_str(name: &str) -> Result<EngineKind, String> {
        match name {
            "native" => Ok(EngineKind::Native),
            "qemu" => Ok(EngineKind::Qemu),
            other => Err(format!("this host knows no engine {other:?}")),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostOffer {
    /// Whether `/dev/kvm` opens; if not, why.
    pub kvm: Result<(), String>,
    /// The processor's own virtualization: vmx or svm.
    pub virtualization: Option<&'static str>,
    pub vmm: Option<PathBuf>,
    pub qemu: Option<PathBuf>,
    pub cpus: u32,
    pub memory_bytes: u64,
}

impl HostOffer {
    pub fn of_this_host() -> HostOffer {
        let opened = fs::OpenOptions::new().read(true).write(true).open(KVM_DEVICE);
        HostOffer {
            kvm: opened.map(drop).map_err(|e| e.to_string()),
            virtualization: virtualization(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            vmm: program(VMM_PROGRAM),
            qemu: program(QEMU_PROGRAM),
            cpus: cpus(),
            memory_bytes: memory_bytes("MemTotal"),
        }
    }

    /// Real KVM. A `/dev/kvm` without the processor's virtualization does not boot stock kernels.
    pub fn hardware_virtualization(&self) -> bool {
        self.kvm.is_ok() && self.virtualization.is_some()
    }

    /// What runs a guest whose VM names no engine, and why that one; an error where no engine works.
    pub fn engine(&self) -> Result<(EngineKind, String), String> {
        let hardware = match (self.virtualization, &self.kvm) {
            (Some(flag), Ok(())) => Ok(format!("{KVM_DEVICE} opens and the processor has {flag}")),
            (_, Err(why)) => Err(format!("{KVM_DEVICE} does not open ({why})")),
            (None, Ok(())) => Err("the processor has neither vmx nor svm".to_owned()),
        };
        match (hardware, &self.vmm, &self.qemu) {
            (Ok(why), Some(_), _) => Ok((EngineKind::Native, why)),
            (Ok(why), None, Some(_)) => {
                Ok((EngineKind::Qemu, format!("{why}, but {VMM_PROGRAM} is not installed")))
            }
            (Err(why), _, Some(_)) => Ok((EngineKind::Qemu, format!("{why}: guests are emulated and slow"))),
            (Ok(_), None, None) => Err(format!("neither {VMM_PROGRAM} nor {QEMU_PROGRAM} is installed")),
            (Err(why), _, None) => Err(format!("{why}, and {QEMU_PROGRAM} is not installed")),
        }
    }
}

fn virtualization(cpuinfo: &str) -> Option<&'static str> {
    let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
    ["vmx", "svm"].into_iter().find(|flag| has(flag))
}

/// A program beside this one, else in the path.
pub fn program(name: &str) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name(name));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|dir| dir.join(name));
    beside.into_iter().chain(in_path).find(|candidate| candidate.is_file())
}

pub fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// A line of `/proc/meminfo`; 0 when there is none.
pub fn memory_bytes(key: &str) -> u64 {
    meminfo(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), key)
}

fn meminfo(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(kvm: bool, flag: bool, vmm: bool, qemu: bool) -> HostOffer {
        let there = |is: bool| is.then(|| PathBuf::from("/p"));
        HostOffer {
            kvm: if kvm { Ok(()) } else { Err("Permission denied".into()) },
            virtualization: flag.then_some("svm"),
            vmm: there(vmm),
            qemu: there(qemu),
            cpus: 2,
            memory_bytes: 4 << 30,
        }
    }

    #[test]
    fn native_needs_the_device_the_processor_and_the_program() {
        let engine = |o: HostOffer| o.engine().map(|(kind, _)| kind);
        assert_eq!(engine(offer(true, true, true, true)), Ok(EngineKind::Native));
        assert_eq!(engine(offer(true, true, true, false)), Ok(EngineKind::Native));
        for (kvm, flag, vmm) in [(true, true, false), (true, false, true), (false, true, true)] {
            let with_qemu = offer(kvm, flag, vmm, true);
            assert_eq!(engine(with_qemu.clone()), Ok(EngineKind::Qemu), "{with_qemu:?}");
            assert!(offer(kvm, flag, vmm, false).engine().is_err());
        }
        assert!(!offer(true, false, true, true).hardware_virtualization(), "a /dev/kvm in software");
        let (_, why) = offer(false, true, true, true).engine().unwrap();
        assert!(why.contains("Permission denied") && why.contains("emulated"), "{why}");
    }

    #[test]
    fn what_the_kernel_tells_is_read_as_words() {
        assert_eq!(virtualization("flags : fpu vmx sse"), Some("vmx"));
        assert_eq!(virtualization("flags : fpu svm_lock sse"), None);
        assert_eq!(meminfo("MemTotal:  1024 kB\nMemAvailable: x kB\n", "MemTotal"), 1 << 20);
        assert_eq!(meminfo("MemTotal:  1024 kB\nMemAvailable: x kB\n", "MemAvailable"), 0);
        assert!(cpus() > 0 && memory_bytes("MemTotal") > 0);
        assert!(program("no-such-program").is_none());
        assert_eq!("qemu".parse(), Ok(EngineKind::Qemu));
        assert!("bochs".parse::<EngineKind>().is_err());
    }
}
