//! Figures as people read them: what `chronovisor times` and `chronovisor top` print.

use std::collections::BTreeMap;

use accounting::Reading;
use accounting::reading::{ExitTotals, Mode, Modes};

/// What a vCPU's figures grew by, from a reading to a later one; or from its first stamp.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grown {
    /// In nanoseconds, in the order of [`Modes::ALL`].
    modes: [u64; Modes::COUNT],
    /// How many exits ended.
    pub exits: u64,
    /// The exits by reason; those that did not occur are left out.
    pub by_reason: BTreeMap<String, ExitTotals>,
}

impl Grown {
    /// From `before`, or from the first stamp where there is none, to `now`.
    #[must_use]
    pub fn between(before: Option<&Reading>, now: &Reading) -> Self {
        let before_modes = before.map_or_else(Modes::default, |reading| reading.modes).to_array();
        let mut modes = now.modes.to_array();
        let grown = |(now, before): (&mut u64, u64)| *now = now.saturating_sub(before);
        modes.iter_mut().zip(before_modes).for_each(grown);
        let of_reason = |(reason, totals): (&String, &ExitTotals)| {
            let before = before.and_then(|reading| reading.exits.by_reason.get(reason));
            let before = before.copied().unwrap_or_default();
            let grown = ExitTotals {
                count: totals.count.saturating_sub(before.count),
                vmm_ns: totals.vmm_ns.saturating_sub(before.vmm_ns),
            };
            (grown.count > 0).then(|| (reason.clone(), grown))
        };
        Self {
            modes,
            exits: now
                .exits
                .total
                .saturating_sub(before.map_or(0, |reading| reading.exits.total)),
            by_reason: now.exits.by_reason.iter().filter_map(of_reason).collect(),
        }
    }

    /// Time that passed, in nanoseconds.
    #[must_use]
    pub fn elapsed_ns(&self) -> u64 {
        self.modes.iter().sum()
    }

    /// Time in one mode, in nanoseconds.
    #[must_use]
    pub fn mode_ns(&self, mode: Mode) -> u64 {
        self.modes[mode as usize]
    }

    /// The share of one mode, in per cent.
    #[must_use]
    pub fn percent(&self, mode: Mode) -> String {
        percent(self.mode_ns(mode), self.elapsed_ns())
    }
}

/// A variant's name in the API.
#[must_use]
pub fn name<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|name| name.as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// `part` of `all`, in per cent with one decimal.
#[must_use]
pub fn percent(part: u64, all: u64) -> String {
    if all == 0 {
        return "-".to_owned();
    }
    let tenths = (u128::from(part) * 1000 + u128::from(all) / 2) / u128::from(all);
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// Seconds with three decimals.
#[must_use]
pub fn seconds(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000_000, ns / 1_000_000 % 1000)
}

/// Three digits or so, in the unit that suits.
#[must_use]
pub fn short(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{}us", ns / 1_000),
        1_000_000..10_000_000_000 => format!("{}ms", ns / 1_000_000),
        _ => format!("{}s", ns / 1_000_000_000),
    }
}

/// How many a second: four digits or so, in the unit that suits.
#[must_use]
pub fn per_second(count: u64, ns: u64) -> String {
    if ns == 0 {
        return "-".to_owned();
    }
    let tenths = u128::from(count) * 10_000_000_000 / u128::from(ns);
    match tenths {
        0..1_000 => format!("{}.{}", tenths / 10, tenths % 10),
        1_000..1_000_000 => format!("{}", tenths / 10),
        1_000_000..1_000_000_000 => format!("{}k", tenths / 10_000),
        _ => format!("{}M", tenths / 10_000_000),
    }
}

/// How far guest time may be off: the wider side of its bounds, in nanoseconds.
#[must_use]
pub fn error_ns(reading: &Reading) -> u64 {
    let (gtime_ns, bounds) = (reading.gtime_ns, reading.gtime_bounds_ns);
    let above = bounds.upper.saturating_sub(gtime_ns);
    above.max(gtime_ns.saturating_sub(bounds.lower))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake;

    #[test]
    fn what_grew_is_told_by_mode_and_by_reason() {
        let mut first = fake::reading(0);
        let exits = |count, vmm_ns| ExitTotals { count, vmm_ns };
        first.exits.by_reason = BTreeMap::from([("hlt".to_owned(), exits(5, 50)), ("io".to_owned(), exits(7, 70))]);
        first.exits.total = 12;
        let mut second = first.clone();
        second.modes.guest_ns += 300;
        second.modes.waiting_ns += 100;
        second.exits.total += 4;
        second.exits.by_reason.insert("io".to_owned(), exits(10, 100));
        second.exits.by_reason.insert("mmio".to_owned(), exits(1, 1));
        let grown = Grown::between(Some(&first), &second);
        assert_eq!((grown.elapsed_ns(), grown.exits), (400, 4));
        assert_eq!(
            (&*grown.percent(Mode::Guest), &*grown.percent(Mode::Waiting)),
            ("75.0", "25.0")
        );
        let reasons = BTreeMap::from([("io".to_owned(), exits(3, 30)), ("mmio".to_owned(), exits(1, 1))]);
        assert_eq!(grown.by_reason, reasons);
        let all = Grown::between(None, &first);
        assert_eq!((all.elapsed_ns(), all.exits), (first.elapsed_ns, 12));
        // A reading that is no later one: another microVM's, at the same socket.
        assert_eq!(Grown::between(Some(&second), &first).elapsed_ns(), 0);
    }

    #[test]
    fn figures_are_cut_to_what_a_reader_needs() {
        assert_eq!(percent(1, 3), "33.3");
        assert_eq!(percent(u64::MAX, u64::MAX), "100.0");
        assert_eq!(seconds(12_345_678_901), "12.345");
        assert_eq!(
            [0, 999, 1_000, 12_000_000, 99_000_000_000].map(short),
            ["0ns", "999ns", "1us", "12ms", "99s"]
        );
        let rates = [0, 1, 99, 100, 99_999, 100_000, 99_999_999, 100_000_000];
        assert_eq!(
            rates.map(|count| per_second(count, 1_000_000_000)),
            ["0.0", "1.0", "99.0", "100", "99999", "100k", "99999k", "100M"]
        );
        assert_eq!(per_second(1, 2_000_000_000), "0.5");
        assert_eq!(per_second(1, 0), "-");
    }
}
