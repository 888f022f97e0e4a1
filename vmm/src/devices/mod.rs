//! The guest's devices, and the bus that finds them: what a vCPU's exits arrive at.
//!
//! The bus is fixed when the machine is built: a `match` on ports, an index by address, no lock. Each device locks itself, for as long
//! as it takes to read or write one register. An address nobody claims reads as all ones and swallows writes, as on a PC.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
pub mod i8042;
pub mod pm;
pub mod ring;
pub mod serial;
pub mod virtio;

use std::sync::Arc;
use std::sync::mpsc::Sender;

use vcpu::{ExitHandler, VcpuEnd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::{COM1_LEN, COM1_PORT, I8042_COMMAND, I8042_DATA, PM_LEN, PM_PORT, VIRTIO_MMIO};

use virtio::mmio::{Transport, Window};

pub use i8042::I8042;
pub use pm::Pm;
pub use serial::SerialPort;

/// What the VMM thread hears from a running machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU's loop ended.
    Vcpu {
        /// Which.
        index: u32,
        /// How.
        end: VcpuEnd,
    },
}

/// The way from a vCPU thread to the VMM thread. Used when a machine ends, so it may allocate and call the system.
#[derive(Debug)]
pub struct Notifier {
    events: Sender<MachineEvent>,
    wake: EventFd,
}

impl Notifier {
    /// Events go to `events`, each announced on `wake`.
    #[must_use]
    pub fn new(events: Sender<MachineEvent>, wake: EventFd) -> Self {
        Self { events, wake }
    }

    fn send(&self, event: MachineEvent) {
        // Either fails only when the VMM thread is gone, and then nobody is left to be told.
        let _ = self.events.send(event);
        let _ = self.wake.write(1);
    }
}

/// All of a machine's devices by address.
#[derive(Debug)]
pub struct Bus {
    /// COM1.
    pub serial: Arc<SerialPort>,
    /// The keyboard controller.
    pub i8042: I8042,
    /// ACPI's fixed hardware.
    pub pm: Pm,
    /// virtio devices, in the order of their windows.
    pub virtio: Vec<Transport>,
    /// Where a guest's wish to end goes.
    pub notifier: Notifier,
}

const COM1_LAST: u16 = COM1_PORT + COM1_LEN - 1;
const PM_LAST: u16 = PM_PORT + PM_LEN - 1;

impl ExitHandler for Bus {
    fn io_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, &mut *data) {
            // Registers of one byte: wider accesses are nobody's.
            (COM1_PORT..=COM1_LAST, [byte]) => *byte = self.serial.read(register(port, COM1_PORT)),
            (I8042_DATA, [byte]) => *byte = self.i8042.read_data(),
            (I8042_COMMAND, [byte]) => *byte = self.i8042.read_status(),
            (PM_PORT..=PM_LAST, data) => self.pm.read(port - PM_PORT, data),
            _ => {}
        }
    }

    fn io_write(&self, port: u16, data: &[u8]) {
        let wish = match (port, data) {
            (COM1_PORT..=COM1_LAST, &[byte]) => {
                self.serial.write(register(port, COM1_PORT), byte);
                None
            }
            (I8042_DATA, &[byte]) => self.i8042.write_data(byte),
            (I8042_COMMAND, &[byte]) => self.i8042.write_command(byte),
            (PM_PORT..=PM_LAST, data) => self.pm.write(port - PM_PORT, data),
            _ => None,
        };
        if let Some(wish) = wish {
            self.notifier.send(match wish {
                Wish::PowerOff => MachineEvent::PowerOff,
                Wish::Reset => MachineEvent::Reset,
            });
        }
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((transport, offset)) = self.virtio(addr) {
            transport.read(offset, data);
        }
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.virtio(addr) {
            transport.write(offset, data);
        }
    }

    fn ended(&self, index: u32, end: VcpuEnd) {
        self.notifier.send(MachineEvent::Vcpu { index, end });
    }
}

