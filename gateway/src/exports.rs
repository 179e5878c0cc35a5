//! Makes the exports of this host what the monitors want them to be.
//!
//! ```text
//!  WatchHost ─▶ reconcile ─▶ one task per export: attach ─▶ serve ─▶ (removed) close, detach
//!                                │ fails: says so, tries again
//!                                ▼
//!                             states ─▶ ReportHost, on change and every 2 s
//! ```
//!
//! Monitors that are gone change nothing: what is served stays served.

use crate::attach::{AttachError, Volumes};
use crate::nbd;
use crate::session::Granted;
use crate::vhost;
use crate::volume::Volume;
use gabion_common::monitor_client::{Backoff, MonitorClient};
use gabion_proto::limits::{valid_name, valid_volume_name};
use gabion_proto::pb::{self, ExportInfo, ExportKind, ExportState};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

const REPORT_EVERY: Duration = Duration::from_secs(2);
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// Exports of one host: more are refused in words.
const EXPORTS_MAX: usize = 4096;
/// Queues of a vhost-user device.
const VHOST_QUEUES: u16 = 4;

#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("cannot attach the volume: {0}")]
    Attach(#[from] AttachError),
    #[error("cannot listen on {}: {source}", socket.display())]
    Socket { socket: PathBuf, source: io::Error },
    #[error("{0}")]
    Vhost(#[from] vhost::VhostError),
}

/// Where this gateway serves.
pub struct Place {
    pub host: String,
    /// Absolute: its socket paths are for other processes.
    pub run_dir: PathBuf,
    pub nbd_addr: SocketAddr,
}

/// The exports of this host.
pub struct Exports {
    place: Place,
    monitors: MonitorClient,
    granted: Granted,
    volumes: Volumes,
    table: Arc<nbd::Table>,
    // Held for one insertion, or to copy all for a report.
    states: Mutex<BTreeMap<u64, ExportInfo>>,
    changed: Notify,
    /// The gateway stops: exports close, volumes stay attached for the next run.
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Exports {
    pub fn new(
        place: Place,
        monitors: MonitorClient,
        granted: Granted,
        volumes: Volumes,
        table: Arc<nbd::Table>,
    ) -> Arc<Exports> {
        Arc::new(Exports {
            place,
            monitors,
            granted,
            volumes,
            table,
            states: Mutex::default(),
            changed: Notify::new(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// The exports as they are reported.
    pub fn states(&self) -> Vec<ExportInfo> {
        self.states.lock().values().cloned().collect()
    }

    /// The volumes that are attached.
    pub fn volumes(&self) -> Vec<Arc<Volume>> {
        self.volumes.attached()
    }

    /// Follows the monitors and reports to them; never returns.
    pub async fn run(self: Arc<Self>) {
        tokio::join!(self.follow(), self.report());
    }

    /// Closes everything; returns when what was in flight has ended.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn follow(self: &Arc<Self>) {
        let mut running: BTreeMap<u64, CancellationToken> = BTreeMap::new();
        let mut backoff = Backoff::default();
        loop {
            let request = pb::WatchHostRequest { host: self.place.host.clone() };
            let ended = match self.monitors.host().watch_host(request).await {
                Err(status) => status,
                Ok(reply) => {
                    let mut specs = reply.into_inner();
                    loop {
                        match specs.message().await {
                            Ok(Some(spec)) => {
                                backoff.reset();
                                self.reconcile(&mut running, spec.exports);
                            }
                            Ok(None) => break tonic::Status::unavailable("the monitor ended the stream"),
                            Err(status) => break status,
                        }
                    }
                }
            };
            if backoff.is_first() {
                warn!(error = ended.message(), "lost the monitor, serving what is exported");
            }
            self.monitors.failed(&ended);
            tokio::time::sleep(backoff.next()).await;
        }
    }

    fn reconcile(self: &Arc<Self>, running: &mut BTreeMap<u64, CancellationToken>, wanted: Vec<ExportInfo>) {
        let wanted: BTreeMap<u64, ExportInfo> = wanted.into_iter().map(|e| (e.id, e)).collect();
        running.retain(|id, removed| {
            let keep = wanted.contains_key(id);
            if !keep {
                removed.cancel();
            }
            keep
        });
        for (id, info) in wanted {
            if running.contains_key(&id) {
                continue;
            }
            let kind_known = matches!(info.kind(), ExportKind::Nbd | ExportKind::VhostUser);
            let problem = match () {
                () if !valid_source(&info.volume) => "not a valid volume name",
                () if !kind_known => "a kind of export that this gateway does not know",
                () if running.len() >= EXPORTS_MAX => "this gateway has too many exports",
                () => "",
            };
            let removed = CancellationToken::new();
            running.insert(id, removed.clone());
            let exports = self.clone();
            if problem.is_empty() {
                self.tasks.spawn(async move { exports.live(info, removed).await });
            } else {
                self.state(&info, ExportState::Failed, problem.to_owned());
                self.tasks.spawn(async move {
                    removed.cancelled().await;
                    exports.forget(id);
                });
            }
        }
    }

    fn state(&self, info: &ExportInfo, state: ExportState, error: String) {
        let mut now = info.clone();
        now.set_state(state);
        now.error = error;
        if self.states.lock().insert(info.id, now.clone()) != Some(now) {
            self.changed.notify_one();
        }
    }

    fn forget(&self, id: u64) {
        self.states.lock().remove(&id);
        self.changed.notify_one();
    }

    /// One export from its first attempt to its removal.
    async fn live(&self, mut info: ExportInfo, removed: CancellationToken) {
        let (id, name) = (info.id, info.volume.clone());
        (info.uri, info.socket) = Default::default();
        self.state(&info, ExportState::Pending, String::new());
        loop {
            // Not interrupted: what it attaches must be given back.
            let begun = self.begin(&mut info).await;
            match begun {
                Ok(serving) => {
                    info!(export = id, volume = name, uri = info.uri, socket = info.socket, "exported");
                    self.until_removed(&info, &serving, &removed).await;
                    serving.end(&self.table, &name, id).await;
                    if self.stopping.is_cancelled() {
                        return;
                    }
                    self.volumes.close(&name).await;
                    info!(export = id, volume = name, "no longer exported");
                    return self.forget(id);
                }
                Err(error) => {
                    warn!(export = id, volume = name, %error, "cannot export, trying again");
                    self.state(&info, ExportState::Failed, error.to_string());
                }
            }
            tokio::select! {
                () = tokio::time::sleep(TRY_AGAIN) => {}
                () = removed.cancelled() => {
                    self.volumes.give_up(&name).await;
                    return self.forget(id);
                }
                () = self.stopping.cancelled() => return,
            }
        }
    }

    /// Keeps the state true: a volume that was fenced is exported no more than by name.
    async fn until_removed(&self, info: &ExportInfo, serving: &Serving, removed: &CancellationToken) {
        loop {
            match serving.volume().flush().await {
                Ok(()) => self.state(info, ExportState::Ready, String::new()),
                Err(error) => self.state(info, ExportState::Failed, error.to_string()),
            }
            tokio::select! {
                () = removed.cancelled() => return,
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(REPORT_EVERY) => {}
            }
        }
    }

    async fn begin(&self, info: &mut ExportInfo) -> Result<Serving, ExportError> {
        let (volume, attached_read_only) = self.volumes.open(&info.volume).await?;
        let read_only = info.read_only || attached_read_only;
        match self.serve(info, volume, read_only) {
            Ok(serving) => Ok(serving),
            Err(error) => {
                self.volumes.close(&info.volume).await;
                Err(error)
            }
        }
    }

    fn serve(
        &self,
        info: &mut ExportInfo,
        volume: Arc<Volume>,
        read_only: bool,
    ) -> Result<Serving, ExportError> {
        let name = if info.kind() == ExportKind::Nbd { "nbd" } else { "vhost" };
        let socket = self.place.run_dir.join(format!("{name}-{}.sock", info.id));
        info.socket = socket.display().to_string();
        if info.kind() == ExportKind::VhostUser {
            let device = vhost::serve(volume.clone(), socket, read_only, VHOST_QUEUES, Handle::current())?;
            return Ok(Serving::Vhost(device, volume));
        }
        let export = nbd::Export::new(volume, read_only);
        nbd::listen_unix(socket.clone(), export.clone())
            .map_err(|source| ExportError::Socket { socket, source })?;
        self.table.insert(&info.volume, info.id, export.clone());
        info.uri = format!("nbd://{}/{}", self.place.nbd_addr, info.volume);
        Ok(Serving::Nbd(export))
    }

    async fn report(&self) {
        loop {
            let exports = self.states.lock().values().cloned().collect();
            let gateway = pb::GatewayReport { client: self.granted.client.0, exports };
            let reporter = Some(pb::host_report::Reporter::Gateway(gateway));
            let report = pb::HostReport { host: self.place.host.clone(), reporter };
            let call = self.monitors.once(|m| {
                let report = report.clone();
                async move { m.host().report_host(report).await }
            });
            match tokio::time::timeout(REPORT_TIMEOUT, call).await {
                Ok(Ok(_)) => {}
                Ok(Err(status)) => debug!(error = status.message(), "a report was not taken"),
                Err(_) => debug!("a report was not answered"),
            }
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep(REPORT_EVERY) => {}
            }
        }
    }
}

/// A volume, or a snapshot of one.
fn valid_source(name: &str) -> bool {
    match name.split_once('@') {
        Some((volume, snapshot)) => valid_volume_name(volume) && valid_name(snapshot),
        None => valid_volume_name(name),
    }
}

enum Serving {
    Nbd(Arc<nbd::Export>),
    Vhost(vhost::VhostExport, Arc<Volume>),
}

impl Serving {
    fn volume(&self) -> &Volume {
        match self {
            Serving::Nbd(export) => &export.volume,
            Serving::Vhost(_, volume) => volume,
        }
    }

    async fn end(self, table: &nbd::Table, name: &str, id: u64) {
        match self {
            Serving::Nbd(export) => {
                table.remove(name, id);
                export.close().await;
            }
            Serving::Vhost(device, _) => device.stop().await,
        }
    }
}

/// Removes the sockets that an earlier run of this gateway left in `run_dir`.
pub fn remove_stale_sockets(run_dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(run_dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if (name.starts_with("nbd-") || name.starts_with("vhost-")) && name.ends_with(".sock") {
            nbd::remove_socket(&entry.path())?;
        }
    }
    Ok(())
}
