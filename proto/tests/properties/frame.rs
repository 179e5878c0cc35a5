use crate::frame_body;
use crate::samples::{self, Numbers};
use bytes::{Bytes, BytesMut};
use gabion_proto::frame::*;
use gabion_proto::limits::*;
use gabion_proto::msg::*;
use proptest::prelude::*;

fn wire(frame: &Frame) -> BytesMut {
    let mut out = BytesMut::from(&frame.encode_head().unwrap()[..]);
    out.extend_from_slice(&frame.data);
    out
}

proptest! {
    #![proptest_config(crate::config(256))]

    #[test]
    fn frames_survive_the_wire_in_any_pieces(
        seeds in prop::collection::vec(any::<u64>(), 1..4), piece in 1usize..5000,
    ) {
        let frames: Vec<Frame> = seeds.into_iter().map(samples::frame).collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|f| wire(f).to_vec()).collect();
        let (mut buf, mut got) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            buf.extend_from_slice(piece);
            while let Some(frame) = Frame::decode(&mut buf).unwrap() {
                got.push(frame);
            }
        }
        prop_assert_eq!(got, frames);
        prop_assert!(buf.is_empty());
    }

    #[test]
    fn a_truncated_frame_waits_for_the_rest(seed in any::<u64>(), cut in any::<prop::sample::Index>()) {
        let whole = wire(&samples::frame(seed));
        let mut buf = BytesMut::from(&whole[..cut.index(whole.len())]);
        prop_assert_eq!(Frame::decode(&mut buf), Ok(None));
    }

    #[test]
    fn a_flipped_bit_is_noticed_outside_bulk_data(seed in any::<u64>(), at in any::<prop::sample::Index>()) {
        let frame = samples::frame(seed);
        let mut bytes = wire(&frame);
        let bit = at.index(8 * (bytes.len() - frame.data.len()));
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Frame::decode(&mut bytes).is_err());
    }
}

#[test]
fn lengths_over_the_limit_are_refused() {
    let header = |meta: u32, data: u32| {
        let mut b = [0u8; HEADER_BYTES];
        b[..4].copy_from_slice(b"GBF1");
        b[4] = PROTOCOL_VERSION;
        b[16..20].copy_from_slice(&meta.to_le_bytes());
        b[20..24].copy_from_slice(&data.to_le_bytes());
        let crc = crc32fast::hash(&b[..28]);
        b[28..].copy_from_slice(&crc.to_le_bytes());
        b
    };
    Header::decode(&header(FRAME_META_BYTES_MAX, FRAME_DATA_BYTES_MAX)).unwrap();
    for (meta, data, part) in [
        (FRAME_META_BYTES_MAX + 1, 0, "metadata"),
        (0, FRAME_DATA_BYTES_MAX + 1, "data"),
        (0, u32::MAX, "data"),
    ] {
        let error = Header::decode(&header(meta, data)).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { part: p, .. } if p == part), "{error}");
    }
    let hello = |refusal: String| {
        let role = Role::Client { id: Default::default() };
        Message::Hello(Hello { cluster: Default::default(), role, refusal: Some(refusal) })
    };
    let long = Frame::new(1, hello("x".repeat(FRAME_META_BYTES_MAX as usize)));
    assert!(matches!(long.encode_head(), Err(FrameError::TooLong { part: "metadata", .. })));
    let data = Bytes::from(vec![0; FRAME_DATA_BYTES_MAX as usize + 1]);
    let long = Frame { data, ..Frame::new(1, hello(String::new())) };
    assert!(matches!(long.encode_head(), Err(FrameError::TooLong { part: "data", .. })));
}

/// The fuzz target's body over pseudo-random bytes and over damaged frames.
#[test]
fn the_decoder_withstands_noise() {
    let n = &mut Numbers(1);
    let mut decoded = 0;
    for round in 0..20_000u64 {
        let mut input = vec![n.any() as u8];
        if round % 2 == 0 {
            let len = n.below(300) as usize;
            input.extend(n.bytes(len));
        } else {
            // Metadata that nearly decodes reaches deeper than noise; sealed, its CRC is right.
            input[0] = 1;
            let head = samples::frame(n.any()).encode_head().unwrap();
            input.extend_from_slice(&head[HEADER_BYTES..]);
            for _ in 0..n.below(3) {
                let at = 1 + n.below(input.len() as u64 - 1) as usize;
                input[at] = n.any() as u8;
            }
        }
        decoded += frame_body::run(&input);
    }
    assert!(decoded > 1_000, "only {decoded} inputs got through: the noise tests too little");
}
