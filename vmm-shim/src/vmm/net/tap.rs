//! The host's end of a network card: a tap device that carries one Ethernet frame a read or write, with a
//! virtio header before each (the kernel's `Documentation/networking/tuntap.rst`, `linux/if_tun.h`).

use gabion_proto::nic::check_tap_name;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// `struct virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
pub const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;

/// What the host may leave undone for the guest to do (TUN_F_*).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offload {
    pub checksum: bool,
    pub segment_ipv4: bool,
    pub segment_ipv6: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("{0}")]
    Name(String),
    #[error("there is no tap device {0} on this host; make it with: ip tuntap add dev {0} mode tap")]
    Missing(String),
    #[error("cannot open /dev/net/tun")]
    Device(#[source] io::Error),
    #[error("cannot use the tap device {name}: {step}")]
    Attach { name: String, step: &'static str, source: io::Error },
}

/// `struct ifreq` as far as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

pub struct Tap {
    file: File,
    is_device: bool,
}

impl Tap {
    /// Opens a device that exists; who made it decides which bridge it is part of.
    pub fn open(name: &str) -> Result<Tap, TapError> {
        check_tap_name(name).map_err(TapError::Name)?;
        // TUNSETIFF makes a device that is missing: one that leads nowhere.
        if !Path::new("/sys/class/net").join(name).join("tun_flags").exists() {
            return Err(TapError::Missing(name.into()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(TapError::Device)?;
        let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        let failed = |step| {
            let name = name.to_owned();
            move |source| TapError::Attach { name, step, source }
        };
        // SAFETY: the request is a whole ifreq with a terminated name; the kernel only writes inside it.
        let attached = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) };
        check(attached).map_err(failed("attaching"))?;
        let bytes = HEADER_BYTES as libc::c_int;
        // SAFETY: the kernel reads one int.
        let sized = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &bytes) };
        check(sized).map_err(failed("its headers' size"))?;
        Ok(Tap { file, is_device: true })
    }

    /// Any other descriptor that keeps frames apart, and does not block: a pair of datagram sockets.
    pub fn from_datagrams(fd: OwnedFd) -> Tap {
        Tap { file: File::from(fd), is_device: false }
    }

    pub fn set_offload(&self, offload: Offload) -> io::Result<()> {
        if !self.is_device {
            return Ok(());
        }
        let Offload { checksum, segment_ipv4, segment_ipv6 } = offload;
        let bits = libc::c_ulong::from(checksum)
            | libc::c_ulong::from(segment_ipv4) << 1
            | libc::c_ulong::from(segment_ipv6) << 2;
        // SAFETY: the argument is a number, not an address.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, bits) })
    }

    /// The next frame with its header; `WouldBlock` when there is none.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_missing_is_named_with_the_way_to_make_it() {
        let error = Tap::open("gabion-none").err().unwrap().to_string();
        assert!(error.contains("gabion-none") && error.contains("ip tuntap add"), "{error}");
        assert!(matches!(Tap::open("../lo"), Err(TapError::Name(_))));
        assert!(matches!(Tap::open("lo"), Err(TapError::Missing(_))), "no tap");
    }
}
