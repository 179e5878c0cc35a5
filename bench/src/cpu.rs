//! CPU-seconds, from `/proc/PID/stat` (proc(5): fields 14 and 15, all threads, ended ones included) and `getrusage`.

use anyhow::{Context, Result};

/// User and system time of the processes so far. A process that is gone is an error: its share would be lost.
pub fn of_pids_s(pids: &[i32]) -> Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("process {pid}, whose CPU is to be counted, is gone"))?;
        ticks += parse_ticks(&stat).with_context(|| format!("/proc/{pid}/stat has an unknown form"))?;
    }
    // SAFETY: sysconf takes no pointers.
    let hz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks as f64 / hz.max(1) as f64)
}

fn parse_ticks(stat: &str) -> Option<u64> {
    // The command name is in parentheses and may hold anything, parentheses included.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Of this process, or of its children that have been waited for.
pub fn of_self_s() -> f64 {
    usage_s(libc::RUSAGE_SELF)
}

pub fn of_children_s() -> f64 {
    usage_s(libc::RUSAGE_CHILDREN)
}

/// User and system time of this process, apart.
pub fn of_self_parts_s() -> (f64, f64) {
    parts_s(libc::RUSAGE_SELF)
}

/// The same of its children that have been waited for.
pub fn of_children_parts_s() -> (f64, f64) {
    parts_s(libc::RUSAGE_CHILDREN)
}

fn usage_s(who: libc::c_int) -> f64 {
    let (user, system) = parts_s(who);
    user + system
}

fn parts_s(who: libc::c_int) -> (f64, f64) {
    // SAFETY: rusage is plain data that the call fills; it lives on this frame.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(who, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    (seconds(usage.ru_utime), seconds(usage.ru_stime))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_name() {
        let stat = "42 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 70 8 0 0 20 0 1 0";
        assert_eq!(parse_ticks(stat), Some(78));
        assert_eq!(parse_ticks("42 (x) S 1"), None);
        assert!(of_pids_s(&[std::process::id() as i32]).unwrap() >= 0.0);
        assert!(of_pids_s(&[i32::MAX]).is_err());
    }
}
