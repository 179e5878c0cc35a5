//! Which slots of the device are taken: in memory only, rebuilt from the chunk records at open.
//!
//! A slot that a durable record dropped is free for accounting at once, but is not written again before the journal
//! is trimmed beyond that record and nobody reads it any more (rule S2).

use super::StoreError;
use std::collections::{HashMap, HashSet, VecDeque};

const WORD_BITS: usize = u64::BITS as usize;

/// A bitmap of slots with a rotating search position.
pub struct Slots {
    /// A set bit must not be written as a fresh slot.
    words: Vec<u64>,
    count: u32,
    used: u32,
    next_word: usize,
    /// Dropped by the record with this number.
    retired: VecDeque<(u64, u32)>,
    /// Reads in flight.
    pins: HashMap<u32, u32>,
    /// Would be free if nobody read them.
    lingering: HashSet<u32>,
    /// The last refusal was for retired slots only: trimming the journal helps.
    pub starved: bool,
}

impl Slots {
    pub fn new(count: u32) -> Slots {
        let mut words = vec![0; (count as usize).div_ceil(WORD_BITS)];
        if !(count as usize).is_multiple_of(WORD_BITS)
            && let Some(last) = words.last_mut()
        {
            *last = u64::MAX << (count as usize % WORD_BITS);
        }
        Slots {
            words,
            count,
            used: 0,
            next_word: 0,
            retired: VecDeque::new(),
            pins: HashMap::new(),
            lingering: HashSet::new(),
            starved: false,
        }
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    pub fn used(&self) -> u32 {
        self.used
    }

    fn word(slot: u32) -> (usize, u64) {
        (slot as usize / WORD_BITS, 1 << (slot as usize % WORD_BITS))
    }

    /// Marks a slot that a record names. Two records naming one is corruption.
    pub fn mark(&mut self, slot: u32) -> Result<(), StoreError> {
        if slot >= self.count {
            return Err(StoreError::Fatal(format!("slot {slot} is beyond the device")));
        }
        let (word, bit) = Slots::word(slot);
        if self.words[word] & bit != 0 {
            return Err(StoreError::Fatal(format!("slot {slot} is used twice")));
        }
        self.words[word] |= bit;
        self.used += 1;
        Ok(())
    }

    /// Takes a free slot as long as `keep_free_percent` of all stay free after it.
    pub fn take(&mut self, keep_free_percent: u64) -> Result<u32, StoreError> {
        let (count, used) = (u64::from(self.count), u64::from(self.used));
        if used >= count || (count - used - 1) * 100 < count * keep_free_percent {
            return Err(StoreError::NoSpace);
        }
        let len = self.words.len();
        let word = (0..len).map(|i| (self.next_word + i) % len).find(|&w| self.words[w] != u64::MAX);
        let Some(word) = word else {
            self.starved = true;
            return Err(StoreError::NoSpace);
        };
        let bit = self.words[word].trailing_ones();
        self.words[word] |= 1 << bit;
        self.used += 1;
        self.next_word = word;
        Ok((word * WORD_BITS) as u32 + bit)
    }

    /// Gives back a slot that was taken and never written.
    pub fn untake(&mut self, slot: u32) {
        self.used -= 1;
        self.clear(slot);
    }

    fn clear(&mut self, slot: u32) {
        let (word, bit) = Slots::word(slot);
        assert!(self.words[word] & bit != 0, "slot {slot} is freed but was not taken");
        self.words[word] &= !bit;
    }

    /// The record `seq`, which is durable, dropped this slot.
    pub fn retire(&mut self, seq: u64, slot: u32) {
        self.used -= 1;
        self.retired.push_back((seq, slot));
    }

    /// The journal is trimmed up to `seq`.
    pub fn release(&mut self, seq: u64) {
        while let Some((_, slot)) = self.retired.pop_front_if(|(by, _)| *by <= seq) {
            if self.pins.contains_key(&slot) {
                self.lingering.insert(slot);
            } else {
                self.clear(slot);
            }
        }
    }

    /// A read of the slot starts.
    pub fn pin(&mut self, slot: u32) {
        *self.pins.entry(slot).or_default() += 1;
    }

    /// It has ended.
    pub fn unpin(&mut self, slot: u32) {
        let Some(pins) = self.pins.get_mut(&slot) else { return };
        *pins -= 1;
        if *pins == 0 {
            self.pins.remove(&slot);
            if self.lingering.remove(&slot) {
                self.clear(slot);
            }
        }
    }
}
