//! How fast recovery may go: as fast as it can while clients are idle, and under their load as fast as leaves an operation at
//! most half as long again as without recovery. An operator's limit stands above both.
//!
//! How long operations take is not measured one by one: in a window of time the mean is the time that all of them spent here
//! divided by how many ended (Little's law), which is exact however coarse the clock is. What is healthy
//! depends on how many operations there are at a time, so it is kept for each power of two of that, and measured
//! when nothing is being recovered; while something is, recovery pauses for that now and then. Objects that
//! clients wait for do not pass through here, and the time that operations wait for them is not latency that less recovery would
//! mend; but a client that does nothing but wait for them is no idle one.

use super::Millis;
use super::context::Load;
use super::turns::Turns;
use gabion_proto::ids::PgId;
use gabion_proto::limits::REBUILD_RATE_MIN;

/// Latency is judged once in a window, which lasts at least so long.
const WINDOW_MS: Millis = 500;
/// Fewer operations say little about latency: the window goes on, until it is so long.
const OPERATIONS_MIN: u64 = 16;
const WINDOW_MAX_MS: Millis = 4_000;
/// Operations that are here for a smaller part of the time than one in so many are nobody's load.
const IDLE_PART: u64 = 8;
/// At most so many times the healthy latency, in percent.
const TOLERATED_PERCENT: u64 = 150;
/// Windows between two pauses to measure what is healthy.
const PROBE_EVERY: u32 = 40;
/// The first window of a pause lets end what is under way, the second one is measured.
const PROBE_WINDOWS: u32 = 2;
/// Classes of load: 1, 2, 3 to 4, 5 to 8, ... operations at a time.
const LOADS: usize = 8;
/// Recovery beside clients begins at this rate, in bytes per second: many OSDs may bring something to the same disk. It doubles with each
/// window until clients feel it.
const RATE_AT_FIRST: u64 = REBUILD_RATE_MIN;
/// Recovery that waits for its turn looks again after so long in any case.
const WAKE_MS_MAX: u64 = 1_000;
/// What may be saved up: what the rate moves in this time.
const SAVED_MS: u64 = 50;
/// What may be under way, beside one piece: what the rate moves in this time, which is about what a piece takes from one disk to the
/// other. A client's operation comes to a disk behind all of it.
const AHEAD_MS: u64 = 4;

/// Sums over one window.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    began: Millis,
    /// Operations under way times milliseconds.
    spent_ms: u64,
    /// Those that had to wait before they could start.
    waited_ms: u64,
    ended: u64,
    moved_bytes: u64,
    /// Something was under way at some time of it.
    recovering: bool,
}

/// See the module docs.
#[derive(Clone, Debug)]
pub struct Throttle {
    /// The operator's limit.
    limit: Option<u64>,
    /// What clients leave, in bytes per second; none while they are idle.
    fair: Option<u64>,
    /// Clients have not felt it since it began.
    unfelt: bool,
    credit_bytes: i64,
    at: Millis,
    window: Window,
    /// The window before was one of operations of which none ended.
    in_vain: bool,
    healthy_us: [Option<u64>; LOADS],
    /// Windows until the next pause, and of the one that is going on.
    probe_in: u32,
    probing: u32,
    pub turns: Turns,
}

impl Throttle {
    pub fn new(now: Millis) -> Throttle {
        Throttle {
            limit: None,
            fair: None,
            unfelt: true,
            credit_bytes: 0,
            at: now,
            window: Window { began: now, ..Window::default() },
            in_vain: false,
            healthy_us: [None; LOADS],
            probe_in: PROBE_EVERY,
            probing: 0,
            turns: Turns::default(),
        }
    }

    /// 0: none.
    pub fn set_limit(&mut self, bytes_per_s: u64) {
        self.limit = (bytes_per_s > 0).then(|| bytes_per_s.max(REBUILD_RATE_MIN));
    }

    fn rate(&self) -> Option<u64> {
        self.limit.into_iter().chain(self.fair).min()
    }

