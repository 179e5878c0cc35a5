//! Transactions that are not in the journal yet: changes in memory in front of the index.

use super::buffer::Blocks;
use super::homes::{self, Class};
use super::journal::Image;
use super::layout::Key;
use super::view::{Value, View};

/// Blocks for a fresh slot, which no durable record names.
pub struct FreshBlocks {
    pub slot: u32,
    /// First block within the slot.
    pub first: u32,
    pub data: Blocks,
}

/// Everything of a kind that a group has in one of its homes.
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    pub prefix: Key,
    pub class: Class,
}

impl FreshBlocks {
    /// As a record names them.
    pub fn image(&self) -> Image {
        Image {
            slot: self.slot,
            first: self.first as u8,
            count: self.data.count() as u8,
            crc: crc32fast::hash(self.data.bytes()),
        }
    }
}

/// What one transaction, or all of a record so far, changes.
#[derive(Default)]
pub struct Changes {
    pub keys: View,
    /// What was deleted before what `keys` puts there.
    pub sweeps: Vec<Sweep>,
    pub fresh: Vec<FreshBlocks>,
    /// Fresh slots that are written already.
    pub placed: Vec<Image>,
    pub taken: Vec<u32>,
    pub freed: Vec<u32>,
    pub objects: i64,
    /// In order; in force once the transaction is accepted.
    pub homes: Vec<homes::Change>,
    /// Data blocks that go to the journal.
    pub data_blocks: u32,
}

/// Staged changes of a record: the accepted transactions and the one being staged.
#[derive(Default)]
pub struct Stage {
    pub group: Changes,
    pub txn: Changes,
}

impl Stage {
    /// Accepts the current transaction.
    pub fn accept(&mut self) {
        let txn = std::mem::take(&mut self.txn);
        self.group.keys.extend(txn.keys);
        self.group.sweeps.extend(txn.sweeps);
        self.group.fresh.extend(txn.fresh);
        self.group.placed.extend(txn.placed);
        self.group.taken.extend(txn.taken);
        self.group.freed.extend(txn.freed);
        self.group.objects += txn.objects;
        self.group.data_blocks += txn.data_blocks;
    }

    /// Forgets the current transaction; returns the slots that it took.
    pub fn reject(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.txn).taken
    }

    pub fn get(&self, key: &Key) -> Option<&Option<Value>> {
        self.txn.keys.get(key).or_else(|| self.group.keys.get(key))
    }

    pub fn put(&mut self, key: Key, value: impl Into<Value>) {
        let value = value.into();
        self.txn.data_blocks += u32::from(matches!(value, Value::Block(_)));
        self.txn.keys.insert(key, Some(value));
    }

    pub fn delete(&mut self, key: Key) {
        self.txn.keys.insert(key, None);
    }

    /// Nothing would be journaled.
    pub fn is_empty(&self) -> bool {
        self.group.keys.is_empty() && self.group.sweeps.is_empty()
    }
}
