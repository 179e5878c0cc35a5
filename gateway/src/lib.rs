//! One host's gateway: volumes of the cluster as NBD and vhost-user-blk exports.

pub mod nbd;
pub mod vhost;
pub mod volume;
