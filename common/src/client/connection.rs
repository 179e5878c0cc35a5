//! One connection to one run of one OSD: requests go out as they come, answers come in any order.
//!
//! When the connection ends, for whatever reason, both halves of the socket are closed first and
//! then every request without an answer fails as lost.

use crate::net::{self, FrameReader, NetError, ReadHalf};
use crate::tls::Security;
use bytes::Bytes;
use gabion_proto::frame::Frame;
use gabion_proto::limits::{CONN_BYTES_MAX, CONN_OPS_MAX};
use gabion_proto::msg::{ClientOp, Hello, Message, OpReply};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// The connection ended before the answer came: the request may or may not have had its effect.
#[derive(Debug, thiserror::Error)]
#[error("the connection to the OSD is lost")]
pub struct Lost;

/// Bytes are counted in units of this, at least one per request.
const UNIT_BYTES: usize = 4096;

struct Pending {
    answer: oneshot::Sender<(OpReply, Bytes)>,
    /// Given back with the answer, whether or not anybody waits for it.
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

struct Shared {
    /// `None` once the connection has ended. Held for one insertion or removal.
    pending: Mutex<Option<HashMap<u64, Pending>>>,
    ended: CancellationToken,
}

/// Cheap to share; ends when [`close`](Connection::close) is called or the other side leaves.
pub struct Connection {
    shared: Arc<Shared>,
    frames: mpsc::Sender<Frame>,
    next: AtomicU64,
    ops: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Connection {
    pub async fn open(addr: &str, hello: &Hello, security: &Security) -> Result<Arc<Connection>, NetError> {
        let framed = net::connect(addr, hello, security).await?;
        let (frames, queue) = mpsc::channel(CONN_OPS_MAX);
        let shared =
            Arc::new(Shared { pending: Mutex::new(Some(HashMap::new())), ended: CancellationToken::new() });
        let stop = CancellationToken::new();
        let (mut reader, mut writer) = (framed.reader, framed.writer);
        let (run, stopped, peer) = (shared.clone(), stop.clone(), addr.to_owned());
        tokio::spawn(async move {
            let end = tokio::select! {
                r = receive(&mut reader, &run) => r,
                r = writer.run(queue) => r,
                () = stopped.cancelled() => Ok(()),
            };
            // Closes the socket before anybody may send again elsewhere.
            drop((reader, writer));
            match end {
                Ok(()) | Err(NetError::Io(_) | NetError::Truncated) => {
                    tracing::debug!(peer, "OSD connection ended");
                }
                Err(error) => tracing::warn!(peer, %error, "OSD connection closed"),
            }
            let lost = run.pending.lock().take();
            run.ended.cancel();
            drop(lost);
        });
        Ok(Arc::new(Connection {
            shared,
            frames,
            next: AtomicU64::new(1),
            ops: Arc::new(Semaphore::new(CONN_OPS_MAX)),
            bytes: Arc::new(Semaphore::new(CONN_BYTES_MAX / UNIT_BYTES)),
            stop,
        }))
    }

    pub fn is_ended(&self) -> bool {
        self.shared.ended.is_cancelled()
    }

    /// Closes the socket and fails what has no answer; returns when both have happened.
    pub async fn close(&self) {
        self.stop.cancel();
        self.shared.ended.cancelled().await;
    }

    /// Starts to close; see [`close`](Connection::close).
    pub fn abandon(&self) {
        self.stop.cancel();
    }

    /// Sends one operation and waits for its answer. `answer_bytes` is how much a read may bring.
    pub async fn call(
        &self,
        op: ClientOp,
        data: Bytes,
        answer_bytes: usize,
    ) -> Result<(OpReply, Bytes), Lost> {
        let units = (data.len().max(answer_bytes).div_ceil(UNIT_BYTES)).max(1) as u32;
        let permits = async {
            let op = self.ops.clone().acquire_owned().await.expect("never closed");
            (op, self.bytes.clone().acquire_many_owned(units).await.expect("never closed"))
        };
        let permits = tokio::select! {
            p = permits => p,
            () = self.shared.ended.cancelled() => return Err(Lost),
        };
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        match &mut *self.shared.pending.lock() {
            Some(pending) => pending.insert(request, Pending { answer, _permits: permits }),
            None => return Err(Lost),
        };
        // The queue holds as many frames as there are operation permits, so there is room; a closed
        // one means that the connection ends, and then `answered` says so.
        let _ = self.frames.try_send(Frame { request, message: Message::Op(op), data });
        answered.await.map_err(|_| Lost)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn receive(reader: &mut FrameReader<ReadHalf>, shared: &Shared) -> Result<(), NetError> {
    while let Some(frame) = reader.next().await? {
        let Message::OpReply(reply) = frame.message else {
            return Err(NetError::Unexpected("anything but an answer"));
        };
        let pending = shared.pending.lock().as_mut().and_then(|p| p.remove(&frame.request));
        match pending {
            // Nobody waits any more when the caller left.
            Some(p) => drop(p.answer.send((reply, frame.data))),
            None => return Err(NetError::Unexpected("an answer to nothing that was asked")),
        }
    }
    Ok(())
}
