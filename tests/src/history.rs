//! Writers that keep a history of what they wrote and when, over NBD, and what a snapshot of their volume may hold.
//!
//! Each writer owns every n-th 4 KiB block and has one write outstanding, so that its writes have an order. A snapshot is a
//! consistent cut when of each writer it holds exactly the first k writes, and no write of which another one was answered
//! before a third one began is missing while that third one is there. Time is a counter that all writers share. The
//! client is the `nbd` crate: it shares no code with the server.

use anyhow::{Context, Result, bail, ensure};
use nbd::client::{NbdClient, handshake};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(180);
const RECONNECT_EVERY: Duration = Duration::from_millis(50);

/// One write, the n-th of its writer. It may have reached the volume at any moment between the two.
#[derive(Clone, Copy, Debug)]
struct Wrote {
    block: u64,
    begun: u64,
    answered: u64,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    clock: AtomicU64,
    answered: AtomicU64,
    reconnects: AtomicU64,
}

impl Shared {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }
}

/// Writers that run until [`Writers::stop`].
pub struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<Vec<Wrote>>>>,
}

impl Writers {
    /// Starts `writers` of them on the first `size_bytes` of the export, which must be all zero.
    pub fn start(socket: &Path, export: &str, size_bytes: u64, writers: usize) -> Writers {
        let shared = Arc::new(Shared::default());
        let run = |index: usize| {
            let writer = Writer {
                socket: socket.to_owned(),
                export: export.to_owned(),
                shared: shared.clone(),
                index: index as u64,
                stride: writers as u64,
                blocks: size_bytes / BLOCK as u64 / writers as u64,
            };
            std::thread::spawn(move || writer.run())
        };
        let threads = (0..writers).map(run).collect();
        Writers { shared, threads }
    }

    /// Now, to compare writes with.
    pub fn now(&self) -> u64 {
        self.shared.tick()
    }

    /// Waits until `count` more writes were answered; an error when a writer found something.
    pub fn wait_for_writes(&self, count: u64) -> Result<()> {
        let answered = || self.shared.answered.load(Ordering::Relaxed);
        let (wanted, started) = (answered() + count, Instant::now());
        while answered() < wanted {
            ensure!(!self.threads.iter().any(|t| t.is_finished()), "a writer stopped: stop() says why");
            ensure!(started.elapsed() < PATIENCE, "writes do not go on");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends the writers; their histories.
    pub fn stop(self) -> Result<History> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut writers = Vec::new();
        for thread in self.threads {
            match thread.join() {
                Ok(history) => writers.push(history?),
                Err(_) => bail!("a writer panicked"),
            }
        }
        Ok(History { writers, reconnects: self.shared.reconnects.load(Ordering::Relaxed) })
    }
}

struct Writer {
    socket: PathBuf,
    export: String,
    shared: Arc<Shared>,
    index: u64,
    stride: u64,
    blocks: u64,
}

impl Writer {
    fn run(&self) -> Result<Vec<Wrote>> {
        let mut rng = StdRng::seed_from_u64(self.index);
        let mut history = Vec::new();
        let mut connection = None;
        while !self.shared.stop.load(Ordering::Relaxed) {
            // Few blocks, so that most are written again and again.
            let block = self.index + rng.random_range(0..self.blocks) * self.stride;
            let number = history.len() as u64 + 1;
            let begun = self.shared.tick();
            self.write(&mut connection, block, number).with_context(|| format!("writing block {block}"))?;
            history.push(Wrote { block, begun, answered: self.shared.tick() });
            self.shared.answered.fetch_add(1, Ordering::Relaxed);
        }
        Ok(history)
    }

