//! Simulated clients: each holds one volume, writes tagged blocks and zeros, and reads.
//!
//! They behave as gateways do: a write that overlaps an unanswered one waits; an operation is repeated until
//! it is answered; a repetition after silence goes over a new connection. A restarted client opens a
//! new session and attaches again before it goes on. Another client may take the volume over: the first one goes on
//! until it learns that it is fenced, and then never comes back (rule C2). An observer reads a volume beside its holder, without being
//! attached, and knows only the map.

use crate::network::Place;
use crate::oracle::{BLOCK, Begun, BlockId, bytes_of};
use crate::plan::Scenario;
use crate::snapshots::Pause;
use crate::world::{Ev, Pace, World};
use bytes::Bytes;
use gabion_monitor::state::{Command, Reply};
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::map::ClusterMap;
use gabion_proto::msg::{ClientOp, OpError, OpKind, OpReply};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

const IN_FLIGHT: usize = 6;
pub const SILENCE_MS: u64 = 2_500;
/// Blocks that one operation reads back at the end.
const FINAL_BLOCKS: u64 = 32;
pub const OBJECT_BLOCKS: u64 = 256;
pub const VOLUME_BLOCKS: u64 = 2_048;
pub const VOLUME_OBJECTS: u32 = (VOLUME_BLOCKS / OBJECT_BLOCKS) as u32;
/// Blocks that are used: few, so that they collide.
const USED: [u64; 24] = [
    0, 1, 2, 3, 4, 5, 6, 7, 31, 32, 33, 255, 256, 257, 258, 300, 511, 512, 513, 1000, 1024, 1025, 1300, 2047,
];

pub enum ClientEvent {
    Attach { life: u64, take_over: bool },
    Crash,
    Map(Arc<ClusterMap>),
    AwaitFence { epoch: Epoch, life: u64 },
    Issue { life: u64 },
    Send { request: u64, life: u64 },
    Silence { request: u64, attempt: u64, life: u64 },
    Reply { connection: u64, request: u64, reply: OpReply, data: Bytes },
}

#[derive(Clone)]
pub enum Kind {
    Read { begun: Vec<Begun> },
    Write { numbers: Vec<u64>, zero: bool },
}

impl Kind {
    pub fn is_write(&self) -> bool {
        matches!(self, Kind::Write { .. })
    }
}

#[derive(Clone)]
pub struct Op {
    /// The volume or the snapshot, as the oracle numbers them.
    pub of: u64,
    /// Top layer first.
    pub layers: Vec<LayerId>,
    pub first: u64,
    pub count: u64,
    pub kind: Kind,
    attempt: u64,
    sent_to: Option<OsdId>,
    issued: u64,
    /// Issued when somebody else held the volume already, or the layer was frozen: it must be refused.
    fenced: bool,
    /// Why it was sent again.
    answer: Option<OpReply>,
}

impl Op {
    pub fn new(of: u64, layers: Vec<LayerId>, (first, count): (u64, u64), kind: Kind) -> Op {
        let answer = None;
        Op { of, layers, first, count, kind, attempt: 0, sent_to: None, issued: 0, fenced: false, answer }
    }

    pub fn fenced(self, fenced: bool) -> Op {
        Op { fenced, ..self }
    }

    pub fn overlaps(&self, first: u64, count: u64) -> bool {
        self.first < first + count && first < self.first + self.count
    }

    pub fn describe(&self) -> String {
        let what = if self.kind.is_write() { "write" } else { "read" };
        let Op { of, first, count, issued, attempt, sent_to, answer, .. } = self;
        format!(
            "{what} {of} blocks {first}+{count} since {issued}, attempt {attempt} to {sent_to:?}, last answer {answer:?}"
        )
    }
}

/// Who may use a volume.
pub struct Seat {
    /// The client that attached last.
    pub holder: usize,
    pub removed: bool,
}

