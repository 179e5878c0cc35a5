//! Whether this host can take a guest.

/// Left for the host itself.
const RESERVE_BYTES: u64 = 128 << 20;

pub fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

pub fn host_memory_bytes() -> u64 {
    meminfo("MemTotal")
}

/// The refusal, if any.
pub fn refusal(vcpus: u32, memory_bytes: u64) -> Option<String> {
    check(vcpus, memory_bytes, host_cpus(), meminfo("MemAvailable"))
}

fn check(vcpus: u32, memory_bytes: u64, cpus: u32, available_bytes: u64) -> Option<String> {
    if vcpus == 0 || vcpus > cpus {
        return Some(format!("it wants {vcpus} vCPUs; this host has {cpus}"));
    }
    if memory_bytes.saturating_add(RESERVE_BYTES) > available_bytes {
        let (want, have) = (memory_bytes >> 20, available_bytes >> 20);
        return Some(format!("it wants {want} MiB of memory; this host has {have} MiB free"));
    }
    None
}

fn meminfo(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_does_not_fit_and_says_why() {
        assert_eq!(check(2, 1 << 30, 2, 2 << 30), None);
        assert_eq!(check(3, 1 << 30, 2, 2 << 30).unwrap(), "it wants 3 vCPUs; this host has 2");
        assert!(check(1, 2 << 30, 2, 2 << 30).unwrap().contains("2048 MiB"));
        assert!(host_cpus() > 0 && host_memory_bytes() > 0);
    }
}
