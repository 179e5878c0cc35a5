//! More members of an erasure-coded group go away at once than it can spare, while one of them, its primary, was writing; operators let spare disks stand
//! in for them. All acting members then answer, and still the group must wait: who stands in knows nothing of the interval before, and
//! the members that are left of it are too few to say what became of those writes (rule P3e). Everybody comes back in the end.

use crate::network::{Place, Slow};
use crate::undercut::first;
use crate::world::World;
use gabion_monitor::state::Command;
use gabion_proto::ids::OsdId;
use gabion_proto::map::Redundancy;

const ROUNDS: usize = 3;
/// The primary's last writes are not on its own disk by then.
const SLOW_BY_MS: u64 = 8_000;

/// In the tally: so often others stood in for too many members.
const STOOD_IN: &str = "spare disks stood in for too many members";

impl World {
    pub fn let_others_stand_in(&mut self) {
        let Redundancy::Erasure { k, m } = self.plan.redundancy else { return };
        for _ in 0..ROUNDS {
            self.wait_for("clean groups", World::all_clean);
            let later = self.now + self.rng.range(500, 3_000);
            self.run_until(later);
            let Some(record) = first(self).cloned() else { return };
            let (primary, acting) = (record.primary, record.acting);
            let mut others: Vec<usize> = Vec::new();
            let mut away: Vec<usize> = Vec::new();
            for (node, n) in self.nodes.iter().enumerate().filter(|(_, n)| acting.contains(&n.id)) {
                if Some(n.id) == primary { away.push(node) } else { others.push(node) }
            }
            if away.is_empty() || others.len() < (k + m) as usize - 1 || self.finding.is_some() {
                // It has just changed.
                continue;
            }
            let lead = away[0];
            away.extend(self.draw(&mut others, m as usize));
            // What it sends last comes to those that will be left, and neither to the other ones nor on its own disk.
            self.nodes[lead].slow_disk = Slow { until: self.now + SLOW_BY_MS, by_ms: SLOW_BY_MS };
            let links = away[1..].iter().map(|n| (Place::Node(lead), Place::Node(*n)));
            self.network.cut.extend(links);
            let soon = self.now + self.rng.range(100, 1_500);
            self.run_until(soon);
            for node in &away {
                self.log(|| format!("osd.{node} goes away"));
                let power_fails = self.rng.chance(700);
                self.stop(*node, power_fails);
                self.command(Command::OutOsd { osd: self.nodes[*node].id, automatic: false });
            }
            self.network.cut.clear();
            self.nodes[lead].slow_disk = Slow::default();
            let gone: Vec<OsdId> = away.iter().map(|n| self.nodes[*n].id).collect();
            self.wait_for("spare disks to stand in", |w| {
                let stood_in = |r: &gabion_proto::map::PgRecord| {
                    !r.acting.iter().any(|o| gone.contains(o) || *o == OsdId::NONE)
                };
                first(w).is_some_and(stood_in)
            });
            *self.tally.work.entry(STOOD_IN).or_default() += 1;
            let later = self.now + self.rng.range(1_000, 6_000);
            self.run_until(later);
            let standing: Vec<OsdId> = first(self).map(|r| r.acting.clone()).unwrap_or_default();
            for node in 0..self.nodes.len() {
                let new = standing.contains(&self.nodes[node].id) && !acting.contains(&self.nodes[node].id);
                if new && self.rng.chance(800) {
                    let ms = self.rng.range(8_000, 20_000);
                    self.crash_for(node, Some(ms));
                }
            }
            for node in away {
                self.command(Command::InOsd { osd: self.nodes[node].id });
                self.start(node);
            }
        }
    }
}
