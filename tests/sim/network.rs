//! The simulated network: delay, loss, duplication, one-way and full cuts. Messages between OSDs may overtake each other;
//! what a client sends on one connection keeps its order, and a connection that has lost something loses the rest, too.

use crate::client::ClientEvent;
use crate::world::{ANY_RUN, Ev, World};
use bytes::Bytes;
use gabion_osd::core::{ClientToken, Event};
use gabion_proto::ids::*;
use gabion_proto::msg::{ClientOp, OpReply, PeerMsg};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Node(usize),
    Client(usize),
    Monitor,
}

#[derive(Default)]
pub struct Network {
    /// Directed pairs whose messages are lost.
    pub cut: BTreeSet<(Place, Place)>,
    /// Connections that have lost something.
    broken: BTreeSet<u64>,
    /// When the last operation on each connection arrives.
    arrivals: BTreeMap<u64, u64>,
}

impl World {
    pub fn delay(&mut self) -> u64 {
        match self.rng.below(100) {
            0..=1 if self.faults_on => self.rng.range(50, 1_500),
            2..=9 => self.rng.range(5, 40),
            _ => self.rng.range(1, 4),
        }
    }

    pub fn lost_between(&mut self, from: Place, to: Place) -> bool {
        self.network.cut.contains(&(from, to)) || (self.faults_on && self.rng.chance(self.plan.loss))
    }

    pub fn send_peer(&mut self, node: usize, msg: PeerMsg, data: Bytes) {
        let Some(to) = self.nodes.iter().position(|n| n.id == msg.to) else { return };
        let copies = if self.faults_on && self.rng.chance(self.plan.duplicate) { 2 } else { 1 };
        for _ in 0..copies {
            if self.lost_between(Place::Node(node), Place::Node(to)) {
                continue;
            }
            let delay = self.delay();
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
        let arrives = (self.now + self.delay()).max(last);
        self.network.arrivals.insert(connection, arrives);
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

    pub fn send_reply(&mut self, node: usize, token: ClientToken, reply: OpReply, data: Bytes) {
        let Some((client, connection, request)) = self.nodes[node].origins.remove(&token) else { return };
        if self.lost_between(Place::Node(node), Place::Client(client)) {
            self.network.broken.insert(connection);
        }
        if self.network.broken.contains(&connection) {
            return;
        }
        let delay = self.delay();
        let event = ClientEvent::Reply { connection, request, reply, data };
        self.at(delay, Ev::Client { client, event });
    }
}
