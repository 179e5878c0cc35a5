//! Between the native map types and their protobuf form.
//!
//! Outwards never fails. Inwards everything is checked: lengths, ranges, names, addresses,
//! duplicates, and in a whole map also that groups fit their pools. What is refused names its field
//! ([`ConvertError`]); nothing is repaired silently.

use crate::ids::*;
use crate::limits::*;
use crate::map::*;
use crate::pb;
use crate::shared::Shared;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// A field of a message from outside was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct ConvertError {
    /// Path of the field in the message, as `osds[3].addr`.
    pub field: String,
    pub problem: String,
}

impl ConvertError {
    /// `problem` with `field`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> ConvertError {
        ConvertError { field: field.into(), problem: problem.into() }
    }

    fn within(mut self, outer: &str) -> ConvertError {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

type Result<T> = std::result::Result<T, ConvertError>;

fn check(ok: bool, field: &str, problem: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(ConvertError::new(field, problem())) }
}

/// A 16-byte identity (of a cluster or a disk).
pub fn identity(field: &str, bytes: &[u8]) -> Result<ClusterId> {
    let id = <[u8; 16]>::try_from(bytes)
        .map_err(|_| ConvertError::new(field, format!("must be 16 bytes, got {}", bytes.len())))?;
    Ok(ClusterId(id))
}

/// An OSD's id; the number of a hole is refused.
pub fn osd_id(field: &str, id: u32) -> Result<OsdId> {
    check(OsdId(id) != OsdId::NONE, field, || format!("{id} cannot be the id of an OSD"))?;
    Ok(OsdId(id))
}

impl From<Redundancy> for pb::Redundancy {
    fn from(r: Redundancy) -> Self {
        let kind = match r {
            Redundancy::Replicated { size } => pb::redundancy::Kind::Replicas(size),
            Redundancy::Erasure { k, m } => pb::redundancy::Kind::Erasure(pb::ErasureCode { k, m }),
        };
        pb::Redundancy { kind: Some(kind) }
    }
}

impl TryFrom<pb::Redundancy> for Redundancy {
    type Error = ConvertError;
    fn try_from(r: pb::Redundancy) -> Result<Self> {
        match r.kind {
            None => Err(ConvertError::new("redundancy", "must name replicas or an erasure code")),
            Some(pb::redundancy::Kind::Replicas(size)) => {
                check((1..=REPLICAS_MAX).contains(&size), "replicas", || {
                    format!("must be 1 to {REPLICAS_MAX}, got {size}")
                })?;
                Ok(Redundancy::Replicated { size })
            }
            Some(pb::redundancy::Kind::Erasure(pb::ErasureCode { k, m })) => {
                let width = k.saturating_add(m);
                check(k >= 1 && m >= 1 && width <= ERASURE_WIDTH_MAX, "erasure", || {
                    format!(
                        "k and m must be at least 1 and at most {ERASURE_WIDTH_MAX} together, got {k}+{m}"
                    )
                })?;
                Ok(Redundancy::Erasure { k, m })
            }
        }
    }
}

impl From<FailureDomain> for pb::FailureDomain {
    fn from(d: FailureDomain) -> Self {
        match d {
            FailureDomain::Osd => pb::FailureDomain::Osd,
            FailureDomain::Host => pb::FailureDomain::Host,
            FailureDomain::Rack => pb::FailureDomain::Rack,
        }
    }
}

/// A failure domain from its number on the wire; `Unspecified` is `None`.
pub fn failure_domain(number: i32) -> Result<Option<FailureDomain>> {
    match pb::FailureDomain::try_from(number) {
        Ok(pb::FailureDomain::Unspecified) => Ok(None),
        Ok(pb::FailureDomain::Osd) => Ok(Some(FailureDomain::Osd)),
        Ok(pb::FailureDomain::Host) => Ok(Some(FailureDomain::Host)),
        Ok(pb::FailureDomain::Rack) => Ok(Some(FailureDomain::Rack)),
        Err(_) => Err(ConvertError::new("failure_domain", format!("{number} is none known here"))),
    }
}

