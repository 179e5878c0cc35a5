//! Guests in QEMU, one process each, driven over QMP.
//!
//! A guest's directory holds `qmp.sock`, `serial.sock`, `console.log`, `qemu.log` and
//! `machine.json`, the record by which a later agent adopts it. The record is written when QEMU
//! answers and removed by nobody: the process in it decides whether it still means anything.

pub mod args;
pub mod qmp;

use super::process::Process;
use super::{Disk, Engine, EngineError, Exit, Guest, Machine};
use args::Accelerator;
use async_trait::async_trait;
use gabion_common::host_offer::{HostOffer, QEMU_PROGRAM as PROGRAM};
use qmp::{Event, Qmp, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{broadcast, watch};

const START_TIMEOUT: Duration = Duration::from_secs(30);
const DETACH_TIMEOUT: Duration = Duration::from_secs(30);
const END_TIMEOUT: Duration = Duration::from_secs(10);
const LOG_TAIL_BYTES: usize = 600;

pub struct QemuEngine {
    accelerator: Accelerator,
}

impl QemuEngine {
    /// With KVM where it is real, else emulated.
    pub fn on(host: &HostOffer) -> QemuEngine {
        let accelerator = if host.hardware_virtualization() { Accelerator::Kvm } else { Accelerator::Tcg };
        QemuEngine { accelerator }
    }

    pub fn detect() -> QemuEngine {
        QemuEngine::on(&HostOffer::of_this_host())
    }

    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }
}

#[derive(Serialize, Deserialize)]
struct Record {
    process: Process,
    vcpus: u32,
    /// Index is the root port.
    ports: Vec<Option<Disk>>,
}

pub struct QemuGuest {
    engine: String,
    dir: PathBuf,
    record: Record,
    qmp: Arc<Qmp>,
    exit: watch::Receiver<Option<Exit>>,
    killed: Arc<AtomicBool>,
}

#[async_trait]
impl Engine for QemuEngine {
    fn name(&self) -> String {
        match self.accelerator {
            Accelerator::Kvm => "qemu (kvm)".into(),
            Accelerator::Tcg => "qemu (tcg)".into(),
        }
    }

    async fn start(&self, machine: Machine) -> Result<Box<dyn Guest>, EngineError> {
        let dir = machine.dir.clone();
        for name in ["qmp.sock", "serial.sock", "console.log", "machine.json"] {
            match std::fs::remove_file(dir.join(name)) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(EngineError::Io { what: "cannot remove", path: dir.join(name), source });
                }
                _ => {}
            }
        }
        let log = dir.join("qemu.log");
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| EngineError::Io { what, path, source }
        };
        let stderr = std::fs::File::create(&log).map_err(io("cannot create", &log))?;
        let mut child = Command::new(PROGRAM)
            .args(args::arguments(&machine, self.accelerator))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            // Signals meant for the agent's group do not reach the guest.
            .process_group(0)
            .spawn()
            .map_err(io("cannot run", Path::new(PROGRAM)))?;
        let pid = child.id() as i32;
        let process = Process::find(pid);
        // Reaps it; whoever adopts it later is not its parent and needs none of this.
        std::thread::spawn(move || child.wait());
        let failed = || EngineError::Start { program: PROGRAM.into(), detail: tail(&log) };
        let process = process.ok_or_else(failed)?;
        let (qmp, events) = match connect(&dir, process).await {
            Ok(connected) => connected,
            Err(error) => {
                process.kill();
                process.ended_within(END_TIMEOUT).await;
                let text = tail(&log);
                let detail = if text.is_empty() { error.to_string() } else { text };
                return Err(EngineError::Start { program: PROGRAM.into(), detail });
            }
        };
        let mut ports: Vec<Option<Disk>> = machine.disks.iter().cloned().map(Some).collect();
        ports.resize(args::ports(machine.disks.len()), None);
        let guest =
            QemuGuest::new(self.name(), dir, Record { process, vcpus: machine.vcpus, ports }, qmp, events);
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
        let (qmp, events) = connect(dir, record.process).await?;
        Ok(Some(Box::new(QemuGuest::new(self.name(), dir.to_owned(), record, qmp, events))))
    }
}

/// Connects as soon as QEMU listens.
async fn connect(dir: &Path, process: Process) -> Result<(Qmp, broadcast::Receiver<Event>), QmpError> {
    let path = dir.join("qmp.sock");
    let attempts = async {
        loop {
            match Qmp::connect(&path).await {
                Err(QmpError::Io(_)) if process.is_alive() => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => return other,
            }
        }
    };
    tokio::time::timeout(START_TIMEOUT, attempts)
        .await
        .unwrap_or_else(|_| Err(QmpError::Timeout { command: "greeting".into() }))
}

fn tail(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LOG_TAIL_BYTES)..]).trim().replace('\n', "; ")
}

impl QemuGuest {
    fn new(
        engine: String,
        dir: PathBuf,
        record: Record,
        qmp: Qmp,
        events: broadcast::Receiver<Event>,
    ) -> QemuGuest {
        let killed = Arc::new(AtomicBool::new(false));
        let (tx, exit) = watch::channel(None);
        tokio::spawn(watch_end(
            record.process,
            qmp.closed(),
            events,
            dir.join("qemu.log"),
            killed.clone(),
            tx,
        ));
        QemuGuest { engine, dir, record, qmp: Arc::new(qmp), exit, killed }
    }

