//! Health: each problem with a stable code, one sentence on what is wrong and one on what to do.

use super::monitors::Quorum;
use super::volatile::{GROUP_OBJECTS_MAX, Volatile};
use super::{slow, view};
use crate::state::MonitorState;
use gabion_proto::ids::*;
use gabion_proto::limits::{FULL_FREE_PERCENT, NEARFULL_FREE_PERCENT};
use gabion_proto::map::PgRecord;
use gabion_proto::pb::{HealthCheck, HealthReport, OsdDetail, Severity};

/// Things that one check lists at most.
const DETAILS_MAX: usize = 100;

fn check(
    code: &str,
    severity: Severity,
    what: &str,
    remedy: &str,
    mut details: Vec<String>,
) -> Option<HealthCheck> {
    let count = details.len();
    if count == 0 {
        return None;
    }
    if count > DETAILS_MAX {
        details.truncate(DETAILS_MAX);
        details.push(format!("and {} more", count - DETAILS_MAX));
    }
    Some(HealthCheck {
        code: code.into(),
        severity: severity as i32,
        summary: what.replace("{n}", &count.to_string()),
        remedy: remedy.into(),
        details,
    })
}

/// Why a group serves nothing.
fn why_inactive(
    state: &MonitorState,
    volatile: &Volatile,
    id: PgId,
    record: &PgRecord,
    words: &str,
) -> String {
    let need = state.map.pools.get(&id.pool).map_or(0, |p| p.min_size) as usize;
    let have = record.members().count();
    if have < need {
        let missing: Vec<String> = record
            .up
            .iter()
            .filter(|o| **o != OsdId::NONE && !record.acting.contains(o))
            .map(|o| match state.map.up_osd(*o) {
                None => format!("{o} down"),
                Some(_) => format!("{o} left out because its peers cannot work with it"),
            })
            .collect();
        let missing = match missing.is_empty() {
            true => "no other OSD can take it".into(),
            false => missing.join(", "),
        };
        return format!("group {id} needs {need} members, has {have}: {missing}");
    }
    let waiting = volatile.pgs.get(&id).map(|s| s.waiting_for.as_str()).unwrap_or_default();
    match waiting.is_empty() {
        true => format!("group {id} is {words}"),
        false => format!("group {id} is {words}: waits for {waiting}"),
    }
}

/// Percent of an OSD that is free; `None` when it has not said.
fn free_percent(o: &OsdDetail) -> Option<u64> {
    let free = o.capacity_bytes.checked_sub(o.used_bytes)?;
    (o.capacity_bytes > 0).then(|| (u128::from(free) * 100 / u128::from(o.capacity_bytes)) as u64)
}

