//! The task that owns the core.

use super::clients::{self, Origin};
use super::connections::Connections;
use super::drain::{Fatal, drain, reload};
use super::metrics::Figures;
use super::monitors::Monitors;
use super::peers::Peers;
use crate::core::*;
use crate::store::driver::{Answers, StoreDriver};
use crate::store::{self, DirStore, Identity, Store as _, StoreError, Usage};
use bytes::Bytes;
use gabion_common::clock::boottime_ms;
use gabion_common::metrics::Endpoint;
use gabion_common::tls::Security;
use gabion_proto::ids::*;
use gabion_proto::limits::{
    FULL_FREE_PERCENT, HEARTBEAT, LEASE, REPORTS_AT_ONCE_MAX, SCRUB_ORDERS_MAX, SLOW_OSDS_MAX, SUBOP_STUCK,
};
use gabion_proto::map::ClusterMap;
use gabion_proto::msg::{ClientOp, Message, OpReply, PeerMsg};
use gabion_proto::pb::{BootRequest, HeartbeatReply, HeartbeatRequest, OsdStats};
use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, debug_span, error, info, info_span, warn};

/// Inputs that may wait for the core.
const INPUTS_MAX: usize = 4096;
/// Requests that the store may owe answers to; more wait in order in the shell.
const STORE_REQUESTS_MAX: usize = 4096;
/// The core hears of time this often.
const TICK: Duration = Duration::from_millis(100);
/// A heartbeat that somebody waits for goes out at once, but not sooner after the last one.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);

/// A validated configuration.
pub struct Config {
    pub data_dir: PathBuf,
    pub monitors: Vec<String>,
    pub host: String,
    pub rack: String,
    pub security: Security,
    pub metrics: Option<Endpoint>,
}

/// Why the daemon ends.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{0}")]
    Config(String),
    #[error("cannot open the store: {0}")]
    Store(#[from] StoreError),
    #[error("the monitors refused this OSD: {0}")]
    BootRefused(String),
    #[error(
        "the monitors are at epoch {epoch} and this disk has taken part in interval {interval}: they were set up from an old backup, and \
         writes would be lost if this OSD went on; give them their newest data"
    )]
    Forgotten { interval: Epoch, epoch: Epoch },
    #[error("the store stopped for good: {0}")]
    Fatal(String),
    #[error("{context}: {source}")]
    Io { context: &'static str, source: std::io::Error },
    #[error("{0}")]
    Other(String),
}

/// What reaches the owning task.
pub enum Input {
    Client {
        origin: Origin,
        op: ClientOp,
        data: Bytes,
    },
    /// `superseded` closes the connection.
    ClientConnected {
        client: ClientId,
        connection: u64,
        superseded: CancellationToken,
    },
    ConnectionClosed {
        connection: u64,
    },
    Peer {
        msg: PeerMsg,
        data: Bytes,
    },
}

/// Answers to effects, tagged with the run that asked: a later run ignores them.
struct Answer {
    run: u64,
    event: Event,
}

type Driver = StoreDriver<DirStore, Answer>;

enum End {
    /// Not up any more: boot again.
    Deposed,
    Stop,
}

