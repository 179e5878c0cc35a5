//! What a placement group needs from its surroundings during one step.

use super::latency::Latencies;
use super::scrub_budget::ScrubBudget;
use super::throttle::Throttle;
use super::{Branch, Branches, Effect, Millis, Rule, Rules, Token};
use bytes::Bytes;
use gabion_proto::ids::*;
use gabion_proto::map::ClusterMap;
use gabion_proto::msg::{PeerBody, PeerMsg};
use std::collections::BTreeMap;

/// What an outstanding token is for; `round` tells tokens of an earlier interval apart.
#[derive(Clone, Debug)]
pub struct Purpose<T> {
    pub pg: PgId,
    pub round: u64,
    /// When it was issued.
    pub since: Millis,
    pub what: T,
}

/// Outstanding tokens.
#[derive(Debug)]
pub struct Tokens<T> {
    next: u64,
    open: BTreeMap<Token, Purpose<T>>,
}

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Tokens { next: 0, open: BTreeMap::new() }
    }
}

impl<T> Tokens<T> {
    pub fn issue(&mut self, purpose: Purpose<T>) -> Token {
        self.next += 1;
        self.open.insert(Token(self.next), purpose);
        Token(self.next)
    }
    pub fn take(&mut self, token: Token) -> Option<Purpose<T>> {
        self.open.remove(&token)
    }
}

/// What recovery may be moving, in bytes, and scrubs reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// All of it: what may have to be kept here.
    pub reserved: u64,
    /// What of that waits for others who are late: in no queue of this OSD. Of so many transfers.
    pub late: u64,
    pub late_count: usize,
    /// Objects under way that do not wait for others who are late.
    pub objects: usize,
}

impl Load {
    pub fn of(bytes: u64) -> Load {
        Load { reserved: bytes, ..Load::default() }
    }

    /// What a client's operation may have before it.
    pub fn moving(&self) -> u64 {
        self.reserved - self.late
    }
}

impl std::ops::AddAssign for Load {
    fn add_assign(&mut self, other: Load) {
        self.reserved += other.reserved;
        self.late += other.late;
        self.late_count += other.late_count;
        self.objects += other.objects;
    }
}

impl std::ops::SubAssign for Load {
    fn sub_assign(&mut self, other: Load) {
        self.reserved -= other.reserved;
        self.late -= other.late;
        self.late_count -= other.late_count;
        self.objects -= other.objects;
    }
}

/// One step's surroundings.
pub struct Context<'a, T> {
    pub now: Millis,
    pub id: OsdId,
    pub incarnation: Incarnation,
    pub map: &'a ClusterMap,
    /// Reads are served and writes answered only before this.
    pub lease_until: Millis,
    /// The own store refuses clients' writes.
    pub full: bool,
    /// What recovery of all other groups may be moving.
    pub recovery_elsewhere: Load,
    /// How fast recovery may go.
    pub throttle: &'a mut Throttle,
    /// How long sub-operations take here and at peers.
    pub latency: &'a mut Latencies,
    /// What scrubs may still read here.
    pub scrub: &'a mut ScrubBudget,
    pub rules: Rules,
    pub branches: &'a mut Branches,
    pub tokens: &'a mut Tokens<T>,
    pub out: &'a mut Vec<Effect>,
}

impl<T> Context<'_, T> {
    pub fn has_lease(&self) -> bool {
        self.now < self.lease_until || !self.rules.keep(Rule::Lease)
    }

    /// Counted by the simulator only.
    pub fn takes(&mut self, branch: Branch) {
        self.branches.take(branch);
    }

    /// Sends to another OSD, if it is up.
    pub fn send(&mut self, to: OsdId, pg: PgId, interval: Epoch, body: PeerBody, data: Bytes) {
        let Some(peer) = self.map.up_osd(to) else { return };
        let msg = PeerMsg {
            from: self.id,
            from_incarnation: self.incarnation,
            to,
            to_incarnation: peer.incarnation,
            epoch: self.map.epoch,
            pg,
            interval,
            body,
        };
        self.out.push(Effect::Send { msg, data });
    }
}