pub struct Client {
    /// Which volume: `v{volume}`.
    pub volume: usize,
    /// It only reads, and is not attached.
    pub observes: bool,
    pub id: ClientId,
    pub session: Session,
    pub generation: Generation,
    pub volume_id: VolumeId,
    /// Top layer first.
    pub layers: Vec<LayerId>,
    /// It writes nothing, because of a snapshot.
    pub pause: Option<Pause>,
    pub map: Arc<ClusterMap>,
    pub ops: BTreeMap<u64, Op>,
    next_request: u64,
    connections: BTreeMap<OsdId, u64>,
    life: u64,
    pub ready: bool,
    /// Somebody else's fence is in force.
    fenced: bool,
    /// It knows that it is fenced, or its volume is gone.
    ended: bool,
    pub paused_until: u64,
    /// Reads only: the last check.
    pub draining: bool,
    /// Sorted; the last are read first.
    pub final_reads: Vec<BlockId>,
}

impl Client {
    pub fn new(volume: usize) -> Client {
        Client {
            volume,
            observes: false,
            id: ClientId(0),
            session: Session(0),
            generation: Generation(0),
            volume_id: VolumeId(0),
            layers: Vec::new(),
            pause: None,
            map: Arc::default(),
            ops: BTreeMap::new(),
            next_request: 1,
            connections: BTreeMap::new(),
            life: 0,
            ready: false,
            fenced: false,
            ended: false,
            paused_until: 0,
            draining: false,
            final_reads: Vec::new(),
        }
    }

    pub fn observer(volume: usize) -> Client {
        Client { observes: true, ..Client::new(volume) }
    }

    pub fn has_ended(&self) -> bool {
        self.ended
    }

    pub fn idle(&self) -> bool {
        self.ended || (self.ready && self.ops.is_empty() && self.final_reads.is_empty())
    }
    pub fn end(&mut self) {
        self.ended = true;
        self.pause = None;
        self.ops.clear();
        self.connections.clear();
        self.final_reads.clear();
    }
}

pub fn handle(w: &mut World, i: usize, event: ClientEvent) {
    if w.clients[i].ended {
        return;
    }
    match event {
        ClientEvent::Attach { life, take_over } if life == w.clients[i].life => attach(w, i, take_over),
        ClientEvent::Crash => {
            // Whatever was in flight may or may not happen; nobody will know.
            let c = &mut w.clients[i];
            c.life += 1;
            c.ops.clear();
            c.connections.clear();
            c.pause = None;
            c.ready = false;
            attach(w, i, false);
        }
        ClientEvent::Map(sent) if sent.epoch > w.clients[i].map.epoch => {
            let have = w.clients[i].map.clone();
            if let Some(map) = w.told(Place::Client(i), &have, &sent) {
                w.clients[i].map = map;
            }
        }
        ClientEvent::AwaitFence { epoch, life } if life == w.clients[i].life => {
            let c = &w.clients[i];
            let volume = c.volume;
            if w.seats[volume].holder != i {
                w.clients[i].end();
            } else if w.fenced(epoch) && c.map.epoch >= epoch {
                w.clients[i].ready = true;
                let c = &w.clients[i];
                w.in_force.insert(c.volume_id, (c.generation, c.session));
                let others = w
                    .clients
                    .iter_mut()
                    .enumerate()
                    .filter(|(o, c)| *o != i && c.volume == volume && !c.observes);
                others.for_each(|(_, c)| c.fenced = true);
                w.oracle.close(volume as u64);
                w.log(|| format!("client {i} holds v{volume}"));
                w.client_later(1, i, ClientEvent::Issue { life });
            } else {
                w.client_later(50, i, ClientEvent::AwaitFence { epoch, life });
            }
        }
        ClientEvent::Issue { life } if life == w.clients[i].life => {
            if w.clients[i].ready {
                w.go_on_with_snapshot(i);
                issue(w, i);
            }
            // Reading everything back is a long list.
            let slowest = match (w.clients[i].final_reads.is_empty(), w.pace) {
                (false, _) => 10,
                (true, Pace::Storm) if w.slowness.began() => 150,
                (true, Pace::Storm) if w.absence.is_quiet() => 3_000,
                // At once.
                (true, Pace::Storm) if w.rebuild.measures() => 2,
                // Now and then nothing is under way.
                (true, Pace::Storm) if w.plan.scenario == Scenario::Damage => 600,
                (true, Pace::Storm) => 120,
                (true, Pace::Quiet) => 20_000,
            };
            let wait = w.rng.range(1, slowest);
            w.client_later(wait, i, ClientEvent::Issue { life });
        }
        ClientEvent::Send { request, life } if life == w.clients[i].life => send(w, i, request),
        ClientEvent::Silence { request, attempt, life } if life == w.clients[i].life => {
            let c = &mut w.clients[i];
            let Some(op) = c.ops.get(&request) else { return };
            if op.attempt != attempt {
                return;
            }
            // The connection is given up: everything on it is sent again on a new one.
            let Some(to) = op.sent_to else { return };
            c.connections.remove(&to);
            let again: Vec<u64> =
                c.ops.iter().filter(|(_, o)| o.sent_to == Some(to)).map(|(r, _)| *r).collect();
            let life = c.life;
            for request in again {
                w.client_later(1, i, ClientEvent::Send { request, life });
            }
        }
        ClientEvent::Reply { connection, request, reply, data } => {
            reply_came(w, i, connection, request, reply, data)
        }
        _ => {}
    }
}

