//! A disk and an index in memory that lose in a crash what real ones may lose: the real store runs on them in
//! tests and in the simulator. Deterministic: the seed decides what a crash keeps and in which order requests end.
//!
//! `SimDisk::new(size, seed)`, [`SimDisk::format`] once, [`SimDisk::open`]; to crash, drop the store, call
//! [`SimDisk::crash`] and open again. Dropping alone is the end of the process: nothing is lost.
//!
//! Everything that changes the disk is an event. A recording disk keeps them all, so that a test can build, for any
//! prefix of them, what a crash at that point may leave ([`SimDisk::crashed_at`]).

use super::buffer::{Block, BlocksMut};
use super::chunk_store::ChunkStore;
use super::device::{Completion, Device, Request, Traffic};
use super::kv::{Batch, Kv, Pair};
use super::layout::{BLOCK, Geometry};
use super::pool::Pool;
use super::recover::format_parts;
use super::wake::Waker;
use super::{Identity, StoreError};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use zerocopy::IntoBytes;

const SECTOR: usize = 512;
const SECTORS: usize = BLOCK / SECTOR;

thread_local! {
    /// Buffers for reads, as a real device has them: with what reads before left in them.
    static POOL: Arc<Pool> = Arc::new(Pool::new());
}

/// A block that is on the disk: in what was written, from a byte on. Nothing is copied until something changes in it.
#[derive(Clone)]
struct BlockImage {
    written: Arc<Vec<u8>>,
    at: usize,
}

impl BlockImage {
    fn bytes(&self) -> &[u8] {
        &self.written[self.at..][..BLOCK]
    }
}

/// Something that changed what is, or may be, on the disk.
#[derive(Clone)]
enum Event {
    /// A write began: from here on any of its sectors may be on the disk.
    Begin { write: u64, block: u64, data: Arc<Vec<u8>> },
    /// The device said that it is done; `durable`: on the disk.
    End { write: u64, durable: bool },
    /// A flush that covers these writes ended.
    Flushed(Vec<u64>),
    /// `durable`: on the disk.
    Indexed { batch: Arc<Batch>, durable: bool },
    /// A note of the test.
    Note(u64),
}

/// Blocks on the disk, and writes that may or may not be there.
#[derive(Clone, Default)]
struct Image {
    blocks: HashMap<u64, BlockImage>,
    /// In order of their begin.
    volatile: BTreeMap<u64, (u64, Arc<Vec<u8>>)>,
    index: BTreeMap<Vec<u8>, Vec<u8>>,
    /// What batches replaced that are not on the disk, though they were said to be; in their order.
    replaced: Vec<Batch>,
}

impl Image {
    fn apply(&mut self, event: &Event) {
        match event {
            Event::Begin { write, block, data } => {
                self.volatile.insert(*write, (*block, data.clone()));
            }
            Event::End { write, durable: true } => self.settle(*write),
            Event::End { .. } | Event::Note(_) => {}
            Event::Flushed(writes) => writes.iter().for_each(|w| self.settle(*w)),
            Event::Indexed { batch, durable } => {
                let mut replaced = Batch::new();
                for (key, value) in batch.iter() {
                    let before = match value {
                        Some(v) => self.index.insert(key.clone(), v.clone()),
                        None => self.index.remove(key),
                    };
                    replaced.push((key.clone(), before));
                }
                if *durable {
                    self.replaced.clear();
                } else {
                    self.replaced.push(replaced);
                }
            }
        }
    }

    /// All but the first `kept` batches of those that are not on the disk are gone.
    fn forget_batches(&mut self, kept: usize) {
        for batch in self.replaced.drain(kept..).rev() {
            // A key may be in a batch twice.
            for (key, before) in batch.into_iter().rev() {
                match before {
                    Some(v) => self.index.insert(key, v),
                    None => self.index.remove(&key),
                };
            }
        }
        self.replaced.clear();
    }

