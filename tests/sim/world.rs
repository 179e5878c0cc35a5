//! The simulated cluster: nodes with the real `OsdCore`, the real monitor state and failure detector,
//! clients, a network and a clock. One heap of events; nothing happens outside it.

use crate::client::{Client, ClientEvent};
use crate::disk::MemoryStore;
use crate::oracle::Oracle;
use crate::rng::Rng;
use bytes::Bytes;
use gabion_monitor::decide::{self, FailureDetector, Timing};
use gabion_monitor::state::intervals::earlier_primaries;
use gabion_monitor::state::{Command, MonitorState, Reply};
use gabion_osd::core::*;
use gabion_osd::store::*;
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use gabion_proto::map::{ClusterMap, FailureDomain, Redundancy};
use gabion_proto::msg::{ClientOp, OpReply};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

pub const CLUSTER: ClusterId = ClusterId([7; 16]);
const TICK_MS: u64 = 100;
const HEARTBEAT_MS: u64 = 500;
const MONITOR_TICK_MS: u64 = 200;
const LEASE_MS: u64 = 3_000;
/// For whatever process runs there on arrival: messages outlive the process that they were sent to.
const ANY_RUN: u64 = u64::MAX;

/// What a seed decides before the run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub osds: u32,
    pub replicas: u32,
    pub clients: usize,
    pub fault_phase_ms: u64,
    /// Per mille.
    pub loss: u64,
    pub duplicate: u64,
    /// Mean time between faults.
    pub fault_every_ms: u64,
}

impl Plan {
    pub fn of(rng: &mut Rng) -> Plan {
        Plan {
            osds: rng.range(3, 6) as u32,
            replicas: if rng.chance(750) { 3 } else { 2 },
            clients: rng.range(1, 4) as usize,
            fault_phase_ms: rng.range(40_000, 120_000),
            loss: [0, 0, 5, 30][rng.below(4) as usize],
            duplicate: [0, 10, 50][rng.below(3) as usize],
            fault_every_ms: rng.range(1_500, 9_000),
        }
    }
}

/// Counters of a run, for honest reports.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub client_ops: u64,
    pub reads_checked: u64,
    pub faults: u64,
    pub map_epochs: u64,
    pub virtual_ms: u64,
}

struct Node {
    id: OsdId,
    disk: ClusterId,
    store: MemoryStore,
    core: Option<OsdCore>,
    incarnation: Incarnation,
    /// Counts starts: events of an earlier run are dropped.
    run: u64,
    /// Effects that the store has not executed yet: lost in a crash.
    queue: VecDeque<Effect>,
    epoch: Epoch,
    origins: BTreeMap<ClientToken, (usize, u64, u64)>,
    connections: BTreeMap<usize, u64>,
    next_token: u64,
    /// The disk is gone for good.
    lost: bool,
    /// Sees nothing of the world until then (its clock goes on).
    paused_until: u64,
}

enum Ev {
    Tick {
        node: usize,
        run: u64,
    },
    Heartbeat {
        node: usize,
        run: u64,
    },
    AtMonitor {
        node: usize,
        run: u64,
        sent: u64,
        beat: Beat,
    },
    Lease {
        node: usize,
        run: u64,
        until: u64,
        epoch: Epoch,
        ok: bool,
    },
    Core {
        node: usize,
        run: u64,
        event: Event,
    },
    ToMonitor {
        node: usize,
        run: u64,
        token: Token,
        request: MonitorRequest,
    },
    StoreRun {
        node: usize,
        run: u64,
    },
    Boot {
        node: usize,
        run: u64,
    },
    Map {
        node: usize,
        run: u64,
        map: Arc<ClusterMap>,
    },
    Client {
        client: usize,
        event: ClientEvent,
    },
    /// A client's operation reaches a node.
    Op {
        node: usize,
        client: usize,
        connection: u64,
        request: u64,
        op: ClientOp,
        data: Bytes,
    },
    MonitorTick,
    Fault,
    Restart {
        node: usize,
    },
}

struct Beat {
    incarnation: Incarnation,
    acked: Epoch,
    stuck: Vec<gabion_proto::pb::StuckPeer>,
}

