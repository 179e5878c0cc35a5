//! One OSD's decisions: the map, the lease, the fences, and its placement groups.

use super::context::{Context, Load, Tokens};
use super::latency::Latencies;
use super::pg::{Pg, What};
use super::scrub_budget::ScrubBudget;
use super::throttle::Throttle;
use super::*;
use crate::store::DIVIDE_MAX;
use gabion_proto::limits::{CONN_OPS_MAX, SUBOP_STUCK, SUBOP_STUCK_MAX, SUBOP_STUCK_MIN};
use gabion_proto::msg::{PeerBody, RetryWhy};
use gabion_proto::pb;
use std::collections::BTreeMap;

/// Client operations that may be here at once; more are told to come back.
const CLIENT_OPS_MAX: usize = 16 * CONN_OPS_MAX;
/// Groups of which a question may wait here for its map; others are asked again.
const EARLY_MAX: usize = 4_096;

/// What the monitors said when this run of the process booted.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    pub cluster: ClusterId,
    pub id: OsdId,
    pub incarnation: Incarnation,
    /// The map in which this run is up. An older one says nothing of what this OSD should hold.
    pub epoch: Epoch,
}

impl Boot {
    /// The newest interval that the store takes part in, if the monitors have not come to it yet: they have forgotten it, and
    /// would give its versions out again (rule P3a). Never with monitors that remember: whatever was promised is of a map before the boot,
    /// which makes a map of its own, and nothing is promised before its answer. A disk that never promised anything says 0.
    pub fn forgotten(&self, start: &StartState) -> Option<Epoch> {
        let promised = start.iter().map(|(_, meta)| meta.promised.max(meta.activated)).max()?;
        Some(promised).filter(|p| *p > Epoch(0) && *p >= self.epoch)
    }
}

/// See the module docs of [`crate::core`].
pub struct OsdCore {
    boot: Boot,
    id: OsdId,
    incarnation: Incarnation,
    map: Arc<ClusterMap>,
    lease_until: Millis,
    full: bool,
    rules: Rules,
    branches: Branches,
    /// Newest epoch whose fences are in force with nothing older in flight (rule C3).
    acked: Epoch,
    /// Newest map in which somebody waits for that: another primary, or the next holder of a volume.
    awaited: Epoch,
    pgs: BTreeMap<PgId, Pg>,
    /// By group: the newest question of a primary whose interval the map here does not have yet.
    early: BTreeMap<PgId, PeerMsg>,
    tokens: Tokens<What>,
    stats: pb::OsdStats,
    /// Client operations in all groups, and those of them that wait to start.
    client_ops: usize,
    client_waiting: usize,
    /// What recovery of all groups may be moving, and scrubs reading.
    recovery: Load,
    throttle: Throttle,
    scrub_budget: ScrubBudget,
    latency: Latencies,
    /// How long a member may owe a sub-operation.
    stuck_ms: Millis,
    now: Millis,
}

impl OsdCore {
    /// A core for one run of the process; `start` is what the store holds.
    pub fn new(boot: Boot, start: StartState, now: Millis) -> OsdCore {
        let pgs = start.into_iter().map(|(pg, meta)| (pg, Pg::stored(pg, meta))).collect();
        OsdCore {
            boot,
            id: boot.id,
            incarnation: boot.incarnation,
            map: Arc::default(),
            lease_until: 0,
            full: false,
            rules: Rules::default(),
            branches: Branches::default(),
            acked: Epoch(0),
            awaited: Epoch(0),
            pgs,
            early: BTreeMap::new(),
            tokens: Tokens::default(),
            stats: pb::OsdStats::default(),
            client_ops: 0,
            client_waiting: 0,
            recovery: Load::default(),
            throttle: Throttle::new(now),
            scrub_budget: ScrubBudget::new(now),
            latency: Latencies::new(boot.id, now),
            stuck_ms: SUBOP_STUCK.as_millis() as Millis,
            now,
        }
    }

    /// Sets the rules that this core keeps; see [`Rules`].
    pub fn with_rules(self, rules: Rules) -> OsdCore {
        OsdCore { rules, ..self }
    }

