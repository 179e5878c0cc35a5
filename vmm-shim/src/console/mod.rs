//! A guest's serial port for many viewers: each sees the last 64 KiB first and then everything, and
//! what each types reaches the guest.

mod service;

pub use service::Consoles;

use bytes::Bytes;
use std::collections::VecDeque;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc};

const REPLAY_BYTES: usize = 64 << 10;
const CHUNKS_MAX: usize = 256;
const INPUTS_MAX: usize = 64;
const READ_BYTES: usize = 4 << 10;
/// QEMU appends to the log for as long as the guest runs; beyond this it starts anew.
const LOG_BYTES_MAX: u64 = 8 << 20;
const RECONNECT: Duration = Duration::from_millis(200);

struct Shared {
    // Replay and live output change together, so that a viewer misses and repeats nothing.
    replay: Mutex<VecDeque<u8>>,
    live: broadcast::Sender<Bytes>,
}

/// One guest's console; dropping it closes it for every viewer.
pub struct Hub {
    shared: Arc<Shared>,
    input: mpsc::Sender<Bytes>,
    task: tokio::task::JoinHandle<()>,
}

/// A viewer: what was printed before, what comes, and where to type.
pub struct View {
    pub replay: Bytes,
    pub live: broadcast::Receiver<Bytes>,
    pub input: mpsc::Sender<Bytes>,
}

impl Hub {
    /// Serves the port behind `socket`; `log` is where the engine keeps what was printed.
    pub fn open(socket: PathBuf, log: PathBuf) -> Hub {
        let (live, _) = broadcast::channel(CHUNKS_MAX);
        let shared = Arc::new(Shared { replay: Mutex::new(tail(&log).into()), live });
        let (input, inputs) = mpsc::channel(INPUTS_MAX);
        let task = tokio::spawn(serve(socket, log, shared.clone(), inputs));
        Hub { shared, input, task }
    }

    pub fn view(&self) -> View {
        let replay = self.shared.replay.lock().unwrap_or_else(|e| e.into_inner());
        let live = self.shared.live.subscribe();
        let replay = replay.iter().copied().collect::<Vec<u8>>().into();
        View { replay, live, input: self.input.clone() }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn tail(log: &PathBuf) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(mut file) = std::fs::File::open(log) {
        let len = file.metadata().map_or(0, |m| m.len());
        let from = SeekFrom::Start(len.saturating_sub(REPLAY_BYTES as u64));
        // What cannot be read is not replayed.
        if file.seek(from).is_err() || file.take(REPLAY_BYTES as u64).read_to_end(&mut bytes).is_err() {
            bytes.clear();
        }
    }
    bytes
}

async fn serve(socket: PathBuf, log: PathBuf, shared: Arc<Shared>, mut inputs: mpsc::Receiver<Bytes>) {
    loop {
        if let Ok(stream) = UnixStream::connect(&socket).await {
            let (mut read, mut write) = stream.into_split();
            let mut buf = vec![0; READ_BYTES];
            let mut printed = 0;
            loop {
                tokio::select! {
                    got = read.read(&mut buf) => match got {
                        Ok(0) | Err(_) => break,
                        Ok(n) => {
                            publish(&shared, &buf[..n]);
                            printed += n as u64;
                        }
                    },
                    Some(typed) = inputs.recv() => {
                        if write.write_all(&typed).await.is_err() {
                            break;
                        }
                    }
                }
                if printed > LOG_BYTES_MAX {
                    printed = 0;
                    if let Err(error) =
                        std::fs::File::options().write(true).open(&log).and_then(|f| f.set_len(0))
                    {
                        tracing::warn!(%error, log = %log.display(), "cannot shorten a console log");
                    }
                }
            }
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

fn publish(shared: &Shared, bytes: &[u8]) {
    let mut replay = shared.replay.lock().unwrap_or_else(|e| e.into_inner());
    let excess = (replay.len() + bytes.len()).saturating_sub(REPLAY_BYTES).min(replay.len());
    replay.drain(..excess);
    replay.extend(bytes);
    // No viewer is fine.
    let _ = shared.live.send(Bytes::copy_from_slice(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn viewers_get_the_past_the_present_and_a_keyboard() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, log) = (dir.path().join("s"), dir.path().join("l"));
        std::fs::write(&log, vec![b'x'; REPLAY_BYTES + 10]).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let hub = Hub::open(socket, log);
        let mut first = hub.view();
        assert_eq!(first.replay.len(), REPLAY_BYTES);
        let (mut port, _) = listener.accept().await.unwrap();
        port.write_all(b"hello").await.unwrap();
        assert_eq!(&first.live.recv().await.unwrap()[..], b"hello");
        let late = hub.view();
        assert!(late.replay.len() == REPLAY_BYTES && late.replay.ends_with(b"xhello"));
        late.input.send(Bytes::from_static(b"ls\n")).await.unwrap();
        let mut typed = [0; 3];
        port.read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"ls\n");
    }
}
