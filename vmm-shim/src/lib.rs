//! Guests on this host: `gabion-host` keeps the virtual machines that the monitors want here.
//!
//! [`agent`] decides and reports, [`engine`] runs a guest, [`boot`] takes its kernel from its own
//! volume, [`console`] shares its serial port. [`vmm`] is the engine of our own. Guests outlive the agent: a new one adopts them.

pub mod agent;
pub mod boot;
pub mod console;
pub mod engine;
pub mod vmm;
