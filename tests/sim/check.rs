//! What must be true once everything has healed.

use crate::world::World;
use gabion_osd::store::{ObjectState, Store, StoreError};
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use gabion_proto::map::Redundancy;
use gabion_proto::placement::pg_index;

type Whole = Vec<(ObjectId, ObjectState, Content)>;

impl World {
    pub fn all_clean(&self) -> bool {
        let width = self.width();
        self.monitor.state.map.pgs.values().all(|r| r.clean && r.activated && r.members().count() == width)
    }

    /// Everything that was asked of scrubs is done.
    pub fn scrubs_done(&self) -> bool {
        self.monitor.state.scrubs.values().all(|r| r.requested().is_none())
    }

    /// With so little rot every object has a good copy.
    pub fn nothing_is_damaged(&self) -> Result<(), String> {
        let scrubs = &self.monitor.state.scrubs;
        match scrubs.iter().find(|(_, r)| r.damaged_objects > 0) {
            Some((pg, r)) => Err(format!("a scrub of group {pg} found {:?} damaged", r.damaged)),
            None => Ok(()),
        }
    }

    /// Objects of removed volumes and layers that a member still holds.
    pub fn leftovers(&mut self) -> usize {
        let map = self.monitor.state.map.clone();
        let mut count = 0;
        for (pg, record) in map.pgs.clone() {
            for node in self.nodes.iter_mut().filter(|n| record.acting.contains(&n.id)) {
                let Some(store) = node.disk.store() else { continue };
                let list = store.list(pg, None, usize::MAX).unwrap_or_default();
                count += list.iter().filter(|(o, _)| map.is_removed(o)).count();
            }
        }
        count
    }

    /// Whether as many disks as the pool's min-size have an object at a version of a write that came at `since`, or a newer one. Who does not run
    /// may have it, and who was lost meanwhile may have had it.
    pub fn on_enough_disks(
        &mut self,
        object: (PgId, ObjectId),
        version: Version,
        since: u64,
    ) -> Result<(), String> {
        let map = &self.monitor.state.map;
        let Some(pool) = map.pools.get(&self.pool).filter(|_| !map.is_removed(&object.1)) else {
            return Ok(());
        };
        // OSDs may not know yet that it is higher now.
        self.min_size = self.min_size.min(pool.min_size as usize);
        let mut may_have = 0;
        for n in self.nodes.iter_mut().filter(|n| !n.lost || n.lost_at >= since) {
            let held = match n.disk.store() {
                Some(store) => object_in(store, object.0.pool, object.1).map_err(|e| e.to_string()),
                None => Ok(None),
            };
            let runs = n.core.is_some();
            let has = held.is_ok_and(|s| s.is_some_and(|s| s.pending.unwrap_or(s.version) >= version));
            may_have += usize::from(has || !runs);
        }
        match may_have >= self.min_size {
            true => Ok(()),
            false => Err(format!(
                "{} is at {version} on {may_have} disks, min-size is {}",
                object.1, self.min_size
            )),
        }
    }

    /// What is on a disk is divided as the pool is, copies that nobody wants included, and each object is where it belongs.
    fn check_division(&mut self) -> Result<(), String> {
        let Some(count) = self.monitor.state.map.pools.get(&self.pool).map(|p| p.pg_count) else {
            return Ok(());
        };
        let pool = self.pool;
        if let Some(fewer) = self.monitor.state.merges_to(pool) {
            return Err(format!("all {count} groups are clean, and are not merged to {fewer}"));
        }
        for n in self.nodes.iter_mut().filter(|n| n.core.is_some()) {
            let Some(store) = n.disk.store() else { continue };
            for (pg, meta) in
                store.pgs().map_err(|e| e.to_string())?.into_iter().filter(|(pg, _)| pg.pool == pool)
            {
                if meta.pg_count != count || pg.index >= count {
                    return Err(format!(
                        "{} has group {pg} of {} groups, there are {count}",
                        n.id, meta.pg_count
                    ));
                }
                let listed = store.list(pg, None, usize::MAX).map_err(|e| e.to_string())?;
                let foreign = |o: &ObjectId| pg_index(o.volume, o.index, count) != pg.index;
                if let Some((object, _)) = listed.into_iter().find(|(o, _)| foreign(o)) {
                    return Err(format!("{} has {object} in group {pg} of {count}", n.id));
                }
            }
        }
        Ok(())
    }

