//! Where the records of a group's objects are: under the keys of its *homes* (rule P9).
//!
//! A group that was never divided has one home, its own number. When it is divided no record of an object moves: the groups
//! that come out of it have its homes in common, and each has those of the objects there that are of its class. So dividing a
//! group of any size is one small transaction. Listing such a group steps over what is its siblings'.
//!
//! Invariants: a record of an object is in one group's homes only; a home that others still use is never taken for that of a
//! group that begins anew (see [`Homes::after_removal`]).

use super::StoreError;
use super::kv::Kv;
use super::layout::{self, Key, PG_KEY_BYTES, kind};
use super::view::Index;
use gabion_proto::ids::*;
use gabion_proto::limits::PGS_PER_POOL_MAX;
use gabion_proto::placement::pg_index;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};

/// A home in which nothing is.
const NOWHERE: u32 = u32::MAX;
/// Whether it is the home of what cannot be in a group.
pub fn is_nowhere(home: PgId) -> bool {
    home.index == NOWHERE
}

/// Homes that are no group's number.
const SPARE_FIRST: u32 = PGS_PER_POOL_MAX;

/// The objects that group `index` of `count` would have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Class {
    pub index: u32,
    pub count: u32,
}

impl Class {
    pub const ALL: Class = Class { index: 0, count: 1 };

    pub fn has(self, object: &ObjectId) -> bool {
        self.count == 1 || pg_index(object.volume, object.index, self.count) == self.index
    }

    /// Whether what the key names is, or belongs to, an object of it.
    pub fn has_key(self, key: &[u8]) -> bool {
        self == Class::ALL || layout::parse_key(key).ok().and_then(|p| p.object).is_some_and(|o| self.has(&o))
    }

    /// What two classes have in common, if one of them is a part of the other.
    fn and(self, other: Class) -> Option<Class> {
        let (large, small) = if self.count <= other.count { (self, other) } else { (other, self) };
        (small.count.is_multiple_of(large.count) && small.index % large.count == large.index).then_some(small)
    }

    fn is_valid(self) -> bool {
        self.index < self.count && self.count <= PGS_PER_POOL_MAX
    }
}

/// Objects of a group and where their records are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    pub class: Class,
    pub home: u32,
}

impl Region {
    /// The prefix under which its records are.
    pub fn key(&self, kind: u8, pg: PgId) -> Key {
        layout::pg_key(kind, PgId { index: self.home, ..pg })
    }
}

/// What changes: `None` stands for the one home of a group that was never divided.
pub type Change = (PgId, Option<Vec<Region>>);

/// The homes of all groups, as of the newest transaction that is staged.
#[derive(Clone, Debug, Default)]
pub struct Homes(HashMap<PgId, Vec<Region>>);

impl Homes {
    pub fn load<K: Kv>(index: &Index<K>) -> Result<Homes, StoreError> {
        let mut homes = Homes::default();
        index.each(&[kind::HOMES], |key, value| {
            homes.set(parse(&key, value.record()?)?);
            Ok(())
        })?;
        Ok(homes)
    }

    pub fn set(&mut self, (pg, regions): Change) {
        match regions {
            Some(regions) => self.0.insert(pg, regions),
            None => self.0.remove(&pg),
        };
    }

    pub fn regions(&self, pg: PgId) -> Vec<Region> {
        self.0.get(&pg).cloned().unwrap_or_else(|| vec![own(pg)])
    }

    /// Where an object's records are; nowhere, if it cannot be this group's.
    pub fn home(&self, pg: PgId, object: &ObjectId) -> PgId {
        let Some(regions) = self.0.get(&pg) else { return pg };
        let home = regions.iter().find(|r| r.class.has(object)).map_or(NOWHERE, |r| r.home);
        PgId { index: home, ..pg }
    }

    /// Another group that has records under the number of one that would have its own there.
    pub fn user_of(&self, pg: PgId) -> Option<PgId> {
        let others = self.0.iter().filter(|(other, _)| other.pool == pg.pool && **other != pg);
        let mut users = others.filter(|(_, regions)| regions.iter().any(|r| r.home == pg.index));
        users.next().map(|(other, _)| *other).filter(|_| !self.0.contains_key(&pg))
    }

    pub fn owners(&self) -> Owners {
        let mut owners = Owners::default();
        for (pg, regions) in &self.0 {
            for r in regions {
                owners.0.entry(PgId { index: r.home, ..*pg }).or_default().push((r.class, *pg));
            }
        }
        owners
    }

