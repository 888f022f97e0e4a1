//! COM1: vm-superio's 16550A between the guest, the [`OutputRing`] and the console's input.
//!
//! Output goes to the ring, which may make the vCPU wait; it waits without holding the UART's lock, which the VMM thread needs
//! for input. Input is given by the VMM thread, as much as the FIFO has room for; when the guest has emptied a FIFO that was
//! too full for all there was, the VMM thread is woken to give more.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::EventFd;

use super::ring::OutputRing;

/// The transmitter's register.
const DATA: u8 = 0;

/// The port.
#[derive(Debug)]
pub struct SerialPort {
    uart: Mutex<vm_superio::Serial<Interrupt, Arc<Input>, Output>>,
    output: Arc<OutputRing>,
    input: Arc<Input>,
    interrupt: EventFd,
}

impl SerialPort {
    /// A port as after reset, its output going to `output`.
    ///
    /// # Errors
    /// There are no descriptors left for its eventfds.
    pub fn new(output: Arc<OutputRing>) -> io::Result<Self> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let input = Arc::new(Input {
            room: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            wanted: AtomicBool::new(false),
        });
        let line = Interrupt(interrupt.try_clone()?);
        let uart = vm_superio::Serial::with_events(line, Arc::clone(&input), Output(Arc::clone(&output)));
        Ok(Self {
            uart: Mutex::new(uart),
            output,
            input,
            interrupt,
        })
    }

    fn uart(&self) -> MutexGuard<'_, vm_superio::Serial<Interrupt, Arc<Input>, Output>> {
        self.uart.lock().expect("no holder of this lock panics")
    }

    /// The guest reads `register`.
    pub fn read(&self, register: u8) -> u8 {
        self.uart().read(register)
    }

    /// The guest writes `register`. Waits while the console takes no output.
    pub fn write(&self, register: u8, value: u8) {
        if register == DATA {
            self.output.wait_for_room();
        }
        // Output always succeeds, and an interrupt fails only where it is already as pending as it can be.
        let _ = self.uart().write(register, value);
    }

    /// Gives the guest as much of `bytes` as it has room for, and says how much. After less than all of it
    /// [`SerialPort::room`] tells when there is room again.
    pub fn give(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart();
        let room = uart.fifo_capacity().min(bytes.len());
        // Under the lock that the guest reads under: either it sees that we want room, or we see its room.
        self.input.wanted.store(room < bytes.len(), Ordering::Relaxed);
        // Full cannot be: `room` is there. In loopback mode nothing is connected, and the bytes go where they go on a PC.
        let _ = uart.enqueue_raw_bytes(&bytes[..room]);
        room
    }

    /// Lets input begin: there is a guest now.
    pub fn open_input(&self) {
        // Cannot be full: nothing else was written yet.
        let _ = self.input.room.write(1);
    }

    /// Readable when the guest has room: once it is there, and again after [`SerialPort::give`] found too little.
    #[must_use]
    pub fn room(&self) -> &EventFd {
        &self.input.room
    }

    /// The interrupt line, for KVM.
    #[must_use]
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }
}

/// KVM's side of the interrupt line: each write is an edge.
#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the UART's bytes go.
#[derive(Debug)]
struct Output(Arc<OutputRing>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|&byte| self.0.push(byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the UART tells the VMM thread.
#[derive(Debug)]
struct Input {
    room: EventFd,
    wanted: AtomicBool,
}

impl SerialEvents for Input {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    /// Called under the UART's lock.
    fn in_buffer_empty(&self) {
        if self.wanted.swap(false, Ordering::Relaxed) {
            let _ = self.room.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IER: u8 = 1;
    const LSR: u8 = 5;

    fn port() -> (SerialPort, Arc<OutputRing>) {
        let ring = Arc::new(OutputRing::new().unwrap());
        (SerialPort::new(Arc::clone(&ring)).unwrap(), ring)
    }

    #[test]
    fn input_arrives_in_order_with_an_interrupt() {
        let (port, _) = port();
        port.write(IER, 1);
        assert_eq!(port.give(b"hi"), 2);
        assert_eq!(port.interrupt().read().unwrap(), 1);
        assert_eq!(port.read(LSR) & 1, 1);
        assert_eq!((port.read(DATA), port.read(DATA)), (b'h', b'i'));
        assert_eq!(port.read(LSR) & 1, 0);
    }

    #[test]
    fn more_than_the_fifo_holds_is_left_to_the_giver_who_is_woken_when_it_is_empty() {
        let (port, _) = port();
        let room = port.give(&[b'x'; 1000]);
        assert!((1..1000).contains(&room));
        for _ in 0..room - 1 {
            port.read(DATA);
            assert!(port.room().read().is_err(), "no wake before the FIFO is empty");
        }
        port.read(DATA);
        assert_eq!(port.room().read().unwrap(), 1);
        assert_eq!(port.give(&[b'x'; 1000]), room);
    }

    #[test]
    fn nobody_is_woken_who_does_not_wait() {
        let (port, _) = port();
        port.give(b"x");
        port.read(DATA);
        assert!(port.room().read().is_err());
    }
}
