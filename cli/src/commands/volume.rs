//! `gabion volume`; image copies are in `transfer`.

use super::{Context, transfer};
use crate::args::VolumeVerb;
use crate::output::removed;
use crate::rpc;
use crate::size::human_exact;
use anyhow::Result;
use gabion_proto::pb::{
    self, CloneVolumeRequest, CreateVolumeRequest, NameRequest, ResizeVolumeRequest, VolumeInfo,
};
use serde_json::{Value, json};

pub async fn run(cx: &Context, verb: VolumeVerb) -> Result<()> {
    let monitors = cx.monitors()?;
    match verb {
        VolumeVerb::Create { name, size, pool } => {
            let request = CreateVolumeRequest { name: name.clone(), pool, size_bytes: size };
            let volume = rpc!(monitors, format!("volume {name}"), admin.create_volume, request)?;
            let size = human_exact(volume.size_bytes);
            cx.out
                .done(&format!("volume {name} created: {size} in pool {}", volume.pool), volume_json(&volume))
        }
        VolumeVerb::Ls => {
            let volumes = rpc!(monitors, "volume list", admin.list_volumes, pb::Empty {})?.volumes;
            let rows = volumes.iter().map(volume_json).collect();
            let columns = ["id", "name", "pool", "size_bytes", "attached_host", "origin", "snapshots"];
            cx.out.list("volumes", rows, &columns)
        }
        VolumeVerb::Show { name } => {
            let request = NameRequest { name: name.clone() };
            let volume = rpc!(monitors, format!("volume {name}"), admin.get_volume, request)?;
            cx.out.show(&volume_json(&volume))
        }
        VolumeVerb::Rm { name } => {
            cx.confirm(&format!("volume {name}: its data is destroyed"))?;
            let request = NameRequest { name: name.clone() };
            rpc!(monitors, format!("volume {name}"), admin.remove_volume, request)?;
            cx.out.done(&format!("volume {name} removed"), removed(name))
        }
        VolumeVerb::Detach { name } => {
            cx.confirm(&format!(
                "volume {name}: the host that has it attached loses it at once, with what it has not been answered"
            ))?;
            let request = NameRequest { name: name.clone() };
            let volume = rpc!(monitors, format!("volume {name}"), admin.fence_volume, request)?;
            cx.out.done(&format!("volume {name} is attached nowhere"), volume_json(&volume))
        }
        VolumeVerb::Resize { name, size } => {
            let request = ResizeVolumeRequest { name: name.clone(), size_bytes: size };
            let volume = rpc!(monitors, format!("volume {name}"), admin.resize_volume, request)?;
            let size = human_exact(volume.size_bytes);
            cx.out.done(&format!("volume {name} has {size}"), volume_json(&volume))
        }
        VolumeVerb::Clone { snapshot, name } => {
            let request = CloneVolumeRequest { snapshot: snapshot.to_string(), name: name.clone() };
            let volume = rpc!(monitors, format!("volume {name}"), admin.clone_volume, request)?;
            cx.out.done(&format!("volume {name} is a clone of {snapshot}"), volume_json(&volume))
        }
        VolumeVerb::Import { file, name, pool, size, format, host } => {
            transfer::import(cx, &monitors, transfer::Import { file, name, pool, size, format, host }).await
        }
        VolumeVerb::Export { name, file, format, host } => {
            transfer::export(cx, &monitors, &name, &file, format, host).await
        }
    }
}

pub fn volume_json(v: &VolumeInfo) -> Value {
    json!({
        "id": v.id,
        "name": v.name,
        "pool": v.pool,
        "pool_id": v.pool_id,
        "size_bytes": v.size_bytes,
        "layers": v.layers,
        "object_bytes": v.object_bytes,
        "attached_host": v.attached_host,
        "generation": v.generation,
        "root": v.root,
        "origin": v.origin,
        "snapshots": v.snapshots,
    })
}
