//! Connections to other OSDs: one outgoing connection each, made when first needed.
//!
//! Messages are one-way and may be lost; the core repeats what matters. So a peer that does not
//! read costs a bounded queue and nothing else.

use bytes::Bytes;
use gabion_common::net;
use gabion_common::tls::Security;
use gabion_proto::frame::Frame;
use gabion_proto::ids::*;
use gabion_proto::map::ClusterMap;
use gabion_proto::msg::{Hello, Message, PeerMsg, Role};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::{debug, warn};

/// Frames that may wait for one peer.
const QUEUE_FRAMES: usize = 4096;
/// Bytes that may wait for one peer.
const QUEUE_BYTES: usize = 256 << 20;
/// A peer that cannot be reached is dialled again after this.
const REDIAL: Duration = Duration::from_millis(200);

struct Peer {
    addr: String,
    incarnation: Incarnation,
    queue: mpsc::Sender<Frame>,
    bytes: Arc<AtomicUsize>,
}

/// Outgoing connections of one run.
pub struct Peers {
    hello: Hello,
    security: Security,
    peers: HashMap<OsdId, Peer>,
}

impl Peers {
    pub fn new(cluster: ClusterId, id: OsdId, incarnation: Incarnation, security: Security) -> Peers {
        let hello = Hello { cluster, role: Role::Osd { id, incarnation }, refusal: None };
        Peers { hello, security, peers: HashMap::new() }
    }

    /// Sends if the peer is known and its queue has room.
    pub fn send(&mut self, map: &ClusterMap, msg: PeerMsg, data: Bytes) {
        let to = msg.to;
        let Some(info) = map.osds.get(&to).filter(|o| !o.addr.is_empty()) else {
            return;
        };
        let stale =
            |p: &Peer| p.addr != info.addr || p.incarnation != info.incarnation || p.queue.is_closed();
        if self.peers.get(&to).is_some_and(stale) {
            self.peers.remove(&to);
        }
        let peer = self.peers.entry(to).or_insert_with(|| {
            let (queue, receiver) = mpsc::channel(QUEUE_FRAMES);
            let bytes = Arc::new(AtomicUsize::new(0));
            let call = (info.addr.clone(), self.hello.clone(), self.security.clone());
            tokio::spawn(talk(to, call, receiver, bytes.clone()));
            Peer { addr: info.addr.clone(), incarnation: info.incarnation, queue, bytes }
        });
        let len = data.len();
        let full = peer.bytes.load(Relaxed) + len > QUEUE_BYTES
            || peer.queue.try_send(Frame { request: 0, message: Message::Peer(msg), data }).is_err();
        if full {
            debug!(peer = %to, "queue full, message dropped");
        } else {
            peer.bytes.fetch_add(len, Relaxed);
        }
    }
}

/// Owns one connection; ends when it breaks (the next message makes a new one) or when the run
/// drops the queue.
async fn talk(
    to: OsdId,
    (addr, hello, security): (String, Hello, Security),
    mut queue: mpsc::Receiver<Frame>,
    bytes: Arc<AtomicUsize>,
) {
    let net::Framed { mut reader, mut writer, .. } = match net::connect(&addr, &hello, &security).await {
        Ok(connection) => connection,
        Err(error) => {
            debug!(peer = %to, addr, %error, "cannot connect");
            // Swallow what is sent for a moment, so that a dead peer is not dialled for every message.
            let _ = tokio::time::timeout(REDIAL, async { while queue.recv().await.is_some() {} }).await;
            return;
        }
    };
    let mut batch = Vec::with_capacity(64);
    loop {
        batch.clear();
        tokio::select! {
            n = queue.recv_many(&mut batch, 64) => if n == 0 { return },
            // The other side sends nothing on this connection: whatever comes is its end.
            _ = reader.next() => return,
        }
        let len: usize = batch.iter().map(|f| f.data.len()).sum();
        let sent = writer.write(&batch).await;
        bytes.fetch_sub(len, Relaxed);
        if let Err(error) = sent {
            warn!(peer = %to, %error, "connection lost");
            return;
        }
    }
}
