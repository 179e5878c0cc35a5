//! The shell around [`OsdCore`](crate::core::OsdCore): sockets, clocks, the store's thread, the
//! monitors. It decides nothing about data.
//!
//! ```text
//!  clients --+                    +--> store thread --+
//!            +-> inputs -> core --+                   +-> answers
//!  peers ----+   (one task)       +--> peers, clients, monitors
//! ```
//!
//! One task owns the core and everything that it touches; others send it inputs over bounded
//! channels. That task never waits for a socket: what a peer's queue has no room for is dropped, as a
//! network may drop it, and the core sends again; answers to a client always fit, because each
//! connection may only have so many operations in flight.
//!
//! While little is asked of the store, that task drives it itself, without ever waiting for the disk
//! ([`crate::store::driver`]).
//!
//! A run of the core lasts as long as one incarnation. When the monitors say that this OSD is no
//! longer up, the core is thrown away, outstanding store work is awaited, and a new run boots with a new
//! incarnation. A store that stopped for good ends the process (invariant 9).

mod clients;
mod connections;
mod drain;
mod metrics;
mod monitors;
mod peers;
mod run;
mod start;

pub use run::{Config, ServerError};
pub use start::start;
