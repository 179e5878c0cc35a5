//! Walks a descriptor chain that the guest wrote. Every descriptor is read once; nothing in it is believed.

use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::limits::SEGMENTS_MAX;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: u32 = 16;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    #[error("a descriptor lies outside the guest's memory")]
    Table,
    #[error("descriptor index {0} is beyond its table")]
    Index(u16),
    #[error("the chain is longer than its table or than {SEGMENTS_MAX} descriptors")]
    Endless,
    #[error("a buffer of no bytes")]
    Empty,
    #[error("a buffer wraps around the end of the address space")]
    Wraps,
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
    #[error("a malformed indirect table")]
    Indirect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub at: GuestAddress,
    pub len: u32,
}

/// The buffers of one request in order: what the device may read, then what it may write.
#[derive(Debug, Default)]
pub struct Chain {
    pub readable: Vec<Segment>,
    pub writable: Vec<Segment>,
    pub readable_bytes: u64,
    pub writable_bytes: u64,
}

/// Walks the chain that starts at `head` of the table of `entries` descriptors at `table`. On an error the buffers
/// found so far stay in `chain`.
pub fn walk(
    mem: &GuestMemoryMmap,
    table: GuestAddress,
    entries: u16,
    head: u16,
    chain: &mut Chain,
) -> Result<(), ChainError> {
    let (mut table, mut entries, mut index) = (table, u32::from(entries), head);
    let (mut steps, mut indirect) = (0u32, false);
    loop {
        if u32::from(index) >= entries {
            return Err(ChainError::Index(index));
        }
        if steps >= entries.min(SEGMENTS_MAX) {
            return Err(ChainError::Endless);
        }
        steps += 1;
        let at =
            table.checked_add(u64::from(index) * u64::from(DESCRIPTOR_BYTES)).ok_or(ChainError::Table)?;
        let mut raw = [0u8; DESCRIPTOR_BYTES as usize];
        mem.read_slice(&mut raw, at).map_err(|_| ChainError::Table)?;
        let (addr, len) = (le_u64(&raw[0..8]), le_u32(&raw[8..12]));
        let (flags, next) = (le_u16(&raw[12..14]), le_u16(&raw[14..16]));

        if flags & INDIRECT != 0 {
            let count = len / DESCRIPTOR_BYTES;
            let fits = len.is_multiple_of(DESCRIPTOR_BYTES) && (1..=SEGMENTS_MAX).contains(&count);
            if indirect || flags & NEXT != 0 || !fits {
                return Err(ChainError::Indirect);
            }
            (table, entries, index, steps, indirect) = (GuestAddress(addr), count, 0, 0, true);
            continue;
        }
        if len == 0 {
            return Err(ChainError::Empty);
        }
        addr.checked_add(u64::from(len)).ok_or(ChainError::Wraps)?;
        let segment = Segment { at: GuestAddress(addr), len };
        if flags & WRITE != 0 {
            chain.writable_bytes += u64::from(len);
            chain.writable.push(segment);
        } else if chain.writable.is_empty() {
            chain.readable_bytes += u64::from(len);
            chain.readable.push(segment);
        } else {
            return Err(ChainError::Order);
        }
        if flags & NEXT == 0 {
            return Ok(());
        }
        index = next;
    }
}

pub fn le_u16(raw: &[u8]) -> u16 {
    u16::from_le_bytes([raw[0], raw[1]])
}

pub fn le_u32(raw: &[u8]) -> u32 {
    u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])
}

pub fn le_u64(raw: &[u8]) -> u64 {
    u64::from(le_u32(&raw[0..4])) | u64::from(le_u32(&raw[4..8])) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(mem: &GuestMemoryMmap, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut raw = addr.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        mem.write_slice(&raw, GuestAddress(index * 16)).unwrap();
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap()
    }

    fn run(mem: &GuestMemoryMmap, head: u16) -> (Result<(), ChainError>, Chain) {
        let mut chain = Chain::default();
        (walk(mem, GuestAddress(0), 8, head, &mut chain), chain)
    }

    #[test]
    fn a_direct_and_an_indirect_chain() {
        let mem = memory();
        put(&mem, 0, 0x1000, 16, NEXT, 1);
        put(&mem, 1, 0x2000, 512, NEXT | WRITE, 2);
        put(&mem, 2, 0x3000, 1, WRITE, 0);
        let (result, chain) = run(&mem, 0);
        assert_eq!(result, Ok(()));
        assert_eq!((chain.readable_bytes, chain.writable_bytes), (16, 513));
        put(&mem, 5, 0, 48, INDIRECT, 0);
        let (result, chain) = run(&mem, 5);
        assert_eq!(result, Ok(()));
        assert_eq!((chain.readable.len(), chain.writable.len()), (1, 2));
    }

    #[test]
    fn nonsense_is_named() {
        let mem = memory();
        put(&mem, 0, 0x1000, 16, NEXT, 1);
        put(&mem, 1, 0x1000, 16, NEXT, 0);
        assert_eq!(run(&mem, 0).0, Err(ChainError::Endless));
        assert_eq!(run(&mem, 8).0, Err(ChainError::Index(8)));
        put(&mem, 1, 0x1000, 0, 0, 0);
        assert_eq!(run(&mem, 0).0, Err(ChainError::Empty));
        put(&mem, 1, u64::MAX, 2, 0, 0);
        assert_eq!(run(&mem, 0).0, Err(ChainError::Wraps));
        put(&mem, 2, 0x1000, 1, WRITE | NEXT, 3);
        put(&mem, 3, 0x1000, 1, 0, 0);
        assert_eq!(run(&mem, 2).0, Err(ChainError::Order));
        put(&mem, 4, 64, 16, INDIRECT, 0);
        assert_eq!(run(&mem, 4).0, Err(ChainError::Indirect));
        put(&mem, 5, 1 << 40, 16, INDIRECT, 0);
        assert_eq!(run(&mem, 5).0, Err(ChainError::Table));
    }

    proptest! {
        #[test]
        fn random_tables_end_without_a_panic(
            table in proptest::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, 0u16..10), 8),
            head in 0u16..10,
        ) {
            let mem = memory();
            for (index, (addr, len, flags, next)) in table.into_iter().enumerate() {
                put(&mem, index as u64, addr, len, flags, next);
            }
            let (_, chain) = run(&mem, head);
            prop_assert!(chain.readable.len() + chain.writable.len() <= SEGMENTS_MAX as usize);
        }
    }
}
