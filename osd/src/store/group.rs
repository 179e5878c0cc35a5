//! Group commit: the transactions that wait become one record; its answers go out, in order, when it is durable.
//!
//! A record with fresh slots is written together with them, then the device is flushed once. One without is a single
//! durable write.

use super::chunk_store::{ChunkStore, Purpose};
use super::device::{Device, Request};
use super::journal::{self, Header, Image};
use super::kv::Kv;
use super::layout::BLOCK;
use super::rules::{Rule, holds};
use super::stage::{Changes, FreshBlocks, Stage};
use super::{Done, StoreError, Txn, TxnOp};
use gabion_proto::ids::*;
use gabion_proto::limits::BLOCK_BYTES;

/// Records in flight at a time.
const GROUPS_MAX: usize = 2;
const GROUP_TXNS_MAX: usize = 256;
const GROUP_BLOCKS_MAX: u32 = (1 << 20) / BLOCK_BYTES;
const TXN_BLOCKS_MAX: u32 = (512 << 10) / BLOCK_BYTES;

// Shares of the journal. A record has room for a group just under its target and one largest transaction.
const RECORD_SHARE: u32 = 4;
const TARGET_SHARE: u32 = 16;
const TXN_SHARE: u32 = 16;
/// The largest head of a transaction that shares its record with others.
const HEAD_SHARE: u32 = 8;
/// An activation has a missing map (rule P4), which may be as long as the list of the group's objects: so large a record holds it alone. Three
/// eighths find a place in any journal that was trimmed.
const ALONE_SHARE: (u32, u32) = (3, 8);
const _: () = assert!(
    RECORD_SHARE * (TARGET_SHARE * TXN_SHARE + TARGET_SHARE * HEAD_SHARE + TXN_SHARE * HEAD_SHARE)
        <= TARGET_SHARE * TXN_SHARE * HEAD_SHARE
);

/// Data blocks of one transaction that go to a journal of `journal_blocks`.
pub(super) fn txn_blocks_max(journal_blocks: u32) -> u32 {
    TXN_BLOCKS_MAX.min(journal_blocks / TXN_SHARE)
}

/// A transaction that is not in a record yet.
pub(super) struct Queued {
    number: u64,
    /// Its commit and its place in it.
    tag: u64,
    at: usize,
    txn: Txn,
}

/// A commit whose transactions are not all answered.
pub(super) struct CommitState {
    pub results: Vec<Option<Result<(), StoreError>>>,
    left: usize,
}

/// What a record touches, so that reads can wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touched {
    Object(PoolId, VolumeId, u32),
    Pg(PgId),
    /// Every group of it.
    Pool(PoolId),
}

/// A record in flight.
pub(super) struct Group {
    pub seq: u64,
    pub changes: Changes,
    /// The answers that it carries.
    outcomes: Vec<(u64, usize, Result<(), StoreError>)>,
    pub touched: Vec<Touched>,
    flushed: u64,
    data_bytes: u64,
    /// Of the last transaction in it.
    last_number: u64,
    writes_left: usize,
    needs_flush: bool,
    done: bool,
}

/// What a transaction touches.
pub(super) fn touched(txn: &Txn, out: &mut Vec<Touched>) {
    for op in &txn.ops {
        out.push(match op {
            TxnOp::Write { object, .. }
            | TxnOp::Zero { object, .. }
            | TxnOp::Delete { object, .. }
            | TxnOp::Replace { object, .. }
            | TxnOp::Assemble { object, .. }
            | TxnOp::Prepare { object, .. }
            | TxnOp::CommitPending { object, .. }
            | TxnOp::RollbackPending { object }
            | TxnOp::PurgeTombstone { object, .. }
            | TxnOp::Purge { object } => Touched::Object(txn.pg.pool, object.volume, object.index),
            TxnOp::SetMeta(_)
            | TxnOp::AddMissing { .. }
            | TxnOp::DropMissing { .. }
            | TxnOp::ClearMissing => continue,
            TxnOp::RemovePg => Touched::Pg(txn.pg),
            TxnOp::Divide { .. } | TxnOp::Combine { .. } => Touched::Pool(txn.pg.pool),
        });
    }
}

