//! A write in flight at the primary: whom it is for, who has it, who still owes an answer.

use super::ops::ClientWork;
use super::*;
use crate::erasure::Block;

/// New content of blocks; `None` is zeros.
pub type NewBlocks = BTreeMap<u32, Option<Block>>;

/// A client's operation in a write.
#[derive(Debug)]
pub struct Requested {
    /// `None`: nobody waits for the answer any more.
    pub token: Option<ClientToken>,
    pub holder: (VolumeId, ClientId, Session, Generation),
    pub first_block: u32,
    pub block_count: u32,
    pub bytes: u64,
}

impl Requested {
    pub fn of(work: &ClientWork, (first_block, block_count): (u32, u32)) -> Requested {
        let op = work.op();
        Requested {
            token: Some(work.token),
            holder: (op.volume, op.client, op.session, op.generation),
            first_block,
            block_count,
            bytes: work.data().len() as u64,
        }
    }
}

/// What members are sent.
#[derive(Debug)]
enum Parts {
    Same(SubWriteKind, Bytes),
    Each(BTreeMap<OsdId, (SubWriteKind, Bytes)>),
    /// Erasure coding: nothing yet. More operations may join.
    Open(NewBlocks),
    /// Erasure coding: nothing yet, parity depends on old rows that are being read.
    Gathering(NewBlocks),
}

/// A write that some member has not made durable yet.
#[derive(Debug)]
pub struct Write {
    /// One operation; in an erasure-coded group also those of the object that had to wait for the one before.
    pub requested: Vec<Requested>,
    pub object: ObjectId,
    pub version: Version,
    pub prev: Version,
    parts: Parts,
    /// Erasure coding: rows whose parity is added to.
    pub added: BTreeSet<u32>,
    /// The own store has it.
    pub own: bool,
    pub waiting: BTreeSet<OsdId>,
    /// Members that said no (rule P7): never acknowledged in this interval.
    pub refused: BTreeMap<OsdId, SubResult>,
    /// Erasure coding: members that cannot read the parity that they are to add to. They have answered.
    pub unreadable: BTreeSet<OsdId>,
    /// Since when nobody else is waited for, or one of them was sent its rows as they will be.
    pub decoding: Option<Millis>,
    pub started: Millis,
    pub sent: Millis,
}

impl Write {
    fn new(object: ObjectId, requested: Requested, parts: Parts, now: Millis) -> Write {
        Write {
            requested: vec![requested],
            object,
            version: Version::ZERO,
            prev: Version::ZERO,
            parts,
            added: BTreeSet::new(),
            own: false,
            waiting: BTreeSet::new(),
            refused: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            decoding: None,
            started: now,
            sent: now,
        }
    }

    /// What each member is sent, at once: the same bytes, or to those who lack the object that it is at another version now.
    pub fn noted(
        requested: Requested,
        object: ObjectId,
        versions: (Version, Version),
        part: (SubWriteKind, Bytes),
        (members, lacking): (&[OsdId], &BTreeSet<OsdId>),
        now: Millis,
    ) -> Write {
        let part = |o: &OsdId| match lacking.contains(o) {
            true => (SubWriteKind::Note, Bytes::new()),
            false => part.clone(),
        };
        let parts = members.iter().map(|o| (*o, part(o))).collect();
        let mut write = Write::new(object, requested, Parts::Each(BTreeMap::new()), now);
        write.send(versions, parts, now);
        write
    }

    /// The same bytes for everybody, at once.
    pub fn same(
        requested: Requested,
        object: ObjectId,
        (prev, version): (Version, Version),
        (kind, data): (SubWriteKind, Bytes),
        members: &[OsdId],
        now: Millis,
    ) -> Write {
        let waiting = members.iter().copied().collect();
        Write { prev, version, waiting, ..Write::new(object, requested, Parts::Same(kind, data), now) }
    }

    /// An erasure-coded group's write that nothing was sent of.
    pub fn open(requested: Requested, object: ObjectId, new: NewBlocks, now: Millis) -> Write {
        Write::new(object, requested, Parts::Open(new), now)
    }

    pub fn is_open(&self) -> bool {
        matches!(self.parts, Parts::Open(_))
    }

    /// Members may have it.
    pub fn is_sent(&self) -> bool {
        matches!(self.parts, Parts::Same(..) | Parts::Each(_))
    }

    /// Takes another operation in, if this one is open, does not overlap it and spans not too much with it: what is between
    /// may have to be read.
    pub fn join(&mut self, requested: Requested, new: &NewBlocks, span_max: u32) -> bool {
        let overlaps = self.overlaps(requested.first_block, requested.block_count);
        let Parts::Open(all) = &mut self.parts else { return false };
        let ends = |blocks: &NewBlocks| Some((*blocks.keys().next()?, *blocks.keys().next_back()?));
        let (Some(a), Some(b)) = (ends(all), ends(new)) else { return false };
        if overlaps || a.1.max(b.1) - a.0.min(b.0) >= span_max {
            return false;
        }
        all.extend(new.iter().map(|(b, block)| (*b, block.clone())));
        self.requested.push(requested);
        true
    }

    /// No more joins: what is to be written.
    pub fn close(&mut self) -> Option<&NewBlocks> {
        if let Parts::Open(new) = &mut self.parts {
            self.parts = Parts::Gathering(std::mem::take(new));
        }
        match &self.parts {
            Parts::Gathering(new) => Some(new),
            _ => None,
        }
    }

    /// Old rows came: from now on members owe an answer.
    pub fn send(
        &mut self,
        (prev, version): (Version, Version),
        parts: BTreeMap<OsdId, (SubWriteKind, Bytes)>,
        now: Millis,
    ) {
        self.waiting = parts.keys().copied().collect();
        (self.prev, self.version, self.parts) = (prev, version, Parts::Each(parts));
        (self.started, self.sent) = (now, now);
    }

    /// What a member is sent.
    pub fn part(&self, member: OsdId) -> Option<(SubWriteKind, Bytes)> {
        match &self.parts {
            Parts::Same(kind, data) => Some((kind.clone(), data.clone())),
            Parts::Each(parts) => parts.get(&member).cloned(),
            Parts::Open(_) | Parts::Gathering(_) => None,
        }
    }

    /// A member cannot do with what it was sent.
    pub fn replace_part(&mut self, member: OsdId, part: (SubWriteKind, Bytes)) {
        if let Parts::Each(parts) = &mut self.parts {
            parts.insert(member, part);
        }
    }

    /// Since when a member that is waited for owes its answer.
    pub fn owes_since(&self, member: OsdId) -> Option<Millis> {
        match self.unreadable.contains(&member) {
            true => self.decoding,
            false => Some(self.started),
        }
    }

    pub fn overlaps(&self, first_block: u32, block_count: u32) -> bool {
        self.requested
            .iter()
            .any(|r| r.first_block < first_block + block_count && first_block < r.first_block + r.block_count)
    }

    pub fn take_tokens(&mut self) -> impl Iterator<Item = ClientToken> + '_ {
        self.requested.iter_mut().filter_map(|r| r.token.take())
    }
}
