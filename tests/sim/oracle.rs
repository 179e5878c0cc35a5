//! What clients may see: one register per block, checked without any code of the system.
//!
//! Writes of one block never overlap in time unless their client died in between, so they are ordered by
//! their number. A read may return any value from the *floor* (the newest that was acknowledged, or seen by
//! a read that ended, before this one began) to the newest that was issued before it ended. Everything else is a lost write,
//! a resurrected one or garbage.

use std::collections::BTreeMap;

pub const BLOCK: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId {
    pub volume: u64,
    pub block: u64,
}

#[derive(Default)]
struct Register {
    /// Whether write `number` (from 1) wrote zeros; index 0 is the initial state: zeros.
    zero: Vec<bool>,
    floor: u64,
}

#[derive(Default)]
pub struct Oracle {
    registers: BTreeMap<BlockId, Register>,
    pub reads_checked: u64,
}

fn register(map: &mut BTreeMap<BlockId, Register>, id: BlockId) -> &mut Register {
    map.entry(id).or_insert_with(|| Register { zero: vec![true], floor: 0 })
}

/// The bytes of write `number` of a block: its tag in every 32 bytes, so that a torn block shows.
pub fn bytes_of(id: BlockId, number: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(BLOCK);
    for i in 0..(BLOCK / 32) as u64 {
        for word in [id.volume, id.block, number, i ^ 0x6761_6269_6f6e] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
    out
}

impl Oracle {
    /// A write is about to be sent for the first time: its number.
    pub fn issue(&mut self, id: BlockId, zero: bool) -> u64 {
        let r = register(&mut self.registers, id);
        r.zero.push(zero);
        (r.zero.len() - 1) as u64
    }
    pub fn acknowledged(&mut self, id: BlockId, number: u64) {
        let r = register(&mut self.registers, id);
        r.floor = r.floor.max(number);
    }
    /// The floor now: remember it when a read begins.
    pub fn floor(&mut self, id: BlockId) -> u64 {
        register(&mut self.registers, id).floor
    }
    /// Checks what a read that began at `floor` returned.
    pub fn check_read(&mut self, id: BlockId, floor: u64, bytes: &[u8]) -> Result<(), String> {
        self.reads_checked += 1;
        let r = register(&mut self.registers, id);
        let newest = (r.zero.len() - 1) as u64;
        if bytes.iter().all(|b| *b == 0) {
            // Which of several zeros it was cannot be told: the oldest that fits is assumed.
            return match (floor..=newest).find(|n| r.zero[*n as usize]) {
                Some(number) => {
                    r.floor = r.floor.max(number);
                    Ok(())
                }
                None => Err(format!("{id:?} reads as zeros, but writes {floor}..={newest} are data")),
            };
        }
        let number = u64::from_le_bytes(bytes[16..24].try_into().map_err(|_| "short block".to_string())?);
        if number > newest
            || r.zero.get(number as usize).copied().unwrap_or(true)
            || bytes != bytes_of(id, number)
        {
            return Err(format!(
                "{id:?} holds bytes that nobody wrote there (tag {number}, newest {newest})"
            ));
        }
        if number < floor {
            return Err(format!("{id:?} reads write {number}, but {floor} was acknowledged or seen before"));
        }
        r.floor = r.floor.max(number);
        Ok(())
    }
    pub fn blocks(&self) -> Vec<BlockId> {
        self.registers.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_lost_and_resurrected_and_foreign_blocks() {
        let mut o = Oracle::default();
        let id = BlockId { volume: 1, block: 2 };
        let other = BlockId { volume: 1, block: 3 };
        let a = o.issue(id, false);
        o.acknowledged(id, a);
        let b = o.issue(id, false);
        let floor = o.floor(id);
        assert!(o.check_read(id, floor, &[0; BLOCK]).is_err(), "lost");
        assert!(o.check_read(id, floor, &bytes_of(other, a)).is_err(), "misdirected");
        assert!(o.check_read(id, floor, &bytes_of(id, a)).is_ok());
        assert!(o.check_read(id, floor, &bytes_of(id, b)).is_ok(), "unacknowledged but issued");
        let floor = o.floor(id);
        assert!(o.check_read(id, floor, &bytes_of(id, a)).is_err(), "went back after it was seen");
        let mut torn = bytes_of(id, b);
        torn[4000] ^= 1;
        assert!(o.check_read(id, floor, &torn).is_err(), "torn");
    }
}
