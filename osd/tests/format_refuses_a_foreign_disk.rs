//! A disk that holds something else is refused before the monitors hear of it: else a disk that never
//! comes up would stay in the cluster map.

use std::process::Command;

#[test]
fn format_refuses_a_foreign_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut foreign = vec![0u8; 8 << 20];
    foreign[1080..1082].copy_from_slice(&[0x53, 0xef]); // ext4
    let block = dir.path().join("block");
    std::fs::write(&block, &foreign).unwrap();
    // Nobody answers on this port: a format that asked the monitors first would name it.
    let out = Command::new(env!("CARGO_BIN_EXE_gabion-osd"))
        .args(["format", "--size", "64M", "--monitors", "127.0.0.1:1", "--host", "h", "--data-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("is not empty and not a store"), "{said}");
    assert!(!said.contains("127.0.0.1:1"), "{said}");
    assert!(std::fs::read(&block).unwrap() == foreign, "the disk was changed");
}