pub(super) fn report(state: &MonitorState, volatile: &Volatile, quorum: &Quorum) -> HealthReport {
    use Severity::{Error, Ok as Info, Warn};
    let osds = view::osds(state, volatile);
    let of = |pick: &dyn Fn(&OsdDetail) -> Option<String>| osds.iter().filter_map(pick).collect::<Vec<_>>();

    let (mut inactive, mut degraded, mut undersized, mut unfound) = (vec![], vec![], vec![], vec![]);
    let (mut damaged, mut late) = (vec![], vec![]);
    let mut damaged_objects = 0;
    let mut large = vec![];
    let unix_ms = view::unix_ms();
    for (id, record) in &state.map.pgs {
        let (words, status) = view::pg_state(state, volatile, *id, record);
        let width = state.map.pools.get(&id.pool).map_or(0, |p| p.redundancy.width());
        if !words.starts_with("active") && words != "unknown" {
            inactive.push(why_inactive(state, volatile, *id, record, words));
        } else if words != "active+clean" && words != "unknown" {
            let missing = status.map_or(0, |s| s.degraded_objects);
            degraded.push(format!("group {id} is {words}, {missing} objects lack copies"));
        }
        let places = record.up.iter().filter(|o| **o != OsdId::NONE).count();
        if places < width {
            undersized.push(format!("group {id} has {places} of {width} places"));
        }
        let (count, named) = view::damaged(state, volatile, *id);
        damaged_objects += count;
        damaged.extend(named.into_iter().map(|words| format!("group {id}: {words}")));
        if state.scrubs.get(id).is_some_and(|r| r.is_late(&state.scrub_settings, unix_ms)) {
            late.push(format!("group {id}"));
        }
        if let Some(n) = status.map(|s| s.objects).filter(|n| *n > GROUP_OBJECTS_MAX) {
            large.push(format!("group {id}: {n} objects"));
        }
        if let Some(n) = status.map(|s| s.unfound_objects).filter(|n| *n > 0) {
            unfound.push(format!("group {id}: {n} objects"));
        }
    }

    // A pool fills when the fullest OSD that it uses does.
    let nearfull: Vec<u32> = osds
        .iter()
        .filter(|o| free_percent(o).is_some_and(|f| f < NEARFULL_FREE_PERCENT))
        .map(|o| o.id)
        .collect();
    let pools = state.map.pools.iter().filter(|(id, _)| {
        let mut groups = state.map.pgs.iter().filter(|(pg, _)| pg.pool == **id);
        groups.any(|(_, r)| r.up.iter().any(|o| nearfull.contains(&o.0)))
    });
    let full_pools = pools.map(|(_, p)| format!("pool {}", p.name)).collect();

    let free = |low: u64, high: u64| {
        move |o: &OsdDetail| {
            let free = free_percent(o).filter(|f| (low..high).contains(f))?;
            Some(format!("osd.{} has {free}% free", o.id))
        }
    };
    let down = quorum.members.iter().filter(|m| !m.up).map(|m| match m.error.as_str() {
        "" => format!("monitor.{} at {}", m.id, m.addr),
        why => format!("monitor.{} at {}: {why}", m.id, m.addr),
    });
    let lost = (!quorum.held).then(|| quorum.words.clone());
    let checks = [
        check(
            "MON_QUORUM_LOST",
            Error,
            "The monitors have no quorum: nothing can be changed and I/O waits; all else here is what was last known",
            "Start the monitors that are down.",
            lost.into_iter().collect(),
        ),
        check(
            "MON_DOWN",
            Warn,
            "{n} monitors are down",
            "Start the daemon, or remove the monitor and add another one before a second one fails.",
            down.collect(),
        ),
        check(
            "OSD_FATAL",
            Error,
            "{n} OSDs stopped because of their disk",
            "Replace the disk, then take the OSD out and remove it.",
            of(&|o| (!o.fatal.is_empty()).then(|| format!("osd.{}: {}", o.id, o.fatal))),
        ),
        check(
            "OBJECT_UNFOUND",
            Error,
            "{n} groups have objects of which no copy can be reached",
            "Bring back the OSDs that are down: one of them holds the newest copy.",
            unfound,
        ),
        check(
            "OBJECT_DAMAGED",
            Error,
            &format!(
                "Scrubs and reads found {damaged_objects} objects without a good copy: what cannot be read fails with EIO"
            ),
            "Restore or rewrite what is lost, for instance from a snapshot or a backup; then `gabion scrub start --deep` looks again.",
            damaged,
        ),
        check(
            "PG_LARGE",
            Warn,
            &format!(
                "{{n}} groups have more than {GROUP_OBJECTS_MAX} objects: with several times as many they could not be rebuilt"
            ),
            "Give their pool more groups: `gabion pool set --pgs`.",
            large,
        ),
        check(
            "PG_INACTIVE",
            Error,
            "{n} groups serve nothing, so I/O to their volumes waits",
            "Start the OSDs that are down, or add some if too few are left.",
            inactive,
        ),
        check(
            "OSD_FULL",
            Error,
            "{n} OSDs are full and refuse writes",
            "Add OSDs or remove volumes.",
            of(&free(0, FULL_FREE_PERCENT)),
        ),
        check(
            "OSD_DOWN",
            Warn,
            "{n} OSDs are down",
            "Look at the daemon and its host; after a while it is taken out and its data rebuilt elsewhere.",
            of(&|o| (!o.up && o.r#in).then(|| format!("osd.{} on host {}", o.id, o.host))),
        ),
        check(
            "OSD_SLOW",
            Warn,
            "{n} OSDs answer much slower than the others",
            "Look at the disk and the network of their host; `gabion osd out` moves the data away, `gabion osd slow-policy` lets the cluster do it.",
            volatile.slow.iter().map(|s| slow::words(state, s)).collect(),
        ),
        check(
            "PG_DEGRADED",
            Warn,
            "{n} groups have fewer copies than they should",
            "Nothing, while a rebuild runs; otherwise start or replace the OSDs that are down.",
            degraded,
        ),
        check(
            "PG_UNDERSIZED",
            Warn,
            "{n} groups have too few places for their copies",
            "Add OSDs in more failure domains, or make the pool with fewer copies.",
            undersized,
        ),
        check(
            "PG_NOT_SCRUBBED",
            Warn,
            "{n} groups were not read as a whole for twice the deep scrub interval",
            "Look at `gabion scrub status`: groups that are not clean are not scrubbed, and `gabion scrub set --max-rate` may be too low.",
            late,
        ),
        check(
            "OSD_NEARFULL",
            Warn,
            "{n} OSDs are nearly full",
            "Add OSDs or remove volumes before writes are refused.",
            of(&free(FULL_FREE_PERCENT, NEARFULL_FREE_PERCENT)),
        ),
        check(
            "POOL_NEARFULL",
            Warn,
            "{n} pools use OSDs that are nearly full",
            "Add OSDs or remove volumes: volumes promise more than there may be room for.",
            full_pools,
        ),
        check(
            "OSD_OUT",
            Info,
            "{n} OSDs are out",
            "Remove them when the rebuild is done, or take them in again.",
            of(&|o| {
                let slow = state.osd_flags.get(&OsdId(o.id)).is_some_and(|f| f.slow_out);
                let why = if slow { ", because it was slow" } else { "" };
                (!o.r#in && o.incarnation > 0).then(|| format!("osd.{} on host {}{why}", o.id, o.host))
            }),
        ),
    ];
    let checks: Vec<HealthCheck> = checks.into_iter().flatten().collect();
    let severity = checks.iter().map(|c| c.severity).max().unwrap_or(Info as i32);
    HealthReport { severity, checks }
}
