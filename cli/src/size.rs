//! Sizes: read with K M G T (powers of 1024), printed human and exact.

const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// Reads `4096`, `64K`, `10G`, `10GiB`.
pub fn parse(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a size: use a whole number, with K, M, G or T for powers of 1024");
    let upper = text.trim().to_ascii_uppercase();
    let bare = upper.strip_suffix("IB").unwrap_or(&upper);
    let (digits, shift) = UNITS
        .iter()
        .find_map(|(unit, shift)| bare.strip_suffix(unit).map(|digits| (digits, *shift)))
        .unwrap_or((upper.as_str(), 0));
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let n: u64 = digits.parse().map_err(|_| bad())?;
    n.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// As [`parse`], for values that must fit 32 bits.
pub fn parse_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse(text)?).map_err(|_| format!("{text:?} is too large: at most 4G"))
}

/// `10.0 GiB`; exact below 1 KiB.
pub fn human(bytes: u64) -> String {
    for (unit, shift) in [("PiB", 50)].into_iter().chain(UNITS.map(|(u, s)| {
        let name = match u {
            "T" => "TiB",
            "G" => "GiB",
            "M" => "MiB",
            _ => "KiB",
        };
        (name, s)
    })) {
        if bytes >= 1 << shift {
            // Lossy beyond 53 bits, which the two digits shown cannot tell.
            return format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64);
        }
    }
    format!("{bytes} B")
}

/// `10.0 GiB (10737418240)`.
pub fn human_exact(bytes: u64) -> String {
    if bytes < 1024 { human(bytes) } else { format!("{} ({bytes})", human(bytes)) }
}
