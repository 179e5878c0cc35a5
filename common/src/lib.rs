//! What two services share and `proto/` cannot hold: connections, the cluster client, telemetry,
//! gossip and clocks.

pub mod addr_file;
pub mod client;
pub mod clock;
pub mod command_line;
pub mod gossip;
pub mod map_watch;
pub mod monitor_client;
pub mod net;
pub mod readiness;
pub mod telemetry;
