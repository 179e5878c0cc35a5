//! One placement group with everything around it, as plain data.

use crate::register::{Register, WRITES};

pub const OSDS: usize = 3;
pub const BLOCKS: usize = 2;
/// Maps that one run can have, the first one included.
pub const MAPS: usize = 10;
/// Intervals that one run can have; they are numbered from 1.
pub const INTERVALS: usize = 8;
/// Client operations on their way.
pub const MESSAGES: usize = 4;
/// Holders of the volume, one after the other.
pub const HOLDERS: usize = 3;
pub const OPS: usize = WRITES as usize;
pub const NOBODY: u8 = 7;

/// Some of the OSDs, intervals or writes, as bits.
pub type Set = u8;

pub fn has(set: Set, i: u8) -> bool {
    set >> i & 1 == 1
}

pub fn members(set: Set) -> impl Iterator<Item = u8> {
    (0..8).filter(move |i| has(set, *i))
}

/// Version of the object: the interval that wrote it, and a counter. Zero is no object at all.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version(pub u8);

impl Version {
    pub const NONE: Version = Version(0);
    pub const FIRST: Version = Version(0x11);

    pub fn interval(self) -> u8 {
        self.0 >> 4
    }

    /// The next one in `interval`.
    pub fn successor(self, interval: u8) -> Version {
        match self.interval() == interval {
            true => Version(self.0 + 1),
            false => Version(interval << 4 | 1),
        }
    }
}

/// What an object should be at a member; `uncertain` is the lowest version that somebody of the authority had instead.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Needed {
    pub version: Version,
    pub uncertain: Option<Version>,
}

/// The object in one store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Object {
    pub version: Version,
    /// Which write each block is from.
    pub blocks: [u8; BLOCKS],
}

/// What a member says when it is asked: a snapshot of its store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Told {
    pub activated: u8,
    pub held: Version,
    pub missing: Option<Needed>,
}

/// What the chosen history says of the object, and who lacks it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Plan {
    pub needed: Needed,
    pub lacks: Set,
}

/// A write in flight at its primary.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Writing {
    pub op: u8,
    pub version: Version,
    /// The connection on which it came.
    pub connection: u8,
    /// The own store has it.
    pub own: bool,
    pub acked: Set,
}

/// How far an OSD has come in its interval. All of it is lost in a crash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Phase {
    /// Not up in its own map, or primary of too few members.
    #[default]
    Idle,
    Member {
        active: bool,
    },
    Peering {
        told: [Option<Told>; OSDS],
    },
    Activating {
        plan: Plan,
        done: Set,
    },
    Active {
        plan: Plan,
        /// One for each block.
        writing: [Option<Writing>; BLOCKS],
        /// Blocks that are being read.
        reading: Set,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Osd {
    // Durable.
    pub activated: u8,
    pub held: Object,
    pub missing: Option<Needed>,
    // Of this run.
    pub map: u8,
    pub phase: Phase,
}

impl Osd {
    pub fn tells(&self) -> Told {
        Told { activated: self.activated, held: self.held.version, missing: self.missing }
    }
}

/// A cluster map, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Map {
    pub interval: u8,
    /// Who holds the volume.
    pub holder: u8,
    pub up: Set,
    /// Where the group should be.
    pub placed: Set,
}

/// What the monitors record of an interval.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Interval {
    pub acting: Set,
    pub primary: u8,
    /// Earlier intervals that may have taken writes that are needed.
    pub past: Set,
    /// The first map with this interval.
    pub since: u8,
    pub activated: bool,
    pub clean: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Monitors {
    pub maps: [Map; MAPS],
    pub newest: u8,
    pub intervals: [Interval; INTERVALS],
    /// Left out of the group though they are up (rules P7 and P8).
    pub suspects: Set,
    /// The newest holder whose attachment was answered.
    pub attached: u8,
    /// Changes of who is up, left out or placed, so far.
    pub changes: u8,
}

impl Monitors {
    pub fn map(&self) -> &Map {
        &self.maps[self.newest as usize]
    }

    pub fn interval(&self) -> &Interval {
        &self.intervals[self.map().interval as usize]
    }
}

/// A sub-write that was sent to the other members of its interval. It may arrive at any time, and more than once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubWrite {
    pub interval: u8,
    pub version: Version,
    pub before: Version,
    pub op: u8,
}

/// A client's write on its way to an OSD.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Request {
    pub op: u8,
    pub to: u8,
    pub interval: u8,
    pub connection: u8,
}

/// What clients know.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Clients {
    /// The newest interval that each holder knows of.
    pub known: [u8; HOLDERS],
    /// Times that each write was sent, and the connection on which its answer is awaited.
    pub sent: [u8; OPS],
    pub waits_on: [u8; OPS],
    /// Connections that each holder has given up.
    pub connection: [u8; HOLDERS],
    /// Writes whose answer the client got.
    pub answered: Set,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    pub monitors: Monitors,
    pub osds: [Osd; OSDS],
    /// Sub-writes that may still do something.
    pub sub_writes: [Option<SubWrite>; OPS + 1],
    pub requests: [Option<Request>; MESSAGES],
    pub clients: Clients,
    /// What clients may have seen (no part of the system).
    pub registers: [Register; BLOCKS],
}

impl State {
    pub fn map_of(&self, osd: u8) -> &Map {
        &self.monitors.maps[self.osds[osd as usize].map as usize]
    }

    pub fn interval_of(&self, osd: u8) -> u8 {
        self.map_of(osd).interval
    }

    pub fn record_of(&self, osd: u8) -> &Interval {
        &self.monitors.intervals[self.interval_of(osd) as usize]
    }

    /// Whether the OSD's own map calls it up.
    pub fn is_current(&self, osd: u8) -> bool {
        has(self.map_of(osd).up, osd)
    }

    /// A message between the two is taken: both are in the same interval and call each other up (rule P1).
    pub fn linked(&self, a: u8, b: u8) -> bool {
        let both = |up| has(up, a) && has(up, b);
        self.interval_of(a) == self.interval_of(b) && both(self.map_of(a).up) && both(self.map_of(b).up)
    }

    /// Members of an interval and of those before it that it must know of.
    pub fn known(&self, interval: u8) -> Set {
        let record = &self.monitors.intervals[interval as usize];
        let past = members(record.past).map(|p| self.monitors.intervals[p as usize].acting);
        past.fold(record.acting, |all, acting| all | acting)
    }

    pub fn osd(&mut self, osd: u8) -> &mut Osd {
        &mut self.osds[osd as usize]
    }
}
