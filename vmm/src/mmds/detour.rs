//! The service on the wire of a network interface.

use std::time::{Duration, Instant};

use super::Stack;
use crate::devices::virtio::net::Detour;

impl Detour for Stack {
    fn takes(&self, start: &[u8]) -> bool {
        Self::takes(self, start)
    }

    fn receive(&mut self, frame: &[u8], now: Instant) {
        Self::receive(self, frame, now);
    }

    fn transmit(&mut self, now: Instant) -> Option<Vec<u8>> {
        Self::transmit(self, now)
    }

    fn next_poll(&mut self, now: Instant) -> Option<Duration> {
        Self::next_poll(self, now)
    }
}
