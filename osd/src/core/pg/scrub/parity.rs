//! Deep scrubs of shards: every shard of an object is read, and what can be computed from others must be what is there.

use super::super::recovery::BYTES_AT_ONCE;
use super::Damage;
use crate::core::pg::*;
use crate::erasure::{Block, CodeError, Rows, rows_of};
use gabion_proto::blocks::Content;
use gabion_proto::limits::BLOCK_BYTES;

/// Unanswered questions are asked again after this long.
const ASK_AGAIN_MS: Millis = 2_000;

/// An object whose shards are being read.
#[derive(Debug)]
pub struct Parity {
    pub tid: u64,
    object: ObjectId,
    version: Version,
    row_count: u32,
    parts: BTreeMap<u8, Rows>,
    waiting: BTreeMap<OsdId, u8>,
    asked: Millis,
    /// Some member could not read its shard.
    lost: bool,
    /// Some member is not at the version any more.
    changed: bool,
}

/// What shards say of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreement {
    Whole,
    /// Without this one the others agree.
    Wrong(u8),
    /// Something is wrong, and it may be this shard or that one.
    Unclear,
}

/// Compares what is there with what the first `k` give; with a shard to spare the wrong one is found by leaving each out in turn.
pub fn agreement(code: &dyn Code, parts: &BTreeMap<u8, Rows>) -> Result<Agreement, CodeError> {
    let differ = odd_rows(code, parts)?;
    if differ.is_empty() {
        return Ok(Agreement::Whole);
    }
    let k = usize::from(code.geometry().k);
    let only = |rows: &Rows| -> Rows { differ.iter().map(|r| rows[*r].clone()).collect() };
    let parts: BTreeMap<u8, Rows> = parts.iter().map(|(n, rows)| (*n, only(rows))).collect();
    let mut wrong = None;
    // With exactly k left nothing is left to compare.
    for n in parts.keys().filter(|_| parts.len() > k + 1) {
        let mut rest = parts.clone();
        rest.remove(n);
        if odd_rows(code, &rest)?.is_empty() && wrong.replace(*n).is_some() {
            return Ok(Agreement::Unclear);
        }
    }
    Ok(wrong.map_or(Agreement::Unclear, Agreement::Wrong))
}

/// Rows of which some shard is not what the first `k` give.
fn odd_rows(code: &dyn Code, parts: &BTreeMap<u8, Rows>) -> Result<Vec<usize>, CodeError> {
    let k = usize::from(code.geometry().k);
    let first: BTreeMap<u8, Rows> = parts.iter().take(k).map(|(n, rows)| (*n, rows.clone())).collect();
    let rest: Vec<u8> = parts.keys().skip(k).copied().collect();
    let computed = code.compute(&first, &rest)?;
    let count = parts.values().next().map_or(0, Vec::len);
    let same = |n: &u8, row: usize| match (computed.get(n), parts.get(n)) {
        (Some(a), Some(b)) => bytes(&a[row]) == bytes(&b[row]),
        _ => false,
    };
    Ok((0..count).filter(|row| !rest.iter().all(|n| same(n, *row))).collect())
}

/// `None` is zeros, however they are kept.
fn bytes(block: &Option<Block>) -> Option<&[u8]> {
    block.as_ref().map(|b| &b.bytes[..]).filter(|b| b.iter().any(|x| *x != 0))
}

