//! The store's contract once more, as plainly as it can be said, and random operations on it. Shares no code with the
//! store.

use super::*;
use gabion_proto::limits::*;
use gabion_proto::placement::pg_index;
use rand::Rng;
use rand::rngs::StdRng;
use std::collections::BTreeMap;

pub const PGS: [PgId; 2] = [PgId { pool: PoolId(1), index: 3 }, PgId { pool: PoolId(1), index: 4 }];
/// Those that one group is divided into.
pub const FAMILY: [PgId; 4] = [family(0), family(1), family(2), family(3)];
const BLOCK: usize = BLOCK_BYTES as usize;

const fn family(index: u32) -> PgId {
    PgId { pool: PoolId(2), index }
}

/// Content of a block by its stamp; 0 is zeros.
pub fn stamped(stamp: u32, block: u32) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; BLOCK];
    }
    let mut out = Vec::with_capacity(BLOCK);
    while out.len() < BLOCK {
        out.extend_from_slice(&stamp.to_le_bytes());
        out.extend_from_slice(&block.to_le_bytes());
        out.extend_from_slice(&(out.len() as u64).to_le_bytes());
    }
    out
}

/// Blocks that are present, by their stamps.
pub type ModelBlocks = BTreeMap<u32, u32>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelObject {
    pub version: u64,
    pub deleted: bool,
    pub blocks: ModelBlocks,
    pub pending: Option<(u64, ModelBlocks)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelPg {
    pub meta: Option<PgMeta>,
    pub objects: BTreeMap<ObjectId, ModelObject>,
    pub missing: BTreeMap<ObjectId, (u64, bool)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model(pub BTreeMap<PgId, ModelPg>);

pub fn v(raw: u64) -> Version {
    Version::from_raw(raw)
}

pub fn object(index: u32, layer: u32) -> ObjectId {
    ObjectId { volume: VolumeId(9), index, layer: LayerId(layer) }
}

/// Stamped content of these blocks.
pub fn content(blocks: &ModelBlocks) -> Content {
    let (mut extents, mut data) = (Vec::new(), Vec::new());
    for (&block, &stamp) in blocks {
        let one = match stamp {
            0 => Content::zero(block, 1),
            _ => Content::data(block, stamped(stamp, block).into()),
        };
        extents.extend(one.extents);
        data.extend_from_slice(&one.data);
    }
    Content { extents, data: data.into() }
}

/// The stamps in content that a store returned.
pub fn stamps(content: &Content) -> ModelBlocks {
    content.validate(true).expect("valid content");
    let mut out = ModelBlocks::new();
    for (block, bytes, _) in content.data_blocks() {
        let stamp = u32::from_le_bytes(bytes[..4].try_into().expect("4 bytes"));
        assert!(bytes == stamped(stamp, block), "block {block} holds bytes that were never written there");
        assert!(out.insert(block, stamp).is_none());
    }
    for e in content.extents.iter().filter(|e| e.kind == gabion_proto::blocks::ExtentKind::Zero) {
        for block in e.first_block..e.first_block + e.block_count {
            assert!(out.insert(block, 0).is_none());
        }
    }
    out
}

impl Model {
    /// Applies a transaction whole or not at all; whether it was.
    pub fn apply(&mut self, txn: &Txn) -> bool {
        match txn.ops[..] {
            [TxnOp::Divide { from, to }] => {
                self.divide(txn.pg, from, to);
                return true;
            }
            [TxnOp::Combine { from, to }] => {
                self.combine(txn.pg, from, to);
                return true;
            }
            _ => {}
        }
        let mut pg = self.0.get(&txn.pg).cloned().unwrap_or_default();
        let done = txn.ops.iter().all(|op| step(&mut pg, op));
        if done {
            if pg == ModelPg::default() {
                self.0.remove(&txn.pg);
            } else {
                self.0.insert(txn.pg, pg);
            }
        }
        done
    }

    fn divide(&mut self, pg: PgId, from: u32, to: u32) {
        let Some(whole) = self.0.get(&pg).filter(|g| g.meta.is_some()).cloned() else { return };
        for n in 0..to / from {
            let part = PgId { index: pg.index + n * from, ..pg };
            let own = |o: &ObjectId| pg_index(o.volume, o.index, to) == part.index;
            let mut group = whole.clone();
            group.objects.retain(|o, _| own(o));
            group.missing.retain(|o, _| own(o));
            group.meta = group.meta.map(|meta| PgMeta { pg_count: to, ..meta });
            self.0.insert(part, group);
        }
    }

    fn combine(&mut self, pg: PgId, from: u32, to: u32) {
        let parts = (0..from / to).map(|n| PgId { index: pg.index + n * to, ..pg });
        let groups: Vec<ModelPg> = parts.filter_map(|part| self.0.remove(&part)).collect();
        let metas: Vec<PgMeta> = groups.iter().filter_map(|g| g.meta).collect();
        let mut whole = ModelPg::default();
        if let Some(promised) = metas.iter().map(|m| m.promised).max() {
            let lowest = metas.iter().map(|m| m.activated).min().expect("there is one");
            let all = metas.len() == (from / to) as usize;
            let activated = if all { lowest } else { Epoch(0) };
            whole.meta = Some(PgMeta { promised, activated, shard: None, pg_count: to });
        }
        for group in groups {
            whole.objects.extend(group.objects);
            whole.missing.extend(group.missing);
        }
        if whole != ModelPg::default() {
            self.0.insert(pg, whole);
        }
    }

    /// What a store holds.
    pub fn of(store: &mut impl Store) -> Model {
        let mut out = Model::default();
        let metas: BTreeMap<_, _> = store.pgs().expect("groups").into_iter().collect();
        for id in PGS.into_iter().chain(FAMILY) {
            let mut pg = ModelPg { meta: metas.get(&id).copied(), ..ModelPg::default() };
            for (object, state) in store.list(id, None, 1000).expect("lists") {
                let (read, content) = store.read_object(id, object).expect("reads");
                assert_eq!(read, state);
                let pending = state.pending.map(|p| (p.raw(), ModelBlocks::new()));
                let (version, deleted) = (state.version.raw(), state.deleted);
                pg.objects
                    .insert(object, ModelObject { version, deleted, blocks: stamps(&content), pending });
            }
            for (object, needed) in store.list_missing(id, None, 1000).expect("lists") {
                pg.missing.insert(object, (needed.version.raw(), needed.deleted));
            }
            if pg != ModelPg::default() {
                out.0.insert(id, pg);
            }
        }
        out
    }

    /// Without what a store does not show.
    pub fn visible(&self) -> Model {
        let mut out = self.clone();
        for object in out.0.values_mut().flat_map(|pg| pg.objects.values_mut()) {
            object.pending.iter_mut().for_each(|(_, blocks)| blocks.clear());
        }
        out
    }

    pub fn objects(&self) -> u64 {
        self.0.values().map(|pg| pg.objects.len() as u64).sum()
    }

    /// What a read through layers returns.
    pub fn read(&self, pg: PgId, top: ObjectId, below: &[LayerId], first: u32, count: u32) -> ModelBlocks {
        let mut out = ModelBlocks::new();
        let Some(pg) = self.0.get(&pg) else { return out };
        for layer in std::iter::once(top.layer).chain(below.iter().copied()) {
            let Some(object) = pg.objects.get(&ObjectId { layer, ..top }) else { continue };
            for (&block, &stamp) in object.blocks.range(first..first + count) {
                out.entry(block).or_insert(stamp);
            }
        }
        out
    }

    /// One layer as it will be when its pending version is committed.
    pub fn read_pending(&self, pg: PgId, object: ObjectId, first: u32, count: u32) -> ModelBlocks {
        let Some(o) = self.0.get(&pg).and_then(|pg| pg.objects.get(&object)) else {
            return ModelBlocks::new();
        };
        let mut blocks = o.blocks.clone();
        blocks.extend(o.pending.iter().flat_map(|(_, new)| new));
        blocks.range(first..first + count).map(|(b, s)| (*b, *s)).collect()
    }
}

fn step(pg: &mut ModelPg, op: &TxnOp) -> bool {
    let at = |pg: &ModelPg, o: &ObjectId| pg.objects.get(o).cloned().unwrap_or_default();
    let set = |pg: &mut ModelPg, o: &ObjectId, version: &Version, deleted, blocks| {
        pg.objects.insert(*o, ModelObject { version: version.raw(), deleted, blocks, pending: None });
    };
    match op {
        TxnOp::Write { object: o, prev, version, content } => {
            let mut now = at(pg, o);
            if now.version != prev.raw() || version <= prev {
                return false;
            }
            now.blocks.extend(stamps(content));
            set(pg, o, version, false, now.blocks);
        }
        TxnOp::Zero { object: o, prev, version, first_block, block_count, .. } => {
            let mut now = at(pg, o);
            if now.version != prev.raw() || version <= prev {
                return false;
            }
            now.blocks.extend((*first_block..first_block + block_count).map(|b| (b, 0)));
            set(pg, o, version, false, now.blocks);
        }
        TxnOp::Delete { object: o, prev, version } => {
            if at(pg, o).version != prev.raw() || version <= prev {
                return false;
            }
            set(pg, o, version, true, ModelBlocks::new());
        }
        TxnOp::Replace { object: o, version, deleted, content } => {
            set(pg, o, version, *deleted, stamps(content));
            pg.missing.remove(o);
        }
        TxnOp::Assemble { .. } => unreachable!("the model replaces, see `assembled`"),
        TxnOp::Prepare { object: o, base, version, content } => {
            let now = at(pg, o);
            if now.version != base.raw() {
                return false;
            }
            let pending = Some((version.raw(), stamps(content)));
            pg.objects.insert(*o, ModelObject { pending, ..now });
        }
        TxnOp::CommitPending { object: o, version } => {
            let mut now = at(pg, o);
            if now.version == version.raw() {
                return true;
            }
            match now.pending {
                Some((pending, blocks)) if pending == version.raw() => now.blocks.extend(blocks),
                _ => return false,
            }
            set(pg, o, version, false, now.blocks);
        }
        TxnOp::RollbackPending { object: o } => {
            let now = at(pg, o);
            if now.version == 0 {
                pg.objects.remove(o);
            } else {
                pg.objects.insert(*o, ModelObject { pending: None, ..now });
            }
        }
        TxnOp::PurgeTombstone { object: o, version } => {
            let now = at(pg, o);
            if now.deleted && now.version == version.raw() {
                pg.objects.remove(o);
            }
        }
        TxnOp::Purge { object: o } => {
            pg.objects.remove(o);
            pg.missing.remove(o);
        }
        TxnOp::SetMeta(meta) => pg.meta = Some(*meta),
        TxnOp::AddMissing { object: o, needed } => {
            pg.missing.insert(*o, (needed.version.raw(), needed.deleted));
        }
        TxnOp::DropMissing { object: o } => _ = pg.missing.remove(o),
        TxnOp::ClearMissing => pg.missing.clear(),
        TxnOp::RemovePg => *pg = ModelPg::default(),
        TxnOp::Divide { .. } | TxnOp::Combine { .. } => unreachable!("divided with its siblings"),
    }
    true
}

/// Makes random transactions that mostly succeed.
pub struct Generator {
    pub rng: StdRng,
    next_stamp: u32,
    /// Groups of the family, and what is to be done first because they became more.
    count: u32,
    divisions: Vec<Txn>,
    /// Little but such changes.
    restless: bool,
}

impl Generator {
    pub fn new(rng: StdRng) -> Generator {
        Generator { rng, next_stamp: 1, count: 1, divisions: Vec::new(), restless: false }
    }

    /// Of the family only, whose groups become more and fewer, and are deleted, all the time.
    pub fn restless(rng: StdRng) -> Generator {
        Generator { restless: true, ..Generator::new(rng) }
    }

    /// On top of what a crash has left, maybe between two groups that were to be divided.
    pub fn resuming(rng: StdRng, model: &Model) -> Generator {
        let counts = || {
            let metas = FAMILY.into_iter().filter_map(|pg| Some((pg, model.0.get(&pg)?.meta?)));
            metas.map(|(pg, meta)| (pg, meta.pg_count))
        };
        let to = counts().map(|(_, count)| count).max().unwrap_or(1);
        let coarse = counts().filter(|(_, from)| *from < to);
        let divide = |(pg, from)| Txn { pg, ops: vec![TxnOp::Divide { from, to }], reserve: true };
        Generator { count: to, divisions: coarse.map(divide).collect(), ..Generator::new(rng) }
    }

    fn range(&mut self) -> (u32, u32) {
        match self.rng.random_range(0..8) {
            0 => (self.rng.random_range(0..3) * BLOCKS_PER_CHUNK, BLOCKS_PER_CHUNK),
            1 => (self.rng.random_range(0..40), self.rng.random_range(30..70)),
            _ => (self.rng.random_range(0..90), self.rng.random_range(1..4)),
        }
    }

    fn blocks(&mut self) -> ModelBlocks {
        let (first, count) = self.range();
        let (zeros, sparse) = (self.rng.random_range(0..4) == 0, self.rng.random_range(0..6) == 0);
        self.next_stamp += 1;
        let stamp = self.next_stamp;
        (first..first + count)
            .filter(|b| !sparse || b % 2 == 0)
            .map(|b| (b, if zeros && b % 3 == 0 { 0 } else { stamp }))
            .collect()
    }

    fn op(&mut self, id: PgId, pg: &ModelPg) -> TxnOp {
        let mut object = object(self.rng.random_range(0..3), self.rng.random_range(0..2));
        let divided = FAMILY.contains(&id);
        while divided && pg_index(object.volume, object.index, self.count) != id.index {
            object.index += 1;
        }
        let pg_count = if divided { self.count } else { 0 };
        if divided && pg.meta.is_none() {
            let meta = PgMeta { promised: Epoch(2), activated: Epoch(1), shard: None, pg_count };
            return TxnOp::SetMeta(meta);
        }
        let now = pg.objects.get(&object).cloned().unwrap_or_default();
        let wrong = self.rng.random_range(0..30) == 0;
        let prev = v(now.version + u64::from(wrong));
        let version = v(prev.raw() + self.rng.random_range(1..3));
        match self.rng.random_range(0..40) {
            0..16 => TxnOp::Write { object, prev, version, content: content(&self.blocks()) },
            16..20 => {
                let (first_block, block_count) = self.range();
                let discard = self.rng.random();
                TxnOp::Zero { object, prev, version, first_block, block_count, discard }
            }
            20..22 => TxnOp::Delete { object, prev, version },
            22..25 => {
                let deleted = self.rng.random_range(0..4) == 0;
                let blocks = if deleted { ModelBlocks::new() } else { self.blocks() };
                TxnOp::Replace { object, version, deleted, content: content(&blocks) }
            }
            25..29 => {
                let pending = now.pending.as_ref().map_or(0, |(v, _)| *v);
                let version = v(version.raw().max(pending + 1));
                TxnOp::Prepare { object, base: prev, version, content: content(&self.blocks()) }
            }
            29..32 => {
                let pending = now.pending.map_or(now.version, |(v, _)| v);
                TxnOp::CommitPending { object, version: v(pending) }
            }
            32 => TxnOp::RollbackPending { object },
            33 => TxnOp::PurgeTombstone { object, version: v(now.version) },
            34 => TxnOp::Purge { object },
            35 => {
                let shard = (wrong && !divided).then_some(ShardId { number: 1, k: 2, m: 1, matrix: 1 });
                TxnOp::SetMeta(PgMeta {
                    promised: Epoch(version.raw()),
                    activated: Epoch(prev.raw()),
                    shard,
                    pg_count,
                })
            }
            36 => TxnOp::AddMissing { object, needed: Needed::certain(version, wrong) },
            37 => TxnOp::DropMissing { object },
            38 => TxnOp::ClearMissing,
            _ if self.restless || self.rng.random_range(0..4) == 0 => TxnOp::RemovePg,
            _ => TxnOp::Write { object, prev, version, content: content(&self.blocks()) },
        }
    }

    /// A transaction that replaces an object, as the model is told, and what brings a store there: chunks that are placed
    /// ahead, and some that are kept. `None`: the store has no room.
    pub fn assembled(&mut self, model: &Model, txn: &Txn, store: &mut impl Store) -> Option<(Txn, Txn)> {
        let [TxnOp::Replace { object, version, deleted: false, content: new }] = &txn.ops[..] else {
            return None;
        };
        let now = model.0.get(&txn.pg).and_then(|pg| pg.objects.get(object)).cloned().unwrap_or_default();
        let may_keep = !now.deleted && now.pending.is_none() && now.version > 0;
        let chunks: std::collections::BTreeSet<u32> =
            now.blocks.keys().map(|b| b / BLOCKS_PER_CHUNK).collect();
        let kept: Vec<u32> = chunks.into_iter().filter(|_| may_keep && self.rng.random()).collect();
        let stays = |block: &u32| kept.contains(&(block / BLOCKS_PER_CHUNK));
        let mut blocks = stamps(new);
        blocks.retain(|b, _| !stays(b));
        let mut placed = Vec::new();
        // Piece by piece, and some more that nobody wants in the end.
        let pieces =
            blocks.keys().map(|b| b / (2 * BLOCKS_PER_CHUNK)).collect::<std::collections::BTreeSet<u32>>();
        for piece in pieces {
            let piece: ModelBlocks = blocks
                .iter()
                .filter(|(b, _)| **b / (2 * BLOCKS_PER_CHUNK) == piece)
                .map(|(b, s)| (*b, *s))
                .collect();
            for _ in 0..self.rng.random_range(0..2) {
                store.place(txn.pg, *object, content(&piece)).ok()?;
            }
            placed.push(store.place(txn.pg, *object, content(&piece)).ok()?);
        }
        blocks.extend(now.blocks.iter().filter(|(b, _)| stays(b)));
        let replace =
            TxnOp::Replace { object: *object, version: *version, deleted: false, content: content(&blocks) };
        let base = v(now.version);
        let assemble = TxnOp::Assemble { object: *object, version: *version, base, kept, placed };
        let of = |op| Txn { ops: vec![op], ..txn.clone() };
        Some((of(replace), of(assemble)))
    }

    /// A transaction on top of `model`.
    pub fn txn(&mut self, model: &Model) -> Txn {
        // One change is not begun before the last one is done everywhere.
        let chance = if self.restless { 8 } else { 60 };
        if self.divisions.is_empty() && self.rng.random_range(0..chance) == 0 {
            let from = self.count;
            let to = [1, 2, 4][self.rng.random_range(0..3)];
            let op = if to > from { TxnOp::Divide { from, to } } else { TxnOp::Combine { from, to } };
            let change = |n| Txn { pg: family(n), ops: vec![op.clone()], reserve: true };
            self.divisions = (0..from.min(to)).filter(|_| from != to).map(change).collect();
            self.count = to;
        }
        if let Some(txn) = self.divisions.pop() {
            return txn;
        }
        let pg = match self.rng.random_range(0..6) {
            n @ 0..4 if !self.restless => PGS[n % PGS.len()],
            _ => FAMILY[self.rng.random_range(0..self.count) as usize],
        };
        let mut scratch = model.0.get(&pg).cloned().unwrap_or_default();
        let count = if self.rng.random_range(0..4) == 0 { 3 } else { 1 };
        let mut ops = Vec::new();
        for _ in 0..count {
            let op = self.op(pg, &scratch);
            step(&mut scratch, &op);
            ops.push(op);
        }
        Txn { pg, ops, reserve: false }
    }
}
