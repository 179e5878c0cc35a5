//! What two services share and `proto/` cannot hold: connections, the cluster client, telemetry,
//! gossip and clocks.