impl Pg {
    /// Reads all shards of an object. False: not now.
    pub(super) fn begin_parity(&mut self, cx: &mut Cx<'_>, object: ObjectId) -> bool {
        let busy = cx.recovery_elsewhere.reserved + self.recovery_load().reserved >= BYTES_AT_ONCE;
        if !cx.scrub.allows() || busy {
            return false;
        }
        let Some(geometry) = self.code.as_ref().map(|c| c.geometry()) else { return true };
        let held = self.index.objects.get(&object).filter(|h| !h.deleted);
        let Some(version) = held.map(|h| h.version).filter(|_| !is_removed(cx.map, &object)) else {
            return true;
        };
        let object_bytes = cx.map.pools.get(&self.id.pool).map_or(0, |p| p.object_bytes);
        let row_count = geometry.all_rows(object_bytes / BLOCK_BYTES);
        let places = self.record.acting.iter().copied().zip(0u8..).filter(|(o, _)| *o != OsdId::NONE);
        let waiting: BTreeMap<OsdId, u8> = places.collect();
        let Phase::Active(a) = &mut self.phase else { return true };
        if a.recovery.is_missing(&object) {
            // Known to be damaged.
            return true;
        }
        let tid = a.next_tid();
        a.scrub.parity = Some(Parity {
            tid,
            object,
            version,
            row_count,
            parts: BTreeMap::new(),
            waiting,
            asked: cx.now,
            lost: false,
            changed: false,
        });
        self.ask_for_shards(cx);
        true
    }

    fn ask_for_shards(&mut self, cx: &mut Cx<'_>) {
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(p) = &mut a.scrub.parity else { return };
        p.asked = cx.now;
        let (tid, object, version, rows) = (p.tid, p.object, p.version, (0, p.row_count));
        for member in p.waiting.keys().copied().collect::<Vec<_>>() {
            if member == cx.id {
                self.read_own_rows(cx, What::OwnRows { tid }, object, version, rows);
            } else {
                let (first_row, row_count) = rows;
                let body = PeerBody::ShardRead { tid, object, version, first_row, row_count };
                self.send(cx, member, body, Bytes::new());
            }
        }
    }

    /// Members that are late are asked again.
    pub(super) fn parity_on(&mut self, cx: &mut Cx<'_>) {
        let Phase::Active(a) = &mut self.phase else { return };
        if a.scrub.parity.as_ref().is_some_and(|p| cx.now >= p.asked + ASK_AGAIN_MS) {
            self.ask_for_shards(cx);
        }
    }

    /// A shard, or why not. False: the number is of something else.
    pub(in super::super) fn parity_rows(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        tid: u64,
        result: &Result<Content, SubResult>,
    ) -> bool {
        let Phase::Active(a) = &mut self.phase else { return false };
        let Some(p) = a.scrub.parity.as_mut().filter(|p| p.tid == tid) else { return false };
        if matches!(result, Err(SubResult::BadChecksum)) {
            // Changed on the way: asked again by the timer.
            return true;
        }
        let Some(n) = p.waiting.remove(&from) else { return true };
        match result {
            Ok(content) => {
                let bytes = content.data.len() as u64;
                self.counters.scrubbed_bytes += bytes;
                cx.scrub.spend(bytes);
                p.parts.insert(n, rows_of(content, 0, p.row_count));
            }
            Err(SubResult::Io) => {
                p.lost = true;
                let (object, version) = (p.object, p.version);
                tracing::warn!(pg = %self.id, member = %from, %object, shard = n, "a scrub found an unreadable shard");
                cx.takes(Branch::ScrubShardUnreadable);
                a.scrub.found(1);
                self.counters.scrub_findings += 1;
                if cx.rules.keep(Rule::ScrubRepairs) && !is_removed(cx.map, &object) {
                    a.recovery.lose_shard(from, object, version);
                    a.recovery.replace_copy(from, object, version, None);
                    a.clean_reported = false;
                }
            }
            Err(_) => p.changed = true,
        }
        let complete = |a: &ops::Active| a.scrub.parity.as_ref().is_some_and(|p| p.waiting.is_empty());
        if let Phase::Active(a) = &self.phase
            && complete(a)
        {
            self.compare_shards(cx);
            self.scrub_on(cx);
        }
        true
    }

