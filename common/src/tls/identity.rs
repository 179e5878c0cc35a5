//! Who a certificate is for: one subject alternative name `gabion://CLUSTER/ROLE/NAME`.

use gabion_proto::limits::valid_name;
use rustls::pki_types::CertificateDer;
use std::fmt;
use std::str::FromStr;
use webpki::EndEntityCert;

const SCHEME: &str = "gabion://";

/// What the holder of a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Monitor,
    Osd,
    Gateway,
    Host,
    /// An operator: everything that the command can do.
    Admin,
    /// A program that only watches: status, health, events, rebuilds.
    Viewer,
}

impl Role {
    pub const ALL: [Role; 6] =
        [Role::Monitor, Role::Osd, Role::Gateway, Role::Host, Role::Admin, Role::Viewer];

    pub fn name(self) -> &'static str {
        match self {
            Role::Monitor => "monitor",
            Role::Osd => "osd",
            Role::Gateway => "gateway",
            Role::Host => "host",
            Role::Admin => "admin",
            Role::Viewer => "viewer",
        }
    }

    /// Whether others connect to it.
    pub fn serves(self) -> bool {
        matches!(self, Role::Monitor | Role::Osd | Role::Host)
    }

    /// The DNS name in every certificate of the role: for TLS libraries that insist on one.
    pub fn dns_name(self) -> String {
        format!("{}.gabion", self.name())
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(text: &str) -> Result<Role, String> {
        Role::ALL.into_iter().find(|r| r.name() == text).ok_or_else(|| {
            let all: Vec<&str> = Role::ALL.iter().map(|r| r.name()).collect();
            format!("role {text:?} is none of {}", all.join(", "))
        })
    }
}

/// The validated content of a certificate's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub cluster: String,
    pub role: Role,
    /// For people: a host, or an operator.
    pub name: String,
}

impl Identity {
    pub fn uri(&self) -> String {
        format!("{SCHEME}{}/{}/{}", self.cluster, self.role, self.name)
    }

    /// What `cert` says; `None` when that is not exactly one identity.
    pub fn of(cert: &CertificateDer<'_>) -> Option<Identity> {
        let cert = EndEntityCert::try_from(cert).ok()?;
        let mut names = cert.valid_uri_names().filter(|n| n.starts_with(SCHEME));
        let identity = names.next()?.parse().ok()?;
        names.next().is_none().then_some(identity)
    }
}

impl FromStr for Identity {
    type Err = ();
    fn from_str(uri: &str) -> Result<Identity, ()> {
        let mut parts = uri.strip_prefix(SCHEME).ok_or(())?.split('/');
        let mut part = || parts.next().filter(|p| valid_name(p)).ok_or(());
        let (cluster, role, name) = (part()?, part()?, part()?);
        if parts.next().is_some() {
            return Err(());
        }
        let role = role.parse().map_err(|_| ())?;
        Ok(Identity { cluster: cluster.to_owned(), role, name: name.to_owned() })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of cluster {}", self.role, self.name, self.cluster)
    }
}
