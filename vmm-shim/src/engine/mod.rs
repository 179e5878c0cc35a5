//! What the agent asks of whatever runs a guest.

pub mod choice;
pub mod native;
pub mod process;
pub mod qemu;

use crate::vmm::cpuid::CpuModel;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tokio::sync::watch;

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("{what} {path}")]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{0}")]
    Refused(String),
    #[error("{program} did not start: {detail}")]
    Start { program: String, detail: String },
    #[error(transparent)]
    Qmp(#[from] qemu::qmp::QmpError),
    #[error(transparent)]
    Control(#[from] native::control::ControlError),
}

/// One disk of a guest: the gateway's vhost-user socket of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub volume: String,
    pub socket: PathBuf,
}

/// One network card of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// A tap device of the host.
    pub tap: String,
    pub mac: String,
}

/// A machine to start.
#[derive(Debug, Clone)]
pub struct Machine {
    pub name: String,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub cpu_model: CpuModel,
    /// None: what suits the host.
    pub engine: Option<choice::EngineKind>,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub kernel_args: String,
    /// The first is the boot disk.
    pub disks: Vec<Disk>,
    pub nics: Vec<Nic>,
    /// The guest's own directory: sockets, log, record.
    pub dir: PathBuf,
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It powered off, was asked to, or was killed on request. The text says more, if anything.
    Stopped(String),
    Failed(String),
}

#[async_trait]
pub trait Engine: Send + Sync {
    /// As reported: `qemu (kvm)`.
    fn name(&self) -> String;
    async fn start(&self, machine: Machine) -> Result<Box<dyn Guest>, EngineError>;
    /// A guest that an earlier agent started in `dir` and that still runs.
    async fn adopt(&self, dir: &Path) -> Result<Option<Box<dyn Guest>>, EngineError>;
}

/// A running guest. Dropping it leaves the guest alone.
#[async_trait]
pub trait Guest: Send + Sync {
    /// The name of what runs it.
    fn engine(&self) -> String;
    /// Presses the power button.
    async fn stop(&self) -> Result<(), EngineError>;
    /// Pulls the plug.
    async fn kill(&self) -> Result<(), EngineError>;
    async fn attach(&mut self, disk: Disk) -> Result<(), EngineError>;
    /// Returns when the guest has let go of it.
    async fn detach(&mut self, volume: &str) -> Result<(), EngineError>;
    /// Volumes that the guest has, the boot disk first.
    fn volumes(&self) -> Vec<String>;
    /// Becomes `Some` when the guest ended.
    fn exit(&self) -> watch::Receiver<Option<Exit>>;
    /// Unix socket of the serial port; one client at a time.
    fn serial_socket(&self) -> PathBuf;
    /// Everything the guest printed lately.
    fn serial_log(&self) -> PathBuf;
}
