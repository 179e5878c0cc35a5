//! Nodes: one OSD process each, with the real core on the real store, as the server runs them.

use crate::device::Device;
use crate::disk::Disk;
use crate::monitor::DOWN_OUT_MS;
use crate::network::{Origin, Place, Slow};
use crate::world::{ANY_RUN, CLUSTER, Ev, Pace, World};
use gabion_monitor::state::{Command, Reply};
use gabion_osd::core::*;
use gabion_osd::store::*;
use gabion_proto::ids::*;
use gabion_proto::map::ClusterMap;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

const TICK_MS: u64 = 100;
/// A process whose tick did nothing, and that has heard nothing but the monitors since the one before, may be late with
/// the next: nothing waits for it. Whatever else comes brings the ticks back.
const IDLE_TICK_MS: u64 = 1_000;
const HEARTBEAT_MS: u64 = 500;
/// Two clocks drift by less than 1 in 1,000.
const DRIFT_PPM_MAX: u64 = 450;

pub struct Node {
    pub id: OsdId,
    disk_id: ClusterId,
    pub disk: Disk,
    pub device: Device,
    pub core: Option<OsdCore>,
    pub incarnation: Incarnation,
    /// Counts starts: events of an earlier run are dropped.
    pub run: u64,
    /// Effects that the store has not executed yet: lost in a crash.
    pub queue: VecDeque<Effect>,
    /// The newest one that it has heard of.
    pub map: Arc<ClusterMap>,
    pub origins: BTreeMap<ClientToken, Origin>,
    pub connections: BTreeMap<usize, u64>,
    pub next_token: u64,
    /// The disk is gone for good.
    pub lost: bool,
    /// Since when.
    pub lost_at: u64,
    /// Sees nothing of the world until then (its clock goes on).
    pub paused_until: u64,
    /// What came while it was paused comes then, even if it was woken before.
    pub asleep_until: u64,
    /// Everything that it stores or reads takes longer.
    pub slow_disk: Slow,
    /// Everything that it sends or gets takes longer.
    pub slow_net: Slow,
    /// Its clock against the world's.
    clock_ahead_ms: u64,
    drift_ppm: i64,
    /// The next tick; earlier numbers are void.
    tick: u64,
    idle: bool,
    /// Something came since the last tick.
    heard: bool,
    /// Of which epoch the monitors were last told, whether they heard it or not.
    pub told: Epoch,
    /// When its core was last to be woken, by its clock.
    woken_at: Option<u64>,
}

impl World {
    /// A new disk on a new host; its process is not started.
    pub fn add_node(&mut self) {
        let i = self.nodes.len();
        let disk_id = ClusterId([i as u8 + 1; 16]);
        let add = Command::AddOsd {
            disk: disk_id,
            host: format!("host{i}"),
            rack: String::new(),
            weight: 65_536,
            capacity_bytes: 1 << 40,
        };
        let Some(Reply::Osd(id)) = self.command(add) else {
            self.finding = Some("an OSD could not be added".into());
            return;
        };
        let identity = Identity { cluster: CLUSTER, osd: id, disk: disk_id };
        let disk = Disk::new(identity, self.plan.chunks, self.rng.next());
        let drift_ppm = self.rng.range(0, 2 * DRIFT_PPM_MAX) as i64 - DRIFT_PPM_MAX as i64;
        self.nodes.push(Node {
            id,
            disk_id,
            disk,
            device: Device::of(self.plan.scenario),
            core: None,
            incarnation: Incarnation(0),
            run: 0,
            queue: VecDeque::new(),
            map: Arc::default(),
            origins: BTreeMap::new(),
            connections: BTreeMap::new(),
            next_token: 0,
            lost: false,
            lost_at: 0,
            paused_until: 0,
            asleep_until: 0,
            slow_disk: Slow::default(),
            slow_net: Slow::default(),
            clock_ahead_ms: self.rng.range(10_000, 1_000_000),
            drift_ppm,
            tick: 0,
            idle: false,
            heard: false,
            told: Epoch(0),
            woken_at: None,
        });
    }

    /// Its disk is gone for good.
    pub fn lose(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        (n.lost, n.lost_at) = (true, self.now);
    }

    /// What its clock says now.
    pub fn clock(&self, node: usize) -> u64 {
        let n = &self.nodes[node];
        let drift_ms = self.now as i64 * n.drift_ppm / 1_000_000;
        (self.now + n.clock_ahead_ms).saturating_add_signed(drift_ms)
    }