fn attach(w: &mut World, i: usize, take_over: bool) {
    let (life, id, volume) = (w.clients[i].life, w.clients[i].id, w.clients[i].volume);
    let again = ClientEvent::Attach { life, take_over };
    if !w.reaches_monitor(Place::Client(i)) {
        return w.client_later(300, i, again);
    }
    if w.clients[i].observes {
        return observe(w, i);
    }
    let opened = w.command(Command::OpenSession { client: id, host: format!("gw{i}") });
    let Some(Reply::Session { client, session }) = opened else {
        w.finding = Some(format!("client {i} could not open a session"));
        return;
    };
    w.clients[i].id = client;
    w.clients[i].session = session;
    let attach = Command::AttachVolume { volume: format!("v{volume}"), client, session, take_over };
    match w.command(attach) {
        Some(Reply::Attached { volume: volume_id, generation, epoch }) => {
            let layers = w.layers(volume_id);
            // Asked of its last life.
            let asked = w.monitor.state.map.attachments.get(&volume_id).and_then(|a| a.snapshot);
            let c = &mut w.clients[i];
            c.volume_id = volume_id;
            c.layers = layers;
            c.pause = asked.map(Pause::Draining);
            // A restart renews only the session.
            if c.generation != Generation(0) && c.generation != generation {
                w.finding = Some(format!("client {i} came back with another generation"));
                return;
            }
            c.generation = generation;
            w.seats[volume].holder = i;
            w.clients[i].fenced = false;
            w.client_later(5, i, ClientEvent::AwaitFence { epoch, life });
        }
        // Somebody took the volume over, or removed it.
        _ if w.seats[volume].holder != i || w.seats[volume].removed => w.clients[i].end(),
        _ => w.finding = Some(format!("client {i} could not attach its own volume")),
    }
}

/// An observer asks the monitors what the volume consists of, and needs nothing else.
fn observe(w: &mut World, i: usize) {
    let (life, volume) = (w.clients[i].life, w.clients[i].volume);
    let Ok(id) = w.monitor.state.volume_named(&format!("v{volume}")) else { return w.clients[i].end() };
    let (layers, map) = (w.layers(id), w.told_anew(Place::Client(i)));
    let c = &mut w.clients[i];
    c.volume_id = id;
    c.layers = layers;
    c.map = map;
    c.ready = true;
    w.client_later(1, i, ClientEvent::Issue { life });
}

