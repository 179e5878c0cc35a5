//! Tells the service manager that the daemon serves (`sd_notify(3)`), so that units that start after
//! it find it listening. Without a service manager it does nothing.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Says "ready" to the socket that `NOTIFY_SOCKET` names. A failure is logged: the service manager
/// then gives up on the daemon by its own timeout and says so.
pub fn serving() {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|s| !s.is_empty()) else { return };
    if let Err(error) = notify(&socket, b"READY=1") {
        tracing::warn!(socket = %socket.display(), %error, "cannot tell the service manager that this daemon serves");
    }
}

fn notify(socket: &OsStr, message: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message, &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reaches_paths_and_abstract_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("gabion-readiness-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        let by_path = (UnixDatagram::bind(&path).unwrap(), path.into_os_string());
        let by_name = (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}").into());
        for (socket, address) in [by_path, by_name] {
            notify(&address, b"READY=1").unwrap();
            let mut heard = [0; 32];
            let len = socket.recv(&mut heard).unwrap();
            assert_eq!(&heard[..len], b"READY=1");
        }
        assert!(notify(OsStr::new("/nonexistent/notify"), b"READY=1").is_err());
    }
}
