//! Writers that keep a mirror of what was acknowledged, over NBD, and come back after every lost connection.
//!
//! Each worker owns every n-th 4 KiB block, so that it always knows what a block may hold: the last
//! acknowledged version, or the one whose answer was lost with the connection. Anything else is a finding. The
//! client is the `nbd` crate: it shares no code with the server.

use anyhow::{Context, Result, bail, ensure};
use nbd::client::{NbdClient, handshake};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
/// An answer, or a connection, that takes longer than this is a finding: nothing stays down that long here.
const PATIENCE: Duration = Duration::from_secs(180);
const RECONNECT_EVERY: Duration = Duration::from_millis(50);

/// Workers that run until [`Mirror::finish`].
pub struct Mirror {
    socket: PathBuf,
    export: String,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<Result<Vec<u64>>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    acknowledged: AtomicU64,
    reads: AtomicU64,
    reconnects: AtomicU64,
}

/// What a finished run did; everything in it was compared.
#[derive(Debug)]
pub struct Report {
    pub writes: u64,
    pub reads: u64,
    pub reconnects: u64,
    pub blocks: u64,
}

impl Mirror {
    /// Starts `workers` writers on the first `size_bytes` of the export, which must be all zero.
    pub fn start(socket: &Path, export: &str, size_bytes: u64, workers: usize) -> Mirror {
        let shared = Arc::new(Shared::default());
        let blocks = size_bytes / BLOCK as u64;
        let run = |index: usize| {
            let mut worker = Worker {
                socket: socket.to_owned(),
                export: export.to_owned(),
                shared: shared.clone(),
                connection: None,
                first: index as u64,
                stride: workers as u64,
                versions: vec![0; (blocks as usize).saturating_sub(index).div_ceil(workers)],
                rng: StdRng::seed_from_u64(index as u64 + 1),
            };
            std::thread::spawn(move || worker.run().map(|()| worker.versions))
        };
        let workers = (0..workers).map(run).collect();
        Mirror { socket: socket.to_owned(), export: export.to_owned(), shared, workers }
    }

    /// Writes acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until `count` more writes have been acknowledged; an error when a worker found something.
    pub fn wait_for_writes(&self, count: u64) -> Result<()> {
        let (wanted, started) = (self.acknowledged() + count, Instant::now());
        while self.acknowledged() < wanted {
            ensure!(!self.workers.iter().any(|w| w.is_finished()), "a worker stopped: finish() says why");
            ensure!(started.elapsed() < PATIENCE, "writes do not go on");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Stops the workers and compares every block of the volume with the mirror.
    pub fn finish(self) -> Result<Report> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let stride = self.workers.len();
        let mut versions = Vec::with_capacity(stride);
        for worker in self.workers {
            match worker.join() {
                Ok(result) => versions.push(result?),
                Err(_) => bail!("a worker panicked"),
            }
        }
        let mut connection = connect(&self.socket, &self.export)?;
        let blocks = versions.iter().map(Vec::len).sum::<usize>() as u64;
        let mut bytes = [0; BLOCK];
        for block in 0..blocks {
            let version = versions[block as usize % stride][block as usize / stride];
            connection.seek(SeekFrom::Start(block * BLOCK as u64))?;
            connection.read_exact(&mut bytes).with_context(|| format!("reading block {block} at the end"))?;
            check(&bytes, block, &[version]).context("at the end")?;
        }
        Ok(Report {
            writes: self.shared.acknowledged.load(Ordering::Relaxed),
            reads: self.shared.reads.load(Ordering::Relaxed) + blocks,
            reconnects: self.shared.reconnects.load(Ordering::Relaxed),
            blocks,
        })
    }
}

type Connection = NbdClient<UnixStream>;

fn connect(socket: &Path, export: &str) -> Result<Connection> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let export = handshake(&mut stream, export.as_bytes())?;
    Ok(NbdClient::new(stream, &export))
}

struct Worker {
    socket: PathBuf,
    export: String,
    shared: Arc<Shared>,
    connection: Option<Connection>,
    first: u64,
    stride: u64,
    /// Last acknowledged version of each own block; 0 is never written.
    versions: Vec<u64>,
    rng: StdRng,
}

