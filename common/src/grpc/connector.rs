//! How a gRPC client connects.
//!
//! With TLS 1.3 a client is done with its handshake before the server has looked at its certificate. A
//! gRPC server speaks first (its SETTINGS), so the connector waits for that: a connection that it hands
//! over has been accepted, and a refusal becomes one sentence instead of a call that breaks.

use crate::tls::{Protocol, Refusal, Role, Security, TlsStream};
use http::Uri;
use hyper_util::rt::TokioIo;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::Status;
use tower::Service;

/// Once there is a connection, handshake and the server's first bytes have to come within this.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Of the server's first bytes, so many are read ahead.
const FIRST_BYTES: usize = 64;
/// A TLS record with an alert begins so.
const ALERT: [u8; 2] = [0x15, 0x03];

/// Connects to one daemon of one role; for `Endpoint::connect_with_connector_lazy`.
#[derive(Clone)]
pub struct Connector {
    addr: SocketAddr,
    security: Security,
    want: Role,
    /// Of TCP alone.
    connect_timeout: Duration,
}

/// What a client does when it hears nothing: see [`Connector::new`].
fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer")
}

impl Connector {
    /// To a daemon of role `want` at `addr`, given up when there is no connection after `connect_timeout`.
    /// The endpoint's own `connect_timeout` would cut handshakes short on a busy machine.
    pub fn new(addr: SocketAddr, security: Security, want: Role, connect_timeout: Duration) -> Connector {
        Connector { addr, security, want, connect_timeout }
    }

    async fn connect(self) -> io::Result<TokioIo<Stream>> {
        let connecting = TcpStream::connect(self.addr);
        let tcp = tokio::time::timeout(self.connect_timeout, connecting).await.map_err(|_| late())??;
        tcp.set_nodelay(true)?;
        if !self.security.is_tls() {
            return Ok(TokioIo::new(Stream::Plain { tcp, fresh: true }));
        }
        let connected = async {
            let tls = self.security.connect(tcp, Protocol::Grpc, self.want).await;
            let mut tls = tls.expect("TLS is on")?;
            let mut first = [0; FIRST_BYTES];
            match tls.read(&mut first).await {
                Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, Refusal::HungUp)),
                Ok(count) => Ok(Stream::Tls { tls: Box::new(tls), first, taken: 0, count }),
                Err(error) => Err(match Refusal::of_handshake(&error) {
                    Some(refusal) => io::Error::new(error.kind(), refusal),
                    None => error,
                }),
            }
        };
        tokio::time::timeout(HANDSHAKE_TIMEOUT, connected).await.map_err(|_| late())?.map(TokioIo::new)
    }
}

/// The status with what is the matter with TLS in place of what that looks like to HTTP/2.
pub fn explained(status: Status) -> Status {
    let mut source = std::error::Error::source(&status);
    while let Some(error) = source {
        let text = error.to_string();
        if text.starts_with(Refusal::PREFIX) {
            return Status::unavailable(text);
        }
        source = error.source();
    }
    status
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<Stream>>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

/// A client's connection.
pub enum Stream {
    /// `fresh` until something was read: an alert in the first place means that TLS is wanted.
    Plain { tcp: TcpStream, fresh: bool },
    /// `first[taken..count]` was read ahead.
    Tls { tls: Box<TlsStream>, first: [u8; FIRST_BYTES], taken: usize, count: usize },
}

/// A server that wants TLS says so and hangs up on the first bytes. HTTP/2 reports a failed write before it has
/// read that, so the failure is left to the read that comes next: on a broken connection it fails as well.
fn plain_write(result: Poll<io::Result<usize>>, fresh: bool, len: usize) -> Poll<io::Result<usize>> {
    match result {
        Poll::Ready(Err(_)) if fresh => Poll::Ready(Ok(len)),
        other => other,
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain { tcp, fresh } => {
                let before = buf.filled().len();
                ready!(Pin::new(tcp).poll_read(cx, buf))?;
                if std::mem::take(fresh) && buf.filled()[before..].starts_with(&ALERT) {
                    return Poll::Ready(Err(Refusal::WantsTls.into_io()));
                }
                Poll::Ready(Ok(()))
            }
            Stream::Tls { tls, first, taken, count } => {
                if *taken == *count {
                    return Pin::new(tls).poll_read(cx, buf);
                }
                let now = buf.remaining().min(*count - *taken);
                buf.put_slice(&first[*taken..*taken + now]);
                *taken += now;
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain { tcp, fresh } => plain_write(Pin::new(tcp).poll_write(cx, buf), *fresh, buf.len()),
            Stream::Tls { tls, .. } => Pin::new(tls).poll_write(cx, buf),
        }
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain { tcp, fresh } => {
                let len = bufs.iter().map(|b| b.len()).sum();
                plain_write(Pin::new(tcp).poll_write_vectored(cx, bufs), *fresh, len)
            }
            Stream::Tls { tls, .. } => Pin::new(tls).poll_write_vectored(cx, bufs),
        }
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain { tcp, .. } => Pin::new(tcp).poll_flush(cx),
            Stream::Tls { tls, .. } => Pin::new(tls).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain { tcp, .. } => Pin::new(tcp).poll_shutdown(cx),
            Stream::Tls { tls, .. } => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
