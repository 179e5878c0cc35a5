//! [`ChunkStore`]: the journal, chunks in slots of a device, and the index behind both.
//!
//! Invariants: a slot is named by at most one durable chunk record; the device is written in place only where the
//! journal still holds the data (write-back) or where no durable record points (fresh slots), so a torn write never
//! damages anything that is visible; what reads return is durable; after a fatal error every call answers `Fatal`.
//!
//! ```text
//! transactions -> queue -> group: record in the journal, fresh slots -> durable, in order -> answered; `index.dirty`
//!                                                                                              |
//!        journal trimmed, slots released <- index.kv <- flush <- slots written <- `index.frozen`
//! ```
//!
//! Nothing here waits except the calls of [`Store`] that say so: [`ChunkStore::pump`] takes what the device and the
//! index have finished and starts what can be started.

use super::checkpoint::Checkpoint;
use super::device::{Completion, Device, Request, Traffic};
use super::group::{CommitState, Group, Queued};
use super::homes::{Homes, Region};
use super::journal::Ring;
use super::kv::Kv;
use super::layout::{self, Geometry, Key, ObjectRecord, Superblock, kind};
use super::place::{PlaceJob, Returned};
use super::read::{PROBE_MAX, ReadJob};
use super::slots::Slots;
use super::view::Index;
use super::wake::Waker;
use super::{
    ConcurrentStore, Done, Identity, ListEntry, Needed, ObjectState, PgMeta, Piece, Placed, Pulse, Store,
    StoreError, Txn, Usage, Work,
};
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use gabion_proto::limits::*;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// What a device request was for. The number of the group, read or step is part of its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Group = 1,
    GroupFlush = 2,
    Read = 3,
    WriteBack = 4,
    Checkpoint = 5,
    Place = 6,
}

const PURPOSE_SHIFT: u32 = 60;
/// Records of a home that a listing looks at in one go.
const LISTED_AT_ONCE_MIN: usize = 64;
const LISTED_AT_ONCE_MAX: usize = 4096;

/// See the module docs.
pub struct ChunkStore<D: Device, K: Kv> {
    // Before the device, which holds the lock of the directory, so that it is closed when the lock is free.
    pub(super) index: Index<K>,
    pub(super) device: D,
    pub(super) superblock: Superblock,
    pub(super) geometry: Geometry,
    pub(super) slots: Slots,
    pub(super) ring: Ring,
    pub(super) homes: Homes,
    /// Data blocks of one transaction that may go to the journal.
    pub(super) txn_blocks_max: u32,
    pub(super) objects: u64,
    pub(super) checksum_errors: u64,
    pub(super) dead: Option<String>,
    pub(super) queue: VecDeque<Queued>,
    /// Transactions so far, and how many of them were answered: always the first ones.
    pub(super) enqueued: u64,
    pub(super) answered: u64,
    pub(super) commits: HashMap<u64, CommitState>,
    /// Records in flight, in order.
    pub(super) groups: VecDeque<Group>,
    /// The last record that is durable with everything that it names.
    pub(super) durable: u64,
    /// A durable record or superblock says that everything up to here was (rule S1).
    pub(super) marked: u64,
    /// The last durable record that named fresh slots.
    pub(super) last_fresh: u64,
    pub(super) reads: HashMap<u64, ReadJob>,
    pub(super) next_read: u64,
    /// [`PROBE_MAX`]; tests have less time.
    pub(super) probe_max: Duration,
    /// Reads that wait until so many transactions are answered, because one of them changes what they read.
    pub(super) deferred: VecDeque<(u64, u64, Work)>,
    /// Chunks on their way to slots that nothing names yet.
    pub(super) placing: HashMap<u64, PlaceJob>,
    pub(super) next_place: u64,
    /// Placements that wait for slots until the journal is trimmed.
    pub(super) unplaced: VecDeque<(u64, Work)>,
    /// Slots of placements that nobody wanted in the end.
    pub(super) returned: Returned,
    pub(super) checkpoint: Option<Checkpoint>,
    /// A checkpoint was asked for; it starts when it can.
    pub(super) want_checkpoint: bool,
    pub(super) settling: Vec<u64>,
    finished: VecDeque<(u64, Done)>,
    next_own: u64,
    /// Device requests without a completion.
    in_flight: usize,
    completions: Vec<Completion>,
    waker: Waker,
    pub(super) stats: Stats,
}

