//! One process's key and certificates, read and checked once at the start, and what is made of them.

use super::identity::{Identity, Role};
use super::refusal::Refusal;
use super::verify::{Clients, Servers};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use webpki::{EndEntityCert, KeyUsage};

/// One direction of a connection holds at most this much that is encrypted and not sent yet.
const BUFFER_BYTES: usize = 256 << 10;
/// Certificates of one file.
const CERTIFICATES_MAX: usize = 16;
/// No file of ours is near this.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// A certificate that ends sooner is worth a warning at every start.
const EXPIRES_SOON: Duration = Duration::from_secs(30 * 24 * 3600);

pub type TlsStream = tokio_rustls::TlsStream<TcpStream>;

/// What is spoken inside; a connection to the wrong kind of port fails in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Grpc,
    Data,
}

impl Protocol {
    fn alpn(self) -> Vec<u8> {
        match self {
            Protocol::Grpc => b"h2".to_vec(),
            Protocol::Data => b"gabion-data".to_vec(),
        }
    }
}

/// Where the three PEM files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Files that do not make a working TLS.
#[derive(Debug, thiserror::Error)]
#[error("TLS: {}: {problem}", path.display())]
pub struct TlsConfigError {
    pub path: PathBuf,
    pub problem: String,
}

struct Credentials {
    own: Identity,
    acceptors: BTreeMap<Protocol, TlsAcceptor>,
    connectors: BTreeMap<(Protocol, Role), TlsConnector>,
}

/// How a process connects and listens: plain, or TLS with its certificate. Cheap to clone.
#[derive(Clone, Default)]
pub struct Security(Option<Arc<Credentials>>);

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.own() {
            Some(own) => write!(f, "Security(TLS as {own})"),
            None => f.write_str("Security(plain)"),
        }
    }
}

impl Security {
    pub fn plain() -> Security {
        Security(None)
    }

    /// TLS by these files, whose certificate must be of one of `roles` and good.
    pub fn load(files: &TlsFiles, roles: &[Role]) -> Result<Security, TlsConfigError> {
        Security::read(files, roles, true)
    }

    /// For tests of how others see it: its own certificate may be a bad one.
    #[cfg(test)]
    pub(crate) fn load_unchecked(files: &TlsFiles) -> Security {
        Security::read(files, &Role::ALL, false).unwrap()
    }

    fn read(files: &TlsFiles, roles: &[Role], check: bool) -> Result<Security, TlsConfigError> {
        let bad = |path: &Path, problem: String| TlsConfigError { path: path.to_owned(), problem };
        let provider = Arc::new(ring::default_provider());
        let anchors = certificates(&files.ca)?;
        let mut roots = RootCertStore::empty();
        for anchor in anchors {
            roots.add(anchor).map_err(|e| bad(&files.ca, format!("not a CA's certificate: {e}")))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&files.cert)?;
        let own = Identity::of(&chain[0]).ok_or_else(|| {
            let problem = "this certificate names no role in a Gabion cluster; gabion ca issue makes one";
            bad(&files.cert, problem.into())
        })?;
        if !roles.contains(&own.role) {
            let want: Vec<&str> = roles.iter().map(|r| r.name()).collect();
            let problem =
                format!("this certificate is of {own}, wanted is one of role {}", want.join(" or "));
            return Err(bad(&files.cert, problem));
        }
        if check {
            check_own(&chain, &roots, &provider).map_err(|problem| bad(&files.cert, problem))?;
        }
        let key = private_key(&files.key)?;
        let credentials = Credentials::new(own, roots, provider, &chain, &key)
            .map_err(|e| bad(&files.key, format!("does not go with {}: {e}", files.cert.display())))?;
        Ok(Security(Some(Arc::new(credentials))))
    }

    pub fn is_tls(&self) -> bool {
        self.0.is_some()
    }

    /// Who this process is to others.
    pub fn own(&self) -> Option<&Identity> {
        self.0.as_deref().map(|c| &c.own)
    }

    /// The client's handshake over `stream` with a daemon of role `want`; `None` when this process is plain.
    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        protocol: Protocol,
        want: Role,
    ) -> Option<io::Result<TlsStream>> {
        let credentials = self.0.as_deref()?;
        let connector =
            credentials.connectors.get(&(protocol, want)).expect("every role that serves is there");
        let name = ServerName::try_from(want.dns_name()).expect("a valid DNS name");
        let handshake = connector.connect_with(name, stream, |c| c.set_buffer_limit(Some(BUFFER_BYTES)));
        Some(handshake.await.map(TlsStream::Client).map_err(explained))
    }

    /// The server's handshake; `None` when this process is plain.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        protocol: Protocol,
    ) -> Option<io::Result<(TlsStream, Identity)>> {
        let acceptor = &self.0.as_deref()?.acceptors[&protocol];
        let handshake = acceptor.accept_with(stream, |c| c.set_buffer_limit(Some(BUFFER_BYTES)));
        Some(handshake.await.map_err(explained).and_then(|stream| {
            let certs = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let peer = certs.first().and_then(Identity::of).ok_or_else(|| Refusal::NoIdentity.into_io())?;
            Ok((TlsStream::Server(stream), peer))
        }))
    }
}

