
pub mod vhost;
