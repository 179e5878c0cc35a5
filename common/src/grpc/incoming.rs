//! What a gRPC server listens on: accepts, shakes hands beside the others, and hands on what is good.
//!
//! ```text
//!  listener ──▶ accept ──▶ a task each: handshake, at most HANDSHAKE_TIMEOUT ──▶ queue ──▶ server
//!               waits while CONNECTIONS_MAX are open
//! ```
//!
//! So one that connects and says nothing holds up nobody else.

use crate::tls::{Identity, Protocol, Refusal, Security, TlsStream};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::warn;

/// Connections that may be open at once, those that still shake hands among them.
const CONNECTIONS_MAX: usize = 4096;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that wait for the server to take them.
const QUEUE: usize = 16;
/// Descriptors are short, most likely: let some close.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Who is on the other side; in the extensions of every request.
#[derive(Clone, Debug)]
pub struct Peer {
    pub addr: SocketAddr,
    /// `None`: this server is plain and knows nobody.
    pub identity: Option<Identity>,
}

/// A stream of connections for `serve_with_incoming`. Stops to listen when dropped.
pub struct Incoming {
    addr: SocketAddr,
    ready: ReceiverStream<io::Result<ServerStream>>,
}

impl Incoming {
    /// Takes over `listener`. Needs a runtime.
    pub fn new(listener: TcpListener, security: Security) -> io::Result<Incoming> {
        let addr = listener.local_addr()?;
        let (queue, ready) = mpsc::channel(QUEUE);
        tokio::spawn(accept(listener, security, queue));
        Ok(Incoming { addr, ready: ReceiverStream::new(ready) })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Stream for Incoming {
    type Item = io::Result<ServerStream>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.ready).poll_next(cx)
    }
}

async fn accept(listener: TcpListener, security: Security, queue: mpsc::Sender<io::Result<ServerStream>>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let next = async {
            let slot = slots.clone().acquire_owned().await.expect("never closed");
            (listener.accept().await, slot)
        };
        let (accepted, slot) = tokio::select! {
            next = next => next,
            () = queue.closed() => return,
        };
        let (tcp, addr) = match accepted {
            Ok(x) => x,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (security, queue) = (security.clone(), queue.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, shake_hands(tcp, addr, &security, slot)).await {
                // A server that has stopped takes no more.
                Ok(Ok(stream)) => drop(queue.send(Ok(stream)).await),
                Ok(Err(error)) => match Refusal::of_handshake(&error) {
                    Some(refusal) => warn!(from = %addr, %refusal, "connection refused"),
                    None => tracing::debug!(from = %addr, %error, "connection ended"),
                },
                Err(_) => warn!(from = %addr, refusal = %Refusal::TimedOut, "connection refused"),
            }
        });
    }
}

async fn shake_hands(
    tcp: TcpStream,
    addr: SocketAddr,
    security: &Security,
    slot: OwnedSemaphorePermit,
) -> io::Result<ServerStream> {
    tcp.set_nodelay(true)?;
    if !security.is_tls() {
        return Ok(ServerStream { io: Io::Plain(tcp), peer: Peer { addr, identity: None }, _slot: slot });
    }
    let (tls, identity) = security.accept(tcp, Protocol::Grpc).await.expect("TLS is on")?;
    let peer = Peer { addr, identity: Some(identity) };
    Ok(ServerStream { io: Io::Tls(Box::new(tls)), peer, _slot: slot })
}

/// A server's connection.
pub struct ServerStream {
    io: Io,
    peer: Peer,
    _slot: OwnedSemaphorePermit,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream>),
}

impl Connected for ServerStream {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for ServerStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Io::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Io::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Io::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bufs),
        }
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Io::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Io::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
