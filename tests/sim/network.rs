//! The simulated network: delay, loss, duplication, one-way and full cuts. Messages between OSDs may overtake each other;
//! what a client sends on one connection keeps its order, and a connection that has lost something loses the rest, too.

use crate::client::{ClientEvent, SILENCE_MS};
use crate::plan::Scenario;
use crate::rng::Rng;
use crate::world::{ANY_RUN, Ev, World};
use bytes::Bytes;
use gabion_osd::core::{ClientToken, Event};
use gabion_proto::ids::*;
use gabion_proto::msg::{ClientOp, Message, OpKind, OpReply, PeerMsg};
use std::collections::{BTreeMap, BTreeSet};

/// The longest that an overdue operation is on its way.
const OVERDUE_MS: u64 = 30_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Node(usize),
    Client(usize),
    Monitor,
}

/// Something that takes longer than it should, for a while.
#[derive(Clone, Copy, Default)]
pub struct Slow {
    pub until: u64,
    /// At most.
    pub by_ms: u64,
}

impl Slow {
    pub fn by(&self, now: u64, rng: &mut Rng) -> u64 {
        if now < self.until { rng.range(self.by_ms / 4, self.by_ms + 1) } else { 0 }
    }
}

/// Whose operation it is, where its answer goes, and the holder that sent it if it writes.
pub struct Origin {
    client: usize,
    connection: u64,
    request: u64,
    writes: Option<(VolumeId, (Generation, Session))>,
    object: (PgId, ObjectId),
    since: u64,
}

#[derive(Default)]
pub struct Network {
    /// Directed pairs whose messages are lost.
    pub cut: BTreeSet<(Place, Place)>,
    /// Connections that have lost something.
    broken: BTreeSet<u64>,
    /// Clients whose messages take long.
    pub slow_clients: BTreeMap<usize, Slow>,
    /// When the last operation on each connection arrives.
    arrivals: BTreeMap<u64, u64>,
}

impl World {
    pub fn delay(&mut self) -> u64 {
        match self.rng.below(100) {
            _ if self.plan.scenario == Scenario::Rebuild => self.rng.range(1, 3),
            0..=1 if self.faults_on => {
                self.count_message("late");
                self.rng.range(50, 1_500)
            }
            2..=9 => self.rng.range(5, 40),
            _ => self.rng.range(1, 4),
        }
    }

    /// Between two places, either of which may be slow.
    fn delay_between(&mut self, from: Place, to: Place) -> u64 {
        let mut delay = self.delay();
        for place in [from, to] {
            let slow = match place {
                Place::Node(n) => self.nodes[n].slow_net,
                Place::Client(c) => self.network.slow_clients.get(&c).copied().unwrap_or_default(),
                Place::Monitor => Slow::default(),
            };
            delay += slow.by(self.now, &mut self.rng);
        }
        delay
    }

    fn count_message(&mut self, what: &'static str) {
        *self.tally.messages.entry(what).or_default() += 1;
    }

    pub fn lost_between(&mut self, from: Place, to: Place) -> bool {
        let cut = self.network.cut.contains(&(from, to));
        let lost = cut || (self.faults_on && self.damage.is_none() && self.rng.chance(self.plan.loss));
        if lost {
            self.count_message(if cut { "cut off" } else { "lost" });
        }
        lost
    }

    pub fn send_peer(&mut self, node: usize, msg: PeerMsg, data: Bytes) {
        let Some(to) = self.nodes.iter().position(|n| n.id == msg.to) else { return };
        let copies = if self.faults_on && self.rng.chance(self.plan.duplicate) { 2 } else { 1 };
        if copies == 2 {
            self.count_message("twice");
        }
        let (from, at) = (Place::Node(node), Place::Node(to));
        let Some(Message::Peer(msg)) = self.framed(0, Message::Peer(msg), &data) else { return };
        for _ in 0..copies {
            if self.lost_between(from, at) {
                continue;
            }
            let delay = self.delay_between(from, at);
            let event = Event::Peer { msg: msg.clone(), data: data.clone() };
            // Whatever process runs there when it arrives gets it.
            self.at(delay, Ev::Core { node: to, run: ANY_RUN, event });
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
        if self.lost_between(Place::Client(client), Place::Node(node)) {
            self.network.broken.insert(connection);
        }
        if self.network.broken.contains(&connection) {
            return;
        }
        let last = self.network.arrivals.get(&connection).copied().unwrap_or(0);
        let mut delay = self.delay_between(Place::Client(client), Place::Node(node));
        if self.plan.overdue > 0 && self.faults_on && self.rng.chance(self.plan.overdue) {
            self.count_message("overdue");
            delay += self.rng.range(SILENCE_MS, OVERDUE_MS);
        }
        let arrives = (self.now + delay).max(last);
        self.network.arrivals.insert(connection, arrives);
        let Some(Message::Op(op)) = self.framed(request, Message::Op(op), &data) else { return };
        let delay = arrives - self.now;
        self.at(delay, Ev::Op { node, client, connection, request, op, data });
    }

    pub fn receive_op(
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
                .filter(|(_, o)| o.client == client && o.connection < connection)
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
        let writes = !matches!(op.kind, OpKind::Read { .. });
        let writes = writes.then_some((op.volume, (op.generation, op.session)));
        let object = (op.pg, op.object);
        n.origins.insert(token, Origin { client, connection, request, writes, object, since: self.now });
        self.step(node, Event::Client { token, op, data });
    }

    pub fn send_reply(&mut self, node: usize, token: ClientToken, reply: OpReply, data: Bytes) {
        let Some(origin) = self.nodes[node].origins.remove(&token) else { return };
        let Origin { client, connection, request, writes, object, since } = origin;
        // Rule C3: when a fence was in force, nothing of an older holder was under way.
        if let (OpReply::Done { .. }, Some((volume, holder))) = (&reply, writes)
            && self.in_force.get(&volume).is_some_and(|h| *h > holder)
        {
            self.finding = Some(format!(
                "osd.{node} carried out a write of {holder:?} when the fence of a later holder of {volume} was in force"
            ));
        }
        if let OpReply::Done { version } = reply
            && let Err(finding) = self.on_enough_disks(object, version, since)
        {
            self.finding = Some(format!("osd.{node} answered a write: {finding}"));
        }
        if self.lost_between(Place::Node(node), Place::Client(client)) {
            self.network.broken.insert(connection);
        }
        if self.network.broken.contains(&connection) {
            return;
        }
        let delay = self.delay_between(Place::Node(node), Place::Client(client));
        let Some(Message::OpReply(reply)) = self.framed(request, Message::OpReply(reply), &data) else {
            return;
        };
        let event = ClientEvent::Reply { connection, request, reply, data };
        self.at(delay, Ev::Client { client, event });
    }
}
