//! What primaries report about their groups: activated, clean, cannot work with a peer.
//!
//! Every report is a compare-and-set: it counts only from the current run of the current primary and
//! for the current interval (rule P9, invariant 8).

use super::*;
use gabion_proto::limits::REBUILD_RATE_MIN;
use gabion_proto::map::{PgRecord, Redundancy};

/// A run of an OSD.
type Suspect = (OsdId, Incarnation);

impl MonitorState {
    pub(super) fn set_rebuild_rate(&mut self, bytes_per_s: u64) -> CommandResult {
        if bytes_per_s > 0 && bytes_per_s < REBUILD_RATE_MIN {
            return Err(Refusal::invalid(format!(
                "rebuilds go at {REBUILD_RATE_MIN} bytes/s at least; 0 is no limit"
            )));
        }
        if std::mem::replace(&mut self.rebuild_rate_bytes_per_s, bytes_per_s) != bytes_per_s {
            let text = match bytes_per_s {
                0 => "rebuilds: no limit".to_owned(),
                limit => format!("rebuilds: at most {limit} bytes/s at each OSD"),
            };
            self.event(EventSeverity::Ok, text);
        }
        Ok(Reply::Done)
    }

    pub(super) fn current_group(
        &self,
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
    ) -> Result<&PgRecord, Refusal> {
        let record = self.map.pgs.get(&pg);
        let record = record.ok_or_else(|| Refusal::aborted(format!("there is no group {pg}")))?;
        if record.interval != interval {
            return Err(Refusal::aborted(format!(
                "group {pg} is in interval {}, not {interval}",
                record.interval
            )));
        }
        let current = self.map.up_osd(osd).is_some_and(|o| o.incarnation == incarnation);
        if record.primary != Some(osd) || !current {
            return Err(Refusal::aborted(format!("{osd} ({incarnation}) is not the primary of group {pg}")));
        }
        Ok(record)
    }

    fn record(&mut self, pg: PgId, change: impl FnOnce(&mut PgRecord)) {
        self.bump(|map| {
            if let Some(record) = map.pgs.get_mut(&pg) {
                change(record);
            }
        });
    }

    pub(super) fn pg_activated(
        &mut self,
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
    ) -> CommandResult {
        let record = self.current_group(osd, incarnation, pg, interval)?;
        let have = record.members().count();
        let need = self.map.pools.get(&pg.pool).map_or(u32::MAX, |p| p.min_size) as usize;
        if have < need {
            return Err(Refusal::precondition(format!("group {pg} needs {need} members and has {have}")));
        }
        if !record.activated {
            self.record(pg, |r| r.activated = true);
        }
        Ok(Reply::Done)
    }

    pub(super) fn pg_clean(
        &mut self,
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
    ) -> CommandResult {
        let record = self.current_group(osd, incarnation, pg, interval)?;
        if !record.activated {
            return Err(Refusal::precondition(format!("group {pg} was not activated in {interval}")));
        }
        if !record.clean {
            self.record(pg, |r| {
                r.clean = true;
                r.past.clear();
            });
            // Positions of an erasure-coded group that stayed empty until now, see `intervals`.
            let pool = self.map.pools.get(&pg.pool);
            let coded = pool.is_some_and(|p| matches!(p.redundancy, Redundancy::Erasure { .. }));
            let held_back = self.map.pgs.get(&pg).filter(|_| coded).is_some_and(|r| {
                r.up.iter().zip(&r.acting).any(|(up, acting)| up != acting && self.map.up_osd(*up).is_some())
            });
            if held_back {
                self.change_groups(false, |_| {});
            }
            self.merge_on(pg.pool);
            self.place_divided(pg.pool);
        }
        Ok(Reply::Done)
    }

