//! Which slots of the device are taken: in memory only, rebuilt from the chunk records at open.

use super::StoreError;

/// A bitmap of slots with a rotating search position.
pub struct Slots {
    taken: Vec<bool>,
    used: u32,
    next: usize,
}

impl Slots {
    pub fn new(count: u32) -> Slots {
        Slots { taken: vec![false; count as usize], used: 0, next: 0 }
    }

    pub fn count(&self) -> u32 {
        self.taken.len() as u32
    }

    pub fn used(&self) -> u32 {
        self.used
    }

    /// Marks a slot that a record names. Two records naming one is corruption.
    pub fn mark(&mut self, slot: u32) -> Result<(), StoreError> {
        match self.taken.get_mut(slot as usize) {
            Some(t) if !*t => *t = true,
            Some(_) => return Err(StoreError::Fatal(format!("slot {slot} is used twice"))),
            None => return Err(StoreError::Fatal(format!("slot {slot} is beyond the device"))),
        }
        self.used += 1;
        Ok(())
    }

    /// Takes a free slot as long as `keep_free_percent` of all stay free after it.
    pub fn take(&mut self, keep_free_percent: u64) -> Result<u32, StoreError> {
        let count = u64::from(self.count());
        if u64::from(self.used) >= count
            || (count - u64::from(self.used) - 1) * 100 < count * keep_free_percent
        {
            return Err(StoreError::NoSpace);
        }
        let len = self.taken.len();
        let found =
            (0..len).map(|i| (self.next + i) % len).find(|&i| !self.taken[i]).ok_or(StoreError::NoSpace)?;
        self.taken[found] = true;
        self.used += 1;
        self.next = found + 1;
        Ok(found as u32)
    }

    /// Gives a slot back.
    pub fn free(&mut self, slot: u32) -> Result<(), StoreError> {
        match self.taken.get_mut(slot as usize) {
            Some(t) if *t => *t = false,
            _ => return Err(StoreError::Fatal(format!("slot {slot} is freed but was not taken"))),
        }
        self.used -= 1;
        Ok(())
    }
}
