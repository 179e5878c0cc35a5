//! The monitor: the real replicated state and failure detector. Its state survives a restart, what it knew of leases and
//! fences does not.

use crate::client::ClientEvent;
use crate::network::Place;
use crate::undercut::FILLED;
use crate::wire::Increments;
use crate::world::{Ev, World};
use gabion_monitor::decide::{self, FailureDetector, Timing};
use gabion_monitor::state::intervals::earlier_primaries;
use gabion_monitor::state::scrubs::{DamagedObject, ScrubResult};
use gabion_monitor::state::{Command, MonitorState, Reply};
use gabion_osd::core::{Damage, Event, MonitorRefused, MonitorRequest, ScrubOrder, ScrubReport, Token};
use gabion_proto::ids::*;
use gabion_proto::map::ClusterMap;
use std::collections::BTreeMap;
use std::sync::Arc;

pub const MONITOR_TICK_MS: u64 = 200;
const LEASE_MS: u64 = 3_000;
pub const DOWN_OUT_MS: u64 = 20_000;

pub struct Monitor {
    pub state: MonitorState,
    pub detector: FailureDetector,
    pub acked: BTreeMap<OsdId, Epoch>,
    published: Arc<ClusterMap>,
    pub increments: Increments,
    down_until: u64,
}

/// What an OSD says to the monitors.
pub struct Beat {
    pub incarnation: Incarnation,
    pub acked: Epoch,
    pub stuck: Vec<gabion_proto::pb::StuckPeer>,
    /// Groups that it leads.
    pub led: Vec<PgId>,
    /// How long operations took.
    pub latency: gabion_proto::pb::LatencyWindow,
}

fn detector() -> FailureDetector {
    FailureDetector::new(Timing { down_out_ms: DOWN_OUT_MS, ..Timing::default() })
}

fn scrub_result(r: &ScrubReport) -> ScrubResult {
    let damaged = r.damaged.iter();
    let damaged = damaged
        .map(|(object, d)| DamagedObject { object: *object, inconsistent: *d == Damage::Inconsistent });
    ScrubResult {
        number: r.number,
        deep: r.deep,
        objects: r.objects,
        findings: r.findings,
        repaired: r.repaired,
        damaged_objects: r.damaged_objects,
        damaged: damaged.collect(),
    }
}

impl Monitor {
    pub fn new(state: MonitorState) -> Monitor {
        Monitor {
            published: Arc::new(state.map.clone()),
            state,
            detector: detector(),
            acked: BTreeMap::new(),
            increments: Increments::default(),
            down_until: 0,
        }
    }
}

impl World {
    pub fn published(&self) -> Arc<ClusterMap> {
        self.monitor.published.clone()
    }

    pub fn monitor_runs(&self) -> bool {
        self.now >= self.monitor.down_until
    }

    /// Whether a call from there to the monitor comes through, both ways.
    pub fn reaches_monitor(&self, place: Place) -> bool {
        let cut = &self.network.cut;
        self.monitor_runs()
            && !cut.contains(&(place, Place::Monitor))
            && !cut.contains(&(Place::Monitor, place))
    }

    pub fn restart_monitor(&mut self, down_ms: u64) {
        self.log(|| format!("the monitor restarts, down for {down_ms} ms"));
        self.monitor.down_until = self.now + down_ms;
        self.monitor.detector = detector();
        self.monitor.acked.clear();
        self.monitor.increments.clear();
        self.read_snapshot();
    }

    pub fn monitor_tick(&mut self) {
        if self.monitor_runs() {
            let m = &mut self.monitor;
            let commands = m.detector.step(self.now, &m.state, decide::Event::Tick);
            let evicted = commands.iter().filter(|c| matches!(c, Command::EvictSlow { .. })).count();
            if evicted > 0 {
                *self.tally.changes.entry("slow OSD taken out").or_default() += evicted as u64;
            }
            let slow = m.detector.slow();
            self.tally.called_slow += slow.len() as u64;
            self.slowness.called(slow.into_iter().map(|s| s.osd));
            self.apply_all(commands);
        }
        if !self.all_clean() {
            self.nodes[0].disk.rot_under_reads(0);
        }
        self.at(MONITOR_TICK_MS, Ev::MonitorTick);
    }