fn data_bytes(txn: &Txn) -> u64 {
    let content = |op: &TxnOp| match op {
        TxnOp::Write { content, .. } | TxnOp::Replace { content, .. } | TxnOp::Prepare { content, .. } => {
            content.data.len() as u64
        }
        TxnOp::Assemble { placed, .. } => placed.iter().map(|p| p.data_bytes()).sum(),
        _ => 0,
    };
    txn.ops.iter().map(content).sum()
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    pub(super) fn enqueue(&mut self, tag: u64, txns: Vec<Txn>) {
        if txns.is_empty() {
            self.finish(tag, Done::Commit(Vec::new()));
            return;
        }
        self.commits.insert(tag, CommitState { results: vec![None; txns.len()], left: txns.len() });
        for (at, txn) in txns.into_iter().enumerate() {
            self.enqueued += 1;
            self.queue.push_back(Queued { number: self.enqueued, tag, at, txn });
        }
    }

    fn answer(&mut self, tag: u64, at: usize, result: Result<(), StoreError>) {
        let Some(commit) = self.commits.get_mut(&tag) else { return };
        commit.results[at] = Some(result);
        commit.left -= 1;
        if commit.left == 0
            && let Some(commit) = self.commits.remove(&tag)
        {
            self.finish(tag, Done::Commit(commit.results.into_iter().flatten().collect()));
        }
    }

    /// Makes records of what waits, as far as there is room; true when there was one.
    pub(super) fn fill(&mut self) -> Result<bool, StoreError> {
        let mut moved = false;
        while !self.queue.is_empty() && self.groups.len() < GROUPS_MAX {
            if self.slots.starved || self.ring.place(self.ring.blocks() / RECORD_SHARE).is_none() {
                // Writers wait until the journal is trimmed.
                self.want_checkpoint = true;
                break;
            }
            if !self.build_group()? {
                break;
            }
            moved = true;
        }
        Ok(moved)
    }

    fn build_group(&mut self) -> Result<bool, StoreError> {
        let target = GROUP_BLOCKS_MAX.min(self.ring.blocks() / TARGET_SHARE) as usize * BLOCK;
        let shared_head_max = self.ring.blocks() as usize / HEAD_SHARE as usize * BLOCK;
        let alone = self.ring.blocks() / ALONE_SHARE.1 * ALONE_SHARE.0;
        let head_max = (alone - self.ring.blocks() / TXN_SHARE) as usize * BLOCK;
        // Not in this record: it waits for the next one, or for room.
        let mut put_off = false;
        let mut stage = Stage::default();
        let (mut outcomes, mut touches) = (Vec::new(), Vec::new());
        let (mut bytes, mut payload, mut last) = (0, 0, 0);
        while outcomes.len() < GROUP_TXNS_MAX && bytes < target {
            let Some(queued) = self.queue.pop_front() else { break };
            let Queued { number, tag, at, .. } = queued;
            let result = self.stage_txn(&mut stage, &queued.txn).and_then(|()| {
                let images = stage.txn.fresh.len() + stage.txn.placed.len();
                let head = journal::head_bytes(&stage.txn.sweeps, images, &stage.txn.keys);
                if head > head_max {
                    return Err(StoreError::Invalid(format!("a transaction of {head} bytes of metadata")));
                }
                put_off =
                    head > shared_head_max && (!outcomes.is_empty() || self.ring.place(alone).is_none());
                if put_off {
                    return Err(StoreError::NoSpace);
                }
                bytes += head + stage.txn.data_blocks as usize * BLOCK;
                Ok(())
            });
            match result {
                Ok(()) => {
                    std::mem::take(&mut stage.txn.homes).into_iter().for_each(|c| self.homes.set(c));
                    stage.accept();
                    super::place::named(&queued.txn);
                    touched(&queued.txn, &mut touches);
                    payload += data_bytes(&queued.txn);
                    last = number;
                    outcomes.push((tag, at, Ok(())));
                }
                Err(StoreError::Fatal(why)) => return Err(StoreError::Fatal(why)),
                Err(e) => {
                    for slot in stage.reject() {
                        self.slots.untake(slot);
                    }
                    if self.slots.starved || put_off {
                        self.queue.push_front(queued);
                        self.want_checkpoint |= self.slots.starved || outcomes.is_empty();
                        break;
                    }
                    last = number;
                    outcomes.push((tag, at, Err(e)));
                }
            }
        }
        if outcomes.is_empty() {
            return Ok(false);
        }
        if !stage.is_empty() {
            self.submit_group(stage.group, outcomes, touches, payload, last);
        } else if let Some(group) = self.groups.back_mut() {
            // These changed nothing, but what they saw is not durable yet.
            group.outcomes.extend(outcomes);
            group.last_number = last;
        } else {
            self.answered = last;
            for (tag, at, result) in outcomes {
                self.answer(tag, at, result);
            }
        }
        Ok(true)
    }

    fn submit_group(
        &mut self,
        mut changes: Changes,
        outcomes: Vec<(u64, usize, Result<(), StoreError>)>,
        touched: Vec<Touched>,
        data_bytes: u64,
        last_number: u64,
    ) {
        let seq = self.ring.head.seq + 1;
        let fresh = std::mem::take(&mut changes.fresh);
        let images: Vec<Image> =
            fresh.iter().map(FreshBlocks::image).chain(changes.placed.iter().copied()).collect();
        let header = Header {
            nonce: self.superblock.nonce,
            seq,
            flushed: self.durable,
            previous_crc: self.ring.head.crc,
        };
        let (record, crc) = journal::encode(header, &changes.sweeps, &images, &mut changes.keys);
        let len = record.count() as u32;
        let block = self.ring.place(len).expect("room for the largest record was checked");
        self.ring.push(block, len, seq, crc);
        let needs_flush = !images.is_empty() && holds(Rule::FlushBeforeAnswer);
        let writes_left = 1 + fresh.len();
        for f in &fresh {
            let block = self.geometry.slot_block(f.slot) + u64::from(f.first);
            let data = vec![f.data.clone()];
            self.submit(Purpose::Group, seq, Request::Write { block, data, durable: false });
        }
        changes.fresh = fresh;
        let block = super::layout::JOURNAL_FIRST + u64::from(block);
        let data = vec![record];
        self.submit(Purpose::Group, seq, Request::Write { block, data, durable: !needs_flush });
        self.stats.records += 1;
        self.groups.push_back(Group {
            seq,
            changes,
            outcomes,
            touched,
            flushed: header.flushed,
            data_bytes,
            last_number,
            writes_left,
            needs_flush,
            done: false,
        });
    }

    /// A write of a group, or its flush, has completed.
    pub(super) fn group_completed(&mut self, seq: u64) {
        let Some(group) = self.groups.iter_mut().find(|g| g.seq == seq) else { return };
        if group.writes_left > 1 {
            group.writes_left -= 1;
        } else if group.needs_flush {
            group.needs_flush = false;
            self.submit(Purpose::GroupFlush, seq, Request::Flush);
        } else {
            group.done = true;
        }
    }

    fn next_done(&mut self) -> Option<Group> {
        if holds(Rule::AnswersInOrder) {
            return self.groups.pop_front_if(|g| g.done);
        }
        let at = self.groups.iter().position(|g| g.done)?;
        self.groups.remove(at)
    }

    /// Answers what is durable, in order.
    pub(super) fn acknowledge(&mut self) -> bool {
        let mut moved = false;
        while let Some(group) = self.next_done() {
            moved = true;
            self.durable = group.seq;
            self.answered = group.last_number;
            self.marked = self.marked.max(group.flushed);
            if !(group.changes.fresh.is_empty() && group.changes.placed.is_empty()) {
                self.last_fresh = group.seq;
            }
            self.index.dirty.extend(group.changes.keys);
            for slot in group.changes.freed {
                self.slots.retire(group.seq, slot);
            }
            if !holds(Rule::SlotReuse) {
                self.slots.release(group.seq);
            }
            self.objects = self.objects.saturating_add_signed(group.changes.objects);
            self.stats.data_bytes += group.data_bytes;
            for (tag, at, result) in group.outcomes {
                self.answer(tag, at, result);
            }
        }
        moved
    }

    /// Whether a commit in front of it changes what `object` reads, whatever its layer.
    pub(super) fn is_touched(&self, pg: PgId, object: ObjectId) -> bool {
        let hits = |t: &Touched| match *t {
            Touched::Object(pool, volume, index) => {
                (pool, volume, index) == (pg.pool, object.volume, object.index)
            }
            Touched::Pg(p) => p == pg,
            Touched::Pool(pool) => pool == pg.pool,
        };
        if self.groups.iter().any(|g| g.touched.iter().any(hits)) {
            return true;
        }
        let mut waiting = Vec::new();
        self.queue.iter().for_each(|q| touched(&q.txn, &mut waiting));
        waiting.iter().any(hits)
    }
}
