//! `gabion vm`; the console is in `console`.

use super::{Context, console};
use crate::args::{CpuModel, Engine, VmVerb, Wait};
use crate::output::removed;
use crate::rpc;
use crate::rpc::Monitors;
use anyhow::{Result, bail};
use gabion_proto::pb::{
    self, AttachDiskRequest, CreateVmRequest, DetachDiskRequest, NameRequest, SetVmStateRequest, VmAction,
    VmDisk, VmInfo, VmNic, VmState,
};
use serde_json::{Value, json};
use std::time::Duration;

const POLL: Duration = Duration::from_millis(100);

pub async fn run(cx: &Context, verb: VmVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    match verb {
        VmVerb::Create { name, cpus, memory, disk, host, kernel_args, engine, cpu, nic } => {
            let disks = disk.into_iter().map(|volume| VmDisk { volume, ..Default::default() }).collect();
            let request = CreateVmRequest {
                name: name.clone(),
                cpus,
                memory_bytes: memory,
                disks,
                host: host.unwrap_or_default(),
                kernel_args,
                engine: match engine {
                    None => String::new(),
                    Some(Engine::Native) => "native".into(),
                    Some(Engine::Qemu) => "qemu".into(),
                },
                cpu_model: match cpu {
                    CpuModel::Host => "host".into(),
                    CpuModel::Generic => "generic".into(),
                    CpuModel::Kvm64 => "kvm64".into(),
                },
                nics: nic
                    .into_iter()
                    .map(|n| VmNic { tap: n.tap, mac: n.mac.map(|m| m.to_string()).unwrap_or_default() })
                    .collect(),
            };
            let vm = rpc!(monitors, format!("vm {name}"), admin.create_vm, request)?;
            cx.out.done(
                &format!("vm {name} created on host {}; start it with gabion vm start {name}", vm.host),
                vm_json(&vm),
            )
        }
        VmVerb::Ls => {
            let vms = rpc!(monitors, "vm list", admin.list_vms, pb::Empty {})?.vms;
            let rows = vms.iter().map(vm_json).collect();
            cx.out.list("vms", rows, &["name", "state", "host", "cpus", "memory_bytes", "engine", "error"])
        }
        VmVerb::Show { name } => cx.out.show(&vm_json(&get(&monitors, &name).await?)),
        VmVerb::Start { name, wait } => {
            act(&monitors, &name, VmAction::Start).await?;
            let running = |vm: &VmInfo| vm.state() == VmState::Running;
            finish(cx, &monitors, &name, wait, "runs", running).await
        }
        VmVerb::Stop { name, wait } => {
            act(&monitors, &name, VmAction::Stop).await?;
            finish(cx, &monitors, &name, wait, "is stopped", |vm| vm.state() == VmState::Stopped).await
        }
        VmVerb::Kill { name, wait } => {
            act(&monitors, &name, VmAction::Kill).await?;
            let ended = |vm: &VmInfo| matches!(vm.state(), VmState::Stopped | VmState::Failed);
            finish(cx, &monitors, &name, wait, "is killed", ended).await
        }
        VmVerb::Attach { vm, volume, serial, wait } => {
            let disk = VmDisk { volume: volume.clone(), serial, attached: false };
            let request = AttachDiskRequest { vm: vm.clone(), disk: Some(disk) };
            rpc!(monitors, format!("vm {vm}"), admin.attach_disk, request)?;
            let has = |info: &VmInfo| {
                info.state() != VmState::Running
                    || info.disks.iter().any(|d| d.volume == volume && d.attached)
            };
            finish(cx, &monitors, &vm, wait, &format!("has volume {volume}"), has).await
        }
        VmVerb::Detach { vm, volume, wait } => {
            let request = DetachDiskRequest { vm: vm.clone(), volume: volume.clone() };
            rpc!(monitors, format!("vm {vm}"), admin.detach_disk, request)?;
            let lacks = |info: &VmInfo| !info.disks.iter().any(|d| d.volume == volume);
            finish(cx, &monitors, &vm, wait, &format!("no longer has volume {volume}"), lacks).await
        }
        VmVerb::Rm { name } => {
            let request = NameRequest { name: name.clone() };
            rpc!(monitors, format!("vm {name}"), admin.remove_vm, request)?;
            cx.out.done(&format!("vm {name} removed; its volumes stay"), removed(name))
        }
        VmVerb::Console { name } => console::attach(&get(&monitors, &name).await?, monitors.security()).await,
        VmVerb::Logs { name, follow } => {
            console::logs(&get(&monitors, &name).await?, monitors.security(), follow).await
        }
    }
}

async fn get(monitors: &Monitors, name: &str) -> Result<VmInfo> {
    rpc!(monitors, format!("vm {name}"), admin.get_vm, NameRequest { name: name.to_owned() })
}

async fn act(monitors: &Monitors, name: &str, action: VmAction) -> Result<VmInfo> {
    let request = SetVmStateRequest { name: name.to_owned(), action: action.into() };
    rpc!(monitors, format!("vm {name}"), admin.set_vm_state, request)
}

/// Waits until `is_done` and answers.
async fn finish(
    cx: &Context,
    monitors: &Monitors,
    name: &str,
    wait: Wait,
    what: &str,
    is_done: impl Fn(&VmInfo) -> bool,
) -> Result<()> {
    let vm = if wait.no_wait {
        get(monitors, name).await?
    } else {
        let done = async {
            loop {
                let vm = get(monitors, name).await?;
                if is_done(&vm) {
                    return Ok(vm);
                }
                if vm.state() == VmState::Failed && !vm.error.is_empty() {
                    bail!("vm {name}: {}; see gabion vm logs {name}", vm.error);
                }
                tokio::time::sleep(POLL).await;
            }
        };
        match tokio::time::timeout(Duration::from_secs(wait.timeout_secs), done).await {
            Ok(vm) => vm?,
            Err(_) => bail!(
                "vm {name}: asked for, but not so after {} s; see gabion vm show {name}",
                wait.timeout_secs
            ),
        }
    };
    let sentence = if wait.no_wait { format!("vm {name}: asked for") } else { format!("vm {name} {what}") };
    cx.out.done(&sentence, vm_json(&vm))
}

fn state(state: VmState) -> &'static str {
    match state {
        VmState::Stopped => "stopped",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Stopping => "stopping",
        VmState::Failed => "failed",
        VmState::Unspecified => "unknown",
    }
}

fn vm_json(vm: &VmInfo) -> Value {
    let disks: Vec<_> = vm
        .disks
        .iter()
        .map(|d| json!({ "volume": d.volume, "serial": d.serial, "attached": d.attached }))
        .collect();
    let nics: Vec<_> = vm.nics.iter().map(|n| json!({ "tap": n.tap, "mac": n.mac })).collect();
    json!({
        "name": vm.name,
        "state": state(vm.state()),
        "wanted": state(vm.wanted()),
        "host": vm.host,
        "cpus": vm.cpus,
        "cpu_model": vm.cpu_model,
        "memory_bytes": vm.memory_bytes,
        "disks": disks,
        "nics": nics,
        "kernel_args": vm.kernel_args,
        "engine": vm.engine,
        "error": vm.error,
        "agent_addr": vm.agent_addr,
    })
}
