//! Measures block devices against each other: one set of jobs, several targets, alternating rounds, medians.
//!
//! What counts is *operations per CPU-second* of everything a target needs (its daemons and the load generator), because
//! absolute rates of two sittings on a shared machine do not compare.

pub mod agreement;
pub mod cluster;
pub mod cpu;
pub mod fio;
mod floor;
pub mod harness;
pub mod index;
pub mod job;
pub mod peering;
pub mod rebuild;
pub mod report;
pub mod resident;
pub mod store;
pub mod target;
pub mod vhost;
