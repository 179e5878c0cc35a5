//! How much scrubs may read from the own disk: a token bucket on the time of events.

use super::Millis;
use gabion_proto::limits::{SCRUB_RATE_DEFAULT, SCRUB_RATE_MIN};

/// The bucket holds what this long brings.
const BURST_MS: u64 = 1_000;

/// What is read is known only afterwards, so the bucket may go below empty; nothing is begun before it is above again.
#[derive(Clone, Copy, Debug)]
pub struct ScrubBudget {
    rate_bytes_per_s: u64,
    credit_bytes: i64,
    at: Millis,
}

impl ScrubBudget {
    pub fn new(now: Millis) -> ScrubBudget {
        let mut full = ScrubBudget { rate_bytes_per_s: SCRUB_RATE_DEFAULT, credit_bytes: 0, at: now };
        full.credit_bytes = full.full_bytes();
        full
    }

    pub fn set_rate(&mut self, rate_bytes_per_s: u64) {
        self.rate_bytes_per_s = rate_bytes_per_s.clamp(SCRUB_RATE_MIN, i64::MAX as u64 / BURST_MS);
        self.credit_bytes = self.credit_bytes.min(self.full_bytes());
    }

    fn full_bytes(&self) -> i64 {
        // The rate is bounded so that this fits.
        (self.rate_bytes_per_s / 1_000 * BURST_MS) as i64
    }

    /// Time passes.
    pub fn refill(&mut self, now: Millis) {
        let elapsed = now.saturating_sub(self.at).min(1_000 * BURST_MS);
        let gain = u128::from(elapsed) * u128::from(self.rate_bytes_per_s) / 1_000;
        if gain == 0 {
            return;
        }
        self.at = now;
        let gain = gain.min(i64::MAX as u128) as i64;
        self.credit_bytes = self.credit_bytes.saturating_add(gain).min(self.full_bytes());
    }

    pub fn allows(&self) -> bool {
        self.credit_bytes > 0
    }

    pub fn spend(&mut self, bytes: u64) {
        self.credit_bytes = self.credit_bytes.saturating_sub(bytes.min(i64::MAX as u64) as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_rate_however_large_a_read_is() {
        let mut budget = ScrubBudget::new(0);
        budget.set_rate(1 << 20);
        let (mut read, mut now) = (0u64, 0);
        while now < 100_000 {
            now += 7;
            budget.refill(now);
            while budget.allows() {
                budget.spend(4 << 20);
                read += 4 << 20;
            }
        }
        let most = (101 << 20) + (4 << 20);
        assert!((99 << 20..=most).contains(&read), "{read} bytes in 100 s");
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut budget = ScrubBudget::new(0);
        budget.refill(1_000_000_000);
        budget.spend(SCRUB_RATE_DEFAULT);
        assert!(!budget.allows());
    }
}