/// What the store did since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub traffic: Traffic,
    /// Bytes of data that were acknowledged.
    pub data_bytes: u64,
    pub records: u64,
    pub checkpoints: u64,
    /// Bytes of batches handed to the index.
    pub index_bytes: u64,
    /// Now, not since it was opened.
    pub journal_bytes: u64,
    pub journal_used_bytes: u64,
}

/// Tags of this store's own blocking calls.
const OWN: u64 = 1 << 63;

impl From<ObjectRecord> for ObjectState {
    fn from(r: ObjectRecord) -> ObjectState {
        ObjectState { version: r.version, deleted: r.deleted, pending: r.pending }
    }
}

/// What `open` found out.
pub(super) struct Opened<D, K: Kv> {
    pub device: D,
    pub index: Index<K>,
    pub superblock: Superblock,
    pub slots: Slots,
    pub objects: u64,
    pub homes: Homes,
}

/// How far the objects of a group are listed that are in one of its homes.
struct Listed<T> {
    region: Region,
    prefix: Key,
    from: Vec<u8>,
    /// There may be some behind the page.
    more: bool,
    page: VecDeque<(ObjectId, T)>,
}

impl<T: serde::de::DeserializeOwned> Listed<T> {
    /// The first object that was not taken yet.
    fn first<K: Kv>(&mut self, index: &Index<K>, page: usize) -> Result<Option<ObjectId>, StoreError> {
        while self.page.is_empty() && self.more {
            let found = index.scan(&self.prefix, &self.from, page)?;
            self.more = found.len() == page;
            if self.more {
                (index.pulse)();
            }
            if let Some((last, _)) = found.last() {
                self.from = [&last[..], &[0]].concat();
            }
            // Others' may be between.
            for (key, value) in found.into_iter().filter(|(key, _)| self.region.class.has_key(key)) {
                let object = layout::parse_key(&key)?.object;
                let object =
                    object.ok_or_else(|| StoreError::Fatal("a key of the index names no object".into()))?;
                self.page.push_back((object, layout::decode(value.record()?)?));
            }
        }
        Ok(self.page.front().map(|(object, _)| *object))
    }
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    pub(super) fn assemble(opened: Opened<D, K>) -> Self {
        let Opened { device, mut index, superblock, slots, objects, homes } = opened;
        let geometry = superblock.geometry();
        let waker = device.waker();
        index.kv.set_waker(waker.clone());
        let durable = superblock.tail.seq;
        ChunkStore {
            device,
            index,
            superblock,
            geometry,
            slots,
            ring: Ring::new(geometry.journal_blocks, superblock.tail),
            homes,
            txn_blocks_max: super::group::txn_blocks_max(geometry.journal_blocks),
            objects,
            checksum_errors: 0,
            dead: None,
            queue: VecDeque::new(),
            enqueued: 0,
            answered: 0,
            commits: HashMap::new(),
            groups: VecDeque::new(),
            durable,
            marked: superblock.flushed,
            last_fresh: 0,
            reads: HashMap::new(),
            next_read: 0,
            probe_max: PROBE_MAX,
            deferred: VecDeque::new(),
            placing: HashMap::new(),
            next_place: 0,
            unplaced: VecDeque::new(),
            returned: Returned::default(),
            checkpoint: None,
            want_checkpoint: false,
            settling: Vec::new(),
            finished: VecDeque::new(),
            next_own: OWN,
            in_flight: 0,
            completions: Vec::new(),
            waker,
            stats: Stats::default(),
        }
    }

    pub(super) fn submit(&mut self, purpose: Purpose, number: u64, request: Request) {
        self.in_flight += 1;
        self.device.submit((purpose as u64) << PURPOSE_SHIFT | number, request);
    }

    /// Remembers a fatal error for good; everything that waits is answered with it.
    pub(super) fn die(&mut self, why: String) {
        if self.dead.is_some() {
            return;
        }
        self.dead = Some(why.clone());
        let fatal = || StoreError::Fatal(why.clone());
        self.queue.clear();
        let commits: Vec<_> = self.commits.drain().collect();
        for (tag, commit) in commits {
            let results = commit.results.into_iter().map(|r| r.unwrap_or_else(|| Err(fatal()))).collect();
            self.finish(tag, Done::Commit(results));
        }
        for (_, tag, work) in std::mem::take(&mut self.deferred) {
            self.finish(tag, work.failed(fatal()));
        }
        let mut reads: Vec<_> = self.reads.values().map(|r| (r.tag, r.failed(fatal()))).collect();
        reads.sort_by_key(|(tag, _)| *tag);
        self.reads.clear();
        for (tag, done) in reads {
            self.finish(tag, done);
        }
        let mut placing: Vec<u64> = self.placing.drain().map(|(_, job)| job.tag).collect();
        placing.extend(self.unplaced.drain(..).map(|(tag, _)| tag));
        placing.sort_unstable();
        for tag in placing {
            self.finish(tag, Done::Place(Err(fatal())));
        }
        for tag in std::mem::take(&mut self.settling) {
            self.finish(tag, Done::Settled(Err(fatal())));
        }
    }

