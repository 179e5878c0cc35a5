//! A vhost-user-blk front end without a guest: shared memory, one split virtqueue, and a load on it.

pub mod load;
pub mod queue;
