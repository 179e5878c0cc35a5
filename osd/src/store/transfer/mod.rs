//! One placement group in a file: off a stopped store, and into another one that is the same OSD.
//!
//! What it is for: the OSDs that a group waits for are dead, and the disk of one of them can still be read. What makes it
//! safe, and what an operator must do, is in `osd/docs/format.md`, "Export and import"; in short:
//!
//! - A file is what one OSD held when it was stopped. After that its content can only change under a later activation, which
//!   the cluster's map remembers: a file that is out of date claims too little, never too much.
//! - Intervals name OSDs by their ids, so only a store of the same identity may take the file.
//! - The group's metadata is what makes its records visible, and it is written last. A file beside the store says that
//!   an import is under way, and keeps the daemon from starting.

mod export;
mod file;
mod import;
#[cfg(test)]
mod tests;

pub use export::export;
pub use file::{Header, Totals};
pub(super) use import::refuse_unfinished;
pub use import::{Import, Imported, abort, import};

use super::StoreError;
use gabion_proto::ids::*;
use std::io;
use std::path::{Path, PathBuf};

/// Why a group was not carried over.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the export is damaged: {0}")]
    Damaged(String),
    #[error("the export ends in its middle: it was cut short, or never finished")]
    CutShort,
    #[error("the export has version {0}, this program reads version {known}", known = file::VERSION)]
    Version(u32),
    #[error("{0}")]
    Refused(String),
}

fn at(path: &Path) -> impl Fn(io::Error) -> TransferError + '_ {
    move |source| TransferError::Io { path: path.to_owned(), source }
}

/// Left in a data directory whose content was exported for good.
const RETIRED: &str = "retired";

/// Names what is there once and for all times in which the directory is looked at.
fn write_durably(dir: &Path, name: &str, text: &str) -> Result<(), TransferError> {
    let (path, temp) = (dir.join(name), dir.join(format!("{name}.new")));
    std::fs::write(&temp, text).map_err(at(&temp))?;
    std::fs::File::open(&temp).and_then(|f| f.sync_all()).map_err(at(&temp))?;
    std::fs::rename(&temp, &path).map_err(at(&path))?;
    std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))
}

/// A store whose content was exported for good is not served any more: another disk may have its identity.
pub(super) fn refuse_retired(data_dir: &Path) -> Result<(), StoreError> {
    let path = data_dir.join(RETIRED);
    match path.try_exists() {
        Ok(false) => Ok(()),
        Ok(true) => Err(StoreError::Refused(format!(
            "this store was retired by an export, and another disk may be this OSD now; if none is, remove {}",
            path.display()
        ))),
        Err(e) => Err(super::open::fatal(&path, e)),
    }
}

/// A group as people type it.
fn group_in(text: &str) -> Option<PgId> {
    text.lines().next()?.parse().ok()
}
