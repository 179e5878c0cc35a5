//! What the tests of whole clusters and of the VMM's devices share.

pub mod cluster;
pub mod guest_disk;
pub mod guest_driver;
pub mod history;
pub mod mirror;
pub mod net;
pub mod scrape;
pub mod slow_disk;
pub mod workload;
