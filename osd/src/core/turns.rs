//! Whose turn it is to bring something to others, of all groups that an OSD leads, while recovery may not go as fast as it could.
//!
//! One object at a time is under way then. Its pieces go as soon as they may; the next object is of the group in which the fewest
//! more copies, or shards, may be lost, and of several such groups each in turn.

use gabion_proto::ids::PgId;
use std::collections::{BTreeMap, BTreeSet};

/// See the module docs.
#[derive(Clone, Debug, Default)]
pub struct Turns {
    /// Groups with a piece of an object that is under way.
    going_on: BTreeSet<PgId>,
    /// Groups with an object to begin, and how many more copies or shards of it may be lost.
    to_begin: BTreeMap<PgId, usize>,
    last: Option<PgId>,
    /// It may begin one.
    current: Option<PgId>,
}

impl Turns {
    pub fn len(&self) -> usize {
        self.going_on.len() + self.to_begin.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn go_on(&mut self, pg: PgId) {
        self.going_on.insert(pg);
    }

    /// What it said before counts no more.
    pub fn begin(&mut self, pg: PgId, spare: usize) {
        self.to_begin.insert(pg, spare);
    }

    pub fn waits_to_begin(&self, pg: PgId) -> bool {
        self.to_begin.contains_key(&pg)
    }

    pub fn may_begin(&self, pg: PgId) -> bool {
        self.current == Some(pg)
    }

    /// It has begun an object, or does not want to.
    pub fn end(&mut self) {
        self.current = None;
    }

    pub fn next(&mut self, nothing_under_way: bool) -> Option<PgId> {
        if let Some(pg) = self.going_on.pop_first() {
            return Some(pg);
        }
        let order = |(pg, spare): &(&PgId, &usize)| (**spare, Some(**pg) <= self.last, **pg);
        let (pg, _) = self.to_begin.iter().filter(|_| nothing_under_way).min_by_key(order)?;
        let pg = *pg;
        self.to_begin.remove(&pg);
        (self.last, self.current) = (Some(pg), Some(pg));
        Some(pg)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gabion_proto::ids::PoolId;

    fn pg(index: u32) -> PgId {
        PgId { pool: PoolId(1), index }
    }

    #[test]
    fn the_fewest_copies_first_and_then_each_in_turn() {
        let mut turns = Turns::default();
        let mut begun = Vec::new();
        for n in 0..9 {
            // Group 3 has two objects of which one copy is left.
            for index in 0..4 {
                turns.begin(pg(index), usize::from(index != 3 || n >= 2));
            }
            let next = turns.next(true).unwrap();
            assert!(turns.may_begin(next));
            turns.end();
            begun.push(next.index);
        }
        assert_eq!(begun, [3, 3, 0, 1, 2, 3, 0, 1, 2]);
    }

    #[test]
    fn what_is_under_way_goes_on_before_another_one_begins() {
        let mut turns = Turns::default();
        turns.begin(pg(0), 0);
        turns.go_on(pg(1));
        assert_eq!(turns.next(false), Some(pg(1)));
        assert!(!turns.may_begin(pg(1)));
        assert_eq!(turns.next(false), None);
        assert_eq!(turns.next(true), Some(pg(0)));
        assert_eq!(turns.next(true), None);
    }
}
