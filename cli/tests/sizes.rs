//! Sizes are read in powers of 1024 and printed human and exact.

use gabion_cli::size::{human, human_exact, parse, parse_u32};

#[test]
fn reads_units() {
    for (text, bytes) in [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1 << 10),
        ("64k", 64 << 10),
        ("3M", 3 << 20),
        ("10GiB", 10 << 30),
        ("2T", 2 << 40),
    ] {
        assert_eq!(parse(text), Ok(bytes), "{text}");
    }
}

#[test]
fn refuses_what_is_no_size() {
    for text in ["", "K", "-1", "1.5G", "1X", "1 G", "GiB", "99999999999999999999", "99999999T", "１K"] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(&format!("{text:?}")), "{error}");
    }
    assert!(parse_u32("4G").is_err());
}

#[test]
fn prints_human_and_exact() {
    assert_eq!(human(0), "0 B");
    assert_eq!(human(1023), "1023 B");
    assert_eq!(human(1024), "1.0 KiB");
    assert_eq!(human(u64::MAX), "16384.0 PiB");
    assert_eq!(human_exact(10 << 30), "10.0 GiB (10737418240)");
}
