//! The two event descriptors of a ring: the guest's kick, which is waited for, and the call that interrupts the guest.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Refuses a descriptor that is no eventfd: reads and writes of anything else could block or end the data path.
fn check_eventfd(file: &File) -> io::Result<()> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if link.as_os_str() == "anon_inode:[eventfd]" {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not an eventfd"))
    }
}

/// The guest's doorbell. Must be made inside a tokio runtime.
pub struct Kick(AsyncFd<File>);

impl Kick {
    pub fn check(file: &File) -> io::Result<()> {
        check_eventfd(file)?;
        // SAFETY: plain flag calls on a descriptor that `file` keeps open.
        let set = unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            flags >= 0 && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
        };
        if set { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    pub fn new(file: File) -> io::Result<Self> {
        // SAFETY: the file owns its descriptor and stays inside, so it is open for as long as it is registered.
        let registered = unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) };
        Ok(Kick(registered.map_err(io::Error::from)?))
    }

    /// Waits for a kick and takes it. Cancel safe: a kick that was not taken stays.
    pub async fn wait(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut count = [0u8; 8];
            match ready.try_io(|fd| fd.get_ref().read(&mut count)) {
                Ok(Ok(8)) => return Ok(()),
                Ok(Ok(_)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => continue,
            }
        }
    }
}

/// The interrupt. The control thread swaps it (a guest masks its vectors) while the ring's task signals it, hence the lock.
#[derive(Default)]
pub struct Call(Mutex<Option<File>>);

impl Call {
    pub fn set(&self, file: Option<File>) -> io::Result<()> {
        if let Some(file) = &file {
            check_eventfd(file)?;
        }
        *self.0.lock() = file;
        Ok(())
    }

    pub fn signal(&self) {
        if let Some(file) = &*self.0.lock() {
            // An eventfd only blocks or fails when its counter is full, and then it is already signalled.
            let _ = (&*file).write(&1u64.to_ne_bytes());
        }
    }
}
