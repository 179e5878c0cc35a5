//! Peering of many groups with many objects: the OSDs' cores and the monitors' state as the daemons run them, over indexes
//! in memory, in virtual time, without sockets. What it shows is CPU, memory, messages and what waits for what; not disks.

mod spent;
mod store;
mod world;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use clap::Args;
use gabion_monitor::state::{Command, Reply};
use gabion_osd::core::ClientToken;
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use gabion_proto::limits::{FRAME_META_BYTES_MAX, OBJECT_BYTES_DEFAULT};
use gabion_proto::map::{FailureDomain, PgRecord, Redundancy};
use gabion_proto::msg::{ClientOp, OpKind, OpReply};
use gabion_proto::pb::PgState;
use gabion_proto::placement::pg_index;

use crate::resident;
use spent::{Spent, Work};
use store::{Laid, block};
use world::{Agreement, Traffic, World};

/// Of one volume: a TiB.
const VOLUME_OBJECTS: u32 = 262_144;
/// Virtual time after which a phase has failed.
const PATIENCE_MS: u64 = 3_600_000;
/// Of virtual time in which nothing happens.
const IDLE_MS: u64 = 10_000;

#[derive(Args, Clone, Debug)]
pub struct PeeringOptions {
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub groups: u32,
    /// In all groups together.
    #[arg(long, default_value_t = 10_000_000)]
    pub objects: u64,
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub osds: u32,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=8))]
    pub replicas: u32,
    /// Virtual milliseconds that the monitors need to agree on something.
    #[arg(long, default_value_t = 2)]
    pub commit_ms: u64,
    /// Reports that the monitors agree on at once; 1 shows what it would be without.
    #[arg(long, default_value_t = 1024)]
    pub batch: usize,
}

/// One thing that happened to the cluster, and what it took until all groups were as they should be.
#[derive(Clone, Debug)]
pub struct Phase {
    pub what: &'static str,
    /// Groups that began a new interval.
    pub groups: usize,
    /// Virtual time until all of them served, and until nothing was missing.
    pub active_ms: u64,
    pub clean_ms: u64,
    pub traffic: Traffic,
    pub osds: Spent,
    /// Of the OSD that needed most.
    pub busiest_osd_s: f64,
    pub monitor: Spent,
    /// Of the whole process, at the end and at most.
    pub resident_bytes: u64,
    pub peak_bytes: u64,
}

/// All that was measured; what should not be is an error instead.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub phases: Vec<Phase>,
    /// Resident with all groups loaded, less what was there before, by copy of an object.
    pub bytes_per_copy: f64,
    /// Seconds of CPU that one OSD needs in a second in which nothing happens: ticks, heartbeats.
    pub idle: Spent,
    pub copies: u64,
    /// Objects that were written while an OSD was away, and copied to it.
    pub written: u64,
    pub recovered: u64,
}

struct Bench {
    world: World,
    pool: PoolId,
    volumes: Vec<(VolumeId, Generation)>,
    client: (ClientId, Session),
    objects: Vec<Arc<[ObjectId]>>,
}

/// As it was before a phase.
struct Before {
    now: u64,
    traffic: Traffic,
    osds: Vec<Spent>,
    monitor: Spent,
    intervals: Vec<Epoch>,
}

impl Bench {
    fn records(&self) -> impl Iterator<Item = (&PgId, &PgRecord)> {
        self.world.monitor.map.pgs.iter().map(|(pg, record)| (pg, &**record))
    }

    fn before(&self) -> Before {
        resident::forget_peak();
        Before {
            now: self.world.now,
            traffic: self.world.traffic,
            osds: self.world.osds.iter().map(|o| o.spent).collect(),
            monitor: self.world.monitor_spent,
            intervals: self.records().map(|(_, r)| r.interval).collect(),
        }
    }

