//! What the fuzz target runs; also run over pseudo-random bytes by the normal tests.

use bytes::{BufMut, BytesMut};
use gabion_proto::blocks::Content;
use gabion_proto::frame::{Frame, HEADER_BYTES};
use gabion_proto::limits::{FRAME_DATA_BYTES_MAX, FRAME_META_BYTES_MAX};
use gabion_proto::msg::{Message, OpKind, OpReply, PROTOCOL_VERSION, PeerBody, SubWriteKind};

/// Room that a decoder may take for a frame that is still to come; reserving may round up to twice.
const ROOM_MAX: usize = 2 * (HEADER_BYTES + FRAME_META_BYTES_MAX as usize + FRAME_DATA_BYTES_MAX as usize);

/// Decodes frames from `input` until there are no more; how many there were. The first byte says
/// whether the rest is a stream (even) or the metadata of one frame, to be given a valid header.
pub fn run(input: &[u8]) -> usize {
    let Some((mode, rest)) = input.split_first() else { return 0 };
    let mut buf = BytesMut::new();
    if mode % 2 == 1 {
        buf.extend_from_slice(&header(rest));
    }
    buf.extend_from_slice(rest);
    let mut frames = 0;
    loop {
        match Frame::decode(&mut buf) {
            Ok(Some(frame)) => {
                frames += 1;
                check(&frame);
            }
            Ok(None) => {
                assert!(buf.capacity() <= ROOM_MAX + input.len(), "room for {} bytes", buf.capacity());
                return frames;
            }
            Err(_) => return frames,
        }
    }
}

/// A decoded frame encodes to one that decodes to the same, and its content can be judged.
fn check(frame: &Frame) {
    let mut again = BytesMut::new();
    again.put(frame.encode_head().expect("what was decoded can be encoded"));
    again.put(frame.data.clone());
    assert_eq!(Frame::decode(&mut again).as_ref(), Ok(&Some(frame.clone())));
    if let Message::Peer(peer) = &frame.message
        && let PeerBody::SubWrite { write: SubWriteKind::Delta { whole, added }, .. } = &peer.body
    {
        let (whole, added) = Content::pair(whole.clone(), added.clone(), frame.data.clone());
        assert_eq!(whole.data.len() + added.data.len(), frame.data.len());
        judge(&whole);
        judge(&added);
    }
    let extents = match &frame.message {
        Message::Op(op) => match &op.kind {
            OpKind::Write { extents } => extents,
            _ => return,
        },
        Message::OpReply(OpReply::Data { extents }) => extents,
        Message::Peer(peer) => match &peer.body {
            PeerBody::SubWrite { write: SubWriteKind::Write { extents }, .. } => extents,
            PeerBody::PullReply { piece: Ok(piece), .. } | PeerBody::Push { piece: Some(piece), .. } => {
                &piece.extents
            }
            _ => return,
        },
        _ => return,
    };
    judge(&Content { extents: extents.clone(), data: frame.data.clone() });
}

fn judge(content: &Content) {
    if content.validate(true).is_ok() {
        let blocks = content.data_blocks().count();
        assert!(blocks <= content.block_count() as usize);
    }
}

fn header(meta: &[u8]) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..4].copy_from_slice(b"GBF1");
    out[4] = PROTOCOL_VERSION;
    out[16..20].copy_from_slice(&(meta.len() as u32).to_le_bytes());
    out[24..28].copy_from_slice(&crc32fast::hash(meta).to_le_bytes());
    let crc = crc32fast::hash(&out[..28]);
    out[28..].copy_from_slice(&crc.to_le_bytes());
    out
}
