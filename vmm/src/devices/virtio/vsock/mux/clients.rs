//! Clients of the host's: how they are taken in, and what they say before they are connected.

use std::io::ErrorKind;
use std::time::Instant;

use rustix::net::RecvFlags;

use super::{A_TURN, Connection, FIRST_PORT, MAX_CONNECTIONS, Mux, PATIENCE, Ports, Stage, count};
use crate::devices::virtio::vsock::socket::port_of;

/// Longest greeting: `CONNECT 4294967295` and the end of a line are 19 or 20 bytes. Firecracker reads as much.
const MAX_GREETING: usize = 32;

impl Mux {
    /// Clients of the host's.
    pub(super) fn accept(&mut self, now: Instant) {
        for _ in 0..A_TURN {
            let stream = match self.socket.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!("vsock: cannot take in a connection by the host: {error}; trying again in a while");
                    self.stop_listening();
                    self.set_timer(now + PATIENCE, now);
                    return;
                }
            };
            if self.entries.len() >= MAX_CONNECTIONS {
                tracing::debug!("vsock: there are {MAX_CONNECTIONS} connections: one more by the host is refused");
                continue;
            }
            if let Ok(token) = self.add(stream, Stage::Greeting) {
                self.set_deadline(token, PATIENCE, now);
            }
        }
    }

    /// What a client wants, if it has said so.
    pub(super) fn greeting(&mut self, token: u64, now: Instant) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        // Only looked at: what follows the line is for the guest.
        let mut start = [0; MAX_GREETING];
        let len = match rustix::net::recv(&entry.stream, &mut start, RecvFlags::PEEK) {
            Ok((len, _)) => len,
            Err(rustix::io::Errno::WOULDBLOCK) => return,
            Err(_) => 0,
        };
        let start = &start[..len];
        let Some(end) = start.iter().position(|&byte| byte == b'\n') else {
            if len == 0 || len == MAX_GREETING {
                self.entries.remove(&token);
            }
            return;
        };
        let (mut line, port) = ([0; MAX_GREETING], port_of(&start[..end]));
        let taken = rustix::net::recv(&entry.stream, &mut line[..=end], RecvFlags::empty());
        let (Ok(_), Some(guest)) = (taken, port) else {
            self.entries.remove(&token);
            return;
        };
        let ports = self.assign(guest);
        if let Some(entry) = self.entries.get_mut(&token) {
            entry.stage = Stage::Connected(ports, Connection::by_host());
            self.by_ports.insert(ports, token);
            count(&self.metrics.conns_added, 1);
            self.set_deadline(token, PATIENCE, now);
            self.speak(token);
        }
    }

    /// Ports for a connection by the host. There are far fewer connections than ports.
    fn assign(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports {
                host: self.next_port,
                guest,
            };
            self.next_port = FIRST_PORT | (self.next_port + 1) & (FIRST_PORT - 1);
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }
}
