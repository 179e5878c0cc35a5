//! Handshakes and requests by hand, over a pipe in memory or a pair of sockets.

use super::connection::Incoming;
use super::limits::*;
use super::wire::*;
use super::*;
use crate::volume::{Backend, MemoryBackend, Shape, Volume, VolumeError};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use gabion_proto::blocks::Content;
use gabion_proto::ids::VolumeId;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const SIZE: u64 = 8 << 20;
const OBJECT_BYTES: u32 = 4 << 20;

/// Who leaves a pipe in memory is only seen once everything is read.
impl Connection for DuplexStream {
    type Read = ReadHalf<DuplexStream>;
    type Write = WriteHalf<DuplexStream>;

    fn halves(self) -> (Self::Read, Self::Write) {
        tokio::io::split(self)
    }
}

impl Incoming for ReadHalf<DuplexStream> {
    async fn left(&self) {
        std::future::pending().await
    }
    fn has_left(&self) -> bool {
        false
    }
}

/// In memory; writes of object 0 wait while it is held.
struct Held {
    memory: MemoryBackend,
    held: watch::Receiver<bool>,
}

impl Backend for Held {
    fn read(&self, o: u32, f: u32, n: u32) -> BoxFuture<'_, Result<Content, VolumeError>> {
        self.memory.read(o, f, n)
    }
    fn write(&self, o: u32, c: Content) -> BoxFuture<'_, Result<(), VolumeError>> {
        async move {
            if o == 0 {
                let mut held = self.held.clone();
                held.wait_for(|held| !held).await.map_err(|_| VolumeError::Io)?;
            }
            self.memory.write(o, c).await
        }
        .boxed()
    }
    fn zero(&self, o: u32, f: u32, n: u32, d: bool) -> BoxFuture<'_, Result<(), VolumeError>> {
        self.memory.zero(o, f, n, d)
    }
    fn check(&self) -> Result<(), VolumeError> {
        self.memory.check()
    }
}

struct Client<S = DuplexStream> {
    s: S,
    server: JoinHandle<Result<(), NbdError>>,
}

fn table(read_only: bool) -> Names {
    let t = Table::default();
    t.insert("vol", 1, Export::new(Volume::in_memory(SIZE), read_only));
    Names::Table(Arc::new(t))
}

impl Client {
    async fn greet(names: Names, flags: u32) -> Client {
        let (s, other) = tokio::io::duplex(64 << 10);
        Client::greet_over(s, other, names, flags).await
    }
    async fn go(names: Names) -> Client {
        let (s, other) = tokio::io::duplex(64 << 10);
        Client::go_over(s, other, names).await
    }
}

impl Client<UnixStream> {
    async fn go(names: Names) -> Client<UnixStream> {
        let (s, other) = UnixStream::pair().unwrap();
        Client::go_over(s, other, names).await
    }
    async fn write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        self.request(command::WRITE, 0, cookie, offset, data.len() as u32).await;
        self.s.write_all(data).await.unwrap();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    async fn greet_over(mut s: S, other: impl Connection, names: Names, flags: u32) -> Client<S> {
        let server = tokio::spawn(serve(other, names));
        assert_eq!(s.read_u64().await.unwrap(), NBDMAGIC);
        assert_eq!(s.read_u64().await.unwrap(), IHAVEOPT);
        assert_eq!(s.read_u16().await.unwrap(), 3);
        s.write_u32(flags).await.unwrap();
        Client { s, server }
    }
    async fn option(&mut self, option: u32, data: &[u8]) {
        self.s.write_u64(IHAVEOPT).await.unwrap();
        self.s.write_u32(option).await.unwrap();
        self.s.write_u32(data.len() as u32).await.unwrap();
        self.s.write_all(data).await.unwrap();
    }
    async fn reply(&mut self) -> (u32, u32, Vec<u8>) {
        assert_eq!(self.s.read_u64().await.unwrap(), REPLY_OPTION_MAGIC);
        let (option, kind) = (self.s.read_u32().await.unwrap(), self.s.read_u32().await.unwrap());
        let mut data = vec![0; self.s.read_u32().await.unwrap() as usize];
        self.s.read_exact(&mut data).await.unwrap();
        (option, kind, data)
    }
    async fn go_over(s: S, other: impl Connection, names: Names) -> Client<S> {
        let mut c = Client::greet_over(s, other, names, 3).await;
        c.option(option::GO, &info_request("vol")).await;
        while c.reply().await.1 == reply::INFO {}
        c
    }
    async fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.s.write_u32(REQUEST_MAGIC).await.unwrap();
        self.s.write_u16(flags).await.unwrap();
        self.s.write_u16(command).await.unwrap();
        self.s.write_u64(cookie).await.unwrap();
        self.s.write_u64(offset).await.unwrap();
        self.s.write_u32(len).await.unwrap();
    }
    async fn answer(&mut self) -> (u32, u64) {
        assert_eq!(self.s.read_u32().await.unwrap(), SIMPLE_REPLY_MAGIC);
        (self.s.read_u32().await.unwrap(), self.s.read_u64().await.unwrap())
    }
    async fn closed(mut self) -> Result<(), NbdError> {
        let mut rest = Vec::new();
        self.s.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty(), "{rest:?}");
        tokio::time::timeout(Duration::from_secs(10), self.server).await.unwrap().unwrap()
    }
}

