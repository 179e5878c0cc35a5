//! Guest memory: one memfd, mapped here, in KVM and, by its descriptor, in every gateway.

use super::layout::{HIGH_RAM_START, LOW_RAM_END};
use std::fs::File;
use std::io;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot create {bytes} bytes of guest memory")]
    Create { bytes: u64, source: io::Error },
    #[error("cannot map {bytes} bytes of guest memory: {detail}")]
    Map { bytes: u64, detail: String },
}

/// RAM of `bytes` below and above the hole under 4 GiB.
pub fn create(bytes: u64) -> Result<GuestMemoryMmap, MemoryError> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let failed = |source: io::Error| MemoryError::Create { bytes, source };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("guest-memory", flags).map_err(|e| failed(e.into()))?);
    file.set_len(bytes).map_err(failed)?;
    // Whoever maps it can rely on its size.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|e| failed(e.into()))?;
    let low = bytes.min(LOW_RAM_END);
    let mut ranges = vec![(GuestAddress(0), low as usize, 0)];
    if bytes > low {
        ranges.push((GuestAddress(HIGH_RAM_START), (bytes - low) as usize, low));
    }
    let mut regions = Vec::new();
    for (at, len, offset) in ranges {
        let file = file.try_clone().map_err(failed)?;
        regions.push((at, len, Some(FileOffset::new(file, offset))));
    }
    GuestMemoryMmap::from_ranges_with_files(regions)
        .map_err(|e| MemoryError::Map { bytes, detail: e.to_string() })
}

/// Ranges of RAM as (start, bytes).
pub fn ranges(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    memory.iter().map(|r| (r.start_addr().0, r.len())).collect()
}

/// Whether `bytes` from `at` lie in one piece of RAM.
pub fn holds(memory: &GuestMemoryMmap, at: u64, bytes: u64) -> bool {
    ranges(memory)
        .iter()
        .any(|(start, len)| at >= *start && at.checked_add(bytes).is_some_and(|end| end <= start + len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_under_4_gib() {
        let memory = create(LOW_RAM_END + (64 << 20)).unwrap();
        assert_eq!(ranges(&memory), [(0, LOW_RAM_END), (HIGH_RAM_START, 64 << 20)]);
        assert!(holds(&memory, LOW_RAM_END - 4096, 4096));
        assert!(!holds(&memory, LOW_RAM_END - 4096, 4097));
        assert!(!holds(&memory, u64::MAX, 2));
        assert_eq!(ranges(&create(64 << 20).unwrap()), [(0, 64 << 20)]);
    }
}
