//! Accepts NBD connections.

use super::connection::Connection;
use super::limits::{CONNECTIONS_MAX, SILENCE_MAX};
use super::{Export, Names, NbdError, Table, serve};
use gabion_common::net;
use std::fmt::Display;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

/// Serves every export of `table` by its volume's name, until the task is dropped.
pub async fn listen_tcp(listener: TcpListener, table: Arc<Table>) {
    accept_all(Names::Table(table), || async {
        let (stream, peer) = listener.accept().await?;
        Ok((net::watched(stream, SILENCE_MAX)?, peer))
    })
    .await;
}

/// Serves one export on a Unix socket until the export closes; the socket goes with it. A stale
/// socket of that name is replaced.
pub fn listen_unix(socket: PathBuf, export: Arc<Export>) -> io::Result<()> {
    remove_socket(&socket)?;
    let listener = UnixListener::bind(&socket)?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o660))?;
    let tracker = export.connections.clone();
    tracker.spawn(async move {
        let path = socket.display().to_string();
        let accepting = accept_all(Names::One(export.clone()), || async {
            let (stream, _) = listener.accept().await?;
            Ok((stream, path.clone()))
        });
        tokio::select! {
            () = accepting => {}
            () = export.closing.cancelled() => {}
        }
        let _ = remove_socket(&socket);
    });
    Ok(())
}

/// Removes a socket that an earlier run left; anything else of that name is left alone.
pub fn remove_socket(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is there")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

async fn accept_all<S, P, F, Fut>(names: Names, mut accept: F)
where
    S: Connection,
    P: Display + Send + 'static,
    F: FnMut() -> Fut,
    Fut: Future<Output = io::Result<(S, P)>>,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let slot = slots.clone().acquire_owned().await.expect("never closed");
        match accept().await {
            Ok((stream, peer)) => {
                let names = names.clone();
                tokio::spawn(async move {
                    match serve(stream, names).await {
                        Ok(()) => {}
                        Err(NbdError::Io(error)) => tracing::debug!(%peer, %error, "NBD connection ended"),
                        Err(error) => tracing::warn!(%peer, %error, "NBD connection closed"),
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: let some close.
                tracing::warn!(%error, "cannot accept an NBD connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
