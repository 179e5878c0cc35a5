//! `gabion volume import` and `export`: an image is copied through a temporary NBD export by
//! `qemu-img` (files) or `nbdcopy` (pipes). Whatever ends the copy, the export is removed, and a
//! volume made for an import that failed is removed too.

use super::{Context, export};
use crate::args::ImageFormat;
use crate::rpc;
use crate::rpc::Monitors;
use anyhow::{Context as _, Result, bail, ensure};
use gabion_proto::limits::VOLUME_BYTES_MIN;
use gabion_proto::pb::{
    self, AddExportRequest, CreateVolumeRequest, ExportInfo, ExportKind, ExportState, NameRequest,
};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

const EXPORT_WITHIN: Duration = Duration::from_secs(30);
/// Removing a volume waits for the gateway to let go of it.
const RELEASED_WITHIN: Duration = Duration::from_secs(10);
/// Volumes are whole multiples of this.
const SIZE_UNIT_BYTES: u64 = 4096;

pub struct Import {
    pub file: String,
    pub name: String,
    pub pool: Option<String>,
    pub size: Option<u64>,
    pub format: Option<ImageFormat>,
    pub host: Option<String>,
}

pub async fn import(cx: &Context, monitors: &Monitors, import: Import) -> Result<()> {
    let Import { file, name, pool, size, format, host } = import;
    let piped = file == "-";
    ensure!(
        !(piped && format == Some(ImageFormat::Qcow2)),
        "volume {name}: a qcow2 image cannot be read from a pipe; save it to a file first"
    );
    let (image_format, image_bytes) =
        if piped { ("raw".to_owned(), None) } else { probe(&file, format).await? };
    let found = monitors
        .call(&format!("volume {name}"), |c| {
            let name = name.clone();
            async move { c.admin().get_volume(NameRequest { name }).await }
        })
        .await;
    let (volume_bytes, is_new) = match (found, pool) {
        (Ok(volume), _) => (volume.size_bytes, false),
        (Err(e), None) => return Err(e.context("give --pool P to make it")),
        (Err(_), Some(pool)) => {
            let wanted = size.or(image_bytes).with_context(|| {
                format!("volume {name}: the size of a piped image is not known; give --size S")
            })?;
            let size_bytes = wanted.max(VOLUME_BYTES_MIN).next_multiple_of(SIZE_UNIT_BYTES);
            let request = CreateVolumeRequest { name: name.clone(), pool, size_bytes };
            (rpc!(monitors, format!("volume {name}"), admin.create_volume, request)?.size_bytes, true)
        }
    };
    let result = async {
        if let Some(image) = image_bytes.filter(|image| *image > volume_bytes) {
            bail!("volume {name}: its {volume_bytes} bytes do not hold the image's {image}; make a larger volume");
        }
        let target = serve(monitors, &name, host, false).await?;
        let mut command;
        if piped {
            command = Command::new("nbdcopy");
            command.args(["--flush", "-", &uri(&target.export)]);
        } else {
            command = Command::new("qemu-img");
            command.args(["convert", "-n", "-f", &image_format, "-O", "raw"]);
            if is_new {
                command.arg("--target-is-zero");
            }
            command.args([&*file, &uri(&target.export)]);
        }
        let copied = copy(&mut command, &name, piped).await;
        let removed = target.end(monitors).await;
        copied.and(removed)
    }
    .await;
    if result.is_err() && is_new {
        remove_volume(monitors, &name).await;
    }
    result?;
    let value =
        json!({ "volume": name, "size_bytes": volume_bytes, "image_bytes": image_bytes, "created": is_new });
    cx.out.done(&format!("volume {name} holds the image {file}"), value)
}

pub async fn export(
    cx: &Context,
    monitors: &Monitors,
    name: &str,
    file: &str,
    format: ImageFormat,
    host: Option<String>,
) -> Result<()> {
    let piped = file == "-";
    ensure!(
        !(piped && format == ImageFormat::Qcow2),
        "volume {name}: a qcow2 image cannot be written to a pipe; write a file"
    );
    ensure!(!(piped && std::io::stdout().is_terminal()), "volume {name}: standard output is a terminal");
    let source = serve(monitors, name, host, true).await?;
    // Half an image never has the name that was asked for.
    let part = format!("{file}.part");
    let mut command;
    if piped {
        command = Command::new("nbdcopy");
        command.args([&uri(&source.export), "-"]);
    } else {
        let format = if format == ImageFormat::Qcow2 { "qcow2" } else { "raw" };
        command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", format, &uri(&source.export), &part]);
    }
    let copied = copy(&mut command, name, piped).await;
    let removed = source.end(monitors).await;
    if copied.is_err() && !piped {
        let _ = std::fs::remove_file(&part);
    }
    copied.and(removed)?;
    if piped {
        return Ok(());
    }
    std::fs::rename(&part, file).with_context(|| format!("cannot write {file}"))?;
    cx.out.done(&format!("volume {name} is in {file}"), json!({ "volume": name, "file": file }))
}

/// What is copied from or to: an export that is made for the copy, or one that was there before.
struct Served {
    export: ExportInfo,
    made: bool,
}

impl Served {
    async fn end(&self, monitors: &Monitors) -> Result<()> {
        if self.made { export::remove(monitors, self.export.id).await } else { Ok(()) }
    }
}

