//! Waits between tries.

use std::time::Duration;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Doubling waits with jitter, so that many clients do not come back at once.
#[derive(Debug, Default)]
pub struct Backoff {
    tries: u32,
}

impl Backoff {
    /// Whether nothing failed yet.
    pub fn is_first(&self) -> bool {
        self.tries == 0
    }
    /// After success.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
    /// How long to wait before the next try.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Duration {
        let full = BACKOFF_MIN.saturating_mul(1 << self.tries.min(8)).min(BACKOFF_MAX);
        self.tries = self.tries.saturating_add(1);
        full.mul_f64(rand::random_range(0.5..1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stay_bounded() {
        let mut b = Backoff::default();
        let waits: Vec<_> = (0..40).map(|_| b.next()).collect();
        assert!(waits[0] <= BACKOFF_MIN && waits[39] >= BACKOFF_MAX / 2);
        assert!(waits.iter().all(|w| *w <= BACKOFF_MAX));
    }
}
