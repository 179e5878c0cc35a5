//! What every Gabion daemon agrees on: identifiers, limits, the cluster map, placement, the
//! data-path messages and frames, and the gRPC API.
//!
//! The core modules are pure: no clock, no sockets, no async runtime. [`pb`] holds the code
//! generated from `proto/gabion/v1/*.proto`.

pub mod admission;
pub mod blocks;
pub mod convert;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod map;
pub mod msg;
pub mod nic;
pub mod placement;
pub mod shared;

/// Generated gRPC and protobuf types (package `gabion.v1`).
#[allow(clippy::all, missing_docs)]
pub mod pb {
    tonic::include_proto!("gabion.v1");

    /// Serialized descriptors of every service here, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gabion_descriptor.bin"));
}
