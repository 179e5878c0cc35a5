//! The cluster as a client sees it: the newest map and one connection to each OSD in use.

use super::connection::Connection;
use crate::net::NetError;
use crate::tls::Security;
use gabion_proto::ids::{ClientId, Incarnation, OsdId};
use gabion_proto::map::ClusterMap;
use gabion_proto::msg::{Hello, Role};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use tokio::sync::watch;

/// Why there is no connection to an OSD.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{0} is down or unknown")]
    Down(OsdId),
    #[error("cannot connect to {osd}: {source}")]
    Net { osd: OsdId, source: NetError },
}

/// The run of an OSD that a connection leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    addr: String,
    incarnation: Incarnation,
}

impl Run {
    fn of(map: &ClusterMap, osd: OsdId) -> Option<Run> {
        let info = map.up_osd(osd).filter(|o| !o.addr.is_empty())?;
        Some(Run { addr: info.addr.clone(), incarnation: info.incarnation })
    }
}

/// Held while connecting, so that there is never a second connection to the same OSD.
type Slot = Arc<tokio::sync::Mutex<Option<(Run, Arc<Connection>)>>>;

/// Shared by all volumes of a process.
pub struct ClusterClient {
    map: watch::Receiver<Arc<ClusterMap>>,
    id: ClientId,
    security: Security,
    // Held to find a slot only.
    slots: Mutex<HashMap<OsdId, Slot>>,
}

impl ClusterClient {
    /// A client that follows `map` and says that it is `id` (0: an observer). Needs a runtime.
    pub fn new(
        map: watch::Receiver<Arc<ClusterMap>>,
        id: ClientId,
        security: Security,
    ) -> Arc<ClusterClient> {
        let client = Arc::new(ClusterClient { map, id, security, slots: Mutex::default() });
        tokio::spawn(drop_old_runs(Arc::downgrade(&client), client.map.clone()));
        client
    }

    /// The newest map.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.map.borrow().clone()
    }

    /// To wait for newer maps.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterMap>> {
        self.map.clone()
    }

    fn slot(&self, osd: OsdId) -> Slot {
        self.slots.lock().entry(osd).or_default().clone()
    }

    /// The connection to `osd` as the newest map has it, made when there is none.
    pub(super) async fn connection(&self, osd: OsdId) -> Result<Arc<Connection>, ConnectError> {
        let slot = self.slot(osd);
        let mut slot = slot.lock().await;
        let map = self.map();
        let run = Run::of(&map, osd).ok_or(ConnectError::Down(osd))?;
        if let Some((r, c)) = &*slot {
            if *r == run && !c.is_ended() {
                return Ok(c.clone());
            }
            c.close().await;
            *slot = None;
        }
        let hello = Hello { cluster: map.cluster, role: Role::Client { id: self.id }, refusal: None };
        let connection = Connection::open(&run.addr, &hello, &self.security)
            .await
            .map_err(|source| ConnectError::Net { osd, source })?;
        *slot = Some((run, connection.clone()));
        Ok(connection)
    }
}

/// Closes connections to runs that the map no longer has up: nothing will be answered there.
async fn drop_old_runs(client: Weak<ClusterClient>, mut map: watch::Receiver<Arc<ClusterMap>>) {
    while map.changed().await.is_ok() {
        let Some(client) = client.upgrade() else { return };
        map.borrow_and_update();
        let slots: Vec<_> = client.slots.lock().iter().map(|(osd, slot)| (*osd, slot.clone())).collect();
        for (osd, slot) in slots {
            let map = map.clone();
            match slot.clone().try_lock_owned() {
                Ok(slot) => abandon_old_run(&map, osd, &slot),
                // Somebody connects, maybe by an older map: looked at when that has ended.
                Err(_) => {
                    tokio::spawn(async move { abandon_old_run(&map, osd, &*slot.lock().await) });
                }
            }
        }
    }
}

fn abandon_old_run(
    map: &watch::Receiver<Arc<ClusterMap>>,
    osd: OsdId,
    slot: &Option<(Run, Arc<Connection>)>,
) {
    if let Some((run, connection)) = slot
        && Run::of(&map.borrow(), osd).as_ref() != Some(run)
    {
        connection.abandon();
    }
}
