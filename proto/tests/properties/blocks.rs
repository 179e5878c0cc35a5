use crate::samples;
use bytes::Bytes;
use gabion_proto::blocks::*;
use gabion_proto::limits::*;
use proptest::prelude::*;

proptest! {
    #![proptest_config(crate::config(128))]

    #[test]
    fn valid_content_is_accepted_and_walked(seed in any::<u64>()) {
        let content = samples::content(seed);
        prop_assert_eq!(content.validate(true), Ok(()));
        let bytes: Vec<u8> = content.data_blocks().flat_map(|(_, b, _)| b.to_vec()).collect();
        prop_assert_eq!(&bytes[..], &content.data[..]);
        for (_, bytes, crc) in content.data_blocks() {
            prop_assert_eq!(crc32fast::hash(bytes), crc);
        }
    }

    #[test]
    fn a_flipped_bit_of_data_is_noticed(seed in any::<u64>(), at in any::<prop::sample::Index>()) {
        let mut content = samples::content(seed);
        prop_assume!(!content.data.is_empty());
        let mut bytes = content.data.to_vec();
        let bit = at.index(8 * bytes.len());
        bytes[bit / 8] ^= 1 << (bit % 8);
        content.data = bytes.into();
        prop_assert_eq!(content.validate(false), Ok(()));
        let noticed = matches!(content.validate(true), Err(ContentError::Crc { .. }));
        prop_assert!(noticed);
    }

    #[test]
    fn a_wrong_length_is_noticed(seed in any::<u64>(), more in any::<bool>()) {
        let mut content = samples::content(seed);
        prop_assume!(more || !content.data.is_empty());
        let mut bytes = content.data.to_vec();
        if more { bytes.push(0) } else { bytes.truncate(bytes.len() - 1) }
        content.data = bytes.into();
        let noticed = matches!(content.validate(true), Err(ContentError::Length { .. }));
        prop_assert!(noticed);
    }

    #[test]
    fn any_extents_are_judged_without_panic(
        list in prop::collection::vec((any::<u32>(), any::<u32>(), any::<bool>()), 0..4),
    ) {
        let extents: Vec<Extent> = list
            .into_iter()
            .map(|(first_block, block_count, zero)| {
                let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data { crcs: vec![0; 2] } };
                Extent { first_block, block_count, kind }
            })
            .collect();
        let _ = Content { extents, data: Bytes::new() }.validate(true);
    }
}

#[test]
fn bad_shapes_are_refused() {
    let run = |first_block, block_count| Extent { first_block, block_count, kind: ExtentKind::Zero };
    let judge = |extents| Content { extents, data: Bytes::new() }.validate(true);
    let limit = OBJECT_BYTES_MAX / BLOCK_BYTES;
    assert_eq!(judge(vec![run(0, limit)]), Ok(()));
    assert_eq!(judge(vec![run(0, 1), run(1, 1)]), Ok(()));
    assert_eq!(judge(vec![run(0, 0)]), Err(ContentError::Shape { index: 0 }));
    assert_eq!(judge(vec![run(1, limit)]), Err(ContentError::Shape { index: 0 }));
    assert_eq!(judge(vec![run(u32::MAX, 2)]), Err(ContentError::Shape { index: 0 }));
    assert_eq!(judge(vec![run(0, 2), run(1, 1)]), Err(ContentError::Shape { index: 1 }));
    assert_eq!(judge(vec![run(4, 1), run(0, 1)]), Err(ContentError::Shape { index: 1 }));
    let short = Extent { first_block: 0, block_count: 2, kind: ExtentKind::Data { crcs: vec![0] } };
    assert_eq!(judge(vec![short]), Err(ContentError::CrcCount { index: 0, crcs: 1, blocks: 2 }));
}
