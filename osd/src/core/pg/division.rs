//! A pool has more groups, or fewer, than what is here was divided for (rule P9).

use super::*;
use crate::store::DIVIDE_MAX;

impl Pg {
    /// Divides what the store has of the group, and of those that come out of it; returns the new ones. To be called for each newer map
    /// before anything else. That of several changes only the last is seen makes no difference.
    pub fn divide(&mut self, cx: &mut Cx<'_>, pg_count: u32) -> Vec<Pg> {
        let had = self.meta.pg_count;
        if !self.stored || had == 0 || pg_count <= had || !pg_count.is_multiple_of(had) {
            return Vec::new();
        }
        let acts = self.record.acting.contains(&cx.id);
        if !cx.rules.keep(Rule::CopiesAreDivided) || !(acts || cx.rules.keep(Rule::StraysAreDivided)) {
            self.meta.pg_count = pg_count;
            return Vec::new();
        }
        cx.takes(Branch::Divide);
        let mut parts = vec![self.id];
        let mut from = had;
        while from < pg_count {
            // A transaction is bounded, so a large step is several.
            let factor = (2..=DIVIDE_MAX).rev().find(|f| (pg_count / from).is_multiple_of(*f));
            let to = from * factor.unwrap_or(pg_count / from);
            for pg in std::mem::take(&mut parts) {
                let token = self.token(cx, What::Divided);
                let ops = vec![TxnOp::Divide { from, to }];
                cx.out.push(Effect::Store { token, txn: Txn { pg, ops, reserve: true } });
                parts.extend((0..to / from).map(|n| PgId { index: pg.index + n * from, ..pg }));
            }
            from = to;
        }
        tracing::info!(pg = %self.id, osd = %cx.id, from = had, to = pg_count, "divided");
        self.meta.pg_count = pg_count;
        let made = parts.into_iter().filter(|part| *part != self.id);
        made.map(|part| Pg::stored(part, self.meta)).collect()
    }

    /// Of how many groups what is here is one, if anything is.
    pub fn is_one_of(&self) -> Option<u32> {
        Some(self.meta.pg_count).filter(|count| self.stored && *count > 0)
    }

    /// The last interval that what is here has taken part in, or would have.
    pub fn promised(&self) -> Epoch {
        self.meta.promised.max(self.meta.activated)
    }

    pub fn is_shard(&self) -> bool {
        self.meta.shard.is_some()
    }

    /// Answers to what was asked under this id before are not taken for others.
    pub fn instead_of(self, known: Option<Pg>) -> Pg {
        Pg { round: known.map_or(0, |pg| pg.round), ..self }
    }

    /// What is here goes to the group that it is a part of now.
    pub fn become_part(&mut self) -> PgMeta {
        self.stored = false;
        std::mem::take(&mut self.meta)
    }

    /// Puts together what the store has of those that are this group now. `newest` is of the one that was activated last.
    pub fn combine(&mut self, cx: &mut Cx<'_>, from: u32, to: u32, newest: PgMeta) {
        cx.takes(Branch::Combine);
        tracing::info!(pg = %self.id, osd = %cx.id, from, to, "put together");
        let meta = PgMeta { pg_count: to, ..newest };
        (self.stored, self.meta) = (true, meta);
        if !cx.rules.keep(Rule::PartsAreCombined) {
            return;
        }
        let (token, ops) = (self.token(cx, What::Divided), vec![TxnOp::Combine { from, to }]);
        cx.out.push(Effect::Store { token, txn: Txn { pg: self.id, ops, reserve: true } });
    }

    /// Whether what was listed can be what the map means. Otherwise the monitors have forgotten how many groups the pool has, and nothing may
    /// be said about objects that are in other ones here.
    pub(super) fn is_divided(&mut self, cx: &mut Cx<'_>) -> bool {
        let Some(wanted) = cx.map.pools.get(&self.id.pool).map(|p| p.pg_count) else { return true };
        let had = self.meta.pg_count;
        if had == 0 {
            self.meta.pg_count = wanted;
        }
        let rules =
            [Rule::CopiesAreDivided, Rule::StraysAreDivided, Rule::DividedFirst, Rule::PartsAreCombined];
        let divided = had == 0 || had == wanted || !rules.into_iter().all(|r| cx.rules.keep(r));
        if !divided {
            self.fail(cx, format!("what is here is of one of {had} groups, the map has {wanted}"));
        }
        divided
    }
}