    /// Waits until every group serves and, if it has all members, is clean.
    fn settle(&mut self, what: &'static str, before: Before, width: usize) -> Result<Phase> {
        self.world.until(what, PATIENCE_MS, |w| w.monitor.map.pgs.values().all(|r| r.activated))?;
        let active_ms = self.world.now - before.now;
        self.world.until(what, PATIENCE_MS, |w| {
            w.monitor.map.pgs.values().all(|r| r.clean && r.activated) && served(w, width)
        })?;
        let w = &self.world;
        let spent: Vec<Spent> = w.osds.iter().zip(&before.osds).map(|(o, b)| o.spent.less(b)).collect();
        let mut osds = Spent::default();
        spent.iter().for_each(|s| osds.add(s));
        let begun = w.monitor.map.pgs.values().map(|r| r.interval);
        let old = before.intervals.iter().copied().map(Some).chain(std::iter::repeat(None));
        Ok(Phase {
            what,
            groups: begun.zip(old).filter(|(new, old)| Some(*new) != *old).count(),
            active_ms,
            clean_ms: w.now - before.now,
            traffic: w.traffic.less(&before.traffic),
            osds,
            busiest_osd_s: spent.iter().map(Spent::total_s).fold(0.0, f64::max),
            monitor: w.monitor_spent.less(&before.monitor),
            resident_bytes: resident::now_bytes()?,
            peak_bytes: resident::peak_bytes()?,
        })
    }
}

/// What the primaries themselves say: all of their groups serve, with nothing missing.
fn served(w: &World, width: usize) -> bool {
    let mut led = 0;
    for osd in 0..w.osds.len() {
        let Some(core) = w.core(osd) else { continue };
        for s in core.pg_statuses() {
            let id = PgId { pool: PoolId(s.pool), index: s.index };
            let whole = w.monitor.map.pgs.get(&id).is_some_and(|r| r.members().count() == width);
            let wanted = if whole { PgState::ActiveClean } else { PgState::ActiveDegraded };
            if s.state() != wanted || s.unfound_objects > 0 {
                return false;
            }
            led += 1;
        }
    }
    led == w.monitor.map.pgs.len()
}

/// Objects of whole volumes by group, in order.
fn laid_out(volumes: &[VolumeId], objects: u64, groups: u32) -> Vec<Arc<[ObjectId]>> {
    let mut by_group = vec![Vec::new(); groups as usize];
    let mut left = objects;
    for volume in volumes {
        for index in 0..VOLUME_OBJECTS.min(left.min(u64::from(u32::MAX)) as u32) {
            let object = ObjectId { volume: *volume, index, layer: LayerId(0) };
            by_group[pg_index(*volume, index, groups) as usize].push(object);
            left -= 1;
        }
    }
    by_group.into_iter().map(Arc::from).collect()
}

fn bench(o: &PeeringOptions) -> Result<Bench> {
    let mut world = World::new(Agreement { commit_ms: o.commit_ms, batch: o.batch });
    world.agree_on(Command::Bootstrap { cluster: ClusterId([9; 16]) })?;
    for _ in 0..o.osds {
        world.add_osd()?;
    }
    world.boot(&(0..o.osds as usize).collect::<Vec<_>>())?;
    let created = world.agree_on(Command::CreatePool {
        name: "p".into(),
        redundancy: Redundancy::Replicated { size: o.replicas },
        min_size: 0,
        failure_domain: FailureDomain::Osd,
        pg_count: o.groups,
        object_bytes: OBJECT_BYTES_DEFAULT,
    })?;
    let Reply::Pool(pool) = created else { bail!("a pool was made and has no number") };
    let opened = world.agree_on(Command::OpenSession { client: ClientId(0), host: "h".into() })?;
    let Reply::Session { client, session } = opened else { bail!("a session has no number") };
    let mut volumes = Vec::new();
    for n in 0..o.objects.div_ceil(u64::from(VOLUME_OBJECTS)) {
        let name = format!("v{n}");
        let size_bytes = u64::from(VOLUME_OBJECTS) * u64::from(OBJECT_BYTES_DEFAULT);
        world.agree_on(Command::CreateVolume { name: name.clone(), pool: "p".into(), size_bytes })?;
        let attach = Command::AttachVolume { volume: name, client, session, take_over: false };
        let Reply::Attached { volume, generation, .. } = world.agree_on(attach)? else {
            bail!("not attached")
        };
        volumes.push((volume, generation));
    }
    let ids: Vec<VolumeId> = volumes.iter().map(|(v, _)| *v).collect();
    let objects = laid_out(&ids, o.objects, o.groups);
    Ok(Bench { world, pool, volumes, client: (client, session), objects })
}

