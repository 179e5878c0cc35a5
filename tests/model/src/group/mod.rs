//! A placement group of up to three OSDs, its monitors and its clients, and everything that may happen to them.
//!
//! What is taken as one step, and why nothing is lost by it:
//!
//! - *Monitors* agree on one thing after the other, so a command is one step. How the leases keep an OSD from being called
//!   down too early is a model of its own ([`crate::lease`]); here an OSD has its lease while the monitors call it up.
//! - *Maps* are learned one by one, each OSD in its own time.
//! - *A member* does what a message asks and makes it durable in one step, and the answer is there at once. An answer that is late
//!   or lost is an asker that does not go on; a message that is late is one that is not asked for yet. What may come after its
//!   asker has gone is kept as a message: sub-writes and clients' operations. They come in any order, again, or never.
//! - *A primary* sends first and has its own part durable later, as its store works.
//! - *A crash* is a boot: a process that has stopped for good is one that does nothing any more. What it had not made durable
//!   is lost.
//! - *Reads* are made by somebody without an attachment, at any moment, at everybody who would answer them.
//!
//! Who is primary among those who could be is any of them, so that OSDs are alike and states that differ only in their names count once.

mod clients;
mod history;
mod monitors;
mod names;
mod osd;
pub mod state;
mod writes;

use crate::explore::{Model, Step};
use crate::register::Pending;
use crate::rules::Rule;
use state::*;
use std::fmt;

/// Something interesting that a run must reach, or the search has shown little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// A version that some of the authority lacks is rolled forward.
    RolledForward,
    /// An uncertain version of which all copies are lost is given up.
    WentBack,
    /// So was one that nobody of the authority had doubted.
    Denied,
    /// Nobody has an acknowledged version any more, but somebody a later one.
    WentOn,
    /// A primary peers after an activation that did not reach the monitors.
    HalfActivated,
    /// Members of an interval before the last one are needed to go on.
    OldIntervalNeeded,
    /// An operation of a holder that is none any more is refused.
    FencedRefused,
    /// An operation of an earlier interval is refused.
    OldOperationRefused,
    /// Something of an older connection is dropped.
    ConnectionSuperseded,
    /// A sub-write comes too late.
    SubWriteRefused,
    /// A write is answered by fewer members than the pool has copies.
    DegradedWrite,
    /// A write is answered.
    Answered,
    /// A write that nobody waits for any more is complete.
    LateTwin,
    /// A member gets the object from another one.
    Recovered,
    /// A write is answered though a member lacks the object.
    NotedWrite,
    /// An activation waits for an earlier primary.
    EarlierPrimaryAwaited,
    /// An attachment waits for older writes to end.
    FenceAwaited,
    /// A copy that is not needed any more is deleted.
    StrayDropped,
    /// A write waits for a read.
    WriteWaited,
}

impl Event {
    pub const ALL: [Event; 19] = [
        Event::RolledForward,
        Event::WentBack,
        Event::Denied,
        Event::WentOn,
        Event::HalfActivated,
        Event::OldIntervalNeeded,
        Event::FencedRefused,
        Event::OldOperationRefused,
        Event::ConnectionSuperseded,
        Event::SubWriteRefused,
        Event::DegradedWrite,
        Event::Answered,
        Event::LateTwin,
        Event::Recovered,
        Event::NotedWrite,
        Event::EarlierPrimaryAwaited,
        Event::FenceAwaited,
        Event::StrayDropped,
        Event::WriteWaited,
    ];

    pub fn bit(self) -> u64 {
        1 << self as u8
    }
}

/// Who becomes the next holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The same client after a restart: a newer session.
    Restart,
    /// Another client takes the volume over: a newer generation.
    TakeOver,
}

/// What may happen, and how often.
#[derive(Clone, Debug)]
pub struct Group {
    /// OSDs that the group is placed on at first.
    pub placed: Set,
    pub osds: u8,
    pub min_size: u32,
    /// Changes of who is up, left out or placed.
    pub changes: u8,
    /// OSDs may be left out of the group while they are up.
    pub suspects: bool,
    /// The group may move to another OSD.
    pub moves: bool,
    /// Of each write: who makes it and to which block. One holder's writes of a block follow each other.
    pub script: &'static [(u8, u8)],
    /// Times that one write may be sent.
    pub sends: u8,
    pub next_holders: &'static [Next],
    /// A client may go on without an answer (an I/O timeout).
    pub gives_up: bool,
    /// A read takes its time between what it checks and what it finds.
    pub slow_reads: bool,
    pub without: Option<Rule>,
}

