//! Every limit of the product, in one place, with asserts for how they relate.

use std::time::Duration;

/// Unit of checksum and of the present bitmap; writes reach OSDs in whole blocks (rule S6).
pub const BLOCK_BYTES: u32 = 4096;
/// Unit of allocation inside one OSD's store.
pub const CHUNK_BYTES: u32 = 128 * 1024;
/// Blocks in a chunk.
pub const BLOCKS_PER_CHUNK: u32 = CHUNK_BYTES / BLOCK_BYTES;
/// Default, least and greatest object size of a pool; a power of two.
pub const OBJECT_BYTES_DEFAULT: u32 = 4 << 20;
pub const OBJECT_BYTES_MIN: u32 = 1 << 20;
pub const OBJECT_BYTES_MAX: u32 = 16 << 20;

/// Recovery moves objects piece by piece ...
pub const PIECE_BYTES: u32 = 256 * 1024;
pub const PIECE_BLOCKS: u32 = PIECE_BYTES / BLOCK_BYTES;
/// ... and compares copies leaf by leaf.
pub const LEAF_BYTES: u32 = 16 * 1024;
pub const LEAF_BLOCKS: u32 = LEAF_BYTES / BLOCK_BYTES;
pub const PIECE_LEAVES: u32 = PIECE_BYTES / LEAF_BYTES;

/// Largest data payload of one frame: one whole object of the largest kind.
pub const FRAME_DATA_BYTES_MAX: u32 = OBJECT_BYTES_MAX;
/// Largest metadata part of one frame.
pub const FRAME_META_BYTES_MAX: u32 = 1 << 20;
/// Object entries in one peering list or activation message.
pub const LIST_ENTRIES_MAX: usize = 4096;
/// Parts into which peering divides a member's list to compare it.
pub const LIST_PARTS_MAX: usize = 64;
/// Objects in one answer to a scrub.
pub const SCRUB_ENTRIES_MAX: usize = 64;
/// Objects without a good copy that one group names to the monitors; more are only counted.
pub const DAMAGED_NAMED_MAX: usize = 16;
/// What a scrub reads per second from one OSD (settable; this is the default and the least).
pub const SCRUB_RATE_DEFAULT: u64 = 64 << 20;
pub const SCRUB_RATE_MIN: u64 = 1 << 20;
/// The least that recovery is slowed down to, in bytes per second at each OSD.
pub const REBUILD_RATE_MIN: u64 = 4 << 20;
/// Every group is scrubbed that often, and read as a whole that often (settable).
pub const SCRUB_INTERVAL_DEFAULT: Duration = Duration::from_secs(24 * 3600);
pub const DEEP_SCRUB_INTERVAL_DEFAULT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Reports of groups that one OSD has under way to the monitors; the others wait their turn. Fewer than an HTTP/2 connection takes at
/// once, which heartbeats share.
pub const REPORTS_AT_ONCE_MAX: usize = 128;
/// Groups that one OSD is told to scrub at once, as their primary.
pub const SCRUB_ORDERS_MAX: usize = 4;
/// Largest client operation; longer requests are split by the gateway.
pub const OP_DATA_BYTES_MAX: u32 = 1 << 20;

/// Operations that one client connection may have in flight at an OSD.
pub const CONN_OPS_MAX: usize = 1024;
/// Bytes that one client connection may have in flight at an OSD.
pub const CONN_BYTES_MAX: usize = 64 << 20;

/// A volume's size.
pub const VOLUME_BYTES_MIN: u64 = 1 << 20;
pub const VOLUME_BYTES_MAX: u64 = 256 << 40;
/// Layers in one volume's chain; each costs a read a lookup.
pub const LAYERS_MAX: usize = 256;

/// Names of pools, volumes, VMs, hosts: see [`valid_name`].
pub const NAME_BYTES_MAX: usize = 64;

pub const POOLS_MAX: usize = 256;
pub const PGS_PER_POOL_MAX: u32 = 65_536;
pub const OSDS_MAX: usize = 10_000;
pub const VOLUMES_MAX: usize = 1_000_000;
pub const SNAPSHOTS_MAX: usize = 1_000_000;
pub const REPLICAS_MAX: u32 = 8;
/// Data and parity shards of an erasure code together.
pub const ERASURE_WIDTH_MAX: u32 = 32;
/// Earlier intervals of one group that a map may carry.
pub const PAST_INTERVALS_MAX: usize = 65_536;
pub const VMS_MAX: usize = 100_000;
pub const VM_DISKS_MAX: usize = 24;
pub const VM_CPUS_MAX: u32 = 512;
pub const VM_MEMORY_BYTES_MIN: u64 = 64 << 20;
pub const VM_MEMORY_BYTES_MAX: u64 = 16 << 40;
/// Largest gRPC message either side accepts.
pub const GRPC_MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Monitors of one cluster.
pub const MONITORS_MAX: usize = 7;
/// Largest command that the monitors agree on, encoded.
pub const COMMAND_BYTES_MAX: usize = 128 * 1024;
/// Commands that may wait for their turn to be agreed on; more wait with whoever asks.
pub const PROPOSALS_WAITING_MAX: usize = 4096;
/// Commands that one monitor sends to another at a time.
pub const MONITOR_APPEND_ENTRIES_MAX: usize = 32;
/// One piece of a snapshot of the monitors' state, and a whole snapshot.
pub const MONITOR_SNAPSHOT_PIECE_BYTES: usize = 1 << 20;
pub const MONITOR_SNAPSHOT_BYTES_MAX: u64 = 1 << 30;
/// Largest message between monitors.
pub const MONITOR_PEER_MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Answers that the monitors remember, for requests that are made again.
pub const REQUESTS_REMEMBERED_MAX: usize = 4096;