    /// Time passes; until now so many operations of clients were under way, others waited to start, and so much recovery was under way.
    pub fn elapse(&mut self, now: Millis, operations: usize, waiting: usize, recovery_bytes: u64) {
        let ms = now.saturating_sub(self.at);
        self.at = now;
        self.window.spent_ms += ms.min(WINDOW_MS) * operations as u64;
        self.window.waited_ms += ms.min(WINDOW_MS) * waiting as u64;
        self.window.recovering |= recovery_bytes > 0;
        if let Some(rate) = self.rate() {
            let full = (rate / 1_000).saturating_mul(SAVED_MS).min(i64::MAX as u64) as i64;
            let gain = u128::from(rate) * u128::from(ms.min(1_000)) / 1_000;
            let gain = gain.min(i64::MAX as u128) as i64;
            self.credit_bytes = self.credit_bytes.saturating_add(gain).min(full);
        }
        if now >= self.window.began + WINDOW_MS {
            self.judge(now);
        }
    }

    /// Operations of clients have ended.
    pub fn ended(&mut self, operations: u64) {
        self.window.ended += operations;
    }

    /// Recovery has moved so much.
    pub fn spend(&mut self, bytes: u64) {
        self.window.moved_bytes += bytes;
        if self.rate().is_some() {
            self.credit_bytes = self.credit_bytes.saturating_sub(bytes.min(i64::MAX as u64) as i64);
        }
    }

    /// Whether another piece that nobody waits for may be begun, with so much under way.
    pub fn allows(&self, recovery_bytes: u64) -> bool {
        let ahead = |rate: u64| recovery_bytes == 0 || recovery_bytes <= rate / 1_000 * AHEAD_MS;
        self.probing == 0 && self.rate().is_none_or(|rate| self.credit_bytes > 0 && ahead(rate))
    }

    /// A group that may move something now, with so much under way.
    pub fn next_turn(&mut self, under_way: Load) -> Option<PgId> {
        let allowed = !self.turns.is_empty() && self.allows(under_way.moving());
        let nothing = under_way.objects == 0 || !self.limits();
        allowed.then(|| self.turns.next(nothing)).flatten()
    }

    /// When what was spent is made up for and somebody waits for that. What else is waited for ends with an event.
    pub fn wake_at(&self) -> Option<Millis> {
        let rate = self.rate().filter(|_| !self.turns.is_empty() && self.probing == 0)?;
        let owed = u64::try_from(1_i64.saturating_sub(self.credit_bytes)).unwrap_or(0);
        (owed > 0).then(|| self.at + (owed.saturating_mul(1_000) / rate.max(1)).min(WAKE_MS_MAX) + 1)
    }

    /// Recovery may not go as fast as it could.
    pub fn limits(&self) -> bool {
        self.rate().is_some()
    }

    /// Recovery pauses, so that what is healthy can be measured.
    pub fn probes(&self) -> bool {
        self.probing > 0
    }

