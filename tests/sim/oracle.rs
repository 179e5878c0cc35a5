//! What clients may see: one register per block, checked without any code of the system.
//!
//! Writes of one block never overlap in time unless their client died or was fenced in between, so they are
//! ordered by their number. A read may return any value from the *floor* (the newest that was acknowledged, or seen by
//! a read that ended, before this one began) to the newest that was issued before it ended. Everything else is a lost write,
//! a resurrected one or garbage.
//!
//! When the next holder of a volume (or the next life of its client) may begin, the register is *closed*: what earlier ones
//! sent has happened by then or never will (rules C1 to C3). So the first read after that decides: what is newer
//! than it saw, and of before the closing, is void from then on; and whatever a fenced client issues later is void at once.
//!
//! A disk that holds a byte that nobody wrote, under a checksum that fits, is believed until a scrub compares it with others. While that lasts the oracle
//! is told which bytes of which block may be anything; all other bytes, and which write it is, are checked as ever.

use std::collections::BTreeMap;

pub const BLOCK: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId {
    pub volume: u64,
    pub block: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Value {
    Zero,
    Data,
}

#[derive(Clone, Copy)]
struct Write {
    value: Value,
    void: bool,
}

#[derive(Clone)]
struct Register {
    /// The block that its bytes name: a snapshot's were written to its volume.
    of: BlockId,
    /// Write `number`, from 1; index 0 is the initial state: zeros.
    writes: Vec<Write>,
    floor: u64,
    /// Newest number of the holders before this one.
    closed: u64,
}

/// What a read remembers from its beginning.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    floor: u64,
    closed: u64,
}

/// What a disk has done to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// This byte of it may be anything.
    Byte(usize),
    /// Reads of it may fail.
    Unreadable,
}

/// Bytes of a block by which it is known may not be harmed.
pub const TAG_BYTES: usize = 32;

#[derive(Default)]
pub struct Oracle {
    registers: BTreeMap<BlockId, Register>,
    /// Until when.
    harmed: BTreeMap<BlockId, Vec<(Harm, u64)>>,
    /// Blocks that were read with a byte that nobody wrote.
    pub harmed_reads: u64,
    pub reads_checked: u64,
}

