//! Where the monitors are: the flag or `GABION_MONITORS`, else the first config file found.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::env;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// `client.toml`, written by `gabion dev up` or by whoever deploys the cluster.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ClientConfig {
    /// Each `ip:port`.
    pub monitors: Vec<String>,
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

/// The monitors to talk to, validated.
pub fn monitors(flag: &[String]) -> Result<Vec<String>> {
    if !flag.is_empty() {
        return checked(flag.to_vec(), "--monitors or GABION_MONITORS");
    }
    let explicit = env::var_os("GABION_CONFIG").filter(|v| !v.is_empty()).map(PathBuf::from);
    let named = explicit.is_some();
    let home = env::var_os("HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    for path in candidates(explicit, home) {
        if named || path.exists() {
            return read(&path);
        }
    }
    bail!(
        "no cluster is known: start one with gabion dev up, or give --monitors IP:PORT, GABION_MONITORS or GABION_CONFIG"
    )
}

/// Reads one config file.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read config file {shown}"))?;
    let config: ClientConfig =
        toml::from_str(&text).map_err(|e| anyhow::anyhow!("config file {shown}: {}", e.message()))?;
    checked(config.monitors, &format!("config file {shown}"))
}

fn checked(monitors: Vec<String>, source: &str) -> Result<Vec<String>> {
    ensure!(!monitors.is_empty(), "{source}: no monitors are given; name at least one as IP:PORT");
    for addr in &monitors {
        ensure!(addr.parse::<SocketAddr>().is_ok(), "{source}: monitor {addr:?} is not IP:PORT");
    }
    Ok(monitors)
}