    pub fn live(&self, node: usize, run: u64) -> bool {
        (run == ANY_RUN || self.nodes[node].run == run) && self.nodes[node].core.is_some()
    }

    /// A process starts: it boots with the monitors first.
    pub fn start(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        if n.lost || n.core.is_some() {
            return;
        }
        n.run += 1;
        let run = n.run;
        let delay = self.delay();
        self.at(delay, Ev::Boot { node, run });
    }

    pub fn boot(&mut self, node: usize, run: u64) {
        let n = &self.nodes[node];
        if n.run != run || n.core.is_some() || n.lost {
            return;
        }
        if !self.reaches_monitor(Place::Node(node)) {
            return self.at(300, Ev::Boot { node, run });
        }
        let boot = Command::BootOsd {
            osd: n.id,
            disk: n.disk_id,
            addr: format!("10.0.0.{}:7000", node + 1),
            host: format!("host{node}"),
            rack: String::new(),
            capacity_bytes: 1 << 40,
        };
        let Some(Reply::Booted { incarnation, epoch }) = self.command(boot) else {
            return self.at(500, Ev::Boot { node, run });
        };
        let now = self.clock(node);
        let n = &mut self.nodes[node];
        let mounted = n.disk.mount();
        let pgs = match mounted.and_then(|()| n.disk.pgs()) {
            Ok(pgs) => pgs,
            Err(e) => {
                self.finding = Some(format!("osd.{node} cannot open its store: {e}"));
                return;
            }
        };
        let boot = Boot { cluster: CLUSTER, id: n.id, incarnation, epoch };
        n.core = Some(OsdCore::new(boot, pgs, now).with_rules(self.plan.rules));
        n.incarnation = incarnation;
        n.map = Arc::default();
        n.tick += 1;
        (n.idle, n.heard, n.told, n.woken_at) = (false, false, Epoch(0), None);
        let (id, number) = (n.id, n.tick);
        self.monitor.acked.remove(&id);
        self.log(|| format!("osd.{node} boots as {incarnation} in {epoch}"));
        self.at(1, Ev::Tick { node, run, number });
        self.at(1, Ev::Heartbeat { node, run });
        self.send_map(node);
    }

    /// The process ends, and what its disk had not flushed is lost if power fails.
    pub fn stop(&mut self, node: usize, power_fails: bool) {
        self.count_ways(node);
        let n = &mut self.nodes[node];
        n.run += 1;
        n.core = None;
        n.queue.clear();
        n.origins.clear();
        n.connections.clear();
        n.disk.stop(power_fails);
        self.nodes[0].disk.rot_under_reads(0);
    }

    /// Which ways a process has gone that ends now, and what it knows of its reads.
    pub fn count_ways(&mut self, node: usize) {
        if let Some(stats) = self.nodes[node].core.as_ref().map(OsdCore::stats) {
            self.tally.recovered_bytes += stats.recovered_bytes;
            self.tally.hedged_reads += stats.hedged_reads;
            self.tally.hedges_won += stats.hedges_won;
        }
        for (branch, n) in self.nodes[node].core.iter().flat_map(|c| c.branches().taken()) {
            *self.tally.branches.entry(branch).or_default() += n;
        }
    }

    pub fn crash(&mut self, node: usize) {
        self.crash_for(node, None);
    }

    /// Down for so long, or for a while by chance.
    pub fn crash_for(&mut self, node: usize, ms: Option<u64>) {
        if self.nodes[node].lost || self.nodes[node].core.is_none() {
            return;
        }
        let power_fails = self.rng.chance(600);
        self.log(|| format!("osd.{node} crashes, power fails: {power_fails}"));
        self.stop(node, power_fails);
        let wait = match (ms, self.rng.below(10)) {
            (Some(ms), _) => ms,
            // Long enough to be out, and to return with old data.
            (None, 0) => self.long_absence(),
            (None, 1..=2) => self.rng.range(5_000, 25_000),
            _ => self.rng.range(50, 3_000),
        };
        if wait > DOWN_OUT_MS {
            *self.tally.work.entry("disk back with old data").or_default() += 1;
        }
        self.at(wait, Ev::Restart { node });
    }

    /// Out before it is over; in a quiet time everybody else has been clean for long.
    pub fn long_absence(&mut self) -> u64 {
        match self.pace {
            Pace::Storm => self.rng.range(25_000, 50_000),
            Pace::Quiet => self.rng.range(30_000, 240_000),
        }
    }

