//! A disk that does one thing at a time, each as long as it takes: for what is measured in time. Elsewhere disks take any time.

use crate::nodes::is_fatal;
use crate::plan::Scenario;
use crate::world::{Ev, World};
use gabion_osd::core::{Effect, Event};
use gabion_osd::store::{Store, Txn, TxnOp};

/// What a read takes besides its bytes, ...
const READ_MS: u64 = 1;
/// ... and what is made durable, however many writes wait for it together.
const FLUSH_MS: u64 = 2;
/// About 128 MiB a second.
const BYTES_PER_MS: u64 = 128 << 10;

#[derive(Default)]
pub struct Device {
    one_at_a_time: bool,
    busy_until: u64,
}

impl Device {
    pub fn of(scenario: Scenario) -> Device {
        Device { one_at_a_time: scenario == Scenario::Rebuild, busy_until: 0 }
    }

    pub fn is_one(&self) -> bool {
        self.one_at_a_time
    }

    /// How long what comes now waits for what was there before; none where that is not how it is.
    pub fn begins_in(&self, now: u64) -> Option<u64> {
        self.one_at_a_time.then(|| self.busy_until.saturating_sub(now))
    }
}

fn written(txn: &Txn) -> u64 {
    let bytes = |op: &TxnOp| match op {
        TxnOp::Write { content, .. } | TxnOp::Replace { content, .. } | TxnOp::Prepare { content, .. } => {
            content.data.len() as u64
        }
        _ => 0,
    };
    txn.ops.iter().map(bytes).sum()
}

fn read(event: &Event) -> u64 {
    let bytes = match event {
        Event::ReadDone { result, .. } => result.as_ref().map_or(0, |c| c.data.len()),
        Event::ObjectRead { result, .. } => result.as_ref().map_or(0, |(_, c)| c.data.len()),
        Event::PieceRead { result, .. } => result.as_ref().map_or(0, |p| p.content.data.len()),
        _ => 0,
    };
    bytes as u64
}

impl World {
    /// The disk does what comes next: all commits that wait together, or something else.
    pub fn serve_next(&mut self, node: usize, run: u64) {
        let queue = &mut self.nodes[node].queue;
        let (mut tokens, mut txns) = (Vec::new(), Vec::new());
        while let Some(Effect::Store { token, txn }) =
            queue.pop_front_if(|e| matches!(e, Effect::Store { .. }))
        {
            tokens.push(token);
            txns.push(txn);
        }
        let (takes_ms, events) = match txns.is_empty() {
            false => {
                let bytes = txns.iter().map(written).sum::<u64>();
                (FLUSH_MS + bytes / BYTES_PER_MS, self.store_commit(node, tokens, txns))
            }
            true => {
                let Some(effect) = queue.pop_front() else { return };
                let placed = match &effect {
                    Effect::Place { content, .. } => content.data.len() as u64,
                    _ => 0,
                };
                let event = self.store_read(node, effect);
                let bytes = placed + event.as_ref().map_or(0, read);
                (READ_MS + bytes / BYTES_PER_MS, event.into_iter().collect())
            }
        };
        if events.iter().any(is_fatal)
            || self.nodes[node].disk.store().is_some_and(|s| s.background().is_err())
        {
            return self.store_died(node);
        }
        for event in events {
            self.at(takes_ms, Ev::Core { node, run, event });
        }
        let n = &mut self.nodes[node];
        n.device.busy_until = self.now + takes_ms;
        if !n.queue.is_empty() {
            self.at(takes_ms, Ev::StoreRun { node, run });
        }
    }
}
