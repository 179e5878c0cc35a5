//! A volume as a vhost-user-blk device on a Unix socket.
//!
//! ```text
//!  serve ── listen ── accept ── session (control thread) ── rings (one task per running virtqueue)
//!              ▲                   │ front end gone: rings drain
//!              └───────────────────┘        stop(): the connection is cut, rings drain with a deadline, the socket goes
//! ```
//!
//! One front end at a time; the next one waits in the socket's backlog until the rings of the last one have drained. One that is only
//! to connect again, because its disk has grown, does not wait for a request that is stuck: what is open is replayed to it, behind
//! itself in the volume's range lock, and whoever comes without a record of it waits until it has ended. A front end that
//! reconnects hands its in-flight region back, and what was under way is replayed before anything new is fetched (rule C4).
//! Front ends are trusted with their own guest's memory, not to cut its files short while they are mapped here, and with nothing
//! else; guests are trusted with nothing.

mod chain;
mod config;
mod disk;
mod event;
mod execute;
mod inflight;
pub mod limits;
mod notice;
mod request;
mod ring;
mod session;

use std::io;
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread;

use thiserror::Error;
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vhost::vhost_user::{BackendReqHandler, Error as WireError};

pub use disk::Disk;
use notice::Notice;
use session::{Device, Session};

#[derive(Debug, Error)]
pub enum VhostError {
    #[error("{num_queues} queues: a device has 1 to {}", limits::QUEUES_MAX)]
    Queues { num_queues: u16 },
    #[error("cannot listen on {}", socket.display())]
    Listen { socket: PathBuf, source: io::Error },
}

/// A served device. Dropping it stops the device in the background; [`VhostExport::stop`] also waits.
pub struct VhostExport {
    socket: PathBuf,
    abort: CancellationToken,
    task: Option<JoinHandle<()>>,
}

/// Serves `disk` on `socket`; a stale socket of that name is replaced.
pub fn serve<D: Disk>(
    disk: Arc<D>,
    socket: PathBuf,
    read_only: bool,
    num_queues: u16,
    rt: Handle,
) -> Result<VhostExport, VhostError> {
    if !(1..=limits::QUEUES_MAX).contains(&num_queues) {
        return Err(VhostError::Queues { num_queues });
    }
    let listener = {
        let _runtime = rt.enter();
        listen(&socket).map_err(|source| VhostError::Listen { socket: socket.clone(), source })?
    };
    let abort = CancellationToken::new();
    let device = Arc::new(Device {
        disk,
        read_only,
        num_queues,
        rt: rt.clone(),
        abort: abort.clone(),
        left_open: AtomicU64::new(0),
    });
    let task = rt.spawn(accept(listener, device));
    Ok(VhostExport { socket, abort, task: Some(task) })
}

impl VhostExport {
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Takes the socket away, disconnects the front end and waits until its I/O has ended or has been given up.
    pub async fn stop(mut self) {
        self.withdraw();
        if let Some(task) = self.task.take()
            && let Err(error) = task.await
        {
            tracing::error!(socket = %self.socket.display(), %error, "vhost-user export failed while stopping");
        }
    }

    fn withdraw(&self) {
        if !self.abort.is_cancelled() {
            self.abort.cancel();
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

impl Drop for VhostExport {
    fn drop(&mut self) {
        self.withdraw();
    }
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(socket) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(socket)?,
        Ok(_) => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is there"));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

async fn accept<D: Disk>(listener: UnixListener, device: Arc<Device<D>>) {
    loop {
        let stream = tokio::select! {
            () = device.abort.cancelled() => return,
            stream = listener.accept() => stream,
        };
        let served = match stream.and_then(|(stream, _)| stream.into_std()) {
            Ok(stream) => converse(stream, device.clone()).await,
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            tracing::warn!(%error, "a vhost-user connection could not be served");
            // Out of descriptors or threads: do not spin on accept.
            tokio::select! {
                () = device.abort.cancelled() => return,
                () = tokio::time::sleep(std::time::Duration::from_millis(200)) => {}
            }
        }
    }
}

/// Serves one front end until it leaves or the export stops.
async fn converse<D: Disk>(stream: UnixStream, device: Arc<Device<D>>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let connection = stream.try_clone()?;
    let abort = device.abort.clone();
    let hurry = abort.child_token();
    let mut sizes = device.disk.sizes();
    let notice = Arc::new(Notice::default());
    let (told, hurried) = (notice.clone(), hurry.clone());
    let (ended, end) = oneshot::channel::<()>();
    thread::Builder::new().name("vhost-control".to_owned()).spawn(move || {
        control(stream, device, told, hurried);
        let _ = ended.send(());
    })?;
    tokio::pin!(end);
    loop {
        tokio::select! {
            _ = &mut end => return Ok(()),
            () = abort.cancelled() => break,
            () = changed(&mut sizes) => {}
        }
        if notice.configuration_changed() {
            tracing::info!("the front end was told of its disk's new size");
        } else if notice.can_come_back() {
            tracing::info!("the front end is to connect again, for its disk's new size");
            break;
        } else {
            tracing::warn!("the front end cannot be told of its disk's new size before it connects again");
        }
    }
    // In this order: a front end that waits for a ring to stop must not be told that it has when that was given up.
    let _ = connection.shutdown(Shutdown::Both);
    hurry.cancel();
    let _ = end.await;
    Ok(())
}

/// Ends when the size has changed.
async fn changed(sizes: &mut Option<watch::Receiver<u64>>) {
    if let Some(sizes) = sizes
        && sizes.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

fn control<D: Disk>(
    stream: UnixStream,
    device: Arc<Device<D>>,
    notice: Arc<Notice>,
    hurry: CancellationToken,
) {
    tracing::debug!("vhost-user front end connected");
    let ahead = match stream.try_clone() {
        Ok(ahead) => ahead,
        Err(error) => return tracing::warn!(%error, "a vhost-user connection could not be served"),
    };
    let session = Arc::new(Mutex::new(Session::new(device.clone(), notice.clone(), hurry)));
    let mut handler = BackendReqHandler::from_stream(stream, session.clone());
    let end = loop {
        notice.look_ahead(&ahead);
        if let Err(error) = handler.handle_request() {
            break error;
        }
    };
    match session.lock() {
        Ok(mut session) => session.close(),
        Err(poisoned) => poisoned.into_inner().close(),
    }
    match end {
        WireError::Disconnected | WireError::PartialMessage | WireError::SocketBroken(_) => {
            tracing::debug!("vhost-user front end disconnected");
        }
        _ if device.abort.is_cancelled() => {}
        error => tracing::warn!(%error, "vhost-user front end dropped for a request that cannot be served"),
    }
}
