//! One host's gateway: volumes of the cluster as NBD and vhost-user-blk exports.

pub mod attach;
pub mod daemon;
pub mod exports;
pub mod holder;
pub mod metrics;
pub mod nbd;
pub mod session;
pub mod vhost;
pub mod volume;
