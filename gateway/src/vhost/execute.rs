//! Runs one request on the volume and writes its data and status into guest memory.

use std::fmt::Display;
use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;
use vm_memory::{Bytes as _, GuestMemoryMmap};

use super::chain::Segment;
use super::disk::Disk;
use super::request::{IOERR, Op, Request};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const ID_BYTES: usize = 20;

/// A finished request: what the used ring is told.
pub struct Done {
    pub head: u16,
    pub used_bytes: u32,
    pub held_bytes: u64,
}

/// `mem` is the memory as it was when the request was parsed: its mapping lives until the request ends.
pub async fn execute<D: Disk>(disk: Arc<D>, request: Request, mem: Arc<GuestMemoryMmap>) -> Done {
    let held_bytes = request.held_bytes();
    let Request { head, op, into, into_bytes, status_at, .. } = request;
    let (status, written) = perform(&*disk, op, &into, into_bytes, &mem).await;
    let used_bytes = match status_at {
        Some(at) if mem.write_slice(&[status], at).is_ok() => written + 1,
        _ => 0,
    };
    Done { head, used_bytes, held_bytes }
}

async fn perform<D: Disk>(
    disk: &D,
    op: Op,
    into: &[Segment],
    into_bytes: u64,
    mem: &GuestMemoryMmap,
) -> (u8, u32) {
    match op {
        Op::Read { offset, len } => match disk.read(offset, len).await {
            Ok(data) if data.len() == len as usize => scatter(mem, into, &data),
            Ok(data) => failed("read", offset, format_args!("{} bytes for {len}", data.len())),
            Err(error) => failed("read", offset, error),
        },
        Op::Write { offset, data } => match disk.write(offset, data).await {
            Ok(()) => (OK, 0),
            Err(error) => failed("write", offset, error),
        },
        Op::Flush => match disk.flush().await {
            Ok(()) => (OK, 0),
            Err(error) => failed("flush", 0, error),
        },
        Op::Discard(ranges) => {
            for range in ranges {
                if let Err(error) = disk.trim(range.offset, range.len).await {
                    return failed("discard", range.offset, error);
                }
            }
            (OK, 0)
        }
        Op::WriteZeroes(ranges) => {
            for range in ranges {
                if let Err(error) = disk.write_zeroes(range.offset, range.len, range.may_unmap).await {
                    return failed("write zeroes", range.offset, error);
                }
            }
            (OK, 0)
        }
        Op::GetId => {
            let mut id = [0u8; ID_BYTES];
            let serial = disk.serial();
            let len = serial.len().min(ID_BYTES);
            id[..len].copy_from_slice(&serial.as_bytes()[..len]);
            scatter(mem, into, &id[..ID_BYTES.min(into_bytes as usize)])
        }
        Op::Reject(status) => (status, 0),
    }
}

fn failed(what: &str, offset: u64, error: impl Display) -> (u8, u32) {
    // The volume below has logged what an operator must know; the guest sees an I/O error.
    tracing::debug!(what, offset, %error, "a guest's request failed");
    (IOERR, 0)
}

fn scatter(mem: &GuestMemoryMmap, into: &[Segment], data: &[u8]) -> (u8, u32) {
    let mut rest = data;
    for segment in into {
        let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
        if mem.write_slice(now, segment.at).is_err() {
            return (IOERR, 0);
        }
        rest = later;
    }
    if rest.is_empty() { (OK, data.len() as u32) } else { (IOERR, 0) }
}
