//! Reads whose shards are late: others make up for them. See `pg/hedge.rs` for those of whole copies.

use super::*;

/// Rows that one member owes and nobody waits for; with more, it is not asked first.
const OVERTAKEN_MAX: usize = 8;
/// After this long the answer is not expected any more.
const OVERTAKEN_MS: Millis = 10_000;

impl Pg {
    /// Members that still owe much that was read elsewhere are not asked for more while others can decode it.
    pub(super) fn shun(&mut self, cx: &mut Cx<'_>, tid: u64) {
        let Some(k) = self.geometry().map(|g| usize::from(g.k)) else { return };
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(g) = a.shards.gathers.get_mut(&tid) else { return };
        // Of shards that do not fit, what others give is not what these hold: clients see always the same.
        let may = matches!(g.purpose, For::Read { .. }) && !a.scrub.damaged.contains_key(&g.object);
        if a.shards.overtaken.is_empty() || !may {
            return;
        }
        let holders = a.recovery.holders(&g.object, true);
        let owes =
            |o: &OsdId| a.shards.overtaken.keys().filter(|(_, member)| member == o).count() >= OVERTAKEN_MAX;
        let busy: BTreeSet<OsdId> = holders.values().copied().filter(owes).collect();
        let wanted = g.wanted.iter().filter_map(|n| holders.get(n)).copied();
        let late: Vec<OsdId> = wanted.filter(|o| busy.contains(o)).collect();
        let others = holders.values().filter(|o| !busy.contains(o)).count();
        if !late.is_empty() && others >= k && cx.latency.spend_hedge(late) {
            (g.hedged, g.shunned) = (true, busy);
            self.counters.hedged_reads += 1;
            cx.takes(Branch::ShunMember);
        }
    }

    /// Reads whose shards have not come in time: others make up for those, if they can.
    pub(in super::super) fn hedge_gathers(&mut self, cx: &mut Cx<'_>) {
        let (now, after) = (cx.now, cx.latency.hedge_ms());
        let Phase::Active(a) = &mut self.phase else { return };
        a.shards.overtaken.retain(|_, (since, _)| now < *since + OVERTAKEN_MS);
        let may = |g: &Gather| {
            let plain = matches!(g.purpose, For::Read { .. }) && !g.hedged && !g.piecewise;
            plain && !a.scrub.damaged.contains_key(&g.object)
        };
        let open = a.shards.gathers.iter().filter(|(_, g)| may(g));
        let deadlines =
            open.filter_map(|(tid, g)| Some((*tid, g.asked.values().map(|a| a.first).min()? + after)));
        let (due, later): (Vec<_>, Vec<_>) = deadlines.partition(|(_, at)| *at <= now);
        if let Some(at) = later.into_iter().map(|(_, at)| at).min() {
            cx.latency.wake(self.id, at);
        }
        for (tid, _) in due {
            self.hedge_gather(cx, tid, after);
        }
    }

    fn hedge_gather(&mut self, cx: &mut Cx<'_>, tid: u64, after: Millis) {
        let Some(k) = self.geometry().map(|g| usize::from(g.k)) else { return };
        let Phase::Active(a) = &mut self.phase else { return };
        let Some(g) = a.shards.gathers.get_mut(&tid) else { return };
        let late: BTreeSet<OsdId> =
            g.asked.values().filter(|a| cx.now >= a.first + after).map(|a| a.member).collect();
        let there = |(n, o): &(u8, OsdId)| {
            let up = *o == cx.id || cx.map.up_osd(*o).is_some();
            g.parts.contains_key(n) || (up && !g.bad.contains(n) && !late.contains(o))
        };
        let others = a.recovery.holders(&g.object, true).into_iter().filter(there).count();
        if others < k || !cx.latency.spend_hedge(late.iter().copied()) {
            return;
        }
        g.hedged = true;
        g.asked.values_mut().filter(|a| late.contains(&a.member)).for_each(|a| a.passed = true);
        self.counters.hedged_reads += 1;
        cx.takes(Branch::HedgeShards);
        self.gather_on(cx, tid);
    }
}