    /// A write is on the disk for good. What is older and volatile cannot come over it any more.
    fn settle(&mut self, write: u64) {
        let Some((block, data)) = self.volatile.remove(&write) else { return };
        self.put(block, &data);
        let (from, to) = (block, block + (data.len() / BLOCK) as u64);
        for (_, (start, older)) in self.volatile.range_mut(..write) {
            let end = *start + (older.len() / BLOCK) as u64;
            let (a, b) = (from.max(*start), to.min(end));
            if a < b {
                let older = Arc::make_mut(older);
                for i in a..b {
                    older[(i - *start) as usize * BLOCK..][..BLOCK]
                        .copy_from_slice(&data[(i - from) as usize * BLOCK..][..BLOCK]);
                }
            }
        }
    }

    fn put(&mut self, block: u64, data: &Arc<Vec<u8>>) {
        for (block, at) in (block..).zip((0..data.len()).step_by(BLOCK)) {
            self.blocks.insert(block, BlockImage { written: data.clone(), at });
        }
    }

    /// Only those sectors that `keep` names, by their number in the write.
    fn put_sectors(&mut self, block: u64, data: &[u8], mut keep: impl FnMut(usize) -> bool) {
        for (i, bytes) in data.chunks_exact(BLOCK).enumerate() {
            let block = block + i as u64;
            let mut image = self.blocks.get(&block).map_or_else(|| vec![0; BLOCK], |b| b.bytes().to_vec());
            for s in (0..SECTORS).filter(|s| keep(i * SECTORS + s)) {
                image[s * SECTOR..][..SECTOR].copy_from_slice(&bytes[s * SECTOR..][..SECTOR]);
            }
            self.put(block, &image.into());
        }
    }

    fn corrupt(&mut self, offset: usize) {
        let mut bytes = vec![0; BLOCK];
        let block = (offset / BLOCK) as u64;
        self.read(block, &mut bytes);
        bytes[offset % BLOCK] ^= 0xff;
        for (start, data) in self.volatile.values_mut() {
            if (*start..*start + (data.len() / BLOCK) as u64).contains(&block) {
                Arc::make_mut(data)[(block - *start) as usize * BLOCK + offset % BLOCK] =
                    bytes[offset % BLOCK];
            }
        }
        self.put(block, &bytes.into());
    }

    /// Power fails: of what is volatile, some is there.
    fn crash(&mut self, rng: &mut StdRng) {
        // All, nothing, whole writes, or single sectors.
        let mode = rng.random_range(0..5);
        for (_, (block, data)) in std::mem::take(&mut self.volatile) {
            let whole = rng.random::<bool>();
            self.put_sectors(block, &data, |_| match mode {
                0 => false,
                1 => true,
                2 => whole,
                3 => rng.random(),
                _ => whole || rng.random_range(0..8) != 0,
            });
        }
        if !self.replaced.is_empty() {
            let kept = rng.random_range(0..=self.replaced.len());
            self.forget_batches(kept);
        }
    }

    /// Whole blocks from `first` on.
    fn read(&self, first: u64, out: &mut [u8]) {
        let end = first + (out.len() / BLOCK) as u64;
        for (block, out) in (first..).zip(out.chunks_exact_mut(BLOCK)) {
            match self.blocks.get(&block) {
                Some(image) => out.copy_from_slice(image.bytes()),
                None => out.fill(0),
            }
        }
        for (start, data) in self.volatile.values() {
            let (a, b) = (first.max(*start), end.min(*start + (data.len() / BLOCK) as u64));
            if a < b {
                let bytes = (b - a) as usize * BLOCK;
                out[(a - first) as usize * BLOCK..][..bytes]
                    .copy_from_slice(&data[(a - start) as usize * BLOCK..][..bytes]);
            }
        }
    }
}

struct State {
    image: Image,
    blocks: u64,
    next_write: u64,
    /// Writes that ended and are not flushed.
    ended: Vec<u64>,
    /// Requests in flight: their tag, and for writes and flushes what they cover.
    pending: Vec<(u64, Pending)>,
    /// Blocks that cannot be read.
    unreadable: Vec<u64>,
    /// Blocks that cannot be read until they are written.
    failed: Vec<u64>,
    /// A flush says yes and does nothing.
    lying: bool,
    /// A batch of the index is said to be durable and is not.
    index_lying: bool,
    /// Changing requests until everything fails; `None` never.
    fuse: Option<u64>,
    /// Reads of slots under which the medium still goes bad.
    rot: u64,
    record: Option<Vec<Event>>,
    start: Image,
    rng: StdRng,
    /// Pairs of the index that were looked at, one after the other.
    scanned: usize,
}

