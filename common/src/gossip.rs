//! Gossip between daemons: who is alive and a few words about each. It is neither authenticated nor
//! ordered, so what it says is a hint; the monitors decide from leases and reports.

use chitchat::transport::UdpTransport;
use chitchat::{
    ChitchatConfig, ChitchatHandle, ChitchatId, FailureDetectorConfig, ProtocolVersion, spawn_chitchat,
};
use gabion_proto::ids::ClusterId;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::watch;

const INTERVAL: Duration = Duration::from_millis(500);
const FORGET_KEYS_AFTER: Duration = Duration::from_secs(600);

#[derive(Debug, thiserror::Error)]
#[error("cannot gossip on {listen}: {problem}")]
pub struct GossipError {
    listen: SocketAddr,
    problem: String,
}

/// How to join.
pub struct GossipConfig {
    /// Unique in the cluster: `osd.3`, `gateway.host-a`.
    pub node: String,
    /// Greater at each start of the same node.
    pub generation: u64,
    pub cluster: ClusterId,
    pub listen: SocketAddr,
    /// Others to start from, `ip:port`.
    pub seeds: Vec<String>,
}

/// What one live node says about itself.
pub type Words = BTreeMap<String, String>;

/// This process's part in the gossip; it leaves when dropped.
pub struct Gossip {
    handle: ChitchatHandle,
    live: watch::Receiver<BTreeMap<ChitchatId, chitchat::NodeState>>,
}

impl Gossip {
    pub async fn spawn(config: GossipConfig) -> Result<Gossip, GossipError> {
        let listen = config.listen;
        let chitchat = ChitchatConfig {
            chitchat_id: ChitchatId::new(config.node, config.generation, listen),
            cluster_id: config.cluster.to_string(),
            gossip_interval: INTERVAL,
            listen_addr: listen,
            seed_nodes: config.seeds,
            failure_detector_config: FailureDetectorConfig::default(),
            marked_for_deletion_grace_period: FORGET_KEYS_AFTER,
            catchup_callback: None,
            extra_liveness_predicate: None,
            protocol_version: ProtocolVersion::V0,
        };
        let handle = spawn_chitchat(chitchat, Vec::new(), &UdpTransport)
            .await
            .map_err(|e| GossipError { listen, problem: format!("{e:#}") })?;
        let live = handle.with_chitchat(|c| c.live_nodes_watcher()).await;
        Ok(Gossip { handle, live })
    }

    /// Says something about this node.
    pub async fn set(&self, key: &str, value: &str) {
        self.handle.with_chitchat(|c| c.self_node_state().set(key, value)).await;
    }

    /// The nodes that seem alive now, with their words.
    pub fn live(&self) -> BTreeMap<String, Words> {
        let live = self.live.borrow();
        live.iter()
            .map(|(id, state)| {
                let words = state.key_values().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
                (id.node_id.to_string(), words)
            })
            .collect()
    }

    /// Waits until the set of live nodes, or what they say, changed; false when gossip has ended.
    pub async fn changed(&mut self) -> bool {
        self.live.changed().await.is_ok()
    }
}

impl Drop for Gossip {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_port() -> SocketAddr {
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn two_nodes_find_each_other() {
        let (a, b) = (free_port(), free_port());
        let config = |node: &str, listen, seeds: Vec<String>| GossipConfig {
            node: node.into(),
            generation: 1,
            cluster: ClusterId([7; 16]),
            listen,
            seeds,
        };
        let first = Gossip::spawn(config("a", a, vec![])).await.unwrap();
        let mut second = Gossip::spawn(config("b", b, vec![a.to_string()])).await.unwrap();
        first.set("load", "3").await;
        let seen = async {
            while second.live().get("a").and_then(|w| w.get("load")).map(String::as_str) != Some("3") {
                assert!(second.changed().await);
            }
        };
        tokio::time::timeout(Duration::from_secs(20), seen).await.expect("a was never seen");
    }
}
