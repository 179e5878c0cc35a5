//! The cluster's certificate authority: two files that are used offline, by `gabion ca`.
//!
//! `ca.crt` goes to every process, `ca.key` to nobody: who has it can be anybody in the cluster. Keys are ECDSA
//! P-256, which every TLS library takes. Whoever issues a certificate makes its key, too.

use super::identity::{Identity, Role};
use crate::addr_file;
use gabion_proto::limits::valid_name;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};

/// Clocks of a cluster differ by less.
const BACKDATED: Duration = Duration::hours(1);
/// The longest that anything may be valid for.
pub const DAYS_MAX: u32 = 36_500;

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: exists; it is never overwritten", .0.display())]
    Exists(PathBuf),
    #[error("{}: not a CA that gabion ca create made: {problem}", path.display())]
    NotACa { path: PathBuf, problem: String },
    #[error("{what} name {name:?}: use 1 to 64 of a-z A-Z 0-9 . _ -")]
    Name { what: &'static str, name: String },
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// A certificate and its key, as PEM.
pub struct Issued {
    pub cert_pem: String,
    pub key_pem: String,
}

/// What to put into a certificate.
pub struct Request {
    pub role: Role,
    pub name: String,
    /// Where clients that are not Gabion's find it.
    pub addresses: Vec<IpAddr>,
    pub days: u32,
}

/// A CA, with its key in memory.
pub struct Authority {
    cluster: String,
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn named(cluster: &str) -> Result<CertificateParams, AuthorityError> {
    if !valid_name(cluster) {
        return Err(AuthorityError::Name { what: "cluster", name: cluster.to_owned() });
    }
    let mut params = CertificateParams::default();
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::OrganizationName, "Gabion");
    params.distinguished_name.push(DnType::CommonName, format!("CA of cluster {cluster}"));
    params.subject_alt_names = vec![SanType::URI(ca_uri(cluster).try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn ca_uri(cluster: &str) -> String {
    format!("gabion://{cluster}/ca")
}

/// From when to when something is valid.
pub(super) type Period = (OffsetDateTime, OffsetDateTime);

fn from_now(days: u32) -> Period {
    let now = OffsetDateTime::now_utc();
    (now - BACKDATED, now + Duration::days(i64::from(days.min(DAYS_MAX))))
}

impl Authority {
    /// A new CA for the cluster called `cluster`.
    pub fn new(cluster: &str, days: u32) -> Result<(Authority, Issued), AuthorityError> {
        let mut params = named(cluster)?;
        (params.not_before, params.not_after) = from_now(days);
        let key = KeyPair::generate()?;
        let made = Issued { cert_pem: params.self_signed(&key)?.pem(), key_pem: key.serialize_pem() };
        let issuer = Issuer::new(params, key);
        Ok((Authority { cluster: cluster.to_owned(), ca_pem: made.cert_pem.clone(), issuer }, made))
    }

    /// Makes a CA in `dir`, as `ca.crt` and `ca.key`.
    pub fn create(dir: &Path, cluster: &str, days: u32) -> Result<Authority, AuthorityError> {
        let (cert, key) = (dir.join("ca.crt"), dir.join("ca.key"));
        for path in [&cert, &key] {
            if path.exists() {
                return Err(AuthorityError::Exists(path.clone()));
            }
        }
        let (authority, made) = Authority::new(cluster, days)?;
        make_dir(dir)?;
        write(&key, &made.key_pem, 0o600)?;
        write(&cert, &made.cert_pem, 0o644)?;
        Ok(authority)
    }

    /// The CA in `dir`.
    pub fn open(dir: &Path) -> Result<Authority, AuthorityError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|source| AuthorityError::File { path: path.to_owned(), source })
        };
        let (cert, key) = (dir.join("ca.crt"), dir.join("ca.key"));
        let ca_pem = read(&cert)?;
        let not_ours =
            |problem: &str| AuthorityError::NotACa { path: cert.clone(), problem: problem.to_owned() };
        let der = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(|e| not_ours(&e.to_string()))?;
        let parsed = webpki::EndEntityCert::try_from(&der).map_err(|e| not_ours(&e.to_string()))?;
        let uri = parsed.valid_uri_names().next().unwrap_or_default();
        let cluster = uri.strip_prefix("gabion://").and_then(|u| u.strip_suffix("/ca")).unwrap_or_default();
        if !valid_name(cluster) {
            return Err(not_ours("it names no cluster"));
        }
        let pair = KeyPair::from_pem(&read(&key)?)
            .map_err(|e| AuthorityError::NotACa { path: key, problem: e.to_string() })?;
        let issuer = Issuer::new(named(cluster)?, pair);
        Ok(Authority { cluster: cluster.to_owned(), ca_pem, issuer })
    }

    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    pub fn issue(&self, request: &Request) -> Result<Issued, AuthorityError> {
        self.issue_in(&self.cluster, request, from_now(request.days))
    }

    pub(super) fn issue_in(
        &self,
        cluster: &str,
        request: &Request,
        period: Period,
    ) -> Result<Issued, AuthorityError> {
        if !valid_name(&request.name) {
            return Err(AuthorityError::Name { what: "certificate", name: request.name.clone() });
        }
        let identity =
            Identity { cluster: cluster.to_owned(), role: request.role, name: request.name.clone() };
        let mut params = CertificateParams::default();
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::OrganizationName, "Gabion");
        params.distinguished_name.push(DnType::CommonName, format!("{} {}", request.role, request.name));
        params.subject_alt_names = vec![SanType::URI(identity.uri().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        if request.role.serves() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
            params.subject_alt_names.push(SanType::DnsName(request.role.dns_name().try_into()?));
            params.subject_alt_names.extend(request.addresses.iter().copied().map(SanType::IpAddress));
        }
        (params.not_before, params.not_after) = period;
        let key = KeyPair::generate()?;
        Ok(Issued { cert_pem: params.signed_by(&key, &self.issuer)?.pem(), key_pem: key.serialize_pem() })
    }

    /// Issues a certificate as `STEM.crt` and `STEM.key` in `dir`, with `ca.crt` beside them. An existing
    /// certificate is replaced only when `renew` says so.
    pub fn issue_into(
        &self,
        dir: &Path,
        stem: &str,
        request: &Request,
        renew: bool,
    ) -> Result<super::TlsFiles, AuthorityError> {
        let [ca, cert, key] =
            ["ca.crt".into(), format!("{stem}.crt"), format!("{stem}.key")].map(|f| dir.join(f));
        if cert.exists() && !renew {
            return Err(AuthorityError::Exists(cert));
        }
        let issued = self.issue(request)?;
        make_dir(dir)?;
        // The certificate last: it says that all is there.
        write(&key, &issued.key_pem, 0o600)?;
        write(&ca, &self.ca_pem, 0o644)?;
        write(&cert, &issued.cert_pem, 0o644)?;
        Ok(super::TlsFiles { ca, cert, key })
    }
}

fn make_dir(dir: &Path) -> Result<(), AuthorityError> {
    use std::os::unix::fs::DirBuilderExt;
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(dir);
    made.map_err(|source| AuthorityError::File { path: dir.to_owned(), source })
}

/// Replaces `path` as a whole; nobody but those whom `mode` admits ever sees the content.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), AuthorityError> {
    let put = || {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let _ = std::fs::remove_file(&new);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        addr_file::sync_parent(path)
    };
    put().map_err(|source| AuthorityError::File { path: path.to_owned(), source })
}
