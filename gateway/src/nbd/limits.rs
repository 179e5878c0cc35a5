//! What an NBD client may ask for at most.

use std::time::Duration;

/// Payload of one read or write.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Requests of one connection in flight.
pub const REQUESTS_MAX: usize = 256;
/// Payload of one connection's requests in flight.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 20;
/// Options of one handshake, and the bytes of each; a longer one is skipped up to the second limit.
pub const OPTIONS_MAX: usize = 256;
pub const OPTION_BYTES_MAX: u32 = 16 << 10;
pub const OPTION_SKIP_BYTES_MAX: u32 = 1 << 20;
/// Export names, by the specification.
pub const NAME_BYTES_MAX: usize = 4096;
/// The whole handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the requests of a client that left may still run on its connection.
pub const LEFT_BEHIND: Duration = Duration::from_secs(30);
/// How long a client's machine may be silent before its connection is given up, and how long a client may leave its answers in
/// the network: the kernel counts both alike, so this is longer than a client that is merely stopped for a moment needs.
pub const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long the last answers of a closing export may take to leave.
pub const LAST_ANSWERS: Duration = Duration::from_secs(5);
/// Connections of all exports of one listener.
pub const CONNECTIONS_MAX: usize = 1024;

const _: () = assert!(REQUEST_BYTES_MAX as usize <= PAYLOAD_BYTES_MAX);
const _: () = assert!(NAME_BYTES_MAX < OPTION_BYTES_MAX as usize);
