//! A disk and an index in memory that lose in a crash what real ones may lose: the real store runs on them in
//! tests and in the simulator. Deterministic: the seed decides what a crash keeps.
//!
//! `SimDisk::new(size, seed)`, [`SimDisk::format`] once, [`SimDisk::open`]; to crash, drop the store, call
//! [`SimDisk::crash`] and open again. Dropping alone is the end of the process: nothing is lost.

use super::chunk_store::{ChunkStore, format_parts};
use super::device::Device;
use super::kv::{Batch, Kv, Pair};
use super::{Identity, StoreError};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

const SECTOR: usize = 512;

struct State {
    disk: Vec<u8>,
    unflushed: Vec<(usize, Vec<u8>)>,
    index: BTreeMap<Vec<u8>, Vec<u8>>,
    unsynced: Vec<Batch>,
    /// Changing operations until everything fails; `None` never.
    fuse: Option<u64>,
    rng: StdRng,
}

/// The machine: what survives when the store on it is dropped.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

/// The bytes of a [`SimDisk`].
pub struct SimDevice(SimDisk);

/// The index on a [`SimDisk`].
pub struct SimKv(SimDisk);

/// The real store on a [`SimDisk`].
pub type SimStore = ChunkStore<SimDevice, SimKv>;

fn apply(index: &mut BTreeMap<Vec<u8>, Vec<u8>>, batch: &Batch) {
    for (key, value) in batch {
        match value {
            Some(v) => index.insert(key.clone(), v.clone()),
            None => index.remove(key),
        };
    }
}

impl SimDisk {
    /// `size` in bytes. The seed decides what crashes keep.
    pub fn new(size: usize, seed: u64) -> SimDisk {
        SimDisk(Arc::new(Mutex::new(State {
            disk: vec![0; size],
            unflushed: Vec::new(),
            index: BTreeMap::new(),
            unsynced: Vec::new(),
            fuse: None,
            rng: StdRng::seed_from_u64(seed),
        })))
    }

    pub fn parts(&self) -> (SimDevice, SimKv) {
        (SimDevice(self.clone()), SimKv(self.clone()))
    }

    /// Makes an empty store on it.
    pub fn format(&self, identity: Identity) -> Result<(), StoreError> {
        let (mut device, mut kv) = self.parts();
        format_parts(&mut device, &mut kv, identity)
    }

    /// Opens the store on it; the one before must be gone.
    pub fn open(&self) -> Result<SimStore, StoreError> {
        let (device, kv) = self.parts();
        ChunkStore::open(device, kv)
    }

    /// Lets so many writes and flushes succeed, then all fail until the next crash; `None` never.
    pub fn set_fuse(&self, fuse: Option<u64>) {
        self.0.lock().fuse = fuse;
    }

    /// Flips bits of the durable disk.
    pub fn corrupt(&self, offset: usize) {
        self.0.lock().disk[offset] ^= 0xff;
    }

    /// Power fails: some sectors of unflushed writes are there, others not; unsynced batches of the
    /// index are there up to some point.
    pub fn crash(&self) {
        let mut state = self.0.lock();
        let state = &mut *state;
        for (offset, data) in std::mem::take(&mut state.unflushed) {
            for (i, sector) in data.chunks(SECTOR).enumerate() {
                if state.rng.random() {
                    state.disk[offset + i * SECTOR..][..sector.len()].copy_from_slice(sector);
                }
            }
        }
        let batches = std::mem::take(&mut state.unsynced);
        let keep = state.rng.random_range(0..=batches.len());
        for batch in &batches[..keep] {
            apply(&mut state.index, batch);
        }
        state.fuse = None;
    }
}

impl State {
    fn burn(&mut self) -> Result<(), String> {
        match &mut self.fuse {
            Some(0) => Err("the fuse is blown".into()),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn view(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut view = self.index.clone();
        self.unsynced.iter().for_each(|b| apply(&mut view, b));
        view
    }
}

impl Device for SimDevice {
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (state, start) = (self.0.0.lock(), offset as usize);
        buf.copy_from_slice(&state.disk[start..start + buf.len()]);
        for (at, data) in &state.unflushed {
            let (from, to) = (start.max(*at), (start + buf.len()).min(at + data.len()));
            if from < to {
                buf[from - start..to - start].copy_from_slice(&data[from - at..to - at]);
            }
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.0.0.lock();
        let result = state.burn().map_err(io::Error::other);
        // A failing write may have done anything to what it covers.
        state.unflushed.push((offset as usize, data.to_vec()));
        result
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut state = self.0.0.lock();
        state.burn().map_err(io::Error::other)?;
        let state = &mut *state;
        for (offset, data) in state.unflushed.drain(..) {
            state.disk[offset..offset + data.len()].copy_from_slice(&data);
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        self.0.0.lock().disk.len() as u64
    }
}

impl Kv for SimKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, String> {
        let state = self.0.0.lock();
        for batch in state.unsynced.iter().rev() {
            if let Some((_, value)) = batch.iter().rev().find(|(k, _)| k == key) {
                return Ok(value.clone());
            }
        }
        Ok(state.index.get(key).cloned())
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Pair>, String> {
        let view = self.0.0.lock().view();
        let start = prefix.max(from).to_vec();
        let pairs = view.range(start..).take_while(|(k, _)| k.starts_with(prefix)).take(limit);
        Ok(pairs.map(|(k, v)| (k.clone(), v.clone())).collect())
    }

    fn write(&mut self, batch: Batch, sync: bool) -> Result<(), String> {
        let mut state = self.0.0.lock();
        let result = state.burn();
        // Also a batch that failed may turn out to be there after the crash.
        state.unsynced.push(batch);
        if result.is_ok() && sync {
            let state = &mut *state;
            for batch in state.unsynced.drain(..) {
                apply(&mut state.index, &batch);
            }
        }
        result
    }
}
