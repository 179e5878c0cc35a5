//! Whose data this is: the monitor's number, the identity of its data, and its cluster.
//!
//! A monitor whose data is lost has forgotten what it voted for and what it acknowledged. So its data
//! has an identity of its own, which the membership names: what comes back empty under an old number
//! is another store, is refused, and has to be removed and added.

use super::log::{other, synced};
use super::{ConsensusError, Database};
use gabion_proto::ids::ClusterId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

const KEY: &[u8] = b"identity";

/// One data directory of a monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreId(pub [u8; 16]);

/// How a monitor came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Origin {
    /// The first of its cluster.
    Founder,
    /// It was added, or waits to be.
    Joiner,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    id: u64,
    origin: Origin,
    store: StoreId,
    cluster: Option<ClusterId>,
    /// The cluster went on without it.
    dismissed: bool,
}

pub(crate) struct Identity {
    db: Arc<Database>,
    // Held to read or replace the record only.
    record: Mutex<Record>,
}

impl Identity {
    /// Reads it. In an empty database it is made as `origin` says; `None` there is an error.
    pub fn open(db: Arc<Database>, id: u64, origin: Option<Origin>) -> Result<Identity, ConsensusError> {
        let stopped = |e: io::Error| ConsensusError::Stopped(e.to_string());
        let kept = db.get(KEY).map_err(|e| stopped(other(e)))?;
        let record: Record = match (kept, origin) {
            (Some(bytes), _) => postcard::from_bytes(&bytes).map_err(|e| stopped(other(e)))?,
            (None, None) => return Err(ConsensusError::NotInitialised),
            (None, Some(origin)) => {
                let cluster = (origin == Origin::Founder).then(|| ClusterId(rand::random()));
                let store = StoreId(rand::random());
                let record = Record { id, origin, store, cluster, dismissed: false };
                put(&db, &record).map_err(stopped)?;
                record
            }
        };
        match record {
            Record { dismissed: true, .. } => Err(ConsensusError::Dismissed(id)),
            Record { id: kept, .. } if kept != id => Err(ConsensusError::OtherMonitor { kept, asked: id }),
            _ => Ok(Identity { db, record: Mutex::new(record) }),
        }
    }

    pub fn origin(&self) -> Origin {
        self.record.lock().origin
    }

    pub fn id(&self) -> u64 {
        self.record.lock().id
    }

    pub fn store(&self) -> StoreId {
        self.record.lock().store
    }

    pub fn cluster(&self) -> Option<ClusterId> {
        self.record.lock().cluster
    }

    /// Becomes part of `cluster`, for good; false when it is part of another one.
    pub fn adopt(&self, cluster: ClusterId) -> io::Result<bool> {
        let mut record = self.record.lock();
        if record.cluster.is_none() {
            let new = Record { cluster: Some(cluster), ..record.clone() };
            put(&self.db, &new)?;
            *record = new;
        }
        Ok(record.cluster == Some(cluster))
    }

    /// Never starts again on this data.
    pub fn dismiss(&self) -> io::Result<()> {
        let mut record = self.record.lock();
        record.dismissed = true;
        put(&self.db, &record)
    }
}

fn put(db: &Database, record: &Record) -> io::Result<()> {
    let bytes = postcard::to_stdvec(record).map_err(other)?;
    db.put_opt(KEY, bytes, &synced()).map_err(other)
}
