//! Simulated clients: each owns one volume, writes tagged blocks and zeros, and reads.
//!
//! They behave as gateways do: a write that overlaps an unanswered one waits; an operation is repeated until
//! it is answered; a repetition after silence goes over a new connection. A restarted client opens a
//! new session and attaches again before it goes on.

use crate::oracle::{BLOCK, BlockId, bytes_of};
use crate::world::{World, is_final};
use bytes::Bytes;
use gabion_monitor::state::{Command, Reply};
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::map::ClusterMap;
use gabion_proto::msg::{ClientOp, OpError, OpKind, OpReply};
use std::collections::BTreeMap;
use std::sync::Arc;

const IN_FLIGHT: usize = 6;
const SILENCE_MS: u64 = 2_500;
const OBJECT_BLOCKS: u64 = 256;
/// Blocks that are used: few, so that they collide.
const USED: [u64; 24] = [
    0, 1, 2, 3, 4, 5, 6, 7, 31, 32, 33, 255, 256, 257, 258, 300, 511, 512, 513, 1000, 1024, 1025, 1300, 2047,
];

pub enum ClientEvent {
    Start,
    Crash,
    Map(Arc<ClusterMap>),
    AwaitFence { epoch: Epoch, life: u64 },
    Issue { life: u64 },
    Send { request: u64, life: u64 },
    Silence { request: u64, attempt: u64, life: u64 },
    Reply { connection: u64, request: u64, reply: OpReply, data: Bytes },
}

#[derive(Clone)]
enum Kind {
    Read { floors: Vec<u64> },
    Write { numbers: Vec<u64>, zero: bool },
}

#[derive(Clone)]
struct Op {
    first: u64,
    count: u64,
    kind: Kind,
    attempt: u64,
    sent_to: Option<OsdId>,
}

pub struct Client {
    pub volume: u64,
    id: ClientId,
    session: Session,
    generation: Generation,
    volume_id: VolumeId,
    map: Arc<ClusterMap>,
    ops: BTreeMap<u64, Op>,
    next_request: u64,
    connections: BTreeMap<OsdId, u64>,
    next_connection: u64,
    life: u64,
    ready: bool,
    /// Reads only: the last check.
    pub draining: bool,
    pub final_reads: Vec<BlockId>,
}

impl Client {
    pub fn new(index: usize) -> Client {
        Client {
            volume: index as u64,
            id: ClientId(0),
            session: Session(0),
            generation: Generation(0),
            volume_id: VolumeId(0),
            map: Arc::default(),
            ops: BTreeMap::new(),
            next_request: 1,
            connections: BTreeMap::new(),
            // Unique over all clients.
            next_connection: (index as u64) << 32,
            life: 0,
            ready: false,
            draining: false,
            final_reads: Vec::new(),
        }
    }
    pub fn idle(&self) -> bool {
        self.ops.is_empty() && self.final_reads.is_empty()
    }
}

