//! Framed data-path connections over TCP, plain or with TLS: hello exchange, reading and writing of frames.
//!
//! Every length is checked by `proto::frame` before a byte is allocated for it. A reader holds at
//! most one frame; a writer sends what it is given, many frames to one system call, bulk data
//! uncopied. Both are cancel-safe only where said.

mod halves;

use crate::tls::{Identity, Protocol, Refusal, Role as TlsRole, Security};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use gabion_proto::frame::{Frame, FrameError};
use gabion_proto::limits::BLOCK_BYTES;
use gabion_proto::msg::{Hello, Message, Role};
pub use halves::{ReadHalf, WriteHalf};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Read at once while frames are small.
const READ_BYTES: usize = 64 << 10;
/// Data of at least this size is read to memory of its own.
const LARGE_BYTES: usize = 32 << 10;
/// Frames gathered into one write.
const BATCH_FRAMES: usize = 64;
/// Parts of one vectored write.
const SLICES_MAX: usize = 128;
/// A TLS record with an alert begins so.
const ALERT: [u8; 2] = [0x15, 0x03];
/// Both sides must have said hello by then.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A side that is silent for longer is taken for gone.
const SILENCE_MAX: Duration = Duration::from_secs(15);

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    #[error("bytes that are no frame: {0}")]
    Frame(#[from] FrameError),
    #[error("the connection closed in the middle of a frame")]
    Truncated,
    #[error("the first frame was no hello")]
    NoHello,
    #[error("no hello in time")]
    HelloTimeout,
    #[error("the other side sent {0}")]
    Unexpected(&'static str),
    #[error("refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Tls(Refusal),
}

impl NetError {
    /// The same, with what is the matter with TLS in place of what that looks like.
    fn explained(self, security: &Security) -> NetError {
        match self {
            // A frame never begins like this, and an alert of TLS always does.
            NetError::Frame(FrameError::Magic(magic)) if !security.is_tls() && magic.starts_with(&ALERT) => {
                NetError::Tls(Refusal::WantsTls)
            }
            NetError::Io(error) => match Refusal::of(&error) {
                Some(refusal) => NetError::Tls(refusal),
                None => NetError::Io(error),
            },
            other => other,
        }
    }
}

/// A frame with much data, of which some has yet to come. The data lies at a multiple of its block size, so that an OSD can
/// write it to its disk from where it is.
struct Partial {
    frame: Frame,
    data: BytesMut,
    data_bytes: usize,
}

impl Partial {
    /// `buf` begins with data.
    fn begin(frame: Frame, data_bytes: usize, buf: &mut BytesMut) -> Partial {
        let align = BLOCK_BYTES as usize;
        let mut data = BytesMut::with_capacity(data_bytes + align);
        // Where it cannot be known, the data is only copied once more.
        let skip = Some(data.as_ptr().align_offset(align)).filter(|skip| *skip < align).unwrap_or(0);
        data.put_bytes(0, skip);
        data.advance(skip);
        data.extend_from_slice(buf);
        buf.clear();
        Partial { frame, data, data_bytes }
    }

    fn missing(&self) -> usize {
        self.data_bytes - self.data.len()
    }
}

/// Takes frames off a byte stream.
pub struct FrameReader<R> {
    stream: R,
    buf: BytesMut,
    partial: Option<Partial>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub fn new(stream: R) -> FrameReader<R> {
        FrameReader { stream, buf: BytesMut::new(), partial: None }
    }

    /// The next frame; `None` at a clean end between frames. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Frame>, NetError> {
        loop {
            if let Some(partial) = &mut self.partial {
                let missing = partial.missing();
                if missing > 0 {
                    if self.stream.read_buf(&mut (&mut partial.data).limit(missing)).await? == 0 {
                        return Err(NetError::Truncated);
                    }
                    continue;
                }
            }
            if let Some(Partial { frame, data, .. }) = self.partial.take() {
                return Ok(Some(Frame { data: data.freeze(), ..frame }));
            }
            if let Some(frame) = Frame::decode(&mut self.buf)? {
                return Ok(Some(frame));
            }
            if let Some((frame, bytes)) = Frame::decode_head(&mut self.buf, LARGE_BYTES)? {
                self.partial = Some(Partial::begin(frame, bytes, &mut self.buf));
                continue;
            }
            if self.buf.capacity() == self.buf.len() {
                self.buf.reserve(READ_BYTES);
            }
            if self.stream.read_buf(&mut self.buf).await? == 0 {
                return match self.buf.first_chunk() {
                    _ if self.buf.is_empty() => Ok(None),
                    // Too short to be looked at as a frame.
                    Some(start) if start.starts_with(&ALERT) => Err(FrameError::Magic(*start).into()),
                    _ => Err(NetError::Truncated),
                };
            }
        }
    }
}

/// Sends frames down a byte stream.
pub struct FrameWriter<W> {
    stream: W,
    parts: VecDeque<Bytes>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub fn new(stream: W) -> FrameWriter<W> {
        FrameWriter { stream, parts: VecDeque::new() }
    }

