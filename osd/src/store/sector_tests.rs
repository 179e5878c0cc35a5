//! On block devices with sectors of 512 and of 4,096 bytes, past the page cache: rule S7.

use super::fsck_tests::{one_of_everything, txn};
use super::model::*;
use super::tests::IDENTITY;
use super::*;
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: u64 = 48 << 20;

/// A loop device on a file; taken down again when dropped.
struct Loop(PathBuf);

impl Loop {
    /// `None` where this machine makes none: said aloud by the caller.
    fn new(file: &Path, sector_bytes: u32) -> Result<Loop, String> {
        let made = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", &sector_bytes.to_string()])
            .arg(file)
            .output()
            .map_err(|e| format!("losetup: {e}"))?;
        if !made.status.success() {
            return Err(format!("losetup: {}", String::from_utf8_lossy(&made.stderr).trim()));
        }
        Ok(Loop(String::from_utf8_lossy(&made.stdout).trim().into()))
    }

    /// As the kernel says it.
    fn sector_bytes(&self) -> Option<u32> {
        let name = self.0.file_name()?.to_str()?;
        let path = format!("/sys/block/{name}/queue/logical_block_size");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !done.is_ok_and(|s| s.success()) {
            println!("{} is left behind", self.0.display());
        }
    }
}

fn works_on(sector_bytes: u32) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("disk");
    std::fs::File::create(&file).and_then(|f| f.set_len(SIZE)).expect("makes a file");
    let device = match Loop::new(&file, sector_bytes) {
        Ok(device) => device,
        Err(why) => {
            println!("SKIPPED: no loop device with {sector_bytes}-byte sectors here ({why}); needs root");
            return;
        }
    };
    assert_eq!(device.sector_bytes(), Some(sector_bytes));
    // The device refuses what is not aligned, so that the test would notice.
    let direct = device::open_direct(&device.0, device::Access::Read, 0).expect("opens");
    let mut unaligned = [0u8; 100];
    let read = std::os::unix::fs::FileExt::read_at(&direct, &mut unaligned, 0);
    assert!(read.is_err(), "{} takes unaligned reads", device.0.display());

    for engine in [Engine::Auto, Engine::Plain] {
        let data = dir.path().join(format!("{engine:?}"));
        std::fs::create_dir(&data).expect("makes a directory");
        std::os::unix::fs::symlink(&device.0, data.join("block")).expect("links");
        let zeros = vec![0; 1 << 20];
        std::os::unix::fs::FileExt::write_all_at(
            &std::fs::OpenOptions::new().write(true).open(&device.0).expect("opens"),
            &zeros,
            0,
        )
        .expect("clears the device");
        format(&data, SIZE, IDENTITY).expect("formats");
        let mut store = open_with(&data, engine).expect("opens");
        let mut model = Model::default();
        let mut commit = |store: &mut DirStore, ops| {
            let txn = txn(ops);
            assert!(model.apply(&txn));
            assert_eq!(store.commit(vec![txn]), [Ok(())]);
        };
        commit(&mut store, one_of_everything());
        assert_eq!(store.background(), Ok(false));
        for n in 0..40u64 {
            let blocks = (n as u32 % 30..n as u32 % 30 + 3).map(|b| (b, n as u32 + 50)).collect();
            let content = content(&blocks);
            let (prev, version) = (v(n + 1), v(n + 2));
            commit(&mut store, vec![TxnOp::Write { object: object(0, 0), prev, version, content }]);
        }
        // Gone without a word, with records in the journal.
        drop(store);
        let report = fsck(&data, true).expect("checks");
        assert!(report.is_clean() && report.blocks_read > 0, "{report}");
        let mut frozen = open_frozen(&data).expect("opens for reading");
        assert_eq!(Model::of(&mut frozen.0), model.visible());
        drop(frozen);
        let mut store = open_with(&data, engine).expect("opens again");
        assert_eq!(Model::of(&mut store), model.visible());
        drop(store);
        let report = fsck(&data, true).expect("checks");
        assert!(report.is_clean() && report.blocks_read > 0, "{report}");
    }
}

#[test]
fn a_device_with_512_byte_sectors() {
    works_on(512);
}

#[test]
fn a_device_with_4096_byte_sectors() {
    works_on(4096);
}
