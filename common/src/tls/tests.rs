//! Certificates of every kind against each other, over the data path's hello. The gRPC side has its own.

use super::authority::{Authority, Issued, Request};
use super::{Refusal, Role, Security, TlsFiles};
use crate::net::{self, Framed, NetError};
use bytes::Bytes;
use gabion_proto::frame::Frame;
use gabion_proto::ids::*;
use gabion_proto::msg::{Hello, Message, OpReply, Role as HelloRole};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use time::{Duration, OffsetDateTime};
use tokio::net::{TcpListener, TcpStream};

pub(crate) struct Ca {
    authority: Authority,
    dir: tempfile::TempDir,
}

impl Ca {
    pub fn new(cluster: &str) -> Ca {
        let dir = tempfile::tempdir().unwrap();
        Ca { authority: Authority::create(&dir.path().join("ca"), cluster, 10).unwrap(), dir }
    }
    fn request(role: Role) -> Request {
        Request { role, name: "node-a".into(), addresses: vec![], days: 9 }
    }
    fn files(&self, issued: &Issued) -> TlsFiles {
        let dir = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        let [ca, cert, key] = ["ca", "cert", "key"].map(|name| dir.join(name));
        std::fs::write(&ca, self.authority.ca_pem()).unwrap();
        std::fs::write(&cert, &issued.cert_pem).unwrap();
        std::fs::write(&key, &issued.key_pem).unwrap();
        chmod(&key, 0o600);
        TlsFiles { ca, cert, key }
    }
    fn of(&self, role: Role) -> TlsFiles {
        self.files(&self.authority.issue(&Ca::request(role)).unwrap())
    }
    pub fn security(&self, role: Role) -> Security {
        Security::load(&self.of(role), &[role]).unwrap()
    }
    /// Valid from and to so many days from now.
    fn dated(&self, role: Role, from: i64, to: i64) -> TlsFiles {
        let now = OffsetDateTime::now_utc();
        let period = (now + Duration::days(from), now + Duration::days(to));
        self.files(&self.authority.issue_in(self.authority.cluster(), &Ca::request(role), period).unwrap())
    }
    pub fn expired(&self, role: Role) -> Security {
        Security::load_unchecked(&self.dated(role, -9, -1))
    }
    /// One that trusts this CA and shows the certificate of `other`.
    pub fn showing(&self, other: &Ca, role: Role) -> Security {
        let TlsFiles { cert, key, .. } = other.of(role);
        Security::load_unchecked(&TlsFiles { ca: self.of(role).ca, cert, key })
    }
}

