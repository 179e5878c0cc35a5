//! Bytes from a disk: whatever they are, decoders answer and do not panic; what was encoded comes back.

use super::buffer::{Blocks, BlocksMut};
use super::homes::{self, Class, Region};
use super::journal::{self, Header, Image};
use super::layout::{self, BLOCK, ChunkRecord, Geometry, Key, Position, Superblock};
use super::stage::Sweep;
use super::tests::IDENTITY;
use super::view::{BlockBytes, DataBlock, Value, View};
use super::*;
use crate::erasure::ShardId;
use proptest::collection::vec;
use proptest::prelude::*;

fn key() -> impl Strategy<Value = Key> {
    vec(any::<u8>(), 1..29).prop_map(|bytes| Key::new(&bytes).expect("short enough"))
}

fn value() -> impl Strategy<Value = Option<Value>> {
    prop_oneof![
        Just(None),
        vec(any::<u8>(), 0..300).prop_map(|bytes| Some(bytes.into())),
        (any::<u32>(), any::<u8>()).prop_map(|(crc, byte)| {
            let bytes = BlockBytes::Raw(vec![byte; BLOCK].into());
            Some(Value::Block(DataBlock { crc, bytes }))
        }),
    ]
}

fn plain(value: &Option<Value>) -> Option<(Option<u32>, Vec<u8>)> {
    value.as_ref().map(|v| match v {
        Value::Record(bytes) => (None, bytes.to_vec()),
        Value::Block(b) => (Some(b.crc), b.bytes.get().to_vec()),
    })
}

const HEADER: Header = Header { nonce: 7, seq: 8, flushed: 6, previous_crc: 5 };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_record_comes_back(changes in proptest::collection::btree_map(key(), value(), 0..20), slot: u32) {
        let mut view: View = changes;
        let images = [Image { slot, first: 3, count: 4, crc: 99 }];
        let prefix = Key::new(&[0xff; 5]).expect("short");
        let class = Class { index: 2, count: 4 };
        let sweeps = [Sweep { prefix, class: Class::ALL }, Sweep { prefix, class }];
        let (blocks, crc) = journal::encode(HEADER, &sweeps, &images, &mut view);
        let record = journal::decode(&blocks).expect("intact");
        prop_assert_eq!((record.header, record.crc, record.blocks as usize), (HEADER, crc, blocks.count()));
        prop_assert_eq!(&record.images[..], &images[..]);
        let back: Vec<_> = record.sweeps.iter().map(|s| (s.prefix, s.class)).collect();
        prop_assert_eq!(back, [(prefix, Class::ALL), (prefix, class)]);
        let back: Vec<_> = record.changes.iter().map(|(k, v)| (*k, plain(v))).collect();
        let sent: Vec<_> = view
            .iter()
            .filter(|(k, v)| v.is_some() || !k.starts_with(&prefix))
            .map(|(k, v)| (*k, plain(v)))
            .collect();
        prop_assert_eq!(back, sent);
    }

    #[test]
    fn a_flipped_bit_of_a_record_is_seen(at in 0usize..1000, bit in 0u8..8, value in vec(any::<u8>(), 900..1000)) {
        let mut view = View::from([(Key::letter(b'G'), Some(value.into()))]);
        let (blocks, _) = journal::encode(HEADER, &[], &[], &mut view);
        let mut bytes = blocks.bytes().to_vec();
        // The last bytes of the block are not part of the record.
        prop_assume!(at < 48 + 7 + 900);
        bytes[at] ^= 1 << bit;
        prop_assert!(journal::decode(&Blocks::copy_of(&bytes)).is_none());
    }

    #[test]
    fn any_changes_under_a_good_checksum_do_no_harm(junk in vec(any::<u8>(), 0..200), data in 0u32..3) {
        let mut blocks = BlocksMut::zeroed(1 + data as usize);
        let out = blocks.bytes_mut();
        out[..8].copy_from_slice(b"GABIONJR");
        out[36..40].copy_from_slice(&(junk.len() as u32).to_le_bytes());
        out[40..44].copy_from_slice(&data.to_le_bytes());
        out[48..48 + junk.len()].copy_from_slice(&junk);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&out[..44]);
        hasher.update(&out[48..48 + junk.len()]);
        hasher.update(&out[BLOCK..]);
        let crc = hasher.finalize();
        out[44..48].copy_from_slice(&crc.to_le_bytes());
        let _ = journal::decode(&blocks.freeze());
    }

    #[test]
    fn any_bytes_do_no_harm(bytes in vec(any::<u8>(), 0..5000)) {
        let _ = Superblock::decode(&bytes);
        let _ = ChunkRecord::decode(&bytes);
        let _ = layout::parse_pending(&bytes);
        let _ = layout::parse_key(&bytes);
        let _ = layout::parse_numbered(&bytes);
        let _ = layout::decode::<layout::ObjectRecord>(&bytes);
        let _ = layout::decode::<Needed>(&bytes);
        let _ = layout::decode::<PgMeta>(&bytes);
        let _ = layout::decode::<Identity>(&bytes);
        let _ = journal::peek(&bytes, 100);
        let mut header = b"GABIONJR".to_vec();
        header.extend_from_slice(&bytes);
        let _ = journal::peek(&header, u32::MAX);
        let _ = journal::decode(&Blocks::copy_of(&header));
    }

    #[test]
    fn any_homes_do_no_harm(
        junk in vec(any::<u8>(), 0..60),
        regions in vec((0u32..4, 0u32..4, 0u32..3), 0..5),
        index: u32,
    ) {
        let pg = PgId { pool: PoolId(1), index };
        let key = layout::pg_key(layout::kind::HOMES, pg);
        let _ = homes::parse(&key, &junk);
        let _ = homes::parse(&junk, &junk);
        let regions: Vec<Region> = regions
            .into_iter()
            .map(|(index, count, home)| Region { class: Class { index, count }, home })
            .collect();
        if let Ok(change) = homes::parse(&key, &layout::encode(&regions).expect("encodes")) {
            prop_assert_eq!(change, (pg, Some(regions.clone())));
            prop_assert!(regions.iter().all(|r| r.class.index < r.class.count));
        }
    }

    #[test]
    fn any_superblock_under_a_good_checksum_does_no_harm(bytes in vec(any::<u8>(), 88)) {
        let mut out = b"GABIONSB".to_vec();
        out.extend_from_slice(&layout::FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&bytes);
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out.resize(BLOCK, 0);
        if let Ok(s) = Superblock::decode(&out) {
            prop_assert!(s.tail.block <= s.journal_blocks && s.geometry().slots > 0);
        }
    }

    #[test]
    fn a_chunk_record_comes_back(slot: u32, data: u32, zero: u32, crcs: [u32; 32]) {
        let mut c = ChunkRecord { slot: Some(slot), zero: zero & !data, data, crcs };
        (0..32).filter(|b| data & 1 << b == 0).for_each(|b| c.crcs[b] = 0);
        prop_assert_eq!(ChunkRecord::decode(&c.encode()), Ok(c));
    }
}