impl Group {
    /// Three copies, two of which must be there; nothing happens yet.
    pub const THREE: Group = Group {
        placed: 0b111,
        osds: 3,
        min_size: 2,
        changes: 0,
        suspects: true,
        moves: false,
        script: &[],
        sends: 1,
        next_holders: &[],
        gives_up: false,
        slow_reads: false,
        without: None,
    };

    /// Two copies, one of which must be there.
    pub const TWO: Group = Group { placed: 0b11, osds: 2, min_size: 1, ..Group::THREE };

    pub fn keeps(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    fn holder(&self, op: u8) -> u8 {
        self.script[op as usize - 1].0
    }

    fn block(&self, op: u8) -> u8 {
        self.script[op as usize - 1].1
    }

    fn ops(&self) -> impl Iterator<Item = u8> {
        1..=self.script.len() as u8
    }

    /// Writes that may take effect yet: those that were issued, until their holder's attachment is over.
    fn pending(&self, s: &State, block: u8) -> Pending {
        let mut pending = Pending::default();
        for op in self.ops() {
            let open = self.holder(op) >= s.monitors.attached && s.clients.sent[op as usize - 1] > 0;
            if open && self.block(op) == block {
                pending.writes |= 1 << (op - 1);
            }
            pending.later[op as usize - 1] = self.followers(op).fold(0, |set, f| set | 1 << (f - 1));
        }
        pending
    }

    /// Later writes of the same holder to the same block.
    fn followers(&self, op: u8) -> impl Iterator<Item = u8> {
        let same = move |o: &u8| *o > op && self.script[*o as usize - 1] == self.script[op as usize - 1];
        self.ops().filter(same)
    }

    /// The client who is a holder: a number that outlives its restarts.
    fn client(&self, holder: u8) -> u8 {
        let later = self.next_holders.iter().take(holder as usize);
        later.filter(|n| **n == Next::TakeOver).count() as u8
    }
}

/// A step, in words.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    MarkDown(u8),
    Boot(u8),
    Suspect(u8),
    ClearSuspect(u8),
    Move { from: u8, to: u8 },
    Attach(u8),
    Attached(u8),
    RecordActivated(u8),
    RecordClean(u8),
    Learn(u8),
    Ask { primary: u8, member: u8 },
    Choose(u8),
    Activate { primary: u8, member: u8 },
    GoActive(u8),
    Pull { primary: u8, from: u8 },
    Push { primary: u8, to: u8 },
    DropStray(u8),
    Send { op: u8, to: u8, interval: u8 },
    Start { op: u8, at: u8 },
    OwnDurable { op: u8, at: u8 },
    SubWrite { version: Version, at: u8 },
    Finish { op: u8, at: u8 },
    Read { at: u8, block: u8 },
    BeginRead { at: u8, block: u8 },
    EndRead { at: u8, block: u8 },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Action::*;
        match *self {
            MarkDown(o) => write!(f, "osd.{o} has no lease any more and is called down"),
            Boot(o) => write!(f, "osd.{o} boots; what it had not made durable is lost"),
            Suspect(o) => write!(f, "osd.{o} is left out, though it is up"),
            ClearSuspect(o) => write!(f, "osd.{o} is tried again"),
            Move { from, to } => write!(f, "the group moves from osd.{from} to osd.{to}"),
            Attach(h) => write!(f, "the monitors agree on holder {h}"),
            Attached(h) => write!(f, "holder {h} is told that it holds the volume"),
            RecordActivated(o) => write!(f, "the monitors record the activation by osd.{o}"),
            RecordClean(o) => write!(f, "the monitors record that the group of osd.{o} is clean"),
            Learn(o) => write!(f, "osd.{o} learns its next map"),
            Ask { primary, member } => write!(f, "osd.{member} tells osd.{primary} what it has"),
            Choose(o) => write!(f, "osd.{o} chooses the history"),
            Activate { primary, member } if primary == member => {
                write!(f, "osd.{primary} has its own activation durable")
            }
            Activate { primary, member } => write!(f, "osd.{member} activates at the word of osd.{primary}"),
            GoActive(o) => write!(f, "osd.{o} hears that its activation is recorded, and serves"),
            Pull { primary, from } => write!(f, "osd.{primary} takes the object from osd.{from}"),
            Push { primary, to } => write!(f, "osd.{primary} brings the object to osd.{to}"),
            DropStray(o) => write!(f, "osd.{o} deletes its copy"),
            Send { op, to, interval } => {
                write!(f, "write {op} is sent to osd.{to}, primary of interval {interval}")
            }
            Start { op, at } => write!(f, "osd.{at} starts write {op}"),
            OwnDurable { op, at } => write!(f, "osd.{at} has write {op} durable"),
            SubWrite { version, at } => write!(f, "sub-write {version:?} comes to osd.{at}"),
            Finish { op, at } => write!(f, "osd.{at} answers write {op}"),
            Read { at, block } => write!(f, "block {block} is read at osd.{at}"),
            BeginRead { at, block } => write!(f, "a read of block {block} begins at osd.{at}"),
            EndRead { at, block } => write!(f, "the read of block {block} at osd.{at} ends"),
        }
    }
}

