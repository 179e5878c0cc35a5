//! Orders requests on overlapping blocks: whoever asked first goes first, what does not overlap
//! never waits.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Exclusive locks on ranges of blocks.
#[derive(Default)]
pub struct RangeLock {
    // Short critical sections; taken twice per write by whichever connection runs it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// Granted ranges by start: they never overlap.
    held: BTreeMap<u64, u64>,
    /// In the order of asking.
    waiting: BTreeMap<u64, Waiter>,
}

struct Waiter {
    range: Range<u64>,
    granted: oneshot::Sender<()>,
}

/// A granted range; dropping it lets the next in.
pub struct Held {
    lock: Arc<RangeLock>,
    start: u64,
}

/// Removes a waiter whose caller gave up, or releases what it was granted meanwhile.
struct Pending {
    /// `None` once granted and handed on.
    lock: Option<Arc<RangeLock>>,
    id: u64,
    start: u64,
}

enum Asked {
    Granted(Held),
    Waits(Pending, oneshot::Receiver<()>),
}

impl Pending {
    fn into_held(mut self) -> Held {
        Held { lock: self.lock.take().expect("handed on once"), start: self.start }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl State {
    fn is_held(&self, range: &Range<u64>) -> bool {
        // Held ranges are disjoint, so the last one that starts before our end reaches farthest.
        self.held.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start)
    }

    fn grant_what_fits(&mut self) {
        let mut passed: Vec<Range<u64>> = Vec::new();
        let mut free = Vec::new();
        for (id, w) in &self.waiting {
            if !self.is_held(&w.range) && !passed.iter().any(|p| overlap(p, &w.range)) {
                free.push(*id);
            }
            // Later ones wait for earlier ones, granted just now or not.
            passed.push(w.range.clone());
        }
        for id in free {
            let waiter = self.waiting.remove(&id).expect("listed above");
            self.held.insert(waiter.range.start, waiter.range.end);
            // A receiver that is gone leaves through its `Pending`.
            let _ = waiter.granted.send(());
        }
    }
}

impl RangeLock {
    /// Asks now; the future resolves when no earlier request overlaps `range`, which is not empty.
    pub fn acquire(self: &Arc<Self>, range: Range<u64>) -> impl Future<Output = Held> + Send + 'static {
        let asked = self.ask(range);
        async move {
            match asked {
                Asked::Granted(held) => held,
                Asked::Waits(pending, granted) => {
                    granted.await.expect("a waiter is granted before it is removed");
                    pending.into_held()
                }
            }
        }
    }

    fn ask(self: &Arc<Self>, range: Range<u64>) -> Asked {
        assert!(range.start < range.end, "an empty range orders nothing");
        let start = range.start;
        let mut s = self.state.lock();
        if !s.is_held(&range) && !s.waiting.values().any(|w| overlap(&w.range, &range)) {
            s.held.insert(range.start, range.end);
            return Asked::Granted(Held { lock: self.clone(), start });
        }
        let id = s.next;
        s.next += 1;
        let (tx, rx) = oneshot::channel();
        s.waiting.insert(id, Waiter { range, granted: tx });
        Asked::Waits(Pending { lock: Some(self.clone()), id, start }, rx)
    }

    fn release(&self, start: u64) {
        let mut s = self.state.lock();
        s.held.remove(&start).expect("held ranges are released once");
        if !s.waiting.is_empty() {
            s.grant_what_fits();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.lock.release(self.start);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Some(lock) = self.lock.take() else { return };
        let mut s = lock.state.lock();
        if s.waiting.remove(&self.id).is_some() {
            // It may have been in the way of others.
            s.grant_what_fits();
        } else {
            drop(s);
            lock.release(self.start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Checks that no two holders overlap and that overlapping ones enter in the order of asking.
    async fn run(ranges: Vec<(u64, u64, u8, bool)>) {
        let lock = Arc::new(RangeLock::default());
        let log = Arc::new(Mutex::new((Vec::<(usize, Range<u64>)>::new(), Vec::<usize>::new())));
        let mut tasks = Vec::new();
        for (i, (start, len, turns, give_up)) in ranges.iter().copied().enumerate() {
            let (lock, log) = (lock.clone(), log.clone());
            let (entered, range) = (log.clone(), start..start + len);
            let task = tokio::spawn(async move {
                let _held = lock.acquire(range.clone()).await;
                {
                    let mut l = log.lock();
                    assert!(l.0.iter().all(|(_, r)| !overlap(r, &range)), "{range:?} entered over {:?}", l.0);
                    l.0.push((i, range.clone()));
                    l.1.push(i);
                }
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
                log.lock().0.retain(|(j, _)| *j != i);
            });
            // Asks before the next one does.
            tokio::task::yield_now().await;
            if give_up && !entered.lock().1.contains(&i) {
                task.abort();
            }
            tasks.push(task);
        }
        for t in tasks {
            let _ = t.await;
        }
        let entered = &log.lock().1;
        for (n, a) in entered.iter().enumerate() {
            for b in &entered[n + 1..] {
                let (ra, rb) = (ranges[*a], ranges[*b]);
                let overlapping = ra.0 < rb.0 + rb.1 && rb.0 < ra.0 + ra.1;
                assert!(!overlapping || a < b, "{b} asked before {a} and overlaps it");
            }
        }
        for (i, r) in ranges.iter().enumerate() {
            assert!(r.3 || entered.contains(&i), "{i} never entered");
        }
        let s = lock.state.lock();
        assert!(s.held.is_empty() && s.waiting.is_empty(), "nothing stays behind");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn exclusive_and_first_come_first_served(
            ranges in prop::collection::vec((0u64..40, 1u64..12, 0u8..6, prop::bool::weighted(0.15)), 1..40)
        ) {
            let rt = tokio::runtime::Builder::new_current_thread().build().unwrap();
            rt.block_on(run(ranges));
        }
    }
}