pub fn handle(w: &mut World, i: usize, event: ClientEvent) {
    match event {
        ClientEvent::Start => attach(w, i),
        ClientEvent::Crash => {
            // Whatever was in flight may or may not happen; nobody will know.
            let c = &mut w.clients[i];
            c.life += 1;
            c.ops.clear();
            c.connections.clear();
            c.ready = false;
            attach(w, i);
        }
        ClientEvent::Map(map) if map.epoch > w.clients[i].map.epoch => w.clients[i].map = map,
        ClientEvent::AwaitFence { epoch, life } if life == w.clients[i].life => {
            let c = &w.clients[i];
            if w.fenced(epoch) && c.map.epoch >= epoch {
                w.clients[i].ready = true;
                w.client_later(1, i, ClientEvent::Issue { life });
            } else {
                w.client_later(50, i, ClientEvent::AwaitFence { epoch, life });
            }
        }
        ClientEvent::Issue { life } if life == w.clients[i].life => {
            if w.clients[i].ready {
                issue(w, i);
            }
            let wait = w.rng.range(1, 120);
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

fn attach(w: &mut World, i: usize) {
    let life = w.clients[i].life;
    let id = w.clients[i].id;
    if let Some(Reply::Session { client, session }) =
        w.command(Command::OpenSession { client: id, host: format!("gw{i}") })
    {
        w.clients[i].id = client;
        w.clients[i].session = session;
        let attach = Command::AttachVolume { volume: format!("v{i}"), client, session, take_over: false };
        if let Some(Reply::Attached { volume, generation, epoch }) = w.command(attach) {
            w.clients[i].volume_id = volume;
            w.clients[i].generation = generation;
            w.client_later(5, i, ClientEvent::AwaitFence { epoch, life });
            return;
        }
    }
    w.finding = Some(format!("client {i} could not attach its own volume"));
}

fn issue(w: &mut World, i: usize) {
    if let Some(id) = w.clients[i].final_reads.pop() {
        let floors = vec![w.oracle.floor(id)];
        start(w, i, Op { first: id.block, count: 1, kind: Kind::Read { floors }, attempt: 0, sent_to: None });
        return;
    }
    if w.clients[i].draining || w.clients[i].ops.len() >= IN_FLIGHT {
        return;
    }
    let first = USED[w.rng.below(USED.len() as u64) as usize];
    let room = OBJECT_BLOCKS - first % OBJECT_BLOCKS;
    let count = w.rng.range(1, 5).min(room);
    let volume = w.clients[i].volume;
    let ids: Vec<BlockId> = (first..first + count).map(|block| BlockId { volume, block }).collect();
    let kind = if w.rng.chance(400) {
        Kind::Read { floors: ids.iter().map(|id| w.oracle.floor(*id)).collect() }
    } else {
        let overlaps = |o: &Op| {
            matches!(o.kind, Kind::Write { .. }) && o.first < first + count && first < o.first + o.count
        };
        if w.clients[i].ops.values().any(overlaps) {
            return;
        }
        let zero = w.rng.chance(120);
        Kind::Write { numbers: ids.iter().map(|id| w.oracle.issue(*id, zero)).collect(), zero }
    };
    start(w, i, Op { first, count, kind, attempt: 0, sent_to: None });
}

fn start(w: &mut World, i: usize, op: Op) {
    w.tally.client_ops += 1;
    let c = &mut w.clients[i];
    let request = c.next_request;
    c.next_request += 1;
    c.ops.insert(request, op);
    send(w, i, request);
}

fn send(w: &mut World, i: usize, request: u64) {
    let pool = w.pool;
    let c = &mut w.clients[i];
    let (life, volume, volume_id, map) = (c.life, c.volume, c.volume_id, c.map.clone());
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
    let connection = *c.connections.entry(primary).or_insert_with(|| {
        c.next_connection += 1;
        c.next_connection
    });
    let block_count = op_copy.count as u32;
    let (kind, data) = match &op_copy.kind {
        Kind::Read { .. } => (OpKind::Read { first_block, block_count, below: Vec::new() }, Bytes::new()),
        Kind::Write { zero: true, .. } => {
            (OpKind::Zero { first_block, block_count, discard: attempt % 2 == 0 }, Bytes::new())
        }
        Kind::Write { numbers, .. } => {
            let bytes: Vec<u8> = numbers
                .iter()
                .enumerate()
                .flat_map(|(n, number)| {
                    bytes_of(BlockId { volume, block: op_copy.first + n as u64 }, *number)
                })
                .collect();
            let content = Content::data(first_block, bytes.into());
            (OpKind::Write { extents: content.extents }, content.data)
        }
    };
    let message = ClientOp {
        epoch: map.epoch,
        pg,
        client: c.id,
        session: c.session,
        generation: c.generation,
        object: ObjectId { volume: volume_id, index, layer: LayerId(0) },
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
    if !is_final(&reply) {
        let wait = w.rng.range(20, 200);
        w.client_later(wait, i, ClientEvent::Send { request, life });
        // What Silence would do must not happen to an answered attempt.
        if let Some(op) = w.clients[i].ops.get_mut(&request) {
            op.attempt += 1;
            op.sent_to = None;
        }
        return;
    }
    w.clients[i].ops.remove(&request);
    w.log(|| {
        let numbers = match &op.kind {
            Kind::Write { numbers, zero } => format!("write {numbers:?} zero={zero}"),
            Kind::Read { floors } => format!("read, floors {floors:?}"),
        };
        format!("client {i} blocks {}+{} {numbers} by {:?}: {reply:?}", op.first, op.count, op.sent_to)
            .chars()
            .take(200)
            .collect()
    });
    let volume = w.clients[i].volume;
    let id = |n: usize| BlockId { volume, block: op.first + n as u64 };
    match (reply, &op.kind) {
        (OpReply::Done { .. }, Kind::Write { numbers, .. }) => {
            for (n, number) in numbers.iter().enumerate() {
                w.oracle.acknowledged(id(n), *number);
            }
        }
        (OpReply::Data { extents }, Kind::Read { floors }) => {
            let base = (op.first % OBJECT_BLOCKS) as u32;
            let bytes = assemble(base, op.count as usize, &extents, &data);
            for (n, floor) in floors.iter().enumerate() {
                let block = &bytes[n * BLOCK..(n + 1) * BLOCK];
                if let Err(e) = w.oracle.check_read(id(n), *floor, block) {
                    w.finding = Some(format!("client {i}: {e}"));
                }
            }
        }
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
