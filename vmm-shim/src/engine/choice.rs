//! Which engine runs a guest: QEMU, unless its VM names the native one. That needs a processor with hardware
//! virtualization and a `/dev/kvm` that opens (one without the other does not boot stock kernels); it becomes the
//! default of such hosts once `make test-vm` passes in continuous integration. A guest that runs is adopted by
//! the engine that started it, whatever is chosen now.

use super::native::{self, NativeEngine};
use super::qemu::QemuEngine;
use super::qemu::args::Accelerator;
use super::{Engine, EngineError, Guest, Machine};
use async_trait::async_trait;
use serde_json::Value;
use std::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    Native,
    Qemu,
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

/// What a host offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    pub kvm_opens: bool,
    /// vmx or svm.
    pub virtualization_flag: bool,
}

impl Offer {
    pub fn of_this_host() -> Offer {
        let kvm_opens = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let virtualization_flag = cpuinfo.split_whitespace().any(|word| word == "vmx" || word == "svm");
        Offer { kvm_opens, virtualization_flag }
    }

    pub fn hardware_virtualization(self) -> bool {
        self.kvm_opens && self.virtualization_flag
    }
}

/// What runs a guest whose VM names no engine.
const DEFAULT: EngineKind = EngineKind::Qemu;

/// Both engines.
pub struct Engines {
    native: NativeEngine,
    qemu: QemuEngine,
    offer: Offer,
}

impl Engines {
    pub fn detect() -> Engines {
        let offer = Offer::of_this_host();
        Engines { native: NativeEngine::new(), qemu: QemuEngine::detect(), offer }
    }

    /// For reports: how guests run here.
    pub fn accelerator(&self) -> Accelerator {
        self.qemu.accelerator()
    }

    fn of_kind(&self, kind: EngineKind) -> &dyn Engine {
        match kind {
            EngineKind::Native => &self.native,
            EngineKind::Qemu => &self.qemu,
        }
    }
}

#[async_trait]
impl Engine for Engines {
    fn name(&self) -> String {
        self.of_kind(DEFAULT).name()
    }

    async fn start(&self, machine: Machine) -> Result<Box<dyn Guest>, EngineError> {
        let kind = machine.engine.unwrap_or(DEFAULT);
        if kind == EngineKind::Native && !self.offer.hardware_virtualization() {
            return Err(EngineError::Refused(
                "the native engine needs /dev/kvm and a processor with vmx or svm; this host lacks them"
                    .into(),
            ));
        }
        self.of_kind(kind).start(machine).await
    }

    async fn adopt(&self, dir: &Path) -> Result<Option<Box<dyn Guest>>, EngineError> {
        let Ok(bytes) = std::fs::read(dir.join("machine.json")) else { return Ok(None) };
        let record = serde_json::from_slice::<Value>(&bytes).unwrap_or_default();
        // QEMU's records, the older ones, do not name their engine.
        match record["engine"].as_str() {
            Some(native::NAME) => self.native.adopt(dir).await,
            _ => self.qemu.adopt(dir).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_needs_the_device_and_the_processor() {
        let offer = |kvm_opens, virtualization_flag| Offer { kvm_opens, virtualization_flag };
        assert!(offer(true, true).hardware_virtualization());
        assert!(!offer(true, false).hardware_virtualization(), "a /dev/kvm in software");
        assert!(!offer(false, true).hardware_virtualization());
        assert_eq!("native".parse(), Ok(EngineKind::Native));
        assert!("bochs".parse::<EngineKind>().is_err());
    }
}
