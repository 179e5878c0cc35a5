//! Mutually authenticated TLS for everything that crosses the cluster's network: gRPC and the data
//! path. Off (plain) or on for a whole process; never decided by what the other side asks for.
//!
//! ```text
//!  authority.rs    the cluster's CA, offline: makes it, issues certificates
//!  identity.rs     what a certificate says: cluster, role, name
//!  settings.rs     the options of a daemon, and when it may listen without TLS
//!  credentials.rs  files -> validated keys and certificates -> connectors and acceptors
//!  verify.rs       which certificates of the other side are good
//!  refusal.rs      why not, in one sentence for both logs
//! ```
//!
//! A certificate is good when the cluster's CA has signed it, it is valid now and it names this cluster
//! and a role; who connects also insists on the role of the daemon that it wants. Addresses and host names
//! are not looked at: daemons find each other by the cluster map, and they move. What a role may do is
//! decided where it asks (the monitors' services, the OSDs' hello).
//!
//! TLS 1.3 only. No session is resumed, so a certificate that has run out is refused at the next connection.

pub mod authority;
mod credentials;
mod identity;
mod refusal;
mod settings;
#[cfg(test)]
pub(crate) mod tests;
mod verify;

pub use credentials::{Protocol, Security, TlsConfigError, TlsFiles, TlsStream};
pub use identity::{Identity, Role};
pub use refusal::Refusal;
pub use settings::{Exposed, ListenArgs, TlsArgs};
