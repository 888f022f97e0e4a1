use std::sync::Mutex;

use super::super::testing::{Driver, NEEDS_RESET, READY, STATUS};
use super::super::{F_EVENT_IDX, VirtioDevice, queue::QueueError};
use super::*;

/// A device that only notes what happens to it.
#[derive(Debug, Default)]
struct Notes {
    active: Option<Active>,
    resets: u32,
    notified: Vec<usize>,
    config: Vec<(usize, Vec<u8>)>,
    broken: bool,
}

impl VirtioDevice for Notes {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        F_EVENT_IDX | 1
    }
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        super::super::copy_config(b"config", offset, data);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.push((offset, data.to_vec()));
    }
    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }
    fn reset(&mut self) {
        self.active = None;
        self.resets += 1;
    }
    fn notified(&mut self, queue: usize) -> Result<(), QueueError> {
        self.notified.push(queue);
        if self.broken {
            Err(QueueError::Endless { head: 0 })
        } else {
            Ok(())
        }
    }
}

fn device() -> (Arc<Mutex<Notes>>, Driver) {
    let notes = Arc::new(Mutex::new(Notes::default()));
    let driver = Driver::new(notes.clone());
    (notes, driver)
}

/// Takes `features`, as far as the device lets it.
fn take(driver: &Driver, features: u64) {
    for (select, word) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
        driver.set(0x24, select);
        driver.set(0x20, u32::try_from(word).unwrap());
    }
}

#[test]
fn the_identity_is_that_of_a_virtio_1_device() {
    let (_, driver) = device();
    assert_eq!(driver.get(0).to_le_bytes(), *b"virt");
    assert_eq!(
        [4, 8, 0xb0, 0xbc, 0xfc].map(|at| driver.get(at)),
        [2, 42, u32::MAX, u32::MAX, 0]
    );
    driver.set(0x14, 1);
    assert_eq!(driver.get(0x10), 1, "VERSION_1");
    driver.set(0x14, 2);
    assert_eq!(driver.get(0x10), 0);
}

#[test]
fn a_ready_driver_has_a_device_with_the_features_it_took_and_every_queue_notified_once() {
    let (notes, mut driver) = device();
    driver.set_up(F_EVENT_IDX);
    assert_eq!(driver.get(STATUS), READY);
    driver.turn(100);
    let notes = notes.lock().unwrap();
    assert_eq!(notes.active.as_ref().unwrap().features, F_VERSION_1 | F_EVENT_IDX);
    assert_eq!(notes.notified, [0, 1]);
}

#[test]
fn features_that_were_not_offered_or_a_device_of_before_1_0_are_not_to_be_had() {
    for features in [F_VERSION_1 | 2, 1, 0, F_VERSION_1 | 1 << 63] {
        let (_, driver) = device();
        driver.set(STATUS, 1);
        driver.set(STATUS, 3);
        take(&driver, features);
        driver.set(STATUS, 11);
        assert_eq!(driver.get(STATUS), 3, "{features:#x}");
    }
}

#[test]
fn a_step_that_is_left_out_or_taken_back_is_not_taken() {
    let (notes, driver) = device();
    for status in [2, 3, 4, 8, 15, 5, 9] {
        driver.set(STATUS, status);
        assert_eq!(driver.get(STATUS), 0, "{status}");
    }
    driver.set(STATUS, 1);
    driver.set(STATUS, 15);
    driver.set(STATUS, 2);
    assert_eq!(driver.get(STATUS), 1);
    driver.set(STATUS, 129);
    assert_eq!(driver.get(STATUS), 129, "the driver gave up");
    assert!(notes.lock().unwrap().active.is_none());
}

#[test]
fn features_are_fixed_when_they_are_taken_and_queues_when_the_driver_is_ready() {
    let (notes, mut driver) = device();
    driver.set_up(0);
    take(&driver, F_VERSION_1 | 1);
    driver.set(0x30, 0);
    driver.set(0x44, 0);
    driver.set(0x38, 2);
    assert_eq!(driver.get(0x44), 1);
    driver.set(STATUS, READY);
    let notes = notes.lock().unwrap();
    let active = notes.active.as_ref().unwrap();
    assert_eq!((active.features, active.queues[0].size()), (F_VERSION_1, 256));
}

