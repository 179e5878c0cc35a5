//! The index of a store: an ordered map of byte strings with atomic, durable batches.

/// One change of a [`Batch`]: put, or delete where the value is `None`.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// Changes that become visible and durable together.
pub type Batch = Vec<Change>;

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// An ordered map. Every error is final for the store (invariant 9): the index is its only metadata.
pub trait Kv: Send {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, String>;
    /// Up to `limit` pairs with `prefix`, in order, from `from` (inclusive) on.
    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Pair>, String>;
    /// Applies all of `batch` or nothing; with `sync` it survives any crash once this has returned.
    fn write(&mut self, batch: Batch, sync: bool) -> Result<(), String>;
}
