//! The keyboard controller: how a PC is reset (`reboot=k`, Linux's usual way) and how Ctrl-Alt-Del reaches the guest.
//!
//! As much of the i8042 as Linux's driver asks for, and a keyboard that answers its driver: the identification, and an
//! acknowledgement of everything else. No mouse. No translation: the controller comes up in untranslated mode, which Linux
//! then keeps, so that scan codes are those of set 2.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use super::Wish;

// Commands to the controller (IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller").
const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const ECHO_KEYBOARD: u8 = 0xd2;
const ECHO_AUX: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
const PULSE_RESET: u8 = 0xfe;

const SELF_TEST_PASSED: u8 = 0x55;
const TEST_PASSED: u8 = 0;
/// "Clock line stuck low": there is no mouse.
const TEST_FAILED: u8 = 1;

// Status register.
const OUTPUT_FULL: u8 = 1;
const SYSTEM_FLAG: u8 = 1 << 2;
const COMMAND_LAST: u8 = 1 << 3;
/// Clear means that the keyboard is locked by its key, of which the driver warns.
const KEYLOCK_OPEN: u8 = 1 << 4;

// Control register.
const CONTROL_INTERRUPT: u8 = 1;
const CONTROL_SYSTEM_FLAG: u8 = 1 << 2;
const CONTROL_KEYBOARD_OFF: u8 = 1 << 4;
const CONTROL_AUX_OFF: u8 = 1 << 5;

/// Output port: the line that resets the processor, active low; the address line 20.
const OUTPUT_PORT_IDLE: u8 = 0b11;

// Commands to the keyboard, and its answers.
const KEYBOARD_SET_LEDS: u8 = 0xed;
const KEYBOARD_ECHO: u8 = 0xee;
const KEYBOARD_SCAN_CODE_SET: u8 = 0xf0;
const KEYBOARD_IDENTIFY: u8 = 0xf2;
const KEYBOARD_SET_RATE: u8 = 0xf3;
const KEYBOARD_RESET: u8 = 0xff;
const ACKNOWLEDGE: u8 = 0xfa;
const SELF_TEST_OK: u8 = 0xaa;
/// An MF2 keyboard, untranslated.
const KEYBOARD_ID: [u8; 2] = [0xab, 0x83];

/// Ctrl, Alt, Del pressed, then released in the opposite order: set 2. A guest that ignores it is left without a stuck key.
const CTRL_ALT_DEL: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];

/// A keyboard's own buffer has 16 bytes.
const BUFFER: usize = 16;

/// The device.
#[derive(Debug)]
pub struct I8042 {
    state: Mutex<State>,
    interrupt: EventFd,
}

#[derive(Debug)]
struct State {
    control: u8,
    /// Whether the guest has set the controller up.
    driven: bool,
    output_port: u8,
    /// The command whose parameter the next byte to the data port is.
    pending: Option<u8>,
    /// The keyboard's command whose parameter the next byte to it is.
    keyboard_pending: Option<u8>,
    /// The last answer of the controller or of the keyboard to a command, as far as the guest has not read it. It comes before keys:
    /// whoever has given a command takes the next byte for its answer.
    answer: VecDeque<u8>,
    /// Keys that the guest has not read yet.
    keys: VecDeque<u8>,
    last_was_command: bool,
}

/// Why keys cannot be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest has not read the keys sent before: it has no keyboard driver, or it hangs")]
pub struct KeysUnread;

