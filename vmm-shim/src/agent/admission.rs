//! Whether this host can take a guest, by the rule of [`gabion_proto::admission`] over the guests that
//! run here, and by the memory that is free now.

use gabion_common::host_offer;
use gabion_proto::admission::{self, Resources};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Left free beside a guest's memory, whatever else uses the host's.
const FREE_BYTES_MIN: u64 = 128 << 20;

/// What the guests that run here, or start, were given.
#[derive(Default)]
pub struct Ledger {
    // Each guest's task enters and leaves its own; two that start at once are judged one by one.
    given: Mutex<BTreeMap<String, Resources>>,
}

impl Ledger {
    /// Gives a guest what it asks for, or says why not.
    pub fn admit(&self, name: &str, guest: Resources) -> Result<(), String> {
        let host = Resources { cpus: host_offer::cpus(), memory_bytes: host_offer::memory_bytes("MemTotal") };
        self.admit_on(name, guest, host, host_offer::memory_bytes("MemAvailable"))
    }

    fn admit_on(&self, name: &str, guest: Resources, host: Resources, free: u64) -> Result<(), String> {
        let mut given = self.given.lock().unwrap_or_else(|e| e.into_inner());
        let others = given.iter().filter(|(other, _)| *other != name).map(|(_, r)| *r);
        if let Some(refusal) = admission::refusal(host, others, guest) {
            return Err(refusal);
        }
        if guest.memory_bytes.saturating_add(FREE_BYTES_MIN) > free {
            let (want, have) = (guest.memory_bytes >> 20, free >> 20);
            return Err(format!("it wants {want} MiB of memory; the host has {have} MiB free"));
        }
        given.insert(name.into(), guest);
        Ok(())
    }

    /// A guest that runs already.
    pub fn enter(&self, name: &str, guest: Resources) {
        self.given.lock().unwrap_or_else(|e| e.into_inner()).insert(name.into(), guest);
    }

    pub fn leave(&self, name: &str) {
        self.given.lock().unwrap_or_else(|e| e.into_inner()).remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_counted_from_start_to_end() {
        let of = |cpus, gib: u64| Resources { cpus, memory_bytes: gib << 30 };
        let (ledger, host) = (Ledger::default(), of(4, 8));
        let admit = |name: &str, guest| ledger.admit_on(name, guest, host, 5 << 30);
        admit("a", of(2, 1)).unwrap();
        assert!(admit("b", of(3, 1)).unwrap_err().contains("running guests have 2"));
        admit("a", of(4, 1)).expect("not counted beside itself");
        ledger.leave("a");
        ledger.enter("c", of(1, 1));
        admit("b", of(3, 1)).unwrap();
        ledger.leave("b");
        assert_eq!(
            admit("b", of(1, 5)).unwrap_err(),
            "it wants 5120 MiB of memory; the host has 5120 MiB free"
        );
    }
}
