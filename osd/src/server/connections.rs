//! Which connection of each client counts (rule C1): the newest, by the order of acceptance.
//!
//! A superseded connection is closed, so that a client which still waits for it notices and dials again.

use gabion_proto::ids::ClientId;
use std::collections::HashMap;
use tokio_util::sync::CancellationToken;

/// The number that everybody shares who only reads, without an attachment: they supersede nobody.
const OBSERVER: ClientId = ClientId(0);

/// The newest connection of each client.
#[derive(Default)]
pub struct Connections(HashMap<ClientId, (u64, CancellationToken)>);

impl Connections {
    /// A client said hello on `connection`; cancelling `close` closes it. Answers the connection that it
    /// supersedes: nothing of that may be executed any more. Hellos may come out of order.
    pub fn connected(&mut self, client: ClientId, connection: u64, close: CancellationToken) -> Option<u64> {
        if client == OBSERVER {
            return None;
        }
        if self.0.get(&client).is_some_and(|(newest, _)| *newest > connection) {
            close.cancel();
            return None;
        }
        let (old, close) = self.0.insert(client, (connection, close))?;
        close.cancel();
        Some(old)
    }

    /// Whether operations that come on `connection` are to be executed.
    pub fn counts(&self, client: ClientId, connection: u64) -> bool {
        client == OBSERVER || self.0.get(&client).is_some_and(|(newest, _)| *newest == connection)
    }

    pub fn closed(&mut self, connection: u64) {
        self.0.retain(|_, (newest, _)| *newest != connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_connection_counts_whatever_order_hellos_come_in() {
        let (a, mut c) = (ClientId(7), Connections::default());
        let [first, second] = [CancellationToken::new(), CancellationToken::new()];
        assert_eq!(c.connected(a, 2, second.clone()), None);
        assert_eq!(c.connected(a, 1, first.clone()), None);
        assert!(first.is_cancelled() && !second.is_cancelled());
        assert!(c.counts(a, 2) && !c.counts(a, 1));
        let third = CancellationToken::new();
        assert_eq!(c.connected(a, 3, third.clone()), Some(2));
        assert!(second.is_cancelled() && !c.counts(a, 2) && c.counts(a, 3));
        c.closed(3);
        assert!(!c.counts(a, 2), "what an older connection still holds stays refused");
        assert!(!c.counts(ClientId(8), 4), "nobody said hello there");
    }

    #[test]
    fn observers_do_not_supersede_each_other() {
        let mut c = Connections::default();
        let tokens = [CancellationToken::new(), CancellationToken::new()];
        for (n, t) in tokens.iter().enumerate() {
            assert_eq!(c.connected(OBSERVER, n as u64 + 1, t.clone()), None);
        }
        assert!(tokens.iter().all(|t| !t.is_cancelled()));
        assert!(c.counts(OBSERVER, 1) && c.counts(OBSERVER, 2));
    }
}
