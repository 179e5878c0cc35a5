//! Damage of single objects that is known to be repairable, and nothing else goes wrong until it is repaired:
//!
//! - *Wrong bytes*: a copy, or shard, of an object at the right version has another byte than was written, under a checksum that fits, as firmware or
//!   memory may make it. Until a scrub has compared it with the others it is believed, and the oracle is told of that one byte. Of three
//!   copies, or with two parity shards, one that is wrong is replaced. Where a scrub can only say that they do not fit, the volume's holder writes the blocks again.
//! - *Rot everywhere*: each copy, or shard, cannot be read in a place of its own: every row still decodes, and every block is good in another copy. All must be
//!   readable meanwhile, and be repaired by one scrub. Of whole copies there may be a block besides that is good in none: reads of that one may fail, until
//!   the holder has written it again; then the next scrub must repair the others.
//! - *A lone copy rots*: operators move a group away from all its members but one, whose copy cannot be read. Those that it leaves have good ones.

use crate::client::{Kind, OBJECT_BLOCKS, Op, VOLUME_OBJECTS, start};
use crate::nodes::Node;
use crate::oracle::{BLOCK, BlockId, Harm, TAG_BYTES};
use crate::world::{Ev, World};
use bytes::Bytes;
use gabion_monitor::state::Command;
use gabion_osd::store::{ObjectState, StoreError};
use gabion_proto::blocks::{Content, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::map::{PgRecord, Redundancy};
use std::collections::BTreeSet;
use std::ops::Range;

const LOOK_MS: u64 = 200;
/// What is damaged is looked for after a while.
const UNNOTICED_MS: u64 = 6_000;
/// Shards commit a write so long after its answer.
const COMMIT_MS: u64 = 5_000;

/// In the tally: the holder of a volume has written damaged blocks again.
const WRITTEN_AGAIN: &str = "damaged blocks written again";

pub struct Damage {
    object: ObjectId,
    /// Whose holder writes the object.
    volume: usize,
    spots: Vec<Spot>,
    /// What restores it, if scrubs cannot.
    rewrite: Vec<Range<u64>>,
    /// Nobody else writes these blocks of the volume meanwhile.
    held: Range<u64>,
    /// Who was taken out for it.
    out: Vec<OsdId>,
    stage: Stage,
}

/// A block of an object on a disk, or row of a shard.
struct Spot {
    node: usize,
    block: u32,
    /// What it is there that it should not be; none: unreadable.
    wrong: Option<Bytes>,
    /// The holder does not write it again: a scrub repairs it.
    stays: bool,
}

#[derive(Clone, Copy)]
enum Stage {
    /// Nobody looks for it until then.
    Unnoticed {
        until: u64,
        deep: bool,
    },
    /// The group moves.
    Moves,
    /// A scrub looks for it.
    Sought,
    /// What is to be written next.
    Rewrite {
        next: usize,
    },
    Written {
        client: usize,
        request: u64,
        next: usize,
    },
    /// Everything is written again, and committed soon.
    Committed {
        by: u64,
    },
    /// A scrub must find nothing any more.
    SoughtAgain,
}

/// An object that is the same, and can be read, wherever it is.
struct Sound {
    volume: usize,
    object: ObjectId,
    pg: PgId,
    record: PgRecord,
    /// In the order of the acting set.
    copies: Vec<(usize, ObjectState, Content)>,
}

impl Sound {
    fn first_block(&self) -> u64 {
        u64::from(self.object.index) * OBJECT_BLOCKS
    }
}

/// The blocks of data that there are.
fn data_blocks(content: &Content) -> Vec<u32> {
    content.data_blocks().map(|(block, ..)| block).collect()
}

/// One byte is another one, and the checksum fits; and what that block is now.
fn altered(content: &Content, block: u32, at: usize, by: u8) -> Option<(Content, Bytes)> {
    let nth = content.data_blocks().position(|(b, ..)| b == block)?;
    let mut data = content.data.to_vec();
    data[nth * BLOCK + at] ^= by;
    let wrong = Bytes::copy_from_slice(&data[nth * BLOCK..][..BLOCK]);
    let mut extents = content.extents.clone();
    let of = extents.iter_mut().find(|e| (e.first_block..e.first_block + e.block_count).contains(&block))?;
    if let ExtentKind::Data { crcs } = &mut of.kind {
        crcs[(block - of.first_block) as usize] = crc32fast::hash(&wrong);
    }
    Some((Content { extents, data: data.into() }, wrong))
}

impl World {
    /// Nothing is wrong, under way, or about to be.
    fn is_well(&self) -> bool {
        let well = |n: &Node| {
            let late = [n.asleep_until, n.slow_disk.until, n.slow_net.until];
            n.core.is_some() && late.iter().all(|until| *until <= self.now) && !n.disk.is_in_trouble()
        };
        let map = &self.monitor.state.map;
        let set = |osds: &[OsdId]| osds.iter().copied().collect::<BTreeSet<OsdId>>();
        self.damage.is_none()
            && self.nodes.iter().all(|n| n.lost || well(n))
            && self.network.cut.is_empty()
            && self.monitor_runs()
            && self.all_clean()
            && self.scrubs_done()
            && map.osds.values().all(|o| o.up || !o.in_cluster)
            && map.pgs.values().all(|r| set(&r.up) == set(&r.acting))
            && self.monitor.state.merges_to(self.pool).is_none()
            && self.nodes.iter().filter_map(|n| n.core.as_ref()).all(|c| c.client_ops() == 0)
            && !self.is_op_under_way()
    }

    /// Some object that a volume's holder may write.
    fn sound_object(&mut self) -> Option<Sound> {
        let holds = |c: usize| {
            let (seat, client) = (&self.seats[self.clients[c].volume], &self.clients[c]);
            let asked = self.monitor.state.map.attachments.get(&client.volume_id).and_then(|a| a.snapshot);
            let free = client.ready && client.pause.is_none() && asked.is_none();
            !client.observes && !seat.removed && seat.holder == c && free && !client.has_ended()
        };
        let holders: Vec<usize> = (0..self.clients.len()).filter(|c| holds(*c)).collect();
        let client = *holders.get(self.rng.below(holders.len().max(1) as u64) as usize)?;
        let index = self.rng.below(VOLUME_OBJECTS.into()) as u32;
        let c = &self.clients[client];
        let (volume, object) = (c.volume, ObjectId { volume: c.volume_id, index, layer: *c.layers.first()? });
        let map = &self.monitor.state.map;
        let pg = map.pg_of(self.pool, object.volume, index)?;
        let record = PgRecord::clone(map.pgs.get(&pg)?);
        let mut copies = Vec::new();
        for osd in record.members() {
            let node = self.nodes.iter().position(|n| n.id == osd)?;
            let (state, content) = self.nodes[node].disk.whole(pg, object)?;
            if state.deleted || state.pending.is_some() {
                return None;
            }
            copies.push((node, state, content));
        }
        let (first, rest) = copies.split_first()?;
        let coded = matches!(self.redundancy(), Redundancy::Erasure { .. });
        let same = rest.iter().all(|c| c.1 == first.1 && (coded || c.2 == first.2));
        (same && copies.len() == self.width()).then_some(Sound { volume, object, pg, record, copies })
    }

    /// False: not now.
    pub fn damage(&mut self, kind: &str) -> bool {
        // Nothing else is to rot.
        self.nodes[0].disk.rot_under_reads(0);
        if !self.is_well() {
            return false;
        }
        let Some(sound) = self.sound_object() else { return false };
        let damage = match kind {
            "wrong bytes" => self.make_wrong(sound),
            "rot everywhere" => self.rot_everywhere(sound),
            _ => self.rot_lone_copy(sound),
        };
        let Some(damage) = damage else { return false };
        self.rotten = true;
        self.damage = Some(damage);
        self.at(LOOK_MS, Ev::Damage);
        true
    }

    /// Any of it, as a fault.
    pub fn damage_something(&mut self) {
        let kinds = ["wrong bytes", "wrong bytes", "rot everywhere", "lone copy rots"];
        let kind = kinds[self.rng.below(kinds.len() as u64) as usize];
        if self.damage(kind) {
            *self.tally.faults.entry(kind).or_default() += 1;
        }
    }

    /// Nothing else goes wrong (`--scenario damage`).
    pub fn damage_again(&mut self) {
        self.damage_something();
        let wait = self.rng.range(200, 2_000);
        self.at(wait, Ev::DamageSomething);
    }

    /// When a scrub begins to look.
    fn unnoticed(&mut self, deep: bool) -> Stage {
        Stage::Unnoticed { until: self.now + self.rng.below(UNNOTICED_MS), deep }
    }

    /// So many copies, or shards of one row, have a byte that nobody wrote.
    fn make_wrong(&mut self, sound: Sound) -> Option<Damage> {
        let two = self.rng.chance(200) && sound.copies.len() > 2;
        let count = if two { 2 } else { 1 };
        let first = sound.first_block();
        let mut places: Vec<usize> = (0..sound.copies.len()).collect();
        let chosen: Vec<usize> =
            (0..count).map(|_| places.swap_remove(self.rng.below(places.len() as u64) as usize)).collect();
        let blocks = data_blocks(&sound.copies[chosen[0]].2);
        let block = *blocks.get(self.rng.below(blocks.len().max(1) as u64) as usize)?;
        // Nobody else writes shards of that row meanwhile: parity that is computed from what is wrong would fit to it.
        let (harmed, held, repairable) = match self.redundancy() {
            Redundancy::Replicated { size } => {
                let b = first + u64::from(block);
                (b..b + 1, 0..0, count == 1 && size > 2)
            }
            Redundancy::Erasure { k, m } => {
                let from = u64::from(block) * u64::from(k);
                if from + u64::from(k) > OBJECT_BLOCKS {
                    return None;
                }
                let row = first + from..first + from + u64::from(k);
                (row.clone(), row, count == 1 && m > 1)
            }
        };
        let writes = |c: &crate::client::Client| {
            let mut writes = c.ops.values().filter(|o| o.kind.is_write());
            c.volume == sound.volume && writes.any(|o| o.overlaps(held.start, held.end - held.start))
        };
        if !held.is_empty() && self.clients.iter().any(writes) {
            return None;
        }
        let mut spots = Vec::new();
        let mut bytes: Vec<usize> = Vec::new();
        for place in chosen {
            // Two that are wrong in the same byte may fit to each other.
            let at = self.rng.range(TAG_BYTES as u64, BLOCK as u64) as usize;
            let by = self.rng.range(1, 256) as u8;
            if bytes.contains(&at) {
                continue;
            }
            let (node, state, content) = &sound.copies[place];
            let Some((content, wrong)) = altered(content, block, at, by) else { continue };
            if !self.nodes[*node].disk.alter(sound.pg, sound.object, state.version, content) {
                continue;
            }
            self.log(|| format!("byte {at} of block {block} of {} is wrong on osd.{node}", sound.object));
            spots.push(Spot { node: *node, block, wrong: Some(wrong), stays: false });
            bytes.push(at);
        }
        if spots.is_empty() {
            return None;
        }
        for block in harmed.clone() {
            let id = BlockId { volume: sound.volume as u64, block };
            bytes.iter().for_each(|at| self.oracle.harm(id, Harm::Byte(*at)));
        }
        let repairable = repairable || (spots.len() == 1 && count == 2 && self.may_judge());
        // Of copies a light scrub sees as much.
        let deep = !held.is_empty() || !repairable || self.rng.chance(500);
        let rewrite = if repairable { Vec::new() } else { vec![harmed] };
        let (object, volume, stage) = (sound.object, sound.volume, self.unnoticed(deep));
        Some(Damage { object, volume, spots, rewrite, held, out: Vec::new(), stage })
    }

    /// Whether one that is wrong is known by what the others are.
    fn may_judge(&self) -> bool {
        match self.redundancy() {
            Redundancy::Replicated { size } => size > 2,
            Redundancy::Erasure { m, .. } => m > 1,
        }
    }

    /// Each copy, or shard, rots in another block, or row; and maybe all copies in one that is the same.
    fn rot_everywhere(&mut self, sound: Sound) -> Option<Damage> {
        let coded = matches!(self.redundancy(), Redundancy::Erasure { .. });
        let mut taken = BTreeSet::new();
        let mut spots = Vec::new();
        let mut rewrite = Vec::new();
        if !coded && self.rng.chance(300) {
            let blocks = data_blocks(&sound.copies[0].2);
            let block = *blocks.get(self.rng.below(blocks.len().max(1) as u64) as usize)?;
            taken.insert(block);
            for (node, ..) in &sound.copies {
                if self.nodes[*node].disk.rot_block(sound.pg, sound.object, block) {
                    self.log(|| {
                        format!("block {block} of {} rots on osd.{node}, as it does elsewhere", sound.object)
                    });
                    spots.push(Spot { node: *node, block, wrong: None, stays: false });
                }
            }
            if spots.len() == sound.copies.len() {
                let block = sound.first_block() + u64::from(block);
                self.oracle.harm(BlockId { volume: sound.volume as u64, block }, Harm::Unreadable);
                rewrite.push(block..block + 1);
                *self.tally.work.entry("blocks that rot in all copies").or_default() += 1;
            }
        }
        for (node, _, content) in &sound.copies {
            let mut free = data_blocks(content);
            free.retain(|b| !taken.contains(b));
            if free.is_empty() {
                continue;
            }
            let block = free[self.rng.below(free.len() as u64) as usize];
            if self.nodes[*node].disk.rot_block(sound.pg, sound.object, block) {
                self.log(|| format!("block {block} of {} rots on osd.{node}", sound.object));
                taken.insert(block);
                spots.push(Spot { node: *node, block, wrong: None, stays: true });
            }
        }
        if spots.is_empty() {
            return None;
        }
        let (object, volume, stage) = (sound.object, sound.volume, self.unnoticed(true));
        Some(Damage { object, volume, spots, rewrite, held: 0..0, out: Vec::new(), stage })
    }

    /// The primary's copy rots, and everybody else of its group is taken out.
    fn rot_lone_copy(&mut self, sound: Sound) -> Option<Damage> {
        let Redundancy::Replicated { size } = self.redundancy() else { return None };
        let others: Vec<OsdId> =
            sound.record.members().filter(|o| Some(*o) != sound.record.primary).collect();
        let inside = self.monitor.state.map.osds.values().filter(|o| o.in_cluster && o.up).count();
        if others.is_empty() || inside < others.len() + size as usize {
            return None;
        }
        let (node, _, content) =
            sound.copies.iter().find(|(n, ..)| Some(self.nodes[*n].id) == sound.record.primary)?;
        let blocks = data_blocks(content);
        let block = *blocks.get(self.rng.below(blocks.len().max(1) as u64) as usize)?;
        if !self.nodes[*node].disk.rot_block(sound.pg, sound.object, block) {
            return None;
        }
        self.log(|| {
            format!("block {block} of {} rots on osd.{node}, and {others:?} are taken out", sound.object)
        });
        for osd in &others {
            self.command(Command::OutOsd { osd: *osd, automatic: false });
        }
        let spots = vec![Spot { node: *node, block, wrong: None, stays: true }];
        let (object, volume, rewrite) = (sound.object, sound.volume, Vec::new());
        Some(Damage { object, volume, spots, rewrite, held: 0..0, out: others, stage: Stage::Moves })
    }

    /// Whether nobody is to write that now.
    pub fn is_held(&self, volume: usize, first: u64, count: u64) -> bool {
        let holds = |d: &Damage| d.volume == volume && first < d.held.end && d.held.start < first + count;
        self.damage.as_ref().is_some_and(holds)
    }

    pub fn go_on_with_damage(&mut self) {
        let Some(mut damage) = self.damage.take() else { return };
        let before = self.finding.is_some();
        let over = self.next_stage(&mut damage);
        if self.finding.is_some() && !before {
            let object = damage.object;
            self.finding = self.finding.take().map(|f| format!("{f} ({object} was damaged)"));
        }
        if over {
            for osd in damage.out {
                self.command(Command::InOsd { osd });
            }
            self.log(|| format!("{} is whole again", damage.object));
            let now = self.now;
            return self.oracle.heal(now);
        }
        self.damage = Some(damage);
        self.at(LOOK_MS, Ev::Damage);
    }

    /// True: it is over.
    fn next_stage(&mut self, damage: &mut Damage) -> bool {
        let scrubbed = self.monitor_runs() && self.scrubs_done();
        let gone = self.seats[damage.volume].removed;
        match damage.stage {
            Stage::Moves if self.all_clean() => damage.stage = self.unnoticed(true),
            Stage::Unnoticed { until, deep } if self.now >= until => {
                self.command(Command::RequestScrub { pool: None, pg: None, deep });
                damage.stage = Stage::Sought;
            }
            Stage::Sought if scrubbed => {
                let wrong = self.is_damaged(damage);
                if damage.rewrite.is_empty() || gone {
                    if wrong && !gone {
                        self.finding = Some("a scrub left what it could repair".into());
                    }
                    return true;
                }
                if wrong && !self.is_listed(damage) {
                    self.finding = Some("a scrub says nothing of what it cannot repair".into());
                }
                damage.stage = Stage::Rewrite { next: 0 };
            }
            Stage::Rewrite { .. } if gone => return true,
            Stage::Rewrite { next } => match damage.rewrite.get(next).cloned() {
                Some(blocks) => {
                    if let Some((client, request)) = self.write_again(damage, blocks) {
                        damage.stage = Stage::Written { client, request, next };
                    }
                }
                None => damage.stage = Stage::Committed { by: self.now + COMMIT_MS },
            },
            Stage::Written { client, request, next } if !self.clients[client].ops.contains_key(&request) => {
                damage.stage = Stage::Rewrite { next: next + 1 };
            }
            Stage::Committed { by } => match self.is_wrong(damage, |s| !s.stays) {
                false => {
                    self.command(Command::RequestScrub { pool: None, pg: None, deep: true });
                    damage.stage = Stage::SoughtAgain;
                }
                // The write was refused, or its client died.
                true if self.now >= by => damage.stage = Stage::Rewrite { next: 0 },
                true => {}
            },
            Stage::SoughtAgain if scrubbed => {
                if !gone && (self.is_damaged(damage) || self.is_listed(damage)) {
                    self.finding = Some("a scrub finds damaged what was written again".into());
                }
                return true;
            }
            Stage::Unnoticed { .. }
            | Stage::Moves
            | Stage::Sought
            | Stage::Written { .. }
            | Stage::SoughtAgain => {}
        }
        false
    }

    /// Whether any of it is still as it should not be.
    fn is_damaged(&mut self, damage: &Damage) -> bool {
        self.is_wrong(damage, |_| true)
    }

    fn is_wrong(&mut self, damage: &Damage, of: impl Fn(&Spot) -> bool) -> bool {
        let map = &self.monitor.state.map;
        let Some(pg) = map.pg_of(self.pool, damage.object.volume, damage.object.index) else { return false };
        damage.spots.iter().filter(|s| of(s)).any(|s| {
            match (self.nodes[s.node].disk.block(pg, damage.object, s.block), &s.wrong) {
                (Ok(bytes), Some(wrong)) => bytes == *wrong,
                (Err(StoreError::Unreadable { .. }), None) => true,
                _ => false,
            }
        })
    }

    /// Whether the monitors have heard that no copy is good.
    fn is_listed(&self, damage: &Damage) -> bool {
        let named = self.monitor.state.scrubs.values().flat_map(|r| &r.damaged);
        named.map(|d| d.object).any(|o| o == damage.object)
    }

    /// The holder of the volume writes these blocks as they are to be from now on. None: not now.
    fn write_again(&mut self, damage: &Damage, blocks: Range<u64>) -> Option<(usize, u64)> {
        let holder = self.seats[damage.volume].holder;
        let c = &self.clients[holder];
        let count = blocks.end - blocks.start;
        let busy = c.ops.values().any(|o| o.kind.is_write() && o.overlaps(blocks.start, count));
        let top = c.layers.first() == Some(&damage.object.layer);
        if !c.ready || c.has_ended() || c.pause.is_some() || c.paused_until > self.now || busy || !top {
            return None;
        }
        *self.tally.work.entry(WRITTEN_AGAIN).or_default() += 1;
        let volume = damage.volume as u64;
        let ids = blocks.clone().map(|block| BlockId { volume, block });
        let numbers = ids.map(|id| self.oracle.issue(id, false, false)).collect();
        let layers = self.layers_of(holder, volume);
        let op = Op::new(volume, layers, (blocks.start, count), Kind::Write { numbers, zero: false });
        Some((holder, start(self, holder, op)))
    }
}
