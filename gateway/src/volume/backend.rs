//! What a volume stands on.

use super::VolumeError;
use futures::future::BoxFuture;
use gabion_proto::blocks::Content;

/// Whole blocks of one volume's objects. Operations on overlapping blocks are ordered by the caller.
pub trait Backend: Send + Sync + 'static {
    /// The blocks that are present; the rest reads as zero. Shape and checksums are verified.
    fn read(
        &self,
        object: u32,
        first_block: u32,
        block_count: u32,
    ) -> BoxFuture<'_, Result<Content, VolumeError>>;
    /// Durable when it returns. Checksums are computed already.
    fn write(&self, object: u32, content: Content) -> BoxFuture<'_, Result<(), VolumeError>>;
    /// Zeros, durable when it returns; `discard` gives the space back as well.
    fn zero(
        &self,
        object: u32,
        first_block: u32,
        block_count: u32,
        discard: bool,
    ) -> BoxFuture<'_, Result<(), VolumeError>>;
    /// Whether writes can still succeed.
    fn check(&self) -> Result<(), VolumeError>;
}
