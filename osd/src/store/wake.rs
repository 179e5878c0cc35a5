//! Wakes the store's thread while it waits for its disk: an eventfd that costs a system call only when it sleeps.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

struct Inner {
    fd: OwnedFd,
    armed: AtomicBool,
}

/// Given to everybody who has something for the store's thread.
#[derive(Clone)]
pub struct Waker(Arc<Inner>);

impl Waker {
    pub fn new() -> io::Result<Waker> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Waker(Arc::new(Inner { fd, armed: AtomicBool::new(false) })))
    }

    /// The sleeper: from now on a wake is noticed. It looks once more for work after this, then sleeps.
    pub fn arm(&self) {
        self.0.armed.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The sleeper is awake.
    pub fn disarm(&self) {
        self.0.armed.store(false, Ordering::SeqCst);
    }

    /// Whoever found the descriptor readable makes it unreadable again.
    pub fn drain(&self) {
        let mut count = [0u8; 8];
        // Not readable after all: nothing to do.
        let _ = rustix::io::read(&self.0.fd, &mut count);
    }

    /// Called after the work has been made visible.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.0.armed.swap(false, Ordering::SeqCst) {
            // The counter cannot overflow: one write per arming. A late one makes one sleep short.
            let _ = rustix::io::write(&self.0.fd, &1u64.to_ne_bytes());
        }
    }

    /// Readable after a wake.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}
