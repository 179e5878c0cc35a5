//! The monitors that a client knows: those it was given, and those that a monitor named.

use super::MonitorAddressError;
use super::headers;
use crate::grpc::Connector;
use crate::tls::{Role, Security};
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Monitors that one client keeps connections to.
const MONITORS_MAX: usize = 16;

/// One monitor: where it is and the connection to it, made when it is used.
#[derive(Clone)]
pub(super) struct Entry {
    pub addr: SocketAddr,
    pub channel: Channel,
}

impl Entry {
    fn new(addr: SocketAddr, security: &Security) -> Option<Entry> {
        let endpoint = Endpoint::from_shared(format!("http://{addr}")).ok()?;
        let channel = endpoint
            // A monitor whose machine is gone closes nothing: calls and streams must notice all the same.
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3))
            .connect_with_connector_lazy(Connector::new(
                addr,
                security.clone(),
                Role::Monitor,
                CONNECT_TIMEOUT,
            ));
        Some(Entry { addr, channel })
    }
}

struct Known {
    entries: Vec<Entry>,
    /// The first ones were given and are kept; the rest was learned.
    given: usize,
    /// What was learned last, as it was written.
    learned: String,
    security: Security,
}

/// Which monitors there are, known together with all forks, and which one to ask.
pub(super) struct Table {
    // Both are held to look up or change an entry only; `current` is taken first.
    current: Mutex<SocketAddr>,
    known: Arc<Mutex<Known>>,
}

impl Table {
    pub fn new<A: AsRef<str>>(addrs: &[A], security: Security) -> Result<Table, MonitorAddressError> {
        let mut entries: Vec<Entry> = Vec::new();
        for addr in addrs {
            let addr = addr.as_ref();
            let malformed = || MonitorAddressError::Malformed { addr: addr.to_owned() };
            let parsed: SocketAddr = addr.parse().map_err(|_| malformed())?;
            if !entries.iter().any(|e| e.addr == parsed) {
                entries.push(Entry::new(parsed, &security).ok_or_else(malformed)?);
            }
        }
        let first = entries.first().ok_or(MonitorAddressError::None)?.addr;
        let given = entries.len();
        let known = Arc::new(Mutex::new(Known { entries, given, learned: String::new(), security }));
        Ok(Table { current: Mutex::new(first), known })
    }

    /// One that goes its own way among the same monitors.
    pub fn fork(&self) -> Table {
        Table { current: Mutex::new(*self.current.lock()), known: self.known.clone() }
    }

    pub fn security(&self) -> Security {
        self.known.lock().security.clone()
    }

    pub fn len(&self) -> usize {
        self.known.lock().entries.len()
    }

    pub fn current(&self) -> Entry {
        let mut current = self.current.lock();
        let known = self.known.lock();
        let entry = known.position(*current).map_or(&known.entries[0], |at| &known.entries[at]);
        *current = entry.addr;
        entry.clone()
    }

    /// Goes to the next monitor, unless somebody went away from `at` already.
    pub fn leave(&self, at: Option<SocketAddr>) {
        let mut current = self.current.lock();
        if at.is_none_or(|at| *current == at) {
            let known = self.known.lock();
            let next = known.position(*current).map_or(0, |at| at + 1) % known.entries.len();
            *current = known.entries[next].addr;
        }
    }

    /// Takes in what an answer says of the monitors; the leader, if it names one, is asked next.
    pub fn learn(&self, metadata: &MetadataMap) -> Option<SocketAddr> {
        let text = |key| metadata.get(key).and_then(|v| v.to_str().ok());
        let mut current = self.current.lock();
        let mut known = self.known.lock();
        let all = text(headers::MONITORS).unwrap_or_default();
        if known.learned != all {
            known.learned = all.to_owned();
            for addr in all.split(',').filter_map(|a| a.parse().ok()).take(MONITORS_MAX) {
                known.take_in(addr);
            }
        }
        let leader: SocketAddr = text(headers::LEADER)?.parse().ok()?;
        known.take_in(leader)?;
        *current = leader;
        Some(leader)
    }
}

impl Known {
    fn position(&self, addr: SocketAddr) -> Option<usize> {
        self.entries.iter().position(|e| e.addr == addr)
    }

    fn take_in(&mut self, addr: SocketAddr) -> Option<()> {
        if self.position(addr).is_none() {
            let entry = Entry::new(addr, &self.security)?;
            if self.entries.len() >= MONITORS_MAX.max(self.given + 1) {
                // The one learned first gives way.
                self.entries.remove(self.given);
            }
            self.entries.push(entry);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(leader: &str, monitors: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        headers::put(&mut metadata, headers::LEADER, leader);
        headers::put(&mut metadata, headers::MONITORS, monitors);
        metadata
    }

    #[tokio::test]
    async fn goes_where_the_leader_is_said_to_be() {
        let table = Table::new(&["127.0.0.1:1", "127.0.0.1:2"], Security::plain()).unwrap();
        let leader = table.learn(&says("127.0.0.1:2", ""));
        assert_eq!((leader, table.current().addr), ("127.0.0.1:2".parse().ok(), leader.unwrap()));
        // One that was added since this client was started.
        table.learn(&says("127.0.0.1:3", "127.0.0.1:4"));
        assert_eq!((table.current().addr.port(), table.len()), (3, 4));
        assert_eq!(table.learn(&says("garbage", "x,y,,")), None);
        assert_eq!((table.current().addr.port(), table.len()), (3, 4));
    }

    #[tokio::test]
    async fn does_not_grow_without_bound_and_keeps_what_it_was_given() {
        let table = Table::new(&["127.0.0.1:1"], Security::plain()).unwrap();
        for port in 1000..2000 {
            table.learn(&says(&format!("127.0.0.1:{port}"), ""));
            assert_eq!(table.current().addr.port(), port);
        }
        assert_eq!(table.len(), MONITORS_MAX);
        let ports: Vec<u16> = (0..MONITORS_MAX)
            .map(|_| {
                table.leave(None);
                table.current().addr.port()
            })
            .collect();
        assert!(ports.contains(&1), "{ports:?}");
    }

    #[tokio::test]
    async fn forks_share_what_they_know_but_not_whom_they_ask() {
        let table = Table::new(&["127.0.0.1:1"], Security::plain()).unwrap();
        let fork = table.fork();
        table.learn(&says("", "127.0.0.1:1,127.0.0.1:2"));
        fork.leave(None);
        assert_eq!((table.current().addr.port(), fork.current().addr.port()), (1, 2));
    }

    #[tokio::test]
    async fn two_that_leave_the_same_monitor_do_not_skip_one() {
        let table = Table::new(&["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"], Security::plain()).unwrap();
        let at = Some(table.current().addr);
        table.leave(at);
        table.leave(at);
        assert_eq!(table.current().addr.port(), 2);
    }
}
