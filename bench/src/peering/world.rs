//! OSD cores, their index stores and the monitors' state under one virtual clock. Messages, commits and agreement take
//! fixed times; what the code itself takes is counted as CPU and does not move the clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use gabion_monitor::state::intervals::earlier_primaries;
use gabion_monitor::state::{Command, MonitorState, Reply};
use gabion_osd::core::{
    Boot, ClientToken, Effect, Event, Listing, Millis, MonitorRefused, MonitorRequest, OsdCore, Token,
};
use gabion_proto::frame::{Frame, HEADER_BYTES};
use gabion_proto::ids::*;
use gabion_proto::map::{ClusterMap, MapIncrement};
use gabion_proto::msg::{ClientOp, Message, OpReply, PeerMsg};
use gabion_proto::pb;
use prost::Message as _;

use super::spent::{Spent, Work};
use super::store::IndexStore;

/// One way between two daemons, and one durable write.
const HOP_MS: Millis = 1;
const DISK_MS: Millis = 1;
/// As the daemons have it.
const TICK_MS: Millis = 100;
const HEARTBEAT_MS: Millis = 500;
const LEASE_MS: Millis = 3_000;

/// What a monitor needs for one entry of its log, and how many reports one entry may carry.
#[derive(Clone, Copy, Debug)]
pub struct Agreement {
    pub commit_ms: Millis,
    pub batch: usize,
}

/// Something that will happen. Of an earlier run of an OSD it does not.
enum Due {
    Step { osd: usize, run: u64, event: Event },
    Frame { osd: usize, run: u64, head: Bytes, data: Bytes },
    List { osd: usize, run: u64, token: Token, pg: PgId },
    Map { osd: usize, run: u64, increment: Bytes },
    Tick { osd: usize, run: u64 },
    Beat { osd: usize, run: u64 },
    Agreed,
}

struct Report {
    osd: usize,
    run: u64,
    token: Token,
    command: Command,
}

pub struct Osd {
    pub id: OsdId,
    core: Option<OsdCore>,
    run: u64,
    incarnation: Incarnation,
    map: Arc<ClusterMap>,
    pub store: IndexStore,
    pub spent: Spent,
}

/// What went over the network, or to the monitors.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    pub messages: u64,
    pub bytes: u64,
    /// Metadata of the longest frame.
    pub longest_meta_bytes: u64,
    pub reports: u64,
    pub commits: u64,
    pub epochs: u64,
    /// Of maps and increments, to all OSDs.
    pub map_bytes: u64,
}

impl Traffic {
    pub fn less(&self, before: &Traffic) -> Traffic {
        Traffic {
            messages: self.messages - before.messages,
            bytes: self.bytes - before.bytes,
            longest_meta_bytes: self.longest_meta_bytes,
            reports: self.reports - before.reports,
            commits: self.commits - before.commits,
            epochs: self.epochs - before.epochs,
            map_bytes: self.map_bytes - before.map_bytes,
        }
    }
}

pub struct World {
    pub now: Millis,
    next: u64,
    due: BTreeMap<(Millis, u64), Due>,
    agreement: Agreement,
    pub monitor: Arc<MonitorState>,
    reports: VecDeque<Report>,
    agreeing: Vec<Report>,
    pub osds: Vec<Osd>,
    pub monitor_spent: Spent,
    pub traffic: Traffic,
    pub replies: BTreeMap<ClientToken, OpReply>,
    effects: Vec<Effect>,
}

fn place_of(osd: usize) -> (String, String, ClusterId) {
    let mut disk = [7; 16];
    disk[..8].copy_from_slice(&(osd as u64).to_le_bytes());
    (format!("10.0.{}.{}:7000", osd / 250, 1 + osd % 250), format!("host{osd}"), ClusterId(disk))
}

impl World {
    pub fn new(agreement: Agreement) -> World {
        World {
            now: 0,
            next: 0,
            due: BTreeMap::new(),
            agreement,
            monitor: Arc::default(),
            reports: VecDeque::new(),
            agreeing: Vec::new(),
            osds: Vec::new(),
            monitor_spent: Spent::default(),
            traffic: Traffic::default(),
            replies: BTreeMap::new(),
            effects: Vec::new(),
        }
    }

    fn at(&mut self, delay: Millis, due: Due) {
        self.next += 1;
        self.due.insert((self.now + delay, self.next), due);
    }