    pub(super) fn finish(&mut self, tag: u64, done: Done) {
        self.finished.push_back((tag, done));
    }

    pub(super) fn alive(&self) -> Result<(), StoreError> {
        self.dead.clone().map_or(Ok(()), |why| Err(StoreError::Fatal(why)))
    }

    /// Passes a result on and remembers a fatal error for good.
    pub(super) fn watch<T>(&mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Fatal(why)) = &result {
            self.die(why.clone());
        }
        result
    }

    /// Takes what has been finished and starts what can be; true when there was something.
    pub(super) fn pump(&mut self) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        self.device.complete(&mut completions);
        let mut moved = !completions.is_empty();
        if moved {
            (self.index.pulse)();
        }
        for completion in completions.drain(..) {
            self.in_flight -= 1;
            self.completed(completion);
        }
        self.completions = completions;
        if self.dead.is_some() {
            return moved;
        }
        moved |= self.acknowledge();
        self.take_back();
        let result = self.advance_checkpoint();
        moved |= self.watch(result).unwrap_or(true);
        let result = self.fill();
        moved |= self.watch(result).unwrap_or(true);
        moved |= self.place_waiting();
        if self.want_checkpoint && self.checkpoint.is_none() && self.dead.is_none() {
            // Writers have just found that they must wait for one.
            let result = self.advance_checkpoint();
            moved |= self.watch(result).unwrap_or(true);
        }
        moved |= self.start_deferred();
        moved
    }

    fn completed(&mut self, completion: Completion) {
        let Completion { tag, buffer, result } = completion;
        let number = tag & ((1 << PURPOSE_SHIFT) - 1);
        let what = tag >> PURPOSE_SHIFT;
        if what == Purpose::Read as u64 {
            self.read_completed(number, buffer, result);
            return;
        }
        if let Err(e) = result {
            let what = if what == Purpose::GroupFlush as u64 { "flushing" } else { "writing to" };
            self.die(format!("{what} the disk failed: {e}"));
            return;
        }
        if what == Purpose::Group as u64 || what == Purpose::GroupFlush as u64 {
            self.group_completed(number);
        } else if what == Purpose::Place as u64 {
            self.place_completed(number);
        } else {
            self.checkpoint_completed(what == Purpose::WriteBack as u64);
        }
    }

    /// Something is going on that ends by itself.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight > 0 || (self.checkpoint.is_some() && self.dead.is_none())
    }

    /// Waits until the device, the index or the waker has something.
    pub(super) fn sleep(&mut self) {
        self.waker.arm();
        if !self.index_ready() {
            self.device.wait();
        }
        self.waker.disarm();
    }

    /// Carries on until `tag` is finished.
    fn finish_own(&mut self, tag: u64) -> Done {
        loop {
            let moved = self.pump();
            if let Some(at) = self.finished.iter().position(|(t, _)| *t == tag)
                && let Some((_, done)) = self.finished.remove(at)
            {
                return done;
            }
            if !moved {
                assert!(self.is_busy() || self.dead.is_some(), "the store waits for nothing");
                self.sleep();
            }
        }
    }

    fn own_tag(&mut self) -> u64 {
        self.next_own += 1;
        self.next_own
    }

    /// Until every commit before this one is durable: what follows sees everything.
    fn drain_commits(&mut self) -> Result<(), StoreError> {
        while self.dead.is_none() && !(self.queue.is_empty() && self.groups.is_empty()) {
            if !self.pump() {
                self.sleep();
            }
        }
        self.alive()
    }

    /// Records of one kind after `after`, decoded, in order. Each of the group's homes is read once.
    fn list_kind<T: serde::de::DeserializeOwned>(
        &mut self,
        kind: u8,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<(ObjectId, T)>, StoreError> {
        self.drain_commits()?;
        let regions = self.homes.regions(pg);
        let page = (limit / regions.len().max(1)).clamp(LISTED_AT_ONCE_MIN, LISTED_AT_ONCE_MAX);
        let start = |region: Region| Listed {
            from: after
                .map(|o| layout::object_key(kind, PgId { index: region.home, ..pg }, o))
                .map_or_else(Vec::new, |key| [&key[..], &[0]].concat()),
            prefix: region.key(kind, pg),
            region,
            more: true,
            page: VecDeque::new(),
        };
        let mut lists: Vec<Listed<T>> = regions.into_iter().map(start).collect();
        let mut next = BinaryHeap::new();
        for (n, list) in lists.iter_mut().enumerate() {
            next.extend(list.first(&self.index, page)?.map(|object| Reverse((object, n))));
        }
        let mut out = Vec::new();
        while out.len() < limit
            && let Some(Reverse((_, n))) = next.pop()
        {
            out.extend(lists[n].page.pop_front());
            next.extend(lists[n].first(&self.index, page)?.map(|object| Reverse((object, n))));
        }
        Ok(out)
    }

    fn find_object(&mut self, key: &Key) -> Result<Option<ObjectRecord>, StoreError> {
        let value = self.index.get(key)?;
        value.map(|v| layout::decode(v.record()?)).transpose()
    }

    fn all_groups(&mut self) -> Result<Vec<(PgId, PgMeta)>, StoreError> {
        self.drain_commits()?;
        let mut out = Vec::new();
        self.index.each(&[kind::META], |key, value| {
            out.push((layout::parse_key(&key)?.pg, layout::decode(value.record()?)?));
            Ok(())
        })?;
        Ok(out)
    }
}

