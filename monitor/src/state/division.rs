//! Pools that get more groups, or fewer (rule P9).
//!
//! Every group is divided into as many, in one step: group `p` of `n` into those whose numbers are `p`, `p + n`, `p + 2n` and so on,
//! which are the groups that its objects hash to when there are more. All of them inherit its record: whatever an interval of the
//! group may have taken of theirs is to be looked for where it was. They begin an interval of their own (`intervals`), with the
//! members that it had: nothing moves. When all are clean, each is placed by its own number.
//!
//! Nothing depends on what state a group is in: what an OSD has of it, it divides in the same way (`osd/src/core/pg/division.rs`).
//!
//! Fewer is the reverse, and takes longer:
//!
//! ```text
//! asked for -> each group is placed where the one is that it becomes part of -> all are clean, on the same members
//!           -> those that become one begin an interval together -> all are clean in it -> merged
//! ```

use super::pools::{PGS_MAX, check};
use super::scrubs::ScrubRecord;
use super::*;
use gabion_proto::map::{PgRecord, Pool, Redundancy};
use gabion_proto::placement;

/// Groups that become one.
const MERGE_MAX: u32 = 64;

impl MonitorState {
    /// Of how many groups the places count, if a pool has more: the others lie where those do that they came out of.
    pub fn placed_groups(&self, pool: PoolId) -> Option<u32> {
        self.placed.get(&pool).copied()
    }