impl Bench {
    /// As if clients had written all objects, each once, and then the power failed everywhere.
    fn lay_and_stop(&mut self) -> Result<u64> {
        let mut copies = 0;
        for (index, objects) in (0..).zip(&self.objects) {
            let pg = PgId { pool: self.pool, index };
            let Some(record) = self.world.monitor.map.pgs.get(&pg).cloned() else { bail!("no group {pg}") };
            let Some(version) = Version::new(record.interval, 1) else { bail!("too many epochs") };
            for member in record.members() {
                let osd = self.world.osds.iter_mut().find(|o| o.id == member);
                let Some(osd) = osd else { bail!("no {member}") };
                osd.store.lay(pg, Laid { version, objects: objects.clone() });
                copies += objects.len() as u64;
            }
        }
        for osd in 0..self.world.osds.len() {
            self.world.kill(osd);
        }
        for osd in 0..self.world.osds.len() {
            self.world.mark_down(osd)?;
        }
        Ok(copies)
    }

    /// Writes one object of each group that lacks a member.
    fn write_degraded(&mut self, width: usize) -> Result<u64> {
        let mut wanted = BTreeMap::new();
        let degraded: Vec<(PgId, PgRecord)> = self
            .records()
            .filter(|(_, r)| r.members().count() < width)
            .map(|(p, r)| (*p, r.clone()))
            .collect();
        for (n, (pg, record)) in (0..).zip(degraded) {
            let Some(object) = self.objects[pg.index as usize].first().copied() else { continue };
            let attached = self.volumes.iter().find(|(v, _)| *v == object.volume);
            let Some((volume, generation)) = attached.copied() else { bail!("no volume of {object}") };
            let content = Content::data(0, block());
            let op = ClientOp {
                epoch: self.world.monitor.map.epoch,
                pg,
                client: self.client.0,
                session: self.client.1,
                generation,
                volume,
                object,
                kind: OpKind::Write { extents: content.extents },
            };
            let primary = self.world.osds.iter().position(|o| Some(o.id) == record.primary);
            let Some(primary) = primary else { bail!("group {pg} has no primary") };
            self.world.client(primary, ClientToken(n), op, content.data);
            wanted.insert(ClientToken(n), pg);
        }
        self.world.pass(1_000)?;
        for (token, pg) in &wanted {
            let reply = self.world.replies.get(token);
            ensure!(
                matches!(reply, Some(OpReply::Done { .. })),
                "a write to group {pg} was answered {reply:?}"
            );
        }
        Ok(wanted.len() as u64)
    }

    /// Every copy that should be there is, at one version with its fellows.
    fn count_copies(&self) -> Result<u64> {
        let mut copies = 0;
        for (pg, record) in self.records() {
            let mut first = None;
            for member in record.members() {
                let Some(osd) = self.world.osds.iter().find(|o| o.id == member) else { bail!("no {member}") };
                let listing = osd.store.list(*pg);
                ensure!(listing.missing.is_empty(), "group {pg}: {member} lacks {:?}", listing.missing);
                copies += listing.objects.len() as u64;
                let first = first.get_or_insert_with(|| listing.objects.clone());
                ensure!(*first == listing.objects, "group {pg}: {member} is otherwise than the first member");
            }
        }
        Ok(copies)
    }

    fn recovered(&self) -> u64 {
        (0..self.world.osds.len())
            .filter_map(|o| self.world.core(o))
            .map(|c| c.stats().recovered_objects)
            .sum()
    }
}

