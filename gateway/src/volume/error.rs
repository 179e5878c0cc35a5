//! How a request on a volume fails.

/// Why a request was refused or given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    #[error("{len} bytes at {offset} reach beyond the end of the volume at {size_bytes}")]
    OutOfRange { offset: u64, len: u64, size_bytes: u64 },
    #[error("the volume was attached elsewhere: this attachment is fenced for good")]
    Fenced,
    #[error("no space left")]
    NoSpace,
    #[error("input/output error")]
    Io,
    #[error("no answer within the I/O timeout")]
    TimedOut,
    #[error("the volume was removed")]
    Removed,
}