fn info_request(name: &str) -> Vec<u8> {
    let mut d = (name.len() as u32).to_be_bytes().to_vec();
    d.extend(name.as_bytes());
    d.extend(0u16.to_be_bytes());
    d
}

#[tokio::test]
async fn options_are_answered_as_the_specification_says() {
    let mut c = Client::greet(table(false), 3).await;
    for unsupported in [5u32, 8, 10, 11, 4242] {
        c.option(unsupported, b"").await;
        assert_eq!(c.reply().await.1, reply::ERR_UNSUP, "option {unsupported}");
    }
    c.option(option::LIST, b"").await;
    assert_eq!(c.reply().await, (option::LIST, reply::SERVER, b"\0\0\0\x03vol".to_vec()));
    assert_eq!(c.reply().await.1, reply::ACK);
    c.option(option::LIST, b"x").await;
    assert_eq!(c.reply().await.1, reply::ERR_INVALID);
    c.option(option::INFO, &info_request("other")).await;
    assert_eq!(c.reply().await.1, reply::ERR_UNKNOWN);
    for malformed in
        [&b""[..], b"\0\0\0\xffvol\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x03vol\0\x01", b"\0\0\0\x01\xff\0\0"]
    {
        c.option(option::GO, malformed).await;
        assert_eq!(c.reply().await.1, reply::ERR_INVALID, "{malformed:?}");
    }
    c.option(77, &vec![0; OPTION_BYTES_MAX as usize + 1]).await;
    assert_eq!(c.reply().await.1, reply::ERR_TOO_BIG);
    c.option(option::INFO, &info_request("vol")).await;
    let (_, kind, export) = c.reply().await;
    assert_eq!((kind, &export[..2], &export[2..10]), (reply::INFO, &[0u8, 0][..], &SIZE.to_be_bytes()[..]));
    assert_eq!(c.reply().await.2, [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!(c.reply().await.1, reply::ACK);
    c.option(option::ABORT, b"").await;
    assert_eq!(c.reply().await.1, reply::ACK);
    c.closed().await.unwrap();
}

#[tokio::test]
async fn export_name_is_the_old_way_in() {
    for (flags, zeroes) in [(3, 0), (1, 124)] {
        let mut c = Client::greet(table(false), flags).await;
        c.option(option::EXPORT_NAME, b"vol").await;
        assert_eq!(c.s.read_u64().await.unwrap(), SIZE);
        assert_eq!(c.s.read_u16().await.unwrap(), 0x16d);
        c.s.read_exact(&mut vec![0; zeroes]).await.unwrap();
        c.request(command::DISC, 0, 0, 0, 0).await;
        c.closed().await.unwrap();
    }
    let mut c = Client::greet(table(false), 3).await;
    c.option(option::EXPORT_NAME, b"other").await;
    assert!(matches!(c.closed().await, Err(NbdError::NoExport(n)) if n == "other"));
}

#[tokio::test]
async fn garbage_closes_the_connection() {
    let protocol = |r: Result<(), NbdError>| assert!(matches!(r, Err(NbdError::Protocol(_))), "{r:?}");
    protocol(Client::greet(table(false), 0xffff_ffff).await.closed().await);
    let mut c = Client::greet(table(false), 3).await;
    c.s.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    protocol(c.closed().await);
    let mut c = Client::greet(table(false), 3).await;
    c.s.write_u64(IHAVEOPT).await.unwrap();
    c.s.write_u64(u64::MAX).await.unwrap();
    protocol(c.closed().await);
    let mut c = Client::<DuplexStream>::go(table(false)).await;
    c.s.write_all(&[0x55; REQUEST_BYTES]).await.unwrap();
    protocol(c.closed().await);
    let mut c = Client::<DuplexStream>::go(table(false)).await;
    c.request(command::WRITE, 0, 1, 0, REQUEST_BYTES_MAX + 1).await;
    protocol(c.closed().await);
    // Cut in the middle of a write's payload.
    let mut c = Client::<DuplexStream>::go(table(false)).await;
    c.request(command::WRITE, 0, 1, 0, 4096).await;
    c.s.write_all(&[0; 100]).await.unwrap();
    c.s.shutdown().await.unwrap();
    assert!(matches!(c.closed().await, Err(NbdError::Io(_))));
}

#[tokio::test]
async fn refused_requests_leave_the_connection_open() {
    let mut c = Client::<DuplexStream>::go(table(false)).await;
    let cases: [(u16, u16, u64, u32, u32); 9] = [
        (command::READ, 0, SIZE - 1, 2, errno::EINVAL),
        (command::READ, 0, 0, REQUEST_BYTES_MAX + 1, errno::EINVAL),
        (command::READ, 0, u64::MAX, 1, errno::EINVAL),
        (command::TRIM, 0, SIZE, 1, errno::EINVAL),
        (command::WRITE_ZEROES, 0, SIZE, 1, errno::ENOSPC),
        (command::WRITE_ZEROES, 1 << 4, 0, 1, errno::EINVAL),
        (5, 0, 0, 1, errno::EINVAL),
        (999, 0, 0, 0, errno::EINVAL),
        (command::FLUSH, 0x8000, 0, 0, errno::EINVAL),
    ];
    for (i, (command, flags, offset, len, want)) in cases.into_iter().enumerate() {
        c.request(command, flags, i as u64, offset, len).await;
        assert_eq!(c.answer().await, (want, i as u64), "case {i}");
    }
    c.request(command::WRITE, 0, 70, SIZE - 1, 2).await;
    c.s.write_all(b"ab").await.unwrap();
    assert_eq!(c.answer().await, (errno::ENOSPC, 70));
    c.request(command::WRITE, command::FLAG_FUA, 71, 5, 2).await;
    c.s.write_all(b"ab").await.unwrap();
    assert_eq!(c.answer().await, (errno::OK, 71));
    c.request(command::READ, 0, 72, 4, 4).await;
    assert_eq!(c.answer().await, (errno::OK, 72));
    let mut got = [9; 4];
    c.s.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"\0ab\0");

    let mut c = Client::<DuplexStream>::go(table(true)).await;
    for command in [command::TRIM, command::WRITE_ZEROES] {
        c.request(command, 0, 9, 0, 4096).await;
        assert_eq!(c.answer().await, (errno::EPERM, 9));
    }
}

#[tokio::test]
async fn closing_an_export_ends_its_connections() {
    let export = Export::new(Volume::in_memory(SIZE), false);
    let c = Client::<DuplexStream>::go(Names::One(export.clone())).await;
    tokio::time::timeout(Duration::from_secs(10), export.close()).await.unwrap();
    c.closed().await.unwrap();
}

/// A volume of two objects, of which the first one waits.
fn half_waiting() -> (Arc<Volume>, Arc<Export>, watch::Sender<bool>) {
    let (hold, held) = watch::channel(true);
    let backend = Held { memory: MemoryBackend::default(), held };
    let shape = Shape { id: VolumeId(1), name: "vol".into(), size_bytes: SIZE, object_bytes: OBJECT_BYTES };
    let volume = Volume::new(shape, Box::new(backend));
    (volume.clone(), Export::new(volume, false), hold)
}

#[tokio::test]
async fn what_a_client_gave_up_unread_does_not_run_after_what_it_did_instead() {
    let (volume, export, hold) = half_waiting();
    let at = u64::from(OBJECT_BYTES);
    let mut first = Client::<UnixStream>::go(Names::One(export.clone())).await;
    let much = vec![7; OBJECT_BYTES as usize];
    for cookie in 0..(PAYLOAD_BYTES_MAX / much.len()) as u64 {
        first.write(cookie, 0, &much).await;
    }
    first.write(99, at, &[1; 4096]).await;
    // As a TCP client does, whose machine has not refused an answer yet: those that come still leave.
    first.s.shutdown().await.unwrap();

    let mut second = Client::<UnixStream>::go(Names::One(export.clone())).await;
    for (cookie, byte) in [(1, 1), (2, 2)] {
        second.write(cookie, at, &[byte; 4096]).await;
        assert_eq!(second.answer().await, (errno::OK, cookie));
    }
    hold.send_replace(false);
    tokio::time::timeout(Duration::from_secs(10), first.server).await.expect("it ends").unwrap().unwrap();
    volume.drain().await;
    assert_eq!(volume.read(at, 4096).await.unwrap(), Bytes::from(vec![2; 4096]));
    assert_eq!(volume.read(0, 1).await.unwrap(), Bytes::from(vec![7]), "what had begun runs to its end");
}