    /// One entry of the monitors' log with these commands, and the map that comes of it.
    pub fn agree(&mut self, commands: Vec<Command>) -> Result<Vec<Result<Reply, String>>> {
        self.traffic.commits += 1;
        let before = self.monitor.clone();
        let (now, monitor) = (self.now, &mut self.monitor);
        let (replies, increment) = self.monitor_spent.on(Work::Agree, || {
            let state = Arc::make_mut(monitor);
            let replies: Vec<_> =
                commands.into_iter().map(|c| state.apply(now, c).map_err(|r| r.to_string())).collect();
            let changed = before.map.epoch != state.map.epoch;
            (replies, changed.then(|| MapIncrement::between(&before.map, &state.map)))
        });
        if let Some(increment) = increment {
            self.traffic.epochs += increment.to.0 - increment.from.0;
            let encoded =
                self.monitor_spent.on(Work::Agree, || pb::MapIncrement::from(&increment).encode_to_vec());
            self.publish(encoded.into());
        }
        Ok(replies)
    }

    fn publish(&mut self, increment: Bytes) {
        for osd in 0..self.osds.len() {
            if self.osds[osd].core.is_some() {
                self.traffic.map_bytes += increment.len() as u64;
                let run = self.osds[osd].run;
                self.at(HOP_MS, Due::Map { osd, run, increment: increment.clone() });
            }
        }
    }

    /// The same of one command, which must not be refused.
    pub fn agree_on(&mut self, command: Command) -> Result<Reply> {
        let text = format!("{command:?}");
        let mut replies = self.agree(vec![command])?;
        let reply = replies.pop().context("one command has one answer")?;
        reply.map_err(|e| anyhow::anyhow!("{text}: {e}"))
    }

    pub fn add_osd(&mut self) -> Result<()> {
        let (_, host, disk) = place_of(self.osds.len());
        let capacity_bytes = 16 << 40;
        let add = Command::AddOsd { disk, host, rack: String::new(), weight: 0, capacity_bytes };
        let Reply::Osd(id) = self.agree_on(add)? else { bail!("an OSD was added and has no number") };
        self.osds.push(Osd {
            id,
            core: None,
            run: 0,
            incarnation: Incarnation(0),
            map: Arc::default(),
            store: IndexStore::default(),
            spent: Spent::default(),
        });
        Ok(())
    }

    /// Starts OSDs at one moment, from what their stores hold.
    pub fn boot(&mut self, osds: &[usize]) -> Result<()> {
        let command = |osd: &usize| {
            let (addr, host, disk) = place_of(*osd);
            let (id, capacity_bytes) = (self.osds[*osd].id, 16 << 40);
            Command::BootOsd { osd: id, disk, addr, host, rack: String::new(), capacity_bytes }
        };
        let booted = self.agree(osds.iter().map(command).collect())?;
        let map = Arc::new(self.monitor.map.clone());
        for (osd, reply) in osds.iter().copied().zip(booted) {
            let Ok(Reply::Booted { incarnation, epoch }) = reply else { bail!("no boot: {reply:?}") };
            let o = &mut self.osds[osd];
            let boot = Boot { cluster: map.cluster, id: o.id, incarnation, epoch };
            o.run += 1;
            o.incarnation = incarnation;
            o.map = map.clone();
            let (start, now) = (o.store.start(), self.now);
            o.core = Some(o.spent.on(Work::Other, || OsdCore::new(boot, start, now)));
            let run = o.run;
            let full = pb::ClusterMap::from(&*map).encoded_len();
            self.traffic.map_bytes += full as u64;
            self.at(0, Due::Beat { osd, run });
            self.at(osd as Millis % TICK_MS, Due::Tick { osd, run });
            self.at(HOP_MS, Due::Step { osd, run, event: Event::Map(map.clone()) });
        }
        Ok(())
    }

    /// As SIGKILL. The monitors hear of it by and by.
    pub fn kill(&mut self, osd: usize) {
        self.osds[osd].core = None;
        self.osds[osd].run += 1;
    }

    pub fn mark_down(&mut self, osd: usize) -> Result<()> {
        let o = &self.osds[osd];
        let (id, incarnation) = (o.id, o.incarnation);
        self.agree_on(Command::MarkDown { osd: id, incarnation, reason: "its lease ran out".into() })
            .map(drop)
    }

    /// Hands the operation to the OSD.
    pub fn client(&mut self, osd: usize, token: ClientToken, op: ClientOp, data: Bytes) {
        let run = self.osds[osd].run;
        self.at(HOP_MS, Due::Step { osd, run, event: Event::Client { token, op, data } });
    }

    pub fn core(&self, osd: usize) -> Option<&OsdCore> {
        self.osds[osd].core.as_ref()
    }

