//! Where ext4 filesystems lie on a disk: the whole of it, or MBR primary partitions or GPT
//! partitions (UEFI 2.10, chapter 5) with sectors of 512 bytes.

use super::disk::DiskRead;
use std::io;

const SECTOR_BYTES: u64 = 512;
const GPT_ENTRIES_MAX: u32 = 128;
const MBR_TYPE_GPT: u8 = 0xee;
/// Superblock at 1024, magic 56 bytes into it.
const EXT4_MAGIC_AT: u64 = 1024 + 56;

pub struct Place {
    /// Partition number from 1; none: the whole disk.
    pub number: Option<u32>,
    pub offset: u64,
    pub size_bytes: u64,
}

pub fn filesystems(disk: &dyn DiskRead) -> io::Result<Vec<Place>> {
    let size_bytes = disk.size_bytes();
    if is_ext4(disk, 0, size_bytes)? {
        return Ok(vec![Place { number: None, offset: 0, size_bytes }]);
    }
    let mut sector = [0; SECTOR_BYTES as usize];
    if size_bytes < 2 * SECTOR_BYTES {
        return Ok(Vec::new());
    }
    disk.read_at(0, &mut sector)?;
    if sector[510..] != [0x55, 0xaa] {
        return Ok(Vec::new());
    }
    let mbr: Vec<(u32, u8, u64, u64)> = sector[446..510]
        .chunks_exact(16)
        .zip(1..)
        .map(|(e, n)| (n, e[4], u64::from(le32(&e[8..])), u64::from(le32(&e[12..]))))
        .collect();
    let candidates = if mbr.iter().any(|p| p.1 == MBR_TYPE_GPT) {
        gpt(disk)?
    } else {
        mbr.into_iter().map(|(n, _, first, count)| (n, first, count)).collect()
    };
    let mut places = Vec::new();
    for (number, first, count) in candidates {
        let (Some(offset), Some(len)) = (first.checked_mul(SECTOR_BYTES), count.checked_mul(SECTOR_BYTES))
        else {
            continue;
        };
        let inside = offset.checked_add(len).is_some_and(|end| end <= size_bytes);
        if first > 0 && inside && is_ext4(disk, offset, len)? {
            places.push(Place { number: Some(number), offset, size_bytes: len });
        }
    }
    Ok(places)
}

/// (number, first sector, sectors) of each entry in use.
fn gpt(disk: &dyn DiskRead) -> io::Result<Vec<(u32, u64, u64)>> {
    let mut header = [0; SECTOR_BYTES as usize];
    disk.read_at(SECTOR_BYTES, &mut header)?;
    let (count, entry_bytes) = (le32(&header[80..]), le32(&header[84..]));
    let table = le64(&header[72..]).checked_mul(SECTOR_BYTES);
    let Some(table) = table.filter(|_| &header[..8] == b"EFI PART" && (128..=4096).contains(&entry_bytes))
    else {
        return Ok(Vec::new());
    };
    let count = count.min(GPT_ENTRIES_MAX);
    let mut entries = vec![0; (count * entry_bytes) as usize];
    if table.checked_add(entries.len() as u64).is_none_or(|end| end > disk.size_bytes()) {
        return Ok(Vec::new());
    }
    disk.read_at(table, &mut entries)?;
    let used = entries.chunks_exact(entry_bytes as usize).zip(1..).filter(|(e, _)| e[..16] != [0; 16]);
    Ok(used
        .filter_map(|(e, n)| {
            let (first, last) = (le64(&e[32..]), le64(&e[40..]));
            Some((n, first, last.checked_sub(first)?.checked_add(1)?))
        })
        .collect())
}

fn is_ext4(disk: &dyn DiskRead, offset: u64, len: u64) -> io::Result<bool> {
    if len < EXT4_MAGIC_AT + 2 {
        return Ok(false);
    }
    let mut magic = [0; 2];
    disk.read_at(offset + EXT4_MAGIC_AT, &mut magic)?;
    Ok(magic == [0x53, 0xef])
}

fn le32(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}
fn le64(b: &[u8]) -> u64 {
    u64::from(le32(b)) | u64::from(le32(&b[4..])) << 32
}
