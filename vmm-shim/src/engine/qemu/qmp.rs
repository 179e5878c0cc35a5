//! A client of QEMU's machine protocol (QMP, `docs/interop/qmp-spec.rst` of QEMU): one JSON text
//! per line over a Unix socket.
//!
//! One task owns the reading side. A line that is too long or is not JSON ends the connection: what
//! follows it cannot be trusted. Everything that waits then gets [`QmpError::Closed`].

use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot, watch};

const LINE_BYTES_MAX: u64 = 1 << 20;
const EVENTS_MAX: usize = 256;
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QMP connection failed")]
    Io(#[from] std::io::Error),
    #[error("QMP peer sent something that is not QMP: {0}")]
    Malformed(String),
    #[error("QMP connection is closed")]
    Closed,
    #[error("QEMU refused {command}: {message}")]
    Refused { command: String, message: String },
    #[error("QEMU did not answer {command} in time")]
    Timeout { command: String },
}

#[derive(Debug, Clone)]
pub struct Event {
    pub name: String,
    pub data: Value,
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, String>>>>>;

pub struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    // Shared with the reading task; held only to insert or remove.
    pending: Pending,
    next_id: AtomicU64,
    events: broadcast::Sender<Event>,
    closed: watch::Receiver<bool>,
}

impl Qmp {
    /// Connects, waits for the greeting and leaves negotiation mode. Events from then on reach
    /// `events`, also those before the first [`Qmp::events`].
    pub async fn connect(path: &Path) -> Result<(Qmp, broadcast::Receiver<Event>), QmpError> {
        let (read, write) = UnixStream::connect(path).await?.into_split();
        let mut read = BufReader::new(read);
        let greeting = async { line(&mut read).await?.ok_or(QmpError::Closed) };
        let greeting = tokio::time::timeout(COMMAND_TIMEOUT, greeting)
            .await
            .map_err(|_| QmpError::Timeout { command: "greeting".into() })??;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Malformed("no greeting".into()));
        }
        let pending = Pending::default();
        let (events, first) = broadcast::channel(EVENTS_MAX);
        let (closed_tx, closed) = watch::channel(false);
        tokio::spawn(read_all(read, pending.clone(), events.clone(), closed_tx));
        let qmp = Qmp { writer: write.into(), pending, next_id: AtomicU64::new(1), events, closed };
        qmp.command("qmp_capabilities", json!({})).await?;
        Ok((qmp, first))
    }

    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Becomes true when the connection has ended.
    pub fn closed(&self) -> watch::Receiver<bool> {
        self.closed.clone()
    }

    pub async fn command(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = oneshot::channel();
        lock(&self.pending).insert(id, tx);
        let mut text = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        text.push('\n');
        let answer = async {
            // The reading task empties `pending` after it set `closed`: one of the two is seen.
            if *self.closed.borrow() {
                return Err(QmpError::Closed);
            }
            self.writer.lock().await.write_all(text.as_bytes()).await?;
            rx.await
                .map_err(|_| QmpError::Closed)?
                .map_err(|message| QmpError::Refused { command: command.into(), message })
        };
        let result = tokio::time::timeout(COMMAND_TIMEOUT, answer).await;
        lock(&self.pending).remove(&id);
        result.unwrap_or_else(|_| Err(QmpError::Timeout { command: command.into() }))
    }
}

fn lock(
    pending: &Pending,
) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Result<Value, String>>>> {
    pending.lock().unwrap_or_else(|e| e.into_inner())
}

/// The next line, `None` at the end.
async fn line(read: &mut BufReader<OwnedReadHalf>) -> Result<Option<Value>, QmpError> {
    let mut bytes = Vec::new();
    read.take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes).await?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.last() != Some(&b'\n') {
        return Err(QmpError::Malformed(format!("a line without end after {} bytes", bytes.len())));
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|e| QmpError::Malformed(e.to_string()))
}

async fn read_all(
    mut read: BufReader<OwnedReadHalf>,
    pending: Pending,
    events: broadcast::Sender<Event>,
    closed: watch::Sender<bool>,
) {
    loop {
        let message = match line(&mut read).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "leaving a QMP connection");
                break;
            }
        };
        if let Some(name) = message["event"].as_str() {
            // Nobody listening is fine.
            let _ = events.send(Event { name: name.into(), data: message["data"].clone() });
        } else if let Some(waiting) = message["id"].as_u64().and_then(|id| lock(&pending).remove(&id)) {
            let answer = match message.get("error") {
                Some(error) => Err(error["desc"].as_str().unwrap_or("no reason given").to_owned()),
                None => Ok(message["return"].clone()),
            };
            let _ = waiting.send(answer);
        }
    }
    closed.send_replace(true);
    lock(&pending).clear();
}

#[cfg(test)]
mod tests;