    /// A group that has too few members to serve, and as many as decode, has brought them up to date: an OSD that is held back for
    /// a shard which one of them has now may take another place.
    pub(super) fn pg_filled(
        &mut self,
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
    ) -> CommandResult {
        let record = self.current_group(osd, incarnation, pg, interval)?;
        let redundancy = self.map.pools.get(&pg.pool).map(|p| p.redundancy);
        let Some(Redundancy::Erasure { k, .. }) = redundancy else {
            return Err(Refusal::precondition(format!("group {pg} keeps whole copies")));
        };
        if record.activated {
            return Err(Refusal::precondition(format!("group {pg} serves in {interval}")));
        }
        let have = record.members().count();
        if have < k as usize {
            return Err(Refusal::precondition(format!(
                "{have} shards of group {pg} are not all, {k} would be"
            )));
        }
        let mut filled = PgRecord::clone(record);
        let mut released: Vec<OsdId> = record.held_back().filter(|o| self.map.up_osd(*o).is_some()).collect();
        released.retain(|o| intervals::stand_in_for(&mut filled, *o));
        if released.is_empty() {
            return Ok(Reply::Done);
        }
        self.change_groups(false, |map| {
            map.pgs.insert(pg, filled.into());
        });
        let names = released.iter().map(OsdId::to_string).collect::<Vec<_>>().join(", ");
        let text = format!(
            "group {pg} has too few members, all of them up to date: {names} may fill an empty place"
        );
        self.event(EventSeverity::Ok, text);
        Ok(Reply::Done)
    }

    pub(super) fn suspect_peer(
        &mut self,
        osd: OsdId,
        incarnation: Incarnation,
        pg: PgId,
        interval: Epoch,
        peer: OsdId,
        peer_incarnation: Incarnation,
    ) -> CommandResult {
        let record = self.current_group(osd, incarnation, pg, interval)?;
        if !record.acting.contains(&peer) {
            return Err(Refusal::aborted(format!("{peer} is not a peer of {osd} in group {pg}")));
        }
        if self.map.up_osd(peer).is_none_or(|o| o.incarnation != peer_incarnation) {
            return Err(Refusal::aborted(format!("{peer} is not up as {peer_incarnation}")));
        }
        if peer == osd && !self.goes_on_without(pg, &BTreeSet::from([(osd, incarnation)])) {
            self.change_groups(false, |map| {
                let epoch = map.epoch.next();
                if let Some(record) = map.pgs.get_mut(&pg) {
                    intervals::begin_again(record, epoch);
                }
            });
            let text = format!("group {pg} begins anew, at the request of its primary {osd}");
            self.event(EventSeverity::Warn, text);
            return Ok(Reply::Done);
        }
        let suspects = self.blame(pg, (osd, incarnation), (peer, peer_incarnation));
        let blames_itself = suspects.contains(&(osd, incarnation));
        self.suspects.insert(pg, suspects);
        self.change_groups(false, |_| {});
        self.event(
            EventSeverity::Warn,
            match (peer == osd, blames_itself) {
                (true, _) => format!("group {pg} goes on without its primary {osd}, at its own request"),
                (_, true) => format!(
                    "group {pg} goes on without its primary {osd}: it cannot work with {peer} and others"
                ),
                _ => format!("group {pg} goes on without {peer}: {osd} cannot work with it"),
            },
        );
        Ok(Reply::Done)
    }

    /// Whom the group goes on without after `accuser`, its primary, accused `peer`. Normally that is the peer, in addition
    /// to those left out already. It is the accuser alone when others suspect it, too, or when too few would
    /// be left: one that has lost its network accuses everybody, one after the other.
    fn blame(&self, pg: PgId, accuser: Suspect, peer: Suspect) -> BTreeSet<Suspect> {
        let mut all = self.suspects.get(&pg).cloned().unwrap_or_default();
        all.insert(peer);
        let alone = BTreeSet::from([accuser]);
        let enough = |suspects| self.goes_on_without(pg, suspects);
        let elsewhere = |who| self.suspects.iter().any(|(other, s)| *other != pg && s.contains(&who));
        let doubtful = !enough(&all) || (elsewhere(accuser) && !elsewhere(peer));
        if doubtful && enough(&alone) { alone } else { all }
    }

    /// Whether a group has enough members without these.
    fn goes_on_without(&self, pg: PgId, suspects: &BTreeSet<Suspect>) -> bool {
        let (Some(record), Some(pool)) = (self.map.pgs.get(&pg), self.map.pools.get(&pg.pool)) else {
            return false;
        };
        intervals::serving(record, &self.map.osds, suspects) >= pool.min_size as usize
    }

    pub(super) fn clear_suspect(&mut self, pg: PgId, peer: OsdId, incarnation: Incarnation) -> CommandResult {
        let known = self.suspects.get_mut(&pg).is_some_and(|s| s.remove(&(peer, incarnation)));
        if known {
            self.change_groups(false, |_| {});
            self.event(EventSeverity::Ok, format!("group {pg} tries {peer} again"));
        }
        Ok(Reply::Done)
    }
}