pub struct World {
    pub now: u64,
    pub rng: Rng,
    pub plan: Plan,
    pub oracle: Oracle,
    pub tally: Tally,
    pub trace: bool,
    heap: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Ev>,
    next_event: u64,
    nodes: Vec<Node>,
    pub state: MonitorState,
    detector: FailureDetector,
    acked: BTreeMap<OsdId, Epoch>,
    published: Arc<ClusterMap>,
    pub clients: Vec<Client>,
    /// Pairs of nodes whose messages are lost, directed. Node `osds` is the monitor.
    cut: BTreeSet<(usize, usize)>,
    faults_on: bool,
    pub finding: Option<String>,
    /// When the last operation on each connection arrives.
    arrivals: BTreeMap<u64, u64>,
    pub pool: PoolId,
    /// A disk was lost since all groups were clean.
    lost_one: bool,
}

impl World {
    pub fn new(seed: u64, trace: bool) -> World {
        let mut rng = Rng::new(seed);
        let plan = Plan::of(&mut rng);
        let mut state = MonitorState::default();
        let mut must = |c: Command| state.apply(0, c).unwrap_or_else(|e| panic!("set-up refused: {e}"));
        must(Command::Bootstrap { cluster: CLUSTER });
        let mut nodes = Vec::new();
        for i in 0..plan.osds {
            let disk = ClusterId([i as u8 + 1; 16]);
            let host = format!("host{i}");
            let add =
                Command::AddOsd { disk, host, rack: String::new(), weight: 65_536, capacity_bytes: 1 << 40 };
            let Reply::Osd(id) = must(add) else { panic!("an OSD has an id") };
            let store = MemoryStore::new(Identity { cluster: CLUSTER, osd: id, disk });
            nodes.push(Node {
                id,
                disk,
                store,
                core: None,
                incarnation: Incarnation(0),
                run: 0,
                queue: VecDeque::new(),
                epoch: Epoch(0),
                origins: BTreeMap::new(),
                connections: BTreeMap::new(),
                next_token: 0,
                lost: false,
                paused_until: 0,
            });
        }
        let pool = must(Command::CreatePool {
            name: "p".into(),
            redundancy: Redundancy::Replicated { size: plan.replicas },
            min_size: 0,
            failure_domain: FailureDomain::Host,
            pg_count: 4,
            object_bytes: 1 << 20,
        });
        let Reply::Pool(pool) = pool else { panic!("a pool has an id") };
        for c in 0..plan.clients {
            must(Command::CreateVolume { name: format!("v{c}"), pool: "p".into(), size_bytes: 8 << 20 });
        }
        let timing = Timing { down_out_ms: 20_000, ..Timing::default() };
        let mut world = World {
            now: 1_000,
            rng,
            oracle: Oracle::default(),
            tally: Tally::default(),
            trace,
            heap: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            nodes,
            published: Arc::new(state.map.clone()),
            state,
            detector: FailureDetector::new(timing),
            acked: BTreeMap::new(),
            clients: (0..plan.clients).map(Client::new).collect(),
            cut: BTreeSet::new(),
            faults_on: true,
            finding: None,
            arrivals: BTreeMap::new(),
            pool,
            lost_one: false,
            plan,
        };
        for node in 0..world.nodes.len() {
            let delay = world.rng.range(1, 500);
            world.at(delay, Ev::Restart { node });
        }
        for client in 0..world.clients.len() {
            world.at(10, Ev::Client { client, event: ClientEvent::Start });
        }
        world.at(MONITOR_TICK_MS, Ev::MonitorTick);
        let first = world.rng.range(3_000, 6_000);
        world.at(first, Ev::Fault);
        world
    }