    /// A window is over.
    fn judge(&mut self, now: Millis) {
        let window_ms = (now - self.window.began).max(1);
        let busy = (self.window.spent_ms + self.window.waited_ms) * IDLE_PART >= window_ms;
        // Who waits for what cannot be had is no load.
        self.in_vain &= busy && self.window.ended == 0;
        if busy && self.window.ended < OPERATIONS_MIN {
            if !self.in_vain {
                self.begin_slowly();
            }
            if window_ms < WINDOW_MAX_MS {
                return;
            }
        }
        let w = std::mem::replace(&mut self.window, Window { began: now, ..Window::default() });
        self.in_vain = busy && w.ended == 0;
        if w.ended == 0 || (w.ended < OPERATIONS_MIN && !busy) {
            (self.fair, self.probing) = (None, 0);
            return;
        }
        let latency_us = w.spent_ms * 1_000 / w.ended;
        let at_a_time = (w.spent_ms / window_ms).max(1);
        let load = (at_a_time.next_power_of_two().trailing_zeros() as usize).min(LOADS - 1);
        let healthy = &mut self.healthy_us[load];
        if !w.recovering {
            *healthy = Some(healthy.map_or(latency_us, |h| (3 * h + latency_us) / 4));
            match self.probing {
                // What comes next is another rebuild.
                0 => self.fair = None,
                _ => self.probing -= 1,
            }
            return self.begin_slowly();
        }
        if self.probing > 0 {
            self.probing -= 1;
            return;
        }
        self.probe_in = self.probe_in.saturating_sub(1);
        let Some(healthy) = *healthy else { return self.probe() };
        if self.probe_in == 0 {
            return self.probe();
        }
        let moved = w.moved_bytes * 1_000 / window_ms;
        let tolerated = (healthy * TOLERATED_PERCENT / 100).max(1);
        let now_fair = self.fair.unwrap_or(moved);
        let next = if latency_us > tolerated {
            self.unfelt = false;
            // By as much as it is too slow, within bounds.
            let percent = (100 * tolerated / latency_us.max(1)).clamp(30, 90);
            now_fair.min(moved.max(REBUILD_RATE_MIN)) / 100 * percent
        } else if moved >= now_fair / 2 {
            let more = if self.unfelt { now_fair } else { now_fair / 8 + (1 << 20) };
            now_fair.saturating_add(more)
        } else {
            now_fair
        };
        self.fair = Some(next.max(REBUILD_RATE_MIN));
    }

    fn probe(&mut self) {
        (self.probing, self.probe_in) = (PROBE_WINDOWS, PROBE_EVERY);
        self.begin_slowly();
    }