impl Worker {
    fn run(&mut self) -> Result<()> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let own = self.rng.random_range(0..self.versions.len());
            if self.rng.random_ratio(1, 4) {
                self.read(own, &[self.versions[own]])?;
            } else {
                self.write(own)?;
            }
        }
        Ok(())
    }

    fn block(&self, own: usize) -> u64 {
        self.first + own as u64 * self.stride
    }

    /// Writes the next version of a block until that is acknowledged. Where an answer was lost, the block
    /// must hold the old or the new version, whole.
    fn write(&mut self, own: usize) -> Result<()> {
        let (block, old) = (self.block(own), self.versions[own]);
        let new = old + 1;
        let bytes = pattern(block, new);
        loop {
            let connection = self.connected()?;
            connection.seek(SeekFrom::Start(block * BLOCK as u64))?;
            match connection.write_all(&bytes) {
                Ok(()) => break,
                Err(e) => self.lost(&e).with_context(|| format!("writing block {block}"))?,
            }
            self.read(own, &[old, new])?;
        }
        self.versions[own] = new;
        self.shared.acknowledged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn read(&mut self, own: usize, allowed: &[u64]) -> Result<()> {
        let block = self.block(own);
        let mut bytes = [0; BLOCK];
        loop {
            let connection = self.connected()?;
            connection.seek(SeekFrom::Start(block * BLOCK as u64))?;
            match connection.read_exact(&mut bytes) {
                Ok(()) => break,
                Err(e) => self.lost(&e).with_context(|| format!("reading block {block}"))?,
            }
        }
        self.shared.reads.fetch_add(1, Ordering::Relaxed);
        check(&bytes, block, allowed)
    }

    /// Only the loss of the connection is forgiven: an error that the server answered is a finding.
    fn lost(&mut self, error: &std::io::Error) -> Result<()> {
        use std::io::ErrorKind::*;
        self.connection = None;
        match error.kind() {
            UnexpectedEof | ConnectionReset | BrokenPipe | ConnectionAborted => {
                self.shared.reconnects.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            _ => bail!("{error}"),
        }
    }

    fn connected(&mut self) -> Result<&mut Connection> {
        let started = Instant::now();
        while self.connection.is_none() {
            match connect(&self.socket, &self.export) {
                Ok(c) => self.connection = Some(c),
                Err(e) if started.elapsed() > PATIENCE => {
                    return Err(e.context("the gateway does not come back"));
                }
                // Nothing tells when a socket is back.
                Err(_) => std::thread::sleep(RECONNECT_EVERY),
            }
        }
        self.connection.as_mut().context("connected above")
    }
}

/// What `version` of a block looks like: every sector names block and version, so that a mixture shows.
fn pattern(block: u64, version: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    if version == 0 {
        return bytes;
    }
    for (i, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
        let mut rng = StdRng::seed_from_u64(version << 32 ^ block << 4 ^ i as u64);
        rng.fill(&mut sector[16..]);
        sector[..8].copy_from_slice(&block.to_le_bytes());
        sector[8..16].copy_from_slice(&version.to_le_bytes());
    }
    bytes
}

fn check(bytes: &[u8; BLOCK], block: u64, allowed: &[u64]) -> Result<()> {
    if allowed.iter().any(|v| pattern(block, *v) == *bytes) {
        return Ok(());
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let found: Vec<String> =
        (0..BLOCK).step_by(SECTOR).map(|at| format!("{}v{}", word(at), word(at + 8))).collect();
    bail!("block {block} should be at version {allowed:?}, its sectors are {}", found.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_and_another_block_are_found() {
        assert!(check(&pattern(5, 2), 5, &[1, 2]).is_ok());
        assert!(check(&pattern(5, 0), 5, &[0]).is_ok());
        assert!(check(&pattern(5, 1), 5, &[2]).is_err());
        assert!(check(&pattern(6, 2), 5, &[2]).is_err());
        let mut mixed = pattern(5, 2);
        mixed[..SECTOR].copy_from_slice(&pattern(5, 1)[..SECTOR]);
        assert!(check(&mixed, 5, &[1, 2]).is_err());
    }
}