    pub(super) fn set_pgs(&mut self, name: &str, pg_count: u32) -> CommandResult {
        let id = self.pool_named(name)?;
        let mut pool = self.map.pools[&id].clone();
        let had = std::mem::replace(&mut pool.pg_count, pg_count);
        if pg_count < had {
            return self.merge_later(id, name, had, pg_count);
        }
        check(&pool)?;
        if pg_count == had {
            if self.merging.remove(&id).is_some() {
                self.event(EventSeverity::Ok, format!("pool {name} keeps its {had} groups"));
                self.place_divided(id);
            }
            return Ok(Reply::Pool(id));
        }
        let step = pg_count / had;
        if !pg_count.is_multiple_of(had) || !step.is_power_of_two() {
            return Err(Refusal::invalid(format!(
                "pool {name} has {had} groups, which can be doubled, once or several times: to {}, {} and so on, not to {pg_count}",
                2 * had,
                4 * had
            )));
        }
        if self.map.pgs.len() + (pg_count - had) as usize > PGS_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {PGS_MAX} placement groups")));
        }
        for index in 0..had {
            self.inherit(PgId { pool: id, index }, had, pg_count);
        }
        self.merging.remove(&id);
        self.placed.entry(id).or_insert(had);
        self.change_groups(false, |map| {
            map.pools.insert(id, pool);
            for index in 0..had {
                let Some(record) = map.pgs.get(&PgId { pool: id, index }).cloned() else { continue };
                for part in parts(index, had, pg_count) {
                    map.pgs.insert(PgId { pool: id, index: part }, record.clone());
                }
            }
        });
        self.event(
            EventSeverity::Ok,
            format!("pool {name} has {pg_count} groups: each of its {had} was divided into {step}"),
        );
        Ok(Reply::Pool(id))
    }

    /// What is known of a group beyond the map is known of what comes out of it.
    fn inherit(&mut self, pg: PgId, had: u32, pg_count: u32) {
        let suspects = self.suspects.get(&pg).cloned();
        let scrubs = self.scrubs.remove(&pg);
        for index in std::iter::once(pg.index).chain(parts(pg.index, had, pg_count)) {
            let part = PgId { index, ..pg };
            if let Some(suspects) = &suspects {
                self.suspects.insert(part, suspects.clone());
            }
            if let Some(record) = &scrubs {
                self.scrubs.insert(part, part_of(record, part, pg_count));
            }
        }
    }

    /// When all groups of a pool are clean after it got more, each goes to its own place.
    pub(super) fn place_divided(&mut self, pool: PoolId) {
        let waits = !self.placed.contains_key(&pool) || self.merging.contains_key(&pool);
        if waits || !self.map.pgs.range(groups_of(pool)).all(|(_, r)| r.clean) {
            return;
        }
        self.placed.remove(&pool);
        self.change_groups(true, |_| {});
        if let Some(pool) = self.map.pools.get(&pool) {
            let text = format!("pool {}: its {} groups go to places of their own", pool.name, pool.pg_count);
            self.event(EventSeverity::Ok, text);
        }
    }

    /// The number of groups that a pool is to have when they can be merged.
    pub fn merges_to(&self, pool: PoolId) -> Option<u32> {
        self.merging.get(&pool).copied()
    }

    /// Groups of a pool that its merge waits for: not clean, or not with the members of the group that they are to be part of.
    pub fn merge_waits_for(&self, pool: PoolId) -> usize {
        let Some(target) = self.merges_to(pool) else { return 0 };
        let groups = self.map.pgs.range(groups_of(pool));
        groups.filter(|(pg, r)| !r.clean || !self.is_like_parent(**pg, r, target)).count()
    }

    fn is_like_parent(&self, pg: PgId, record: &PgRecord, target: u32) -> bool {
        let members = |r: &PgRecord| r.members().collect::<BTreeSet<_>>();
        let parent = self.map.pgs.get(&PgId { index: pg.index % target, ..pg });
        parent.is_some_and(|p| members(p) == members(record))
    }

    /// Fewer groups: those that become one are placed on the same OSDs; [`MonitorState::merge_on`] does the rest.
    fn merge_later(&mut self, id: PoolId, name: &str, had: u32, target: u32) -> CommandResult {
        let pool = &self.map.pools[&id];
        if let Redundancy::Erasure { .. } = pool.redundancy {
            // Disks would have to exchange their shards, which needs room for another one.
            return Err(Refusal::new(
                RefusalKind::NotBuilt,
                format!(
                    "pool {name} is erasure coded, and groups of shards cannot be merged yet: only more are possible"
                ),
            ));
        }
        if target == 0
            || !had.is_multiple_of(target)
            || !(had / target).is_power_of_two()
            || had / target > MERGE_MAX
        {
            return Err(Refusal::invalid(format!(
                "pool {name} has {had} groups, which can be halved, once or several times, to a {MERGE_MAX}th at a time, not made {target}"
            )));
        }
        if self.merging.insert(id, target) == Some(target) {
            return Ok(Reply::Pool(id));
        }
        let places = self.placed.get(&id).map_or(target, |p| target.min(*p));
        self.placed.insert(id, places);
        let text =
            format!("pool {name} is to have {target} groups: they are merged when all {had} are clean");
        self.event(EventSeverity::Ok, text);
        self.change_groups(true, |_| {});
        self.merge_on(id);
        Ok(Reply::Pool(id))
    }

    /// Merges the groups of a pool, if that is asked for and possible now. What is compared and changed is one state, so nothing can come between
    /// (rule P9): all groups are clean, and those that become one have the same members and the same interval.
    pub(super) fn merge_on(&mut self, id: PoolId) {
        let (Some(target), Some(pool)) = (self.merges_to(id), self.map.pools.get(&id)) else { return };
        // Asked whenever a group becomes clean, so that most of the time one that is not answers it.
        let mut groups = self.map.pgs.range(groups_of(id));
        if groups.clone().any(|(_, r)| !r.clean) || groups.any(|(pg, r)| !self.is_like_parent(*pg, r, target))
        {
            return;
        }
        let had = pool.pg_count;
        let interval = |index| self.map.pgs.get(&PgId { pool: id, index }).map(|r| r.interval);
        let unlike: BTreeSet<u32> = (0..had)
            .filter(|index| interval(*index) != interval(index % target))
            .map(|index| index % target)
            .collect();
        if !unlike.is_empty() {
            // One interval for all of a family: whoever was active in it has all that any of them took.
            self.change_groups(false, |map| {
                let epoch = map.epoch.next();
                for index in (0..had).filter(|index| unlike.contains(&(index % target))) {
                    if let Some(record) = map.pgs.get_mut(&PgId { pool: id, index }) {
                        intervals::begin_again(record, epoch);
                    }
                }
            });
            return;
        }
        let pool = Pool { pg_count: target, ..pool.clone() };
        let name = pool.name.clone();
        for index in 0..target {
            self.unite(PgId { pool: id, index }, had, target);
        }
        self.merging.remove(&id);
        if self.placed.get(&id) == Some(&target) {
            self.placed.remove(&id);
        }
        self.change_groups(false, |map| {
            map.pools.insert(id, pool);
            for index in 0..target {
                let whole = PgId { pool: id, index };
                let others: Vec<PgId> =
                    parts(index, target, had).map(|index| PgId { index, ..whole }).collect();
                let records: Vec<_> = others.iter().filter_map(|pg| map.pgs.remove(pg)).collect();
                if let Some(record) = map.pgs.get_mut(&whole) {
                    intervals::merge(record, records.iter().map(|r| &**r));
                }
            }
        });
        let text = format!("pool {name} has {target} groups: {} of the {had} became one", had / target);
        self.event(EventSeverity::Ok, text);
    }

    /// What is known beyond the map of groups that become one.
    fn unite(&mut self, whole: PgId, had: u32, target: u32) {
        for index in parts(whole.index, target, had) {
            let part = PgId { index, ..whole };
            if let Some(suspects) = self.suspects.remove(&part) {
                self.suspects.entry(whole).or_default().extend(suspects);
            }
            if let (Some(record), Some(all)) = (self.scrubs.remove(&part), self.scrubs.get_mut(&whole)) {
                all.unite(record);
            }
        }
    }
}

fn groups_of(pool: PoolId) -> std::ops::RangeInclusive<PgId> {
    PgId { pool, index: 0 }..=PgId { pool, index: u32::MAX }
}

/// Numbers of the groups that come out of one, without its own.
fn parts(index: u32, had: u32, pg_count: u32) -> impl Iterator<Item = u32> {
    (1..pg_count / had).map(move |n| index + n * had)
}

/// Scrubs of the whole are scrubs of each part; damaged objects are in one of them.
fn part_of(record: &ScrubRecord, part: PgId, pg_count: u32) -> ScrubRecord {
    let own = |o: &ObjectId| placement::pg_index(o.volume, o.index, pg_count) == part.index;
    let mut record = record.clone();
    // Of those that the list has no room for nobody knows where they are: they count until the next pass.
    let unlisted = record.damaged_objects.saturating_sub(record.damaged.len() as u64);
    record.damaged.retain(|d| own(&d.object));
    record.damaged_objects = record.damaged.len() as u64 + unlisted;
    record
}
