//! Transactions that are not durable yet: a view of the index in memory in front of the real one.

use super::StoreError;
use super::kv::{Batch, Kv, Pair};
use bytes::Bytes;
use std::collections::BTreeMap;

const PAGE: usize = 1024;

type View = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// What one transaction, or all of a group so far, changes.
#[derive(Default)]
pub struct Changes {
    pub keys: View,
    /// Device offset and bytes; only ever to slots that no durable record names.
    pub writes: Vec<(u64, Bytes)>,
    pub taken: Vec<u32>,
    pub freed: Vec<u32>,
    pub objects: i64,
}

/// Staged changes of a commit: the group's accepted transactions and the one being staged.
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
        self.group.writes.extend(txn.writes);
        self.group.taken.extend(txn.taken);
        self.group.freed.extend(txn.freed);
        self.group.objects += txn.objects;
    }

    /// Forgets the current transaction; returns the slots that it took.
    pub fn reject(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.txn).taken
    }

    pub fn get(&self, kv: &impl Kv, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.txn.keys.get(key).or_else(|| self.group.keys.get(key)) {
            Some(value) => Ok(value.clone()),
            None => kv.get(key).map_err(StoreError::Fatal),
        }
    }

    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.txn.keys.insert(key, Some(value));
    }

    pub fn delete(&mut self, key: Vec<u8>) {
        self.txn.keys.insert(key, None);
    }

    /// Everything with `prefix`, as the current transaction sees it.
    pub fn scan(&self, kv: &impl Kv, prefix: &[u8]) -> Result<Vec<Pair>, StoreError> {
        let mut out = View::new();
        scan_pages(kv, prefix, |key, value| {
            out.insert(key, Some(value));
            Ok(())
        })?;
        for keys in [&self.group.keys, &self.txn.keys] {
            for (key, value) in keys.range(prefix.to_vec()..).take_while(|(k, _)| k.starts_with(prefix)) {
                out.insert(key.clone(), value.clone());
            }
        }
        Ok(out.into_iter().filter_map(|(k, v)| Some((k, v?))).collect())
    }

    /// The group as a batch.
    pub fn batch(&self) -> Batch {
        self.group.keys.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// Calls `each` with everything with `prefix`, in order, holding one page at a time.
pub fn scan_pages(
    kv: &impl Kv,
    prefix: &[u8],
    mut each: impl FnMut(Vec<u8>, Vec<u8>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut from = prefix.to_vec();
    loop {
        let page = kv.scan(prefix, &from, PAGE).map_err(StoreError::Fatal)?;
        let full = page.len() == PAGE;
        if let Some((last, _)) = page.last() {
            from.clone_from(last);
            from.push(0);
        }
        for (key, value) in page {
            each(key, value)?;
        }
        if !full {
            return Ok(());
        }
    }
}
