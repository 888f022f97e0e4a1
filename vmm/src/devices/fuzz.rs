//! Devices that a guest reaches by ports: see [`crate::fuzz`]. An input is one step after another.

use std::sync::Arc;
use std::sync::mpsc::channel;

use vcpu::ExitHandler;
use vmm_sys_util::eventfd::EventFd;

use super::ring::OutputRing;
use super::{Bus, I8042, MachineEvent, Notifier, Pm, SerialPort};
use crate::fuzz::Input;
use crate::layout::{COM1_LEN, COM1_PORT, I8042_COMMAND, I8042_DATA, PM_LEN, PM_PORT};

pub(crate) fn run(mut input: Input) {
    let (events, heard) = channel();
    let ring = Arc::new(OutputRing::new().expect("there are descriptors"));
    let bus = Bus {
        serial: Arc::new(SerialPort::new(Arc::clone(&ring)).expect("there are descriptors")),
        i8042: I8042::new().expect("there are descriptors"),
        pm: Pm::default(),
        virtio: Vec::new(),
        notifier: Notifier::new(events, EventFd::new(libc::EFD_NONBLOCK).expect("there are descriptors")),
    };
    bus.serial.open_input();
    let mut written = 0;
    let mut said = Vec::new();
    while !input.is_empty() {
        let step = input.u8();
        let offset = u16::from(step & 7);
        let width = [1, 2, 4, 8][usize::from(step >> 3 & 3)];
        let port = match step >> 6 {
            0 => COM1_PORT + offset % COM1_LEN,
            1 if offset & 1 == 0 => I8042_DATA,
            1 => I8042_COMMAND,
            2 => PM_PORT + offset % PM_LEN,
            // What others do.
            _ => {
                match offset {
                    0 => drop(bus.i8042.ctrl_alt_del()),
                    1 => {
                        let typed = input.short();
                        assert!(bus.serial.give(typed) <= typed.len());
                    }
                    2 => drop(bus.i8042.has_driver()),
                    _ => {
                        let port = input.u16();
                        bus.io_read(port, &mut [0; 8][..width]);
                    }
                }
                continue;
            }
        };
        if step & 0x20 == 0 {
            bus.io_read(port, &mut [0; 8][..width]);
        } else {
            let bytes = input.u64().to_le_bytes();
            bus.io_write(port, &bytes[..width]);
            written += 1;
        }
        // Before a vCPU would have to wait.
        ring.take(&mut said);
    }
    // One byte at most for each that was written, one wish likewise.
    assert!(said.len() <= written, "{} bytes said, {written} written", said.len());
    let wishes: Vec<_> = heard.try_iter().collect();
    assert!(wishes.len() <= written, "{wishes:?}");
    assert!(
        wishes
            .iter()
            .all(|wish| matches!(wish, MachineEvent::PowerOff | MachineEvent::Reset))
    );
}
