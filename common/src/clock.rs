//! The clock that leases run on: monotonic, and it goes on while the machine is suspended.

/// Milliseconds of `CLOCK_BOOTTIME`.
pub fn boottime_ms() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid timespec that lives across the call, which only writes to it.
    let rc = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut t) };
    assert_eq!(rc, 0, "CLOCK_BOOTTIME exists on every Linux that this runs on");
    t.tv_sec as u64 * 1000 + t.tv_nsec as u64 / 1_000_000
}

#[cfg(test)]
mod tests {
    #[test]
    fn does_not_run_backwards() {
        let a = super::boottime_ms();
        assert!(a > 0);
        assert!(super::boottime_ms() >= a);
    }
}
