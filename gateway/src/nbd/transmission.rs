//! The transmission phase: requests come in, many run at a time, answers leave in any order.
//!
//! The reader stops reading while the connection has [`REQUESTS_MAX`] requests or
//! [`PAYLOAD_BYTES_MAX`] bytes in flight; a permit is given back when the answer has been written. A
//! client that leaves does not stop its writes: they run to their end in the volume.
//!
//! Requests that had to wait in the socket for such a permit are a danger: their client may have given
//! them up meanwhile and made them again on another connection, and written something newer since. So
//! who waits for permits also waits for the client to leave, and after such a wait nothing is begun
//! whose client has left. A client that has only nothing more to send looks the same: what it sent
//! behind such a wait is not answered.

use super::connection::{Connection, Incoming};
use super::limits::*;
use super::wire::*;
use super::{Export, NbdError};
use crate::volume::{Volume, VolumeError};
use bytes::{BufMut, Bytes, BytesMut};
use gabion_common::net::write_parts;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, BufReader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

const UNIT_BYTES: usize = 4096;
const READ_AHEAD_BYTES: usize = 64 << 10;
const BATCH_REPLIES: usize = 64;

struct Reply {
    cookie: u64,
    result: Result<Bytes, u32>,
    _permits: Permits,
}

type Permits = (OwnedSemaphorePermit, OwnedSemaphorePermit);

/// Serves until the client leaves; every request that came is answered or the connection is broken.
pub async fn serve<S: Connection>(stream: S, export: Arc<Export>) -> Result<(), NbdError> {
    let (read, write) = stream.halves();
    let (replies, queue) = mpsc::channel(REQUESTS_MAX);
    let mut writer = tokio::spawn(answer(write, queue));
    let mut running = JoinSet::new();
    let mut reader = BufReader::with_capacity(READ_AHEAD_BYTES, read);
    let end = tokio::select! {
        r = requests(&mut reader, &export, &replies, &mut running) => r,
        // The client does not take its answers any more.
        r = &mut writer => return flatten(r),
        () = export.closing.cancelled() => Ok(()),
    };
    // Writes that have begun run to their end in the volume, whoever waits for them.
    let ended = async { while running.join_next().await.is_some() {} };
    if tokio::time::timeout(LEFT_BEHIND, ended).await.is_err() {
        running.shutdown().await;
    }
    drop(replies);
    // A client that does not take its answers must not keep a closing export.
    let patience = async {
        export.closing.cancelled().await;
        tokio::time::sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        r = &mut writer => end.and(flatten(r)),
        () = patience => {
            writer.abort();
            end
        }
    }
}

fn flatten(r: Result<Result<(), NbdError>, tokio::task::JoinError>) -> Result<(), NbdError> {
    r.unwrap_or_else(|e| Err(NbdError::Protocol(format!("the writer failed: {e}"))))
}

/// What one connection may have in flight.
struct Room {
    slots: Arc<Semaphore>,
    payload: Arc<Semaphore>,
}

impl Room {
    fn new() -> Room {
        let payload = Arc::new(Semaphore::new(PAYLOAD_BYTES_MAX / UNIT_BYTES));
        Room { slots: Arc::new(Semaphore::new(REQUESTS_MAX)), payload }
    }

    fn now(&self, units: u32) -> Option<Permits> {
        let slot = self.slots.clone().try_acquire_owned().ok()?;
        Some((slot, self.payload.clone().try_acquire_many_owned(units).ok()?))
    }

    async fn wait(&self, units: u32) -> Permits {
        let slot = self.slots.clone().acquire_owned().await.expect("never closed");
        (slot, self.payload.clone().acquire_many_owned(units).await.expect("never closed"))
    }
}

