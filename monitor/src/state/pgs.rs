//! What primaries report about their groups: activated, clean, cannot work with a peer.
//!
//! Every report is a compare-and-set: it counts only from the current run of the current primary and
//! for the current interval (rule P9, invariant 8).

use super::*;
use gabion_proto::map::PgRecord;

impl MonitorState {
    fn current_group(
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
        }
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
        if peer == osd || !record.acting.contains(&peer) {
            return Err(Refusal::aborted(format!("{peer} is not a peer of {osd} in group {pg}")));
        }
        if self.map.up_osd(peer).is_none_or(|o| o.incarnation != peer_incarnation) {
            return Err(Refusal::aborted(format!("{peer} is not up as {peer_incarnation}")));
        }
        self.suspects.entry(pg).or_default().insert((peer, peer_incarnation));
        self.change_groups(false, |_| {});
        self.event(
            EventSeverity::Warn,
            format!("group {pg} goes on without {peer}: {osd} cannot work with it"),
        );
        Ok(Reply::Done)
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