/// Runs all phases; each is told to `told` when it has ended.
pub fn measure(o: &PeeringOptions, mut told: impl FnMut(&Phase) -> Result<()>) -> Result<Outcome> {
    ensure!(
        o.osds > o.replicas,
        "{} copies need more than {} OSDs, so that one can be lost",
        o.replicas,
        o.osds
    );
    ensure!(o.batch > 0, "the monitors agree on one report at least");
    let width = o.replicas as usize;
    let mut phases = Vec::new();
    let mut phase = |b: &mut Bench, what, before| -> Result<()> {
        let p = b.settle(what, before, width)?;
        told(&p)?;
        phases.push(p);
        Ok(())
    };
    let mut b = bench(o)?;
    let before = Before { intervals: Vec::new(), ..b.before() };
    phase(&mut b, "made, empty", before)?;
    let copies = b.lay_and_stop()?;
    let resident_before = resident::now_bytes()?;
    let before = b.before();
    b.world.boot(&(0..o.osds as usize).collect::<Vec<_>>())?;
    phase(&mut b, "power comes back", before)?;
    let grown = resident::now_bytes()?.saturating_sub(resident_before);

    let before = b.before();
    b.world.pass(IDLE_MS)?;
    let mut idle = Spent::default();
    b.world.osds.iter().zip(&before.osds).for_each(|(o, b)| idle.add(&o.spent.less(b)));
    let idle = idle.by(f64::from(o.osds) * IDLE_MS as f64 / 1e3);

    let before = b.before();
    b.world.kill(0);
    b.world.mark_down(0)?;
    phase(&mut b, "an OSD is lost", before)?;
    let written = b.write_degraded(width)?;
    let before = b.before();
    let recovered = b.recovered();
    b.world.boot(&[0])?;
    phase(&mut b, "it comes back", before)?;
    let recovered = b.recovered() - recovered;
    let found = b.count_copies()?;
    ensure!(found == copies, "{found} copies are there, not {copies}");
    let bytes_per_copy = grown as f64 / copies.max(1) as f64;
    Ok(Outcome { phases, bytes_per_copy, idle, copies, written, recovered })
}

const MIB: f64 = (1 << 20) as f64;

fn line(p: &Phase, osds: u32, out: &mut impl Write) -> Result<()> {
    let t = &p.traffic;
    writeln!(
        out,
        "{}: {} groups serve after {:.2} s and are clean after {:.2} s of virtual time\n  \
         OSDs {:.2} s of CPU (busiest {:.2} s; {}), monitor {:.2} s\n  \
         {} messages, {:.1} MiB, longest {} bytes of at most {FRAME_META_BYTES_MAX}; {} reports, {} commits, {} epochs, maps {:.1} MiB\n  \
         resident {:.0} MiB, at most {:.0} MiB: {:.0} and {:.0} MiB an OSD",
        p.what,
        p.groups,
        p.active_ms as f64 / 1e3,
        p.clean_ms as f64 / 1e3,
        p.osds.total_s(),
        p.busiest_osd_s,
        parts(&p.osds),
        p.monitor.total_s(),
        t.messages,
        t.bytes as f64 / MIB,
        t.longest_meta_bytes,
        t.reports,
        t.commits,
        t.epochs,
        t.map_bytes as f64 / MIB,
        p.resident_bytes as f64 / MIB,
        p.peak_bytes as f64 / MIB,
        p.resident_bytes as f64 / MIB / f64::from(osds),
        p.peak_bytes as f64 / MIB / f64::from(osds),
    )?;
    Ok(out.flush()?)
}

fn parts(spent: &Spent) -> String {
    let part = |w: &Work| format!("{} {:.2}", format!("{w:?}").to_lowercase(), spent.s(*w));
    Work::ALL.iter().filter(|w| **w != Work::Agree).map(part).collect::<Vec<_>>().join(", ")
}

pub fn run(o: &PeeringOptions, out: &mut impl Write) -> Result<()> {
    writeln!(
        out,
        "# {} groups, {} objects, {} OSDs, {} copies; the monitors take {} ms for {} reports at once",
        o.groups, o.objects, o.osds, o.replicas, o.commit_ms, o.batch
    )?;
    let outcome = measure(o, |p| line(p, o.osds, out))?;
    let i = &outcome.idle;
    writeln!(
        out,
        "idle: {:.3} % of a core for each OSD (ticks {:.3} %, heartbeats {:.3} %)\n\
         {} copies of objects, {:.0} bytes of memory each; {} were written while the OSD was away, {} copied to it",
        i.total_s() * 100.0,
        i.s(Work::Ticks) * 100.0,
        i.s(Work::Heartbeats) * 100.0,
        outcome.copies,
        outcome.bytes_per_copy,
        outcome.written,
        outcome.recovered
    )?;
    Ok(())
}

#[cfg(test)]
mod tests;