    /// Goes on until that is so. Looked at whenever the map has changed, and at every full second.
    pub fn until(&mut self, what: &str, limit_ms: Millis, reached: impl Fn(&World) -> bool) -> Result<()> {
        let (deadline, mut epoch, mut second) = (self.now + limit_ms, None, None);
        loop {
            let look = (Some(self.monitor.map.epoch), Some(self.now / 1_000));
            if (epoch, second) != look {
                if reached(self) {
                    return Ok(());
                }
                (epoch, second) = look;
            }
            ensure!(self.now < deadline, "{what}: not after {} virtual seconds", limit_ms / 1_000);
            self.advance()?;
        }
    }

    pub fn pass(&mut self, ms: Millis) -> Result<()> {
        let end = self.now + ms;
        while self.due.first_key_value().is_some_and(|((at, _), _)| *at <= end) {
            self.advance()?;
        }
        self.now = end;
        Ok(())
    }

    fn advance(&mut self) -> Result<()> {
        let ((at, _), due) = self.due.pop_first().context("nothing is left to happen")?;
        self.now = at;
        match due {
            Due::Step { osd, run, event } if self.lives(osd, run) => self.step(osd, event)?,
            Due::Frame { osd, run, head, data } if self.lives(osd, run) => {
                let msg = self.osds[osd].spent.on(Work::Frames, || decode(&head))?;
                self.step(osd, Event::Peer { msg, data })?;
            }
            Due::List { osd, run, token, pg } if self.lives(osd, run) => {
                // Made when it is wanted: many wait, and a store would have them on disk.
                let listing: Listing = self.osds[osd].store.list(pg);
                self.step(osd, Event::Listed { token, result: Ok(listing) })?;
            }
            Due::Map { osd, run, increment } if self.lives(osd, run) => {
                let o = &mut self.osds[osd];
                let old = o.map.clone();
                let next = o.spent.on(Work::Maps, || -> Result<ClusterMap> {
                    let increment = MapIncrement::try_from(pb::MapIncrement::decode(increment)?)?;
                    let mut next = ClusterMap::clone(&old);
                    increment.apply(&mut next)?;
                    Ok(next)
                })?;
                o.map = Arc::new(next);
                let map = o.map.clone();
                self.step(osd, Event::Map(map))?;
            }
            Due::Tick { osd, run } if self.lives(osd, run) => {
                self.step(osd, Event::Tick)?;
                self.at(TICK_MS, Due::Tick { osd, run });
            }
            Due::Beat { osd, run } if self.lives(osd, run) => self.beat(osd, run)?,
            Due::Agreed => self.agreed()?,
            _ => {}
        }
        Ok(())
    }

    fn lives(&self, osd: usize, run: u64) -> bool {
        self.osds[osd].core.is_some() && self.osds[osd].run == run
    }

    /// What the daemon makes of a heartbeat; the lease comes back at once.
    fn beat(&mut self, osd: usize, run: u64) -> Result<()> {
        let o = &mut self.osds[osd];
        let core = o.core.as_ref().context("it lives")?;
        o.spent.on(Work::Heartbeats, || {
            let request = pb::HeartbeatRequest {
                id: o.id.0,
                incarnation: o.incarnation.0,
                acked_epoch: core.acked_epoch().0,
                stats: Some(core.stats()),
                stuck: core.stuck_peers(),
                pgs: core.pg_statuses(),
                latency: Some(core.latency_window().clone()),
            };
            request.encode_to_vec()
        });
        let (until, epoch) = (self.now + LEASE_MS, self.monitor.map.epoch);
        self.at(HOP_MS, Due::Step { osd, run, event: Event::Lease { until, epoch } });
        self.at(HEARTBEAT_MS, Due::Beat { osd, run });
        Ok(())
    }

    fn step(&mut self, osd: usize, event: Event) -> Result<()> {
        let work = match &event {
            Event::Map(_) => Work::Maps,
            Event::Tick => Work::Ticks,
            Event::Lease { .. } => Work::Heartbeats,
            Event::Peer { .. } => Work::Messages,
            Event::Listed { .. } => Work::Lists,
            _ => Work::Other,
        };
        let mut effects = std::mem::take(&mut self.effects);
        let (now, o) = (self.now, &mut self.osds[osd]);
        let core = o.core.as_mut().context("a step of a process that is gone")?;
        o.spent.on(work, || core.step(now, event, &mut effects));
        for effect in effects.drain(..) {
            self.execute(osd, effect)?;
        }
        self.effects = effects;
        Ok(())
    }

