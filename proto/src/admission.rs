//! Whether a host can take one more guest: a pure rule that the monitors apply when somebody asks and
//! the host's agent applies before it starts one.

/// vCPUs of all guests of a host, in percent of its cores.
pub const CPU_RATIO_PERCENT: u64 = 100;
/// Memory that guests never get: it stays with the host and its daemons.
pub const HOST_RESERVE_BYTES: u64 = 2 << 30;

/// CPUs and memory, of a host or of a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpus: u32,
    pub memory_bytes: u64,
}

/// Why `guest` cannot run beside `running` on `host`, in one sentence; `None` when it can.
pub fn refusal(
    host: Resources,
    running: impl IntoIterator<Item = Resources>,
    guest: Resources,
) -> Option<String> {
    let (cpus, want_cpus) = (u64::from(host.cpus), u64::from(guest.cpus));
    if want_cpus == 0 || want_cpus > cpus {
        return Some(format!("it wants {want_cpus} vCPUs; the host has {cpus} cores"));
    }
    let (mut taken_cpus, mut taken_bytes) = (0u64, 0u64);
    for other in running {
        taken_cpus += u64::from(other.cpus);
        taken_bytes = taken_bytes.saturating_add(other.memory_bytes);
    }
    let cpus_max = cpus * CPU_RATIO_PERCENT / 100;
    if taken_cpus + want_cpus > cpus_max {
        let ratio = CPU_RATIO_PERCENT as f64 / 100.0;
        return Some(format!(
            "it wants {want_cpus} vCPUs; running guests have {taken_cpus} of the {cpus_max} that the host gives \
             (cpu_ratio {ratio:.1})"
        ));
    }
    let for_guests = host.memory_bytes.saturating_sub(HOST_RESERVE_BYTES);
    if taken_bytes.saturating_add(guest.memory_bytes) > for_guests {
        let mib = |bytes: u64| bytes >> 20;
        return Some(format!(
            "it wants {} MiB of memory; running guests have {} of the {} MiB that the host gives (it keeps {})",
            mib(guest.memory_bytes),
            mib(taken_bytes),
            mib(for_guests),
            mib(HOST_RESERVE_BYTES)
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn of(cpus: u32, gib: u64) -> Resources {
        Resources { cpus, memory_bytes: gib * GIB }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_figures() {
        let host = of(4, 10);
        assert_eq!(refusal(host, [], of(4, 8)), None);
        assert_eq!(refusal(host, [], of(5, 1)).unwrap(), "it wants 5 vCPUs; the host has 4 cores");
        assert!(refusal(host, [], of(0, 1)).is_some());
        assert_eq!(
            refusal(host, [of(2, 1), of(1, 1)], of(2, 1)).unwrap(),
            "it wants 2 vCPUs; running guests have 3 of the 4 that the host gives (cpu_ratio 1.0)"
        );
        assert_eq!(
            refusal(host, [of(1, 5)], of(1, 4)).unwrap(),
            "it wants 4096 MiB of memory; running guests have 5120 of the 8192 MiB that the host gives (it keeps 2048)"
        );
        assert!(refusal(of(2, 1), [], of(1, 0)).is_none());
        assert!(refusal(of(2, 1), [], of(1, 1)).is_some(), "a host smaller than its reserve");
    }

    proptest! {
        #[test]
        fn admitted_guests_never_exceed_the_host(
            cpus in 0u32..16,
            memory_bytes in 0..64 * GIB,
            asked in proptest::collection::vec((0u32..8, any::<u64>()), 0..20),
        ) {
            let host = Resources { cpus, memory_bytes };
            let mut running: Vec<Resources> = Vec::new();
            for (cpus, raw) in asked {
                let guest = Resources { cpus, memory_bytes: raw % (16 * GIB) };
                if refusal(host, running.iter().copied(), guest).is_none() {
                    running.push(guest);
                }
            }
            let bytes: u64 = running.iter().map(|r| r.memory_bytes).sum();
            prop_assert!(running.iter().map(|r| r.cpus).sum::<u32>() <= cpus);
            prop_assert!(running.is_empty() || bytes + HOST_RESERVE_BYTES <= memory_bytes || bytes == 0);
        }
    }
}
