//! The cluster client: objects of a volume, wherever they are now.
//!
//! ```text
//!  ObjectClient (router.rs)      one operation until it succeeds or is refused for good
//!      │  placement from the newest map, waits and retries
//!  ClusterClient (cluster.rs)    one connection per OSD, closed when the map says it is another run
//!      │
//!  Connection (connection.rs)    many requests in flight, each answered or known lost
//! ```
//!
//! A request is sent again only after the attempt before was answered, or its connection is closed
//! (rule C1). An OSD drops what is still queued from an older connection of the same client when a
//! new one says hello.

mod attachment;
mod cluster;
mod connection;
pub mod reader;
mod router;

pub use attachment::Attached;
pub use cluster::ClusterClient;
pub use router::{ObjectClient, ObjectError};
