//! At every acting member: what the own store has of a range of objects.

use super::super::recovery::BYTES_AT_ONCE;
use super::super::*;
use crate::store::{ObjectState, digest_of};
use gabion_proto::blocks::Content;
use gabion_proto::limits::{OBJECT_BYTES_MAX, SCRUB_ENTRIES_MAX};

/// Objects that one deep question is about.
const DEEP_AT_ONCE: usize = 4;
/// What a look at an object's records counts for.
const LIGHT_COST: u64 = 16 << 10;

/// A range that is being looked at, one object at a time.
#[derive(Debug)]
pub struct Reading {
    pub tid: u64,
    deep: bool,
    todo: VecDeque<ObjectId>,
    current: Option<ObjectId>,
    /// What one read may move.
    object_bytes: u64,
    pub entries: Vec<ScrubEntry>,
    /// Nothing comes after these.
    pub last: bool,
}

impl Reading {
    /// What is still to be looked at.
    pub fn objects(&self) -> impl Iterator<Item = ObjectId> + '_ {
        self.todo.iter().copied()
    }

    /// Bytes that are being read.
    pub fn bytes(&self) -> u64 {
        if self.deep && self.current.is_some() { self.object_bytes } else { 0 }
    }
}

impl Pg {
    /// The next objects of a range, in the order of their ids.
    pub(super) fn range_to_read(&self, cx: &Cx<'_>, tid: u64, range: ScrubRange, deep: bool) -> Reading {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let most = if deep { DEEP_AT_ONCE } else { SCRUB_ENTRIES_MAX };
        let bounds = match range {
            ScrubRange::After(None) => (Unbounded, Unbounded),
            ScrubRange::After(Some(o)) => (Excluded(o), Unbounded),
            ScrubRange::One(o) => (Included(o), Included(o)),
        };
        let objects = self.index.objects.range(bounds).map(|(o, _)| *o).filter(|o| !is_removed(cx.map, o));
        let mut todo: VecDeque<ObjectId> = objects.take(most + 1).collect();
        let last = todo.len() <= most;
        todo.truncate(most);
        let pool = cx.map.pools.get(&self.id.pool);
        let object_bytes = pool.map_or(OBJECT_BYTES_MAX, |p| p.object_bytes).into();
        Reading { tid, deep, todo, current: None, object_bytes, entries: Vec::new(), last }
    }

    /// The primary asks. What is being looked at already is answered once.
    pub(in super::super) fn scrub_asked(&mut self, cx: &mut Cx<'_>, tid: u64, range: ScrubRange, deep: bool) {
        let Some(m) = self.member() else { return };
        if !m.active || m.scrub.as_ref().is_some_and(|r| r.tid == tid) {
            return;
        }
        let reading = self.range_to_read(cx, tid, range, deep);
        if let Some(m) = self.member() {
            m.scrub = Some(reading);
        }
        self.look_on(cx);
    }

    fn reading(&mut self) -> Option<&mut Reading> {
        match &mut self.phase {
            Phase::Member(m) => m.scrub.as_mut(),
            Phase::Active(a) => a.scrub.own.as_mut(),
            _ => None,
        }
    }

    /// Looks at the next object, as the budget allows; what is complete goes to the primary.
    pub(in super::super) fn look_on(&mut self, cx: &mut Cx<'_>) {
        let bytes = cx.recovery_elsewhere.reserved + self.recovery_load().reserved;
        let Some(r) = self.reading() else { return };
        if r.current.is_some() {
            return;
        }
        let Some(object) = r.todo.front().copied() else { return self.looked(cx) };
        if !cx.scrub.allows() || (r.deep && bytes >= BYTES_AT_ONCE) {
            return;
        }
        r.todo.pop_front();
        r.current = Some(object);
        let (tid, deep, pg) = (r.tid, r.deep, self.id);
        let token = self.token(cx, What::ScrubCopy { tid, object });
        cx.out.push(match deep {
            true => Effect::ReadObject { token, pg, object },
            false => Effect::Digest { token, pg, object },
        });
    }

    /// The whole object was read, every block against its checksum.
    pub(in super::super) fn copy_read(
        &mut self,
        cx: &mut Cx<'_>,
        (tid, object): (u64, ObjectId),
        result: Result<(ObjectState, Content), StoreError>,
    ) {
        let bytes = match &result {
            Ok((_, content)) => content.data.len() as u64,
            Err(_) => self.reading().map_or(0, |r| r.object_bytes),
        };
        self.counters.scrubbed_bytes += bytes;
        cx.scrub.spend(bytes.max(LIGHT_COST));
        self.copy_found(cx, (tid, object), result.map(|(state, content)| (state, digest_of(&content))));
    }

    pub fn copy_digested(
        &mut self,
        cx: &mut Cx<'_>,
        (tid, object): (u64, ObjectId),
        result: Result<(ObjectState, u64), StoreError>,
    ) {
        cx.scrub.spend(LIGHT_COST);
        self.copy_found(cx, (tid, object), result);
    }

    fn copy_found(
        &mut self,
        cx: &mut Cx<'_>,
        (tid, object): (u64, ObjectId),
        result: Result<(ObjectState, u64), StoreError>,
    ) {
        let (coded, known, pg) = (self.code.is_some(), self.version_of(&object), self.id);
        let Some(r) = self.reading().filter(|r| r.tid == tid && r.current == Some(object)) else { return };
        let entry = match result {
            Ok((state, digest)) => ScrubEntry {
                object,
                version: state.pending.unwrap_or(state.version),
                deleted: state.deleted && state.pending.is_none(),
                digest: if coded { 0 } else { digest },
                unreadable: None,
            },
            Err(StoreError::NotFound { .. }) => {
                ScrubEntry { object, version: Version::ZERO, deleted: false, digest: 0, unreadable: None }
            }
            Err(StoreError::Unreadable { block, why, .. }) => {
                tracing::warn!(%pg, osd = %cx.id, %object, block, why, "a scrub found an unreadable block");
                ScrubEntry { object, version: known, deleted: false, digest: 0, unreadable: Some(block) }
            }
            // This OSD is about to stop.
            Err(_) => return,
        };
        r.current = None;
        r.entries.push(entry);
        self.look_on(cx);
        self.scrub_on(cx);
    }

    fn looked(&mut self, cx: &mut Cx<'_>) {
        let reading = match &mut self.phase {
            Phase::Member(m) => m.scrub.take(),
            Phase::Active(a) => a.scrub.own.take(),
            _ => None,
        };
        let Some(Reading { tid, entries, last, .. }) = reading else { return };
        match self.record.primary {
            Some(primary) if primary != cx.id => {
                self.send(cx, primary, PeerBody::ScrubInfo { tid, entries, last }, Bytes::new());
            }
            _ => self.copies_came(cx, cx.id, tid, entries, last),
        }
    }
}
