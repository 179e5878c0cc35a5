//! Who this gateway is: a client id that stays, and a session number for this run (rules C1, C2).

use anyhow::{Context, Result, bail, ensure};
use gabion_common::addr_file;
use gabion_common::monitor_client::MonitorClient;
use gabion_proto::convert::identity;
use gabion_proto::ids::{ClientId, ClusterId, Session};
use gabion_proto::pb;
use std::path::Path;

/// What the monitors granted to this run.
#[derive(Clone, Copy, Debug)]
pub struct Granted {
    pub client: ClientId,
    pub session: Session,
    pub cluster: ClusterId,
}

/// Opens a session as the client that `file` names, or as a new one whose id it keeps there. Waits
/// for the monitors as long as it takes.
pub async fn open(monitors: &MonitorClient, host: &str, file: &Path) -> Result<Granted> {
    let kept = read(file)?;
    let request = pb::OpenSessionRequest { client: kept.0, host: host.to_owned() };
    let reply = monitors
        .until_answered("open a session", |m| {
            let request = request.clone();
            async move { m.client().open_session(request).await }
        })
        .await
        .map_err(|s| anyhow::anyhow!("the monitors refuse a session: {}", s.message()))?;
    ensure!(reply.client != 0 && reply.session != 0, "the monitors granted client or session 0");
    if kept != ClientId(0) && kept.0 != reply.client {
        bail!("the monitors answered for client {}, this gateway is {}", reply.client, kept.0);
    }
    if kept == ClientId(0) {
        addr_file::replace(file, format!("{}\n", reply.client).as_bytes())
            .with_context(|| format!("cannot keep the client id in {}", file.display()))?;
    }
    let cluster = identity("cluster", &reply.cluster)?;
    Ok(Granted { client: ClientId(reply.client), session: Session(reply.session), cluster })
}

fn read(file: &Path) -> Result<ClientId> {
    match std::fs::read_to_string(file) {
        Ok(text) => match text.trim().parse::<u64>() {
            Ok(id) if id > 0 => Ok(ClientId(id)),
            _ => bail!("{} holds no client id; remove it to get a new one", file.display()),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(ClientId(0)),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", file.display())),
    }
}
