//! The data-path frame: a fixed little-endian header with its own CRC, metadata, bulk data.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `GBF1` |
//! | 4 | 1 | protocol version |
//! | 5 | 3 | reserved, zero |
//! | 8 | 8 | request id: chosen by the asker, echoed in the answer |
//! | 16 | 4 | metadata bytes |
//! | 20 | 4 | data bytes |
//! | 24 | 4 | CRC32 of the metadata |
//! | 28 | 4 | CRC32 of header bytes 0 to 28 |
//!
//! Bulk data carries a CRC per block inside the metadata (see [`crate::blocks`]), so the frame adds
//! none of its own. Every length is checked against `limits` before a byte is allocated.

use crate::limits::{FRAME_DATA_BYTES_MAX, FRAME_META_BYTES_MAX};
use crate::msg::{Message, PROTOCOL_VERSION};
use bytes::{Buf, Bytes, BytesMut};

/// Size of the fixed header.
pub const HEADER_BYTES: usize = 32;
const MAGIC: [u8; 4] = *b"GBF1";

/// One message with its bulk data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub request: u64,
    pub message: Message,
    pub data: Bytes,
}

/// Why bytes are not a frame. The connection is closed: framing cannot be found again.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("not a Gabion data-path connection (bad magic {0:02x?})")]
    Magic([u8; 4]),
    #[error("header checksum mismatch")]
    HeaderCrc,
    #[error("protocol version {got} is not spoken here (this is version {PROTOCOL_VERSION})")]
    Version { got: u8 },
    #[error("reserved header bytes are set")]
    Reserved,
    #[error("{part} of {got} bytes is over the limit of {limit}")]
    TooLong { part: &'static str, got: u32, limit: u32 },
    #[error("metadata checksum mismatch")]
    MetaCrc,
    #[error("metadata does not decode: {0}")]
    Meta(String),
}

/// A decoded and validated header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub request: u64,
    pub meta_bytes: u32,
    pub data_bytes: u32,
    meta_crc: u32,
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

impl Header {
    /// Validates a header; nothing has been allocated for its lengths yet.
    pub fn decode(b: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        if b[..4] != MAGIC {
            return Err(FrameError::Magic([b[0], b[1], b[2], b[3]]));
        }
        if crc32fast::hash(&b[..28]) != u32_at(b, 28) {
            return Err(FrameError::HeaderCrc);
        }
        if b[4] != PROTOCOL_VERSION {
            return Err(FrameError::Version { got: b[4] });
        }
        if b[5..8] != [0; 3] {
            return Err(FrameError::Reserved);
        }
        let (meta_bytes, data_bytes) = (u32_at(b, 16), u32_at(b, 20));
        if meta_bytes > FRAME_META_BYTES_MAX {
            return Err(FrameError::TooLong {
                part: "metadata",
                got: meta_bytes,
                limit: FRAME_META_BYTES_MAX,
            });
        }
        if data_bytes > FRAME_DATA_BYTES_MAX {
            return Err(FrameError::TooLong { part: "data", got: data_bytes, limit: FRAME_DATA_BYTES_MAX });
        }
        let request = u64::from_le_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]);
        Ok(Header { request, meta_bytes, data_bytes, meta_crc: u32_at(b, 24) })
    }

    /// Decodes the metadata that followed this header.
    pub fn decode_meta(&self, meta: &[u8]) -> Result<Message, FrameError> {
        if crc32fast::hash(meta) != self.meta_crc {
            return Err(FrameError::MetaCrc);
        }
        let (message, rest) = postcard::take_from_bytes(meta).map_err(|e| FrameError::Meta(e.to_string()))?;
        if !rest.is_empty() {
            return Err(FrameError::Meta(format!("{} bytes left over", rest.len())));
        }
        Ok(message)
    }
}

impl Frame {
    /// A frame without bulk data.
    pub fn new(request: u64, message: Message) -> Frame {
        Frame { request, message, data: Bytes::new() }
    }

    /// Header and metadata; the caller sends `self.data` after them, uncopied.
    pub fn encode_head(&self) -> Result<Bytes, FrameError> {
        let mut out = vec![0u8; HEADER_BYTES];
        out = postcard::to_extend(&self.message, out).map_err(|e| FrameError::Meta(e.to_string()))?;
        let too_long = |part, got: usize, limit| FrameError::TooLong {
            part,
            got: u32::try_from(got).unwrap_or(u32::MAX),
            limit,
        };
        let meta_bytes = out.len() - HEADER_BYTES;
        if meta_bytes > FRAME_META_BYTES_MAX as usize {
            return Err(too_long("metadata", meta_bytes, FRAME_META_BYTES_MAX));
        }
        if self.data.len() > FRAME_DATA_BYTES_MAX as usize {
            return Err(too_long("data", self.data.len(), FRAME_DATA_BYTES_MAX));
        }
        let meta_crc = crc32fast::hash(&out[HEADER_BYTES..]);
        out[..4].copy_from_slice(&MAGIC);
        out[4] = PROTOCOL_VERSION;
        out[8..16].copy_from_slice(&self.request.to_le_bytes());
        out[16..20].copy_from_slice(&(meta_bytes as u32).to_le_bytes());
        out[20..24].copy_from_slice(&(self.data.len() as u32).to_le_bytes());
        out[24..28].copy_from_slice(&meta_crc.to_le_bytes());
        let crc = crc32fast::hash(&out[..28]);
        out[28..32].copy_from_slice(&crc.to_le_bytes());
        Ok(out.into())
    }

    /// Takes header and metadata off the front of `buf` if they are all there, and the frame has at least `data_bytes_min` of
    /// data that are not: how much data is to follow, and the frame without it.
    pub fn decode_head(
        buf: &mut BytesMut,
        data_bytes_min: usize,
    ) -> Result<Option<(Frame, usize)>, FrameError> {
        let Some(head) = buf.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(head)?;
        let (meta, data) = (header.meta_bytes as usize, header.data_bytes as usize);
        let before = HEADER_BYTES + meta;
        if data < data_bytes_min || buf.len() < before || buf.len() >= before + data {
            return Ok(None);
        }
        let message = header.decode_meta(&buf[HEADER_BYTES..before])?;
        buf.advance(before);
        Ok(Some((Frame { request: header.request, message, data: Bytes::new() }, data)))
    }

    /// Takes one whole frame off the front of `buf`; `None` when more bytes are needed.
    pub fn decode(buf: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        let Some(head) = buf.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(head)?;
        let (meta, data) = (header.meta_bytes as usize, header.data_bytes as usize);
        let total = HEADER_BYTES + meta + data;
        if buf.len() < total {
            return Ok(None);
        }
        let message = header.decode_meta(&buf[HEADER_BYTES..HEADER_BYTES + meta])?;
        let mut frame = buf.split_to(total);
        frame.advance(HEADER_BYTES + meta);
        Ok(Some(Frame { request: header.request, message, data: frame.freeze() }))
    }
}
