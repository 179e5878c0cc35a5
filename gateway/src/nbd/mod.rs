//! NBD server: fixed newstyle negotiation, simple replies, many requests in flight.
//!
//! ```text
//!  listener ─▶ negotiate (handshake.rs) ─▶ serve (transmission.rs) ─▶ Volume
//!              names: all exports by volume name (TCP), or one under any name (Unix socket)
//! ```
//!
//! Whatever is not the protocol closes that one connection, with one line in the log that names the
//! peer.

mod connection;
mod handshake;
pub mod limits;
mod listener;
#[cfg(test)]
mod tests;
mod transmission;
mod wire;

pub use listener::{listen_tcp, listen_unix, remove_socket};

use crate::volume::Volume;
use connection::Connection;
use parking_lot::RwLock;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Why a connection was closed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    #[error("the client does not speak NBD as it should: {0}")]
    Protocol(String),
    #[error("the handshake took too long")]
    HandshakeTimeout,
    #[error("there is no export {0:?}")]
    NoExport(String),
}

/// A volume that clients may use.
pub struct Export {
    pub volume: Arc<Volume>,
    pub read_only: bool,
    closing: CancellationToken,
    connections: TaskTracker,
}

impl Export {
    pub fn new(volume: Arc<Volume>, read_only: bool) -> Arc<Export> {
        let (closing, connections) = (CancellationToken::new(), TaskTracker::new());
        Arc::new(Export { volume, read_only, closing, connections })
    }

    /// Transmission flags.
    fn flags(&self) -> u16 {
        use wire::transmission::*;
        let common = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
        if self.read_only { common | READ_ONLY } else { common | SEND_TRIM | SEND_WRITE_ZEROES }
    }

    /// Ends every connection and its listener; returns when their requests have ended.
    pub async fn close(&self) {
        self.closing.cancel();
        self.connections.close();
        self.connections.wait().await;
    }
}

/// The exports of one name, by number.
type Named = Vec<(u64, Arc<Export>)>;

/// Exports by name.
#[derive(Default)]
pub struct Table {
    // Taken once per handshake and once per change of an export.
    by_name: RwLock<BTreeMap<String, Named>>,
}

impl Table {
    /// Adds the export with number `id` under `name`.
    pub fn insert(&self, name: &str, id: u64, export: Arc<Export>) {
        self.by_name.write().entry(name.to_owned()).or_default().push((id, export));
    }

    pub fn remove(&self, name: &str, id: u64) {
        let mut names = self.by_name.write();
        if let Some(exports) = names.get_mut(name) {
            exports.retain(|(i, _)| *i != id);
            if exports.is_empty() {
                names.remove(name);
            }
        }
    }
}

/// What a listener offers.
#[derive(Clone)]
pub enum Names {
    /// Every export of the table; of two of the same volume the one that may be written.
    Table(Arc<Table>),
    /// One, whatever name is asked for.
    One(Arc<Export>),
}

impl Names {
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        match self {
            Names::One(export) => Some(export.clone()),
            Names::Table(table) => {
                let names = table.by_name.read();
                let exports = names.get(name)?;
                exports.iter().find(|(_, e)| !e.read_only).or(exports.first()).map(|(_, e)| e.clone())
            }
        }
    }

    fn list(&self) -> Vec<String> {
        match self {
            Names::One(export) => vec![export.volume.name().to_owned()],
            Names::Table(table) => table.by_name.read().keys().cloned().collect(),
        }
    }
}

/// Serves one connection from its first byte to its last.
async fn serve<S: Connection>(mut stream: S, names: Names) -> Result<(), NbdError> {
    let negotiated =
        tokio::time::timeout(limits::HANDSHAKE_TIMEOUT, handshake::negotiate(&mut stream, &names));
    let Some(export) = negotiated.await.map_err(|_| NbdError::HandshakeTimeout)?? else {
        return Ok(());
    };
    let tracked = export.connections.clone();
    tracked.track_future(transmission::serve(stream, export)).await
}
