//! A store in a directory: `block` (file, or link to a block device), `index/` and `lock`.

use super::buffer::{Block, BlocksMut};
use super::chunk_store::ChunkStore;
use super::device::{Access, Completion, Device, FileDevice, Request, Traffic};
use super::layout::{FORMAT_VERSION, Geometry, Superblock};
use super::recover::{format_parts, read_superblock};
use super::rocks::RocksKv;
use super::transfer;
use super::uring::UringDevice;
use super::wake::Waker;
use super::{Identity, StoreError};
use gabion_proto::limits::{BLOCK_BYTES, CHUNK_BYTES};
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::fd::OwnedFd;
use std::path::Path;

/// What the superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    pub format_version: u32,
    pub identity: Identity,
    pub size_bytes: u64,
    pub journal_bytes: u64,
    pub chunks: u32,
    pub generation: u64,
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "cluster  {}", self.identity.cluster)?;
        writeln!(f, "osd      {}", self.identity.osd)?;
        writeln!(f, "disk     {}", self.identity.disk)?;
        writeln!(f, "format   {}", self.format_version)?;
        writeln!(f, "size     {} bytes, {} chunks", self.size_bytes, self.chunks)?;
        write!(f, "journal  {} bytes", self.journal_bytes)
    }
}

/// A store that holds its directory's lock for as long as it lives.
pub type DirStore = ChunkStore<LockedDevice, RocksKv>;

/// The device together with the lock of its directory.
pub struct LockedDevice {
    device: Box<dyn Device>,
    _lock: File,
}

impl LockedDevice {
    pub(super) fn new(device: Box<dyn Device>, lock: File) -> LockedDevice {
        LockedDevice { device, _lock: lock }
    }
}

impl Device for LockedDevice {
    fn blocks(&self) -> u64 {
        self.device.blocks()
    }
    fn submit(&mut self, tag: u64, request: Request) {
        self.device.submit(tag, request);
    }
    fn complete(&mut self, out: &mut Vec<Completion>) {
        self.device.complete(out);
    }
    fn wait(&mut self) {
        self.device.wait();
    }
    fn waker(&self) -> Waker {
        self.device.waker()
    }
    fn completions(&self) -> Option<std::io::Result<OwnedFd>> {
        self.device.completions()
    }
    fn hand_over(&mut self) -> bool {
        self.device.hand_over()
    }
    fn buffer(&mut self, count: usize) -> BlocksMut {
        self.device.buffer(count)
    }
    fn read_now(&mut self, block: u64, buffer: &mut [Block]) -> std::io::Result<()> {
        self.device.read_now(block, buffer)
    }
    fn traffic(&self) -> Traffic {
        self.device.traffic()
    }
}

pub(super) fn fatal(path: &Path, e: impl fmt::Display) -> StoreError {
    StoreError::Fatal(format!("{}: {e}", path.display()))
}

fn lock(data_dir: &Path) -> Result<File, StoreError> {
    lock_with(data_dir, OpenOptions::new().create(true).truncate(false).write(true))
}

/// Locks a directory that may be on a file system for reading only. Every formatted one has the file.
pub(super) fn lock_existing(data_dir: &Path) -> Result<File, StoreError> {
    lock_with(data_dir, OpenOptions::new().read(true))
}

