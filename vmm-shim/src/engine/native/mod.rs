//! Guests in `gabion-vmm`, one process each, driven over its control socket.
//!
//! A guest's directory holds `vmm.json` (what the machine is), `control.sock`, `serial.sock`,
//! `console.log`, `vmm.log`, `machine.json` (the record by which a later agent adopts it) and, when it
//! is over, `ended.json`. The process knows its disks; the record only tells which process it is.

pub mod control;

use super::process::Process;
use super::{Disk, Engine, EngineError, Exit, Guest, Machine};
use crate::vmm::board::End;
use crate::vmm::config::{Config, DiskConfig, NicConfig};
use crate::vmm::control::{Command, Event, Status};
use async_trait::async_trait;
use control::{Control, ControlError};
use gabion_common::host_offer::{self, VMM_PROGRAM as PROGRAM};
use serde::{Deserialize, Serialize};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{broadcast, watch};

pub const NAME: &str = "native";
const START_TIMEOUT: Duration = Duration::from_secs(40);
const DETACH_TIMEOUT: Duration = Duration::from_secs(30);
const END_TIMEOUT: Duration = Duration::from_secs(10);
const LOG_TAIL_BYTES: usize = 600;

pub struct NativeEngine {
    program: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Record {
    engine: String,
    process: Process,
}

pub struct NativeGuest {
    dir: PathBuf,
    process: Process,
    control: Control,
    // The event task removes what the guest let go of, the agent's calls add.
    volumes: Arc<Mutex<Vec<String>>>,
    exit: watch::Receiver<Option<Exit>>,
    killed: Arc<AtomicBool>,
}

impl NativeEngine {
    const NAME_WITH_KVM: &str = "native (kvm)";

    /// With the `gabion-vmm` beside this program, else the one in the path.
    pub fn new() -> NativeEngine {
        NativeEngine { program: host_offer::program(PROGRAM).unwrap_or_else(|| PROGRAM.into()) }
    }

    pub fn with_program(program: PathBuf) -> NativeEngine {
        NativeEngine { program }
    }
}

impl Default for NativeEngine {
    fn default() -> NativeEngine {
        NativeEngine::new()
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> EngineError {
    let path = path.to_owned();
    move |source| EngineError::Io { what, path, source }
}

#[async_trait]
impl Engine for NativeEngine {
    fn name(&self) -> String {
        NativeEngine::NAME_WITH_KVM.into()
    }

    async fn start(&self, machine: Machine) -> Result<Box<dyn Guest>, EngineError> {
        let dir = machine.dir.clone();
        for name in ["control.sock", "serial.sock", "console.log", "machine.json", "ended.json"] {
            match std::fs::remove_file(dir.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io_error("cannot remove", &dir.join(name))(error));
                }
                _ => {}
            }
        }
        let config = config(machine);
        config.check().map_err(EngineError::Refused)?;
        let path = dir.join("vmm.json");
        let bytes = serde_json::to_vec_pretty(&config).map_err(|e| EngineError::Refused(e.to_string()))?;
        gabion_common::addr_file::replace(&path, &bytes).map_err(io_error("cannot write", &path))?;
        let log = dir.join("vmm.log");
        let stderr = std::fs::File::create(&log).map_err(io_error("cannot create", &log))?;
        let mut child = std::process::Command::new(&self.program)
            .arg("--config")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            // Signals meant for the agent's group do not reach the guest.
            .process_group(0)
            .spawn()
            .map_err(io_error("cannot run", &self.program))?;
        let process = Process::find(child.id() as i32);
        // Reaps it; whoever adopts it later is not its parent and needs none of this.
        std::thread::spawn(move || child.wait());
        let failed = |detail| EngineError::Start { program: PROGRAM.into(), detail };
        let process = process.ok_or_else(|| failed(tail(&log)))?;
        let guest = match NativeGuest::connect(&dir, process).await {
            Ok(guest) => guest,
            Err(error) => {
                // A process that gives up closes its socket first and then writes why.
                if !process.ended_within(END_TIMEOUT).await {
                    process.kill();
                    process.ended_within(END_TIMEOUT).await;
                }
                let text = tail(&log);
                return Err(failed(if text.is_empty() { error.to_string() } else { text }));
            }
        };
        if let Err(error) = guest.save() {
            process.kill();
            return Err(error);
        }
        Ok(Box::new(guest))
    }

    async fn adopt(&self, dir: &Path) -> Result<Option<Box<dyn Guest>>, EngineError> {
        let Ok(bytes) = std::fs::read(dir.join("machine.json")) else { return Ok(None) };
        let Ok(record) = serde_json::from_slice::<Record>(&bytes) else {
            tracing::warn!(dir = %dir.display(), "machine.json is not readable; no guest adopted");
            return Ok(None);
        };
        if !record.process.is_alive() {
            return Ok(None);
        }
        Ok(Some(Box::new(NativeGuest::connect(dir, record.process).await?)))
    }
}

fn config(machine: Machine) -> Config {
    Config {
        name: machine.name,
        vcpus: machine.vcpus,
        memory_bytes: machine.memory_bytes,
        cpu_model: machine.cpu_model,
        kernel: machine.kernel,
        initrd: machine.initrd,
        kernel_args: machine.kernel_args,
        disks: machine
            .disks
            .into_iter()
            .map(|disk| DiskConfig { volume: disk.volume, socket: disk.socket })
            .collect(),
        nics: machine.nics.into_iter().map(|nic| NicConfig { tap: nic.tap, mac: nic.mac }).collect(),
        dir: machine.dir,
    }
}

fn tail(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LOG_TAIL_BYTES)..]).trim().replace('\n', "; ")
}