/// One kind of map entry: a key, and a value unless the entry says that it is gone.
trait Entry: Sized {
    type Key: Ord + Copy;
    type Value;
    fn from_native(key: Self::Key, value: Option<&Self::Value>) -> Self;
    fn into_native(self) -> Result<(Self::Key, Option<Self::Value>)>;
}

impl Entry for pb::OsdEntry {
    type Key = OsdId;
    type Value = OsdInfo;

    fn from_native(key: OsdId, value: Option<&OsdInfo>) -> Self {
        let Some(o) = value else {
            return pb::OsdEntry { id: key.0, removed: true, ..Default::default() };
        };
        pb::OsdEntry {
            id: key.0,
            removed: false,
            host: o.host.clone(),
            rack: o.rack.clone(),
            addr: o.addr.clone(),
            weight: o.weight,
            up: o.up,
            r#in: o.in_cluster,
            incarnation: o.incarnation.0,
            disk: o.disk.0.to_vec(),
            capacity_bytes: o.capacity_bytes,
        }
    }

    fn into_native(self) -> Result<(OsdId, Option<OsdInfo>)> {
        let id = osd_id("id", self.id)?;
        if self.removed {
            return Ok((id, None));
        }
        check(valid_name(&self.host), "host", || "not a valid host name".into())?;
        check(self.rack.is_empty() || valid_name(&self.rack), "rack", || "not a valid rack name".into())?;
        let addr_ok = self.addr.is_empty() || self.addr.parse::<SocketAddr>().is_ok();
        check(addr_ok, "addr", || "must be empty or ip:port".into())?;
        let info = OsdInfo {
            host: self.host,
            rack: self.rack,
            addr: self.addr,
            weight: self.weight,
            up: self.up,
            in_cluster: self.r#in,
            incarnation: Incarnation(self.incarnation),
            disk: identity("disk", &self.disk)?,
            capacity_bytes: self.capacity_bytes,
        };
        Ok((id, Some(info)))
    }
}

impl Entry for pb::PoolEntry {
    type Key = PoolId;
    type Value = Pool;

    fn from_native(key: PoolId, value: Option<&Pool>) -> Self {
        let Some(p) = value else {
            return pb::PoolEntry { id: key.0, removed: true, ..Default::default() };
        };
        pb::PoolEntry {
            id: key.0,
            removed: false,
            name: p.name.clone(),
            redundancy: Some(p.redundancy.into()),
            min_size: p.min_size,
            failure_domain: pb::FailureDomain::from(p.failure_domain).into(),
            pg_count: p.pg_count,
            object_bytes: p.object_bytes,
        }
    }

    fn into_native(self) -> Result<(PoolId, Option<Pool>)> {
        let id = PoolId(self.id);
        if self.removed {
            return Ok((id, None));
        }
        let pool = Pool {
            name: self.name,
            redundancy: self.redundancy.unwrap_or_default().try_into()?,
            min_size: self.min_size,
            failure_domain: failure_domain(self.failure_domain)?
                .ok_or_else(|| ConvertError::new("failure_domain", "is not set"))?,
            pg_count: self.pg_count,
            object_bytes: self.object_bytes,
        };
        check_pool(&pool)?;
        Ok((id, Some(pool)))
    }
}

/// Whether a pool is within the product's limits; for maps and for requests to make one.
pub fn check_pool(pool: &Pool) -> Result<()> {
    check(valid_name(&pool.name), "name", || "not a valid pool name".into())?;
    // Also covers a pool that was built natively.
    Redundancy::try_from(pb::Redundancy::from(pool.redundancy))?;
    let width = pool.redundancy.width();
    check((1..=width).contains(&(pool.min_size as usize)), "min_size", || {
        format!("must be 1 to {width}, got {}", pool.min_size)
    })?;
    if let Redundancy::Erasure { k, .. } = pool.redundancy {
        check(pool.min_size >= k, "min_size", || format!("must be at least {k}, the data shards"))?;
    }
    check((1..=PGS_PER_POOL_MAX).contains(&pool.pg_count), "pg_count", || {
        format!("must be 1 to {PGS_PER_POOL_MAX}, got {}", pool.pg_count)
    })?;
    let object_ok = pool.object_bytes.is_power_of_two()
        && (OBJECT_BYTES_MIN..=OBJECT_BYTES_MAX).contains(&pool.object_bytes);
    check(object_ok, "object_bytes", || {
        format!(
            "must be a power of two from {OBJECT_BYTES_MIN} to {OBJECT_BYTES_MAX}, got {}",
            pool.object_bytes
        )
    })
}

