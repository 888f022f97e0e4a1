//! ACPI's fixed hardware, as far as powering off and resetting need it: PM1a event and control registers, and the reset
//! register (ACPI 6.5, 4.8.3 and 4.8.3.6).
//!
//! No event is ever raised: there is no power button. The registers remember what is written, since the kernel reads back
//! what it enabled.

use std::sync::Mutex;

use super::Wish;
use crate::layout::{ACPI_RESET, PM_PORT, PM1A_CONTROL};

/// The SLP_TYP of S5, soft off: any three-bit value, as long as `\_S5` in the DSDT says the same.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What to write to the reset register.
pub const RESET_VALUE: u8 = 1;

/// PM1 control: the kernel, not the firmware, has the hardware. Always, since there is no firmware.
const SCI_EN: u16 = 1;
const SLP_TYP_SHIFT: u16 = 10;
const SLP_TYP_MASK: u16 = 7;
/// Write-only: go to sleep now.
const SLP_EN: u16 = 1 << 13;

const STATUS: u16 = 0;
const ENABLE: u16 = 2;
const CONTROL: u16 = PM1A_CONTROL - PM_PORT;
const RESET: u16 = ACPI_RESET - PM_PORT;

/// The device.
#[derive(Debug, Default)]
pub struct Pm(Mutex<Registers>);

#[derive(Debug, Default)]
struct Registers {
    enable: u16,
    control: u16,
}

impl Pm {
    /// Reads the register at `offset`. Registers have two bytes; the kernel's accesses are as wide.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let registers = self.0.lock().expect("no holder of this lock panics");
        let value = match offset {
            STATUS => 0,
            ENABLE => registers.enable,
            CONTROL => registers.control | SCI_EN,
            _ => return,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// Writes the register at `offset`.
    pub fn write(&self, offset: u16, data: &[u8]) -> Option<Wish> {
        if offset == RESET {
            return (data == [RESET_VALUE]).then_some(Wish::Reset);
        }
        let value = u16::from_le_bytes(data.try_into().ok()?);
        let mut registers = self.0.lock().expect("no holder of this lock panics");
        match offset {
            ENABLE => registers.enable = value,
            CONTROL => {
                registers.control = value & !SLP_EN;
                let sleep_type = (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK;
                if value & SLP_EN != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
                    return Some(Wish::PowerOff);
                }
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let pm = Pm::default();
        let control = |value: u16| pm.write(CONTROL, &value.to_le_bytes());
        // As Linux does it: first the type, then the type and the enable bit.
        assert_eq!(control(5 << 10), None);
        assert_eq!(control(1 << 13 | 5 << 10), Some(Wish::PowerOff));
        assert_eq!(control(1 << 13 | 1 << 10), None, "S1");
        assert_eq!(control(1 << 13), None);
    }

    #[test]
    fn registers_read_back_what_the_kernel_set() {
        let pm = Pm::default();
        let read = |offset| {
            let mut data = [0xff; 2];
            pm.read(offset, &mut data);
            u16::from_le_bytes(data)
        };
        assert_eq!((read(STATUS), read(CONTROL)), (0, SCI_EN));
        pm.write(ENABLE, &[0x21, 0x03]);
        assert_eq!(read(ENABLE), 0x321);
        pm.write(CONTROL, &(SLP_EN | 4 << 10).to_le_bytes());
        assert_eq!(read(CONTROL), SCI_EN | 4 << 10, "the enable bit reads as zero");
    }

    #[test]
    fn only_the_reset_value_resets() {
        let pm = Pm::default();
        assert_eq!(pm.write(RESET, &[0]), None);
        assert_eq!(pm.write(RESET, &[RESET_VALUE]), Some(Wish::Reset));
    }
}