async fn requests<R: Incoming>(
    reader: &mut BufReader<R>,
    export: &Arc<Export>,
    replies: &mpsc::Sender<Reply>,
    running: &mut JoinSet<()>,
) -> Result<(), NbdError> {
    let room = Room::new();
    // Whether what is read now may have lain unread for long.
    let mut has_waited = false;
    loop {
        // Leaves nothing behind of those that have ended.
        while running.try_join_next().is_some() {}
        let mut head = [0u8; REQUEST_BYTES];
        // A client that closes without DISC between requests is impolite, not wrong.
        head[0] = match reader.read_u8().await {
            Ok(b) => b,
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        reader.read_exact(&mut head[1..]).await?;
        let request = Request::decode(&head)
            .ok_or_else(|| NbdError::Protocol(format!("bad request magic {:02x?}", &head[..4])))?;
        if request.command == command::DISC {
            return Ok(());
        }
        let carries = request.command == command::WRITE;
        if carries && request.len > REQUEST_BYTES_MAX {
            return Err(NbdError::Protocol(format!("a write of {} bytes", request.len)));
        }
        let moves = carries || (request.command == command::READ && request.len <= REQUEST_BYTES_MAX);
        let units = if moves { (request.len as usize).div_ceil(UNIT_BYTES) as u32 } else { 0 };
        let permits = match room.now(units) {
            Some(permits) => permits,
            None => {
                has_waited = true;
                tokio::select! {
                    biased;
                    () = reader.get_ref().left() => return Ok(()),
                    permits = room.wait(units) => permits,
                }
            }
        };
        let data = if carries { read_payload(reader, request.len as usize).await? } else { Bytes::new() };
        if has_waited && reader.get_ref().has_left() {
            return Ok(());
        }
        let (export, replies) = (export.clone(), replies.clone());
        running.spawn(async move {
            let result = perform(&export, request, data).await;
            // The writer is gone when the client is.
            let _ = replies.send(Reply { cookie: request.cookie, result, _permits: permits }).await;
        });
    }
}

async fn read_payload<R: AsyncRead + Unpin>(
    reader: &mut BufReader<R>,
    len: usize,
) -> Result<Bytes, NbdError> {
    let mut data = BytesMut::with_capacity(len);
    let mut limited = reader.take(len as u64);
    while data.len() < len {
        if limited.read_buf(&mut data).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok(data.freeze())
}

/// Runs one request; an error is its number in the protocol.
async fn perform(export: &Export, r: Request, data: Bytes) -> Result<Bytes, u32> {
    let (volume, len) = (&export.volume, u64::from(r.len));
    let allowed = match r.command {
        command::WRITE_ZEROES => command::FLAG_FUA | command::FLAG_NO_HOLE,
        _ => command::FLAG_FUA,
    };
    if r.flags & !allowed != 0 {
        return Err(errno::EINVAL);
    }
    let changes = matches!(r.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if changes && export.read_only {
        return Err(errno::EPERM);
    }
    // Every write is durable when it is answered: FUA asks for nothing more.
    let done = match r.command {
        command::READ if r.len > REQUEST_BYTES_MAX => return Err(errno::EINVAL),
        command::READ => return volume.read(r.offset, r.len).await.map_err(|e| number(volume, r.command, e)),
        command::WRITE => volume.write(r.offset, data).await,
        command::FLUSH => volume.flush().await,
        command::TRIM => volume.trim(r.offset, len).await,
        command::WRITE_ZEROES => {
            let may_unmap = r.flags & command::FLAG_NO_HOLE == 0;
            volume.write_zeroes(r.offset, len, may_unmap).await
        }
        _ => return Err(errno::EINVAL),
    };
    done.map(|()| Bytes::new()).map_err(|e| number(volume, r.command, e))
}

fn number(volume: &Volume, command: u16, error: VolumeError) -> u32 {
    match error {
        VolumeError::OutOfRange { .. } if matches!(command, command::READ | command::TRIM) => errno::EINVAL,
        VolumeError::OutOfRange { .. } | VolumeError::NoSpace => errno::ENOSPC,
        error => {
            tracing::debug!(volume = volume.name(), command, %error, "a request failed");
            errno::EIO
        }
    }
}

async fn answer<W: AsyncWrite + Unpin>(
    mut stream: W,
    mut queue: mpsc::Receiver<Reply>,
) -> Result<(), NbdError> {
    let mut batch = Vec::with_capacity(BATCH_REPLIES);
    let mut parts = VecDeque::with_capacity(BATCH_REPLIES * 2);
    while queue.recv_many(&mut batch, BATCH_REPLIES).await > 0 {
        let mut heads = BytesMut::with_capacity(batch.len() * 16);
        for reply in &batch {
            heads.put_u32(SIMPLE_REPLY_MAGIC);
            heads.put_u32(reply.result.as_ref().err().copied().unwrap_or(errno::OK));
            heads.put_u64(reply.cookie);
            // Heads of answers without data run together.
            if let Ok(data) = &reply.result
                && !data.is_empty()
            {
                parts.push_back(heads.split().freeze());
                parts.push_back(data.clone());
            }
        }
        if !heads.is_empty() {
            parts.push_back(heads.freeze());
        }
        write_parts(&mut stream, &mut parts).await?;
        batch.clear();
    }
    use tokio::io::AsyncWriteExt;
    // The other side may have closed already.
    let _ = stream.shutdown().await;
    Ok(())
}