/// The error with the sentence in place of the library's words.
fn explained(error: io::Error) -> io::Error {
    match Refusal::of_handshake(&error) {
        Some(refusal) => io::Error::new(error.kind(), refusal),
        None => error,
    }
}

impl Credentials {
    fn new(
        own: Identity,
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
        chain: &[CertificateDer<'static>],
        key: &PrivateKeyDer<'static>,
    ) -> Result<Credentials, rustls::Error> {
        let versions = &[&rustls::version::TLS13];
        let mut acceptors = BTreeMap::new();
        let mut connectors = BTreeMap::new();
        for protocol in [Protocol::Grpc, Protocol::Data] {
            let signed = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
                .build()
                .map_err(|e| rustls::Error::General(e.to_string()))?;
            let clients = Arc::new(Clients { signed, cluster: own.cluster.clone() });
            let mut config = ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(versions)?
                .with_client_cert_verifier(clients)
                .with_single_cert(chain.to_vec(), key.clone_key())?;
            config.alpn_protocols = vec![protocol.alpn()];
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            acceptors.insert(protocol, TlsAcceptor::from(Arc::new(config)));
            for want in Role::ALL.into_iter().filter(|r| r.serves()) {
                let servers = Arc::new(Servers {
                    roots: roots.clone(),
                    algorithms: provider.signature_verification_algorithms,
                    cluster: own.cluster.clone(),
                    want,
                });
                let mut config = ClientConfig::builder_with_provider(provider.clone())
                    .with_protocol_versions(versions)?
                    .dangerous()
                    .with_custom_certificate_verifier(servers)
                    .with_client_auth_cert(chain.to_vec(), key.clone_key())?;
                config.alpn_protocols = vec![protocol.alpn()];
                config.resumption = Resumption::disabled();
                connectors.insert((protocol, want), TlsConnector::from(Arc::new(config)));
            }
        }
        Ok(Credentials { own, acceptors, connectors })
    }
}

/// Whether others will take this certificate, now and for some time.
fn check_own(
    chain: &[CertificateDer<'static>],
    roots: &RootCertStore,
    provider: &CryptoProvider,
) -> Result<(), String> {
    let cert = EndEntityCert::try_from(&chain[0]).map_err(|e| format!("not a usable certificate: {e}"))?;
    let at = |time: UnixTime| {
        let algorithms = provider.signature_verification_algorithms.all;
        let usage = KeyUsage::client_auth();
        cert.verify_for_usage(algorithms, &roots.roots, &chain[1..], time, usage, None, None).map(drop)
    };
    let now = UnixTime::now();
    at(now).map_err(|e| match e {
        webpki::Error::CertExpired { .. } => {
            "this certificate has expired; gabion ca issue makes a new one".into()
        }
        webpki::Error::CertNotValidYet { .. } => {
            "this certificate is not valid yet; is the clock right?".into()
        }
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            "this certificate is not from the CA that is given with it".to_owned()
        }
        other => format!("not a usable certificate: {other}"),
    })?;
    if at(UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + EXPIRES_SOON)).is_err() {
        tracing::warn!(
            "this daemon's certificate, or the CA's, expires within 30 days: issue a new one and restart"
        );
    }
    Ok(())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsConfigError> {
    let bad = |problem: String| TlsConfigError { path: path.to_owned(), problem };
    let text = read(path)?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).take(CERTIFICATES_MAX).collect();
    let certs = parsed.map_err(|e| bad(format!("not a PEM certificate: {e}")))?;
    if certs.is_empty() {
        return Err(bad("holds no PEM certificate".into()));
    }
    Ok(certs)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsConfigError> {
    let bad = |problem: String| TlsConfigError { path: path.to_owned(), problem };
    let text = read(path)?;
    let mode = std::fs::metadata(path).map_err(|e| bad(e.to_string()))?.permissions().mode();
    if mode & 0o007 != 0 {
        return Err(bad(format!(
            "a private key that everybody can read (mode {:04o}); chmod 600 it",
            mode & 0o7777
        )));
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|e| bad(format!("not a PEM private key: {e}")))
}

fn read(path: &Path) -> Result<Vec<u8>, TlsConfigError> {
    let bad = |problem: String| TlsConfigError { path: path.to_owned(), problem };
    let length = std::fs::metadata(path).map_err(|e| bad(e.to_string()))?.len();
    if length > FILE_BYTES_MAX {
        return Err(bad(format!("has more than {FILE_BYTES_MAX} bytes")));
    }
    std::fs::read(path).map_err(|e| bad(e.to_string()))
}
