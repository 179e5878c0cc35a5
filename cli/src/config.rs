//! Where the monitors are and by which certificate they are asked: the flags, else the first config
//! file found.

use anyhow::{Context, Result, bail, ensure};
use gabion_common::tls::{Role, Security, TlsFiles};
use serde::{Deserialize, Serialize};
use std::env;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// `client.toml`, written by `gabion dev up` or by whoever deploys the cluster.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ClientConfig {
    /// Each `ip:port`.
    pub monitors: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSection>,
}

/// PEM files; a relative path starts at the config file's directory.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// What the flags say.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub monitors: Vec<String>,
    pub tls_ca: Option<PathBuf>,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
}

/// The cluster to talk to, validated.
#[derive(Clone, Debug)]
pub struct Target {
    pub monitors: Vec<String>,
    pub security: Security,
}

/// The files that are looked for, first to last. `GABION_CONFIG` excludes all others.
pub fn candidates(config: Option<PathBuf>, home: Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(path) = config {
        return vec![path];
    }
    let mut paths = vec![PathBuf::from(".gabion/client.toml")];
    paths.extend(home.map(|home| home.join(".config/gabion/client.toml")));
    paths.push(PathBuf::from("/etc/gabion/client.toml"));
    paths
}

/// The cluster that flags and files name. `--monitors` replaces the file's monitors and the `--tls` flags its
/// certificate; each leaves the other as the file has it.
pub fn target(flags: &Flags) -> Result<Target> {
    let files = flags.tls()?;
    if !flags.monitors.is_empty() && files.is_some() {
        return flags.over(None, files);
    }
    let explicit = env::var_os("GABION_CONFIG").filter(|v| !v.is_empty()).map(PathBuf::from);
    let named = explicit.is_some();
    let home = env::var_os("HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let file = candidates(explicit, home).into_iter().find(|path| named || path.exists());
    match file {
        Some(path) => flags.over(Some((parse(&path)?, path)), files),
        None => flags.over(None, files),
    }
}

/// What one config file says.
pub fn read(path: &Path) -> Result<Target> {
    Flags::default().over(Some((parse(path)?, path.to_owned())), None)
}

fn parse(path: &Path) -> Result<ClientConfig> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read config file {shown}"))?;
    toml::from_str(&text).map_err(|e| anyhow::anyhow!("config file {shown}: {}", e.message()))
}

impl Flags {
    fn tls(&self) -> Result<Option<TlsFiles>> {
        match (&self.tls_ca, &self.tls_cert, &self.tls_key) {
            (Some(ca), Some(cert), Some(key)) => {
                Ok(Some(TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone() }))
            }
            (None, None, None) => Ok(None),
            _ => bail!("--tls-ca, --tls-cert and --tls-key go together; give all three"),
        }
    }

    fn over(&self, file: Option<(ClientConfig, PathBuf)>, tls: Option<TlsFiles>) -> Result<Target> {
        let (config, path) = file.unzip();
        let monitors = match config.as_ref() {
            _ if !self.monitors.is_empty() => {
                checked(self.monitors.clone(), "--monitors or GABION_MONITORS")?
            }
            Some(config) => {
                let source = path.as_deref().map_or_else(String::new, |p| p.display().to_string());
                checked(config.monitors.clone(), &format!("config file {source}"))?
            }
            None => bail!(
                "no cluster is known: start one with gabion dev up, or give --monitors IP:PORT, GABION_MONITORS or GABION_CONFIG"
            ),
        };
        let base = path.as_deref().and_then(Path::parent).unwrap_or(Path::new(""));
        let tls = tls.or_else(|| {
            let section = config?.tls?;
            Some(TlsFiles {
                ca: base.join(section.ca),
                cert: base.join(section.cert),
                key: base.join(section.key),
            })
        });
        let security = match tls {
            Some(files) => Security::load(&files, &[Role::Admin, Role::Viewer])?,
            None => Security::plain(),
        };
        Ok(Target { monitors, security })
    }
}

fn checked(monitors: Vec<String>, source: &str) -> Result<Vec<String>> {
    ensure!(!monitors.is_empty(), "{source}: no monitors are given; name at least one as IP:PORT");
    for addr in &monitors {
        ensure!(addr.parse::<SocketAddr>().is_ok(), "{source}: monitor {addr:?} is not IP:PORT");
    }
    Ok(monitors)
}
