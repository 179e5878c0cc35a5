//! The metrics pages of a cluster's daemons.

use crate::cluster::Cluster;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Figures by name and labels, as they are written.
pub type Page = BTreeMap<String, f64>;

pub fn scrape(addr: &str) -> Result<Page> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
    ensure!(body.ends_with("# EOF\n"), "the page is cut: {body}");
    let lines = body.lines().filter(|l| !l.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            // Empty labels say the same as none.
            let name = name.trim_end_matches("{}");
            Ok((name.to_owned(), value.parse().with_context(|| line.to_owned())?))
        })
        .collect()
}

/// Of every daemon of a kind.
pub fn of(cluster: &Cluster, kind: &str) -> Result<Vec<Page>> {
    let daemons = cluster.daemons()?;
    let of_kind = daemons.iter().filter(|d| d["kind"] == kind);
    let addrs = of_kind.map(|d| d["metrics_addr"].as_str().with_context(|| format!("no address: {d}")));
    addrs.map(|addr| scrape(addr?)).collect()
}

/// The sum of one figure over pages.
pub fn sum(pages: &[Page], name: &str) -> f64 {
    pages.iter().filter_map(|p| p.get(name)).sum()
}