fn chmod(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn hello(role: HelloRole) -> Hello {
    Hello { cluster: ClusterId([1; 16]), role, refusal: None }
}
fn osd() -> HelloRole {
    HelloRole::Osd { id: OsdId(3), incarnation: Incarnation(7) }
}
fn client() -> HelloRole {
    HelloRole::Client { id: ClientId(5) }
}

type Ends = (Result<Framed, NetError>, Result<Framed, NetError>);

/// Who connects, who accepts.
async fn meet(from: &Security, says: HelloRole, to: &Security) -> Ends {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let (hello_out, hello_in) = (hello(says), hello(osd()));
    let accepting = async { net::accept(listener.accept().await.unwrap().0, &hello_in, to).await };
    tokio::join!(net::connect(&addr, &hello_out, from), accepting)
}

fn tls(end: Result<Framed, NetError>) -> Refusal {
    match end.map(|f| f.peer) {
        Err(NetError::Tls(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn frames_go_both_ways_under_load() {
    let ca = Ca::new("prod");
    let (from, to) = meet(&ca.security(Role::Gateway), client(), &ca.security(Role::Osd)).await;
    let (from, to) = (from.unwrap(), to.unwrap());
    assert_eq!((from.peer.role, to.peer.role), (osd(), client()));
    let frames = |salt: usize| -> Vec<Frame> {
        (0..60)
            .map(|i| {
                let data = Bytes::from(vec![(i + salt) as u8; (i * 7919 + salt) % 300_000]);
                let message = Message::OpReply(OpReply::Done { version: Version::ZERO });
                Frame { request: i as u64, message, data }
            })
            .collect()
    };
    let pump = |framed: Framed, out: Vec<Frame>, want: Vec<Frame>| async move {
        // Each sends more than the buffers hold before the other has read it all.
        let (mut reader, mut writer) = (framed.reader, framed.writer);
        let sending = async { writer.write(&out).await.unwrap() };
        let reading = async {
            for frame in want {
                assert_eq!(reader.next().await.unwrap().unwrap(), frame);
            }
        };
        tokio::join!(sending, reading);
    };
    tokio::join!(pump(from, frames(1), frames(2)), pump(to, frames(2), frames(1)));
}

#[tokio::test]
async fn a_certificate_is_for_what_it_says() {
    let ca = Ca::new("prod");
    let server = ca.security(Role::Osd);
    for role in Role::ALL {
        let may = |says: &HelloRole| match says {
            HelloRole::Osd { .. } => role == Role::Osd,
            HelloRole::Client { .. } => [Role::Gateway, Role::Host, Role::Admin].contains(&role),
        };
        for says in [osd(), client()] {
            let (from, to) = meet(&ca.security(role), says, &server).await;
            assert_eq!((from.is_ok(), to.is_ok()), (may(&says), may(&says)), "{role} says {says:?}");
            for end in [from, to] {
                let Err(error) = end else { continue };
                let text = error.to_string();
                assert!(text.contains(&format!("{role} node-a of cluster prod, which may not be")), "{text}");
            }
        }
        // And the other way round: who connects to an OSD finds an OSD.
        let (from, to) = meet(&ca.security(Role::Gateway), client(), &ca.security(role)).await;
        match role {
            Role::Osd => assert!(from.is_ok() && to.is_ok()),
            Role::Monitor | Role::Host => {
                assert!(matches!(tls(from), Refusal::WrongRole { want: Role::Osd, .. }));
                assert_eq!(tls(to), Refusal::RefusesOurs("it is of another cluster or role"));
            }
            // Not fit to serve at all.
            _ => {
                tls(from);
                tls(to);
            }
        }
    }
}

#[tokio::test]
async fn foreign_expired_and_plain_are_refused_on_both_sides() {
    let (ours, theirs) = (Ca::new("prod"), Ca::new("prod"));
    let good = ours.security(Role::Osd);
    let foreign = Refusal::RefusesOurs("it is not from its CA");
    let expired = Refusal::RefusesOurs("it has expired, or is not valid yet");

    // The certificate of who connects.
    let cases = [
        (ours.showing(&theirs, Role::Osd), foreign.clone(), Refusal::Foreign),
        (ours.expired(Role::Osd), expired.clone(), Refusal::Expired),
        (Security::load_unchecked(&ours.dated(Role::Osd, 1, 9)), expired.clone(), Refusal::NotYetValid),
        (Security::plain(), Refusal::WantsTls, Refusal::Plain),
    ];
    for (from, at_client, at_server) in cases {
        let (client_end, server_end) = meet(&from, osd(), &good).await;
        assert_eq!((tls(client_end), tls(server_end)), (at_client, at_server));
    }
    // Of who listens.
    let cases = [
        (ours.showing(&theirs, Role::Osd), Refusal::Foreign, foreign),
        (ours.expired(Role::Osd), Refusal::Expired, expired),
    ];
    for (to, at_client, at_server) in cases {
        let (client_end, server_end) = meet(&good, osd(), &to).await;
        assert_eq!((tls(client_end), tls(server_end)), (at_client, at_server));
    }
    // A plain OSD sees no hello in a handshake; who connects hears no TLS.
    let (from, to) = meet(&good, osd(), &Security::plain()).await;
    assert_eq!(tls(from), Refusal::HungUp);
    assert!(to.is_err());
}

#[tokio::test]
async fn one_ca_for_two_clusters_keeps_them_apart() {
    // As a company's CA would: the same key signs for both.
    let prod = Ca::new("prod");
    let good = prod.security(Role::Osd);
    let now = OffsetDateTime::now_utc();
    let period = (now - Duration::days(1), now + Duration::days(1));
    let issued = prod.authority.issue_in("test", &Ca::request(Role::Osd), period).unwrap();
    let other = Security::load_unchecked(&prod.files(&issued));
    let refused = Refusal::RefusesOurs("it is of another cluster or role");
    let (from, to) = meet(&good, osd(), &other).await;
    assert!(matches!(tls(from), Refusal::OtherCluster { .. }));
    assert_eq!(tls(to), refused);
    let text = tls(meet(&good, osd(), &other).await.0).to_string();
    assert_eq!(text, "TLS: its certificate is of osd node-a of cluster test, this cluster is prod");
}

#[tokio::test]
async fn garbage_and_silence_end_in_time() {
    use tokio::io::AsyncWriteExt;
    let ca = Ca::new("prod");
    let server = ca.security(Role::Osd);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for garbage in [&[0x47u8; 4096][..], &[0x16, 3, 1, 0xff, 0xff], &[0x16, 3, 1, 0, 4, 1, 0, 0, 0], &[]] {
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let accepted = listener.accept().await.unwrap().0;
        assert!(net::accept(accepted, &hello(osd()), &server).await.is_err());
    }
    // Says nothing at all.
    let _open = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let accepted = listener.accept().await.unwrap().0;
    let end = net::accept(accepted, &hello(osd()), &server).await;
    assert!(matches!(end, Err(NetError::HelloTimeout)));
}

#[test]
fn files_that_are_no_good_are_named() {
    let (ours, theirs) = (Ca::new("prod"), Ca::new("other"));
    let good = ours.of(Role::Osd);
    let refused = |files: &TlsFiles, role| Security::load(files, &[role]).unwrap_err().to_string();
    let own = Security::load(&good, &[Role::Osd]).unwrap();
    assert_eq!(own.own().unwrap().uri(), "gabion://prod/osd/node-a");

    let text = refused(&good, Role::Monitor);
    assert!(text.contains("is of osd node-a of cluster prod, wanted is one of role monitor"), "{text}");
    let text = refused(&ours.dated(Role::Osd, -9, -1), Role::Osd);
    assert!(text.contains("has expired"), "{text}");
    let text = refused(&TlsFiles { ca: theirs.of(Role::Osd).ca, ..good.clone() }, Role::Osd);
    assert!(text.contains("not from the CA"), "{text}");
    let text = refused(&TlsFiles { key: theirs.of(Role::Osd).key, ..good.clone() }, Role::Osd);
    assert!(text.contains("does not go with"), "{text}");
    let text = refused(&TlsFiles { cert: ours.dir.path().join("none"), ..good.clone() }, Role::Osd);
    assert!(text.contains("none: No such file"), "{text}");
    let text = refused(&TlsFiles { cert: good.key.clone(), ..good.clone() }, Role::Osd);
    assert!(text.contains("holds no PEM certificate"), "{text}");
    let text = refused(&TlsFiles { cert: good.ca.clone(), ..good.clone() }, Role::Osd);
    assert!(text.contains("names no role"), "{text}");
    chmod(&good.key, 0o644);
    let text = refused(&good, Role::Osd);
    assert!(text.contains("everybody can read (mode 0644)"), "{text}");
}

#[test]
fn the_authority_keeps_its_key_and_overwrites_nothing() {
    let ca = Ca::new("prod");
    let dir = ca.dir.path().join("ca");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&dir.join("ca.key")), mode(&dir.join("ca.crt"))), (0o700, 0o600, 0o644));
    let again = Authority::create(&dir, "prod", 1).map(drop).unwrap_err();
    assert!(again.to_string().contains("never overwritten"), "{again}");
    assert!(Authority::new("no/name", 1).is_err());

    // Opened again it is the same CA: what it issues is good.
    let reopened = Authority::open(&dir).unwrap();
    let out = ca.dir.path().join("out");
    let files = reopened.issue_into(&out, "osd", &Ca::request(Role::Osd), false).unwrap();
    assert_eq!((mode(&files.key), mode(&files.cert)), (0o600, 0o644));
    Security::load(&files, &[Role::Osd]).unwrap();
    let first = std::fs::read(&files.cert).unwrap();
    assert!(reopened.issue_into(&out, "osd", &Ca::request(Role::Osd), false).is_err());
    assert_eq!(std::fs::read(&files.cert).unwrap(), first);
    reopened.issue_into(&out, "osd", &Ca::request(Role::Osd), true).unwrap();
    assert_ne!(std::fs::read(&files.cert).unwrap(), first);
    Security::load(&files, &[Role::Osd]).unwrap();
    // A certificate that is no CA's of ours.
    std::fs::copy(&files.cert, dir.join("ca.crt")).unwrap();
    assert!(Authority::open(&dir).is_err());
}
