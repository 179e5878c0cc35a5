//! Accepted connections: clients' operations and other OSDs' messages.
//!
//! A client connection may have [`CONN_OPS_MAX`] operations and [`CONN_BYTES_MAX`] bytes in flight; beyond
//! that it is not read, and TCP tells the client.
//!
//! *A late twin* (rule C1): a client that loses its connection sends the unanswered operations again on
//! a new one. What the old connection still holds unread must not be executed after that, so a client's newer
//! connection supersedes its older ones: the owning task drops whatever an older one brings and closes it.
//! Connections are numbered in the order of their acceptance, and a client dials again only after it gave up the
//! old one; so a connection that says hello after a newer one did is the old one. Observers share the client
//! number 0, only read, and supersede nobody.

use super::run::Input;
use gabion_common::net::{self, FrameReader, FrameWriter, Framed, NetError, ReadHalf, WriteHalf};
use gabion_common::tls::Security;
use gabion_proto::frame::Frame;
use gabion_proto::ids::*;
use gabion_proto::limits::{BLOCK_BYTES, CONN_BYTES_MAX, CONN_OPS_MAX, OP_DATA_BYTES_MAX};
use gabion_proto::msg::{ClientOp, Hello, Message, OpKind, Role};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, debug, info_span, warn};

/// Connections that may be open at once.
const CONNECTIONS_MAX: usize = 4096;

/// Where the answer to one client operation goes; holds its share of the connection's limits.
pub struct Origin {
    pub client: ClientId,
    pub connection: u64,
    request: u64,
    answers: mpsc::Sender<(Frame, Permits)>,
    permits: Permits,
}

type Reader = FrameReader<ReadHalf>;
type Writer = FrameWriter<WriteHalf>;
type Permits = (OwnedSemaphorePermit, OwnedSemaphorePermit);

impl Origin {
    /// Queues the answer. Always has room: every queued answer holds one of the connection's
    /// operation permits. A closed connection needs no answer.
    pub fn answer(self, message: Message, data: bytes::Bytes) {
        let frame = Frame { request: self.request, message, data };
        if self.answers.try_send((frame, self.permits)).is_err() {
            debug!(connection = self.connection, "answer to a closed connection dropped");
        }
    }
}

/// Accepts until the process ends. `current` says who we are: it changes with every incarnation.
pub async fn accept(
    listener: TcpListener,
    (cluster, id, current, security): (ClusterId, OsdId, Arc<AtomicU64>, Security),
    inputs: mpsc::Sender<Input>,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut next = 0u64;
    loop {
        let slot = slots.clone().acquire_owned().await.expect("never closed");
        let (stream, from) = match listener.accept().await {
            Ok(x) => x,
            Err(error) => {
                // Out of descriptors, most likely: let some close.
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        next += 1;
        let connection = next;
        let hello = Hello {
            cluster,
            role: Role::Osd { id, incarnation: Incarnation(current.load(Ordering::Relaxed)) },
            refusal: None,
        };
        let (inputs, security) = (inputs.clone(), security.clone());
        let span = info_span!("connection", %from);
        tokio::spawn(
            async move {
                if let Err(error) = serve(stream, connection, hello, &security, &inputs).await {
                    report(from, &error);
                }
                let _ = inputs.send(Input::ConnectionClosed { connection }).await;
                drop(slot);
            }
            .instrument(span),
        );
    }
}

fn report(from: SocketAddr, error: &NetError) {
    match error {
        NetError::Io(e) => debug!(error = %e, "connection ended"),
        other => warn!(%from, error = %other, "connection closed"),
    }
}

async fn serve(
    stream: TcpStream,
    connection: u64,
    hello: Hello,
    security: &Security,
    inputs: &mpsc::Sender<Input>,
) -> Result<(), NetError> {
    let Framed { reader, writer, peer } = net::accept(stream, &hello, security).await?;
    match peer.role {
        Role::Osd { .. } => from_peer(reader, inputs).await,
        Role::Client { id } => {
            // Registered before its first operation is read, in the same queue.
            let superseded = CancellationToken::new();
            let input = Input::ClientConnected { client: id, connection, superseded: superseded.clone() };
            if inputs.send(input).await.is_err() {
                return Ok(());
            }
            tokio::select! {
                result = from_client(reader, writer, (id, connection), inputs) => result,
                () = superseded.cancelled() => {
                    debug!(client = %id, connection, "superseded by a newer connection");
                    Ok(())
                }
            }
        }
    }
}

async fn from_peer(mut reader: Reader, inputs: &mpsc::Sender<Input>) -> Result<(), NetError> {
    while let Some(frame) = reader.next().await? {
        let Message::Peer(msg) = frame.message else {
            return Err(NetError::Refused("an OSD sent something else than a peer message".into()));
        };
        if inputs.send(Input::Peer { msg, data: frame.data }).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Bytes that an operation or its answer holds in memory, whichever is more. An operation that asks for
/// more than the limit is refused and answers none.
fn weight(op: &ClientOp, data_bytes: usize) -> u32 {
    let answer_bytes = match op.kind {
        OpKind::Read { block_count, .. } => block_count.saturating_mul(BLOCK_BYTES).min(OP_DATA_BYTES_MAX),
        OpKind::Write { .. } | OpKind::Zero { .. } => 0,
    };
    u32::try_from(data_bytes).unwrap_or(u32::MAX).max(answer_bytes).max(1)
}

async fn from_client(
    mut reader: Reader,
    writer: Writer,
    (client, connection): (ClientId, u64),
    inputs: &mpsc::Sender<Input>,
) -> Result<(), NetError> {
    let ops = Arc::new(Semaphore::new(CONN_OPS_MAX));
    let bytes = Arc::new(Semaphore::new(CONN_BYTES_MAX));
    let (answers, queue) = mpsc::channel(CONN_OPS_MAX);
    let mut writing = AbortOnDropHandle::new(tokio::spawn(write_answers(writer, queue)));
    loop {
        let frame = tokio::select! {
            f = reader.next() => match f? { Some(f) => f, None => return Ok(()) },
            _ = &mut writing => return Ok(()),
        };
        let Message::Op(op) = frame.message else {
            return Err(NetError::Refused("a client sent something else than an operation".into()));
        };
        let op_permit = ops.clone().acquire_owned().await.expect("never closed");
        let weight = weight(&op, frame.data.len());
        let byte_permit = bytes.clone().acquire_many_owned(weight).await.expect("never closed");
        let origin = Origin {
            client,
            connection,
            request: frame.request,
            answers: answers.clone(),
            permits: (op_permit, byte_permit),
        };
        if inputs.send(Input::Client { origin, op, data: frame.data }).await.is_err() {
            return Ok(());
        }
    }
}

async fn write_answers(mut writer: Writer, mut queue: mpsc::Receiver<(Frame, Permits)>) {
    let mut batch = Vec::with_capacity(64);
    while queue.recv_many(&mut batch, 64).await > 0 {
        let (frames, permits): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
        if let Err(error) = writer.write(&frames).await {
            debug!(%error, "client connection lost");
            return;
        }
        drop(permits);
    }
}