fn issue(w: &mut World, i: usize) {
    let volume = w.clients[i].volume;
    let fenced = w.clients[i].fenced;
    if w.clients[i].observes {
        // What it does not know of the volume's layers is another matter.
        w.clients[i].layers = w.layers(w.clients[i].volume_id);
        if w.clients[i].layers.is_empty() {
            return w.clients[i].end();
        }
    }
    if let Some((volume, blocks)) = next_run(&mut w.clients[i].final_reads) {
        let range = (blocks.start, blocks.end - blocks.start);
        let begun = blocks.map(|block| w.oracle.begin_read(BlockId { volume, block })).collect();
        let layers = w.layers_of(i, volume);
        start(w, i, Op::new(volume, layers, range, Kind::Read { begun }).fenced(fenced));
        return;
    }
    let in_flight = w.rebuild.in_flight(i).unwrap_or(IN_FLIGHT);
    if w.clients[i].draining || w.clients[i].ops.len() >= in_flight {
        return;
    }
    if w.filling.goes_on() {
        return fill(w, i);
    }
    let slow_disks = w.slowness.began();
    let measures = w.rebuild.measures();
    let first = match slow_disks || measures {
        true => w.rng.below(VOLUME_BLOCKS),
        false => USED[w.rng.below(USED.len() as u64) as usize],
    };
    let room = OBJECT_BLOCKS - first % OBJECT_BLOCKS;
    let count = match w.rng.chance(20) {
        _ if measures => 1,
        // Now and then a whole chunk or two.
        true => w.rng.range(32, 70).min(room),
        false => w.rng.range(1, 5).min(room),
    };
    let reads = w.clients[i].observes
        || w.rng.chance(if slow_disks {
            950
        } else if measures {
            200
        } else {
            400
        });
    // A snapshot is read now and then.
    let of = match w.some_snapshot(volume).filter(|_| reads) {
        Some(snapshot) if w.rng.chance(300) => snapshot,
        _ => volume as u64,
    };
    let ids: Vec<BlockId> = (first..first + count).map(|block| BlockId { volume: of, block }).collect();
    let kind = if reads {
        Kind::Read { begun: ids.iter().map(|id| w.oracle.begin_read(*id)).collect() }
    } else {
        let c = &w.clients[i];
        let overlaps = c.ops.values().any(|o| o.kind.is_write() && o.overlaps(first, count));
        if c.pause.is_some() || overlaps || w.is_held(volume, first, count) {
            return;
        }
        let zero = w.rng.chance(120);
        Kind::Write { numbers: ids.iter().map(|id| w.oracle.issue(*id, zero, fenced)).collect(), zero }
    };
    let layers = w.layers_of(i, of);
    start(w, i, Op::new(of, layers, (first, count), kind).fenced(fenced));
}

/// Takes the last blocks of a sorted list that one operation can read.
fn next_run(ids: &mut Vec<BlockId>) -> Option<(u64, Range<u64>)> {
    let last = ids.pop()?;
    let mut run = last.block..last.block + 1;
    let fits =
        |run: &Range<u64>| run.end - run.start < FINAL_BLOCKS && !run.start.is_multiple_of(OBJECT_BLOCKS);
    while let Some(id) = ids.pop_if(|id| fits(&run) && id.volume == last.volume && id.block + 1 == run.start)
    {
        run.start = id.block;
    }
    Some((last.volume, run))
}

/// Writes the next object of the volume, whole.
fn fill(w: &mut World, i: usize) {
    let (volume, c) = (w.clients[i].volume as u64, &w.clients[i]);
    let (Some(first), true) = (w.filling.next(i), c.ops.is_empty()) else { return };
    let ids = (first..first + OBJECT_BLOCKS).map(|block| BlockId { volume, block });
    let numbers = ids.map(|id| w.oracle.issue(id, false, false)).collect();
    let layers = w.layers_of(i, volume);
    w.filling.filled(i, OBJECT_BLOCKS);
    start(w, i, Op::new(volume, layers, (first, OBJECT_BLOCKS), Kind::Write { numbers, zero: false }));
}

/// Its number.
pub fn start(w: &mut World, i: usize, op: Op) -> u64 {
    w.tally.client_ops += 1;
    if op.kind.is_write() {
        w.tally.written_blocks += op.count;
    }
    let op = Op { issued: w.now, ..op };
    let c = &mut w.clients[i];
    let request = c.next_request;
    c.next_request += 1;
    c.ops.insert(request, op);
    send(w, i, request);
    request
}