    fn execute(&mut self, osd: usize, effect: Effect) -> Result<()> {
        let run = self.osds[osd].run;
        match effect {
            Effect::Send { msg, data } => self.send(osd, msg, data)?,
            Effect::Store { token, txn } => {
                let result = self.osds[osd].store.commit(txn);
                self.at(DISK_MS, Due::Step { osd, run, event: Event::Committed { token, result } });
            }
            Effect::List { token, pg } => self.at(DISK_MS, Due::List { osd, run, token, pg }),
            Effect::ReadPiece { token, pg, object, first_block, .. } => {
                let result = self.osds[osd].store.read_piece(pg, object, first_block);
                self.at(DISK_MS, Due::Step { osd, run, event: Event::PieceRead { token, result } });
            }
            Effect::Place { token, .. } => {
                let result = Ok(gabion_osd::store::Placed::nowhere());
                self.at(DISK_MS, Due::Step { osd, run, event: Event::PiecePlaced { token, result } });
            }
            Effect::Reply { token, reply, .. } => _ = self.replies.insert(token, reply),
            Effect::Monitor { token, request } => self.report(osd, token, request)?,
            // Maps come by themselves.
            Effect::WantMap { .. } => {}
            Effect::Read { .. }
            | Effect::ReadPending { .. }
            | Effect::ReadObject { .. }
            | Effect::Digest { .. } => {
                bail!("nobody reads in this measurement")
            }
        }
        Ok(())
    }

    fn send(&mut self, from: usize, msg: PeerMsg, data: Bytes) -> Result<()> {
        let to = self.osds.iter().position(|o| o.id == msg.to).context("a message to nobody")?;
        let frame = Frame { request: 0, message: Message::Peer(msg), data };
        // A frame that is too long is an error here.
        let head = self.osds[from].spent.on(Work::Frames, || frame.encode_head())?;
        let t = &mut self.traffic;
        t.messages += 1;
        t.bytes += (head.len() + frame.data.len()) as u64;
        t.longest_meta_bytes = t.longest_meta_bytes.max((head.len() - HEADER_BYTES) as u64);
        let run = self.osds[to].run;
        self.at(HOP_MS, Due::Frame { osd: to, run, head, data: frame.data });
        Ok(())
    }

    fn report(&mut self, from: usize, token: Token, request: MonitorRequest) -> Result<()> {
        let (osd, incarnation) = (self.osds[from].id, self.osds[from].incarnation);
        let command = match request {
            MonitorRequest::Activated { pg, interval } => {
                let record = self.monitor.map.pgs.get(&pg).context("a report of no group")?;
                // The monitors would wait for their acknowledgement; none of these measurements has such a case.
                let earlier = earlier_primaries(record);
                ensure!(
                    !earlier.iter().any(|o| self.monitor.map.up_osd(*o).is_some()),
                    "an earlier primary is up"
                );
                Command::PgActivated { osd, incarnation, pg, interval }
            }
            MonitorRequest::Clean { pg, interval } => Command::PgClean { osd, incarnation, pg, interval },
            other => bail!("not part of this measurement: {other:?}"),
        };
        self.traffic.reports += 1;
        self.reports.push_back(Report { osd: from, run: self.osds[from].run, token, command });
        self.begin_agreement();
        Ok(())
    }

    /// One entry at a time; what comes meanwhile waits for the next.
    fn begin_agreement(&mut self) {
        if self.agreeing.is_empty() && !self.reports.is_empty() {
            let count = self.reports.len().min(self.agreement.batch);
            self.agreeing.extend(self.reports.drain(..count));
            self.at(self.agreement.commit_ms, Due::Agreed);
        }
    }

    fn agreed(&mut self) -> Result<()> {
        let reports = std::mem::take(&mut self.agreeing);
        let replies = self.agree(reports.iter().map(|r| r.command.clone()).collect())?;
        for (r, reply) in reports.into_iter().zip(replies) {
            let result = reply.map(drop).map_err(|_| MonitorRefused);
            let event = Event::Monitor { token: r.token, result };
            self.at(HOP_MS, Due::Step { osd: r.osd, run: r.run, event });
        }
        self.begin_agreement();
        Ok(())
    }
}

fn decode(head: &Bytes) -> Result<PeerMsg> {
    // The data travels beside it here: the header must not promise it.
    let head = head.first_chunk::<HEADER_BYTES>().map(gabion_proto::frame::Header::decode).zip(Some(head));
    let (header, bytes) = head.context("a frame without a header")?;
    match header?.decode_meta(&bytes[HEADER_BYTES..])? {
        Message::Peer(msg) => Ok(msg),
        other => bail!("not between OSDs: {other:?}"),
    }
}
