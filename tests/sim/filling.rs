//! Volumes that are written from end to end before a scenario begins.

use crate::client::VOLUME_BLOCKS;
use std::collections::BTreeMap;

#[derive(Default)]
pub struct Filling {
    /// By client: the next block of its volume that was never written.
    next: BTreeMap<usize, u64>,
    goes_on: bool,
}

impl Filling {
    pub fn begin(&mut self, clients: usize) {
        *self = Filling { next: (0..clients).map(|c| (c, 0)).collect(), goes_on: true };
    }

    pub fn end(&mut self) {
        self.goes_on = false;
    }

    pub fn goes_on(&self) -> bool {
        self.goes_on
    }

    /// Everything was sent.
    pub fn is_full(&self) -> bool {
        self.next.values().all(|first| *first >= VOLUME_BLOCKS)
    }

    /// Where a client's volume is still empty.
    pub fn next(&self, client: usize) -> Option<u64> {
        self.next.get(&client).copied().filter(|first| *first < VOLUME_BLOCKS)
    }

    pub fn filled(&mut self, client: usize, blocks: u64) {
        *self.next.entry(client).or_default() += blocks;
    }
}