    /// Sends frames back to back. Not cancel-safe: an interrupted writer is of no further use.
    pub async fn write(&mut self, frames: &[Frame]) -> Result<(), NetError> {
        for frame in frames {
            self.parts.push_back(frame.encode_head()?);
            if !frame.data.is_empty() {
                self.parts.push_back(frame.data.clone());
            }
        }
        write_parts(&mut self.stream, &mut self.parts).await?;
        Ok(())
    }

    /// Sends what comes through `frames`, gathering what waits, until the channel closes.
    pub async fn run(&mut self, mut frames: mpsc::Receiver<Frame>) -> Result<(), NetError> {
        let mut batch = Vec::with_capacity(BATCH_FRAMES);
        while frames.recv_many(&mut batch, BATCH_FRAMES).await > 0 {
            self.write(&batch).await?;
            batch.clear();
        }
        Ok(())
    }
}

/// Writes all of `parts` with as few system calls as it takes.
pub async fn write_parts<W: AsyncWrite + Unpin>(
    stream: &mut W,
    parts: &mut VecDeque<Bytes>,
) -> io::Result<()> {
    while !parts.is_empty() {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut count = 0;
        for part in parts.iter().take(SLICES_MAX) {
            slices[count] = IoSlice::new(part);
            count += 1;
        }
        let mut written = stream.write_vectored(&slices[..count]).await?;
        if written == 0 && parts.iter().any(|p| !p.is_empty()) {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(front) = parts.front_mut() {
            if written < front.len() {
                front.advance(written);
                break;
            }
            written -= front.len();
            parts.pop_front();
        }
    }
    stream.flush().await
}

/// A connection after the hellos.
pub struct Framed {
    pub reader: FrameReader<ReadHalf>,
    pub writer: FrameWriter<WriteHalf>,
    /// What the other side said.
    pub peer: Hello,
}

/// Connects to the OSD at `addr` (`ip:port`), says `hello` and checks the answer.
pub async fn connect(addr: &str, hello: &Hello, security: &Security) -> Result<Framed, NetError> {
    let exchange = async {
        let stream = prepared(TcpStream::connect(addr).await?)?;
        let (mut reader, mut writer) = if security.is_tls() {
            let tls = security.connect(stream, Protocol::Data, TlsRole::Osd).await.expect("TLS is on");
            framed(halves::of_tls(tls.map_err(no_tls)?))
        } else {
            framed(halves::of_tcp(stream))
        };
        writer.write(&[Frame::new(0, Message::Hello(hello.clone()))]).await?;
        let peer = read_hello(&mut reader).await?;
        if let Some(why) = peer.refusal {
            return Err(NetError::Refused(why));
        }
        if peer.cluster != hello.cluster {
            return Err(NetError::Refused(foreign(hello, &peer)));
        }
        Ok(Framed { reader, writer, peer })
    };
    let result = tokio::time::timeout(HELLO_TIMEOUT, exchange).await.map_err(|_| NetError::HelloTimeout)?;
    result.map_err(|e| e.explained(security))
}

/// The accepting side: reads the other's hello and answers with `hello`, or refuses a foreign
/// cluster, or one that is not what it says. The refusal is sent before the error is returned.
pub async fn accept(stream: TcpStream, hello: &Hello, security: &Security) -> Result<Framed, NetError> {
    let exchange = async {
        let stream = prepared(stream)?;
        let mut identity = None;
        let (mut reader, mut writer) = if security.is_tls() {
            let tls = security.accept(stream, Protocol::Data).await.expect("TLS is on");
            let (tls, who) = tls.map_err(no_tls)?;
            identity = Some(who);
            framed(halves::of_tls(tls))
        } else {
            framed(halves::of_tcp(stream))
        };
        let peer = read_hello(&mut reader).await?;
        let pretends = identity.and_then(|identity| pretender(&peer.role, &identity));
        let refusal = pretends.or_else(|| (peer.cluster != hello.cluster).then(|| foreign(hello, &peer)));
        let answer = Hello { refusal: refusal.clone(), ..hello.clone() };
        writer.write(&[Frame::new(0, Message::Hello(answer))]).await?;
        match refusal {
            Some(why) => Err(NetError::Refused(why)),
            None => Ok(Framed { reader, writer, peer }),
        }
    };
    let result = tokio::time::timeout(HELLO_TIMEOUT, exchange).await.map_err(|_| NetError::HelloTimeout)?;
    result.map_err(|e| e.explained(security))
}

/// A handshake that failed.
fn no_tls(error: io::Error) -> NetError {
    Refusal::of_handshake(&error).map_or(NetError::Io(error), NetError::Tls)
}

/// Why somebody with this certificate is not what it says it is.
fn pretender(says: &Role, identity: &Identity) -> Option<String> {
    let (may, what) = match says {
        Role::Osd { .. } => (identity.role == TlsRole::Osd, "an OSD"),
        Role::Client { .. } => {
            (matches!(identity.role, TlsRole::Gateway | TlsRole::Host | TlsRole::Admin), "a client")
        }
    };
    (!may).then(|| format!("the certificate is of {identity}, which may not be {what} here"))
}

fn foreign(own: &Hello, peer: &Hello) -> String {
    format!("this process belongs to cluster {}, the other to {}", own.cluster, peer.cluster)
}

async fn read_hello<R: AsyncRead + Unpin>(reader: &mut FrameReader<R>) -> Result<Hello, NetError> {
    match reader.next().await? {
        Some(Frame { message: Message::Hello(hello), .. }) => Ok(hello),
        _ => Err(NetError::NoHello),
    }
}

fn framed((read, write): (ReadHalf, WriteHalf)) -> (FrameReader<ReadHalf>, FrameWriter<WriteHalf>) {
    (FrameReader::new(read), FrameWriter::new(write))
}

fn prepared(stream: TcpStream) -> io::Result<TcpStream> {
    watched(stream, SILENCE_MAX)
}

/// A machine that is gone closes nothing: gives up on a side that is silent, or takes nothing, for longer than `silence_max`.
pub fn watched(stream: TcpStream, silence_max: Duration) -> io::Result<TcpStream> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(2))?;
    sockopt::set_tcp_keepcnt(&stream, 3)?;
    // Where it is set, it also decides when unanswered probes are too many.
    sockopt::set_tcp_user_timeout(&stream, silence_max.as_millis().try_into().unwrap_or(u32::MAX))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gabion_proto::ids::*;
    use gabion_proto::msg::{OpReply, Role};
    use tokio::net::TcpListener;

    fn hello(cluster: u8) -> Hello {
        Hello { cluster: ClusterId([cluster; 16]), role: Role::Client { id: ClientId(9) }, refusal: None }
    }
    fn reply(request: u64, bytes: usize) -> Frame {
        let message = Message::OpReply(OpReply::Done { version: Version::ZERO });
        Frame { request, message, data: Bytes::from(vec![request as u8; bytes]) }
    }

    #[tokio::test]
    async fn frames_arrive_whole_and_in_order() {
        let (a, b) = tokio::io::duplex(1000);
        let sent: Vec<Frame> = (0..200).map(|i| reply(i, (i as usize * 37) % 9000)).collect();
        let (tx, rx) = mpsc::channel(8);
        let writer = tokio::spawn(async move { FrameWriter::new(a).run(rx).await });
        let frames = sent.clone();
        tokio::spawn(async move {
            for f in frames {
                tx.send(f).await.unwrap();
            }
        });
        let mut reader = FrameReader::new(b);
        for want in sent {
            assert_eq!(reader.next().await.unwrap().unwrap(), want);
        }
        assert!(reader.next().await.unwrap().is_none());
        writer.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn much_data_lies_where_a_disk_takes_it_from() {
        for pipe in [1000, 40 << 10, 1 << 20] {
            let (mut a, b) = tokio::io::duplex(pipe);
            let sizes = [300 << 10, 7, LARGE_BYTES, LARGE_BYTES - 1, 0, 64 << 10];
            let sent: Vec<Frame> = sizes.iter().zip(0..).map(|(bytes, i)| reply(i, *bytes)).collect();
            let frames = sent.clone();
            let writer = tokio::spawn(async move {
                for f in frames {
                    a.write_all(&f.encode_head().unwrap()).await.unwrap();
                    a.write_all(&f.data).await.unwrap();
                }
            });
            let mut reader = FrameReader::new(b);
            for want in sent {
                let got = reader.next().await.unwrap().unwrap();
                assert_eq!(got, want);
                // With the larger pipes all of it may be there at once.
                if pipe == 1000 && got.data.len() >= LARGE_BYTES {
                    assert_eq!(got.data.as_ptr().align_offset(BLOCK_BYTES as usize), 0);
                }
            }
            assert!(reader.next().await.unwrap().is_none());
            writer.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_cut_frame_and_garbage_are_errors() {
        let head = reply(1, 10).encode_head().unwrap();
        let mut cut = FrameReader::new(&head[..]);
        assert!(matches!(cut.next().await, Err(NetError::Truncated)));
        let large = reply(1, LARGE_BYTES).encode_head().unwrap();
        let mut cut = FrameReader::new(&large[..]);
        assert!(matches!(cut.next().await, Err(NetError::Truncated)));
        let mut garbage = FrameReader::new(&[0x47u8; 64][..]);
        assert!(matches!(garbage.next().await, Err(NetError::Frame(FrameError::Magic(_)))));
    }

    #[tokio::test]
    async fn hellos_agree_or_refuse() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let server = tokio::spawn(async move {
            let mut ends = Vec::new();
            for _ in 0..2 {
                ends.push(
                    accept(listener.accept().await.unwrap().0, &hello(1), &Security::plain())
                        .await
                        .map(|f| f.peer),
                );
            }
            ends
        });
        assert_eq!(connect(&addr, &hello(1), &Security::plain()).await.unwrap().peer, hello(1));
        let Err(NetError::Refused(why)) = connect(&addr, &hello(2), &Security::plain()).await else {
            panic!("not refused")
        };
        assert!(why.contains("cluster 01010101"), "{why}");
        let ends = server.await.unwrap();
        assert!(ends[0].is_ok() && matches!(ends[1], Err(NetError::Refused(_))));
    }
}
