//! The serial port. vCPUs only move bytes between the 16550 and a buffer; the main thread carries them
//! to the log and to whoever is connected, so that no vCPU waits for a reader.

use super::limits::{CONSOLE_BUFFER_BYTES, CONSOLE_LOG_BYTES_MAX};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// The port's interrupt, an edge.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the port's output goes.
pub struct Output {
    waiting: Vec<u8>,
    log: File,
    log_bytes: u64,
    viewer: Option<UnixStream>,
    wake: EventFd,
}

impl Output {
    fn drain(&mut self) {
        if self.log_bytes > CONSOLE_LOG_BYTES_MAX && self.log.set_len(0).is_ok() {
            self.log_bytes = 0;
        }
        // A full disk costs the log, not the guest.
        if self.log.write_all(&self.waiting).is_ok() {
            self.log_bytes += self.waiting.len() as u64;
        }
        if let Some(viewer) = &mut self.viewer {
            match viewer.write(&self.waiting) {
                // A viewer that does not read loses output; the log has it.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.viewer = None,
            }
        }
        self.waiting.clear();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.waiting.is_empty() {
            self.wake.write(1)?;
        }
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= CONSOLE_BUFFER_BYTES {
            self.drain();
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub struct Port {
    // Any vCPU may use the port while the main thread brings input.
    uart: Mutex<Serial<Line, NoEvents, Output>>,
}

impl Port {
    /// `wake` tells the main thread that output waits.
    pub fn new(line: EventFd, log: File, wake: EventFd) -> Port {
        let output = Output { waiting: Vec::new(), log, log_bytes: 0, viewer: None, wake };
        Port { uart: Mutex::new(Serial::new(Line(line), output)) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Serial<Line, NoEvents, Output>> {
        self.uart.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn read(&self, offset: u8) -> u8 {
        self.lock().read(offset)
    }

    pub fn write(&self, offset: u8, value: u8) {
        // It fails only when its interrupt cannot be raised: the guest then polls.
        let _ = self.lock().write(offset, value);
    }

    /// Carries waiting output on.
    pub fn drain(&self) {
        self.lock().writer_mut().drain();
    }

    pub fn set_viewer(&self, viewer: Option<UnixStream>) {
        self.lock().writer_mut().viewer = viewer;
    }

    /// Room for input now.
    pub fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    /// How much of `typed` the port took.
    pub fn type_in(&self, typed: &[u8]) -> usize {
        self.lock().enqueue_raw_bytes(typed).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn output_reaches_log_and_viewer_and_input_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port =
            Port::new(line.try_clone().unwrap(), File::create(&path).unwrap(), wake.try_clone().unwrap());
        let (mut viewer, end) = UnixStream::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        port.set_viewer(Some(end));
        for byte in b"hello" {
            port.write(0, *byte);
        }
        assert_eq!(wake.read().unwrap(), 1, "woken once for all of it");
        port.drain();
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        let mut seen = [0; 5];
        viewer.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"hello");
        port.write(1, 1);
        assert_eq!(port.type_in(b"ls"), 2);
        assert!(line.read().is_ok(), "input interrupts");
        assert_eq!((port.read(0), port.read(0)), (b'l', b's'));
        assert_eq!(port.type_in(&[b'x'; 1000]), port_fifo());
    }

    fn port_fifo() -> usize {
        64
    }

    #[test]
    fn a_viewer_that_is_gone_or_slow_holds_nobody_up() {
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port = Port::new(line, tempfile::tempfile().unwrap(), wake);
        let (slow, end) = UnixStream::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        port.set_viewer(Some(end));
        for _ in 0..CONSOLE_BUFFER_BYTES * 8 {
            port.write(0, b'x');
        }
        drop(slow);
        port.write(0, b'y');
        port.drain();
        assert!(port.lock().writer().viewer.is_none());
    }
}
