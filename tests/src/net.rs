//! Hosts with networks of their own: network namespaces, joined by a bridge in one more. What is cut between two of them is cut silently,
//! one way or both, as by a switch port that died.
//!
//! Needs root and `ip` (iproute2). A way is cut by a permanent neighbour entry with a link address that no host has: packets leave, and
//! nobody takes them.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

const HOSTS_MAX: u8 = 32;
/// Nobody has it.
const NOWHERE: &str = "02:67:61:62:ff:ff";

/// They are gone when this is dropped.
pub struct Net {
    name: String,
    hosts: u8,
    /// From whom nothing comes to whom.
    cut: Mutex<BTreeSet<(u8, u8)>>,
}

fn ip<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(args: I) -> Result<()> {
    let mut command = Command::new("ip");
    let out =
        command.args(args).stdin(Stdio::null()).output().context("cannot start ip: install iproute2")?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}

impl Net {
    /// Hosts 0 to `hosts` - 1. None, and why on the console: that cannot be done here.
    pub fn of(hosts: u8) -> Result<Option<Net>> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        ensure!(hosts <= HOSTS_MAX, "too many hosts");
        let name = format!("gab{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let net = Net { name, hosts, cut: Mutex::default() };
        if let Err(why) = ip(["netns", "add", &net.bridge()]) {
            println!("SKIPPED: no network namespaces can be made here (root, iproute2): {why:#}");
            return Ok(None);
        }
        net.connect()?;
        Ok(Some(net))
    }

    fn connect(&self) -> Result<()> {
        let bridge = self.bridge();
        ip(["-n", &bridge, "link", "add", "name", "br0", "type", "bridge"])?;
        ip(["-n", &bridge, "link", "set", "br0", "up"])?;
        for host in 0..self.hosts {
            let (space, port) = (self.space(host), format!("port{host}"));
            ip(["netns", "add", &space])?;
            ip(["-n", &space, "link", "set", "lo", "up"])?;
            let pair = ["type", "veth", "peer", "name", "eth0", "address", &link(host), "netns", &space];
            ip(["-n", &bridge, "link", "add", "name", &port].iter().chain(&pair))?;
            ip(["-n", &bridge, "link", "set", &port, "master", "br0", "up"])?;
            ip(["-n", &space, "address", "add", &format!("{}/24", Net::addr(host)), "dev", "eth0"])?;
            ip(["-n", &space, "link", "set", "eth0", "up"])?;
        }
        Ok(())
    }

    fn bridge(&self) -> String {
        format!("{}-bridge", self.name)
    }

    fn space(&self, host: u8) -> String {
        format!("{}-{host}", self.name)
    }

    pub fn addr(host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 67, 0, host + 1)
    }

    /// What to put before a command that is to run at the host. It stays the same process.
    pub fn enter(&self, host: u8) -> Vec<String> {
        ["ip", "netns", "exec", &self.space(host)].map(str::to_owned).to_vec()
    }

    /// From now on nothing of what `from` sends comes to `to`.
    pub fn cut(&self, from: &[u8], to: &[u8]) -> Result<()> {
        for (from, to) in pairs(from, to) {
            self.neighbour(from, to, &["replace"], &["lladdr", NOWHERE, "nud", "permanent"])?;
            self.cut.lock().unwrap_or_else(PoisonError::into_inner).insert((from, to));
        }
        Ok(())
    }

    /// Nor the other way.
    pub fn part(&self, some: &[u8], others: &[u8]) -> Result<()> {
        self.cut(some, others)?;
        self.cut(others, some)
    }

    /// Cut off from every other host.
    pub fn isolate(&self, host: u8) -> Result<()> {
        let others: Vec<u8> = (0..self.hosts).filter(|h| *h != host).collect();
        self.part(&[host], &others)
    }

    /// Everybody hears everybody again.
    pub fn heal(&self) -> Result<()> {
        let cut = std::mem::take(&mut *self.cut.lock().unwrap_or_else(PoisonError::into_inner));
        for (from, to) in cut {
            self.neighbour(from, to, &["del"], &[])?;
        }
        Ok(())
    }

    fn neighbour(&self, from: u8, to: u8, verb: &[&str], how: &[&str]) -> Result<()> {
        let (space, to) = (self.space(from), Net::addr(to).to_string());
        let head = ["-n", &space, "neighbour"];
        ip(head.iter().chain(verb).chain(&[to.as_str(), "dev", "eth0"]).chain(how))
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let spaces = (0..self.hosts).map(|host| self.space(host)).chain([self.bridge()]);
        for space in spaces {
            if let Err(e) = ip(["netns", "del", &space]) {
                println!("{e:#}");
            }
        }
    }
}

fn link(host: u8) -> String {
    format!("02:67:61:62:00:{host:02x}")
}

fn pairs(from: &[u8], to: &[u8]) -> impl Iterator<Item = (u8, u8)> {
    from.iter().flat_map(|f| to.iter().map(|t| (*f, *t))).filter(|(f, t)| f != t)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether what `from` sends comes to `to`: a datagram, by bash and a listener of Python.
    fn arrives(net: &Net, from: u8, to: u8) -> Result<bool> {
        let listen = format!(
            "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('{}', 9))\ns.settimeout(1)\nprint('ready', flush=True)\ns.recv(9)",
            Net::addr(to)
        );
        let enter = net.enter(to);
        let mut listener = Command::new(&enter[0])
            .args(&enter[1..])
            .args(["python3", "-c", &listen])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut ready = [0; 6];
        std::io::Read::read_exact(listener.stdout.as_mut().context("piped")?, &mut ready)?;
        let enter = net.enter(from);
        let send = format!("echo x > /dev/udp/{}/9", Net::addr(to));
        Command::new(&enter[0]).args(&enter[1..]).args(["bash", "-c", &send]).status()?;
        Ok(listener.wait()?.success())
    }

    #[test]
    fn a_way_is_cut_in_one_direction_and_healed() -> Result<()> {
        let Some(net) = Net::of(3)? else { return Ok(()) };
        assert!(arrives(&net, 0, 1)? && arrives(&net, 1, 0)?);
        net.cut(&[0], &[1])?;
        assert!(!arrives(&net, 0, 1)? && arrives(&net, 1, 0)? && arrives(&net, 0, 2)?);
        net.heal()?;
        net.isolate(2)?;
        assert!(arrives(&net, 0, 1)? && !arrives(&net, 0, 2)? && !arrives(&net, 2, 1)?);
        net.heal()?;
        assert!(arrives(&net, 2, 1)?);
        Ok(())
    }
}
