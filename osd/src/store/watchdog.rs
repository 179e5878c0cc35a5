//! The self-fence (rule S9): a disk that does not answer for too long stops its OSD, before its peers and the
//! monitors must guess. A thread of its own, because the store's thread may be the one that hangs.

use super::Pulse;
use gabion_proto::limits::DISK_SILENT_MAX;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::Duration;

/// The limit is waited for in so many parts: what stops this process stops the disk's thread too, and then only
/// the part that runs is over too early.
const PARTS: u32 = 10;

pub type OnFatal = Box<dyn FnOnce(String) + Send>;

struct State {
    /// The store's thread is at work; otherwise it waits for requests.
    working: bool,
    /// Counts what has moved: answers of the disk and of the index, steps of what takes long, and that work began.
    moves: u64,
    on_fatal: Option<OnFatal>,
    /// The watcher waits to be told of work. It is not told of every request, which would cost as much as one.
    parked: bool,
    closed: bool,
}

struct Shared {
    // Shared by the store's thread and the one that watches it: a few nanoseconds each time.
    state: Mutex<State>,
    changed: Condvar,
}

/// Held by the store's thread.
pub struct Watchdog(Arc<Shared>);

impl Watchdog {
    pub fn new(on_fatal: OnFatal) -> Watchdog {
        Watchdog::with_limit(on_fatal, DISK_SILENT_MAX)
    }

    pub fn with_limit(on_fatal: OnFatal, limit: Duration) -> Watchdog {
        let state =
            State { working: false, moves: 0, on_fatal: Some(on_fatal), parked: false, closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let watched = shared.clone();
        let spawned =
            std::thread::Builder::new().name("store-watch".into()).spawn(move || watched.watch(limit));
        if let Err(e) = spawned {
            tracing::error!("cannot start the store's watchdog: {e}");
        }
        Watchdog(shared)
    }

    /// Something is expected of the disk: from now on it has to move within the limit. Said again of a disk that is at work already it
    /// changes nothing: that more is asked of it is no sign of life.
    pub fn working(&self) {
        self.0.working();
    }

    /// Called when the disk has moved.
    pub fn pulse(&self) -> Pulse {
        let shared = self.0.clone();
        Box::new(move || shared.state.lock().moves += 1)
    }

    /// Nothing is expected of the disk.
    pub fn idle(&self) {
        self.0.state.lock().working = false;
    }

    /// The store has stopped for good; says so once.
    pub fn fatal(&self, why: &str) {
        let on_fatal = self.0.state.lock().on_fatal.take();
        if let Some(on_fatal) = on_fatal {
            on_fatal(why.to_owned());
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.state.lock().closed = true;
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn working(&self) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.working, true) {
            return;
        }
        state.moves += 1;
        if std::mem::take(&mut state.parked) {
            self.changed.notify_one();
        }
    }

    fn watch(&self, limit: Duration) {
        let mut state = self.state.lock();
        let (mut seen, mut silent_parts) = (state.moves, 0);
        loop {
            if state.closed {
                return;
            }
            if !state.working {
                state.parked = true;
                self.changed.wait(&mut state);
                (seen, silent_parts) = (state.moves, 0);
                continue;
            }
            if silent_parts < PARTS {
                // Notified only when this watcher is parked or the store is closed.
                let _ = self.changed.wait_for(&mut state, limit / PARTS);
                silent_parts = if state.moves == seen { silent_parts + 1 } else { 0 };
                seen = state.moves;
                continue;
            }
            let on_fatal = state.on_fatal.take();
            drop(state);
            if let Some(on_fatal) = on_fatal {
                on_fatal(format!("the disk has not answered for {} s", limit.as_secs_f32()));
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn silence_at_work_is_fatal_once() {
        let (tx, rx) = channel();
        let dog = Watchdog::with_limit(
            Box::new(move |why| tx.send(why).expect("the test waits")),
            Duration::from_millis(50),
        );
        dog.working();
        let why = rx.recv_timeout(Duration::from_secs(60)).expect("the watcher speaks");
        assert!(why.contains("not answered"), "{why}");
        dog.fatal("a second reason");
        assert!(rx.recv().is_err(), "once");
    }

    #[test]
    fn only_what_moves_is_a_sign_of_life() {
        let (limit, step) = (Duration::from_millis(500), Duration::from_millis(50));
        let (tx, rx) = channel();
        let dog = Watchdog::with_limit(Box::new(move |why| tx.send(why).expect("the test waits")), limit);
        let pulse = dog.pulse();
        dog.working();
        for _ in 0..30 {
            pulse();
            assert!(rx.recv_timeout(step).is_err(), "it moves");
        }
        let asked = (0..600).find(|_| {
            dog.working();
            rx.recv_timeout(step).is_ok()
        });
        assert!(asked.is_some());
    }
}