/// An OSD's lease, counted from when its request was *sent* (rule P6).
pub const LEASE: Duration = Duration::from_millis(3000);
/// How often an OSD renews it.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// How much longer than a lease the monitor waits before it relies on silence: clock drift of
/// 1 in 1,000 and scheduling.
pub const LEASE_GRACE: Duration = Duration::from_millis(500);
/// How long a replica may sit on a sub-operation before the primary reports it (rule P8): settable, this is the default.
pub const SUBOP_STUCK: Duration = Duration::from_secs(10);
/// Whoever is down is noticed by its lease first.
pub const SUBOP_STUCK_MIN: Duration = Duration::from_secs(4);
pub const SUBOP_STUCK_MAX: Duration = Duration::from_secs(600);
/// Latencies are summed up and compared in windows of this length.
pub const LATENCY_WINDOW: Duration = Duration::from_secs(5);
/// Peers of which one OSD tells the monitors, those that it works with most.
pub const LATENCY_PEERS_MAX: usize = 128;
/// An OSD that stays slow is taken out no earlier than this, and no later (settable).
pub const SLOW_EVICT_MIN: Duration = Duration::from_secs(60);
pub const SLOW_EVICT_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// OSDs that are called slow at a time.
pub const SLOW_OSDS_MAX: usize = 64;
/// A disk that owes answers and gives none for this long stops its OSD (rule S9).
pub const DISK_SILENT_MAX: Duration = Duration::from_secs(30);
/// Down for this long means out (settable; this is the default).
pub const DOWN_OUT_DEFAULT: Duration = Duration::from_secs(600);

/// Client writes are refused when a store has less than this share free, in percent ...
pub const FULL_FREE_PERCENT: u64 = 5;
/// ... health warns below this share ...
pub const NEARFULL_FREE_PERCENT: u64 = 15;
/// ... and recovery stops below this one.
pub const RECOVERY_FREE_PERCENT: u64 = 2;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(OBJECT_BYTES_MIN.is_multiple_of(CHUNK_BYTES));
const _: () = assert!(PIECE_BYTES.is_multiple_of(CHUNK_BYTES) && CHUNK_BYTES.is_multiple_of(LEAF_BYTES));
// One bit for each.
const _: () = assert!(PIECE_LEAVES <= u32::BITS);
const _: () = assert!(OBJECT_BYTES_MAX <= FRAME_DATA_BYTES_MAX);
const _: () = assert!(OP_DATA_BYTES_MAX <= OBJECT_BYTES_MIN);
const _: () = assert!(RECOVERY_FREE_PERCENT < FULL_FREE_PERCENT);
const _: () = assert!(FULL_FREE_PERCENT < NEARFULL_FREE_PERCENT);
const _: () = assert!(HEARTBEAT.as_millis() * 3 <= LEASE.as_millis());
const _: () = assert!(SUBOP_STUCK_MIN.as_millis() > LEASE.as_millis() + LEASE_GRACE.as_millis());
const _: () = assert!(2 * COMMAND_BYTES_MAX * MONITOR_APPEND_ENTRIES_MAX <= MONITOR_PEER_MESSAGE_BYTES_MAX);
// An encoded byte takes at most two.
const _: () = assert!(2 * MONITOR_SNAPSHOT_PIECE_BYTES < MONITOR_PEER_MESSAGE_BYTES_MAX);
// One CRC and one state per block of the largest object fit in a frame's metadata.
const _: () = assert!(OBJECT_BYTES_MAX / BLOCK_BYTES * 16 < FRAME_META_BYTES_MAX);

/// Whether `name` may name a pool, a VM or a host: 1 to [`NAME_BYTES_MAX`] of
/// `a-z A-Z 0-9 . _ -`, starting with a letter or a digit.
pub fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Whether `name` may name a volume: a [`valid_name`], or two of them as `tenant/name`.
pub fn valid_volume_name(name: &str) -> bool {
    match name.split_once('/') {
        Some((tenant, rest)) => valid_name(tenant) && valid_name(rest),
        None => valid_name(name),
    }
}
