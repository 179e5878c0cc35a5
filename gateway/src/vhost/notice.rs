//! Telling a front end that the disk has grown.
//!
//! A front end that has given the device a channel of its own (VHOST_USER_SET_BACKEND_REQ_FD) gets the message
//! VHOST_USER_BACKEND_CONFIG_CHANGE_MSG there, asks for the configuration again and tells its guest. One that has not, but
//! keeps an in-flight record, is disconnected once: it connects again by itself, and reads the configuration then.
//! (QEMU's documentation, "Vhost-user Protocol".)

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Request code, flags, length of what follows; each 32 bits, little-endian.
const HEADER_BYTES: usize = 12;
const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE: u32 = 2;
const VERSION: u32 = 1;

/// What one front end can be told.
#[derive(Default)]
pub struct Notice {
    // Held to put it there or to send twelve bytes that do not block.
    channel: Mutex<Option<OwnedFd>>,
    /// It keeps an in-flight record, so that it can connect again.
    pub comes_back: AtomicBool,
}

impl Notice {
    /// Looks at the next message without taking it. The `vhost` crate keeps the channel to itself, and has no such message to
    /// send on it.
    pub fn look_ahead(&self, stream: &UnixStream) {
        let mut header = [0u8; HEADER_BYTES];
        let seen = recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut header)],
            &mut RecvAncillaryBuffer::default(),
            RecvFlags::PEEK,
        );
        let code = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        if !seen.is_ok_and(|s| s.bytes == HEADER_BYTES) || code != SET_BACKEND_REQ_FD {
            return;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
        if recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut ancillary, flags).is_err() {
            return;
        }
        let rights = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = rights;
    }

    /// False: it cannot be told, and has to connect again.
    pub fn configuration_changed(&self) -> bool {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(channel) = &*channel else { return false };
        let mut message = [0u8; HEADER_BYTES];
        message[..4].copy_from_slice(&CONFIG_CHANGE.to_le_bytes());
        message[4..8].copy_from_slice(&VERSION.to_le_bytes());
        match send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(HEADER_BYTES) => true,
            Ok(_) => false,
            Err(error) => {
                let error = io::Error::from(error);
                tracing::warn!(%error, "a front end does not take the news of its disk's new size");
                false
            }
        }
    }

    pub fn can_come_back(&self) -> bool {
        self.comes_back.load(Ordering::Relaxed)
    }
}
