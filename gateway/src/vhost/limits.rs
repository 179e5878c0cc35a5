//! What a front end or a guest may ask for at most.

/// Queues of one device.
pub const QUEUES_MAX: u16 = 64;
/// Entries of one queue; a power of two.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Memory regions of one front end.
pub const MEMORY_REGIONS_MAX: usize = 64;
/// Payload of one read or write.
pub const REQUEST_BYTES_MAX: u64 = 4 << 20;
/// Descriptors of one request, header and status included.
pub const SEGMENTS_MAX: u32 = 1024;
/// Data segments and their size that the guest is told; their product stays below the hard limit.
pub const ADVERTISED_SEGMENTS: u32 = 126;
pub const ADVERTISED_SEGMENT_BYTES: u32 = 32 << 10;
/// Ranges of one discard or write-zeroes request, and the sectors of each.
pub const RANGES_MAX: u32 = 32;
pub const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// Payload that one ring holds before it stops fetching; one more request may exceed it.
pub const RING_BYTES_MAX: u64 = 32 << 20;
/// Largest in-flight region that a front end may hand in.
pub const INFLIGHT_BYTES_MAX: u64 = 16 << 20;

const _: () = assert!(ADVERTISED_SEGMENTS as u64 * ADVERTISED_SEGMENT_BYTES as u64 <= REQUEST_BYTES_MAX);
const _: () = assert!(ADVERTISED_SEGMENTS + 2 <= SEGMENTS_MAX);
const _: () = assert!(QUEUE_SIZE_MAX.is_power_of_two());
const _: () = assert!(REQUEST_BYTES_MAX <= RING_BYTES_MAX);
