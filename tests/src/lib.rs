//! What the tests of whole clusters share.

pub mod cluster;
pub mod history;
pub mod guest_disk;
pub mod mirror;
pub mod workload;
