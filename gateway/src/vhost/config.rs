//! The device's features and its configuration space (`struct virtio_blk_config`, virtio 1.2 section 5.2.4).

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::limits;

/// Unit of every sector number in virtio-blk, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
const BLOCK_BYTES: u32 = gabion_proto::limits::BLOCK_BYTES;
const CONFIG_BYTES: usize = 60;

pub fn features(read_only: bool) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ,
    ];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.into_iter().fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
}

pub fn event_idx(acked: u64) -> bool {
    acked & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
}

pub fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

/// The configuration space from `offset`, `len` bytes of it; what lies behind the known fields reads as zero.
pub fn space(size_bytes: u64, num_queues: u16, offset: u32, len: u32) -> Vec<u8> {
    let mut raw = [0u8; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(size_bytes / SECTOR_BYTES).to_le_bytes());
    put(8, &limits::ADVERTISED_SEGMENT_BYTES.to_le_bytes());
    put(12, &limits::ADVERTISED_SEGMENTS.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    let physical_block_exp = (BLOCK_BYTES / SECTOR_BYTES as u32).trailing_zeros() as u8;
    let block_sectors = BLOCK_BYTES / SECTOR_BYTES as u32;
    put(24, &[physical_block_exp, 0]);
    put(26, &(block_sectors as u16).to_le_bytes());
    put(28, &block_sectors.to_le_bytes());
    put(34, &num_queues.to_le_bytes());
    put(36, &limits::RANGE_SECTORS_MAX.to_le_bytes());
    put(40, &limits::RANGES_MAX.to_le_bytes());
    put(44, &block_sectors.to_le_bytes());
    put(48, &limits::RANGE_SECTORS_MAX.to_le_bytes());
    put(52, &limits::RANGES_MAX.to_le_bytes());
    put(56, &[1]);
    let from = (offset as usize).min(CONFIG_BYTES);
    let mut out = raw[from..].to_vec();
    out.resize(len as usize, 0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_cut_and_padded_to_what_is_asked() {
        let whole = space(1 << 30, 4, 0, 96);
        assert_eq!(whole.len(), 96);
        assert_eq!(u64::from_le_bytes(whole[..8].try_into().unwrap()), (1 << 30) / 512);
        assert_eq!(u16::from_le_bytes(whole[34..36].try_into().unwrap()), 4);
        assert_eq!(whole[24], 3);
        assert_eq!(whole[60..], [0; 36]);
        assert_eq!(space(1 << 30, 4, 34, 2), 4u16.to_le_bytes());
        assert_eq!(space(1 << 30, 4, 200, 8), [0; 8]);
    }
}
