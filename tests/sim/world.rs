//! The simulated cluster's clock and events: one heap; nothing happens outside it.

use crate::absence::Absence;
use crate::client::{self, Client, ClientEvent, Seat};
use crate::damage::Damage;
use crate::filling::Filling;
use crate::monitor::{Beat, MONITOR_TICK_MS, Monitor};
use crate::network::Network;
use crate::nodes::Node;
use crate::oracle::Oracle;
use crate::plan::{Plan, Scenario};
use crate::rebuild::{self, Rebuild};
use crate::rng::Rng;
use crate::slow::Slowness;
use crate::snapshots::Snapshot;
use crate::tally::Tally;
use bytes::Bytes;
use gabion_monitor::state::scrubs::ScrubSettings;
use gabion_monitor::state::{Command, MonitorState, Reply};
use gabion_osd::core::*;
use gabion_proto::ids::*;
use gabion_proto::map::{ClusterMap, FailureDomain, Redundancy};
use gabion_proto::msg::ClientOp;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

pub const CLUSTER: ClusterId = ClusterId([7; 16]);
/// For whatever process runs there on arrival: messages outlive the process that they were sent to.
pub const ANY_RUN: u64 = u64::MAX;
const GROUPS: u32 = 4;

/// How much happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    Storm,
    /// A stretch in which clients do little and faults are minutes apart: OSDs stay away for long, scrubs come when they are due.
    Quiet,
}