fn numbers(osds: &[OsdId]) -> Vec<u32> {
    osds.iter().map(|o| o.0).collect()
}

/// A list of members: bounded, nobody twice; holes may repeat.
fn members(field: &str, list: Vec<u32>) -> Result<Vec<OsdId>> {
    let limit = REPLICAS_MAX.max(ERASURE_WIDTH_MAX) as usize;
    check(list.len() <= limit, field, || format!("{} members are over the limit of {limit}", list.len()))?;
    let list: Vec<OsdId> = list.into_iter().map(OsdId).collect();
    for (i, o) in list.iter().enumerate() {
        check(*o == OsdId::NONE || !list[..i].contains(o), field, || format!("{o} is listed twice"))?;
    }
    Ok(list)
}

fn primary(field: &str, primary: Option<u32>, acting: &[OsdId]) -> Result<Option<OsdId>> {
    let Some(id) = primary else { return Ok(None) };
    let id = osd_id(field, id)?;
    check(acting.contains(&id), field, || format!("{id} is not in the acting set"))?;
    Ok(Some(id))
}

impl Entry for pb::PgEntry {
    type Key = PgId;
    type Value = Shared<PgRecord>;

    fn from_native(key: PgId, value: Option<&Shared<PgRecord>>) -> Self {
        let Some(r) = value else {
            return pb::PgEntry { pool: key.pool.0, index: key.index, removed: true, ..Default::default() };
        };
        pb::PgEntry {
            pool: key.pool.0,
            index: key.index,
            removed: false,
            up: numbers(&r.up),
            acting: numbers(&r.acting),
            primary: r.primary.map(|o| o.0),
            interval: r.interval.0,
            activated: r.activated,
            clean: r.clean,
            past: r
                .past
                .iter()
                .map(|p| pb::PastInterval {
                    interval: p.interval.0,
                    acting: numbers(&p.acting),
                    primary: p.primary.map(|o| o.0),
                })
                .collect(),
        }
    }

    fn into_native(self) -> Result<(PgId, Option<Shared<PgRecord>>)> {
        let id = PgId { pool: PoolId(self.pool), index: self.index };
        check(self.index < PGS_PER_POOL_MAX, "index", || format!("{} is out of range", self.index))?;
        if self.removed {
            return Ok((id, None));
        }
        let count = self.past.len();
        check(count <= PAST_INTERVALS_MAX, "past", || {
            format!("{count} intervals are over the limit of {PAST_INTERVALS_MAX}")
        })?;
        let mut past = Vec::with_capacity(count);
        for p in self.past {
            let acting = members("past.acting", p.acting)?;
            let set = |o: &[OsdId]| o.iter().copied().collect::<BTreeSet<OsdId>>();
            // Groups that became one had an interval in common, each with a primary of its own (rule P9).
            let common = |last: &PastInterval| {
                last.interval.0 == p.interval
                    && set(&last.acting) == set(&acting)
                    && last.primary.map(|o| o.0) != p.primary
            };
            let after = |last: &PastInterval| last.interval.0 < p.interval || common(last);
            let ordered = past.last().is_none_or(after) && p.interval < self.interval;
            check(ordered, "past.interval", || format!("{} is out of order", p.interval))?;
            past.push(PastInterval {
                interval: Epoch(p.interval),
                // Another one may stand in for it by now, for its shard (rule E5); it may still serve reads (rule P6).
                primary: p.primary.map(|id| osd_id("past.primary", id)).transpose()?,
                acting,
            });
        }
        let acting = members("acting", self.acting)?;
        let record = PgRecord {
            up: members("up", self.up)?,
            primary: primary("primary", self.primary, &acting)?,
            acting,
            interval: Epoch(self.interval),
            activated: self.activated,
            clean: self.clean,
            past,
        };
        Ok((id, Some(record.into())))
    }
}