    pub fn apply_all(&mut self, commands: Vec<Command>) {
        for c in commands {
            self.command(c);
        }
    }

    pub fn command(&mut self, c: Command) -> Option<Reply> {
        let text = self.trace.then(|| format!("{c:?}"));
        let c = self.logged(c)?;
        let reply = self.monitor.state.apply(self.now, c);
        self.log(|| {
            let outcome = match &reply {
                Ok(_) => "ok".into(),
                Err(e) => format!("refused: {e}"),
            };
            format!("monitor: {} -> {outcome}", text.unwrap_or_default())
        });
        self.publish();
        reply.ok()
    }

    /// Sends a new map to everybody.
    pub fn publish(&mut self) {
        if self.monitor.state.map.epoch == self.monitor.published.epoch {
            return;
        }
        let m = &mut self.monitor;
        let map = Arc::new(m.state.map.clone());
        m.increments.push(&m.published, &map);
        m.published = map;
        self.tally.map_epochs = self.monitor.published.epoch.0;
        for node in 0..self.nodes.len() {
            self.send_map(node);
        }
        for client in 0..self.clients.len() {
            if !self.clients[client].has_ended() {
                self.send_map_to_client(client);
            }
        }
    }

    fn send_map_to_client(&mut self, client: usize) {
        let (delay, map) = (self.delay(), self.published());
        if self.network.cut.contains(&(Place::Monitor, Place::Client(client))) {
            // The watch reconnects.
            return self.at(1_000, Ev::MapForClient { client });
        }
        self.at(delay, Ev::Client { client, event: ClientEvent::Map(map) });
    }

    pub fn map_for_client(&mut self, client: usize) {
        self.send_map_to_client(client);
    }

    pub fn send_map(&mut self, node: usize) {
        let (delay, run, map) = (self.delay(), self.nodes[node].run, self.published());
        if self.monitor_runs() && !self.network.cut.contains(&(Place::Monitor, Place::Node(node))) {
            self.at(delay, Ev::Map { node, run, map });
        }
    }

    pub fn map_came(&mut self, node: usize, sent: &ClusterMap) {
        let have = self.nodes[node].map.clone();
        if sent.epoch <= have.epoch {
            return;
        }
        let Some(map) = self.told(Place::Node(node), &have, sent) else { return };
        self.nodes[node].map = map.clone();
        self.step(node, Event::Map(map));
    }

    pub fn heartbeat(&mut self, node: usize, run: u64) {
        let n = &mut self.nodes[node];
        let Some(core) = &n.core else { return };
        n.told = core.acked_epoch();
        let led = core.pg_statuses().iter().map(|s| PgId { pool: PoolId(s.pool), index: s.index }).collect();
        let (acked, stuck) = (core.acked_epoch(), core.stuck_peers());
        let latency = core.latency_window().clone();
        let beat = Beat { incarnation: n.incarnation, acked, stuck, led, latency };
        let (behind, full) = (n.map.epoch < self.monitor.published.epoch, n.disk.is_full());
        let (delay, sent) = (self.delay(), self.clock(node));
        if !self.lost_between(Place::Node(node), Place::Monitor) {
            self.at(delay, Ev::AtMonitor { node, run, sent, beat });
        }
        // The watch reconnects and catches up.
        if behind {
            self.send_map(node);
        }
        self.step(node, Event::Full(full));
    }