/// Serves until `stop` is cancelled, the store fails for good or the monitors refuse this OSD.
pub async fn serve(
    config: Config,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), ServerError> {
    let mut store = store::open(&config.data_dir)?;
    let identity = store.identity();
    let pgs = store.pgs()?;
    let monitors = Monitors::new(&config.monitors, config.security.clone())?;
    let addr =
        listener.local_addr().map_err(|source| ServerError::Io { context: "listening socket", source })?;
    let usage = store.usage();
    let (fatal_tx, fatal) = watch::channel(None::<String>);
    let driver = Driver::spawn(store, STORE_REQUESTS_MAX + 16, move |why| {
        fatal_tx.send_replace(Some(why));
    });
    info!(osd = %identity.osd, cluster = %identity.cluster, %addr, pgs = pgs.len(), "store is open");
    gabion_common::readiness::serving();

    let current = Arc::new(AtomicU64::new(0));
    let (input_tx, inputs) = mpsc::channel(INPUTS_MAX);
    let listening = (identity.cluster, identity.osd, current.clone(), config.security.clone());
    tokio::spawn(clients::accept(listener, listening, input_tx));
    let (answer_tx, answers) = mpsc::channel(INPUTS_MAX);
    let map = gabion_common::map_watch::follow(monitors.client());

    let boot = BootRequest {
        id: identity.osd.0,
        cluster: identity.cluster.0.to_vec(),
        disk: identity.disk.0.to_vec(),
        addr: addr.to_string(),
        host: config.host.clone(),
        rack: config.rack.clone(),
        capacity_bytes: usage.capacity_bytes,
    };
    let figures = Figures::new(identity.osd);
    if let Some(endpoint) = config.metrics {
        endpoint.serve(figures.clone());
    }
    let mut shell = Shell {
        identity,
        figures,
        security: config.security,
        monitors,
        store_answers: driver.answers(),
        store: driver,
        answered: Vec::new(),
        usage,
        map,
        inputs,
        answers,
        answer_tx,
        fatal,
        connections: Connections::default(),
        report_turns: Arc::new(Semaphore::new(REPORTS_AT_ONCE_MAX)),
        run: 0,
        outstanding: 0,
        backlog: VecDeque::new(),
    };
    let mut start = pgs;
    loop {
        let (incarnation, epoch) = tokio::select! {
            r = shell.monitors.boot(boot.clone()) => r?,
            () = stop.cancelled() => return Ok(()),
        };
        info!(osd = %identity.osd, %incarnation, %epoch, "up");
        current.store(incarnation.0, Ordering::Relaxed);
        let booted = Boot { cluster: identity.cluster, id: identity.osd, incarnation, epoch };
        if let Some(interval) = booted.forgotten(&start) {
            shell.monitors.goodbye(identity.osd, incarnation).await;
            return Err(ServerError::Forgotten { interval, epoch });
        }
        let span = info_span!("osd", osd = %identity.osd, %incarnation);
        match shell.run(booted, start, &stop).instrument(span).await? {
            End::Stop => {
                shell.monitors.goodbye(identity.osd, incarnation).await;
                return shell.drain(&stop).await;
            }
            End::Deposed => {
                warn!(osd = %identity.osd, %incarnation, "not up any more, booting again");
                shell.drain(&stop).await?;
                match reload(&mut shell.store, &mut shell.fatal, &stop).await? {
                    Some(pgs) => start = pgs,
                    None => return Ok(()),
                }
            }
        }
    }
}

fn slow_osds(r: &HeartbeatReply) -> Event {
    let limit_ms = if r.slow_limit_ms > 0 { r.slow_limit_ms } else { SUBOP_STUCK.as_millis() as Millis };
    let osds = r.slow_osds.iter().take(SLOW_OSDS_MAX).map(|o| OsdId(*o)).collect();
    Event::Slow { limit_ms, osds }
}

fn scrub_orders(r: &HeartbeatReply) -> Event {
    let orders = r.scrubs.iter().take(SCRUB_ORDERS_MAX).map(|o| ScrubOrder {
        pg: PgId { pool: PoolId(o.pool), index: o.index },
        number: o.number,
        deep: o.deep,
    });
    Event::Scrub { orders: orders.collect(), rate_bytes_per_s: r.scrub_rate_bytes_per_s }
}

/// The core's clock is the boot clock; a wait is short.
async fn sleep_until(at: Option<Millis>) {
    let wait = at.unwrap_or_default().saturating_sub(boottime_ms());
    tokio::time::sleep(Duration::from_millis(wait)).await;
}

