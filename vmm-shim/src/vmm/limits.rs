//! What a machine may have at most, and where a client of the control socket is stopped.

/// Slots of the PCI bus that take devices; slot 0 is the host bridge.
pub const SLOT_FIRST: u8 = 1;
pub const SLOT_LAST: u8 = 24;
pub const VCPUS_MAX: u32 = 64;
pub const MEMORY_BYTES_MIN: u64 = 32 << 20;
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// Queues of one virtio device that the guest sees.
pub const QUEUES_MAX: u16 = 16;
pub const QUEUE_SIZE_MAX: u16 = 256;
pub const CONTROL_CLIENTS_MAX: usize = 4;
pub const CONTROL_LINE_BYTES_MAX: usize = 64 << 10;
/// Answers that a client has not read; one that lets more pile up is disconnected.
pub const CONTROL_BACKLOG_BYTES_MAX: usize = 256 << 10;
pub const NAME_BYTES_MAX: usize = 255;
pub const CONSOLE_BUFFER_BYTES: usize = 64 << 10;
/// The console's log starts anew beyond this.
pub const CONSOLE_LOG_BYTES_MAX: u64 = 8 << 20;

const _: () = assert!(SLOT_FIRST > 0 && SLOT_LAST < 32);
const _: () = assert!(QUEUE_SIZE_MAX.is_power_of_two());
