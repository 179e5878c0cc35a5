//! What a vhost-user device needs of the volume behind it.

use std::fmt::Display;
use std::future::Future;

use bytes::Bytes;
use tokio::sync::watch;

/// A volume as a virtio-blk device sees it. Offsets and lengths are bytes, multiples of 512 and inside `size_bytes`.
///
/// A write is durable when it returns or, at the latest, when a later `flush` returns.
pub trait Disk: Send + Sync + 'static {
    type Error: Display + Send;

    fn size_bytes(&self) -> u64;
    /// Its size whenever that changes; `None` when it never does.
    fn sizes(&self) -> Option<watch::Receiver<u64>> {
        None
    }
    /// What GET_ID answers: at most 20 bytes are used.
    fn serial(&self) -> String;
    fn read(&self, offset: u64, len: u32) -> impl Future<Output = Result<Bytes, Self::Error>> + Send;
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = Result<(), Self::Error>> + Send;
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;
    fn trim(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), Self::Error>> + Send;
    /// Ends when no write is under way any more that was begun before, also by a caller that has left. A disk whose writes end with
    /// their callers has nothing to wait for.
    fn settle(&self) -> impl Future<Output = ()> + Send {
        async {}
    }
    fn flush(&self) -> impl Future<Output = Result<(), Self::Error>> + Send;
}