impl<D: Device, K: Kv> Store for ChunkStore<D, K> {
    fn identity(&self) -> Identity {
        self.superblock.identity
    }

    fn commit(&mut self, group: Vec<Txn>) -> Vec<Result<(), StoreError>> {
        let tag = self.own_tag();
        self.start(tag, Work::Commit(group));
        match self.finish_own(tag) {
            Done::Commit(results) => results,
            _ => unreachable!("a commit ends as a commit"),
        }
    }

    fn read(
        &mut self,
        pg: PgId,
        object: ObjectId,
        below: &[LayerId],
        first_block: u32,
        block_count: u32,
    ) -> Result<Content, StoreError> {
        let tag = self.own_tag();
        let below = below.to_vec();
        self.start(tag, Work::Read { pg, object, below, first_block, block_count, pending: false });
        match self.finish_own(tag) {
            Done::Read(result) => result,
            _ => unreachable!("a read ends as a read"),
        }
    }

    fn read_pending(
        &mut self,
        pg: PgId,
        object: ObjectId,
        first_block: u32,
        block_count: u32,
    ) -> Result<Content, StoreError> {
        let tag = self.own_tag();
        let below = Vec::new();
        self.start(tag, Work::Read { pg, object, below, first_block, block_count, pending: true });
        match self.finish_own(tag) {
            Done::Read(result) => result,
            _ => unreachable!("a read ends as a read"),
        }
    }

    fn object(&mut self, pg: PgId, object: ObjectId) -> Result<Option<ObjectState>, StoreError> {
        self.alive()?;
        let drained = self.drain_commits();
        self.watch(drained)?;
        let result =
            self.find_object(&layout::object_key(kind::OBJECT, self.homes.home(pg, &object), object));
        self.watch(result).map(|r| r.map(Into::into))
    }

    fn read_object(&mut self, pg: PgId, object: ObjectId) -> Result<(ObjectState, Content), StoreError> {
        let tag = self.own_tag();
        self.start(tag, Work::ReadObject { pg, object });
        match self.finish_own(tag) {
            Done::ReadObject(result) => result,
            _ => unreachable!("a read ends as a read"),
        }
    }

    fn read_piece(
        &mut self,
        pg: PgId,
        object: ObjectId,
        first_block: u32,
        block_count: u32,
    ) -> Result<Piece, StoreError> {
        let tag = self.own_tag();
        self.start(tag, Work::ReadPiece { pg, object, first_block, block_count });
        match self.finish_own(tag) {
            Done::ReadPiece(result) => result,
            _ => unreachable!("a read ends as a read"),
        }
    }

    fn place(&mut self, pg: PgId, object: ObjectId, content: Content) -> Result<Placed, StoreError> {
        let tag = self.own_tag();
        self.start(tag, Work::Place { pg, object, content });
        match self.finish_own(tag) {
            Done::Place(result) => result,
            _ => unreachable!("a placement ends as one"),
        }
    }

