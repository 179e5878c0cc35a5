//! A client of `gabion-vmm`'s control socket ([`crate::vmm::control`] has the protocol).
//!
//! One task owns the reading side. A line that is too long or is not JSON ends the connection.
//! Everything that waits then gets [`ControlError::Closed`].

use crate::vmm::control::{Command, Event, Request};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot, watch};

const LINE_BYTES_MAX: u64 = 1 << 20;
const EVENTS_MAX: usize = 64;
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("the connection to gabion-vmm failed")]
    Io(#[from] std::io::Error),
    #[error("gabion-vmm sent something that is not the control protocol: {0}")]
    Malformed(String),
    #[error("gabion-vmm closed its control connection")]
    Closed,
    #[error("{0}")]
    Refused(String),
    #[error("gabion-vmm did not answer in time")]
    Timeout,
}

type Waiting = HashMap<u64, oneshot::Sender<Result<Value, String>>>;

pub struct Control {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    // Shared with the reading task; held only to insert or remove.
    waiting: Arc<Mutex<Waiting>>,
    next_id: AtomicU64,
    events: broadcast::Sender<Event>,
    closed: watch::Receiver<bool>,
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(|e| e.into_inner())
}

impl Control {
    /// Connects; events from now on reach the receiver.
    pub async fn connect(path: &Path) -> Result<(Control, broadcast::Receiver<Event>), ControlError> {
        let (read, write) = UnixStream::connect(path).await?.into_split();
        let waiting = Arc::<Mutex<Waiting>>::default();
        let (events, first) = broadcast::channel(EVENTS_MAX);
        let (closed_tx, closed) = watch::channel(false);
        tokio::spawn(read_all(BufReader::new(read), waiting.clone(), events.clone(), closed_tx));
        let control = Control { writer: write.into(), waiting, next_id: AtomicU64::new(1), events, closed };
        Ok((control, first))
    }

    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Becomes true when the connection has ended.
    pub fn closed(&self) -> watch::Receiver<bool> {
        self.closed.clone()
    }

    pub async fn command(&self, command: Command) -> Result<Value, ControlError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut text = serde_json::to_string(&Request { id, command })
            .map_err(|e| ControlError::Malformed(e.to_string()))?;
        text.push('\n');
        let (tx, rx) = oneshot::channel();
        lock(&self.waiting).insert(id, tx);
        let answer = async {
            // The reading task empties `waiting` after it set `closed`: one of the two is seen.
            if *self.closed.borrow() {
                return Err(ControlError::Closed);
            }
            self.writer.lock().await.write_all(text.as_bytes()).await?;
            rx.await.map_err(|_| ControlError::Closed)?.map_err(ControlError::Refused)
        };
        let result = tokio::time::timeout(COMMAND_TIMEOUT, answer).await;
        lock(&self.waiting).remove(&id);
        result.unwrap_or(Err(ControlError::Timeout))
    }
}

/// The next line, `None` at the end.
async fn line(read: &mut BufReader<OwnedReadHalf>) -> Result<Option<Value>, ControlError> {
    let mut bytes = Vec::new();
    read.take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes).await?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.last() != Some(&b'\n') {
        return Err(ControlError::Malformed(format!("a line without end after {} bytes", bytes.len())));
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|e| ControlError::Malformed(e.to_string()))
}

async fn read_all(
    mut read: BufReader<OwnedReadHalf>,
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::Sender<Event>,
    closed: watch::Sender<bool>,
) {
    loop {
        let message = match line(&mut read).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "leaving a control connection");
                break;
            }
        };
        if message.get("event").is_some() {
            match serde_json::from_value(message) {
                // Nobody listening is fine.
                Ok(event) => drop(events.send(event)),
                Err(error) => tracing::warn!(%error, "gabion-vmm sent an event of another version"),
            }
        } else if let Some(waiting) = message["id"].as_u64().and_then(|id| lock(&waiting).remove(&id)) {
            let answer = match message.get("error") {
                Some(error) => Err(error.as_str().unwrap_or("no reason given").to_owned()),
                None => Ok(message["ok"].clone()),
            };
            let _ = waiting.send(answer);
        }
    }
    closed.send_replace(true);
    lock(&waiting).clear();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::board::End;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn answers_errors_events_and_the_end_reach_whoever_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (control, mut events) = Control::connect(&path).await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        let scripted = async {
            let mut request = [0; 256];
            let mut replies = [
                "{\"id\":1,\"ok\":{\"x\":1}}\n",
                "{\"event\":\"ended\",\"how\":\"powered-off\"}\n{\"id\":2,\"error\":\"no\"}\n",
            ]
            .into_iter();
            while peer.read(&mut request).await.unwrap() > 0 {
                match replies.next() {
                    Some(reply) => peer.write_all(reply.as_bytes()).await.unwrap(),
                    None => break,
                }
            }
            drop(peer);
        };
        let asking = async {
            assert_eq!(control.command(Command::Status).await.unwrap()["x"], 1);
            let refused = control.command(Command::PowerButton).await.unwrap_err();
            assert_eq!(refused.to_string(), "no");
            assert_eq!(events.recv().await.unwrap(), Event::Ended(End::PoweredOff));
            let closed = control.command(Command::Status).await.unwrap_err();
            assert!(matches!(closed, ControlError::Closed), "{closed}");
            assert!(*control.closed().borrow());
        };
        tokio::join!(scripted, asking);
    }
}
