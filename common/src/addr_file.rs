//! `<daemon>.addr`: one line with the address that a daemon really listens on, for supervisors and
//! tests. It appears by rename, so a reader sees all of it or nothing.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Where `daemon` under `dir` writes its address.
pub fn path(dir: &Path, daemon: &str) -> PathBuf {
    dir.join(format!("{daemon}.addr"))
}

/// Writes `dir/<daemon>.addr`.
pub fn write(dir: &Path, daemon: &str, addr: SocketAddr) -> io::Result<()> {
    replace(&path(dir, daemon), format!("{addr}\n").as_bytes())
}

/// Replaces a small file as a whole, durably.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut file = std::fs::File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    sync_parent(path)
}

/// Makes a rename to `path` durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(dir) => std::fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_what_was_there() {
        let dir = std::env::temp_dir().join(format!("gabion-addr-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for port in [1, 2] {
            write(&dir, "osd", SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
            assert_eq!(std::fs::read_to_string(path(&dir, "osd")).unwrap(), format!("127.0.0.1:{port}\n"));
        }
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