    fn save(&self) -> Result<(), EngineError> {
        let path = self.dir.join("machine.json");
        let bytes = serde_json::to_vec_pretty(&self.record)
            .map_err(|e| EngineError::Refused(format!("cannot record the guest: {e}")))?;
        gabion_common::addr_file::replace(&path, &bytes).map_err(|source| EngineError::Io {
            what: "cannot write",
            path,
            source,
        })
    }
}

/// Learns how QEMU ended.
async fn watch_end(
    process: Process,
    mut closed: watch::Receiver<bool>,
    mut events: broadcast::Receiver<Event>,
    log: PathBuf,
    killed: Arc<AtomicBool>,
    exit: watch::Sender<Option<Exit>>,
) {
    // Only the connection's end ends this wait; an error means that its reader is gone too.
    let _ = closed.wait_for(|closed| *closed).await;
    if !process.ended_within(END_TIMEOUT).await {
        tracing::warn!(pid = process.pid, "QEMU closed its control socket and stayed; killing it");
        process.kill();
        process.ended_within(END_TIMEOUT).await;
    }
    let mut shutdown = None;
    loop {
        match events.try_recv() {
            Ok(event) if event.name == "SHUTDOWN" => {
                shutdown = Some(event.data["reason"].as_str().unwrap_or("unknown").to_owned());
            }
            Ok(_) | Err(broadcast::error::TryRecvError::Lagged(_)) => {}
            Err(_) => break,
        }
    }
    let how = match shutdown.as_deref() {
        _ if killed.load(Ordering::Relaxed) => Exit::Stopped(String::new()),
        Some("guest-reset") => Exit::Stopped("the guest asked for a restart".into()),
        Some("guest-panic") => Exit::Failed("the guest's kernel panicked".into()),
        Some(_) => Exit::Stopped(String::new()),
        None => Exit::Failed(format!("QEMU ended unexpectedly: {}", tail(&log))),
    };
    exit.send_replace(Some(how));
}

#[async_trait]
impl Guest for QemuGuest {
    fn engine(&self) -> String {
        self.engine.clone()
    }

    async fn stop(&self) -> Result<(), EngineError> {
        self.qmp.command("system_powerdown", json!({})).await?;
        Ok(())
    }

    async fn kill(&self) -> Result<(), EngineError> {
        self.killed.store(true, Ordering::Relaxed);
        self.record.process.kill();
        Ok(())
    }

    async fn attach(&mut self, disk: Disk) -> Result<(), EngineError> {
        let port = self.record.ports.iter().position(Option::is_none).ok_or_else(|| {
            EngineError::Refused("no free slot for another disk until the guest restarts".into())
        })?;
        // QEMU stands still, guest and all, until the peer of a new vhost-user device answers.
        let is_socket = std::fs::metadata(&disk.socket).is_ok_and(|m| m.file_type().is_socket());
        if !is_socket {
            let socket = disk.socket.display();
            return Err(EngineError::Refused(format!("nobody serves {} at {socket}", disk.volume)));
        }
        let character = format!("char{port}");
        let address = json!({ "type": "unix", "data": { "path": disk.socket } });
        let backend =
            json!({ "type": "socket", "data": { "addr": address, "server": false, "reconnect": 1 } });
        self.qmp.command("chardev-add", json!({ "id": character, "backend": backend })).await?;
        let device = json!({
            "driver": "vhost-user-blk-pci", "id": format!("disk{port}"), "chardev": character,
            "bus": format!("port{port}"), "num-queues": args::queues(self.record.vcpus),
        });
        if let Err(error) = self.qmp.command("device_add", device).await {
            // Best effort: the slot stays free either way, and the first error is the one to tell.
            let _ = self.qmp.command("chardev-remove", json!({ "id": character })).await;
            return Err(error.into());
        }
        self.record.ports[port] = Some(disk);
        self.save()
    }

    async fn detach(&mut self, volume: &str) -> Result<(), EngineError> {
        let held = |p: &Option<Disk>| p.as_ref().is_some_and(|d| d.volume == volume);
        let Some(port) = self.record.ports.iter().position(held) else { return Ok(()) };
        if port == 0 {
            return Err(EngineError::Refused(format!("{volume} is the boot disk of a running guest")));
        }
        let id = format!("disk{port}");
        let mut events = self.qmp.events();
        self.qmp.command("device_del", json!({ "id": id })).await?;
        let deleted = async {
            loop {
                match events.recv().await {
                    Ok(e) if e.data["device"] == *id && e.name == "DEVICE_DELETED" => return Ok(()),
                    Ok(e) if e.data["device"] == *id && e.name == "DEVICE_UNPLUG_GUEST_ERROR" => {
                        return Err(EngineError::Refused(format!("the guest does not let go of {volume}")));
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Err(QmpError::Closed.into()),
                }
            }
        };
        tokio::time::timeout(DETACH_TIMEOUT, deleted)
            .await
            .map_err(|_| EngineError::Refused(format!("the guest did not let go of {volume} in time")))??;
        self.qmp.command("chardev-remove", json!({ "id": format!("char{port}") })).await?;
        self.record.ports[port] = None;
        self.save()
    }

    fn volumes(&self) -> Vec<String> {
        self.record.ports.iter().flatten().map(|d| d.volume.clone()).collect()
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