enum Pending {
    Read(Request),
    Write { write: u64, durable: bool },
    Flush(Vec<u64>),
}

/// The machine: what survives when the store on it is dropped.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

/// The bytes of a [`SimDisk`].
pub struct SimDevice {
    disk: SimDisk,
    waker: Waker,
    traffic: Traffic,
}

/// The index on a [`SimDisk`].
pub struct SimKv {
    disk: SimDisk,
    result: Option<Result<(), String>>,
}

/// The real store on a [`SimDisk`].
pub type SimStore = ChunkStore<SimDevice, SimKv>;

impl SimDisk {
    /// `size` in bytes, of which the journal takes 4 MiB unless formatted otherwise.
    pub fn new(size: usize, seed: u64) -> SimDisk {
        SimDisk::with_image(Image::default(), (size / BLOCK) as u64, seed)
    }

    fn with_image(image: Image, blocks: u64, seed: u64) -> SimDisk {
        SimDisk(Arc::new(Mutex::new(State {
            image,
            blocks,
            next_write: 0,
            ended: Vec::new(),
            pending: Vec::new(),
            unreadable: Vec::new(),
            failed: Vec::new(),
            lying: false,
            index_lying: false,
            fuse: None,
            rot: 0,
            record: None,
            start: Image::default(),
            rng: StdRng::seed_from_u64(seed),
            scanned: 0,
        })))
    }

    pub(super) fn parts(&self) -> Result<(SimDevice, SimKv), StoreError> {
        // Requests of an earlier store are gone with it; what they wrote is volatile.
        self.0.lock().pending.clear();
        let waker = Waker::new().map_err(|e| StoreError::Fatal(format!("no eventfd: {e}")))?;
        let device = SimDevice { disk: self.clone(), waker, traffic: Traffic::default() };
        Ok((device, SimKv { disk: self.clone(), result: None }))
    }

    /// Makes an empty store on it.
    pub fn format(&self, identity: Identity) -> Result<(), StoreError> {
        let size = self.0.lock().blocks * BLOCK as u64;
        self.format_with(identity, Geometry::for_size(size).journal_blocks)
    }

    /// The same with a journal of so many blocks.
    pub(super) fn format_with(&self, identity: Identity, journal_blocks: u32) -> Result<(), StoreError> {
        let (mut device, mut kv) = self.parts()?;
        let size = device.blocks() * BLOCK as u64;
        let nonce = self.0.lock().rng.random();
        format_parts(&mut device, &mut kv, identity, (size, journal_blocks), nonce)
    }

    /// Opens the store on it; the one before must be gone.
    pub fn open(&self) -> Result<SimStore, StoreError> {
        let (device, kv) = self.parts()?;
        let nonce = self.0.lock().rng.random();
        ChunkStore::open(device, kv, nonce)
    }

    /// Lets so many writes and flushes succeed, then all fail until the next crash; `None` never.
    pub fn set_fuse(&self, fuse: Option<u64>) {
        self.0.lock().fuse = fuse;
    }

    /// Flips bits of the disk.
    pub fn corrupt(&self, offset: usize) {
        self.0.lock().image.corrupt(offset);
    }

    /// The next `reads` of slots each find a bad block, which stays bad.
    pub fn rot_under_reads(&self, reads: u64) {
        self.0.lock().rot = reads;
    }

    /// Of so many blocks of slots that were ever written, by chance, bits flip or reads fail until they are written again.
    pub fn rot_written(&self, count: usize) {
        let mut state = self.0.lock();
        let State { image, blocks, rng, failed, .. } = &mut *state;
        let slots = Geometry::for_size(*blocks * BLOCK as u64).slot_block(0);
        let mut written: Vec<u64> = image.blocks.keys().copied().filter(|b| *b >= slots).collect();
        written.sort_unstable();
        for _ in 0..count.min(written.len()) {
            let block = written.swap_remove(rng.random_range(0..written.len()));
            match rng.random_range(0..3) {
                0 => failed.push(block),
                _ => image.corrupt(block as usize * BLOCK + rng.random_range(0..BLOCK)),
            }
        }
    }

    /// From now on reads of this block fail, or succeed again.
    pub fn set_unreadable(&self, block: u64, unreadable: bool) {
        let mut state = self.0.lock();
        state.unreadable.retain(|b| *b != block);
        if unreadable {
            state.unreadable.push(block);
        }
    }

