//! What a member has or should have, as peering hears of it (rule P10): a list in pages, and a digest of each part of it. The primary
//! asks only for parts whose digest is not that of its own.
//!
//! An equal digest stands for equal entries: SHA-256, cut to 128 bits. Checksums of 32 or 64 bits would take different lists for the
//! same one some day, and a member would be believed to have what it lacks.

use super::*;
use gabion_proto::limits::{LIST_ENTRIES_MAX, LIST_PARTS_MAX};
use ring::digest::{Context as Hasher, SHA256};
use std::ops::Bound;

/// A part has about so many entries, unless there would be too many parts: one that changed brings the others along.
const PART_ENTRIES: usize = 2;

/// The digest of each of `count` parts.
fn digests(entries: impl Iterator<Item = ObjectEntry>, count: u8) -> Vec<ListDigest> {
    let mut parts = vec![Hasher::new(&SHA256); usize::from(count)];
    let mut bytes = Vec::new();
    for e in entries {
        bytes.clear();
        bytes = postcard::to_extend(&e, bytes).expect("a vector takes everything");
        parts[ListParts::part_of(count, &e.object)].update(&bytes);
    }
    let short = |part: Hasher| *part.finish().as_ref().first_chunk().expect("32 bytes");
    parts.into_iter().map(short).collect()
}

fn held_entry(object: &ObjectId, h: &Held) -> ObjectEntry {
    ObjectEntry { base: h.base, ..ObjectEntry::here(*object, h.version, h.deleted) }
}

impl Index {
    /// In order.
    pub fn entries(&self) -> BTreeMap<ObjectId, ObjectEntry> {
        self.entries_after(None).map(|e| (e.object, e)).collect()
    }

    /// The same from some object on, so that a page costs no more than what is on it.
    fn entries_after(&self, after: Option<ObjectId>) -> impl Iterator<Item = ObjectEntry> + '_ {
        let rest = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let mut held = self.objects.range(rest).peekable();
        let mut missing = self.missing.range(rest).peekable();
        std::iter::from_fn(move || {
            let (Some((o, n)), next) = (missing.peek().copied(), held.peek().copied()) else {
                return held.next().map(|(o, h)| held_entry(o, h));
            };
            if next.is_some_and(|(first, _)| first < o) {
                return held.next().map(|(o, h)| held_entry(o, h));
            }
            missing.next();
            // A missing entry says more than what is still held.
            let held = held.next_if(|(same, _)| *same == o).map(|(_, h)| (h.version, h.deleted));
            let uncertain = n.uncertain;
            let entry = ObjectEntry::here(*o, n.version, n.deleted);
            Some(ObjectEntry { missing: true, uncertain, held, ..entry })
        })
    }

    /// What a member's answer to a question carries.
    pub fn digests(&self) -> Vec<ListDigest> {
        let entries = self.objects.len() + self.missing.len();
        let count = (entries / PART_ENTRIES).next_power_of_two().min(LIST_PARTS_MAX);
        digests(self.entries_after(None), count as u8)
    }

    /// Of somebody's list: which parts must be asked for. `own` keeps this one's digests, by how many there are.
    pub fn parts_that_differ(
        &self,
        own: &mut BTreeMap<u8, Vec<ListDigest>>,
        parts: &[ListDigest],
    ) -> ListParts {
        if !(1..=LIST_PARTS_MAX).contains(&parts.len()) {
            return ListParts::ALL;
        }
        let count = parts.len() as u8;
        let own = own.entry(count).or_insert_with(|| digests(self.entries_after(None), count));
        let differ = own.iter().zip(parts).map(|(own, its)| own != its);
        let wanted = differ.enumerate().fold(0, |wanted, (n, differs)| wanted | u64::from(differs) << n);
        ListParts { count, wanted }
    }

    /// What is in no part that was asked for.
    pub fn entries_beside(&self, asked: ListParts) -> BTreeMap<ObjectId, ObjectEntry> {
        let same = self.entries_after(None).filter(|e| !asked.contains(&e.object));
        same.map(|e| (e.object, e)).collect()
    }

    /// Everything is here as it should be, and committed.
    pub fn is_settled(&self) -> bool {
        let settled = |h: &Held| h.base.is_none() && h.version != Version::ZERO;
        self.missing.is_empty() && self.objects.values().all(settled)
    }
}

impl Pg {
    pub(super) fn list_request(
        &mut self,
        cx: &mut Cx<'_>,
        from: OsdId,
        after: Option<ObjectId>,
        parts: ListParts,
    ) {
        let interval = self.record.interval;
        let promised = self.meta.promised >= interval && self.member().is_some_and(|m| !m.promising);
        // Only a member that promised lists: nothing of an older interval can change the list then.
        if !promised {
            return;
        }
        let mut rest = self.index.entries_after(after).filter(|e| parts.contains(&e.object));
        let entries = rest.by_ref().take(LIST_ENTRIES_MAX).collect();
        let last = rest.next().is_none();
        drop(rest);
        self.send(cx, from, PeerBody::List { after, entries, last }, Bytes::new());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: u32) -> ObjectEntry {
        let object = ObjectId { volume: VolumeId(7), index: n, layer: LayerId(0) };
        ObjectEntry::here(object, Version::from_raw(u64::from(n) << 8), false)
    }

    #[test]
    fn each_field_of_an_entry_changes_the_digest_of_its_part_and_no_other() {
        let all: Vec<ObjectEntry> = (0..500).map(entry).collect();
        let before = digests(all.iter().copied(), 16);
        let v = Version::from_raw(3);
        let changes: [fn(&mut ObjectEntry, Version); 7] = [
            |e, v| e.version = v,
            |e, _| e.missing = true,
            |e, _| e.deleted = true,
            |e, v| e.uncertain = Some(v),
            |e, v| e.held = Some((v, false)),
            |e, v| e.held = Some((v, true)),
            |e, v| e.base = Some(v),
        ];
        for change in changes {
            let mut changed = all.clone();
            change(&mut changed[77], v);
            let after = digests(changed.iter().copied(), 16);
            let differ: Vec<usize> = (0..16).filter(|n| before[*n] != after[*n]).collect();
            assert_eq!(differ, [ListParts::part_of(16, &all[77].object)]);
        }
        let fewer = all.iter().copied().filter(|e| e.object.index != 77);
        assert_ne!(digests(fewer, 16), before);
    }
}