impl Bus {
    /// The virtio device at `addr`, and the offset in its window.
    fn virtio(&self, addr: u64) -> Option<(&Transport, u64)> {
        let at = addr.checked_sub(VIRTIO_MMIO)?;
        let transport = self.virtio.get(usize::try_from(at / Window::LEN).ok()?)?;
        Some((transport, at % Window::LEN))
    }
}

fn register(port: u16, base: u16) -> u8 {
    u8::try_from(port - base).expect("a device's ports are fewer than 256")
}

/// What a guest may ask of its machine through a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To be switched off.
    PowerOff,
    /// To be started again.
    Reset,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ring::OutputRing;
    use crate::layout::{ACPI_RESET, PM1A_CONTROL};
    use std::sync::mpsc::{Receiver, channel};

    fn bus() -> (Bus, Receiver<MachineEvent>, Arc<OutputRing>) {
        let (events, heard) = channel();
        let ring = Arc::new(OutputRing::new().unwrap());
        let bus = Bus {
            serial: Arc::new(SerialPort::new(Arc::clone(&ring)).unwrap()),
            i8042: I8042::new().unwrap(),
            pm: Pm::default(),
            virtio: Vec::new(),
            notifier: Notifier::new(events, EventFd::new(libc::EFD_NONBLOCK).unwrap()),
        };
        (bus, heard, ring)
    }

    #[test]
    fn an_address_nobody_claims_reads_as_all_ones_and_swallows_writes() {
        let (bus, heard, _) = bus();
        for port in [0x80, 0x61, 0x70, 0x3f7, 0x400, 0x5ff, 0x609, 0xcf8, 0xffff] {
            let mut data = [0; 4];
            bus.io_read(port, &mut data);
            assert_eq!(data, [0xff; 4], "port {port:#x}");
            bus.io_write(port, &[0xfe]);
        }
        let mut data = [0; 8];
        bus.mmio_read(0xd000_0000, &mut data);
        bus.mmio_write(0xd000_0000, &data);
        assert_eq!(data, [0xff; 8]);
        assert!(heard.try_recv().is_err());
    }

    #[test]
    fn a_register_of_one_byte_is_not_read_by_a_wider_access() {
        let (bus, heard, ring) = bus();
        let mut data = [0; 2];
        bus.io_read(COM1_PORT + 5, &mut data);
        assert_eq!(data, [0xff; 2]);
        bus.io_write(COM1_PORT, b"ab");
        bus.io_write(I8042_COMMAND, &[0xfe, 0]);
        assert!(ring.take(&mut Vec::new()) == 0 && heard.try_recv().is_err());
    }

    #[test]
    fn each_way_to_end_is_told_apart() {
        let (bus, heard, _) = bus();
        bus.io_write(I8042_COMMAND, &[0xfe]);
        assert_eq!(heard.recv().unwrap(), MachineEvent::Reset);
        bus.io_write(ACPI_RESET, &[pm::RESET_VALUE]);
        assert_eq!(heard.recv().unwrap(), MachineEvent::Reset);
        bus.io_write(
            PM1A_CONTROL,
            &(1 << 13 | u16::from(pm::SLEEP_TYPE_S5) << 10).to_le_bytes(),
        );
        assert_eq!(heard.recv().unwrap(), MachineEvent::PowerOff);
        bus.ended(3, VcpuEnd::TripleFault);
        assert_eq!(
            heard.recv().unwrap(),
            MachineEvent::Vcpu {
                index: 3,
                end: VcpuEnd::TripleFault
            }
        );
    }

    #[test]
    fn what_the_guest_writes_to_com1_comes_out_of_the_ring() {
        let (bus, _, ring) = bus();
        for byte in b"hello" {
            bus.io_write(COM1_PORT, &[*byte]);
        }
        let mut out = Vec::new();
        assert_eq!((ring.take(&mut out), out.as_slice()), (5, &b"hello"[..]));
    }
}