/// The bytes of these records are what disks hold: a change that breaks this test needs a new format version.
#[test]
fn the_format_has_not_changed() {
    let size = 64 << 20;
    let geometry = Geometry::for_size(size);
    let superblock = Superblock {
        generation: 3,
        size,
        identity: IDENTITY,
        journal_blocks: geometry.journal_blocks,
        nonce: 0x0102_0304_0506_0708,
        tail: Position { block: 17, seq: 42, crc: 0xaabb_ccdd },
        flushed: 41,
    };
    let bytes = superblock.encode();
    assert_eq!(Superblock::decode(&bytes), Ok(superblock));
    assert_eq!(digest(&bytes), GOLDEN_SUPERBLOCK, "superblock: {:x}", digest(&bytes));
    let chunk =
        ChunkRecord { slot: Some(9), zero: 0b100, data: 0b11, crcs: std::array::from_fn(|i| i as u32) };
    let block = DataBlock { crc: 11, bytes: BlockBytes::Raw(vec![5; BLOCK].into()) };
    let pg = PgId { pool: PoolId(1), index: 2 };
    let object = ObjectId { volume: VolumeId(3), index: 4, layer: LayerId(5) };
    let record = layout::ObjectRecord { version: Version::from_raw(6), deleted: false, pending: None };
    let mut view = View::from([
        (
            layout::object_key(layout::kind::OBJECT, pg, object),
            Some(layout::encode(&record).expect("encodes").into()),
        ),
        (layout::numbered_key(layout::kind::CHUNK, pg, object, 1), Some(chunk.encode().into())),
        (layout::numbered_key(layout::kind::OVERLAY, pg, object, 33), Some(Value::Block(block))),
        (layout::object_key(layout::kind::MISSING, pg, object), None),
    ]);
    let images = [Image { slot: 8, first: 0, count: 32, crc: 1 }];
    let (blocks, _) = journal::encode(HEADER, &[], &images, &mut view);
    assert_eq!(digest(blocks.bytes()), GOLDEN_RECORD, "record: {:x}", digest(blocks.bytes()));
    let meta = PgMeta {
        promised: Epoch(7),
        activated: Epoch(6),
        shard: Some(ShardId { number: 1, k: 2, m: 1, matrix: 1 }),
        pg_count: 8,
    };
    assert_eq!(layout::encode(&meta).unwrap(), [2, 7, 6, 1, 1, 2, 1, 1, 8]);
}

/// Without the first byte: the checksum of bytes that end with their own checksum is always the same.
fn digest(bytes: &[u8]) -> u32 {
    crc32fast::hash(&bytes[1..])
}

const GOLDEN_SUPERBLOCK: u32 = 0xa378a03e;
const GOLDEN_RECORD: u32 = 0xbdda7b86;
