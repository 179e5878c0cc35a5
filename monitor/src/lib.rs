//! The monitors: they agree on the cluster map and serve it.
//!
//! [`state`] (what is agreed on) and [`decide`] (who is dead) are pure: no clock, no sockets, no
//! async. The simulator runs the same code.

pub mod decide;
pub mod state;