impl I8042 {
    /// A controller as after reset.
    ///
    /// # Errors
    /// There is no descriptor left for its interrupt.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                control: CONTROL_INTERRUPT | CONTROL_SYSTEM_FLAG | CONTROL_AUX_OFF,
                driven: false,
                output_port: OUTPUT_PORT_IDLE,
                pending: None,
                keyboard_pending: None,
                answer: VecDeque::new(),
                keys: VecDeque::with_capacity(BUFFER),
                last_was_command: false,
            }),
            interrupt: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// The interrupt line, for KVM.
    #[must_use]
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Presses and releases Ctrl-Alt-Del.
    ///
    /// # Errors
    /// [`KeysUnread`]: the buffer has no room for all of it.
    pub fn ctrl_alt_del(&self) -> Result<(), KeysUnread> {
        let mut state = self.state();
        if state.keys.len() + CTRL_ALT_DEL.len() > BUFFER {
            return Err(KeysUnread);
        }
        state.keys.extend(CTRL_ALT_DEL);
        self.interrupt_if_full(&state);
        Ok(())
    }

    /// Whether the guest has a driver that is told of keys: one that has set the controller up, and left its interrupt on.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        let state = self.state();
        state.driven && state.control & CONTROL_INTERRUPT != 0
    }

    /// The guest reads the data port.
    pub fn read_data(&self) -> u8 {
        let mut state = self.state();
        let answer = state.answer.pop_front();
        let byte = answer.or_else(|| state.keys.pop_front()).unwrap_or(0);
        // The next byte moves up: it has an interrupt of its own.
        self.interrupt_if_full(&state);
        byte
    }

    /// The guest reads the status port.
    pub fn read_status(&self) -> u8 {
        let state = self.state();
        let mut status = KEYLOCK_OPEN | (state.control & CONTROL_SYSTEM_FLAG & SYSTEM_FLAG);
        if state.is_full() {
            status |= OUTPUT_FULL;
        }
        if state.last_was_command {
            status |= COMMAND_LAST;
        }
        status
    }

    /// The guest writes the command port.
    pub fn write_command(&self, command: u8) -> Option<Wish> {
        let mut state = self.state();
        state.last_was_command = true;
        state.pending = None;
        match command {
            PULSE_RESET => return Some(Wish::Reset),
            READ_CONTROL => {
                let control = state.control;
                state.answer(&[control]);
            }
            READ_OUTPUT_PORT => {
                let port = state.output_port;
                state.answer(&[port]);
            }
            SELF_TEST => state.answer(&[SELF_TEST_PASSED]),
            TEST_KEYBOARD => state.answer(&[TEST_PASSED]),
            TEST_AUX => state.answer(&[TEST_FAILED]),
            DISABLE_KEYBOARD => state.control |= CONTROL_KEYBOARD_OFF,
            ENABLE_KEYBOARD => state.control &= !CONTROL_KEYBOARD_OFF,
            WRITE_CONTROL | WRITE_OUTPUT_PORT | ECHO_KEYBOARD | ECHO_AUX | WRITE_AUX => state.pending = Some(command),
            _ => {}
        }
        self.interrupt_if_full(&state);
        None
    }

    /// The guest writes the data port: a command's parameter, or a byte for the keyboard.
    pub fn write_data(&self, byte: u8) -> Option<Wish> {
        let mut state = self.state();
        state.last_was_command = false;
        match state.pending.take() {
            Some(WRITE_CONTROL) => (state.control, state.driven) = (byte, true),
            Some(WRITE_OUTPUT_PORT) => {
                state.output_port = byte;
                if byte & 1 == 0 {
                    return Some(Wish::Reset);
                }
            }
            // An echo for the mouse comes from the keyboard: how the driver learns that there is none.
            Some(ECHO_KEYBOARD | ECHO_AUX) => state.answer(&[byte]),
            Some(_) => {}
            None => state.keyboard(byte),
        }
        self.interrupt_if_full(&state);
        None
    }

    fn interrupt_if_full(&self, state: &State) {
        if state.is_full() && state.control & CONTROL_INTERRUPT != 0 {
            // Fails only where the counter is full, and then the interrupt is pending.
            let _ = self.interrupt.write(1);
        }
    }
}

impl State {
    /// Whether there is a byte to read.
    fn is_full(&self) -> bool {
        !self.answer.is_empty() || !self.keys.is_empty()
    }

    /// An answer replaces the last one, and no keys.
    fn answer(&mut self, bytes: &[u8]) {
        self.answer.clear();
        self.answer.extend(bytes);
    }

