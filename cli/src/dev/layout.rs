//! What is where under the directory of a development cluster, and the two files that describe it.
//!
//! ```text
//! dev.toml           what the cluster is (written once by dev up)
//! client.toml        the monitors, for every other command
//! supervisor.json    the daemons as they are (written by the supervisor)
//! supervisor.sock    start, stop and kill of one daemon
//! log/KIND.ID.log    what each daemon prints
//! tls/               CA and certificates (dev up --tls)
//! monitor.N/ osd-N/ gateway.host1/ host.host1/
//! ```

use super::process::Process;
use crate::config::Target;
use anyhow::{Context, Result};
use gabion_common::addr_file;
use gabion_common::tls::{Role, Security, TlsFiles};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevConfig {
    /// Of monitor 1, 2, ...; kept for good: everybody finds them there.
    pub monitor_addrs: Vec<SocketAddr>,
    pub osds: u32,
    pub hosts: u32,
    pub osd_size_bytes: u64,
    pub restart: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_out_secs: Option<u64>,
    /// TLS between all, by the CA in `tls/`.
    #[serde(default)]
    pub tls: bool,
}

impl DevConfig {
    pub fn monitors(&self) -> Vec<String> {
        self.monitor_addrs.iter().map(SocketAddr::to_string).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Monitor,
    Osd,
    Gateway,
    Host,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Monitor => "monitor",
            Kind::Osd => "osd",
            Kind::Gateway => "gateway",
            Kind::Host => "host",
        }
    }
}

/// What the supervisor knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    pub supervisor: Process,
    pub daemons: Vec<DaemonState>,
    /// Why it gave up; the supervisor ends after this.
    #[serde(default)]
    pub failed: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DaemonState {
    pub kind: Kind,
    pub id: String,
    pub data_dir: PathBuf,
    pub process: Option<Process>,
    pub restarts: u32,
    /// How it ended last.
    pub last_exit: Option<String>,
}

impl DaemonState {
    pub fn name(&self) -> String {
        format!("{}.{}", self.kind.name(), self.id)
    }
    pub fn is_running(&self) -> bool {
        self.process.is_some_and(|p| p.is_alive())
    }
    /// Where it listens, as it says itself.
    pub fn addr(&self) -> Option<String> {
        self.addr_in(self.kind.name())
    }
    /// Where it serves metrics.
    pub fn metrics_addr(&self) -> Option<String> {
        self.addr_in(&format!("{}-metrics", self.kind.name()))
    }
    fn addr_in(&self, file: &str) -> Option<String> {
        let text = std::fs::read_to_string(addr_file::path(&self.data_dir, file)).ok()?;
        let addr: SocketAddr = text.trim().parse().ok()?;
        Some(addr.to_string())
    }
}

/// The directory; absolute.
#[derive(Clone, Debug)]
pub struct Layout {
    pub dir: PathBuf,
}

impl Layout {
    pub fn new(dir: &Path) -> Result<Layout> {
        Ok(Layout { dir: std::path::absolute(dir).with_context(|| format!("{}", dir.display()))? })
    }
    pub fn dev_toml(&self) -> PathBuf {
        self.dir.join("dev.toml")
    }
    pub fn client_toml(&self) -> PathBuf {
        self.dir.join("client.toml")
    }
    /// The files of the certificate for `role`.
    pub fn tls(&self, role: Role) -> TlsFiles {
        let dir = self.dir.join("tls");
        TlsFiles {
            ca: dir.join("ca.crt"),
            cert: dir.join(format!("{role}.crt")),
            key: dir.join(format!("{role}.key")),
        }
    }
    pub fn state_file(&self) -> PathBuf {
        self.dir.join("supervisor.json")
    }
    pub fn socket(&self) -> PathBuf {
        self.dir.join("supervisor.sock")
    }
    pub fn monitor(&self, id: usize) -> PathBuf {
        self.dir.join(format!("monitor.{id}"))
    }
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }

    pub fn config(&self) -> Result<Option<DevConfig>> {
        let path = self.dev_toml();
        if !path.exists() {
            return Ok(None);
        }
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config =
            toml::from_str(&text).map_err(|e| anyhow::anyhow!("{}: {}", path.display(), e.message()))?;
        Ok(Some(config))
    }

    pub fn write_config(&self, config: &DevConfig) -> Result<()> {
        let text = toml::to_string(config)?;
        addr_file::replace(&self.dev_toml(), text.as_bytes())
            .with_context(|| format!("cannot write {}", self.dev_toml().display()))
    }

    /// How the command and the supervisor connect.
    pub fn target(&self, config: &DevConfig) -> Result<Target> {
        let security = match config.tls {
            true => Security::load(&self.tls(Role::Admin), &[Role::Admin])?,
            false => Security::plain(),
        };
        Ok(Target { monitors: config.monitors(), security })
    }

    /// None when no supervisor ever ran here.
    pub fn state(&self) -> Result<Option<State>> {
        let path = self.state_file();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(Some(serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?))
    }
}
