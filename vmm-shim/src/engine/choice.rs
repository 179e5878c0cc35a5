//! Which engine runs a guest: the one its VM names, else what suits the host ([`HostOffer::engine`]): the native one on
//! a processor with hardware virtualization and a `/dev/kvm` that opens (one without the other does not boot stock
//! kernels), QEMU elsewhere. A guest that runs is adopted by the engine that started it, whatever is chosen now.

use super::native::{self, NativeEngine};
use super::qemu::QemuEngine;
use super::qemu::args::Accelerator;
use super::{Engine, EngineError, Guest, Machine};
use async_trait::async_trait;
pub use gabion_common::host_offer::{EngineKind, HostOffer};
use serde_json::Value;
use std::path::Path;

/// Both engines.
pub struct Engines {
    native: NativeEngine,
    qemu: QemuEngine,
    hardware_virtualization: bool,
    default: EngineKind,
}

impl Engines {
    pub fn detect() -> Engines {
        let offer = HostOffer::of_this_host();
        let default = match offer.engine() {
            Ok((engine, why)) => {
                tracing::info!(engine = engine.name(), why, "guests run in this engine unless they name one");
                engine
            }
            Err(why) => {
                tracing::warn!(why, "no guest can run here");
                EngineKind::Qemu
            }
        };
        Engines {
            native: NativeEngine::new(),
            qemu: QemuEngine::on(&offer),
            hardware_virtualization: offer.hardware_virtualization(),
            default,
        }
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
        self.of_kind(self.default).name()
    }

    async fn start(&self, machine: Machine) -> Result<Box<dyn Guest>, EngineError> {
        let kind = machine.engine.unwrap_or(self.default);
        if kind == EngineKind::Native && !self.hardware_virtualization {
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
