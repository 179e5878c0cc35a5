//! One storage daemon, one disk: the object store, the placement-group state machines, recovery.
//!
//! `core` decides (pure state machines), `server` executes (sockets, the store's thread, the
//! monitors), `store` keeps, `erasure` computes shards.

pub mod core;
pub mod erasure;
pub mod server;
pub mod store;