    /// Takes in one event; what is to be done is appended to `out`.
    pub fn step(&mut self, now: Millis, event: Event, out: &mut Vec<Effect>) {
        self.now = now;
        self.scrub_budget.refill(now);
        let operations = if self.rules.keep(Rule::RoomForClients) { self.client_ops } else { 0 };
        let waiting = self.client_waiting.min(operations);
        let under_way = operations - waiting;
        self.throttle.elapse(now, under_way, waiting, self.recovery.reserved);
        self.latency.elapse(now);
        let before = out.len();
        self.take(event, out);
        for pg in self.latency.take_due(now) {
            self.with_pg(pg, out, |pg, cx| pg.hedge(cx));
        }
        // Once each: some wait again.
        for _ in 0..self.throttle.turns.len() {
            let Some(pg) = self.throttle.next_turn(self.recovery) else { break };
            self.with_pg(pg, out, |pg, cx| pg.recover(cx));
            self.throttle.turns.end();
        }
        let ended = |e: &&Effect| {
            matches!(e, Effect::Reply { reply: OpReply::Done { .. } | OpReply::Data { .. }, .. })
        };
        if self.rules.keep(Rule::RoomForClients) {
            self.throttle.ended(out[before..].iter().filter(ended).count() as u64);
        }
    }

    fn take(&mut self, event: Event, out: &mut Vec<Effect>) {
        match event {
            Event::Map(map) => self.new_map(map, out),
            Event::Lease { until, epoch } => {
                self.lease_until = self.lease_until.max(until);
                if epoch > self.map.epoch {
                    out.push(Effect::WantMap { epoch });
                }
                self.every_pg(out, |pg, cx| pg.resume(cx));
            }
            Event::Full(full) => self.full = full,
            Event::Client { token, op, data } => self.client(token, op, data, out),
            Event::ClientGone { token } => {
                for pg in self.pgs.values_mut() {
                    pg.client_gone(token);
                }
                self.client_ops = self.pgs.values().map(Pg::client_ops).sum();
                self.client_waiting = self.pgs.values().map(Pg::client_waiting).sum();
            }
            Event::Peer { msg, data } => self.peer(msg, data, out),
            Event::Committed { token, result } => {
                self.answer(token, out, |pg, cx, what| pg.committed(cx, what, result))
            }
            Event::ReadDone { token, result } => {
                self.answer(token, out, |pg, cx, what| pg.read_done(cx, what, result))
            }
            Event::ObjectRead { token, result } => {
                self.answer(token, out, |pg, cx, what| pg.object_read(cx, what, result));
            }
            Event::PieceRead { token, result } => {
                self.answer(token, out, |pg, cx, what| pg.piece_read(cx, what, result));
            }
            Event::PiecePlaced { token, result } => {
                self.answer(token, out, |pg, cx, what| {
                    if let What::PlacePiece { object, tid } = what {
                        pg.piece_placed(cx, (object, tid), result);
                    }
                });
            }
            Event::Digested { token, result } => {
                self.answer(token, out, |pg, cx, what| {
                    if let What::ScrubCopy { tid, object } = what {
                        pg.copy_digested(cx, (tid, object), result);
                    }
                });
            }
            Event::Scrub { orders, rate_bytes_per_s } => {
                self.scrub_budget.set_rate(rate_bytes_per_s);
                for order in orders {
                    self.with_pg(order.pg, out, |pg, cx| pg.order_scrub(cx, order.number, order.deep));
                }
            }
            Event::RebuildLimit { bytes_per_s } => self.throttle.set_limit(bytes_per_s),
            Event::Listed { token, result } => {
                self.answer(token, out, |pg, cx, what| pg.listed(cx, what, result))
            }
            Event::Monitor { token, result } => {
                self.answer(token, out, |pg, cx, what| pg.monitor_answered(cx, what, result));
            }
            Event::Slow { limit_ms, osds } => {
                let (least, most) = (SUBOP_STUCK_MIN.as_millis(), SUBOP_STUCK_MAX.as_millis());
                self.stuck_ms = limit_ms.clamp(least as Millis, most as Millis);
                self.latency.set_slow(osds);
            }
            Event::Tick => self.every_pg(out, |pg, cx| pg.tick(cx)),
            // Looked at with every event.
            Event::Wake => {}
        }
        if self.acked < self.map.epoch {
            let waits = self.rules.keep(Rule::FenceDrains)
                && self.pgs.values().any(|pg| pg.has_fenced_writes(&self.map));
            match waits {
                true => self.branches.take(Branch::FenceWaits),
                false => self.acked = self.map.epoch,
            }
        }
    }

    /// See [`Event::Map`]; rule C3.
    pub fn acked_epoch(&self) -> Epoch {
        self.acked
    }

    /// Whether somebody waits for the monitors to hear of the epoch that is acknowledged now, who have heard of `told`.
    pub fn owes_ack(&self, told: Epoch) -> bool {
        told < self.awaited && self.awaited <= self.acked
    }