async fn serve(monitors: &Monitors, volume: &str, host: Option<String>, read_only: bool) -> Result<Served> {
    let there = export::list(monitors).await?;
    let of = |e: &&ExportInfo| e.volume == volume && host.as_ref().is_none_or(|h| e.host == *h);
    let usable = |e: &&ExportInfo| {
        e.kind() == ExportKind::Nbd && e.state() == ExportState::Ready && (read_only || !e.read_only)
    };
    if let Some(export) = there.iter().filter(of).find(usable) {
        return Ok(Served { export: export.clone(), made: false });
    }
    let host = match (host, there.iter().find(|e| e.volume == volume)) {
        (Some(host), _) => host,
        (None, Some(export)) => export.host.clone(),
        (None, None) => default_host(monitors, volume).await?,
    };
    let request =
        AddExportRequest { volume: volume.to_owned(), kind: ExportKind::Nbd.into(), read_only, host };
    Ok(Served { export: export::add(monitors, request, EXPORT_WITHIN).await?, made: true })
}

/// Where a volume that is not exported can be served: at the host that has it or whose VM has it, else here, else at any
/// gateway.
async fn default_host(monitors: &Monitors, volume: &str) -> Result<String> {
    let request = NameRequest { name: volume.to_owned() };
    let info = rpc!(monitors, format!("volume {volume}"), admin.get_volume, request)?;
    if !info.attached_host.is_empty() {
        return Ok(info.attached_host);
    }
    let vms = rpc!(monitors, "VM list", admin.list_vms, pb::Empty {})?.vms;
    if let Some(vm) = vms.into_iter().find(|vm| vm.disks.iter().any(|d| d.volume == volume)) {
        return Ok(vm.host);
    }
    let hosts = rpc!(monitors, "host list", admin.list_hosts, pb::Empty {})?.hosts;
    let mut gateways: Vec<String> = hosts.into_iter().filter(|h| h.gateway_up).map(|h| h.name).collect();
    let here = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let at = gateways.iter().position(|name| name == here.trim()).unwrap_or(0);
    // None at all: the monitor's refusal says so.
    Ok(if gateways.is_empty() { String::new() } else { gateways.swap_remove(at) })
}

/// The Unix socket where it is on this host, else TCP.
fn uri(export: &ExportInfo) -> String {
    if !export.socket.is_empty() && Path::new(&export.socket).exists() {
        format!("nbd+unix:///{}?socket={}", export.volume, export.socket)
    } else {
        export.uri.clone()
    }
}

/// Format and size of an image.
async fn probe(file: &str, format: Option<ImageFormat>) -> Result<(String, Option<u64>)> {
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json"]);
    match format {
        Some(ImageFormat::Raw) => command.args(["-f", "raw"]),
        Some(ImageFormat::Qcow2) => command.args(["-f", "qcow2"]),
        None => &mut command,
    };
    let out = command.arg(file).output().await.map_err(|e| missing(&e, "qemu-img"))?;
    if !out.status.success() {
        bail!("image {file}: {}", last_line(&out.stderr));
    }
    let info: Value = serde_json::from_slice(&out.stdout).context("qemu-img info did not answer JSON")?;
    let found = info["format"].as_str().unwrap_or("unknown");
    ensure!(
        matches!(found, "raw" | "qcow2"),
        "image {file}: format {found} is not supported; convert it to raw or qcow2"
    );
    Ok((found.to_owned(), info["virtual-size"].as_u64()))
}

async fn copy(command: &mut Command, name: &str, piped: bool) -> Result<()> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    if !piped {
        command.stdin(Stdio::null());
    }
    if std::io::stderr().is_terminal() {
        command.arg("-p");
    }
    // qemu-img draws its bar on stdout, which is for the answer.
    if program == "qemu-img" {
        command.stdout(std::io::stderr());
    }
    let child = command.stderr(Stdio::piped()).kill_on_drop(true).spawn();
    let child = child.map_err(|e| missing(&e, &program))?;
    tokio::select! {
        out = child.wait_with_output() => {
            let out = out?;
            if out.status.success() {
                return Ok(());
            }
            bail!("volume {name}: {program} failed: {}", last_line(&out.stderr))
        }
        _ = tokio::signal::ctrl_c() => bail!("volume {name}: interrupted; what was made for the copy is removed"),
    }
}

fn missing(error: &std::io::Error, program: &str) -> anyhow::Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        let package = if program == "nbdcopy" { "libnbd-bin" } else { "qemu-utils" };
        return anyhow::anyhow!("{program} is not installed; install the package {package}");
    }
    anyhow::anyhow!("cannot start {program}: {error}")
}

fn last_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).trim().lines().last().unwrap_or("no reason given").to_owned()
}

async fn remove_volume(monitors: &Monitors, name: &str) {
    let gone = async {
        let request = || NameRequest { name: name.to_owned() };
        while rpc!(monitors, format!("volume {name}"), admin.remove_volume, request()).is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    if tokio::time::timeout(RELEASED_WITHIN, gone).await.is_err() {
        crate::output::note(&format!(
            "volume {name} was made for the import and is left: gabion volume rm {name}"
        ));
    }
}
