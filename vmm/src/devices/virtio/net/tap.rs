//! A tap device of the host's: Ethernet frames, each behind a virtio-net header, one a call (Documentation/networking/tuntap.rst).
//!
//! Frames go between the tap and guest memory directly. One that is there when nobody can take it stays in the tap's own queue,
//! and is the host kernel's to drop where that is full.
#![allow(
    unsafe_code,
    reason = "ioctls of a tap; readv and writev take addresses of guest memory"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::spec::{F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_UFO, HEADER_LEN, MAX_PIECES};
use crate::devices::virtio::queue::{Buffers, Chain};

/// Where taps come from.
const TUN: &str = "/dev/net/tun";

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// Its name is none.
    #[error("interface {iface}: {tap:?} cannot be a tap's name: those have 1 to {max} bytes", max = libc::IFNAMSIZ - 1)]
    Name {
        /// The interface.
        iface: String,
        /// The name.
        tap: String,
    },
    /// No source of taps.
    #[error("interface {iface}: cannot open {TUN}: {source}; {}", tun_advice(source))]
    Tun {
        /// The interface.
        iface: String,
        /// What the system said.
        source: io::Error,
    },
    /// The tap is not to be had.
    #[error(
        "interface {iface}: cannot attach to tap {tap}: {source}; {}",
        attach_advice(source, tap)
    )]
    Attach {
        /// The interface.
        iface: String,
        /// The tap.
        tap: String,
        /// What the system said.
        source: io::Error,
    },
    /// It does not know our kind of header.
    #[error(
        "interface {iface}: tap {tap} cannot have virtio-net headers of {HEADER_LEN} bytes: {source}; use Linux 3.0 or later"
    )]
    Header {
        /// The interface.
        iface: String,
        /// The tap.
        tap: String,
        /// What the system said.
        source: io::Error,
    },
}

fn tun_advice(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        "run as a user who may read and write it"
    } else {
        "load the module (modprobe tun), and make the device where it is missing (mknod /dev/net/tun c 10 200)"
    }
}

fn attach_advice(error: &io::Error, tap: &str) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "it is in use: give each interface a tap of its own".into(),
        Some(libc::EPERM) => format!(
            "have root make it for you (ip tuntap add dev {tap} mode tap user $(id -un)), or grant CAP_NET_ADMIN"
        ),
        _ => "name a tap with a single queue, as ip tuntap add makes it".into(),
    }
}

/// A tap that is ours.
#[derive(Debug)]
pub(super) struct Tap {
    name: String,
    file: File,
}

/// What came of reading a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// A frame, with its header, of so many bytes.
    Frame(usize),
    /// It had more bytes than there was room for, and is gone.
    TooLong,
    /// There is none now.
    Nothing,
}

impl Tap {
    /// Attaches to `name`, or makes it, where that is permitted; such a tap goes when this does.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(iface: &str, name: &str) -> Result<Self, TapError> {
        // SAFETY: an ifreq is numbers and bytes: zeros are one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // A byte is left for the end of the name.
        if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
            return Err(TapError::Name {
                iface: iface.into(),
                tap: name.into(),
            });
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).expect("bits below 15");

        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN);
        let file = file.map_err(|source| TapError::Tun {
            iface: iface.into(),
            source,
        })?;
        // SAFETY: TUNSETIFF reads and writes an ifreq, which is what it is given, during the call.
        let attached = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        checked(attached).map_err(|source| TapError::Attach {
            iface: iface.into(),
            tap: name.into(),
            source,
        })?;
        let len = libc::c_int::try_from(HEADER_LEN).expect("12");
        // SAFETY: TUNSETVNETHDRSZ reads an int, which is what it is given, during the call.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) };
        checked(set).map_err(|source| TapError::Header {
            iface: iface.into(),
            tap: name.into(),
            source,
        })?;
        Ok(Self {
            name: name.into(),
            file,
        })
    }

    /// A socket that stands for a tap: what is sent to its other end is received here.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn of(socket: impl Into<std::os::fd::OwnedFd>) -> Self {
        Self {
            name: "test".into(),
            file: File::from(socket.into()),
        }
    }

    /// Its name on the host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the tap is still there: the host can delete it.
    pub fn is_there(&self) -> bool {
        // SAFETY: an ifreq is numbers and bytes: zeros are one. TUNGETIFF writes one, which is what it is given, during the call.
        let got = unsafe {
            let mut request: libc::ifreq = std::mem::zeroed();
            libc::ioctl(self.file.as_raw_fd(), libc::TUNGETIFF, &raw mut request)
        };
        checked(got).is_ok()
    }

    /// Has the tap give frames as a driver that took `features` can have them: without checksums, or longer than the MTU.
    ///
    /// # Errors
    /// The host cannot, and goes on as before: all its frames are such as any driver can have.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let offloads = offloads(features);
        // SAFETY: TUNSETOFFLOAD takes a number.
        checked(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        })
    }

    /// Takes the next frame into `room`, which has [`MAX_PIECES`] pieces at most.
    ///
    /// # Errors
    /// The tap is gone, or whatever else the system says.
    pub fn receive<'m>(&self, room: impl Iterator<Item = &'m Chain<'m>>) -> io::Result<Received> {
        // What is there for one byte more tells a frame that fits from one that was cut: the kernel does not.
        let mut beyond = 0u8;
        let slices = room.flat_map(|chain| chain.writable.slices());
        let mut iovecs: Vec<_> = slices
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let len: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        iovecs.push(libc::iovec {
            iov_base: (&raw mut beyond).cast(),
            iov_len: 1,
        });
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the vectors name `beyond`, and guest memory, which the borrow behind the chains keeps mapped and which nothing
        // of ours takes for anything but memory that changes at any time.
        let read = unsafe { libc::readv(self.file.as_raw_fd(), iovecs.as_ptr(), count) };
        match usize::try_from(read) {
            Ok(read) if read > len => Ok(Received::TooLong),
            // A tap has no end; what has one is no tap any more.
            Ok(read) if read < HEADER_LEN => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => Ok(Received::Frame(read)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
                error => Err(error),
            },
        }
    }

    /// Sends a frame with its header, in [`MAX_PIECES`] pieces at most.
    ///
    /// # Errors
    /// The frame is none, the tap is down or gone, or whatever else the system says. The frame is lost.
    pub fn send(&self, frame: &Buffers<'_>) -> io::Result<()> {
        let iovecs = frame.iovecs();
        debug_assert!(iovecs.len() <= MAX_PIECES);
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the vectors name guest memory, which the borrow behind `frame` keeps mapped; it is only read.
        if unsafe { libc::writev(self.file.as_raw_fd(), iovecs.as_ptr(), count) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Whether `error` says that the tap was deleted.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD) || error.kind() == io::ErrorKind::UnexpectedEof
}

/// What a tap may leave to a driver that took `features`. All else builds on checksums: the kernel refuses it alone.
fn offloads(features: u64) -> libc::c_uint {
    if features & F_GUEST_CSUM == 0 {
        return 0;
    }
    [
        (F_GUEST_TSO4, libc::TUN_F_TSO4),
        (F_GUEST_TSO6, libc::TUN_F_TSO6),
        (F_GUEST_UFO, libc::TUN_F_UFO),
    ]
    .iter()
    .filter(|(feature, _)| features & feature != 0)
    .fold(libc::TUN_F_CSUM, |all, (_, offload)| all | offload)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