#[test]
fn queues_that_are_not_in_memory_make_a_device_that_needs_a_reset() {
    for register in [0x80, 0x90, 0xa0] {
        let (notes, mut driver) = device();
        driver.set_up(0);
        driver.set(STATUS, 0);
        for status in [1, 3] {
            driver.set(STATUS, status);
        }
        take(&driver, F_VERSION_1);
        driver.set(STATUS, 11);
        driver.set(0x30, 1);
        driver.set(0x38, 16);
        driver.set(register + 4, 0xffff_ffff);
        driver.set(0x44, 1);
        driver.set(STATUS, READY);
        assert_eq!(driver.get(STATUS), READY | NEEDS_RESET, "{register:#x}");
        assert!(notes.lock().unwrap().active.is_none() && driver.interrupted());
        driver.set_up(0);
        assert_eq!(driver.get(STATUS), READY);
    }
}

#[test]
fn a_reset_takes_everything_back() {
    let (notes, mut driver) = device();
    driver.set_up(u64::MAX);
    driver.turn(100);
    driver.transport.interrupt().signal_used();
    assert_eq!(driver.get(0x60), 1);
    driver.set(STATUS, 0);
    assert_eq!((driver.get(STATUS), driver.get(0x60), driver.get(0x44)), (0, 0, 0));
    assert!(notes.lock().unwrap().active.is_none());
}

#[test]
fn a_device_whose_driver_broke_the_rules_is_reset_and_says_that_it_needs_one() {
    let (notes, mut driver) = device();
    driver.set_up(0);
    driver.turn(100);
    let events = driver.transport.event_count();
    notes.lock().unwrap().broken = true;
    driver.notify(1);
    driver.turn(100);
    assert_eq!(driver.transport.event_count(), events + 1);
    assert_eq!((driver.get(STATUS), driver.get(0x60)), (READY | NEEDS_RESET, 2));
    assert!(notes.lock().unwrap().active.is_none());
    driver.set(STATUS, 0);
    assert!(!driver.needs_reset());
}

#[test]
fn an_interrupt_is_acknowledged_by_its_bits() {
    let (_, driver) = device();
    let interrupt = driver.transport.interrupt();
    interrupt.signal_used();
    interrupt.signal_config();
    assert_eq!((driver.get(0x60), driver.get(0xfc)), (3, 1));
    driver.set(0x64, 1);
    assert_eq!(driver.get(0x60), 2);
    driver.set(0x64, 2);
    assert_eq!((driver.get(0x60), driver.interrupted()), (0, true));
}

#[test]
fn registers_are_32_bits_wide_and_the_configuration_space_is_not() {
    let (notes, driver) = device();
    for width in [1, 2, 8] {
        let mut data = vec![0xff; width];
        driver.transport.read(0, &mut data);
        assert_eq!(data, vec![0xff; width]);
        driver.transport.write(STATUS, &vec![1; width]);
        assert_eq!(driver.get(STATUS), 0);
    }
    assert_eq!(
        (driver.config(0), driver.config(4), driver.config(0xeff)),
        (*b"co", *b"ig\0\0", [0])
    );
    driver.transport.write(0x103, &[1, 2]);
    assert_eq!(notes.lock().unwrap().config, [(3, vec![1, 2])]);
}

#[test]
fn a_queue_that_is_not_there_has_no_registers() {
    let (_, driver) = device();
    for (queue, size) in [(0, 256), (1, 64), (2, 0), (u32::MAX, 0)] {
        driver.set(0x30, queue);
        assert_eq!(driver.get(0x34), size, "{queue}");
    }
    driver.set(0x44, 1);
    assert_eq!(driver.get(0x44), 0);
}
