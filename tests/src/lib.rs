//! What the tests of whole clusters share.

pub mod cluster;
pub mod history;
pub mod mirror;
pub mod workload;