fn lock(volumes: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    volumes.lock().unwrap_or_else(|e| e.into_inner())
}

impl NativeGuest {
    /// Connects as soon as the process listens and asks what it has.
    async fn connect(dir: &Path, process: Process) -> Result<NativeGuest, ControlError> {
        let path = dir.join("control.sock");
        let attempts = async {
            loop {
                match Control::connect(&path).await {
                    Err(ControlError::Io(_)) if process.is_alive() => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    other => return other,
                }
            }
        };
        let connected = async {
            let (control, events) = attempts.await?;
            let status = status(&control).await?;
            Ok((control, events, status))
        };
        let (control, events, status) =
            tokio::time::timeout(START_TIMEOUT, connected).await.unwrap_or(Err(ControlError::Timeout))?;
        let volumes: Vec<String> = status.disks.into_iter().map(|disk| disk.volume).collect();
        let volumes = Arc::new(Mutex::new(volumes));
        let killed = Arc::new(AtomicBool::new(false));
        let (tx, exit) = watch::channel(None);
        tokio::spawn(follow(events, volumes.clone()));
        tokio::spawn(watch_end(dir.to_owned(), process, control.closed(), killed.clone(), tx));
        Ok(NativeGuest { dir: dir.to_owned(), process, control, volumes, exit, killed })
    }

    fn save(&self) -> Result<(), EngineError> {
        let path = self.dir.join("machine.json");
        let record = Record { engine: NAME.into(), process: self.process };
        let bytes = serde_json::to_vec_pretty(&record).map_err(|e| EngineError::Refused(e.to_string()))?;
        gabion_common::addr_file::replace(&path, &bytes).map_err(io_error("cannot write", &path))
    }
}

async fn status(control: &Control) -> Result<Status, ControlError> {
    let status = control.command(Command::Status).await?;
    serde_json::from_value(status).map_err(|e| ControlError::Malformed(e.to_string()))
}

/// Keeps the list of volumes what the guest has.
async fn follow(mut events: broadcast::Receiver<Event>, volumes: Arc<Mutex<Vec<String>>>) {
    loop {
        match events.recv().await {
            Ok(Event::Detached { volume }) => lock(&volumes).retain(|v| *v != volume),
            Ok(Event::Ended(_)) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Learns how the process ended.
async fn watch_end(
    dir: PathBuf,
    process: Process,
    mut closed: watch::Receiver<bool>,
    killed: Arc<AtomicBool>,
    exit: watch::Sender<Option<Exit>>,
) {
    // Only the connection's end ends this wait; an error means that its reader is gone too.
    let _ = closed.wait_for(|closed| *closed).await;
    if !process.ended_within(END_TIMEOUT).await {
        tracing::warn!(pid = process.pid, "gabion-vmm closed its control socket and stayed; killing it");
        process.kill();
        process.ended_within(END_TIMEOUT).await;
    }
    let end = std::fs::read(dir.join("ended.json")).ok().and_then(|b| serde_json::from_slice(&b).ok());
    let how = match end {
        _ if killed.load(Ordering::Relaxed) => Exit::Stopped(String::new()),
        Some(End::PoweredOff) => Exit::Stopped(String::new()),
        Some(End::RestartAsked) => Exit::Stopped("the guest asked for a restart".into()),
        Some(End::Failed(why)) => Exit::Failed(why),
        None => Exit::Failed(format!("gabion-vmm ended unexpectedly: {}", tail(&dir.join("vmm.log")))),
    };
    exit.send_replace(Some(how));
}

#[async_trait]
impl Guest for NativeGuest {
    fn engine(&self) -> String {
        NativeEngine::NAME_WITH_KVM.into()
    }

    async fn stop(&self) -> Result<(), EngineError> {
        self.control.command(Command::PowerButton).await?;
        Ok(())
    }

    async fn kill(&self) -> Result<(), EngineError> {
        self.killed.store(true, Ordering::Relaxed);
        self.process.kill();
        Ok(())
    }

    async fn attach(&mut self, disk: Disk) -> Result<(), EngineError> {
        let Disk { volume, socket } = disk;
        let attached = self.control.command(Command::Attach { volume, socket }).await;
        // Also after an error: an answer that came too late may have been a yes.
        let status = status(&self.control).await?;
        *lock(&self.volumes) = status.disks.into_iter().map(|disk| disk.volume).collect();
        attached?;
        Ok(())
    }

    async fn detach(&mut self, volume: &str) -> Result<(), EngineError> {
        if !lock(&self.volumes).iter().any(|v| v == volume) {
            return Ok(());
        }
        let mut events = self.control.events();
        self.control.command(Command::Detach { volume: volume.into() }).await?;
        let gone = async {
            loop {
                match events.recv().await {
                    Ok(Event::Detached { volume: gone }) if gone == volume => return Ok(()),
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Err(ControlError::Closed.into()),
                }
            }
        };
        let late = || EngineError::Refused(format!("the guest did not let go of {volume} in time"));
        tokio::time::timeout(DETACH_TIMEOUT, gone).await.unwrap_or_else(|_| Err(late()))?;
        // Not left to the event's other reader: the caller asks for the list next.
        lock(&self.volumes).retain(|v| v != volume);
        Ok(())
    }

    fn volumes(&self) -> Vec<String> {
        lock(&self.volumes).clone()
    }

    fn exit(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.clone()
    }

    fn serial_socket(&self) -> PathBuf {
        self.dir.join("serial.sock")
    }

    fn serial_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }
}