    /// Every acting member of every group holds the same, tombstones included, and misses nothing.
    pub fn compare_replicas(&mut self) -> Result<(), String> {
        self.check_division()?;
        if let Redundancy::Erasure { .. } = self.redundancy() {
            return self.compare_shards();
        }
        for (pg, record) in self.monitor.state.map.pgs.clone() {
            let mut reference: Option<(OsdId, Whole)> = None;
            for member in record.members() {
                let whole = self.whole_group(pg, member)?;
                match &reference {
                    None => reference = Some((member, whole)),
                    Some((first, r)) => same(r, &whole)
                        .map_err(|e| format!("group {pg}: {first} and {member} differ after healing: {e}"))?,
                }
            }
        }
        Ok(())
    }

    /// Every acting member of an erasure-coded group holds its shard of the same objects at the same versions. (That the
    /// shards decode is for reads without some of them to see.)
    fn compare_shards(&mut self) -> Result<(), String> {
        for (pg, record) in self.monitor.state.map.pgs.clone() {
            let mut reference: Option<(OsdId, Vec<(ObjectId, Version)>)> = None;
            for member in record.members() {
                let whole = self.whole_group(pg, member)?;
                let versions: Vec<(ObjectId, Version)> =
                    whole.iter().map(|(o, s, _)| (*o, s.pending.unwrap_or(s.version))).collect();
                match &reference {
                    None => reference = Some((member, versions)),
                    Some((first, r)) if *r == versions => _ = first,
                    Some((first, r)) => {
                        return Err(format!("group {pg}: {first} has {r:?}, {member} {versions:?}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Everything that a member holds of a group: a scrub has replaced what rotted.
    fn whole_group(&mut self, pg: PgId, member: OsdId) -> Result<Whole, String> {
        let Some(n) = self.nodes.iter_mut().find(|n| n.id == member) else {
            return Err(format!("group {pg} is clean on {member}, which does not exist"));
        };
        let store = n.disk.store().ok_or(format!("group {pg} is clean, but {member} does not run"))?;
        let missing = store.list_missing(pg, None, 10).map_err(|e| e.to_string())?;
        if !missing.is_empty() {
            return Err(format!("group {pg} is clean, but {member} misses {missing:?}"));
        }
        let mut whole = Vec::new();
        for (object, state) in store.list(pg, None, usize::MAX).map_err(|e| e.to_string())? {
            match store.read_object(pg, object) {
                Ok((_, content)) => whole.push((object, state, content)),
                Err(e) => return Err(format!("group {pg} on {member}: {e}")),
            }
        }
        Ok(whole)
    }
}

/// An object, in whichever group it is there: the OSD may not know yet that there are more.
fn object_in(
    store: &mut impl Store,
    pool: PoolId,
    object: ObjectId,
) -> Result<Option<ObjectState>, StoreError> {
    for (pg, _) in store.pgs()?.into_iter().filter(|(pg, _)| pg.pool == pool) {
        if let Some(state) = store.object(pg, object)? {
            return Ok(Some(state));
        }
    }
    Ok(None)
}

fn same(a: &Whole, b: &Whole) -> Result<(), String> {
    if a.len() != b.len() {
        return Err(format!("{} and {} objects", a.len(), b.len()));
    }
    for ((oa, sa, ca), (ob, sb, cb)) in a.iter().zip(b) {
        if (oa, sa) != (ob, sb) {
            return Err(format!("{oa} {sa:?} and {ob} {sb:?}"));
        }
        if ca != cb {
            return Err(format!("the content of {oa} at {}", sa.version));
        }
    }
    Ok(())
}