    /// What the monitors should hear of groups of which this OSD is primary.
    pub fn pg_statuses(&self) -> Vec<pb::PgStatus> {
        self.pgs.values().filter_map(|pg| pg.status(self.id, &self.map)).collect()
    }

    /// Clients' operations that are under way or wait.
    pub fn client_ops(&self) -> usize {
        self.client_ops
    }

    /// Peers that owe something for too long (rules P7 and P8).
    pub fn stuck_peers(&self) -> Vec<pb::StuckPeer> {
        if !self.rules.keep(Rule::StuckReports) {
            return Vec::new();
        }
        self.pgs.values().flat_map(|pg| pg.stuck(self.id, self.now, self.stuck_ms, &self.map)).collect()
    }

    /// How long sub-operations took in the last whole window.
    pub fn latency_window(&self) -> &pb::LatencyWindow {
        self.latency.window()
    }

    /// When [`Event::Wake`] is wanted; other events do as well.
    pub fn wake_at(&self) -> Option<Millis> {
        self.latency.wake_at().into_iter().chain(self.throttle.wake_at()).min()
    }

    /// Which of its ways this run has gone.
    pub fn branches(&self) -> &Branches {
        &self.branches
    }

    /// Counters since the start of this run.
    pub fn stats(&self) -> pb::OsdStats {
        let mut sum = self.stats.clone();
        for c in self.pgs.values().map(|pg| &pg.counters) {
            sum.reads += c.reads;
            sum.writes += c.writes;
            sum.read_bytes += c.read_bytes;
            sum.write_bytes += c.write_bytes;
            sum.recovered_objects += c.recovered_objects;
            sum.recovered_bytes += c.recovered_bytes;
            sum.scrubbed_objects += c.scrubbed_objects;
            sum.scrubbed_bytes += c.scrubbed_bytes;
            sum.scrub_findings += c.scrub_findings;
            sum.scrub_repaired += c.scrub_repaired;
            sum.hedged_reads += c.hedged_reads;
            sum.hedges_won += c.hedges_won;
        }
        sum
    }

    /// Up in the map as this very run.
    fn is_current(&self) -> bool {
        self.map.up_osd(self.id).is_some_and(|o| o.incarnation == self.incarnation)
    }

