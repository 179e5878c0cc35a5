//! Memory of this process that is resident, from `/proc/self/status` (proc(5)).

use anyhow::{Context, Result};

/// Now.
pub fn now_bytes() -> Result<u64> {
    status_bytes("VmRSS:")
}

/// At most, since the start or [`forget_peak`].
pub fn peak_bytes() -> Result<u64> {
    status_bytes("VmHWM:")
}

/// The peak begins anew (proc(5), `clear_refs`). Where the kernel does not let that, it goes on counting from the start.
pub fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// In KiB there.
fn status_bytes(field: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|l| l.strip_prefix(field));
    let kib = line.and_then(|l| l.split_whitespace().next()).context("/proc/self/status is short")?;
    Ok(kib.parse::<u64>()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_resident_with_more_in_use() {
        let before = now_bytes().unwrap();
        let used = vec![1u8; 64 << 20];
        assert!(now_bytes().unwrap() > before + (32 << 20));
        assert!(peak_bytes().unwrap() >= before + (32 << 20), "{}", used.len());
    }
}
