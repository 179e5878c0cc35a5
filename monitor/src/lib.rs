//! The monitors: they agree on the cluster map and serve it.
//!
//! [`state`] (what is agreed on) and [`decide`] (who is dead) are pure: no clock, no sockets, no
//! async. The simulator runs the same code. [`raft`] agrees on commands and keeps them, [`grpc`] serves,
//! [`daemon`] puts them together.

pub mod daemon;
pub mod decide;
pub mod grpc;
pub mod raft;
pub mod state;