impl Entry for pb::AttachmentEntry {
    type Key = VolumeId;
    type Value = Attachment;

    fn from_native(key: VolumeId, value: Option<&Attachment>) -> Self {
        let Some(a) = value else {
            return pb::AttachmentEntry { volume: key.0, removed: true, ..Default::default() };
        };
        pb::AttachmentEntry {
            volume: key.0,
            removed: false,
            generation: a.generation.0,
            client: a.client.0,
            session: a.session.0,
            root: a.root.0,
            top: a.top.0,
            size_bytes: a.size_bytes,
            snapshot: a.snapshot.map(|s| s.0),
        }
    }

    fn into_native(self) -> Result<(VolumeId, Option<Attachment>)> {
        let value = (!self.removed).then_some(Attachment {
            generation: Generation(self.generation),
            client: ClientId(self.client),
            session: Session(self.session),
            root: VolumeId(self.root),
            top: LayerId(self.top),
            size_bytes: self.size_bytes,
            snapshot: self.snapshot.map(SnapshotId),
        });
        Ok((VolumeId(self.volume), value))
    }
}

fn whole_out<E: Entry>(tree: &BTreeMap<E::Key, E::Value>) -> Vec<E> {
    tree.iter().map(|(k, v)| E::from_native(*k, Some(v))).collect()
}

fn changes_out<E: Entry>(tree: &BTreeMap<E::Key, Option<E::Value>>) -> Vec<E> {
    tree.iter().map(|(k, v)| E::from_native(*k, v.as_ref())).collect()
}

fn changes_in<E: Entry>(
    field: &str,
    list: Vec<E>,
    limit: usize,
) -> Result<BTreeMap<E::Key, Option<E::Value>>> {
    let count = list.len();
    check(count <= limit, field, || format!("{count} entries are over the limit of {limit}"))?;
    let mut out = BTreeMap::new();
    for (i, entry) in list.into_iter().enumerate() {
        let (key, value) = entry.into_native().map_err(|e| e.within(&format!("{field}[{i}]")))?;
        check(out.insert(key, value).is_none(), field, || format!("entry {i} has the key of another"))?;
    }
    Ok(out)
}

fn whole_in<E: Entry>(field: &str, list: Vec<E>, limit: usize) -> Result<BTreeMap<E::Key, E::Value>> {
    changes_in(field, list, limit)?
        .into_iter()
        .map(|(k, v)| {
            let gone = || ConvertError::new(field, "a whole map cannot hold a removed entry");
            Ok((k, v.ok_or_else(gone)?))
        })
        .collect()
}

/// Groups of all pools together.
const PGS_MAX: usize = POOLS_MAX * PGS_PER_POOL_MAX as usize;

impl From<&ClusterMap> for pb::ClusterMap {
    fn from(m: &ClusterMap) -> Self {
        pb::ClusterMap {
            cluster: m.cluster.0.to_vec(),
            epoch: m.epoch.0,
            osds: whole_out(&m.osds),
            pools: whole_out(&m.pools),
            pgs: whole_out(&m.pgs),
            attachments: whole_out(&m.attachments),
            removed_volumes: m.removed_volumes.iter().map(|v| v.0).collect(),
            removed_pools: m.removed_pools.iter().map(|p| p.0).collect(),
            removed_layers: layers_out(&m.removed_layers),
        }
    }
}

