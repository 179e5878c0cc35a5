//! The monitors that a client knows: those it was given, and those that a monitor named.

use super::MonitorAddressError;
use super::headers;
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::time::Duration;
use tonic::Status;
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
    fn new(addr: SocketAddr) -> Option<Entry> {
        let endpoint = Endpoint::from_shared(format!("http://{addr}")).ok()?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            // A monitor whose machine is gone closes nothing: calls and streams must notice all the same.
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3))
            .connect_lazy();
        Some(Entry { addr, channel })
    }
}

struct Known {
    entries: Vec<Entry>,
    /// The first ones were given and are kept; the rest was learned.
    given: usize,
    current: usize,
}

/// Which monitors there are and which one to ask.
pub(super) struct Table {
    // Held to look up or change an entry only.
    known: Mutex<Known>,
}

impl Table {
    pub fn new<A: AsRef<str>>(addrs: &[A]) -> Result<Table, MonitorAddressError> {
        let mut entries = Vec::new();
        for addr in addrs {
            let addr = addr.as_ref();
            let malformed = || MonitorAddressError::Malformed { addr: addr.to_owned() };
            let parsed: SocketAddr = addr.parse().map_err(|_| malformed())?;
            if !entries.iter().any(|e: &Entry| e.addr == parsed) {
                entries.push(Entry::new(parsed).ok_or_else(malformed)?);
            }
        }
        if entries.is_empty() {
            return Err(MonitorAddressError::None);
        }
        let given = entries.len();
        Ok(Table { known: Mutex::new(Known { entries, given, current: 0 }) })
    }

    /// A table of its own with the same monitors.
    pub fn fork(&self) -> Table {
        let known = self.known.lock();
        let entries = known.entries.clone();
        Table { known: Mutex::new(Known { entries, given: known.given, current: known.current }) }
    }

    pub fn len(&self) -> usize {
        self.known.lock().entries.len()
    }

    pub fn current(&self) -> Entry {
        let known = self.known.lock();
        known.entries[known.current % known.entries.len()].clone()
    }

    /// Goes to the next monitor, unless somebody went away from `at` already.
    pub fn leave(&self, at: Option<SocketAddr>) {
        let mut known = self.known.lock();
        let current = known.current % known.entries.len();
        if at.is_none_or(|at| known.entries[current].addr == at) {
            known.current = (current + 1) % known.entries.len();
        }
    }

    /// Takes in what a refusal says of the monitors; the leader, if it names one, is asked next.
    pub fn learn(&self, status: &Status) -> Option<SocketAddr> {
        let text = |key| status.metadata().get(key).and_then(|v| v.to_str().ok());
        let mut known = self.known.lock();
        let all = text(headers::MONITORS).unwrap_or_default();
        for addr in all.split(',').filter_map(|a| a.parse().ok()).take(MONITORS_MAX) {
            known.index_of(addr);
        }
        let leader: SocketAddr = text(headers::LEADER)?.parse().ok()?;
        known.current = known.index_of(leader)?;
        Some(leader)
    }
}

impl Known {
    /// Where `addr` is in the table, taken in if it was not there.
    fn index_of(&mut self, addr: SocketAddr) -> Option<usize> {
        if let Some(at) = self.entries.iter().position(|e| e.addr == addr) {
            return Some(at);
        }
        let entry = Entry::new(addr)?;
        if self.entries.len() >= MONITORS_MAX.max(self.given + 1) {
            // The one learned first gives way.
            self.entries.remove(self.given);
            self.current = 0;
        }
        self.entries.push(entry);
        Some(self.entries.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(leader: &str, monitors: &str) -> Status {
        let mut status = Status::unavailable("not the leader");
        headers::put(status.metadata_mut(), headers::LEADER, leader);
        headers::put(status.metadata_mut(), headers::MONITORS, monitors);
        status
    }

    #[tokio::test]
    async fn goes_where_the_leader_is_said_to_be() {
        let table = Table::new(&["127.0.0.1:1", "127.0.0.1:2"]).unwrap();
        let leader = table.learn(&refusal("127.0.0.1:2", ""));
        assert_eq!((leader, table.current().addr), ("127.0.0.1:2".parse().ok(), leader.unwrap()));
        // One that was added since this client was started.
        table.learn(&refusal("127.0.0.1:3", "127.0.0.1:4"));
        assert_eq!((table.current().addr.port(), table.len()), (3, 4));
        assert_eq!(table.learn(&refusal("garbage", "x,y,,")), None);
        assert_eq!((table.current().addr.port(), table.len()), (3, 4));
    }

    #[tokio::test]
    async fn does_not_grow_without_bound_and_keeps_what_it_was_given() {
        let table = Table::new(&["127.0.0.1:1"]).unwrap();
        for port in 1000..2000 {
            table.learn(&refusal(&format!("127.0.0.1:{port}"), ""));
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
    async fn two_that_leave_the_same_monitor_do_not_skip_one() {
        let table = Table::new(&["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]).unwrap();
        let at = Some(table.current().addr);
        table.leave(at);
        table.leave(at);
        assert_eq!(table.current().addr.port(), 2);
    }
}