    fn compare_shards(&mut self, cx: &mut Cx<'_>) {
        let Phase::Active(a) = &mut self.phase else { return };
        let (Some(p), Some(code)) = (a.scrub.parity.take(), self.code.clone()) else { return };
        let (object, version) = (p.object, p.version);
        let now = self.index.objects.get(&object).filter(|h| !h.deleted).map(|h| h.version);
        if now != Some(version) || a.has_writes(&object) || p.changed {
            return a.scrub.put_off(object, cx.now);
        }
        if p.lost {
            // What is left of it is compared when the lost shards are back.
            a.scrub.put_off(object, cx.now);
            return self.recover(cx);
        }
        let agreement = match agreement(&*code, &p.parts) {
            Ok(agreement) => agreement,
            Err(error) => {
                tracing::error!(pg = %self.id, %object, %error, "parity cannot be computed");
                return;
            }
        };
        let place = |n: u8| self.record.acting.get(usize::from(n)).copied();
        match agreement {
            Agreement::Whole => _ = a.scrub.damaged.remove(&object),
            Agreement::Wrong(n) => {
                let Some(member) = place(n) else { return };
                tracing::warn!(pg = %self.id, %object, shard = n, %member, "a scrub found a shard that is not what the others give");
                a.scrub.found(1);
                self.counters.scrub_findings += 1;
                cx.takes(Branch::ScrubShardWrong);
                let bad = BTreeMap::from([(member, version)]);
                self.replace_copies(cx, object, Some((version, false)), bad, BTreeSet::new());
            }
            Agreement::Unclear => {
                tracing::error!(pg = %self.id, %object, "shards do not fit together, and which is wrong is not clear");
                a.scrub.found(1);
                cx.takes(Branch::ScrubShardsUnclear);
                self.counters.scrub_findings += 1;
                a.scrub.damaged.insert(object, Damage::Inconsistent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::erasure::{Geometry, ReedSolomon};

    fn shards(k: u8, m: u8) -> (Arc<dyn Code>, BTreeMap<u8, Rows>) {
        let code = ReedSolomon::shared(Geometry { k, m }).unwrap();
        // The second row is zeros.
        let block = |n: u8| Block::of(vec![n * 7 + 1; BLOCK_BYTES as usize].into());
        let mut parts: BTreeMap<u8, Rows> =
            (0..k).map(|n| (n, vec![block(n), None, block(n + 30)])).collect();
        let parity: Vec<u8> = (k..k + m).collect();
        let computed = code.compute(&parts, &parity).unwrap();
        parts.extend(computed);
        (code, parts)
    }

    fn damage(parts: &mut BTreeMap<u8, Rows>, n: u8, row: usize) {
        let mut bytes = parts[&n][row].as_ref().map_or(vec![0; BLOCK_BYTES as usize], |b| b.bytes.to_vec());
        bytes[77] ^= 4;
        parts.get_mut(&n).unwrap()[row] = Block::of(bytes.into());
    }

    #[test]
    fn whole_shards_agree_also_with_zeros_spelled_out() {
        let (code, mut parts) = shards(4, 2);
        assert_eq!(agreement(&*code, &parts), Ok(Agreement::Whole));
        let zeros = Block { crc: 0, bytes: vec![0; BLOCK_BYTES as usize].into() };
        parts.get_mut(&5).unwrap()[1] = Some(zeros);
        assert_eq!(agreement(&*code, &parts), Ok(Agreement::Whole));
    }

    #[test]
    fn one_wrong_shard_is_found_where_there_is_one_to_spare() {
        for n in 0..6 {
            for row in 0..3 {
                let (code, mut parts) = shards(4, 2);
                damage(&mut parts, n, row);
                assert_eq!(agreement(&*code, &parts), Ok(Agreement::Wrong(n)));
            }
        }
        let (code, mut parts) = shards(2, 1);
        damage(&mut parts, 1, 0);
        assert_eq!(agreement(&*code, &parts), Ok(Agreement::Unclear));
    }

    #[test]
    fn two_wrong_shards_are_too_many() {
        let (code, mut parts) = shards(4, 2);
        damage(&mut parts, 1, 0);
        damage(&mut parts, 3, 2);
        assert_eq!(agreement(&*code, &parts), Ok(Agreement::Unclear));
    }

    #[test]
    fn as_many_as_decode_prove_nothing() {
        let (code, mut parts) = shards(4, 2);
        damage(&mut parts, 1, 0);
        parts.retain(|n, _| *n < 4);
        assert_eq!(agreement(&*code, &parts), Ok(Agreement::Whole));
    }
}
