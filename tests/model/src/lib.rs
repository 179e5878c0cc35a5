//! Executable models of Gabion's protocol, searched through all their states.
//!
//! - [`group`]: one placement group with its monitors and its clients: maps, intervals, peering, activation, recovery, writes, reads,
//!   retries and take-overs, with every crash and every order of messages that its limits allow.
//! - [`lease`]: why an OSD that the monitors call down has no lease any more, with clocks that a model can count.
//!
//! A [`rules::Rule`] can be switched off; the search must then find what it prevents, and tells the shortest way there.
//! `docs/protocol.md` lists the rules. The models are written after the code, and share none with it.

pub mod configurations;
pub mod explore;
pub mod group;
pub mod lease;
pub mod register;
pub mod rules;
