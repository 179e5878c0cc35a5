//! What two services share and `proto/` cannot hold: connections, the cluster client, telemetry,
//! gossip, clocks, and what a host offers to guests.

pub mod addr_file;
pub mod client;
pub mod clock;
pub mod command_line;
pub mod gossip;
pub mod grpc;
pub mod host_offer;
pub mod map_watch;
pub mod metrics;
pub mod monitor_client;
pub mod net;
pub mod readiness;
pub mod telemetry;
pub mod tls;