/// Where steps are collected.
pub(crate) struct Steps<'a> {
    group: &'a Group,
    from: &'a State,
    out: &'a mut Vec<Step<State, Action>>,
}

impl Steps<'_> {
    fn push(&mut self, action: Action, state: State) {
        self.with(action, state, 0, None);
    }

    fn event(&mut self, action: Action, state: State, event: Event) {
        self.with(action, state, event.bit(), None);
    }

    fn with(&mut self, action: Action, mut state: State, events: u64, broken: Option<&'static str>) {
        let tidied = self.group.tidy(&mut state);
        self.out.push(Step { action, state, events: events | tidied, broken });
    }

    /// Something that is worth knowing though nothing comes of it.
    fn note(&mut self, event: Event) {
        if let Some(step) = self.out.last_mut() {
            step.events |= event.bit();
        }
    }
}

impl Model for Group {
    type State = State;
    type Action = Action;

    /// The first interval is active and clean, and the object is at its first version everywhere.
    fn initial(&self) -> State {
        let object = Object { version: Version::FIRST, blocks: [0; BLOCKS] };
        let mut monitors = Monitors::default();
        let up = (1 << self.osds) - 1;
        monitors.maps[0] = Map { interval: 1, holder: 0, up, placed: self.placed };
        monitors.intervals[1] =
            Interval { acting: self.placed, primary: 0, past: 0, since: 0, activated: true, clean: true };
        let mut osds = [Osd::default(); OSDS];
        for o in members(self.placed) {
            let phase = match o {
                0 => {
                    let plan = Plan { needed: Needed { version: Version::FIRST, uncertain: None }, lacks: 0 };
                    Phase::Active { plan, writing: [None; BLOCKS], reading: 0 }
                }
                _ => Phase::Member { active: true },
            };
            osds[o as usize] = Osd { activated: 1, held: object, missing: None, map: 0, phase };
        }
        for o in members(up & !self.placed) {
            osds[o as usize].phase = Phase::Member { active: false };
        }
        State {
            monitors,
            osds,
            sub_writes: [None; OPS + 1],
            requests: [None; MESSAGES],
            clients: Clients { known: [1; HOLDERS], ..Clients::default() },
            registers: Default::default(),
        }
    }

    fn next(&self, from: &State, out: &mut Vec<Step<State, Action>>) {
        let mut steps = Steps { group: self, from, out };
        self.monitor_steps(&mut steps);
        self.osd_steps(&mut steps);
        self.write_steps(&mut steps);
        self.client_steps(&mut steps);
    }

    fn check(&self, s: &State) -> Result<(), &'static str> {
        let serves =
            |o: &u8| matches!(s.osds[*o as usize].phase, Phase::Active { .. }) && self.has_lease(s, *o);
        if (0..self.osds).filter(serves).count() > 1 {
            return Err("two primaries serve at once");
        }
        for (i, a) in s.osds.iter().enumerate() {
            let differs = |b: &Osd| a.held.version == b.held.version && a.held.blocks != b.held.blocks;
            if s.osds[..i].iter().any(differs) {
                return Err("one version has two contents");
            }
        }
        for (block, register) in s.registers.iter().enumerate() {
            let there = |o: &Osd| o.held.version != Version::NONE && register.allows(o.held.blocks[block]);
            if !s.osds.iter().any(there) {
                return Err("what was promised is on no disk");
            }
        }
        Ok(())
    }

    fn fingerprint(&self, state: &State) -> u64 {
        names::fingerprint(state, self.osds)
    }

    fn describe(&self, state: &State) -> String {
        names::describe(state, self.osds)
    }
}

impl Group {
    /// Rule P6, see [`crate::lease`].
    fn has_lease(&self, s: &State, osd: u8) -> bool {
        has(s.monitors.map().up, osd) || !self.keeps(Rule::Lease)
    }

    /// Takes out what can do nothing any more, so that states which behave alike are alike; answers what was refused by that.
    fn tidy(&self, s: &mut State) -> u64 {
        let mut events = self.tidy_requests(s);
        events |= self.tidy_sub_writes(s);
        monitors::tidy(s, self.osds);
        events
    }
}