fn send(w: &mut World, i: usize, request: u64) {
    let pool = w.pool;
    let next_connection = w.next_connection;
    let c = &mut w.clients[i];
    let (life, volume, volume_id, map) = (c.life, c.volume as u64, c.volume_id, c.map.clone());
    let Some(op) = c.ops.get_mut(&request) else { return };
    op.attempt += 1;
    let (attempt, op_copy) = (op.attempt, op.clone());
    let index = (op.first / OBJECT_BLOCKS) as u32;
    let first_block = (op.first % OBJECT_BLOCKS) as u32;
    let primary = map.pg_of(pool, volume_id, index).and_then(|pg| Some((pg, map.pgs.get(&pg)?.primary?)));
    let Some((pg, primary)) = primary else {
        op.sent_to = None;
        w.client_later(100, i, ClientEvent::Send { request, life });
        return;
    };
    op.sent_to = Some(primary);
    let connection = *c.connections.entry(primary).or_insert(next_connection);
    w.next_connection = next_connection.max(connection + 1);
    let c = &w.clients[i];
    if attempt > 1 {
        *w.tally.work.entry("operation repeated").or_default() += 1;
    }
    let block_count = op_copy.count as u32;
    let (kind, data) = match &op_copy.kind {
        Kind::Read { .. } => {
            let below = op_copy.layers[1..].to_vec();
            (OpKind::Read { first_block, block_count, below }, Bytes::new())
        }
        Kind::Write { zero: true, .. } => {
            (OpKind::Zero { first_block, block_count, discard: attempt % 2 == 0 }, Bytes::new())
        }
        Kind::Write { numbers, .. } => {
            let blocks = (op_copy.first..).zip(numbers);
            let bytes: Vec<_> = blocks.map(|(block, n)| bytes_of(BlockId { volume, block }, *n)).collect();
            let content = Content::data(first_block, bytes.concat().into());
            (OpKind::Write { extents: content.extents }, content.data)
        }
    };
    let message = ClientOp {
        epoch: map.epoch,
        pg,
        client: c.id,
        session: c.session,
        generation: c.generation,
        volume: volume_id,
        object: ObjectId { volume: volume_id, index, layer: op_copy.layers[0] },
        kind,
    };
    w.send_op(i, primary, connection, request, message, data);
    w.client_later(SILENCE_MS, i, ClientEvent::Silence { request, attempt, life });
}

fn reply_came(w: &mut World, i: usize, connection: u64, request: u64, reply: OpReply, data: Bytes) {
    let c = &w.clients[i];
    let life = c.life;
    let Some(op) = c.ops.get(&request).cloned() else { return };
    let current = op.sent_to.and_then(|to| c.connections.get(&to)) == Some(&connection);
    if !current {
        return;
    }
    // An unreadable block: in a run where bits rot, the good copy may be away for a while.
    let rotten = w.plan.rot && matches!(reply, OpReply::Failed(OpError::Io));
    if matches!(reply, OpReply::Retry { .. }) || rotten {
        // A gateway waits for the next map, or as long as it says in its router.
        let wait = if w.rebuild.measures() { w.rng.range(5, 20) } else { w.rng.range(20, 200) };
        w.client_later(wait, i, ClientEvent::Send { request, life });
        // What Silence would do must not happen to an answered attempt.
        if let Some(op) = w.clients[i].ops.get_mut(&request) {
            op.attempt += 1;
            op.sent_to = None;
            op.answer = Some(reply);
        }
        return;
    }
    w.clients[i].ops.remove(&request);
    w.log(|| {
        let numbers = match &op.kind {
            Kind::Write { numbers, zero } => format!("write {numbers:?} zero={zero}"),
            Kind::Read { begun } => format!("read, {begun:?}"),
        };
        {
            let (first, count, by, ms) = (op.first, op.count, op.sent_to, w.now - op.issued);
            format!("client {i} blocks {first}+{count} {numbers} by {by:?} after {ms} ms: {reply:?}")
        }
        .chars()
        .take(200)
        .collect()
    });
    w.rebuild.took(w.now, op.issued);
    if w.is_removed_snapshot(op.of) {
        return;
    }
    let volume = w.clients[i].volume;
    let id = |n: usize| BlockId { volume: op.of, block: op.first + n as u64 };
    match (reply, &op.kind) {
        (OpReply::Done { .. } | OpReply::Data { .. }, _) if op.fenced => {
            w.finding = Some(format!(
                "client {i} was served after v{volume} had another holder, or its layer was frozen"
            ));
        }
        (OpReply::Done { .. }, Kind::Write { numbers, .. }) => {
            for (n, number) in numbers.iter().enumerate() {
                if let Err(e) = w.oracle.acknowledged(id(n), *number) {
                    w.finding = Some(format!("client {i}: {e}"));
                }
            }
        }
        (OpReply::Data { extents }, Kind::Read { begun }) => {
            w.slowness.read_took(w.now, op.issued);
            let base = (op.first % OBJECT_BLOCKS) as u32;
            let bytes = assemble(base, op.count as usize, &extents, &data);
            for (n, begun) in begun.iter().enumerate() {
                let block = &bytes[n * BLOCK..(n + 1) * BLOCK];
                if let Err(e) = w.oracle.check_read_of_disks(id(n), (*begun, op.issued), block) {
                    w.finding = Some(format!("client {i}: {e}"));
                }
            }
        }
        // No copy is good, and that is known.
        (OpReply::Failed(OpError::Io), Kind::Read { .. })
            if (0..op.count as usize).any(|n| w.oracle.may_fail(id(n), op.issued)) => {}
        (OpReply::Failed(OpError::Frozen), _) if op.fenced => {}
        // Refused before it began.
        (OpReply::Failed(OpError::NoSpace), Kind::Write { .. }) => {}
        (OpReply::Failed(OpError::Fenced), _) if w.seats[volume].holder != i => w.clients[i].end(),
        (OpReply::Failed(OpError::Removed), _) if w.seats[volume].removed => w.clients[i].end(),
        (OpReply::Failed(OpError::Fenced), _) => {
            w.finding = Some(format!("client {i} was fenced, though nobody took its volume"));
        }
        (other, _) => w.finding = Some(format!("client {i}: unexpected answer {other:?}")),
    }
}