    pub fn at_monitor(&mut self, node: usize, run: u64, sent: u64, beat: Beat) {
        if !self.monitor_runs() {
            return;
        }
        let id = self.nodes[node].id;
        let m = &mut self.monitor;
        let ok = m.state.map.up_osd(id).is_some_and(|o| o.incarnation == beat.incarnation);
        let granted = ok && m.detector.renew(self.now, &m.state, id, beat.incarnation);
        if granted {
            m.detector.latency(self.now, &m.state, (id, beat.incarnation), &beat.latency);
        }
        if ok {
            m.acked.insert(id, beat.acked);
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
                let m = &mut self.monitor;
                let commands = m.detector.step(self.now, &m.state, event);
                self.apply_all(commands);
            }
        }
        let (delay, epoch) = (self.delay(), self.monitor.state.map.epoch);
        if !self.lost_between(Place::Monitor, Place::Node(node)) && (granted || !ok) {
            self.at(delay, Ev::Lease { node, run, until: sent + LEASE_MS, epoch, ok });
            if ok {
                let orders = self.scrub_orders(beat.led);
                let rate_bytes_per_s = self.monitor.state.scrub_settings.rate_bytes_per_s;
                let event = Event::Scrub { orders, rate_bytes_per_s };
                self.at(delay, Ev::Core { node, run, event });
                let limit_ms = self.monitor.state.slow_policy.limit_ms;
                let osds = self.monitor.detector.slow().into_iter().map(|s| s.osd).collect();
                self.at(delay, Ev::Core { node, run, event: Event::Slow { limit_ms, osds } });
            }
        }
    }

    fn scrub_orders(&self, led: Vec<PgId>) -> Vec<ScrubOrder> {
        let due = self.monitor.state.scrub_orders(self.now, led.into_iter());
        due.into_iter().map(|o| ScrubOrder { pg: o.pg, number: o.number, deep: o.deep }).collect()
    }

    /// A process says goodbye: nothing is served under its lease any more.
    pub fn goodbye(&mut self, node: usize) {
        let (osd, incarnation) = (self.nodes[node].id, self.nodes[node].incarnation);
        if self.reaches_monitor(Place::Node(node)) {
            let m = &mut self.monitor;
            let event = decide::Event::Goodbye { osd, incarnation };
            let commands = m.detector.step(self.now, &m.state, event);
            self.apply_all(commands);
        }
    }

    /// Whether every OSD that is up has acknowledged `epoch` (rule C3).
    pub fn fenced(&self, epoch: Epoch) -> bool {
        let m = &self.monitor;
        let up = m.state.map.osds.iter().filter(|(_, o)| o.up);
        self.monitor_runs() && up.map(|(id, _)| id).all(|id| m.acked.get(id).is_some_and(|a| *a >= epoch))
    }

    pub fn report(&mut self, node: usize, run: u64, token: Token, request: MonitorRequest) {
        if !self.live(node, run) {
            return;
        }
        if !self.monitor_runs() || self.lost_between(Place::Node(node), Place::Monitor) {
            return self.at(100, Ev::ToMonitor { node, run, token, request });
        }
        if let MonitorRequest::Activated { pg, interval } = request {
            // As the monitor does (rule P6).
            let m = &self.monitor;
            let current = m.state.map.pgs.get(&pg).filter(|r| r.interval == interval);
            let mut earlier = current.map(|r| earlier_primaries(r)).unwrap_or_default();
            earlier.retain(|o| m.state.map.up_osd(*o).is_some());
            if earlier.iter().any(|o| m.acked.get(o).is_none_or(|a| *a < interval)) {
                return self.at(50, Ev::ToMonitor { node, run, token, request });
            }
        }
        let (osd, incarnation) = (self.nodes[node].id, self.nodes[node].incarnation);
        self.log(|| format!("osd.{node} reports {request:?}"));
        let command = match request {
            MonitorRequest::Activated { pg, interval } => {
                Command::PgActivated { osd, incarnation, pg, interval }
            }
            MonitorRequest::Clean { pg, interval } => Command::PgClean { osd, incarnation, pg, interval },
            MonitorRequest::Filled { pg, interval } => {
                *self.tally.work.entry(FILLED).or_default() += 1;
                Command::PgFilled { osd, incarnation, pg, interval }
            }
            MonitorRequest::Scrubbed { pg, interval, ref report } => {
                if report.findings > 0 && !self.rotten {
                    self.finding = Some(format!("a scrub found what is not there: {report:?} in {pg}"));
                }
                self.tally.scrubs += 1;
                self.tally.scrub_findings += report.findings;
                self.tally.scrub_repaired += report.repaired;
                let result = scrub_result(report);
                Command::PgScrubbed { osd, incarnation, pg, interval, result }
            }
        };
        let result = self.command(command).map(|_| ()).ok_or(MonitorRefused);
        if self.lost_between(Place::Monitor, Place::Node(node)) {
            // The answer is lost: asked again.
            return self.at(1_000, Ev::ToMonitor { node, run, token, request });
        }
        let delay = self.delay();
        self.at(delay, Ev::Core { node, run, event: Event::Monitor { token, result } });
    }
}