    fn digest(&mut self, pg: PgId, object: ObjectId) -> Result<(ObjectState, u64), StoreError> {
        let tag = self.own_tag();
        self.start(tag, Work::Digest { pg, object });
        match self.finish_own(tag) {
            Done::Digest(result) => result,
            _ => unreachable!("a digest ends as a digest"),
        }
    }

    fn list(
        &mut self,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<ListEntry>, StoreError> {
        let result = self.list_kind::<ObjectRecord>(kind::OBJECT, pg, after, limit);
        Ok(self.watch(result)?.into_iter().map(|(o, r)| (o, r.into())).collect())
    }

    fn list_missing(
        &mut self,
        pg: PgId,
        after: Option<ObjectId>,
        limit: usize,
    ) -> Result<Vec<(ObjectId, Needed)>, StoreError> {
        let result = self.list_kind::<Needed>(kind::MISSING, pg, after, limit);
        self.watch(result)
    }

    fn pgs(&mut self) -> Result<Vec<(PgId, PgMeta)>, StoreError> {
        self.alive()?;
        let result = self.all_groups();
        self.watch(result)
    }

    fn meta(&mut self, pg: PgId) -> Result<Option<PgMeta>, StoreError> {
        let result = self.drain_commits().and_then(|()| self.index.get(&layout::pg_key(kind::META, pg)));
        let value = self.watch(result)?;
        let result = value.map(|v| layout::decode(v.record()?)).transpose();
        self.watch(result)
    }

    fn usage(&self) -> Usage {
        Usage {
            capacity_bytes: u64::from(self.slots.count()) * u64::from(CHUNK_BYTES),
            used_bytes: u64::from(self.slots.used()) * u64::from(CHUNK_BYTES),
            objects: self.objects,
            checksum_errors: self.checksum_errors,
        }
    }

    fn background(&mut self) -> Result<bool, StoreError> {
        self.alive()?;
        let tag = self.own_tag();
        self.start(tag, Work::Settle);
        match self.finish_own(tag) {
            Done::Settled(result) => result.map(|()| false),
            _ => unreachable!("settling ends as settling"),
        }
    }
}

impl<D: Device, K: Kv> ConcurrentStore for ChunkStore<D, K> {
    fn start(&mut self, tag: u64, work: Work) {
        if let Err(e) = self.alive() {
            self.finish(tag, work.failed(e));
            return;
        }
        match work {
            Work::Commit(txns) => self.enqueue(tag, txns),
            Work::Settle => {
                self.settling.push(tag);
                self.want_checkpoint = true;
            }
            Work::Place { .. } => self.start_place(tag, work),
            read => self.start_read(tag, read),
        }
    }

    fn progress(&mut self, done: &mut Vec<(u64, Done)>) -> bool {
        let moved = self.pump();
        done.extend(self.finished.drain(..));
        moved || !done.is_empty()
    }

    fn busy(&self) -> bool {
        self.is_busy()
    }

    fn wait(&mut self) {
        if !self.index_ready() {
            self.device.wait();
        }
    }

    fn stats(&self) -> Stats {
        let journal = |blocks: u32| u64::from(blocks) * u64::from(BLOCK_BYTES);
        Stats {
            traffic: self.device.traffic(),
            journal_bytes: journal(self.ring.blocks()),
            journal_used_bytes: journal(self.ring.used()),
            ..self.stats
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn set_pulse(&mut self, pulse: Pulse) {
        self.index.pulse = pulse;
    }

    fn completions(&self) -> Option<io::Result<OwnedFd>> {
        self.device.completions()
    }

    fn is_light(&self, work: &Work) -> bool {
        match work {
            Work::Commit(txns) => txns.iter().all(|txn| self.is_light_txn(txn)),
            _ => false,
        }
    }

    fn is_at_rest(&self) -> bool {
        !self.is_busy() && self.commits.is_empty() && !self.is_laborious()
    }

    fn is_laborious(&self) -> bool {
        self.dead.is_some()
            || self.checkpoint.is_some()
            || self.want_checkpoint
            || self.checkpoint_is_due()
            || !(self.reads.is_empty() && self.deferred.is_empty())
            || !(self.placing.is_empty() && self.unplaced.is_empty())
            || !self.settling.is_empty()
    }

    fn submit(&mut self) -> bool {
        self.device.hand_over()
    }
}
