//! What the tests of whole clusters share.

pub mod cluster;
pub mod workload;