    pub fn tick(&mut self, node: usize, run: u64, number: u64) {
        if self.nodes[node].tick != number {
            return;
        }
        let did = self.step_core(node, Event::Tick);
        let n = &mut self.nodes[node];
        n.idle = !did && !n.heard;
        n.heard = false;
        n.tick += 1;
        let (number, wait) = (n.tick, if n.idle { IDLE_TICK_MS } else { TICK_MS });
        self.at(wait, Ev::Tick { node, run, number });
    }

    /// Something came that may need ticks.
    fn wake(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        n.heard = true;
        if !std::mem::replace(&mut n.idle, false) {
            return;
        }
        n.tick += 1;
        let (run, number) = (n.run, n.tick);
        let wait = self.rng.range(1, TICK_MS + 1);
        self.at(wait, Ev::Tick { node, run, number });
    }

    pub fn beat(&mut self, node: usize, run: u64) {
        self.heartbeat(node, run);
        self.at(HEARTBEAT_MS, Ev::Heartbeat { node, run });
    }

    pub fn lease(&mut self, node: usize, until: u64, epoch: Epoch, ok: bool) {
        if ok {
            return self.step(node, Event::Lease { until, epoch });
        }
        // The server starts over in the same process: the disk loses nothing.
        self.log(|| format!("osd.{node} is deposed"));
        self.stop(node, false);
        self.start(node);
    }

    pub fn step(&mut self, node: usize, event: Event) {
        let routine = matches!(
            event,
            Event::Lease { .. } | Event::Full(_) | Event::Scrub { .. } | Event::Slow { .. } | Event::Wake
        );
        let did = self.step_core(node, event);
        if (did || !routine) && self.nodes[node].core.is_some() {
            self.wake(node);
        }
    }

    /// True: there was something to do.
    fn step_core(&mut self, node: usize, event: Event) -> bool {
        let now = self.clock(node);
        let n = &mut self.nodes[node];
        let Some(core) = n.core.as_mut() else { return false };
        let mut effects = Vec::new();
        core.step(now, event, &mut effects);
        let wake_at = core.wake_at();
        let owes_ack = core.owes_ack(n.told);
        let did = !effects.is_empty();
        for effect in effects {
            self.execute(node, effect);
        }
        let n = &mut self.nodes[node];
        if wake_at != n.woken_at {
            n.woken_at = wake_at;
            let run = n.run;
            if let Some(at) = wake_at {
                // One more: its clock may be slower than the world's.
                self.at(at.saturating_sub(now) + 1, Ev::Core { node, run, event: Event::Wake });
            }
        }
        if owes_ack {
            self.heartbeat(node, self.nodes[node].run);
        }
        did
    }

    fn execute(&mut self, node: usize, effect: Effect) {
        let run = self.nodes[node].run;
        match effect {
            Effect::Send { msg, data } => self.send_peer(node, msg, data),
            Effect::Reply { token, reply, data } => self.send_reply(node, token, reply, data),
            Effect::Monitor { token, request } => {
                let delay = self.delay();
                self.at(delay, Ev::ToMonitor { node, run, token, request });
            }
            Effect::WantMap { .. } => self.send_map(node),
            store => {
                let idle = self.nodes[node].queue.is_empty();
                self.nodes[node].queue.push_back(store);
                if idle {
                    let delay = match self.nodes[node].device.begins_in(self.now) {
                        Some(wait) => wait,
                        None => self.disk_delay(node),
                    };
                    self.at(delay, Ev::StoreRun { node, run });
                }
            }
        }
    }

    fn disk_delay(&mut self, node: usize) -> u64 {
        let slow = self.nodes[node].slow_disk;
        slow.by(self.now, &mut self.rng) + self.rng.range(1, 4)
    }

    /// The store executes some of what waits, in order, consecutive commits together.
    pub fn store_run(&mut self, node: usize, run: u64) {
        if self.nodes[node].device.is_one() {
            return self.serve_next(node, run);
        }
        let mut left = self.rng.range(1, 17);
        while left > 0 && !self.nodes[node].queue.is_empty() {
            let (mut tokens, mut txns) = (Vec::new(), Vec::new());
            while left > 0
                && let Some(Effect::Store { .. }) = self.nodes[node].queue.front()
                && let Some(Effect::Store { token, txn }) = self.nodes[node].queue.pop_front()
            {
                tokens.push(token);
                txns.push(txn);
                left -= 1;
            }
            let events = if txns.is_empty() {
                left -= 1;
                let Some(effect) = self.nodes[node].queue.pop_front() else { break };
                // As from the daemon's store: a read sees what was committed before it and, often, what came later.
                if !matches!(effect, Effect::List { .. }) && self.rng.chance(300) {
                    let delay = self.disk_delay(node) + self.rng.below(5);
                    self.at(delay, Ev::StoreRead { node, run, effect });
                    continue;
                }
                self.store_read(node, effect).into_iter().collect()
            } else {
                self.store_commit(node, tokens, txns)
            };
            if events.iter().any(is_fatal) {
                return self.store_died(node);
            }
            for event in events {
                self.at(0, Ev::Core { node, run, event });
            }
        }
        if self.rng.chance(250) {
            let result = self.nodes[node].disk.store().map(|s| s.background());
            if let Some(Err(_)) = result {
                return self.store_died(node);
            }
        }
        if !self.nodes[node].queue.is_empty() {
            let delay = self.disk_delay(node);
            self.at(delay, Ev::StoreRun { node, run });
        }
    }