fn assemble(base: u32, count: usize, extents: &[Extent], data: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; count * BLOCK];
    let mut at = 0;
    for e in extents {
        if let ExtentKind::Data { .. } = e.kind {
            let len = e.block_count as usize * BLOCK;
            let to = (e.first_block - base) as usize * BLOCK;
            out[to..to + len].copy_from_slice(&data[at..at + len]);
            at += len;
        }
    }
    out
}

impl World {
    /// For how long the oldest unanswered operation has waited.
    pub fn longest_wait(&self) -> u64 {
        let ops = self.clients.iter().flat_map(|c| c.ops.values());
        ops.map(|o| self.now - o.issued).max().unwrap_or(0)
    }

    /// Another client takes the volume of client `i` over.
    pub fn take_over(&mut self, i: usize) {
        let volume = self.clients[i].volume;
        if self.seats[volume].removed {
            return;
        }
        *self.tally.work.entry("take-over").or_default() += 1;
        let new = self.clients.len();
        let map = self.told_anew(Place::Client(new));
        self.clients.push(Client { map, ..Client::new(volume) });
        self.at(1, Ev::Client { client: new, event: ClientEvent::Attach { life: 0, take_over: true } });
    }

    /// The volume of client `i` is detached and removed; a new one takes its place in the work load.
    pub fn remove_volume(&mut self, i: usize) {
        let volume = self.clients[i].volume;
        let (client, generation) = (self.clients[i].id, self.clients[i].generation);
        if self.seats[volume].removed || self.seats[volume].holder != i || !self.clients[i].ready {
            return;
        }
        let name = format!("v{volume}");
        self.command(Command::DetachVolume { volume: name.clone(), client, generation });
        self.remove_snapshots_of(volume);
        if self.command(Command::RemoveVolume { name }).is_none() {
            self.finding = Some(format!("v{volume} could not be removed"));
            return;
        }
        *self.tally.work.entry("volume removed").or_default() += 1;
        self.seats[volume].removed = true;
        self.clients[i].end();
        self.add_volume();
    }

    /// Volumes with many layers make place for new ones: layers are not merged, and disks are small.
    pub fn remove_layered_volumes(&mut self) {
        const LAYERS_MANY: usize = 5;
        for i in 0..self.clients.len() {
            if self.clients[i].layers.len() > LAYERS_MANY {
                self.remove_volume(i);
            }
        }
    }

    /// A new volume with a client that holds it.
    pub fn add_volume(&mut self) {
        let (volume, client) = (self.seats.len(), self.clients.len());
        let create =
            Command::CreateVolume { name: format!("v{volume}"), pool: "p".into(), size_bytes: 8 << 20 };
        if self.command(create).is_none() {
            self.finding = Some(format!("v{volume} could not be created"));
            return;
        }
        self.seats.push(Seat { holder: client, removed: false });
        let map = self.told_anew(Place::Client(client));
        self.clients.push(Client { map: map.clone(), ..Client::new(volume) });
        self.at(10, Ev::Client { client, event: ClientEvent::Attach { life: 0, take_over: false } });
        if self.rng.chance(self.plan.observed) {
            self.clients.push(Client { map, ..Client::observer(volume) });
            let event = ClientEvent::Attach { life: 0, take_over: false };
            self.at(20, Ev::Client { client: client + 1, event });
        }
    }
}
