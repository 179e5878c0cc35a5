//! Handshakes and requests by hand, over a pipe in memory.

use super::limits::*;
use super::wire::*;
use super::*;
use crate::volume::Volume;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

const SIZE: u64 = 8 << 20;

struct Client {
    s: DuplexStream,
    server: JoinHandle<Result<(), NbdError>>,
}

fn table(read_only: bool) -> Names {
    let t = Table::default();
    t.insert("vol", 1, Export::new(Volume::in_memory(SIZE), read_only));
    Names::Table(Arc::new(t))
}

impl Client {
    async fn greet(names: Names, flags: u32) -> Client {
        let (mut s, other) = tokio::io::duplex(64 << 10);
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
    async fn go(names: Names) -> Client {
        let mut c = Client::greet(names, 3).await;
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
    let mut c = Client::go(table(false)).await;
    c.s.write_all(&[0x55; REQUEST_BYTES]).await.unwrap();
    protocol(c.closed().await);
    let mut c = Client::go(table(false)).await;
    c.request(command::WRITE, 0, 1, 0, REQUEST_BYTES_MAX + 1).await;
    protocol(c.closed().await);
    // Cut in the middle of a write's payload.
    let mut c = Client::go(table(false)).await;
    c.request(command::WRITE, 0, 1, 0, 4096).await;
    c.s.write_all(&[0; 100]).await.unwrap();
    c.s.shutdown().await.unwrap();
    assert!(matches!(c.closed().await, Err(NbdError::Io(_))));
}

#[tokio::test]
async fn refused_requests_leave_the_connection_open() {
    let mut c = Client::go(table(false)).await;
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

    let mut c = Client::go(table(true)).await;
    for command in [command::TRIM, command::WRITE_ZEROES] {
        c.request(command, 0, 9, 0, 4096).await;
        assert_eq!(c.answer().await, (errno::EPERM, 9));
    }
}

#[tokio::test]
async fn closing_an_export_ends_its_connections() {
    let export = Export::new(Volume::in_memory(SIZE), false);
    let c = Client::go(Names::One(export.clone())).await;
    tokio::time::timeout(Duration::from_secs(10), export.close()).await.unwrap();
    c.closed().await.unwrap();
}
