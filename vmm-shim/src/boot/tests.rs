use super::*;
use proptest::prelude::*;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::process::Command;

/// An ext4 image with these files, `None` where mke2fs is not installed.
fn image(files: &[(&str, &[u8])]) -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(&root).unwrap();
    for (path, content) in files {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    let raw = dir.path().join("raw");
    let mke2fs =
        ["/usr/sbin/mke2fs", "/sbin/mke2fs"].into_iter().find(|p| std::path::Path::new(p).exists())?;
    let made = Command::new(mke2fs).args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&raw).arg("16M").status();
    assert!(made.unwrap().success());
    Some((dir, raw))
}

macro_rules! image_or_skip {
    ($files:expr) => {
        match image($files) {
            Some(image) => image,
            None => {
                println!("SKIPPED: mke2fs is not installed");
                return;
            }
        }
    };
}

fn open(path: &std::path::Path) -> Arc<dyn DiskRead> {
    Arc::new(File::open(path).unwrap())
}

const FILES: &[(&str, &[u8])] = &[
    ("boot/vmlinuz-6.1.0-9-cloud-amd64", b"older"),
    ("boot/vmlinuz-6.1.0-10-cloud-amd64", b"newer"),
    ("boot/initrd.img-6.1.0-10-cloud-amd64", b"initrd"),
];

#[test]
fn takes_the_newest_kernel_of_a_bare_filesystem() {
    let (_dir, raw) = image_or_skip!(FILES);
    let found = find(open(&raw), "v").unwrap();
    assert_eq!(found.kernel, b"newer");
    assert_eq!(found.initrd.as_deref(), Some(&b"initrd"[..]));
    assert_eq!((found.root.as_str(), found.version.as_str()), ("/dev/vda", "6.1.0-10-cloud-amd64"));
}

#[test]
fn finds_the_filesystem_in_an_mbr_partition() {
    let (dir, raw) = image_or_skip!(FILES);
    let mut content = Vec::new();
    File::open(&raw).unwrap().read_to_end(&mut content).unwrap();
    let disk = dir.path().join("disk");
    let mut file = File::create(&disk).unwrap();
    let mut mbr = [0u8; 512];
    // The second entry: type Linux, from sector 2048.
    mbr[462 + 4] = 0x83;
    mbr[462 + 8..462 + 12].copy_from_slice(&2048u32.to_le_bytes());
    mbr[462 + 12..462 + 16].copy_from_slice(&((content.len() / 512) as u32).to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all(&mbr).unwrap();
    file.seek(SeekFrom::Start(2048 * 512)).unwrap();
    file.write_all(&content).unwrap();
    let found = find(open(&disk), "v").unwrap();
    assert_eq!((found.kernel.as_slice(), found.root.as_str()), (&b"newer"[..], "/dev/vda2"));
}

#[test]
fn says_what_is_missing() {
    let (dir, raw) = image_or_skip!(&[("etc/hostname", b"x")]);
    assert_eq!(find(open(&raw), "v").err().unwrap().to_string(), "volume v has no /boot/vmlinuz-*");
    let empty = dir.path().join("empty");
    File::create(&empty).unwrap().set_len(1 << 20).unwrap();
    assert!(matches!(find(open(&empty), "v"), Err(BootError::NoFilesystem { .. })));
}

proptest! {
    #[test]
    fn partition_tables_of_any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 2048..4096)) {
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        bytes[450] = 0xee;
        bytes[512..520].copy_from_slice(b"EFI PART");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let _ = find(Arc::new(file), "v");
    }
}
