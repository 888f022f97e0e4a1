//! Streams between the guest and its host over vsock(7).

use std::fs::File;
use std::io::{self, Read, Write};

use rustix::fd::OwnedFd;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, accept, bind, connect, listen, shutdown, socket_with,
};

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
    bind(&listener, &Address::new(ANY, port))?;
    listen(&listener, 1)?;
    println!("chronovisor guest: vsock-echo {port}: listening");
    let mut stream = File::from(accept(&listener)?);
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
    connect(&stream, &Address::new(HOST, port))?;
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
    shutdown(&stream, Shutdown::Write)?;
    let back = back.join().expect("a thread that reads")?;
    Ok((there, back))
}

fn socket() -> io::Result<OwnedFd> {
    modules::load("virtio_mmio")?;
    modules::load("vmw_vsock_virtio_transport")?;
    Ok(socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// `struct sockaddr_vm`, which neither the standard library nor rustix has.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

/// Its length.
const LEN: SocketAddrLen = 16;
const _: () = assert!(size_of::<Address>() == LEN as usize);

impl Address {
    fn new(cid: u32, port: u32) -> Self {
        Self {
            family: AddressFamily::VSOCK.as_raw(),
            reserved: 0,
            port,
            cid,
            zero: [0; 4],
        }
    }
}

// SAFETY: the pointer is to an `Address`, which lives through the call, with its length; the kernel reads a `sockaddr_vm`
// there, which has these fields in this order (include/uapi/linux/vm_sockets.h), without padding.
#[expect(unsafe_code, reason = "an address of a family that rustix does not know")]
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f(std::ptr::from_ref(self).cast(), LEN)
    }
}