    /// There are clients, and nothing is known yet of what they leave.
    fn begin_slowly(&mut self) {
        if self.fair.is_none() {
            (self.fair, self.unfelt) = (Some(RATE_AT_FIRST), true);
            self.credit_bytes = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const PIECE: u64 = gabion_proto::limits::PIECE_BYTES as u64;

    /// A disk that recovery and clients share. An operation alone takes `alone_us`; the disk's share that recovery takes makes
    /// it longer. `depth` operations at a time, one millisecond a step.
    struct Disk {
        throttle: Throttle,
        now: Millis,
        full_bytes_per_ms: u64,
        alone_us: u64,
        depth: u64,
        ended_us: u64,
        moved: u64,
        under_way: u64,
        latency_us: u64,
        ended: u64,
    }

    impl Disk {
        fn new(depth: u64) -> Disk {
            Disk {
                throttle: Throttle::new(0),
                now: 0,
                full_bytes_per_ms: 500 * MIB / 1_000,
                alone_us: 400,
                depth,
                ended_us: 0,
                moved: 0,
                under_way: 0,
                latency_us: 0,
                ended: 0,
            }
        }

        /// How long operations take in the mean of the next `ms`.
        fn mean_us(&mut self, ms: u64) -> u64 {
            let before = self.ended;
            self.run(ms, true);
            ms * 1_000 * self.depth / (self.ended - before).max(1)
        }

        fn run(&mut self, ms: u64, recovering: bool) -> u64 {
            let before = self.moved;
            for _ in 0..ms {
                self.now += 1;
                let moving = self.under_way.min(self.full_bytes_per_ms);
                let share = 100 * moving / self.full_bytes_per_ms;
                self.latency_us = self.alone_us * self.depth.max(1) * 100 / (100 - share.min(95));
                self.throttle.elapse(self.now, self.depth as usize, 0, self.under_way);
                self.ended_us += 1_000 * self.depth;
                let ended = self.ended_us / self.latency_us;
                self.ended_us -= ended * self.latency_us;
                self.throttle.ended(ended);
                self.ended += ended;
                self.under_way -= moving;
                self.moved += moving;
                while recovering && self.under_way < 32 * MIB && self.throttle.allows(self.under_way) {
                    self.under_way += PIECE;
                    self.throttle.spend(PIECE);
                }
            }
            (self.moved - before) * 1_000 / ms
        }
    }

    #[test]
    fn idle_clients_leave_the_whole_disk() {
        let mut disk = Disk::new(0);
        let rate = disk.run(10_000, true);
        assert!(rate > 495 * MIB, "{rate}");
    }

    #[test]
    fn under_load_operations_take_at_most_half_as_long_again() {
        for depth in [1, 6, 32] {
            let mut disk = Disk::new(depth);
            disk.run(3_000, false);
            let healthy = disk.latency_us;
            disk.run(20_000, true);
            let slowest = (0..60).map(|_| disk.mean_us(1_000)).max().unwrap_or(0);
            let (mean, rate) = (disk.mean_us(60_000), disk.run(10_000, true));
            assert!(mean <= healthy * 3 / 2, "depth {depth}: {mean} us instead of {healthy}");
            assert!(slowest <= healthy * 2, "depth {depth}: {slowest} us instead of {healthy}");
            assert!(rate > 40 * MIB, "depth {depth}: {rate} bytes/s are left of 500 MiB/s");
        }
    }

    /// A client of one operation at a time that always wants an object that a member lacks: each operation waits for what is under way
    /// and for that object. How many of them end says that nobody is there.
    #[test]
    fn a_client_that_waits_for_objects_is_not_an_idle_one() {
        let mut disk = Disk::new(0);
        let mut waits = Vec::new();
        while waits.len() < 400 {
            let object = (disk.under_way + 4 * MIB).div_ceil(disk.full_bytes_per_ms);
            for _ in 0..object {
                disk.now += 1;
                disk.throttle.elapse(disk.now, 0, 1, disk.under_way);
                let moving = disk.under_way.min(disk.full_bytes_per_ms);
                (disk.under_way, disk.moved) = (disk.under_way - moving, disk.moved + moving);
                while disk.under_way < 32 * MIB && disk.throttle.allows(disk.under_way) {
                    disk.under_way += PIECE;
                    disk.throttle.spend(PIECE);
                }
            }
            disk.throttle.spend(4 * MIB);
            disk.throttle.ended(1);
            waits.push(object);
        }
        let late = &waits[waits.len() / 2..];
        let mean = late.iter().sum::<u64>() / late.len() as u64;
        assert!(mean <= 17, "{mean} ms, of which the object itself takes 9");
    }

    /// What cannot be had is waited for in vain: recovery of everything else need not be slow for that.
    #[test]
    fn operations_that_wait_for_ever_are_no_load() {
        let mut disk = Disk::new(0);
        let moved = (0..30_000).fold(0, |moved, _| {
            disk.now += 1;
            disk.throttle.elapse(disk.now, 0, 1, disk.under_way);
            let moving = disk.under_way.min(disk.full_bytes_per_ms);
            disk.under_way -= moving;
            while disk.under_way < 32 * MIB && disk.throttle.allows(disk.under_way) {
                disk.under_way += PIECE;
                disk.throttle.spend(PIECE);
            }
            if disk.now > 10_000 { moved + moving } else { 0 }
        });
        assert!(moved / 20 > 450 * MIB, "{moved} bytes in 20 s");
    }

    /// An OSD that has just started knows nothing of its healthy time.
    #[test]
    fn what_is_healthy_is_found_out_during_recovery() {
        let mut disk = Disk::new(4);
        disk.run(20_000, true);
        let mean = disk.mean_us(20_000);
        assert!(mean <= 4 * 400 * 3 / 2, "{mean} us");
    }

    /// More operations at a time take longer by themselves.
    #[test]
    fn a_load_that_grows_is_not_taken_for_recovery() {
        let mut disk = Disk::new(1);
        disk.run(3_000, false);
        disk.run(20_000, true);
        disk.depth = 32;
        disk.run(30_000, true);
        let rate = disk.run(10_000, true);
        assert!(rate > 40 * MIB, "{rate}");
    }

    #[test]
    fn an_operators_limit_is_kept() {
        let mut disk = Disk::new(0);
        disk.throttle.set_limit(20 * MIB);
        let rate = disk.run(20_000, true);
        assert!((15 * MIB..=21 * MIB).contains(&rate), "{rate}");
        disk.throttle.set_limit(0);
        assert!(disk.run(5_000, true) > 450 * MIB);
    }
}
