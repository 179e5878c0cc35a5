//! CPU by what it went into.

use rustix::time::{ClockId, clock_gettime};

/// What an OSD, or a monitor, was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Taking in a map or an increment.
    Maps,
    Ticks,
    Heartbeats,
    /// Messages of other OSDs.
    Messages,
    /// What the own store lists.
    Lists,
    /// Encoding and decoding.
    Frames,
    Other,
    /// Carrying out commands and making increments.
    Agree,
}

impl Work {
    pub const ALL: [Work; 8] = [
        Work::Maps,
        Work::Ticks,
        Work::Heartbeats,
        Work::Messages,
        Work::Lists,
        Work::Frames,
        Work::Other,
        Work::Agree,
    ];
}

/// Seconds of CPU by work.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent([f64; Work::ALL.len()]);

fn thread_cpu_s() -> f64 {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

impl Spent {
    pub fn on<T>(&mut self, work: Work, f: impl FnOnce() -> T) -> T {
        let begun = thread_cpu_s();
        let done = f();
        self.0[work as usize] += thread_cpu_s() - begun;
        done
    }

    pub fn s(&self, work: Work) -> f64 {
        self.0[work as usize]
    }

    pub fn total_s(&self) -> f64 {
        self.0.iter().sum()
    }

    pub fn add(&mut self, other: &Spent) {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a += b);
    }
}

impl Spent {
    pub fn less(&self, before: &Spent) -> Spent {
        Spent(std::array::from_fn(|i| self.0[i] - before.0[i]))
    }

    /// A share of it.
    pub fn by(&self, parts: f64) -> Spent {
        Spent(self.0.map(|s| s / parts))
    }
}
