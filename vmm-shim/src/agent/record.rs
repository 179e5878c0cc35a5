//! What the agent must not forget of a guest: the last action it took up and whether the guest
//! should run. Durable before the action is carried out, so an action is never carried out twice.

use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub action_number: u64,
    pub run: bool,
}

impl Record {
    /// What `path` holds; a new guest has no file.
    pub fn load(path: &Path) -> io::Result<Record> {
        match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Record::default()),
            Err(e) => Err(e),
        }
    }

    pub fn save(&self, path: &Path) -> io::Result<()> {
        gabion_common::addr_file::replace(path, &serde_json::to_vec(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_and_damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        assert_eq!(Record::load(&path).unwrap(), Record::default());
        let record = Record { action_number: 7, run: true };
        record.save(&path).unwrap();
        assert_eq!(Record::load(&path).unwrap(), record);
        std::fs::write(&path, "{").unwrap();
        assert!(Record::load(&path).is_err());
    }
}
