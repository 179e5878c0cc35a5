//! gRPC over plain TCP or TLS: connections of clients (`connector`) and of servers (`incoming`), the
//! same [`Security`](crate::tls::Security) on both sides, and who may call what (`access`).

mod access;
mod connector;
mod incoming;
#[cfg(test)]
mod tests;

pub use access::{Access, Rule};
pub use connector::{Connector, explained};
pub use incoming::{Incoming, Peer};
