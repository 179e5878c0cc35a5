//! OSDs: registered, booted, down, out, in, removed.

use super::*;
use gabion_proto::limits::{OSDS_MAX, valid_name};
use gabion_proto::map::{OsdInfo, Redundancy};
use std::net::SocketAddr;

/// Weight of one TiB.
const WEIGHT_UNIT: u128 = 65_536;
/// 65,536 units: a disk of 64 PiB.
const WEIGHT_MAX: u32 = u32::MAX;

fn check_place(host: &str, rack: &str) -> Result<(), Refusal> {
    if !valid_name(host) {
        return Err(Refusal::invalid(format!("{host:?} cannot be the name of a host")));
    }
    if !rack.is_empty() && !valid_name(rack) {
        return Err(Refusal::invalid(format!("{rack:?} cannot be the name of a rack")));
    }
    Ok(())
}

fn no_osd(osd: OsdId) -> Refusal {
    Refusal::not_found(format!("there is no {osd}"))
}

impl MonitorState {
    pub(super) fn osd(&self, osd: OsdId) -> Result<&OsdInfo, Refusal> {
        self.map.osds.get(&osd).ok_or_else(|| no_osd(osd))
    }

    pub(super) fn add_osd(
        &mut self,
        disk: ClusterId,
        host: String,
        rack: String,
        weight: u32,
        capacity_bytes: u64,
    ) -> CommandResult {
        if let Some((id, _)) = self.map.osds.iter().find(|(_, o)| o.disk == disk) {
            return Ok(Reply::Osd(*id));
        }
        check_place(&host, &rack)?;
        if self.map.osds.len() >= OSDS_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {OSDS_MAX} OSDs")));
        }
        let weight = match weight {
            0 => {
                let units = (u128::from(capacity_bytes) * WEIGHT_UNIT) >> 40;
                units.clamp(1, u128::from(WEIGHT_MAX)) as u32
            }
            given => given,
        };
        let id = OsdId(self.counters.osd);
        self.counters.osd += 1;
        self.event(EventSeverity::Ok, format!("{id} was added on host {host}"));
        let info = OsdInfo {
            host,
            rack,
            addr: String::new(),
            weight,
            up: false,
            // It gets data when it first boots, not while it is only a promise.
            in_cluster: false,
            incarnation: Incarnation(0),
            disk,
            capacity_bytes,
        };
        self.osd_flags.insert(id, OsdFlags { automatic_out: true, slow_out: false });
        self.bump(|map| {
            map.osds.insert(id, info);
        });
        Ok(Reply::Osd(id))
    }

    pub(super) fn boot_osd(
        &mut self,
        osd: OsdId,
        disk: ClusterId,
        addr: String,
        host: String,
        rack: String,
        capacity_bytes: u64,
    ) -> CommandResult {
        let info = self.osd(osd)?;
        if info.disk != disk {
            return Err(Refusal::precondition(format!(
                "{osd} is another disk: it is {}, not {disk}",
                info.disk
            )));
        }
        check_place(&host, &rack)?;
        if !addr.parse::<SocketAddr>().is_ok_and(|a| a.port() != 0) {
            return Err(Refusal::invalid(format!("{addr:?} is not an address of the form ip:port")));
        }
        let back_in = self.osd_flags.get(&osd).is_some_and(|f| f.automatic_out);
        let placement = back_in || info.host != host || info.rack != rack;
        self.osd_flags.entry(osd).or_default().automatic_out = false;
        self.counters.incarnation += 1;
        let incarnation = Incarnation(self.counters.incarnation);
        self.change_groups(placement, |map| {
            if let Some(info) = map.osds.get_mut(&osd) {
                *info = OsdInfo {
                    addr,
                    host,
                    rack,
                    up: true,
                    in_cluster: info.in_cluster || back_in,
                    incarnation,
                    capacity_bytes,
                    ..info.clone()
                };
            }
        });
        self.event(EventSeverity::Ok, format!("{osd} is up"));
        Ok(Reply::Booted { incarnation, epoch: self.map.epoch })
    }

    pub(super) fn mark_down(&mut self, osd: OsdId, incarnation: Incarnation, reason: &str) -> CommandResult {
        let info = self.osd(osd)?;
        if info.incarnation != incarnation {
            return Err(Refusal::aborted(format!("{osd} has booted again as {}", info.incarnation)));
        }
        if !info.up {
            return Ok(Reply::Done);
        }
        self.change_groups(false, |map| {
            if let Some(info) = map.osds.get_mut(&osd) {
                info.up = false;
            }
        });
        self.event(EventSeverity::Warn, format!("{osd} is down: {reason}"));
        Ok(Reply::Done)
    }

    pub(super) fn out_osd(&mut self, osd: OsdId, automatic: bool) -> CommandResult {
        if !self.osd(osd)?.in_cluster {
            if !automatic {
                // The operator's word outlasts a boot.
                self.osd_flags.entry(osd).or_default().automatic_out = false;
            }
            return Ok(Reply::Done);
        }
        if automatic && self.osd(osd)?.up {
            return Err(Refusal::precondition(format!("{osd} is up again")));
        }
        let flags = self.osd_flags.entry(osd).or_default();
        (flags.automatic_out, flags.slow_out) = (automatic, false);
        self.change_groups(true, |map| {
            if let Some(info) = map.osds.get_mut(&osd) {
                info.in_cluster = false;
            }
        });
        let why = if automatic { ", because it was down for too long" } else { "" };
        self.event(EventSeverity::Warn, format!("{osd} is out{why}: its data moves elsewhere"));
        Ok(Reply::Done)
    }

    pub(super) fn in_osd(&mut self, osd: OsdId) -> CommandResult {
        if self.osd(osd)?.in_cluster {
            return Ok(Reply::Done);
        }
        self.osd_flags.insert(osd, OsdFlags::default());
        self.change_groups(true, |map| {
            if let Some(info) = map.osds.get_mut(&osd) {
                info.in_cluster = true;
            }
        });
        self.event(EventSeverity::Ok, format!("{osd} is in"));
        Ok(Reply::Done)
    }

    pub(super) fn reweight_osd(&mut self, osd: OsdId, weight: u32) -> CommandResult {
        if self.osd(osd)?.weight == weight {
            return Ok(Reply::Done);
        }
        self.change_groups(true, |map| {
            if let Some(info) = map.osds.get_mut(&osd) {
                info.weight = weight;
            }
        });
        self.event(
            EventSeverity::Ok,
            format!("{osd} has weight {:.3}", f64::from(weight) / WEIGHT_UNIT as f64),
        );
        Ok(Reply::Done)
    }

    pub(super) fn remove_osd(&mut self, osd: OsdId, force: bool) -> CommandResult {
        let info = self.osd(osd)?;
        if info.up {
            return Err(Refusal::precondition(format!("{osd} is up: stop it first")));
        }
        if info.in_cluster {
            return Err(Refusal::precondition(format!(
                "{osd} is in: take it out first and wait for the rebuild"
            )));
        }
        let needing = self.map.pgs.iter().find(|(_, r)| r.all_known().contains(&osd) || r.up.contains(&osd));
        if let (Some((pg, _)), false) = (needing, force) {
            return Err(Refusal::precondition(format!(
                "{osd} may hold the only newest copy of data of group {pg}: wait until the group is clean, or force it"
            )));
        }
        let lossy = needing.is_some();
        self.osd_flags.remove(&osd);
        self.change_groups(true, |map| {
            map.osds.remove(&osd);
            for (id, record) in &mut map.pgs {
                let redundancy = map.pools.get(&id.pool).map(|p| p.redundancy);
                // What cannot be read any more is lost, and nobody waits for it.
                let (coded, enough) = match redundancy {
                    Some(Redundancy::Erasure { k, .. }) => (true, k as usize),
                    _ => (false, 1),
                };
                for past in &mut record.past {
                    // A position is a shard's number: the others keep theirs.
                    past.acting.iter_mut().filter(|o| **o == osd).for_each(|o| *o = OsdId::NONE);
                    if !coded {
                        past.acting.retain(|o| *o != OsdId::NONE);
                    }
                    past.primary = past.primary.filter(|p| *p != osd);
                }
                record.past.retain(|p| p.acting.iter().filter(|o| **o != OsdId::NONE).count() >= enough);
            }
        });
        let (severity, how) = match lossy {
            true => (EventSeverity::Error, ", and its data is declared lost"),
            false => (EventSeverity::Ok, ""),
        };
        self.event(severity, format!("{osd} was removed{how}"));
        Ok(Reply::Done)
    }
}