    fn keyboard(&mut self, byte: u8) {
        match (self.keyboard_pending.take(), byte) {
            // Which set? The second.
            (Some(KEYBOARD_SCAN_CODE_SET), 0) => self.answer(&[ACKNOWLEDGE, 2]),
            (Some(_), _) => self.answer(&[ACKNOWLEDGE]),
            (None, KEYBOARD_RESET) => self.answer(&[ACKNOWLEDGE, SELF_TEST_OK]),
            (None, KEYBOARD_ECHO) => self.answer(&[KEYBOARD_ECHO]),
            (None, KEYBOARD_IDENTIFY) => self.answer(&[ACKNOWLEDGE, KEYBOARD_ID[0], KEYBOARD_ID[1]]),
            (None, KEYBOARD_SET_LEDS | KEYBOARD_SET_RATE | KEYBOARD_SCAN_CODE_SET) => {
                self.keyboard_pending = Some(byte);
                self.answer(&[ACKNOWLEDGE]);
            }
            (None, _) => self.answer(&[ACKNOWLEDGE]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(device: &I8042) -> Vec<u8> {
        let full = || device.read_status() & OUTPUT_FULL != 0;
        std::iter::from_fn(|| full().then(|| device.read_data())).collect()
    }

    #[test]
    fn the_reset_line_has_two_ways_to_be_pulled() {
        let device = I8042::new().unwrap();
        assert_eq!(device.write_command(PULSE_RESET), Some(Wish::Reset));
        device.write_command(WRITE_OUTPUT_PORT);
        assert_eq!(device.write_data(0b11), None);
        device.write_command(WRITE_OUTPUT_PORT);
        assert_eq!(device.write_data(0b10), Some(Wish::Reset));
        assert_eq!(
            device.write_data(0xfe),
            None,
            "0xfe to the data port is for the keyboard"
        );
    }

    #[test]
    fn linux_finds_a_controller_in_order_and_no_mouse() {
        let device = I8042::new().unwrap();
        // i8042_controller_init: the control register reads back, untranslated, unlocked.
        device.write_command(READ_CONTROL);
        let control = answers(&device)[0];
        assert_eq!(control & 0x40, 0);
        assert_ne!(device.read_status() & KEYLOCK_OPEN, 0);
        device.write_command(WRITE_CONTROL);
        device.write_data(control & !CONTROL_INTERRUPT | CONTROL_KEYBOARD_OFF);
        device.write_command(READ_CONTROL);
        assert_eq!(answers(&device), [control & !CONTROL_INTERRUPT | CONTROL_KEYBOARD_OFF]);
        // i8042_controller_selftest, i8042_check_aux.
        device.write_command(SELF_TEST);
        assert_eq!(answers(&device), [SELF_TEST_PASSED]);
        device.write_command(ECHO_AUX);
        device.write_data(0x5a);
        assert_eq!(device.read_status() & 0x20, 0, "the echo is not the mouse's");
        answers(&device);
        device.write_command(TEST_AUX);
        assert_eq!(answers(&device), [TEST_FAILED]);
    }

    #[test]
    fn the_keyboard_answers_its_driver() {
        let device = I8042::new().unwrap();
        for (sent, answered) in [
            (&[KEYBOARD_IDENTIFY][..], &[0xfa, 0xab, 0x83][..]),
            (&[KEYBOARD_RESET], &[0xfa, 0xaa]),
            (&[KEYBOARD_ECHO], &[0xee]),
            (&[0xf4], &[0xfa]),
            (&[KEYBOARD_SET_LEDS, 0], &[0xfa, 0xfa]),
            (&[KEYBOARD_SCAN_CODE_SET, 0], &[0xfa, 0xfa, 2]),
        ] {
            let heard: Vec<u8> = sent
                .iter()
                .flat_map(|&byte| {
                    device.write_data(byte);
                    answers(&device)
                })
                .collect();
            assert_eq!(heard, answered, "{sent:x?}");
        }
    }

    #[test]
    fn ctrl_alt_del_comes_byte_by_byte_each_with_its_interrupt() {
        let device = I8042::new().unwrap();
        device.ctrl_alt_del().unwrap();
        for byte in CTRL_ALT_DEL {
            assert_eq!(device.interrupt().read().unwrap(), 1);
            assert_ne!(device.read_status() & OUTPUT_FULL, 0);
            assert_eq!(device.read_data(), byte);
        }
        assert_eq!(device.read_status() & OUTPUT_FULL, 0);
        assert!(device.interrupt().read().is_err(), "no interrupt without a byte");
    }

    #[test]
    fn keys_nobody_reads_are_refused_not_cut() {
        let device = I8042::new().unwrap();
        device.ctrl_alt_del().unwrap();
        assert_eq!(device.ctrl_alt_del(), Err(KeysUnread));
        assert_eq!(answers(&device), CTRL_ALT_DEL);
        assert_eq!(device.ctrl_alt_del(), Ok(()));
    }

    #[test]
    fn keys_wait_for_the_answer_to_a_command_and_are_not_lost_to_it() {
        // From no key read to all of them.
        for read in 0..=CTRL_ALT_DEL.len() {
            let device = I8042::new().unwrap();
            device.ctrl_alt_del().unwrap();
            let mut keys: Vec<u8> = (0..read).map(|_| device.read_data()).collect();
            for byte in [KEYBOARD_SET_LEDS, 2] {
                device.write_data(byte);
                assert!(device.interrupt().read().is_ok());
                assert_eq!(device.read_data(), ACKNOWLEDGE);
            }
            device.write_command(READ_CONTROL);
            device.write_command(SELF_TEST);
            assert_eq!(device.read_data(), SELF_TEST_PASSED, "the last answer alone");
            keys.extend(answers(&device));
            assert_eq!(keys, CTRL_ALT_DEL, "{read} read before");
        }
    }

    #[test]
    fn a_guest_that_polls_gets_no_interrupts() {
        let device = I8042::new().unwrap();
        device.write_command(WRITE_CONTROL);
        device.write_data(0);
        device.ctrl_alt_del().unwrap();
        assert!(device.interrupt().read().is_err());
        assert_eq!(answers(&device), CTRL_ALT_DEL);
    }
}