fn lock_with(data_dir: &Path, options: &OpenOptions) -> Result<File, StoreError> {
    let path = data_dir.join("lock");
    let file = options.open(&path).map_err(|e| fatal(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(fatal(&path, "another process uses this store")),
        Err(TryLockError::Error(e)) => Err(fatal(&path, e)),
    }
}

/// Signatures of file systems, partition tables, volume managers and of a store whose superblock got damaged
/// lie in the first megabyte.
const FOREIGN_BYTES: u64 = 1 << 20;

/// Refuses a disk that already holds something.
fn refuse_foreign(device: &mut FileDevice, block: &Path) -> Result<(), StoreError> {
    let mut head = BlocksMut::zeroed(device.blocks().min(FOREIGN_BYTES / u64::from(BLOCK_BYTES)) as usize);
    device.read_now(0, head.blocks_mut()).map_err(|e| fatal(block, e))?;
    if head.bytes().iter().any(|b| *b != 0) {
        return Err(StoreError::Invalid(format!(
            "{} is not empty and not a store; to use it anyway, clear its first {FOREIGN_BYTES} bytes",
            block.display()
        )));
    }
    Ok(())
}

/// Whether [`format()`] would find nothing in the way: there is no block device or file yet, or a blank one.
pub fn ensure_blank(data_dir: &Path) -> Result<(), StoreError> {
    let block = data_dir.join("block");
    match block.try_exists() {
        Ok(false) => Ok(()),
        Ok(true) => refuse_foreign(&mut FileDevice::open(&block, Access::Read)?, &block),
        Err(e) => Err(fatal(&block, e)),
    }
}

/// Makes an empty store of `size_bytes` in `data_dir`. A formatted disk is refused.
pub fn format(data_dir: &Path, size_bytes: u64, identity: Identity) -> Result<(), StoreError> {
    let size = size_bytes / u64::from(CHUNK_BYTES) * u64::from(CHUNK_BYTES);
    let geometry = Geometry::for_size(size);
    if geometry.slots == 0 {
        return Err(StoreError::Invalid(format!("{size_bytes} bytes are too few for a store")));
    }
    fs::create_dir_all(data_dir).map_err(|e| fatal(data_dir, e))?;
    let _lock = lock(data_dir)?;
    let block = data_dir.join("block");
    let mut device = FileDevice::open(&block, Access::Create)?;
    if device.blocks() > 0 && read_superblock(&mut device).is_ok() {
        return Err(StoreError::Invalid(format!("{} holds a store already", block.display())));
    }
    refuse_foreign(&mut device, &block)?;
    device.preallocate(size).map_err(|e| fatal(&block, e))?;
    let index = data_dir.join("index");
    if index.exists() {
        // Left by a format that was interrupted before it wrote the superblock.
        fs::remove_dir_all(&index).map_err(|e| fatal(&index, e))?;
    }
    let mut kv = RocksKv::open(&index, true).map_err(|e| fatal(&index, e))?;
    File::open(data_dir).and_then(|d| d.sync_all()).map_err(|e| fatal(data_dir, e))?;
    format_parts(&mut device, &mut kv, identity, (size, geometry.journal_blocks), rand::random())
}

/// How the disk is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where it is permitted, else plain reads and writes.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Plain reads and writes, one after the other.
    Plain,
}

fn open_device(block: &Path, engine: Engine) -> Result<Box<dyn Device>, StoreError> {
    if engine != Engine::Plain {
        match UringDevice::open(block) {
            Ok(device) => return Ok(Box::new(device)),
            Err(e) if engine == Engine::Auto && refused(&e) => tracing::warn!(
                error = %e,
                "io_uring is not permitted here (seccomp, or kernel.io_uring_disabled): the disk is used one request at a time"
            ),
            Err(e) => return Err(fatal(block, e)),
        }
    }
    Ok(Box::new(FileDevice::open(block, Access::ReadWrite)?))
}

/// The kernel has no io_uring, or none for this process.
fn refused(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::ENOMEM))
}

/// Opens the store in `data_dir` for the only process that may use it.
pub fn open(data_dir: &Path) -> Result<DirStore, StoreError> {
    open_with(data_dir, Engine::Auto)
}

/// The same through a chosen engine.
pub fn open_with(data_dir: &Path, engine: Engine) -> Result<DirStore, StoreError> {
    let lock = lock(data_dir)?;
    transfer::refuse_unfinished(data_dir)?;
    open_locked(data_dir, engine, lock)
}

/// Also where an import has begun and not ended: for the one who ends it.
pub(super) fn open_unfinished(data_dir: &Path, engine: Engine) -> Result<DirStore, StoreError> {
    let lock = lock(data_dir)?;
    transfer::refuse_retired(data_dir)?;
    open_locked(data_dir, engine, lock)
}

fn open_locked(data_dir: &Path, engine: Engine, lock: File) -> Result<DirStore, StoreError> {
    let mut device = open_device(&data_dir.join("block"), engine)?;
    read_superblock(&mut *device)?;
    let index = data_dir.join("index");
    let kv = RocksKv::open(&index, false).map_err(|e| fatal(&index, e))?;
    ChunkStore::open(LockedDevice::new(device, lock), kv, rand::random())
}

/// Reads the superblock only.
pub fn info(data_dir: &Path) -> Result<Info, StoreError> {
    let mut device = FileDevice::open(&data_dir.join("block"), Access::Read)?;
    let superblock = read_superblock(&mut device)?;
    let Superblock { generation, size, identity, journal_blocks, .. } = superblock;
    let journal_bytes = u64::from(journal_blocks) * u64::from(BLOCK_BYTES);
    let chunks = superblock.geometry().slots;
    Ok(Info { format_version: FORMAT_VERSION, identity, size_bytes: size, journal_bytes, chunks, generation })
}
