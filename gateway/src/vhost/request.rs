//! Turns a descriptor chain into a request: bounds are checked here, and a write's data is copied out of guest memory,
//! once (rule C5). After this the guest may scribble over its buffers as it likes.

use bytes::{Bytes, BytesMut};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Address, Bytes as _, GuestAddress, GuestMemoryMmap};

use super::chain::{self, Chain, ChainError, Segment, le_u32, le_u64};
use super::config::SECTOR_BYTES;
use super::limits::{RANGE_SECTORS_MAX, RANGES_MAX, REQUEST_BYTES_MAX};

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
const UNMAP: u32 = 1;

pub const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
pub const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    pub size_bytes: u64,
    pub read_only: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Range {
    pub offset: u64,
    pub len: u64,
    pub may_unmap: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Op {
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        offset: u64,
        data: Bytes,
    },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    GetId,
    /// Answered with this status and no I/O.
    Reject(u8),
}

#[derive(Debug)]
pub struct Request {
    pub head: u16,
    pub op: Op,
    /// Where data goes, without the status byte.
    pub into: Vec<Segment>,
    pub into_bytes: u64,
    /// Absent where the chain has no place for a status.
    pub status_at: Option<GuestAddress>,
    /// Why the chain itself is malformed, for the log.
    pub fault: Option<ChainError>,
}

impl Request {
    /// Payload that this request keeps in the gateway's memory.
    pub fn held_bytes(&self) -> u64 {
        match &self.op {
            Op::Read { len, .. } => u64::from(*len),
            Op::Write { data, .. } => data.len() as u64,
            _ => 0,
        }
    }

    pub fn parse(
        mem: &GuestMemoryMmap,
        table: GuestAddress,
        entries: u16,
        head: u16,
        geometry: Geometry,
    ) -> Request {
        let mut found = Chain::default();
        let fault = chain::walk(mem, table, entries, head, &mut found).err();
        let Chain { mut readable, mut writable, readable_bytes, mut writable_bytes } = found;
        let status_at = take_status(&mut writable, &mut writable_bytes);
        let op = if fault.is_some() || status_at.is_none() {
            Op::Reject(IOERR)
        } else {
            operation(mem, &mut readable, readable_bytes, writable_bytes, geometry).unwrap_or_else(Op::Reject)
        };
        Request { head, op, into: writable, into_bytes: writable_bytes, status_at, fault }
    }
}

/// The status is the last device-writable byte, however the chain is cut (virtio 1.2 section 2.7.4).
fn take_status(writable: &mut Vec<Segment>, bytes: &mut u64) -> Option<GuestAddress> {
    let last = writable.last_mut()?;
    last.len -= 1;
    *bytes -= 1;
    let at = last.at.checked_add(u64::from(last.len))?;
    if last.len == 0 {
        writable.pop();
    }
    Some(at)
}

fn operation(
    mem: &GuestMemoryMmap,
    readable: &mut Vec<Segment>,
    readable_bytes: u64,
    writable_bytes: u64,
    geometry: Geometry,
) -> Result<Op, u8> {
    let payload = readable_bytes.checked_sub(HEADER_BYTES).ok_or(IOERR)?;
    if payload > REQUEST_BYTES_MAX || writable_bytes > REQUEST_BYTES_MAX {
        return Err(IOERR);
    }
    let header = copy_out(mem, readable, HEADER_BYTES)?;
    let (kind, sector) = (le_u32(&header[0..4]), le_u64(&header[8..16]));
    match kind {
        VIRTIO_BLK_T_IN => {
            let (offset, len) = extent(sector, writable_bytes, geometry)?;
            Ok(Op::Read { offset, len: len as u32 })
        }
        VIRTIO_BLK_T_OUT => {
            let (offset, _) = extent(sector, payload, writable(geometry)?)?;
            Ok(Op::Write { offset, data: copy_out(mem, readable, payload)? })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Op::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Op::GetId),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let geometry = writable(geometry)?;
            let count = payload / RANGE_BYTES;
            if !payload.is_multiple_of(RANGE_BYTES) || count == 0 || count > u64::from(RANGES_MAX) {
                return Err(IOERR);
            }
            let raw = copy_out(mem, readable, payload)?;
            let zeroes = kind == VIRTIO_BLK_T_WRITE_ZEROES;
            let ranges: Result<Vec<_>, u8> =
                raw.chunks_exact(RANGE_BYTES as usize).map(|raw| range(raw, zeroes, geometry)).collect();
            if zeroes { Ok(Op::WriteZeroes(ranges?)) } else { Ok(Op::Discard(ranges?)) }
        }
        _ => Err(UNSUPP),
    }
}

fn writable(geometry: Geometry) -> Result<Geometry, u8> {
    if geometry.read_only { Err(IOERR) } else { Ok(geometry) }
}

fn extent(sector: u64, len: u64, geometry: Geometry) -> Result<(u64, u64), u8> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(IOERR)?;
    let end = offset.checked_add(len).ok_or(IOERR)?;
    if len == 0 || !len.is_multiple_of(SECTOR_BYTES) || end > geometry.size_bytes {
        return Err(IOERR);
    }
    Ok((offset, len))
}

fn range(raw: &[u8], zeroes: bool, geometry: Geometry) -> Result<Range, u8> {
    let (sector, sectors, flags) = (le_u64(&raw[0..8]), le_u32(&raw[8..12]), le_u32(&raw[12..16]));
    let known = if zeroes { UNMAP } else { 0 };
    if flags & !known != 0 {
        return Err(UNSUPP);
    }
    if sectors > RANGE_SECTORS_MAX {
        return Err(IOERR);
    }
    let (offset, len) = extent(sector, u64::from(sectors) * SECTOR_BYTES, geometry)?;
    Ok(Range { offset, len, may_unmap: flags & UNMAP != 0 })
}

/// Takes the first `len` bytes off `from`, copied in one pass; the caller has checked that they are there.
fn copy_out(mem: &GuestMemoryMmap, from: &mut Vec<Segment>, len: u64) -> Result<Bytes, u8> {
    let mut out = BytesMut::zeroed(usize::try_from(len).map_err(|_| IOERR)?);
    let (mut done, mut used) = (0usize, 0usize);
    for segment in from.iter_mut() {
        if done == out.len() {
            break;
        }
        let take = (segment.len as usize).min(out.len() - done);
        mem.read_slice(&mut out[done..done + take], segment.at).map_err(|_| IOERR)?;
        done += take;
        segment.at = GuestAddress(segment.at.raw_value() + take as u64);
        segment.len -= take as u32;
        if segment.len == 0 {
            used += 1;
        }
    }
    if done != out.len() {
        return Err(IOERR);
    }
    from.drain(..used);
    Ok(out.freeze())
}