    fn every_pg(&mut self, out: &mut Vec<Effect>, mut f: impl FnMut(&mut Pg, &mut Context<'_, What>)) {
        let mut cx = Context {
            now: self.now,
            id: self.id,
            incarnation: self.incarnation,
            map: &self.map,
            lease_until: self.lease_until,
            full: self.full,
            recovery_elsewhere: self.recovery,
            throttle: &mut self.throttle,
            latency: &mut self.latency,
            scrub: &mut self.scrub_budget,
            rules: self.rules,
            branches: &mut self.branches,
            tokens: &mut self.tokens,
            out,
        };
        (self.client_ops, self.client_waiting) = (0, 0);
        for (id, pg) in &mut self.pgs {
            let _span = tracing::debug_span!("pg", pg = %id).entered();
            cx.recovery_elsewhere -= pg.recovery_load();
            f(pg, &mut cx);
            cx.recovery_elsewhere += pg.recovery_load();
            self.client_ops += pg.client_ops();
            self.client_waiting += pg.client_waiting();
        }
        self.recovery = cx.recovery_elsewhere;
    }

    fn with_pg(&mut self, id: PgId, out: &mut Vec<Effect>, f: impl FnOnce(&mut Pg, &mut Context<'_, What>)) {
        let Some(pg) = self.pgs.get_mut(&id) else { return };
        let _span = tracing::debug_span!("pg", pg = %id).entered();
        self.client_ops -= pg.client_ops();
        self.client_waiting -= pg.client_waiting();
        self.recovery -= pg.recovery_load();
        let mut cx = Context {
            now: self.now,
            id: self.id,
            incarnation: self.incarnation,
            map: &self.map,
            lease_until: self.lease_until,
            full: self.full,
            recovery_elsewhere: self.recovery,
            throttle: &mut self.throttle,
            latency: &mut self.latency,
            scrub: &mut self.scrub_budget,
            rules: self.rules,
            branches: &mut self.branches,
            tokens: &mut self.tokens,
            out,
        };
        f(pg, &mut cx);
        self.client_ops += pg.client_ops();
        self.client_waiting += pg.client_waiting();
        self.recovery += pg.recovery_load();
    }

    fn answer(
        &mut self,
        token: Token,
        out: &mut Vec<Effect>,
        f: impl FnOnce(&mut Pg, &mut Context<'_, What>, What),
    ) {
        let Some(purpose) = self.tokens.take(token) else { return };
        if let Some(kind) = purpose.what.measured() {
            self.latency.took(self.id, kind, self.now.saturating_sub(purpose.since));
        }
        self.with_pg(purpose.pg, out, |pg, cx| {
            if pg.round() == purpose.round {
                f(pg, cx, purpose.what);
            }
        });
    }

    fn new_map(&mut self, map: Arc<ClusterMap>, out: &mut Vec<Effect>) {
        if map.epoch <= self.map.epoch || map.epoch < self.boot.epoch {
            return;
        }
        if map.cluster != self.boot.cluster {
            tracing::error!(osd = %self.id, foreign = %map.cluster, own = %self.boot.cluster, "map of another cluster ignored");
            return;
        }
        let old = std::mem::replace(&mut self.map, map.clone());
        let mut before = old.pgs.iter().peekable();
        for (id, record) in &map.pgs {
            while before.next_if(|(o, _)| *o < id).is_some() {}
            // Most records are those of the map before, looked at then.
            let had = before.next_if(|(o, _)| *o == id).map(|(_, had)| had);
            if had.is_some_and(|had| had.same(record)) {
                continue;
            }
            // Rule P6: the next one serves when this one has said that it does not.
            if had.is_some_and(|had| had.primary == Some(self.id)) && record.primary != Some(self.id) {
                self.awaited = map.epoch;
            }
            if record.acting.contains(&self.id) {
                self.pgs.entry(*id).or_insert_with(|| Pg::empty(*id));
            }
        }
        // Rule C3: so does the next holder of a volume.
        if old.attachments != map.attachments {
            self.awaited = map.epoch;
        }
        if self.rules.keep(Rule::DividedFirst) {
            self.divide_groups(out);
        }
        let current = self.is_current();
        self.every_pg(out, |pg, cx| pg.new_map(cx, current));
        if !self.rules.keep(Rule::DividedFirst) {
            self.divide_groups(out);
        }
        self.take_early(out);
    }

    /// Rule P9: what is here of groups is divided, or put together, before anything else is done under a map in which their pool has another
    /// number of them, whatever this OSD is to them. The store carries out one thing after the other, so that nothing waits for it.
    fn divide_groups(&mut self, out: &mut Vec<Effect>) {
        let map = self.map.clone();
        for (id, pool) in &map.pools {
            let groups = PgId { pool: *id, index: 0 }..=PgId { pool: *id, index: u32::MAX };
            let mut divided = self.pgs.range(groups.clone()).filter_map(|(_, pg)| pg.is_one_of()).peekable();
            if divided.peek().is_none() || divided.clone().all(|count| count == pool.pg_count) {
                continue;
            }
            // Some may be of more groups than others: a crash came between. What lies between the maps that were seen makes no difference.
            let finest = divided.fold(pool.pg_count, u32::max);
            let here: Vec<PgId> = self.pgs.range(groups).map(|(pg, _)| *pg).collect();
            for pg in here {
                let mut made = Vec::new();
                self.with_pg(pg, out, |pg, cx| made = pg.divide(cx, finest));
                for part in made {
                    let known = self.pgs.remove(&part.id());
                    self.pgs.insert(part.id(), part.instead_of(known));
                }
            }
            if finest.is_multiple_of(pool.pg_count) && self.knows_of_the_merge(*id, finest, pool.pg_count) {
                self.merge_groups(*id, finest, pool.pg_count, out);
            }
        }
    }

    /// A merge begins an interval of the whole, after all that its parts were in. Otherwise the map is one of before they were divided, from
    /// monitors that have forgotten it: parts stay what they are.
    fn knows_of_the_merge(&self, pool: PoolId, from: u32, to: u32) -> bool {
        let groups = PgId { pool, index: 0 }..=PgId { pool, index: u32::MAX };
        let mut parts = self.pgs.range(groups).filter(|(_, pg)| pg.is_one_of() == Some(from));
        let begun = |id: &PgId| self.map.pgs.get(&PgId { index: id.index % to, ..*id }).map(|r| r.interval);
        from == to || parts.all(|(id, pg)| begun(id).is_some_and(|interval| pg.promised() < interval))
    }

    fn merge_groups(&mut self, pool: PoolId, mut from: u32, pg_count: u32, out: &mut Vec<Effect>) {
        while from > pg_count {
            let to = pg_count.max(from / DIVIDE_MAX);
            let groups = PgId { pool, index: 0 }..=PgId { pool, index: u32::MAX };
            let parts =
                self.pgs.range(groups).filter(|(_, pg)| pg.is_one_of() == Some(from) && !pg.is_shard());
            let parts: Vec<PgId> = parts.map(|(id, _)| *id).collect();
            let mut wholes: BTreeMap<PgId, Option<PgMeta>> = BTreeMap::new();
            for part in parts {
                let meta = self.pgs.get_mut(&part).map(Pg::become_part);
                let newest = wholes.entry(PgId { index: part.index % to, ..part }).or_default();
                *newest = newest.take().into_iter().chain(meta).max_by_key(|m| m.activated);
            }
            for (whole, newest) in wholes {
                self.pgs.entry(whole).or_insert_with(|| Pg::empty(whole));
                self.with_pg(whole, out, |pg, cx| pg.combine(cx, from, to, newest.unwrap_or_default()));
            }
            from = to;
        }
    }

    fn client(&mut self, token: ClientToken, op: ClientOp, data: Bytes, out: &mut Vec<Effect>) {
        let retry =
            |epoch, why| Effect::Reply { token, reply: OpReply::Retry { epoch, why }, data: Bytes::new() };
        if op.epoch > self.map.epoch {
            out.push(Effect::WantMap { epoch: op.epoch });
            out.push(retry(op.epoch, RetryWhy::OsdBehind));
            return;
        }
        if !self.is_current() {
            out.push(retry(self.map.epoch, RetryWhy::NotActive));
            return;
        }
        if self.client_ops >= CLIENT_OPS_MAX {
            out.push(retry(self.map.epoch, RetryWhy::Busy));
            return;
        }
        if !self.pgs.contains_key(&op.pg) {
            out.push(retry(self.map.epoch, RetryWhy::StaleMap));
            return;
        }
        self.with_pg(op.pg, out, |pg, cx| pg.client(cx, token, op, data));
    }

    /// The map comes in a moment, and the group would wait for the next time that it is asked. What is kept is looked at like any
    /// message then.
    fn keep_for_later(&mut self, msg: PeerMsg) {
        let known = self.early.get(&msg.pg).map(|m| m.interval);
        if known.map_or(self.early.len() < EARLY_MAX, |k| k <= msg.interval) {
            self.early.insert(msg.pg, msg);
        }
    }

    /// Those questions that this map has the interval of, or a later one.
    fn take_early(&mut self, out: &mut Vec<Effect>) {
        let epoch = self.map.epoch;
        for (_, msg) in self.early.extract_if(.., |_, m| m.epoch <= epoch).collect::<Vec<_>>() {
            self.branches.take(Branch::EarlyQuestion);
            self.peer(msg, Bytes::new(), out);
        }
    }

    fn peer(&mut self, msg: PeerMsg, data: Bytes, out: &mut Vec<Effect>) {
        if msg.epoch > self.map.epoch {
            out.push(Effect::WantMap { epoch: msg.epoch });
            let unheard_of = self.map.pgs.get(&msg.pg).is_none_or(|r| r.interval < msg.interval);
            if matches!(msg.body, PeerBody::Query) && unheard_of {
                return self.keep_for_later(msg);
            }
        }
        // Both processes must be the ones that the map calls up (rule P1); the sender repeats.
        let sender = self.map.up_osd(msg.from).is_some_and(|o| o.incarnation == msg.from_incarnation);
        let current = msg.to_incarnation == self.incarnation && sender && self.is_current();
        if msg.to != self.id || (!current && self.rules.keep(Rule::Intervals)) {
            return;
        }
        let Some(record) = self.map.pgs.get(&msg.pg) else { return };
        if msg.interval != record.interval && self.rules.keep(Rule::Intervals) {
            // A refusal is never answered, or two of them would go on for ever.
            let refusal = matches!(msg.body, PeerBody::Refused { .. });
            if msg.interval < record.interval && !refusal {
                let refused = PeerBody::Refused { promised: record.interval };
                let (from, pg, interval) = (msg.from, msg.pg, msg.interval);
                self.pgs.entry(pg).or_insert_with(|| Pg::empty(pg));
                self.with_pg(pg, out, |_, cx| cx.send(from, pg, interval, refused, Bytes::new()));
            }
            return;
        }
        let id = msg.pg;
        // A member of an earlier interval is asked even if it holds nothing.
        self.pgs.entry(id).or_insert_with(|| Pg::empty(id));
        self.with_pg(id, out, |pg, cx| {
            pg.new_map(cx, true);
            pg.peer(cx, msg, data);
        });
    }
}
