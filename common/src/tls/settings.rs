//! The TLS options of a daemon, the same for all.

use super::credentials::{Security, TlsConfigError, TlsFiles};
use super::identity::Role;
use std::net::SocketAddr;
use std::path::PathBuf;

#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// The cluster's CA (PEM); turns TLS on, for what this process serves and for what it connects to.
    #[arg(long, value_name = "FILE", requires = "tls_cert", requires = "tls_key")]
    pub tls_ca: Option<PathBuf>,
    /// This process's certificate (PEM); see gabion ca issue.
    #[arg(long, value_name = "FILE", requires = "tls_ca")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM), not readable by everybody.
    #[arg(long, value_name = "FILE", requires = "tls_ca")]
    pub tls_key: Option<PathBuf>,
}

impl TlsArgs {
    /// What the options come to, for a process that is one of `roles`.
    pub fn security(&self, roles: &[Role]) -> Result<Security, TlsConfigError> {
        match (&self.tls_ca, &self.tls_cert, &self.tls_key) {
            (Some(ca), Some(cert), Some(key)) => {
                let files = TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone() };
                Security::load(&files, roles)
            }
            // The command line admits all or none.
            _ => Ok(Security::plain()),
        }
    }
}

/// What a daemon that listens takes beside [`TlsArgs`].
#[derive(clap::Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "TLS")]
pub struct ListenArgs {
    /// Serve without TLS even where others than this machine can connect: whoever can, can read and
    /// change every volume.
    #[arg(long, conflicts_with = "tls_ca")]
    pub insecure: bool,
}

/// A daemon that would serve everybody.
#[derive(Debug, thiserror::Error)]
#[error(
    "refusing to listen on {0} without TLS: whoever connects can read and change every volume; give --tls-ca, \
     --tls-cert and --tls-key, or --insecure to do it all the same"
)]
pub struct Exposed(SocketAddr);

impl ListenArgs {
    /// Whether this process may listen on `addr`.
    pub fn check(self, security: &Security, addr: SocketAddr) -> Result<(), Exposed> {
        if security.is_tls() || addr.ip().is_loopback() {
            return Ok(());
        }
        if !self.insecure {
            return Err(Exposed(addr));
        }
        tracing::warn!(%addr, "INSECURE: serving without TLS; whoever connects can read and change every volume");
        Ok(())
    }
}
