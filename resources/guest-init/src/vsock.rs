//! Streams between the guest and its host over vsock(7).
#![allow(unsafe_code, reason = "the standard library and rustix know no address of a vsock")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::net::Shutdown;

use crate::modules;

/// The host, as a context id (VMADDR_CID_HOST).
const HOST: u32 = 2;
/// Whoever this guest is (VMADDR_CID_ANY).
const ANY: u32 = u32::MAX;

/// Bytes, and their sum by FNV-1a (Fowler, Noll and Vo), 64 bits wide.
pub struct Sum {
    pub bytes: u64,
    pub fnv: u64,
}

impl Sum {
    const fn new() -> Self {
        Self {
            bytes: 0,
            fnv: 0xcbf2_9ce4_8422_2325,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        for &byte in bytes {
            self.fnv = (self.fnv ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// Takes one connection on `port` and sends back all that comes, until it ends.
pub fn echo(port: u32) -> io::Result<Sum> {
    let listener = socket()?;
    bind(&listener, port)?;
    rustix::net::listen(&listener, 1)?;
    println!("chronovisor guest: vsock-echo {port}: listening");
    let mut stream = File::from(rustix::net::accept(&listener)?);
    let (mut buffer, mut sum) = (vec![0; 64 << 10], Sum::new());
    loop {
        let len = stream.read(&mut buffer)?;
        if len == 0 {
            return Ok(sum);
        }
        sum.add(&buffer[..len]);
        stream.write_all(&buffer[..len])?;
    }
}

/// Connects to the host's `port` and sends `bytes` bytes of no pattern; the sums of those, and of what came back.
pub fn send(port: u32, bytes: u64) -> io::Result<(Sum, Sum)> {
    let stream = socket()?;
    connect(&stream, port)?;
    let mut stream = File::from(stream);
    let mut reader = stream.try_clone()?;
    let back = std::thread::spawn(move || {
        let (mut buffer, mut sum) = (vec![0; 64 << 10], Sum::new());
        loop {
            match reader.read(&mut buffer)? {
                0 => return Ok::<_, io::Error>(sum),
                len => sum.add(&buffer[..len]),
            }
        }
    });
    let (mut there, mut state) = (Sum::new(), 1u64);
    while there.bytes < bytes {
        let mut piece = Vec::with_capacity(32 << 10);
        while piece.len() < 32 << 10 {
            // Marsaglia's xorshift64.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            piece.extend(state.to_le_bytes());
        }
        there.add(&piece);
        stream.write_all(&piece)?;
    }
    rustix::net::shutdown(&stream, Shutdown::Write)?;
    let back = back.join().expect("a thread that reads")?;
    Ok((there, back))
}

fn socket() -> io::Result<OwnedFd> {
    modules::load("virtio_mmio")?;
    modules::load("vmw_vsock_virtio_transport")?;
    // SAFETY: makes a descriptor, or fails.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor just made, which is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

type Call = unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn bind(socket: &OwnedFd, port: u32) -> io::Result<()> {
    with_address(libc::bind, socket, ANY, port)
}

fn connect(socket: &OwnedFd, port: u32) -> io::Result<()> {
    with_address(libc::connect, socket, HOST, port)
}

fn with_address(call: Call, socket: &OwnedFd, cid: u32, port: u32) -> io::Result<()> {
    // SAFETY: numbers and padding, of which all zeros is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).expect("a family");
    (address.svm_cid, address.svm_port) = (cid, port);
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).expect("16 bytes");
    // SAFETY: bind or connect, which read `len` bytes of the address.
    let done = unsafe { call(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