    pub fn store_commit(&mut self, node: usize, tokens: Vec<Token>, txns: Vec<Txn>) -> Vec<Event> {
        let texts: Vec<String> = match self.trace {
            true => txns.iter().map(describe).collect(),
            false => Vec::new(),
        };
        let Some(store) = self.nodes[node].disk.store() else { return Vec::new() };
        let results = store.commit(txns);
        for (text, result) in texts.iter().zip(&results) {
            self.log(|| format!("osd.{node} store {text} -> {result:?}"));
        }
        tokens.into_iter().zip(results).map(|(token, result)| Event::Committed { token, result }).collect()
    }

    /// A read that others have overtaken.
    pub fn late_read(&mut self, node: usize, run: u64, effect: Effect) {
        match self.store_read(node, effect) {
            Some(event) if is_fatal(&event) => self.store_died(node),
            Some(event) => self.at(0, Ev::Core { node, run, event }),
            None => {}
        }
    }

    pub fn store_read(&mut self, node: usize, effect: Effect) -> Option<Event> {
        let store = self.nodes[node].disk.store()?;
        let event = match effect {
            Effect::Read { token, pg, object, below, first_block, block_count } => {
                Event::ReadDone { token, result: store.read(pg, object, &below, first_block, block_count) }
            }
            Effect::ReadPending { token, pg, object, first_block, block_count } => {
                Event::ReadDone { token, result: store.read_pending(pg, object, first_block, block_count) }
            }
            Effect::ReadObject { token, pg, object } => {
                Event::ObjectRead { token, result: store.read_object(pg, object) }
            }
            Effect::ReadPiece { token, pg, object, first_block, block_count } => {
                let result = store.read_piece(pg, object, first_block, block_count);
                Event::PieceRead { token, result }
            }
            Effect::Place { token, pg, object, content } => {
                Event::PiecePlaced { token, result: store.place(pg, object, content) }
            }
            Effect::Digest { token, pg, object } => {
                Event::Digested { token, result: store.digest(pg, object) }
            }
            Effect::List { token, pg } => {
                let objects = store.list(pg, None, usize::MAX);
                let missing = store.list_missing(pg, None, usize::MAX);
                let meta = store.meta(pg);
                let result = meta.and_then(|meta| Ok(Listing { meta, objects: objects?, missing: missing? }));
                Event::Listed { token, result }
            }
            _ => return None,
        };
        Some(event)
    }

    /// The disk failed: the process says goodbye, if it still can, and ends (invariant 9).
    pub fn store_died(&mut self, node: usize) {
        self.log(|| format!("osd.{node} stops: its disk failed"));
        let says_goodbye = self.rng.chance(500);
        self.stop(node, true);
        if says_goodbye {
            self.goodbye(node);
        }
        let wait = self.rng.range(500, 8_000);
        self.at(wait, Ev::Restart { node });
    }
}

pub fn is_fatal(event: &Event) -> bool {
    let error = match event {
        Event::Committed { result, .. } => result.as_ref().err(),
        Event::ReadDone { result, .. } => result.as_ref().err(),
        Event::ObjectRead { result, .. } => result.as_ref().err(),
        Event::PieceRead { result, .. } => result.as_ref().err(),
        Event::PiecePlaced { result, .. } => result.as_ref().err(),
        Event::Digested { result, .. } => result.as_ref().err(),
        Event::Listed { result, .. } => result.as_ref().err(),
        _ => None,
    };
    matches!(error, Some(StoreError::Fatal(_)))
}

fn describe(txn: &Txn) -> String {
    let ops = txn.ops.iter().map(|o| format!("{o:?}").chars().take(150).collect::<String>());
    format!("{} {}", txn.pg, ops.collect::<Vec<_>>().join(" | "))
}