    pub fn log(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>9} {}", self.now, text());
        }
    }

    fn at(&mut self, delay: u64, ev: Ev) {
        let id = self.next_event;
        self.next_event += 1;
        self.events.insert(id, ev);
        self.heap.push(Reverse((self.now + delay, id)));
    }

    pub fn client_later(&mut self, delay: u64, client: usize, event: ClientEvent) {
        self.at(delay, Ev::Client { client, event });
    }

    fn monitor_index(&self) -> usize {
        self.nodes.len()
    }

    fn delay(&mut self) -> u64 {
        match self.rng.below(100) {
            0..=1 if self.faults_on => self.rng.range(50, 1_500),
            2..=9 => self.rng.range(5, 40),
            _ => self.rng.range(1, 4),
        }
    }

    fn lost_between(&mut self, from: usize, to: usize) -> bool {
        self.cut.contains(&(from, to)) || (self.faults_on && self.rng.chance(self.plan.loss))
    }

    /// Runs until the time or a finding.
    pub fn run_until(&mut self, end: u64) {
        while self.finding.is_none() {
            match self.heap.peek() {
                Some(Reverse((t, _))) if *t <= end => {}
                _ => break,
            }
            let Some(Reverse((t, id))) = self.heap.pop() else { break };
            self.now = self.now.max(t);
            let Some(ev) = self.events.remove(&id) else { continue };
            match self.paused_for(&ev) {
                // With its old number, so that what was sent in order arrives in order.
                Some(wait) => {
                    self.events.insert(id, ev);
                    self.heap.push(Reverse((self.now + wait, id)));
                }
                None => self.handle(ev),
            }
        }
        self.now = self.now.max(end);
    }

    fn live(&self, node: usize, run: u64) -> bool {
        (run == ANY_RUN || self.nodes[node].run == run) && self.nodes[node].core.is_some()
    }

    /// A paused node sees its events when it wakes up.
    fn paused_for(&self, ev: &Ev) -> Option<u64> {
        let node = match ev {
            Ev::Tick { node, .. }
            | Ev::Heartbeat { node, .. }
            | Ev::Lease { node, .. }
            | Ev::Core { node, .. }
            | Ev::StoreRun { node, .. }
            | Ev::Map { node, .. }
            | Ev::Op { node, .. } => *node,
            _ => return None,
        };
        self.nodes[node].paused_until.checked_sub(self.now).filter(|w| *w > 0)
    }

    fn handle(&mut self, ev: Ev) {
        match ev {
            Ev::Tick { node, run } if self.live(node, run) => {
                self.step(node, Event::Tick);
                self.at(TICK_MS, Ev::Tick { node, run });
            }
            Ev::Heartbeat { node, run } if self.live(node, run) => {
                self.heartbeat(node, run);
                self.at(HEARTBEAT_MS, Ev::Heartbeat { node, run });
            }
            Ev::AtMonitor { node, run, sent, beat } => self.at_monitor(node, run, sent, beat),
            Ev::Lease { node, run, until, epoch, ok } if self.live(node, run) => {
                if ok {
                    self.step(node, Event::Lease { until, epoch });
                } else {
                    self.log(|| format!("osd.{node} is deposed"));
                    self.stop(node);
                    self.start(node);
                }
            }
            Ev::Core { node, run, event } if self.live(node, run) => self.step(node, event),
            Ev::ToMonitor { node, run, token, request } => self.report(node, run, token, request),
            Ev::StoreRun { node, run } if self.live(node, run) => self.store_run(node, run),
            Ev::Boot { node, run } => self.boot(node, run),
            Ev::Map { node, run, map } if self.live(node, run) && map.epoch > self.nodes[node].epoch => {
                self.nodes[node].epoch = map.epoch;
                self.step(node, Event::Map(map));
            }
            Ev::Client { client, event } => crate::client::handle(self, client, event),
            Ev::Op { node, client, connection, request, op, data } => {
                self.receive_op(node, client, connection, request, op, data);
            }
            Ev::MonitorTick => {
                let commands = self.detector.step(self.now, &self.state, decide::Event::Tick);
                self.apply_all(commands);
                self.at(MONITOR_TICK_MS, Ev::MonitorTick);
            }
            Ev::Fault if self.faults_on => {
                self.fault();
                let wait = self.rng.range(1, 2 * self.plan.fault_every_ms);
                self.at(wait, Ev::Fault);
            }
            Ev::Restart { node } if !self.nodes[node].lost && self.nodes[node].core.is_none() => {
                self.start(node)
            }
            _ => {}
        }
    }

    fn apply_all(&mut self, commands: Vec<Command>) {
        for c in commands {
            let text = self.trace.then(|| format!("{c:?}"));
            let result = self.state.apply(self.now, c);
            self.log(|| {
                format!(
                    "monitor: {} -> {}",
                    text.unwrap_or_default(),
                    if result.is_ok() { "ok" } else { "refused" }
                )
            });
        }
        self.publish();
    }

    /// Sends a new map to everybody.
    fn publish(&mut self) {
        if self.state.map.epoch == self.published.epoch {
            return;
        }
        self.published = Arc::new(self.state.map.clone());
        self.tally.map_epochs = self.published.epoch.0;
        for node in 0..self.nodes.len() {
            self.send_map(node);
        }
        for client in 0..self.clients.len() {
            let (delay, map) = (self.delay(), self.published.clone());
            self.at(delay, Ev::Client { client, event: ClientEvent::Map(map) });
        }
    }

    fn send_map(&mut self, node: usize) {
        let (delay, run, map) = (self.delay(), self.nodes[node].run, self.published.clone());
        let monitor = self.monitor_index();
        if !self.cut.contains(&(monitor, node)) {
            self.at(delay, Ev::Map { node, run, map });
        }
    }

    /// A process starts: it boots with the monitors first.
    fn start(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        n.run += 1;
        let run = n.run;
        let delay = self.delay();
        self.at(delay, Ev::Boot { node, run });
    }

    fn boot(&mut self, node: usize, run: u64) {
        let n = &self.nodes[node];
        if n.run != run || n.core.is_some() || n.lost {
            return;
        }
        let monitor = self.monitor_index();
        if self.cut.contains(&(node, monitor)) || self.cut.contains(&(monitor, node)) {
            self.at(300, Ev::Boot { node, run });
            return;
        }
        let boot = Command::BootOsd {
            osd: n.id,
            disk: n.disk,
            addr: format!("10.0.0.{}:7000", node + 1),
            host: format!("host{node}"),
            rack: String::new(),
            capacity_bytes: 1 << 40,
        };
        match self.state.apply(self.now, boot) {
            Ok(Reply::Booted { incarnation, epoch }) => {
                let now = self.now;
                let n = &mut self.nodes[node];
                let pgs = n.store.pgs().unwrap_or_default();
                let boot = Boot { cluster: CLUSTER, id: n.id, incarnation, epoch };
                n.core = Some(OsdCore::new(boot, pgs, now));
                n.incarnation = incarnation;
                n.epoch = Epoch(0);
                n.queue.clear();
                n.origins.clear();
                self.acked.remove(&n.id);
                self.log(|| format!("osd.{node} boots as {incarnation} in {epoch}"));
                self.at(1, Ev::Tick { node, run });
                self.at(1, Ev::Heartbeat { node, run });
                self.publish();
                self.send_map(node);
            }
            _ => self.at(500, Ev::Boot { node, run }),
        }
    }

    /// The process is gone, with everything that was not durable.
    fn stop(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        n.run += 1;
        n.core = None;
        n.queue.clear();
        n.origins.clear();
        n.connections.clear();
    }

    fn heartbeat(&mut self, node: usize, run: u64) {
        let Some(core) = &self.nodes[node].core else { return };
        let beat = Beat {
            incarnation: self.nodes[node].incarnation,
            acked: core.acked_epoch(),
            stuck: core.stuck_peers(),
        };
        let (delay, sent, monitor) = (self.delay(), self.now, self.monitor_index());
        if !self.lost_between(node, monitor) {
            self.at(delay, Ev::AtMonitor { node, run, sent, beat });
        }
        // The watch reconnects and catches up.
        if self.nodes[node].epoch < self.published.epoch {
            self.send_map(node);
        }
    }

    fn at_monitor(&mut self, node: usize, run: u64, sent: u64, beat: Beat) {
        let id = self.nodes[node].id;
        let ok = self.state.map.up_osd(id).is_some_and(|o| o.incarnation == beat.incarnation);
        let granted = ok && self.detector.renew(self.now, &self.state, id, beat.incarnation);
        if ok {
            self.acked.insert(id, beat.acked);
            for s in beat.stuck {
                let event = decide::Event::Stuck {
                    osd: id,
                    incarnation: beat.incarnation,
                    pg: PgId { pool: PoolId(s.pool), index: s.pg },
                    interval: Epoch(s.interval),
                    peer: OsdId(s.peer),
                    peer_incarnation: Incarnation(s.peer_incarnation),
                    age_ms: s.age_ms,
                };
                let commands = self.detector.step(self.now, &self.state, event);
                self.apply_all(commands);
            }
        }
        let (delay, epoch, monitor) = (self.delay(), self.state.map.epoch, self.monitor_index());
        if !self.lost_between(monitor, node) && (granted || !ok) {
            self.at(delay, Ev::Lease { node, run, until: sent + LEASE_MS, epoch, ok });
        }
    }

    /// Whether every OSD that is up has acknowledged `epoch` (rule C3).
    pub fn fenced(&self, epoch: Epoch) -> bool {
        self.state
            .map
            .osds
            .iter()
            .filter(|(_, o)| o.up)
            .all(|(id, _)| self.acked.get(id).is_some_and(|a| *a >= epoch))
    }

    pub fn command(&mut self, c: Command) -> Option<Reply> {
        let reply = self.state.apply(self.now, c).ok();
        self.publish();
        reply
    }

    fn report(&mut self, node: usize, run: u64, token: Token, request: MonitorRequest) {
        if !self.live(node, run) {
            return;
        }
        let monitor = self.monitor_index();
        if self.lost_between(node, monitor) {
            self.at(100, Ev::ToMonitor { node, run, token, request });
            return;
        }
        if let MonitorRequest::Activated { pg, interval } = request {
            // As the monitor does (rule P6).
            let current = self.state.map.pgs.get(&pg).filter(|r| r.interval == interval);
            let mut earlier = current.map(earlier_primaries).unwrap_or_default();
            earlier.retain(|o| self.state.map.up_osd(*o).is_some());
            if earlier.iter().any(|o| self.acked.get(o).is_none_or(|a| *a < interval)) {
                self.at(50, Ev::ToMonitor { node, run, token, request });
                return;
            }
        }
        let (osd, incarnation) = (self.nodes[node].id, self.nodes[node].incarnation);
        self.log(|| format!("osd.{node} reports {request:?}"));
        let result = match request {
            MonitorRequest::Activated { pg, interval } => {
                self.state.apply(self.now, Command::PgActivated { osd, incarnation, pg, interval })
            }
            MonitorRequest::Clean { pg, interval } => {
                self.state.apply(self.now, Command::PgClean { osd, incarnation, pg, interval })
            }
        };
        self.publish();
        let delay = self.delay();
        let event = Event::Monitor { token, result: result.map(|_| ()).map_err(|_| MonitorRefused) };
        self.at(delay, Ev::Core { node, run, event });
    }

    fn step(&mut self, node: usize, event: Event) {
        let now = self.now;
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        let mut effects = Vec::new();
        core.step(now, event, &mut effects);
        for effect in effects {
            self.execute(node, effect);
        }
    }

    fn execute(&mut self, node: usize, effect: Effect) {
        let run = self.nodes[node].run;
        match effect {
            Effect::Send { msg, data } => {
                let Some(to) = self.nodes.iter().position(|n| n.id == msg.to) else { return };
                let copies = if self.faults_on && self.rng.chance(self.plan.duplicate) { 2 } else { 1 };
                for _ in 0..copies {
                    if self.lost_between(node, to) {
                        continue;
                    }
                    let delay = self.delay();
                    let event = Event::Peer { msg: msg.clone(), data: data.clone() };
                    // Whatever process runs there when it arrives gets it.
                    self.at_current(delay, to, event);
                }
            }
            Effect::Reply { token, reply, data } => {
                if let Some((client, connection, request)) = self.nodes[node].origins.remove(&token) {
                    let delay = self.delay();
                    let event = ClientEvent::Reply { connection, request, reply, data };
                    self.at(delay, Ev::Client { client, event });
                }
            }
            Effect::Monitor { token, request } => {
                let delay = self.delay();
                self.at(delay, Ev::ToMonitor { node, run, token, request });
            }
            Effect::WantMap { .. } => self.send_map(node),
            store => {
                let idle = self.nodes[node].queue.is_empty();
                self.nodes[node].queue.push_back(store);
                if idle {
                    let delay = self.rng.range(1, 4);
                    self.at(delay, Ev::StoreRun { node, run });
                }
            }
        }
    }

    fn at_current(&mut self, delay: u64, node: usize, event: Event) {
        self.at(delay, Ev::Core { node, run: ANY_RUN, event });
    }

    /// The store executes some of what waits, in order.
    fn store_run(&mut self, node: usize, run: u64) {
        let count = self.rng.range(1, 17).min(self.nodes[node].queue.len() as u64);
        for _ in 0..count {
            let Some(effect) = self.nodes[node].queue.pop_front() else { break };
            let store = &mut self.nodes[node].store;
            let event = match effect {
                Effect::Store { token, txn } => {
                    let text = self.trace.then(|| {
                        txn.ops
                            .iter()
                            .map(|o| format!("{o:?}").chars().take(150).collect::<String>() + " | ")
                            .collect::<String>()
                    });
                    let result = store.commit(vec![txn]).pop().unwrap_or(Ok(()));
                    if let Some(text) = text {
                        println!("{:>9} osd.{node} store {text} -> {result:?}", self.now);
                    }
                    Event::Committed { token, result }
                }
                Effect::Read { token, pg, object, below, first_block, block_count } => Event::ReadDone {
                    token,
                    result: store.read(pg, object, &below, first_block, block_count),
                },
                Effect::ReadObject { token, pg, object } => {
                    Event::ObjectRead { token, result: store.read_object(pg, object) }
                }
                Effect::List { token, pg } => {
                    let objects = store.list(pg, None, usize::MAX).unwrap_or_default();
                    let missing = store.list_missing(pg, None, usize::MAX).unwrap_or_default();
                    Event::Listed { token, result: Ok(Listing { objects, missing }) }
                }
                _ => continue,
            };
            self.at(0, Ev::Core { node, run, event });
        }
        if !self.nodes[node].queue.is_empty() {
            let delay = self.rng.range(1, 4);
            self.at(delay, Ev::StoreRun { node, run });
        }
    }

    /// A client sends on its connection to an OSD.
    pub fn send_op(
        &mut self,
        client: usize,
        to: OsdId,
        connection: u64,
        request: u64,
        op: ClientOp,
        data: Bytes,
    ) {
        let Some(node) = self.nodes.iter().position(|n| n.id == to) else { return };
        // A connection keeps its order, as TCP does.
        let arrives = (self.now + self.delay()).max(self.arrivals.get(&connection).copied().unwrap_or(0));
        self.arrivals.insert(connection, arrives);
        let delay = arrives - self.now;
        self.at(delay, Ev::Op { node, client, connection, request, op, data });
    }

    fn receive_op(
        &mut self,
        node: usize,
        client: usize,
        connection: u64,
        request: u64,
        op: ClientOp,
        data: Bytes,
    ) {
        if self.nodes[node].core.is_none() {
            return;
        }
        // As the server does (rule C1): a newer connection supersedes older ones.
        let newest = self.nodes[node].connections.get(&client).copied().unwrap_or(0);
        if connection < newest {
            return;
        }
        if connection > newest {
            self.nodes[node].connections.insert(client, connection);
            let gone: Vec<ClientToken> = self.nodes[node]
                .origins
                .iter()
                .filter(|(_, (c, n, _))| *c == client && *n < connection)
                .map(|(t, _)| *t)
                .collect();
            for token in gone {
                self.nodes[node].origins.remove(&token);
                self.step(node, Event::ClientGone { token });
            }
        }
        let n = &mut self.nodes[node];
        let token = ClientToken(n.next_token);
        n.next_token += 1;
        n.origins.insert(token, (client, connection, request));
        self.step(node, Event::Client { token, op, data });
    }

    fn fault(&mut self) {
        self.tally.faults += 1;
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        let alive = self.nodes.iter().filter(|n| !n.lost).count();
        match self.rng.below(100) {
            0..=39 => self.crash(node),
            40..=54 => {
                let ms = self.rng.range(200, 9_000);
                self.log(|| format!("osd.{node} pauses for {ms} ms"));
                self.nodes[node].paused_until = self.now + ms;
            }
            55..=57 => {
                // Alone with the monitor: it keeps its lease and can only accuse the others.
                self.log(|| format!("cut between {node} and every other node"));
                for other in (0..self.nodes.len()).filter(|o| *o != node) {
                    self.cut.extend([(node, other), (other, node)]);
                }
            }
            58..=74 => {
                // One-way or full, between two nodes or a node and the monitor.
                let other = self.rng.below(self.nodes.len() as u64 + 1) as usize;
                if other != node {
                    self.log(|| format!("cut between {node} and {other}"));
                    self.cut.insert((node, other));
                    if self.rng.chance(600) {
                        self.cut.insert((other, node));
                    }
                }
            }
            75..=84 => {
                self.log(|| "all cuts heal".into());
                self.cut.clear();
            }
            85..=89 => {
                self.log(|| "the monitor restarts".into());
                let timing = Timing { down_out_ms: 20_000, ..Timing::default() };
                self.detector = FailureDetector::new(timing);
                self.acked.clear();
            }
            90..=93 => {
                for n in 0..self.nodes.len() {
                    self.crash(n);
                }
            }
            94..=96 if alive > self.plan.replicas as usize && self.may_lose_one() => {
                self.log(|| format!("osd.{node} is lost for good"));
                self.stop(node);
                self.nodes[node].lost = true;
                self.lost_one = true;
            }
            _ => {
                let client = self.rng.below(self.clients.len() as u64) as usize;
                self.log(|| format!("client {client} restarts"));
                self.at(1, Ev::Client { client, event: ClientEvent::Crash });
            }
        }
    }

    fn crash(&mut self, node: usize) {
        if self.nodes[node].lost || self.nodes[node].core.is_none() {
            return;
        }
        self.log(|| format!("osd.{node} crashes"));
        self.stop(node);
        let wait =
            if self.rng.chance(300) { self.rng.range(5_000, 30_000) } else { self.rng.range(50, 3_000) };
        self.at(wait, Ev::Restart { node });
    }

    /// Three copies survive the loss of any one disk at any time; two do once everything is clean.
    fn may_lose_one(&mut self) -> bool {
        if self.all_clean() {
            self.lost_one = false;
        }
        self.all_clean() || (self.plan.replicas >= 3 && !self.lost_one)
    }

    pub fn all_clean(&self) -> bool {
        let width = self.plan.replicas as usize;
        self.state.map.pgs.values().all(|r| r.clean && r.activated && r.acting.len() == width)
    }

    /// Faults stop, everything that can come back does.
    pub fn heal(&mut self) {
        self.faults_on = false;
        self.cut.clear();
        for node in 0..self.nodes.len() {
            self.nodes[node].paused_until = 0;
            if !self.nodes[node].lost && self.nodes[node].core.is_none() {
                self.start(node);
            }
        }
    }

    /// After healing: every acting member of every group holds the same, and misses nothing.
    pub fn compare_replicas(&mut self) -> Result<(), String> {
        let pgs = self.state.map.pgs.clone();
        for (pg, record) in pgs {
            let mut reference: Option<(OsdId, Vec<Whole>)> = None;
            for member in record.members() {
                let Some(n) = self.nodes.iter_mut().find(|n| n.id == member) else { continue };
                let missing = n.store.list_missing(pg, None, 10).unwrap_or_default();
                if !missing.is_empty() {
                    return Err(format!("group {pg} is clean, but {member} misses {missing:?}"));
                }
                let list = n.store.list(pg, None, usize::MAX).map_err(|e| e.to_string())?;
                let mut whole = Vec::new();
                for (object, _) in list {
                    let (state, content) = n.store.read_object(pg, object).map_err(|e| e.to_string())?;
                    whole.push((object, state, content));
                }
                match &reference {
                    None => reference = Some((member, whole)),
                    Some((first, r)) if *r != whole => {
                        return Err(format!("group {pg}: {first} and {member} differ after healing"));
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    pub fn describe(&self) -> String {
        let mut out = format!("epoch {}\n", self.state.map.epoch);
        for (pg, r) in &self.state.map.pgs {
            out += &format!("  {pg}: {r:?}\n");
        }
        for n in &self.nodes {
            let statuses = n.core.as_ref().map(|c| c.pg_statuses());
            out += &format!("  {} lost={} run={} epoch={} {:?}\n", n.id, n.lost, n.run, n.epoch, statuses);
        }
        out
    }
}

/// One object as a store has it.
type Whole = (ObjectId, ObjectState, Content);

/// What a reply means to a client.
pub fn is_final(reply: &OpReply) -> bool {
    !matches!(reply, OpReply::Retry { .. })
}
