//! Reads of a damaged object: some block of it can be read in no copy, but others can in some.
//!
//! ```text
//!   own read fails, the object is damaged ──▶ a piece is asked for (Pull) of another member ──▶ what lacks is taken from it
//!                                                     ▲                                              │ something lacks
//!                                                     └──────────────────────────────────────────────┤
//!                                              answered: all is there, or nobody has it (EIO) ◀──────┘
//! ```
//!
//! EIO says that everybody who may have the block has answered, and has not. While somebody is silent the read waits, and in the end is sent back.
//!
//! What is damaged is not brought to anybody: it has no copy that is whole, and recovery (`intake`) has found that none can be put together. Whole copies only; of shards rows are
//! decoded (`shards/gather.rs`). Why what others answer may be shown:
//!
//! - It is of the version that the object has here: the question names it, and the answer is of a copy at exactly that one, as its store has it. Writes of the object that are in
//!   flight end before it is asked for, and no other begins before the read has ended.
//! - Only acting members are asked that do not miss the object: not those whose copy a scrub found wrong. Of copies that a scrub found to differ nothing is put together.
//! - Of each layer only the blocks are taken that the own copy has and cannot read, and only bytes with the checksum that it has of them: which layer a block comes from, and
//!   what it should be, is for the own copy to say.

use super::ops::Read;
use super::*;
use crate::core::Damage;
use crate::store::Readable;
use gabion_proto::blocks::Content;
use gabion_proto::limits::PIECE_BLOCKS;

/// After this long without an answer somebody else is asked besides, or everybody once more.
const PATIENCE_MS: Millis = 2_000;
/// After this long the client is told to come again. That somebody says nothing does not mean that it has nothing.
const GIVE_UP_MS: Millis = 20_000;

/// See the module docs.
#[derive(Debug)]
pub struct Mend {
    /// What could be read.
    content: Content,
    /// What could not, and the checksums that it should have.
    lacking: BTreeMap<(ObjectId, u32), u32>,
    /// Of the piece that is asked for.
    tried: BTreeSet<OsdId>,
    /// Those of them that have not answered.
    asked: Vec<Question>,
    began: Millis,
}

#[derive(Clone, Copy, Debug)]
struct Question {
    member: OsdId,
    tid: u64,
    object: ObjectId,
    version: Version,
    first: u32,
    since: Millis,
}

/// The first block of the piece that a block is in.
fn piece_of(block: u32) -> u32 {
    block / PIECE_BLOCKS * PIECE_BLOCKS
}

impl Mend {
    /// Whether some block of the object lacks.
    pub(super) fn asks_for(&self, object: &ObjectId) -> bool {
        self.lacking.keys().any(|(o, _)| o == object)
    }

    /// What lacks of a piece, as far as it has come.
    fn take(&mut self, (object, first): (ObjectId, u32), came: &Content) {
        let of_piece = |(o, b): &(ObjectId, u32)| *o == object && piece_of(*b) == first;
        let gaps = self.lacking.iter().filter(|(place, _)| of_piece(place));
        let mut lacking: BTreeMap<u32, u32> = gaps.map(|((_, b), crc)| (*b, *crc)).collect();
        self.lacking.retain(|place, _| !of_piece(place));
        self.content = pieces::fill(&self.content, came, &mut lacking);
        if lacking.is_empty() {
            self.tried.clear();
            self.asked.clear();
        }
        self.lacking.extend(lacking.into_iter().map(|(b, crc)| ((object, b), crc)));
    }
}

impl Pg {
    /// Some blocks of damaged objects could not be read here.
    pub(super) fn mend(&mut self, cx: &mut Cx<'_>, token: ClientToken, read: Read, rest: Readable) {
        let Phase::Active(a) = &mut self.phase else { return };
        let lacking = rest.bad.into_iter().map(|(object, block, crc)| ((object, block), crc)).collect();
        let mend =
            Mend { content: rest.content, lacking, tried: BTreeSet::new(), asked: Vec::new(), began: cx.now };
        a.mends.insert(token, mend);
        // Writes of these blocks wait for it.
        a.reads.insert(token, read);
        self.mend_on(cx, token);
    }

