//! Three monitors and more on loopback, each in a runtime of its own: killed, cut off, added, removed,
//! wiped, under a stream of changes.

mod cluster;
mod failover;
mod leases;
mod load;
mod membership;
mod snapshots;
