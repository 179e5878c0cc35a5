//! Orders to the supervisor for one daemon: a line `VERB KIND.ID` on `supervisor.sock`, answered
//! by `ok` or by a sentence.

use super::daemon::{Order, Request};
use super::layout::{Kind, Layout};
use crate::commands::Context as Cli;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

const LINE_BYTES_MAX: u64 = 256;

/// One daemon's task: its name, kind and where it takes orders.
type Entry = (String, Kind, mpsc::Sender<Request>);

/// Where each daemon's task takes orders.
#[derive(Clone, Default)]
pub struct Orders {
    // Held only to look up or add: the connection tasks and the start-up share it.
    daemons: Arc<Mutex<Vec<Entry>>>,
}

impl Orders {
    pub fn add(&self, name: String, kind: Kind, sender: mpsc::Sender<Request>) {
        self.daemons.lock().unwrap_or_else(PoisonError::into_inner).push((name, kind, sender));
    }

    pub fn names(&self, wanted: Kind) -> Vec<String> {
        let daemons = self.daemons.lock().unwrap_or_else(PoisonError::into_inner);
        daemons.iter().filter(|(_, kind, _)| *kind == wanted).map(|(name, ..)| name.clone()).collect()
    }

    pub async fn send(&self, name: &str, order: Order) -> Result<(), String> {
        let sender = {
            let daemons = self.daemons.lock().unwrap_or_else(PoisonError::into_inner);
            daemons.iter().find(|(n, ..)| n == name).map(|(.., sender)| sender.clone())
        };
        let sender = sender.ok_or_else(|| format!("there is no daemon {name}; see gabion dev status"))?;
        let (answer, answered) = oneshot::channel();
        sender.send((order, answer)).await.map_err(|_| format!("{name} is no longer supervised"))?;
        answered.await.map_err(|_| format!("{name} is no longer supervised"))?
    }
}

/// Serves orders for good.
pub async fn serve(listener: UnixListener, orders: Orders) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let orders = orders.clone();
        tokio::spawn(async move {
            if let Err(e) = answer(stream, &orders).await {
                tracing::warn!("order: {e:#}");
            }
        });
    }
}

async fn answer(stream: UnixStream, orders: &Orders) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(LINE_BYTES_MAX)).read_line(&mut line).await?;
    let result = match line.trim().split_once(' ') {
        Some(("start", name)) => orders.send(name, Order::Start).await,
        Some(("stop", name)) => orders.send(name, Order::Stop).await,
        Some(("kill", name)) => orders.send(name, Order::Kill { stay_down: false }).await,
        Some(("kill-stay", name)) => orders.send(name, Order::Kill { stay_down: true }).await,
        _ => Err("not an order".to_owned()),
    };
    let text = result.err().unwrap_or_else(|| "ok".to_owned());
    Ok(writer.write_all(format!("{text}\n").as_bytes()).await?)
}

/// The verbs start, stop and kill.
pub async fn run(cli: &Cli, dir: &Path, verb: &str, daemon: &str) -> Result<()> {
    let layout = Layout::new(dir)?;
    let mut stream = UnixStream::connect(layout.socket()).await.with_context(|| {
        format!("{daemon}: no cluster runs in {}; start it with gabion dev up", layout.dir.display())
    })?;
    stream.write_all(format!("{verb} {daemon}\n").as_bytes()).await?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await?;
    match reply.trim() {
        "ok" => {
            let did = match verb {
                "start" => "started",
                "stop" => "stopped",
                _ => "killed",
            };
            cli.out.done(&format!("{daemon} {did}"), json!({ "daemon": daemon, "done": did }))
        }
        why => bail!("{daemon}: {why}"),
    }
}
