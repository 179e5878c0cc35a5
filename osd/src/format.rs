//! Preparing a disk: registering it with the monitors, then writing its superblock.

use anyhow::{Context, Result, ensure};
use gabion_common::monitor_client::MonitorClient;
use gabion_osd::store::{self, Identity};
use gabion_proto::ids::*;
use gabion_proto::limits::valid_name;
use gabion_proto::pb::{AddOsdRequest, Empty};
use std::path::Path;

/// Least size that leaves room for data beside the superblocks and the reserve.
const SIZE_BYTES_MIN: u64 = 64 << 20;

/// A size with an optional K, M, G or T (powers of 1024).
pub fn parse_size(text: &str) -> Result<u64> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let n: u64 =
        digits.parse().with_context(|| format!("size {text:?} is not a number with K, M, G or T"))?;
    n.checked_mul(1 << shift).with_context(|| format!("size {text:?} is too large"))
}

/// What to make of a disk.
pub struct Disk {
    pub size_bytes: u64,
    pub host: String,
    pub rack: String,
    /// 65536 is one unit; 0 derives it from the size.
    pub weight: u32,
}

/// Registers the disk and formats it. The disk's identity is written down before the monitors are
/// asked, so that a repetition after a crash gets the same id.
pub async fn format(data_dir: &Path, monitors: &MonitorClient, wanted: Disk) -> Result<OsdId> {
    let size_bytes = wanted.size_bytes;
    ensure!(size_bytes >= SIZE_BYTES_MIN, "an OSD needs at least 64M, got {size_bytes} bytes");
    for (what, name) in [("host", &wanted.host), ("rack", &wanted.rack)] {
        ensure!(valid_name(name), "{what} name {name:?}: use 1 to 64 of a-z A-Z 0-9 . _ -");
    }
    if let Ok(info) = store::info(data_dir) {
        ensure_ours(data_dir, monitors, &info.identity).await?;
        return Ok(info.identity.osd);
    }
    std::fs::create_dir_all(data_dir).with_context(|| format!("cannot make {}", data_dir.display()))?;
    // Before the monitors hear of it: a disk that is refused would stay in the map, down for ever.
    store::ensure_blank(data_dir).with_context(|| format!("cannot format {}", data_dir.display()))?;
    let disk = disk_identity(data_dir)?;
    let (osd, cluster) = register(monitors, disk, wanted).await?;
    let dir = data_dir.to_owned();
    tokio::task::spawn_blocking(move || store::format(&dir, size_bytes, Identity { cluster, osd, disk }))
        .await?
        .with_context(|| format!("cannot format {}", data_dir.display()))?;
    Ok(osd)
}

/// A disk that was formatted before is ready only for the cluster that it belongs to.
async fn ensure_ours(data_dir: &Path, monitors: &MonitorClient, disk: &Identity) -> Result<()> {
    let answer = monitors.once(|m| async move { m.status().get_status(Empty {}).await }).await;
    let here = answer
        .map_err(|s| {
            let (dir, osd) = (data_dir.display(), disk.osd);
            let (monitor, why) = (monitors.addr(), s.message());
            anyhow::anyhow!(
                "{dir} holds {osd} already, and no monitor at {monitor} says whether of its cluster: {why}"
            )
        })?
        .cluster;
    ensure!(
        here == disk.cluster.to_string(),
        "{} holds {} of cluster {}, the monitors are of cluster {here}; it is left alone: name another directory, or \
         remove what is in this one if nobody needs it",
        data_dir.display(),
        disk.osd,
        disk.cluster
    );
    Ok(())
}

async fn register(monitors: &MonitorClient, disk: ClusterId, wanted: Disk) -> Result<(OsdId, ClusterId)> {
    let request = AddOsdRequest {
        disk: disk.0.to_vec(),
        host: wanted.host,
        rack: wanted.rack,
        weight: wanted.weight,
        capacity_bytes: wanted.size_bytes,
    };
    let call = |m: MonitorClient| {
        let request = request.clone();
        async move { m.admin().add_osd(request).await }
    };
    let answer = monitors.once(call).await;
    let reply = answer.map_err(|s| {
        anyhow::anyhow!("the monitor at {} did not take the disk: {}", monitors.addr(), s.message())
    })?;
    let cluster = <[u8; 16]>::try_from(reply.cluster.as_slice())
        .map_err(|_| anyhow::anyhow!("the monitors answered a malformed cluster id"))?;
    Ok((OsdId(reply.id), ClusterId(cluster)))
}

/// Reads or makes the disk's identity, durably.
fn disk_identity(data_dir: &Path) -> Result<ClusterId> {
    let path = data_dir.join("disk-id");
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|e: String| anyhow::anyhow!("{}: {e}", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let id = ClusterId(rand::random());
            let temp = data_dir.join("disk-id.new");
            std::fs::write(&temp, format!("{id}\n"))?;
            std::fs::File::open(&temp)?.sync_all()?;
            std::fs::rename(&temp, &path)?;
            std::fs::File::open(data_dir)?.sync_all()?;
            Ok(id)
        }
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64M").unwrap(), 64 << 20);
        assert_eq!(parse_size("123").unwrap(), 123);
        assert!(parse_size("").is_err());
        assert!(parse_size("G").is_err());
        assert!(parse_size("99999999999T").is_err());
    }
}