impl TryFrom<pb::ClusterMap> for ClusterMap {
    type Error = ConvertError;
    fn try_from(m: pb::ClusterMap) -> Result<Self> {
        let map = ClusterMap {
            cluster: identity("cluster", &m.cluster)?,
            epoch: Epoch(m.epoch),
            osds: whole_in("osds", m.osds, OSDS_MAX)?,
            pools: whole_in("pools", m.pools, POOLS_MAX)?,
            pgs: whole_in("pgs", m.pgs, PGS_MAX)?,
            attachments: whole_in("attachments", m.attachments, VOLUMES_MAX)?,
            removed_volumes: removed_in(m.removed_volumes),
            removed_pools: m.removed_pools.into_iter().map(PoolId).collect(),
            removed_layers: layers_in(m.removed_layers),
        };
        for (id, record) in &map.pgs {
            check_pg(&map, *id, record).map_err(|e| e.within(&format!("pgs[{id}]")))?;
        }
        Ok(map)
    }
}

/// Tombstones are never dropped, so no number bounds them but that of the message's bytes.
fn removed_in(list: Vec<u64>) -> BTreeSet<VolumeId> {
    list.into_iter().map(VolumeId).collect()
}

fn layers_out(layers: &BTreeSet<(VolumeId, LayerId)>) -> Vec<pb::RemovedLayer> {
    layers.iter().map(|(root, layer)| pb::RemovedLayer { root: root.0, layer: layer.0 }).collect()
}

fn layers_in(list: Vec<pb::RemovedLayer>) -> BTreeSet<(VolumeId, LayerId)> {
    list.into_iter().map(|l| (VolumeId(l.root), LayerId(l.layer))).collect()
}

/// Whether a group fits its pool and its map.
fn check_pg(map: &ClusterMap, id: PgId, record: &PgRecord) -> Result<()> {
    let pool = map.pools.get(&id.pool).ok_or_else(|| ConvertError::new("pool", "there is no such pool"))?;
    check(id.index < pool.pg_count, "index", || format!("the pool has {} groups", pool.pg_count))?;
    let width = pool.redundancy.width();
    let holes_allowed = matches!(pool.redundancy, Redundancy::Erasure { .. });
    for (field, list) in [("up", &record.up), ("acting", &record.acting)] {
        check(list.len() <= width, field, || format!("{} members, the pool wants {width}", list.len()))?;
        check(holes_allowed || !list.contains(&OsdId::NONE), field, || {
            "a replicated group has no holes".into()
        })?;
    }
    check(record.interval <= map.epoch, "interval", || {
        format!("{} is after the map's {}", record.interval, map.epoch)
    })
}

impl From<&MapIncrement> for pb::MapIncrement {
    fn from(m: &MapIncrement) -> Self {
        pb::MapIncrement {
            from: m.from.0,
            to: m.to.0,
            osds: changes_out(&m.osds),
            pools: changes_out(&m.pools),
            pgs: changes_out(&m.pgs),
            attachments: changes_out(&m.attachments),
            removed_volumes: m.removed_volumes.iter().map(|v| v.0).collect(),
            removed_pools: m.removed_pools.iter().map(|p| p.0).collect(),
            removed_layers: layers_out(&m.removed_layers),
        }
    }
}

impl TryFrom<pb::MapIncrement> for MapIncrement {
    type Error = ConvertError;
    fn try_from(m: pb::MapIncrement) -> Result<Self> {
        check(m.from < m.to, "to", || format!("{} is not after {}", m.to, m.from))?;
        let out = MapIncrement {
            from: Epoch(m.from),
            to: Epoch(m.to),
            osds: changes_in("osds", m.osds, OSDS_MAX)?,
            pools: changes_in("pools", m.pools, POOLS_MAX)?,
            pgs: changes_in("pgs", m.pgs, PGS_MAX)?,
            attachments: changes_in("attachments", m.attachments, VOLUMES_MAX)?,
            removed_volumes: removed_in(m.removed_volumes),
            removed_pools: m.removed_pools.into_iter().map(PoolId).collect(),
            removed_layers: layers_in(m.removed_layers),
        };
        for (id, record) in &out.pgs {
            let interval = record.as_ref().map_or(Epoch(0), |r| r.interval);
            check(interval <= out.to, "pgs", || format!("interval {interval} of {id} is after {}", out.to))?;
        }
        Ok(out)
    }
}