fn register(map: &mut BTreeMap<BlockId, Register>, id: BlockId) -> &mut Register {
    let initial = Write { value: Value::Zero, void: false };
    map.entry(id).or_insert_with(|| Register { of: id, writes: vec![initial], floor: 0, closed: 0 })
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
    /// A write is about to be sent for the first time: its number. `fenced`: by somebody who must not write any more.
    pub fn issue(&mut self, id: BlockId, zero: bool, fenced: bool) -> u64 {
        let r = register(&mut self.registers, id);
        r.writes.push(Write { value: if zero { Value::Zero } else { Value::Data }, void: fenced });
        (r.writes.len() - 1) as u64
    }

    pub fn acknowledged(&mut self, id: BlockId, number: u64) -> Result<(), String> {
        let r = register(&mut self.registers, id);
        if r.writes[number as usize].void {
            return Err(format!("{id:?}: write {number} was acknowledged after its client had been fenced"));
        }
        r.floor = r.floor.max(number);
        Ok(())
    }

    /// A read is about to be sent.
    pub fn begin_read(&mut self, id: BlockId) -> Begun {
        let r = register(&mut self.registers, id);
        Begun { floor: r.floor, closed: r.closed }
    }

    /// A new holder may begin: what earlier ones sent to the volume has happened or never will.
    pub fn close(&mut self, volume: u64) {
        for (_, r) in self.registers.iter_mut().filter(|(id, _)| id.volume == volume) {
            r.closed = (r.writes.len() - 1) as u64;
        }
    }

    /// A snapshot is taken while nothing of the volume is in flight: it may hold what the volume may hold, the first read of each
    /// decides for itself, and nothing is ever written to it again.
    pub fn freeze(&mut self, volume: u64, snapshot: u64) {
        let of_volume = |(id, r): (&BlockId, &Register)| {
            let frozen = Register { closed: (r.writes.len() - 1) as u64, ..r.clone() };
            (id.volume == volume).then_some((BlockId { volume: snapshot, ..*id }, frozen))
        };
        let frozen: Vec<_> = self.registers.iter().filter_map(of_volume).collect();
        self.registers.extend(frozen);
    }

    /// Checks what a read returned.
    pub fn check_read(&mut self, id: BlockId, begun: Begun, bytes: &[u8]) -> Result<(), String> {
        self.reads_checked += 1;
        let r = register(&mut self.registers, id);
        let newest = (r.writes.len() - 1) as u64;
        let floor = begun.floor;
        let legal = |n: u64, value: Value| {
            let w = r.writes[n as usize];
            w.value == value && !w.void
        };
        let (oldest, latest) = if bytes.iter().all(|b| *b == 0) {
            // Which of several zeros it was cannot be told.
            let fitting = |n: &u64| legal(*n, Value::Zero);
            let (Some(first), Some(last)) =
                ((floor..=newest).find(fitting), (floor..=newest).rev().find(fitting))
            else {
                return Err(format!("{id:?} reads as zeros, but writes {floor}..={newest} are data or void"));
            };
            (first, last)
        } else {
            let number = u64::from_le_bytes(bytes[16..24].try_into().map_err(|_| "short block".to_string())?);
            if number > newest
                || bytes != bytes_of(r.of, number)
                || r.writes[number as usize].value == Value::Zero
            {
                return Err(format!(
                    "{id:?} holds bytes that nobody wrote there (tag {number}, newest {newest})"
                ));
            }
            if number < floor {
                return Err(format!(
                    "{id:?} reads write {number}, but {floor} was acknowledged or seen before"
                ));
            }
            if r.writes[number as usize].void {
                return Err(format!(
                    "{id:?} reads write {number}, which took effect after its client had ended"
                ));
            }
            (number, number)
        };
        r.floor = r.floor.max(oldest);
        for n in latest + 1..=begun.closed.min(newest) {
            r.writes[n as usize].void = true;
        }
        Ok(())
    }

    /// A disk harms a block of a volume, and what snapshots show of it, until it is [`Oracle::heal`]ed.
    pub fn harm(&mut self, id: BlockId, harm: Harm) {
        self.harmed.entry(id).or_default().push((harm, u64::MAX));
    }

    /// From now on nothing is harmed.
    pub fn heal(&mut self, now: u64) {
        for (_, until) in self.harmed.values_mut().flatten() {
            *until = now.min(*until);
        }
    }

    /// What was done to a block when a read of it was issued, or since.
    fn harms(&self, id: BlockId, issued: u64) -> impl Iterator<Item = Harm> + '_ {
        let of = self.registers.get(&id).map_or(id, |r| r.of);
        let all = self.harmed.get(&of).into_iter().flatten();
        all.filter(move |(_, until)| *until >= issued).map(|(harm, _)| *harm)
    }

    /// Whether a read that was issued then may fail because of this block.
    pub fn may_fail(&self, id: BlockId, issued: u64) -> bool {
        self.harms(id, issued).any(|h| h == Harm::Unreadable)
    }

    /// Checks what a read returned that was issued then, but for the bytes that disks may have changed meanwhile.
    pub fn check_read_of_disks(
        &mut self,
        id: BlockId,
        (begun, issued): (Begun, u64),
        bytes: &[u8],
    ) -> Result<(), String> {
        let at = self.harms(id, issued).filter_map(|h| match h {
            Harm::Byte(at) => Some(at),
            Harm::Unreadable => None,
        });
        let at: Vec<usize> = at.collect();
        if at.is_empty() {
            return self.check_read(id, begun, bytes);
        }
        let mended = self.mended(id, bytes, &at);
        self.harmed_reads += u64::from(mended != bytes);
        self.check_read(id, begun, &mended)
    }

    /// These bytes of a block as the write has them that the rest is of, or zeros.
    fn mended(&self, id: BlockId, bytes: &[u8], at: &[usize]) -> Vec<u8> {
        let mut mended = bytes.to_vec();
        at.iter().for_each(|at| mended[*at] = 0);
        if mended.iter().any(|b| *b != 0) {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[16..24]);
            let of = self.registers.get(&id).map_or(id, |r| r.of);
            let whole = bytes_of(of, u64::from_le_bytes(word));
            at.iter().for_each(|at| mended[*at] = whole[*at]);
        }
        mended
    }

    /// Nobody reads it any more.
    pub fn forget(&mut self, snapshot: u64) {
        self.registers.retain(|id, _| id.volume != snapshot);
    }

    pub fn blocks(&self) -> Vec<BlockId> {
        self.registers.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: BlockId = BlockId { volume: 1, block: 2 };

    #[test]
    fn finds_lost_and_resurrected_and_foreign_blocks() {
        let mut o = Oracle::default();
        let other = BlockId { volume: 1, block: 3 };
        let a = o.issue(ID, false, false);
        o.acknowledged(ID, a).unwrap();
        let b = o.issue(ID, false, false);
        let begun = o.begin_read(ID);
        assert!(o.check_read(ID, begun, &[0; BLOCK]).is_err(), "lost");
        assert!(o.check_read(ID, begun, &bytes_of(other, a)).is_err(), "misdirected");
        assert!(o.check_read(ID, begun, &bytes_of(ID, a)).is_ok());
        assert!(o.check_read(ID, begun, &bytes_of(ID, b)).is_ok(), "unacknowledged but issued");
        let begun = o.begin_read(ID);
        assert!(o.check_read(ID, begun, &bytes_of(ID, a)).is_err(), "went back after it was seen");
        let mut torn = bytes_of(ID, b);
        torn[4000] ^= 1;
        assert!(o.check_read(ID, begun, &torn).is_err(), "torn");
    }

    #[test]
    fn bytes_may_be_anything_while_disks_harm_them_and_all_else_is_checked() {
        let mut o = Oracle::default();
        let a = o.issue(ID, false, false);
        o.acknowledged(ID, a).unwrap();
        let begun = (o.begin_read(ID), 10);
        let (good, mut wrong, mut worse) = (bytes_of(ID, a), bytes_of(ID, a), bytes_of(ID, a));
        wrong[1000] ^= 7;
        assert!(o.check_read_of_disks(ID, begun, &wrong).is_err(), "nothing is harmed yet");
        o.harm(ID, Harm::Byte(1000));
        o.harm(ID, Harm::Byte(2000));
        o.check_read_of_disks(ID, begun, &wrong).unwrap();
        o.check_read_of_disks(ID, begun, &good).unwrap();
        assert_eq!(o.harmed_reads, 1);
        wrong[2000] ^= 7;
        o.check_read_of_disks(ID, begun, &wrong).unwrap();
        worse[1001] ^= 7;
        assert!(o.check_read_of_disks(ID, begun, &worse).is_err(), "another byte");
        let mut zeros = vec![0; BLOCK];
        zeros[1000] = 7;
        assert!(o.check_read_of_disks(ID, begun, &zeros).is_err(), "lost");
        assert!(!o.may_fail(ID, 10));
        o.heal(20);
        o.check_read_of_disks(ID, begun, &wrong).unwrap();
        assert!(o.check_read_of_disks(ID, (begun.0, 21), &wrong).is_err(), "issued when it was healed");
    }

    #[test]
    fn finds_snapshots_that_change_and_are_of_another_moment() {
        let mut o = Oracle::default();
        let a = o.issue(ID, false, false);
        o.acknowledged(ID, a).unwrap();
        o.freeze(ID.volume, 100);
        let snapshot = BlockId { volume: 100, ..ID };
        let b = o.issue(ID, false, false);
        o.acknowledged(ID, b).unwrap();
        let begun = o.begin_read(snapshot);
        assert!(o.check_read(snapshot, begun, &[0; BLOCK]).is_err(), "before");
        assert!(o.check_read(snapshot, begun, &bytes_of(ID, b)).is_err(), "after");
        o.check_read(snapshot, begun, &bytes_of(ID, a)).unwrap();
        let c = o.issue(snapshot, false, true);
        assert!(o.check_read(snapshot, begun, &bytes_of(ID, c)).is_err(), "frozen");
    }

    #[test]
    fn finds_writes_that_take_effect_after_their_client_has_ended() {
        let mut o = Oracle::default();
        let a = o.issue(ID, false, false);
        o.acknowledged(ID, a).unwrap();
        let b = o.issue(ID, false, false);
        let before = o.begin_read(ID);
        o.close(ID.volume);
        // A read that began before may still miss what happened meanwhile.
        o.check_read(ID, before, &bytes_of(ID, a)).unwrap();
        let after = o.begin_read(ID);
        o.check_read(ID, after, &bytes_of(ID, a)).unwrap();
        assert!(o.check_read(ID, after, &bytes_of(ID, b)).is_err(), "late");
        let c = o.issue(ID, false, true);
        assert!(o.check_read(ID, after, &bytes_of(ID, c)).is_err(), "fenced");
        assert!(o.acknowledged(ID, c).is_err(), "fenced and acknowledged");
    }
}
