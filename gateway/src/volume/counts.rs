//! What a volume's exports asked of it, for metrics. Relaxed: each figure is right by itself.

use super::VolumeError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Since the volume was attached here.
#[derive(Debug, Default)]
pub struct Counts {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub read_bytes: AtomicU64,
    pub written_bytes: AtomicU64,
    /// Reads and writes that failed.
    pub errors: AtomicU64,
}

impl Counts {
    pub(super) fn read<T>(&self, bytes: u64, result: Result<T, VolumeError>) -> Result<T, VolumeError> {
        self.count((&self.reads, &self.read_bytes), bytes, result)
    }

    pub(super) fn write<T>(&self, bytes: u64, result: Result<T, VolumeError>) -> Result<T, VolumeError> {
        self.count((&self.writes, &self.written_bytes), bytes, result)
    }

    fn count<T>(
        &self,
        (operations, total): (&AtomicU64, &AtomicU64),
        bytes: u64,
        result: Result<T, VolumeError>,
    ) -> Result<T, VolumeError> {
        if result.is_ok() {
            operations.fetch_add(1, Relaxed);
            total.fetch_add(bytes, Relaxed);
        } else {
            self.errors.fetch_add(1, Relaxed);
        }
        result
    }
}