    /// Until it is answered: after a lost connection the same bytes again.
    fn write(&self, connection: &mut Option<NbdClient<UnixStream>>, block: u64, number: u64) -> Result<()> {
        let started = Instant::now();
        loop {
            let Some(c) = connection else {
                match self.connect() {
                    Ok(c) => *connection = Some(c),
                    Err(e) if started.elapsed() > PATIENCE => return Err(e),
                    // Nothing tells when a socket is back.
                    Err(_) => std::thread::sleep(RECONNECT_EVERY),
                }
                continue;
            };
            let written = c
                .seek(SeekFrom::Start(block * BLOCK as u64))
                .and_then(|_| c.write_all(&content(self.index, block, number)));
            use std::io::ErrorKind::*;
            match written {
                Ok(()) => return Ok(()),
                Err(e)
                    if matches!(
                        e.kind(),
                        UnexpectedEof | ConnectionReset | BrokenPipe | ConnectionAborted
                    ) =>
                {
                    self.shared.reconnects.fetch_add(1, Ordering::Relaxed);
                    *connection = None;
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn connect(&self) -> Result<NbdClient<UnixStream>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let export = handshake(&mut stream, self.export.as_bytes())?;
        Ok(NbdClient::new(stream, &export))
    }
}

/// Every sector names writer, block and number, so that a mixture shows.
fn content(writer: u64, block: u64, number: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for sector in bytes.chunks_exact_mut(512) {
        let mut rng = StdRng::seed_from_u64(number << 20 ^ block);
        rng.fill(&mut sector[24..]);
        for (at, word) in [writer + 1, block, number].into_iter().enumerate() {
            sector[at * 8..][..8].copy_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

/// What all writers did.
pub struct History {
    writers: Vec<Vec<Wrote>>,
    pub reconnects: u64,
}

/// What the image of a volume holds: of each writer its first so many writes.
#[derive(Debug, PartialEq, Eq)]
pub struct Cut(pub Vec<usize>);

impl History {
    pub fn writes(&self) -> usize {
        self.writers.iter().map(Vec::len).sum()
    }

    /// Whether `image` is what the volume was at one moment between `from` and `until`.
    pub fn cut(&self, image: &[u8], from: u64, until: u64) -> Result<Cut> {
        let stride = self.writers.len();
        let mut cut = vec![0usize; stride];
        let mut found = BTreeMap::new();
        for (block, bytes) in image.chunks_exact(BLOCK).enumerate() {
            let number = u64::from_le_bytes(bytes[16..24].try_into()?) as usize;
            if number == 0 {
                ensure!(bytes.iter().all(|b| *b == 0), "block {block} holds what nobody wrote");
                continue;
            }
            let writer = block % stride;
            ensure!(
                bytes == content(writer as u64, block as u64, number as u64),
                "block {block} is a mixture around write {number} of writer {writer}"
            );
            cut[writer] = cut[writer].max(number);
            found.insert(block as u64, number);
        }
        for (writer, history) in self.writers.iter().enumerate() {
            ensure!(cut[writer] <= history.len(), "writer {writer} wrote less than what is there");
            let mut last = BTreeMap::new();
            for (at, wrote) in history[..cut[writer]].iter().enumerate() {
                last.insert(wrote.block, at + 1);
            }
            for (block, number) in last {
                let there = found.get(&block).copied().unwrap_or(0);
                ensure!(
                    there == number,
                    "writer {writer}: write {} is there, but block {block} holds write {there} instead of {number}",
                    cut[writer]
                );
            }
        }
        let begun = |writer: usize| cut[writer].checked_sub(1).map(|at| self.writers[writer][at].begun);
        let latest = (0..stride).filter_map(begun).max().unwrap_or(0);
        ensure!(latest < until, "a write is there that began after the snapshot was answered");
        for (writer, history) in self.writers.iter().enumerate() {
            let Some(missing) = history.get(cut[writer]) else { continue };
            ensure!(
                missing.answered > from,
                "write {} of writer {writer} was answered before the snapshot was asked for and is not there",
                cut[writer] + 1
            );
            ensure!(
                missing.answered > latest,
                "write {} of writer {writer} is not there, but one that began after its answer is",
                cut[writer] + 1
            );
        }
        Ok(Cut(cut))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(blocks: &[(u64, u64, u64)]) -> Vec<u8> {
        let mut image = vec![0; 8 * BLOCK];
        for (writer, block, number) in blocks {
            image[*block as usize * BLOCK..][..BLOCK].copy_from_slice(&content(*writer, *block, *number));
        }
        image
    }

    #[test]
    fn only_consistent_cuts_pass() {
        let wrote = |block, begun, answered| Wrote { block, begun, answered };
        let history = History {
            writers: vec![
                vec![wrote(0, 1, 2), wrote(2, 5, 6), wrote(0, 9, 10)],
                vec![wrote(1, 3, 4), wrote(3, 7, 8)],
            ],
            reconnects: 0,
        };
        let cut = |blocks: &[(u64, u64, u64)], from, until| history.cut(&image(blocks), from, until);
        assert_eq!(cut(&[(0, 0, 1), (1, 1, 1)], 4, 6).unwrap(), Cut(vec![1, 1]));
        assert_eq!(cut(&[(0, 0, 3), (0, 2, 2), (1, 1, 1), (1, 3, 2)], 8, 99).unwrap(), Cut(vec![3, 2]));
        // Not asked for yet, or answered already.
        assert!(cut(&[(0, 0, 1), (1, 1, 1)], 7, 9).is_err());
        assert!(cut(&[(0, 0, 1), (1, 1, 1)], 0, 3).is_err());
        // Write 1 of the second writer was answered before write 2 of the first began.
        assert!(cut(&[(0, 0, 1), (0, 2, 2)], 0, 99).is_err());
        // Write 2 is missing, or another one's bytes.
        assert!(cut(&[(0, 0, 3), (1, 1, 1), (1, 3, 2)], 0, 99).is_err());
        assert!(cut(&[(0, 2, 1)], 0, 99).is_err());
        let mut mixed = image(&[(0, 0, 3), (0, 2, 2), (1, 1, 1)]);
        mixed[..512].copy_from_slice(&content(0, 0, 1)[..512]);
        assert!(history.cut(&mixed, 0, 99).is_err());
    }
}