pub enum Ev {
    Tick {
        node: usize,
        run: u64,
        number: u64,
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
    StoreRead {
        node: usize,
        run: u64,
        effect: Effect,
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
    MapForClient {
        client: usize,
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
    Fault {
        chain: u64,
    },
    /// Whether a drained OSD can be removed.
    Drained {
        node: usize,
        run: u64,
    },
    TakeOver {
        client: usize,
    },
    Restart {
        node: usize,
    },
    Unfill {
        node: usize,
    },
    BreakLink,
    SlowDisks {
        all: bool,
    },
    StaleCopies,
    Absence,
    Rebuild,
    /// How what is damaged is getting on.
    Damage,
    DamageSomething,
    GoAway {
        slow: usize,
    },
}

pub struct World {
    pub now: u64,
    pub rng: Rng,
    pub plan: Plan,
    pub oracle: Oracle,
    pub tally: Tally,
    pub trace: bool,
    pub finding: Option<String>,
    pub faults_on: bool,
    pub pace: Pace,
    /// Each start of trouble begins a new chain of faults.
    chain: u64,
    heap: BinaryHeap<Reverse<(u64, u64)>>,
    /// Boxed: a tree that moves events of this size costs more than the allocation.
    events: BTreeMap<u64, Box<Ev>>,
    next_event: u64,
    pub nodes: Vec<Node>,
    pub monitor: Monitor,
    pub network: Network,
    pub clients: Vec<Client>,
    /// By volume number.
    pub seats: Vec<Seat>,
    pub snapshots: Vec<Snapshot>,
    pub next_connection: u64,
    pub pool: PoolId,
    /// The fewest copies that the pool was to keep since all groups were clean.
    pub copies_min: u32,
    /// The lowest min-size that the pool had.
    pub min_size: usize,
    /// Holders whose fences are in force: nobody before them is answered any more (rule C3).
    pub in_force: BTreeMap<VolumeId, (Generation, Session)>,
    /// A disk was lost since all groups were clean.
    pub lost_one: bool,
    /// Something rots, and nothing else goes wrong before scrubs have replaced it.
    pub rotting: bool,
    /// Some bit rotted in this run: what scrubs find otherwise is not there.
    pub rotten: bool,
    /// An object is damaged, and nothing else goes wrong before it is whole again.
    pub damage: Option<Damage>,
    pub slowness: Slowness,
    pub absence: Absence,
    pub rebuild: Rebuild,
    pub filling: Filling,
}

impl World {
    pub fn planned(plan: Plan, rng: Rng, trace: bool) -> World {
        let mut state = MonitorState::default();
        let mut must = |c: Command| state.apply(0, c).unwrap_or_else(|e| panic!("set-up refused: {e}"));
        must(Command::Bootstrap { cluster: CLUSTER });
        let pool = must(Command::CreatePool {
            name: "p".into(),
            redundancy: plan.redundancy,
            min_size: plan.min_size(plan.redundancy),
            failure_domain: FailureDomain::Host,
            pg_count: if plan.scenario == Scenario::Rebuild { rebuild::GROUPS } else { GROUPS },
            object_bytes: 1 << 20,
        });
        let Reply::Pool(pool) = pool else { panic!("a pool has an id") };
        let mut world = World {
            now: 1_000,
            rng,
            oracle: Oracle::default(),
            tally: Tally::default(),
            trace,
            finding: None,
            faults_on: true,
            pace: Pace::Storm,
            chain: 0,
            heap: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            nodes: Vec::new(),
            monitor: Monitor::new(state),
            network: Network::default(),
            clients: Vec::new(),
            seats: Vec::new(),
            snapshots: Vec::new(),
            next_connection: 1,
            pool,
            copies_min: u32::MAX,
            min_size: usize::MAX,
            in_force: BTreeMap::new(),
            lost_one: false,
            rotting: false,
            rotten: false,
            damage: None,
            slowness: Slowness::default(),
            absence: Absence::default(),
            rebuild: Rebuild::default(),
            filling: Filling::default(),
            plan,
        };
        world.log(|| format!("{:?}", world.plan));
        let (interval_s, deep_interval_s) = world.plan.scrub_every_s;
        world.set_scrubs(interval_s, deep_interval_s);
        for node in 0..world.plan.osds as usize {
            world.add_node();
            let delay = world.rng.range(1, 500);
            world.at(delay, Ev::Restart { node });
        }
        for _ in 0..world.plan.volumes {
            world.add_volume();
        }
        world.at(MONITOR_TICK_MS, Ev::MonitorTick);
        let first = world.rng.range(3_000, 6_000);
        match world.plan.scenario {
            Scenario::Faults => world.at(first, Ev::Fault { chain: 0 }),
            Scenario::OneBrokenLink => world.at(first, Ev::BreakLink),
            Scenario::TooFewMembers | Scenario::StandIns => {}
            Scenario::Damage => world.at(first, Ev::DamageSomething),
            Scenario::SlowDisks { all } => world.at(first, Ev::SlowDisks { all }),
            Scenario::StaleCopies => world.at(first, Ev::StaleCopies),
            Scenario::Absence => world.at(first, Ev::Absence),
            Scenario::Rebuild => world.at(first, Ev::Rebuild),
        }
        world
    }

    /// The pool's, as it is to be now.
    pub fn redundancy(&self) -> Redundancy {
        self.monitor.state.map.pools.get(&self.pool).map_or(self.plan.redundancy, |p| p.redundancy)
    }

    pub fn width(&self) -> usize {
        self.redundancy().width()
    }

    /// Disks that may be lost at once, at any time, without losing what was acknowledged.
    pub fn spare(&self) -> u32 {
        match self.redundancy() {
            // Min-size is more than half of them.
            Redundancy::Replicated { size } if size.min(self.copies_min) > 2 => size.min(self.copies_min) / 2,
            Redundancy::Replicated { .. } => 0,
            Redundancy::Erasure { m, .. } => m - 1,
        }
    }

    pub fn has_seen_enough(&self) -> bool {
        let (form, tally) = (self.plan.form, &self.tally);
        tally.client_ops >= form.operations_min
            && tally.fault_count() >= form.faults_min
            && tally.change_count() >= form.map_changes_min
            && self.now >= form.virtual_ms_min
    }

    /// From now on things go wrong.
    pub fn make_trouble(&mut self, pace: Pace) {
        self.log(|| format!("{pace:?} begins"));
        self.faults_on = true;
        self.set_pace(pace);
        self.chain += 1;
        let (first, chain) = (self.rng.range(100, 6_000), self.chain);
        self.at(first, Ev::Fault { chain });
    }

    pub fn set_pace(&mut self, pace: Pace) {
        if std::mem::replace(&mut self.pace, pace) == pace {
            return;
        }
        let (interval_s, deep_interval_s) = match pace {
            Pace::Storm => self.plan.scrub_every_s,
            Pace::Quiet => (self.rng.range(60, 300), self.rng.range(120, 900)),
        };
        self.set_scrubs(interval_s, deep_interval_s);
    }

    fn set_scrubs(&mut self, interval_s: u64, deep_interval_s: u64) {
        let rate_bytes_per_s = 16 << 20;
        self.command(Command::SetScrub(ScrubSettings { interval_s, deep_interval_s, rate_bytes_per_s }));
    }

    /// What the run has counted.
    pub fn into_tally(mut self) -> Tally {
        for node in 0..self.nodes.len() {
            self.count_ways(node);
        }
        self.tally.redundancy = match self.plan.redundancy {
            Redundancy::Replicated { size } => format!("replicated {size}"),
            Redundancy::Erasure { k, m } => format!("erasure {k}+{m}"),
        };
        self.tally.reads_checked = self.oracle.reads_checked;
        self.tally.harmed_reads = self.oracle.harmed_reads;
        self.tally.virtual_ms = self.now;
        self.tally
    }

    pub fn log(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>9} {}", self.now, text());
        }
    }

    pub fn at(&mut self, delay: u64, ev: Ev) {
        let id = self.next_event;
        self.next_event += 1;
        self.events.insert(id, Box::new(ev));
        self.heap.push(Reverse((self.now + delay, id)));
    }

    pub fn client_later(&mut self, delay: u64, client: usize, event: ClientEvent) {
        self.at(delay, Ev::Client { client, event });
    }

    /// Whether a client's operation is on its way to some OSD.
    pub fn is_op_under_way(&self) -> bool {
        self.events.values().any(|ev| matches!(**ev, Ev::Op { .. }))
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
                None => self.handle(*ev),
            }
        }
        if self.finding.is_none() {
            self.now = self.now.max(end);
        }
    }

    /// Who is paused sees its events when it wakes up.
    fn paused_for(&self, ev: &Ev) -> Option<u64> {
        let until = match ev {
            Ev::Tick { node, .. }
            | Ev::Heartbeat { node, .. }
            | Ev::Lease { node, .. }
            | Ev::Core { node, .. }
            | Ev::StoreRun { node, .. }
            | Ev::StoreRead { node, .. }
            | Ev::Map { node, .. } => self.nodes[*node].paused_until,
            // On one connection nothing overtakes what came while it was paused, also if it was woken before.
            Ev::Op { node, .. } => self.nodes[*node].asleep_until,
            Ev::Client { client, .. } => self.clients[*client].paused_until,
            _ => return None,
        };
        until.checked_sub(self.now).filter(|w| *w > 0)
    }

    fn handle(&mut self, ev: Ev) {
        match ev {
            Ev::Tick { node, run, number } if self.live(node, run) => self.tick(node, run, number),
            Ev::Heartbeat { node, run } if self.live(node, run) => self.beat(node, run),
            Ev::AtMonitor { node, run, sent, beat } => self.at_monitor(node, run, sent, beat),
            Ev::Lease { node, run, until, epoch, ok } if self.live(node, run) => {
                self.lease(node, until, epoch, ok);
            }
            Ev::Core { node, run, event } if self.live(node, run) => self.step(node, event),
            Ev::ToMonitor { node, run, token, request } => self.report(node, run, token, request),
            Ev::StoreRun { node, run } if self.live(node, run) => self.store_run(node, run),
            Ev::StoreRead { node, run, effect } if self.live(node, run) => self.late_read(node, run, effect),
            Ev::Boot { node, run } => self.boot(node, run),
            Ev::Map { node, run, map } if self.live(node, run) => self.map_came(node, &map),
            Ev::MapForClient { client } => self.map_for_client(client),
            Ev::Client { client, event } => client::handle(self, client, event),
            Ev::Op { node, client, connection, request, op, data } => {
                self.receive_op(node, client, connection, request, op, data);
            }
            Ev::MonitorTick => self.monitor_tick(),
            Ev::Fault { chain } if self.faults_on && chain == self.chain => self.fault(chain),
            Ev::Drained { node, run } => self.remove_drained(node, run),
            Ev::TakeOver { client } if self.faults_on => self.take_over(client),
            Ev::BreakLink => self.break_link(),
            Ev::SlowDisks { all } => self.slow_down(all),
            Ev::StaleCopies => self.make_copies_stale(),
            Ev::Absence => self.go_on_with_absence(),
            Ev::Rebuild => self.go_on_with_rebuild(),
            Ev::Damage => self.go_on_with_damage(),
            Ev::DamageSomething if self.faults_on => self.damage_again(),
            Ev::GoAway { slow } => self.go_away(slow),
            Ev::Restart { node } => self.start(node),
            Ev::Unfill { node } => self.unfill(node),
            _ => {}
        }
    }

    pub fn describe(&self) -> String {
        let mut out = format!("epoch {}\n", self.monitor.state.map.epoch);
        for (pg, r) in &self.monitor.state.map.pgs {
            out += &format!("  {pg}: {r:?}\n");
        }
        for n in &self.nodes {
            let statuses = n.core.as_ref().map(|c| c.pg_statuses());
            out +=
                &format!("  {} lost={} run={} epoch={} {:?}\n", n.id, n.lost, n.run, n.map.epoch, statuses);
        }
        for (i, c) in self.clients.iter().enumerate() {
            for op in c.ops.values() {
                out += &format!("  client {i}, v{}, waits: {}\n", c.volume, op.describe());
            }
        }
        out
    }
}
