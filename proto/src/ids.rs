//! Newtypes for everything that is counted or named, so that they never mix.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$m:meta])* $name:ident($t:ty), $prefix:literal) => {
        $(#[$m])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $t);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id!(/** One storage daemon, one disk. Never reused for another disk. */ OsdId(u32), "osd.");
id!(/** A pool: a redundancy policy and a set of placement groups. */ PoolId(u32), "pool.");
id!(/** The number of a cluster map; grows by one with every change. */ Epoch(u64), "e");
id!(/** One run of an OSD process, granted by the monitors (rule P1). */ Incarnation(u64), "inc");
id!(/** A virtual disk. Never reused. */ VolumeId(u64), "vol");
id!(/** One layer of the volumes of one root; 0 is the bottom, later ones have greater numbers. */ LayerId(u32), "layer");
id!(/** A snapshot of a volume. Never reused. */ SnapshotId(u64), "snap");
id!(/** A data-path client: one gateway process's stable identity. */ ClientId(u64), "client");
id!(/** One run of a client, numbered by the monitors (rule C1). */ Session(u64), "s");
id!(/** An attachment of a volume; a newer one fences older ones (rule C2). */ Generation(u64), "g");

impl OsdId {
    /// A hole in an erasure-coded acting set: nobody serves this shard.
    pub const NONE: OsdId = OsdId(u32::MAX);
}

impl Epoch {
    /// The epoch that follows this one.
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

/// A placement group: one slice of a pool's objects.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct PgId {
    /// The pool that the group belongs to.
    pub pool: PoolId,
    /// Number within the pool, below the pool's `pg_count`.
    pub index: u32,
}

impl fmt::Display for PgId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:x}", self.pool.0, self.index)
    }
}
impl fmt::Debug for PgId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for PgId {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("a group is POOL.NUMBER with the number in hexadecimal, as 1.3f, got {s:?}");
        let (pool, index) = s.split_once('.').ok_or_else(bad)?;
        let pool = PoolId(pool.parse().map_err(|_| bad())?);
        Ok(PgId { pool, index: u32::from_str_radix(index, 16).map_err(|_| bad())? })
    }
}

/// One layer of one object-sized piece of a volume. The store keeps one record per `ObjectId`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectId {
    /// The root volume of the chain: placement hashes this and `index` only.
    pub volume: VolumeId,
    /// Which object-sized piece of the volume.
    pub index: u32,
    /// Which layer of the chain.
    pub layer: LayerId,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}.{:x}.{:x}", self.volume.0, self.index, self.layer.0)
    }
}
impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for ObjectId {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("an object is VOLUME.INDEX.LAYER in hexadecimal, as 7.1f.0, got {s:?}");
        let mut parts = s.split('.');
        let mut next = || parts.next().ok_or_else(bad);
        let volume = VolumeId(u64::from_str_radix(next()?, 16).map_err(|_| bad())?);
        let index = u32::from_str_radix(next()?, 16).map_err(|_| bad())?;
        let layer = LayerId(u32::from_str_radix(next()?, 16).map_err(|_| bad())?);
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(ObjectId { volume, index, layer })
    }
}

/// The version of one object: the interval's epoch in the high 32 bits and a counter in the low
/// 32, so that a later interval always wins. `ZERO` is "never written".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Version(u64);

impl Version {
    /// The version of an object that was never written.
    pub const ZERO: Version = Version(0);

    /// A version from its parts; `None` if the epoch does not fit.
    pub fn new(interval: Epoch, counter: u32) -> Option<Version> {
        u32::try_from(interval.0).ok().map(|e| Version(u64::from(e) << 32 | u64::from(counter)))
    }
    /// From its 64-bit form.
    pub fn from_raw(raw: u64) -> Version {
        Version(raw)
    }
    /// Its 64-bit form.
    pub fn raw(self) -> u64 {
        self.0
    }
    /// The interval in which this version was assigned.
    pub fn interval(self) -> Epoch {
        Epoch(self.0 >> 32)
    }
    /// The counter within the interval.
    pub fn counter(self) -> u32 {
        self.0 as u32
    }
    /// The version of the next write of the same object in `interval`; `None` when the counter
    /// or the epoch is exhausted.
    pub fn successor(self, interval: Epoch) -> Option<Version> {
        if self.interval() == interval {
            Version::new(interval, self.counter().checked_add(1)?)
        } else {
            Version::new(interval, 1)
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}'{}", self.interval().0, self.counter())
    }
}
impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The identity of a cluster: 128 random bits, made at bootstrap. A disk or a client of another
/// cluster is refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for b in self.0 {
            write!(f, "{b:02x}")?;
        }
        Ok(())
    }
}
impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for ClusterId {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("cluster id must be 32 hexadecimal digits, got {s:?}");
        if s.len() != 32 || !s.is_ascii() {
            return Err(bad());
        }
        let mut out = [0u8; 16];
        for (i, b) in out.iter_mut().enumerate() {
            *b = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
        }
        Ok(ClusterId(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_can_be_typed() {
        let pg = PgId { pool: PoolId(12), index: 0x3f };
        let object = ObjectId { volume: VolumeId(u64::MAX), index: 31, layer: LayerId(2) };
        assert_eq!(pg.to_string().parse(), Ok(pg));
        assert_eq!(object.to_string().parse(), Ok(object));
        for bad in ["", ".", "1", "1.", "1.g", "1.2.3", "x.1", "1.100000000"] {
            assert!(bad.parse::<PgId>().is_err(), "{bad}");
        }
        for bad in ["", "1.2", "1.2.3.4", "1.2.", "vol1.2.3", "1.2.100000000"] {
            assert!(bad.parse::<ObjectId>().is_err(), "{bad}");
        }
    }
}