    /// From now on flushes and durable writes claim success and make nothing durable.
    pub fn set_lying(&self, lying: bool) {
        self.0.lock().lying = lying;
    }

    /// From now on batches of the index are said to be durable and are not.
    pub fn set_index_lying(&self, lying: bool) {
        self.0.lock().index_lying = lying;
    }

    /// Power fails: of writes that are not flushed, some sectors are there, others not.
    pub fn crash(&self) {
        let mut state = self.0.lock();
        let State { image, rng, .. } = &mut *state;
        image.crash(rng);
        state.ended.clear();
        state.pending.clear();
        state.fuse = None;
    }

    /// Starts to record events.
    pub fn record(&self) {
        let mut state = self.0.lock();
        state.start = state.image.clone();
        state.record = Some(Vec::new());
    }

    /// Puts a note among the events.
    pub fn note(&self, note: u64) {
        self.0.lock().event(Event::Note(note));
    }

    /// Recorded events.
    pub fn events(&self) -> usize {
        self.0.lock().record.as_ref().map_or(0, Vec::len)
    }

    /// Calls `each` for every point of the recording, with the last note before it and a maker of disks that a
    /// crash at this point may leave.
    pub fn crashed_at(&self, mut each: impl FnMut(usize, Option<u64>, &dyn Fn(u64) -> SimDisk)) {
        let state = self.0.lock();
        let (mut image, mut note) = (state.start.clone(), None);
        let events = state.record.as_deref().unwrap_or_default();
        for at in 0..=events.len() {
            if at > 0 {
                image.apply(&events[at - 1]);
            }
            match at.checked_sub(1).map(|i| &events[i]) {
                Some(Event::Note(n)) => note = Some(*n),
                // Changes nothing that a crash would show.
                Some(Event::End { durable: false, .. }) => continue,
                _ => {}
            }
            each(at, note, &|seed| {
                let mut image = image.clone();
                image.crash(&mut StdRng::seed_from_u64(seed));
                SimDisk::with_image(image, state.blocks, seed)
            });
        }
    }
}

impl State {
    fn event(&mut self, event: Event) {
        self.image.apply(&event);
        if let Some(record) = &mut self.record {
            record.push(event);
        }
    }

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

    fn read(&self, first: u64, out: &mut [Block]) -> io::Result<()> {
        let range = first..first + out.len() as u64;
        if self.unreadable.iter().chain(&self.failed).any(|b| range.contains(b)) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if range.end > self.blocks {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.image.read(first, out.as_mut_bytes());
        Ok(())
    }

    fn end(&mut self, tag: u64, pending: Pending) -> Completion {
        let mut buffer = None;
        let result = match pending {
            Pending::Read(Request::Read { buffer: mut into, parts }) => {
                let slots = Geometry::for_size(self.blocks * BLOCK as u64).slot_block(0);
                if let Some(p) = parts.iter().find(|p| self.rot > 0 && p.block >= slots) {
                    self.rot -= 1;
                    self.image.corrupt((p.block as usize + p.count / 2) * BLOCK + BLOCK / 2);
                }
                let result = parts
                    .iter()
                    .try_for_each(|p| self.read(p.block, &mut into.blocks_mut()[p.at..p.at + p.count]));
                buffer = Some(into);
                result
            }
            Pending::Read(_) => unreachable!("only reads are kept as requests"),
            Pending::Write { write, durable } => {
                // A write that fails may have done anything to what it covers.
                let result = self.burn().map_err(io::Error::other);
                if result.is_ok() {
                    let durable = durable && !self.lying;
                    self.event(Event::End { write, durable });
                    if !durable {
                        self.ended.push(write);
                    }
                }
                result
            }
            Pending::Flush(writes) => {
                let result = self.burn().map_err(io::Error::other);
                if result.is_ok() && !self.lying {
                    self.ended.retain(|w| !writes.contains(w));
                    self.event(Event::Flushed(writes));
                }
                result
            }
        };
        Completion { tag, buffer, result }
    }
}

impl Device for SimDevice {
    fn blocks(&self) -> u64 {
        self.disk.0.lock().blocks
    }

