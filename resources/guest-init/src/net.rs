//! TCP between the guest and its host, over the first interface: 172.16.0.2, with the host at 172.16.0.1.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::modules;

const HOST: &str = "172.16.0.1";
/// Of one transfer.
pub const TOTAL: usize = 64 << 20;
const PIECE: usize = 64 << 10;

/// Loads the driver and gives the interface its address; the MTU that it has.
pub fn up() -> io::Result<String> {
    modules::load("virtio_mmio")?;
    modules::load("virtio_net")?;
    for line in [
        "addr add 172.16.0.2/30 dev eth0",
        "link set eth0 up",
        "route add 169.254.169.254 dev eth0",
    ] {
        let status = Command::new("/bin/busybox").arg("ip").args(line.split(' ')).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("ip {line}: {status}")));
        }
    }
    let mtu = fs::read_to_string("/sys/class/net/eth0/mtu")?;
    Ok(mtu.trim_end().to_owned())
}

/// FNV-1a over words of 64 bits instead of bytes: an emulated guest has many to sum.
fn add(sum: u64, piece: &[u8]) -> u64 {
    piece.chunks_exact(8).fold(sum, |sum, word| {
        let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
        (sum ^ word).wrapping_mul(0x100_0000_01b3)
    })
}

const SUM: u64 = 0xcbf2_9ce4_8422_2325;

/// Takes one connection on `port` and reads [`TOTAL`] bytes; their sum.
pub fn receive(port: u16) -> io::Result<u64> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("chronovisor guest: net-receive {port}: listening");
    let (mut stream, _) = listener.accept()?;
    let (mut piece, mut sum) = (vec![0; PIECE], SUM);
    for _ in 0..TOTAL / PIECE {
        stream.read_exact(&mut piece)?;
        sum = add(sum, &piece);
    }
    Ok(sum)
}

/// Connects to the host's `port` and sends [`TOTAL`] bytes of no pattern; their sum.
pub fn send(port: u16) -> io::Result<u64> {
    let mut stream = TcpStream::connect((HOST, port))?;
    let (mut piece, mut sum, mut state) = (vec![0; PIECE], SUM, 1u64);
    for _ in 0..TOTAL / PIECE {
        for word in piece.chunks_exact_mut(8) {
            // Marsaglia's xorshift64.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        sum = add(sum, &piece);
        stream.write_all(&piece)?;
    }
    Ok(sum)
}

/// Sends to the host's port 5003 for `time`, or until the host takes nothing more for a second; how many bytes.
pub fn flood(time: Duration) -> io::Result<u64> {
    let mut stream = TcpStream::connect((HOST, 5003))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let (begun, piece, mut sent) = (Instant::now(), vec![0; PIECE], 0);
    while begun.elapsed() < time {
        match stream.write(&piece) {
            Ok(len) => sent += len as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}

/// Asks the metadata service: the status without a token, and the value where there is one (version 1); and the value with a token.
pub fn metadata(path: &str) -> io::Result<String> {
    let without = ask(&format!("GET {path} HTTP/1.1\r\n"))?;
    let mut told = without.split(' ').nth(1).unwrap_or_default().to_owned();
    if told == "200" {
        told += &format!(" {:?}", body(&without));
    }
    let token = ask("PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n")?;
    let with = ask(&format!(
        "GET {path} HTTP/1.1\r\nX-metadata-token: {}\r\n",
        body(&token)
    ))?;
    Ok(format!("{told} without a token, {:?} with one", body(&with)))
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

fn ask(head: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect("169.254.169.254:80")?;
    write!(stream, "{head}Host: 169.254.169.254\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
