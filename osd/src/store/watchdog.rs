//! The self-fence (rule S9): a disk that does not answer for too long stops its OSD, before its peers and the
//! monitors must guess. A thread of its own, because the store's thread may be the one that hangs.

use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Without an answer for this long the disk counts as gone.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);

pub type OnFatal = Box<dyn FnOnce(String) + Send>;

struct State {
    /// When the store's thread last said that it is at work; `None` while it waits for requests.
    working_since: Option<Instant>,
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
        Watchdog::with_limit(on_fatal, ANSWER_MAX)
    }

    pub fn with_limit(on_fatal: OnFatal, limit: Duration) -> Watchdog {
        let state = State { working_since: None, on_fatal: Some(on_fatal), parked: false, closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let watched = shared.clone();
        let spawned =
            std::thread::Builder::new().name("store-watch".into()).spawn(move || watched.watch(limit));
        if let Err(e) = spawned {
            tracing::error!("cannot start the store's watchdog: {e}");
        }
        Watchdog(shared)
    }

    /// Something has moved; from now on the next thing has to within the limit.
    pub fn working(&self) {
        let mut state = self.0.state.lock();
        state.working_since = Some(Instant::now());
        if std::mem::take(&mut state.parked) {
            self.0.changed.notify_one();
        }
    }

    /// Nothing is expected of the disk.
    pub fn idle(&self) {
        self.0.state.lock().working_since = None;
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
    fn watch(&self, limit: Duration) {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return;
            }
            let Some(since) = state.working_since else {
                state.parked = true;
                self.changed.wait(&mut state);
                continue;
            };
            if since.elapsed() < limit {
                let _ = self.changed.wait_until(&mut state, since + limit);
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
