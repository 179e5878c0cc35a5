//! Metadata of calls to the monitors (documented in `admin.proto`).

use std::fmt;
use std::str::FromStr;
use tonic::Status;
use tonic::metadata::{MetadataMap, MetadataValue};

/// On a call: a [`RequestId`].
pub const REQUEST_ID: &str = "gabion-request-id";
/// On a call: an answer from what the monitor last knew will do.
pub const STALE_OK: &str = "gabion-stale-ok";
/// On a refusal: the number of the monitor that refuses.
pub const MONITOR: &str = "gabion-monitor";
/// On a refusal: where the leader is.
pub const LEADER: &str = "gabion-leader";
/// On every answer: where all monitors are, separated by commas.
pub const MONITORS: &str = "gabion-monitors";
/// On a refusal: there is no quorum.
pub const NO_QUORUM: &str = "gabion-no-quorum";

/// Names one request of one client, however often it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId(pub u128);

impl RequestId {
    pub fn random() -> RequestId {
        RequestId(rand::random())
    }

    /// The id that a call carries, if it carries one.
    pub fn of(metadata: &MetadataMap) -> Result<Option<RequestId>, Status> {
        let Some(value) = metadata.get(REQUEST_ID) else { return Ok(None) };
        let parsed = value.to_str().ok().and_then(|t| t.parse().ok());
        parsed
            .map(Some)
            .ok_or_else(|| Status::invalid_argument(format!("{REQUEST_ID}: not 32 hexadecimal digits")))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for RequestId {
    type Err = ();
    fn from_str(text: &str) -> Result<RequestId, ()> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(());
        }
        u128::from_str_radix(text, 16).map(RequestId).map_err(|_| ())
    }
}

/// Whether a monitor said this, as against the connection.
pub fn is_answer(status: &Status) -> bool {
    status.metadata().contains_key(MONITOR)
}

/// Whether the monitors have no quorum.
pub fn is_no_quorum(status: &Status) -> bool {
    status.metadata().contains_key(NO_QUORUM)
}

/// Puts a value into metadata; text that does not fit there is left out.
pub fn put(metadata: &mut MetadataMap, key: &'static str, text: &str) {
    if let Ok(value) = MetadataValue::try_from(text) {
        metadata.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_written_and_nothing_else_is() {
        let id = RequestId(0x1234_5678_9abc_def0_0fed_cba9_8765_4321);
        let mut metadata = MetadataMap::new();
        assert_eq!(RequestId::of(&metadata).unwrap(), None);
        put(&mut metadata, REQUEST_ID, &id.to_string());
        assert_eq!(RequestId::of(&metadata).unwrap(), Some(id));
        for bad in ["", "1", "+0000000000000000000000000000001", "g0000000000000000000000000000000"] {
            put(&mut metadata, REQUEST_ID, bad);
            assert!(RequestId::of(&metadata).is_err(), "{bad:?}");
        }
    }
}