    /// Of what came out of group `pg` of `from` when there are `to`: itself first.
    pub fn divided(&self, pg: PgId, from: u32, to: u32) -> Vec<(PgId, Vec<Region>)> {
        let parts = (0..to / from).map(|n| PgId { index: pg.index + n * from, ..pg });
        let regions = self.regions(pg);
        let part = |child: PgId| {
            let class = Class { index: child.index, count: to };
            let within = |r: &Region| Some(Region { class: r.class.and(class)?, ..*r });
            (child, regions.iter().filter_map(within).collect())
        };
        parts.map(part).collect()
    }

    /// What changes when these groups of `count` become one, the first of them.
    pub fn combined(&self, parts: &[PgId], count: u32) -> Vec<Change> {
        let mut homes = self.clone();
        parts.iter().for_each(|part| homes.set((*part, None)));
        let mut changes = vec![(parts[0], Some(self.united(parts, count)))];
        homes.set(changes[0].clone());
        // The others have nothing any more, but their homes may be the first one's now.
        for part in &parts[1..] {
            let change = (*part, homes.after_removal(*part));
            homes.set(change.clone());
            changes.push(change);
        }
        changes
    }

    /// Of what becomes of these groups of `count`.
    fn united(&self, parts: &[PgId], count: u32) -> Vec<Region> {
        let of = |pg: &PgId| {
            let class = Class { index: pg.index, count };
            self.regions(*pg)
                .into_iter()
                .filter_map(move |r| Some(Region { class: r.class.and(class)?, ..r }))
        };
        let mut regions: Vec<Region> = parts.iter().flat_map(of).collect();
        // Two halves in one home are a whole there.
        while let Some((a, b)) = halves(&regions) {
            let Class { index, count } = regions[a].class;
            regions[a].class = Class { index: index % (count / 2), count: count / 2 };
            regions.remove(b);
        }
        regions
    }

    /// The homes of a group that has nothing any more: should it begin anew, it must not do so among what others keep under its
    /// number.
    pub fn after_removal(&self, pg: PgId) -> Option<Vec<Region>> {
        let others = self.0.iter().filter(|(other, _)| other.pool == pg.pool && **other != pg);
        let used: BTreeSet<u32> = others.flat_map(|(_, regions)| regions).map(|r| r.home).collect();
        let spare = || (SPARE_FIRST..NOWHERE).find(|home| !used.contains(home)).unwrap_or(NOWHERE);
        used.contains(&pg.index).then(|| vec![Region { class: Class::ALL, home: spare() }])
    }
}

/// Two regions of one home that are all of a larger class.
fn halves(regions: &[Region]) -> Option<(usize, usize)> {
    let pairs = (0..regions.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
    let fits = |a: &Region, b: &Region| {
        let even = a.class.count == b.class.count && a.class.count.is_multiple_of(2);
        even && a.home == b.home && a.class.index.abs_diff(b.class.index) == a.class.count / 2
    };
    pairs.into_iter().find(|(a, b)| fits(&regions[*a], &regions[*b]))
}

/// Whose the records in a home are, where that is not simply the group of its number.
#[derive(Clone, Debug, Default)]
pub struct Owners(HashMap<PgId, Vec<(Class, PgId)>>);

impl Owners {
    pub fn know(&self, home: PgId) -> bool {
        self.0.contains_key(&home)
    }

    pub fn of(&self, home: PgId, object: &ObjectId) -> PgId {
        let users = self.0.get(&home).into_iter().flatten();
        users.clone().find(|(class, _)| class.has(object)).map_or(home, |(_, pg)| *pg)
    }
}

/// Of a group that was never divided.
fn own(pg: PgId) -> Region {
    Region { class: Class::ALL, home: pg.index }
}

/// A record of the index.
pub fn parse(key: &[u8], value: &[u8]) -> Result<Change, StoreError> {
    let bad = || StoreError::Fatal("a record of a group's homes is damaged".into());
    let pg = layout::parse_key(key).ok().filter(|_| key.len() == PG_KEY_BYTES).ok_or_else(bad)?.pg;
    let regions: Vec<Region> = layout::decode(value)?;
    // Only classes that there are can be compared.
    let valid = !regions.is_empty() && regions.iter().all(|r| r.class.is_valid() && r.home != NOWHERE);
    let disjoint =
        || (1..regions.len()).all(|n| regions[..n].iter().all(|r| r.class.and(regions[n].class).is_none()));
    if !valid || !disjoint() {
        return Err(bad());
    }
    Ok((pg, Some(regions)))
}
