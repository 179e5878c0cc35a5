//! The index of a store: an ordered map of byte strings with atomic, durable batches.

use super::wake::Waker;

/// One change of a [`Batch`]: put, or delete where the value is `None`.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// Changes that become visible and durable together.
pub type Batch = Vec<Change>;

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// An ordered map. Every error is final for the store (invariant 9).
pub trait Kv: Send {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, String>;
    /// Up to `limit` pairs with `prefix`, in order, from `from` (inclusive) on.
    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Pair>, String>;
    /// Calls `each` with all pairs with `prefix`, in order, until it answers false: for those who look at very many.
    fn sweep(&self, prefix: &[u8], each: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), String>;
    /// Starts to apply all of `batch` or, if a crash intervenes, perhaps nothing. At most one at a time. What is
    /// read in between may be of before or after.
    fn start(&mut self, batch: Batch);
    /// The outcome of what was started, once: after `Ok` the batch survives any crash.
    fn poll(&mut self) -> Option<Result<(), String>>;
    /// Waits for that outcome.
    fn finish(&mut self) -> Result<(), String>;
    /// Called when [`Kv::poll`] may have something to say.
    fn set_waker(&mut self, waker: Waker);
}
