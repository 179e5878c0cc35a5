//! The kernel and initrd of a guest, from `/boot` of its own boot volume. The volume is an ext4
//! filesystem as a whole, or has an MBR or GPT partition table with one. It is read without being
//! attached, while no guest runs on it; what is found in it is the guest's, so every size is bounded.

pub mod disk;
mod partition;

use disk::{DiskRead, Part};
use ext4_view::Ext4;
use std::cmp::Ordering;
use std::sync::Arc;

const KERNEL_BYTES_MAX: u64 = 128 << 20;
const INITRD_BYTES_MAX: u64 = 512 << 20;

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("volume {volume} has no ext4 filesystem, neither as a whole nor in a partition")]
    NoFilesystem { volume: String },
    #[error("volume {volume} has no /boot/vmlinuz-*")]
    NoKernel { volume: String },
    #[error("{path} of volume {volume} has {size} bytes, more than {limit}")]
    TooLarge { volume: String, path: String, size: u64, limit: u64 },
    #[error("cannot read volume {volume}: {detail}")]
    Read { volume: String, detail: String },
}

pub struct BootFiles {
    pub kernel: Vec<u8>,
    pub initrd: Option<Vec<u8>>,
    /// What `root=` names, given that the volume is the first virtio disk.
    pub root: String,
    pub version: String,
}

/// Finds the newest kernel of `volume`. Blocks.
pub fn find(disk: Arc<dyn DiskRead>, volume: &str) -> Result<BootFiles, BootError> {
    let read = |detail: String| BootError::Read { volume: volume.into(), detail };
    let parts = partition::filesystems(&*disk).map_err(|e| read(e.to_string()))?;
    if parts.is_empty() {
        return Err(BootError::NoFilesystem { volume: volume.into() });
    }
    for place in parts {
        let part = Part::new(disk.clone(), place.offset, place.size_bytes);
        let fs = Ext4::load(Box::new(part)).map_err(|e| read(e.to_string()))?;
        if let Some(version) = newest(&fs).map_err(|e| read(e.to_string()))? {
            let kernel = file(&fs, &format!("/boot/vmlinuz-{version}"), KERNEL_BYTES_MAX, volume)?;
            let initrd = format!("/boot/initrd.img-{version}");
            let initrd = match fs.exists(initrd.as_str()).map_err(|e| read(e.to_string()))? {
                true => Some(file(&fs, &initrd, INITRD_BYTES_MAX, volume)?),
                false => None,
            };
            let root = place.number.map_or("/dev/vda".into(), |n| format!("/dev/vda{n}"));
            return Ok(BootFiles { kernel, initrd, root, version });
        }
    }
    Err(BootError::NoKernel { volume: volume.into() })
}

fn newest(fs: &Ext4) -> Result<Option<String>, ext4_view::Ext4Error> {
    if !fs.exists("/boot")? {
        return Ok(None);
    }
    let mut best: Option<String> = None;
    for entry in fs.read_dir("/boot")? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(version) = name.as_str().ok().and_then(|n| n.strip_prefix("vmlinuz-")) else { continue };
        if best.as_deref().is_none_or(|b| by_version(version, b) == Ordering::Greater) {
            best = Some(version.to_owned());
        }
    }
    Ok(best)
}

fn file(fs: &Ext4, path: &str, limit: u64, volume: &str) -> Result<Vec<u8>, BootError> {
    let read =
        |e: ext4_view::Ext4Error| BootError::Read { volume: volume.into(), detail: format!("{path}: {e}") };
    let size = fs.metadata(path).map_err(read)?.len();
    if size > limit {
        return Err(BootError::TooLarge { volume: volume.into(), path: path.into(), size, limit });
    }
    fs.read(path).map_err(read)
}

/// Runs of digits compare as numbers, all else as text: 6.1.0-9 is older than 6.1.0-10.
fn by_version(a: &str, b: &str) -> Ordering {
    fn pieces(s: &str) -> Vec<(bool, &str)> {
        let mut all = Vec::new();
        let mut rest = s;
        while let Some(first) = rest.chars().next() {
            let digits = first.is_ascii_digit();
            let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
            all.push((digits, &rest[..end]));
            rest = &rest[end..];
        }
        all
    }
    let (a, b) = (pieces(a), pieces(b));
    for ((a_digits, a), (b_digits, b)) in a.iter().zip(&b) {
        let order = if *a_digits && *b_digits {
            let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
            a.len().cmp(&b.len()).then_with(|| a.cmp(b))
        } else {
            a.cmp(b)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    a.len().cmp(&b.len())
}

#[cfg(test)]
mod tests;