    fn mend_on(&mut self, cx: &mut Cx<'_>, token: ClientToken) {
        let others = self.others(cx);
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(mend) = a.mends.get_mut(&token) else { return };
        let Some((object, block)) = mend.lacking.keys().next().copied() else {
            let content = std::mem::take(&mut mend.content);
            cx.takes(Branch::Mended);
            return self.mend_ends(cx, token, Ok(content));
        };
        let version = self.index.objects.get(&object).map(|h| h.version);
        let may_have = |o: &OsdId| cx.map.up_osd(*o).is_some() && !a.recovery.lacks(*o, &object);
        let differ = a.scrub.damaged.get(&object) == Some(&Damage::Inconsistent);
        mend.asked.retain(|q| may_have(&q.member) && !differ);
        let member = others.into_iter().find(|o| may_have(o) && !mend.tried.contains(o) && !differ);
        let (Some(member), Some(version)) = (member, version) else {
            if mend.asked.is_empty() {
                self.mend_ends(cx, token, Err(OpReply::Failed(OpError::Io)));
            }
            return;
        };
        // Others may not be at the version that it has here. It goes on when they are.
        if a.writes.values().any(|w| w.object == object) {
            return;
        }
        a.next_tid += 1;
        let (tid, first) = (a.next_tid, piece_of(block));
        mend.tried.insert(member);
        mend.asked.push(Question { member, tid, object, version, first, since: cx.now });
        cx.takes(Branch::MendRead);
        let body = PeerBody::Pull { tid, object, version, first_block: first, have: Vec::new() };
        self.send(cx, member, body, Bytes::new());
    }

    fn mend_ends(&mut self, cx: &mut Cx<'_>, token: ClientToken, result: Result<Content, OpReply>) {
        let Phase::Active(a) = &mut self.phase else { return };
        a.mends.remove(&token);
        let Some(read) = a.reads.remove(&token) else { return };
        match result {
            Ok(content) => self.answer_read(cx, token, read, Ok(content)),
            Err(reply) => self.reply(cx, token, reply),
        }
        // Writes may have waited for it.
        self.resume(cx);
    }

    /// A piece came. False: it is not of a read.
    pub(super) fn mending_piece_came(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        (tid, object, version, first): (u64, ObjectId, Version, u32),
        piece: &Result<PieceImage, SubResult>,
        data: &Bytes,
    ) -> bool {
        let Phase::Active(a) = &mut self.phase else { return false };
        let is_it = |q: &Question| {
            (q.member, q.tid, q.object, q.version, q.first) == (from, tid, object, version, first)
        };
        let found = a.mends.iter_mut().find_map(|(t, m)| Some((*t, m.asked.iter().position(is_it)?, m)));
        let Some((token, place, mend)) = found else { return false };
        mend.asked.remove(place);
        // What a scrub has found out about that copy meanwhile counts.
        let doubted =
            a.recovery.lacks(from, &object) || a.scrub.damaged.get(&object) == Some(&Damage::Inconsistent);
        if let (Ok(image), false) = (piece, doubted) {
            let came = Content { extents: image.extents.clone(), data: data.clone() };
            let valid = came.validate(true).is_ok() && pieces::fits(&came, first, 0);
            if valid && image.same == 0 && pieces::gaps_fit(&came, &image.bad, first, 0) {
                mend.take((object, first), &came);
            }
        }
        self.mend_on(cx, token);
        true
    }

    /// Who does not answer is not waited for alone; what nobody waits for any more is forgotten.
    pub(super) fn mend_again(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now;
        let Phase::Active(a) = &mut self.phase else { return };
        let reads = &a.reads;
        a.mends.retain(|token, _| reads.contains_key(token));
        let late = |m: &Mend| m.asked.iter().all(|q| now >= q.since + PATIENCE_MS);
        let late: Vec<ClientToken> = a.mends.iter().filter(|(_, m)| late(m)).map(|(t, _)| *t).collect();
        for token in late {
            self.mend_on(cx, token);
            let Phase::Active(a) = &mut self.phase else { return };
            let Some(mend) = a.mends.get_mut(&token) else { continue };
            if now >= mend.began + GIVE_UP_MS {
                let again = OpReply::Retry { epoch: cx.map.epoch, why: RetryWhy::NotActive };
                self.mend_ends(cx, token, Err(again));
                continue;
            }
            // The question may be lost, or the answer.
            let mut again = Vec::new();
            for q in mend.asked.iter_mut().filter(|q| now >= q.since + PATIENCE_MS) {
                q.since = now;
                again.push(*q);
            }
            for Question { member, tid, object, version, first, .. } in again {
                let body = PeerBody::Pull { tid, object, version, first_block: first, have: Vec::new() };
                self.send(cx, member, body, Bytes::new());
            }
        }
    }
}