    fn submit(&mut self, tag: u64, request: Request) {
        self.traffic.count(&request);
        let mut state = self.disk.0.lock();
        let pending = match request {
            Request::Write { block, data, durable } => {
                let data = data.iter().map(|d| d.bytes()).collect::<Vec<_>>().concat();
                assert!(block + (data.len() / BLOCK) as u64 <= state.blocks, "a write beyond the disk");
                let write = state.next_write;
                state.next_write += 1;
                let written = block..block + (data.len() / BLOCK) as u64;
                state.failed.retain(|b| !written.contains(b));
                state.event(Event::Begin { write, block, data: data.into() });
                Pending::Write { write, durable }
            }
            Request::Flush => Pending::Flush(state.ended.clone()),
            read => Pending::Read(read),
        };
        state.pending.push((tag, pending));
    }

    fn buffer(&mut self, count: usize) -> BlocksMut {
        POOL.with(|pool| pool.lend(count)).unwrap_or_else(|| BlocksMut::zeroed(count))
    }

    /// One or several of what is in flight end, in any order.
    fn complete(&mut self, out: &mut Vec<Completion>) {
        let mut state = self.disk.0.lock();
        if state.pending.is_empty() {
            return;
        }
        let count = state.pending.len();
        let ends = state.rng.random_range(1..=count);
        for _ in 0..ends {
            let count = state.pending.len();
            let at = state.rng.random_range(0..count);
            let (tag, pending) = state.pending.swap_remove(at);
            let completion = state.end(tag, pending);
            out.push(completion);
        }
    }

    fn wait(&mut self) {}

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn read_now(&mut self, block: u64, buffer: &mut [Block]) -> io::Result<()> {
        self.disk.0.lock().read(block, buffer)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

impl Kv for SimKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, String> {
        Ok(self.disk.0.lock().image.index.get(key).cloned())
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Pair>, String> {
        let mut state = self.disk.0.lock();
        let start = prefix.max(from).to_vec();
        let pairs = state.image.index.range(start..).take_while(|(k, _)| k.starts_with(prefix)).take(limit);
        let pairs: Vec<Pair> = pairs.map(|(k, v)| (k.clone(), v.clone())).collect();
        state.scanned += pairs.len();
        Ok(pairs)
    }

    fn sweep(&self, prefix: &[u8], each: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), String> {
        let all = self.scan(prefix, prefix, usize::MAX)?;
        all.iter().all(|(key, value)| each(key, value));
        Ok(())
    }

    fn start(&mut self, batch: Batch) {
        let mut state = self.disk.0.lock();
        let result = state.burn();
        // Also a batch that failed may turn out to be there.
        if result.is_ok() || state.rng.random() {
            let durable = !state.index_lying;
            state.event(Event::Indexed { batch: batch.into(), durable });
        }
        self.result = Some(result);
    }

    fn poll(&mut self) -> Option<Result<(), String>> {
        self.result.take()
    }

    fn finish(&mut self) -> Result<(), String> {
        self.result.take().unwrap_or_else(|| Err("nothing was started".into()))
    }

    fn set_waker(&mut self, _: Waker) {}
}

/// The memory of a simulated disk, for tests that look at it.
#[cfg(test)]
impl SimDisk {
    pub(super) fn frozen(&self) -> Result<super::Frozen<SimDevice, SimKv>, StoreError> {
        let (device, kv) = self.parts()?;
        super::Frozen::open(device, kv)
    }

    pub(super) fn fsck(&self, deep: bool) -> super::FsckReport {
        let (device, kv) = self.parts().expect("an eventfd");
        super::fsck::check_parts(device, kv, deep)
    }

    pub(super) fn scanned(&self) -> usize {
        self.0.lock().scanned
    }

    pub(super) fn block(&self, block: u64) -> Vec<u8> {
        let mut out = vec![0; BLOCK];
        self.0.lock().image.read(block, &mut out);
        out
    }

    pub(super) fn set_block(&self, block: u64, bytes: &[u8]) {
        let mut state = self.0.lock();
        state.image.put(block, &Arc::new(bytes.to_vec()));
    }

    pub(super) fn edit_index(&self, edit: impl FnOnce(&mut BTreeMap<Vec<u8>, Vec<u8>>)) {
        edit(&mut self.0.lock().image.index);
    }
}