struct Shell {
    identity: Identity,
    figures: Figures,
    security: Security,
    monitors: Monitors,
    store: Driver,
    store_answers: Answers<DirStore, Answer>,
    /// Empty; kept for its memory.
    answered: Vec<Answer>,
    usage: Usage,
    map: watch::Receiver<Arc<ClusterMap>>,
    inputs: mpsc::Receiver<Input>,
    answers: mpsc::Receiver<Answer>,
    answer_tx: mpsc::Sender<Answer>,
    fatal: Fatal,
    connections: Connections,
    /// So that a heartbeat never waits behind thousands of reports.
    report_turns: Arc<Semaphore>,
    /// Counts runs of the core.
    run: u64,
    /// Requests that the store owes answers to.
    outstanding: usize,
    /// Store effects that wait for their turn, in order.
    backlog: VecDeque<Effect>,
}

/// What belongs to one run of the core.
struct Run {
    core: OsdCore,
    incarnation: Incarnation,
    peers: Peers,
    origins: HashMap<ClientToken, Origin>,
    next_token: u64,
    effects: Vec<Effect>,
    /// When the monitors were last told something, and up to which epoch.
    beaten: (Instant, Epoch),
}

impl Shell {
    async fn run(
        &mut self,
        boot: Boot,
        start: StartState,
        stop: &CancellationToken,
    ) -> Result<End, ServerError> {
        self.run += 1;
        let Boot { id, incarnation, .. } = boot;
        let mut run = Run {
            core: OsdCore::new(boot, start, boottime_ms()),
            incarnation,
            peers: Peers::new(self.identity.cluster, id, incarnation, self.security.clone()),
            origins: HashMap::new(),
            next_token: 0,
            effects: Vec::new(),
            beaten: (Instant::now(), Epoch(0)),
        };
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut beat = tokio::time::interval(HEARTBEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let (beat_tx, mut beats) = mpsc::channel::<(u64, Result<HeartbeatReply, tonic::Status>)>(16);
        let mut beating = 0;
        self.map.mark_changed();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(End::Stop),
                _ = self.fatal.changed() => {
                    let why = self.fatal.borrow().clone().unwrap_or_default();
                    error!(osd = %id, %why, "the store stopped for good; replace the disk");
                    // The monitors learn it at once instead of from the lease.
                    self.monitors.goodbye(id, incarnation).await;
                    return Err(ServerError::Fatal(why));
                }
                Some((sent_ms, result)) = beats.recv() => {
                    beating -= 1;
                    match result {
                        Ok(r) => {
                            // Counted from when the request was sent (rule P6).
                            let lease = r.lease_ms.min(LEASE.as_millis() as u64);
                            self.step(&mut run, Event::Lease { until: sent_ms + lease, epoch: Epoch(r.epoch) });
                            self.step(&mut run, scrub_orders(&r));
                            self.step(&mut run, slow_osds(&r));
                            let bytes_per_s = r.rebuild_rate_bytes_per_s;
                            self.step(&mut run, Event::RebuildLimit { bytes_per_s });
                        }
                        Err(s) if s.code() == tonic::Code::Aborted => return Ok(End::Deposed),
                        Err(s) => warn!(osd = %id, error = s.message(), "heartbeat not answered"),
                    }
                }
                _ = beat.tick(), if beating < 4 => {
                    beating += 1;
                    self.beat(&mut run, beat_tx.clone());
                    let free = self.usage.capacity_bytes.saturating_sub(self.usage.used_bytes);
                    let full = free < self.usage.capacity_bytes / 100 * FULL_FREE_PERCENT;
                    self.step(&mut run, Event::Full(full));
                }
                () = self.store.ready() => self.drive_store(&mut run),
                Some(answer) = self.answers.recv() => {
                    if answer.run == self.run {
                        self.step(&mut run, answer.event);
                    }
                }
                Ok(()) = self.map.changed() => {
                    let map = self.map.borrow_and_update().clone();
                    self.step(&mut run, Event::Map(map));
                }
                _ = tick.tick() => {
                    self.store.tick();
                    self.step(&mut run, Event::Tick);
                }
                () = sleep_until(run.core.wake_at()), if run.core.wake_at().is_some() => self.step(&mut run, Event::Wake),
                Some(input) = self.inputs.recv(), if self.backlog.len() < STORE_REQUESTS_MAX => self.input(&mut run, input),
            }
            let (at, told) = run.beaten;
            if run.core.owes_ack(told) && beating < 4 && at.elapsed() >= HEARTBEAT_MIN {
                beating += 1;
                self.beat(&mut run, beat_tx.clone());
            }
        }
    }

    fn drive_store(&mut self, run: &mut Run) {
        let mut answered = std::mem::take(&mut self.answered);
        self.store.turn(&mut answered);
        self.outstanding -= answered.len();
        for answer in answered.drain(..) {
            if answer.run == self.run {
                self.step(run, answer.event);
            }
        }
        self.answered = answered;
        self.pump_backlog();
    }

    fn input(&mut self, run: &mut Run, input: Input) {
        match input {
            Input::ClientConnected { client, connection, superseded } => {
                if let Some(old) = self.connections.connected(client, connection, superseded) {
                    self.forget_connection(run, old);
                }
            }
            Input::Client { origin, .. } if !self.connections.counts(origin.client, origin.connection) => {
                tracing::debug!(client = %origin.client, "operation of a superseded connection dropped");
            }
            Input::Client { origin, op, data } => {
                let token = ClientToken(run.next_token);
                run.next_token += 1;
                run.origins.insert(token, origin);
                self.step(run, Event::Client { token, op, data });
            }
            Input::ConnectionClosed { connection } => {
                self.connections.closed(connection);
                self.forget_connection(run, connection);
            }
            Input::Peer { msg, data } => self.step(run, Event::Peer { msg, data }),
        }
    }

    /// Nobody waits for the answers to this connection's operations any more: those that have not
    /// started are dropped.
    fn forget_connection(&mut self, run: &mut Run, connection: u64) {
        let gone: Vec<_> =
            run.origins.iter().filter(|(_, o)| o.connection == connection).map(|(t, _)| *t).collect();
        for token in gone {
            run.origins.remove(&token);
            self.step(run, Event::ClientGone { token });
        }
    }

    fn step(&mut self, run: &mut Run, event: Event) {
        let span = match &event {
            Event::Client { token, op, .. } => {
                debug_span!("op", op = token.0, client = %op.client, object = %op.object)
            }
            _ => Span::none(),
        };
        let _span = span.entered();
        let mut effects = std::mem::take(&mut run.effects);
        run.core.step(boottime_ms(), event, &mut effects);
        for effect in effects.drain(..) {
            self.execute(run, effect);
        }
        run.effects = effects;
    }

    fn execute(&mut self, run: &mut Run, effect: Effect) {
        match effect {
            Effect::Send { msg, data } => {
                let map = self.map.borrow().clone();
                run.peers.send(&map, msg, data);
            }
            Effect::Reply { token, reply, data } => {
                if let Some(origin) = run.origins.remove(&token) {
                    if let OpReply::Failed(error) = &reply {
                        tracing::debug!(osd = %self.identity.osd, op = token.0, %error, "operation refused");
                    }
                    origin.answer(Message::OpReply(reply), data);
                }
            }
            Effect::Monitor { token, request } => {
                let (monitors, tx, number) = (self.monitors.clone(), self.answer_tx.clone(), self.run);
                let (osd, incarnation) = (self.identity.osd, run.incarnation);
                // A sum over all groups; thousands of them may report at once.
                let stats = matches!(request, MonitorRequest::Clean { .. }).then(|| run.core.stats());
                let turns = self.report_turns.clone();
                tokio::spawn(async move {
                    // Never closed.
                    let _turn = turns.acquire().await;
                    let result = monitors.report(osd, incarnation, request, stats.unwrap_or_default()).await;
                    let event = Event::Monitor { token, result };
                    let _ = tx.send(Answer { run: number, event }).await;
                });
            }
            // The watch follows the monitors' newest map by itself.
            Effect::WantMap { .. } => {}
            store_effect => {
                self.backlog.push_back(store_effect);
                self.pump_backlog();
            }
        }
    }

    /// Hands waiting store effects to the store, in order, as far as its answers will fit.
    fn pump_backlog(&mut self) {
        while self.outstanding < STORE_REQUESTS_MAX {
            let Some(effect) = self.backlog.pop_front() else { return };
            self.outstanding += 1;
            let (answers, run) = (self.store_answers.clone(), self.run);
            let answer = move |event| answers.put(Answer { run, event });
            match effect {
                Effect::Store { token, txn } => {
                    self.store.commit(txn, move |result| answer(Event::Committed { token, result }));
                }
                Effect::ReadPending { token, pg, object, first_block, block_count } => {
                    self.store.away().read_pending(pg, object, first_block, block_count, move |result| {
                        answer(Event::ReadDone { token, result });
                    });
                }
                Effect::Read { token, pg, object, below, first_block, block_count } => {
                    self.store.away().read(pg, object, below, first_block, block_count, move |result| {
                        answer(Event::ReadDone { token, result });
                    });
                }
                Effect::ReadObject { token, pg, object } => {
                    self.store
                        .away()
                        .read_object(pg, object, move |result| answer(Event::ObjectRead { token, result }));
                }
                Effect::ReadPiece { token, pg, object, first_block, block_count } => {
                    self.store.away().read_piece(pg, object, (first_block, block_count), move |result| {
                        answer(Event::PieceRead { token, result });
                    });
                }
                Effect::Place { token, pg, object, content } => {
                    self.store.away().place(pg, object, content, move |result| {
                        answer(Event::PiecePlaced { token, result });
                    });
                }
                Effect::Digest { token, pg, object } => {
                    self.store
                        .away()
                        .digest(pg, object, move |result| answer(Event::Digested { token, result }));
                }
                Effect::List { token, pg } => {
                    self.store.away().list(pg, move |result| answer(Event::Listed { token, result }));
                }
                other => unreachable!("not a store effect: {other:?}"),
            }
        }
    }

    fn beat(&mut self, run: &mut Run, tx: mpsc::Sender<(u64, Result<HeartbeatReply, tonic::Status>)>) {
        self.usage = self.store.usage();
        let stats = OsdStats {
            capacity_bytes: self.usage.capacity_bytes,
            used_bytes: self.usage.used_bytes,
            objects: self.usage.objects,
            checksum_errors: self.usage.checksum_errors,
            ..run.core.stats()
        };
        let pgs = run.core.pg_statuses();
        let latency = run.core.latency_window().clone();
        self.figures.set(stats.clone(), self.store.stats(), pgs.len() as u64, latency.clone());
        let request = HeartbeatRequest {
            id: self.identity.osd.0,
            incarnation: run.incarnation.0,
            acked_epoch: run.core.acked_epoch().0,
            stats: Some(stats),
            stuck: run.core.stuck_peers(),
            pgs,
            latency: Some(latency),
        };
        run.beaten = (Instant::now(), run.core.acked_epoch());
        let monitors = self.monitors.clone();
        tokio::spawn(async move {
            let sent_ms = boottime_ms();
            let result = monitors.heartbeat(request).await;
            let _ = tx.send((sent_ms, result)).await;
        });
    }

    /// Waits until the store has answered everything.
    async fn drain(&mut self, stop: &CancellationToken) -> Result<(), ServerError> {
        self.backlog.clear();
        drain(&mut self.store, &mut self.outstanding, &mut self.fatal, stop).await
    }
}
