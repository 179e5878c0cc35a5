//! The monitors themselves as operators see them.

use super::Monitor;
use crate::raft::Member;
use gabion_proto::pb;

/// The monitors, and whether they can agree on anything.
pub(super) struct Quorum {
    pub members: Vec<Member>,
    /// There is a quorum, and this answer comes from its leader.
    pub held: bool,
    /// Why there is none, in words.
    pub words: String,
}

pub(super) fn member(m: Member) -> pb::MonitorStatus {
    pb::MonitorStatus { id: m.id, addr: m.addr, leader: m.leader, up: m.up, voter: m.voter, error: m.error }
}

impl Monitor {
    pub(super) fn quorum(&self, held: bool) -> Quorum {
        let consensus = &self.0.consensus;
        let words = if held { String::new() } else { consensus.quorum_words() };
        Quorum { members: consensus.members(), held, words }
    }
}
