//! One vCPU's run, and how far each figure is from the truth.

use serde::Deserialize;

use crate::machine::version;

/// Where it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the emulated host.
    Emulated,
    /// On this machine.
    Here,
}

/// One run, and where.
#[derive(Clone, Debug)]
pub struct Row {
    pub place: Place,
    pub measured: Measured,
}

/// What the measuring program prints.
#[derive(Clone, Debug, Deserialize)]
pub struct Measured {
    pub kernel_release: String,
    pub cpu: u32,
    pub tickless: bool,
    pub workload: String,
    /// How many guests shared the CPU.
    pub guests: u32,
    pub vcpu: u32,
    pub guest: Guest,
    pub proc: Proc,
    pub sources: Vec<Source>,
}

/// What the guest knows that it burned.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Guest {
    /// The least.
    pub burned_ns: u64,
    /// The most.
    pub most_ns: u64,
    /// What entering and leaving it took.
    pub exits_ns: u64,
}

/// What is known to be true.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Truth {
    /// The least.
    pub lower_ns: u64,
    /// The most.
    pub upper_ns: u64,
}

/// What the kernel says.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Proc {
    /// What it is to tell.
    pub truth: Truth,
    pub gtime_ns: u64,
    /// Of the CPU, by /proc/stat.
    pub cpu_charged_ns: u64,
}

/// What one source of a reading says.
#[derive(Clone, Debug, Deserialize)]
pub struct Source {
    pub source: String,
    /// What it is to tell.
    pub truth: Truth,
    pub point_ns: u64,
    pub lower_ns: u64,
    pub upper_ns: u64,
}

/// One figure of a row, by whomever.
#[derive(Clone, Copy, Debug)]
pub struct Figure<'a> {
    /// Who says it: `proc`, `stat`, or a source's name.
    pub by: &'a str,
    pub ns: u64,
    /// What it is to tell; nothing where guests share what it is of.
    pub truth: Option<Truth>,
    /// The interval that is claimed to hold the truth, if one is.
    pub claim_ns: Option<[u64; 2]>,
}

impl Truth {
    /// How far `ns` is from the middle, in percent of that.
    #[expect(clippy::cast_precision_loss, reason = "seconds in nanoseconds, to be read by people")]
    pub fn error(&self, ns: u64) -> f64 {
        let middle = self.lower_ns.midpoint(self.upper_ns).max(1) as f64;
        (ns as f64 - middle) / middle * 100.0
    }

    /// Whether the truth may be in `[lower_ns, upper_ns]`.
    pub fn may_be_in(&self, [lower_ns, upper_ns]: [u64; 2]) -> bool {
        // What the guest says is by another clock, within a part in a million, and some microseconds from the reading.
        let clocks = self.upper_ns / 1_000_000 + 10_000;
        lower_ns <= self.upper_ns + clocks && self.lower_ns <= upper_ns + clocks
    }
}

impl Row {
    /// Where it ran, and how the kernel accounts there.
    pub fn place(&self) -> String {
        let Measured { cpu, tickless, .. } = &self.measured;
        let place = match self.place {
            Place::Emulated => "emulated host",
            Place::Here => "this machine",
        };
        let tick = if *tickless { "tickless" } else { "ticking" };
        format!("{place}, CPU {cpu}, {tick}")
    }

    /// The workload, and which of its guests.
    pub fn name(&self) -> String {
        let Measured {
            workload, guests, vcpu, ..
        } = &self.measured;
        if *guests > 1 {
            format!("{workload}, guest {}", vcpu + 1)
        } else {
            workload.clone()
        }
    }

    /// What everybody says, the kernel first.
    pub fn figures(&self) -> Vec<Figure<'_>> {
        let Measured {
            proc, sources, guests, ..
        } = &self.measured;
        let stat = Figure {
            by: "stat",
            ns: proc.cpu_charged_ns,
            truth: (*guests == 1).then_some(proc.truth),
            claim_ns: None,
        };
        let gtime = Figure {
            by: "proc",
            ns: proc.gtime_ns,
            truth: Some(proc.truth),
            claim_ns: None,
        };
        let ours = sources.iter().map(|source| Figure {
            by: &source.source,
            ns: source.point_ns,
            truth: Some(source.truth),
            claim_ns: Some([source.lower_ns, source.upper_ns]),
        });
        [gtime, stat].into_iter().chain(ours).collect()
    }

    /// The version of the kernel it ran on. That of the emulated host is a package of Debian's, named as a whole.
    pub fn kernel(&self) -> &str {
        match self.place {
            Place::Emulated => &self.measured.kernel_release,
            Place::Here => version(&self.measured.kernel_release),
        }
    }

    /// For the terminal.
    pub fn in_one_line(&self) -> String {
        let Guest { burned_ns, most_ns, .. } = self.measured.guest;
        let mut line = format!(
            "CPU {}  {:<24} {:>10} to {:>10} ms",
            self.measured.cpu,
            self.name(),
            ms(burned_ns),
            ms(most_ns)
        );
        for Figure { by, ns, truth, .. } in self.figures() {
            if let Some(truth) = truth {
                line += &format!("  {by} {:>8}", percent(truth.error(ns)));
            }
        }
        line
    }
}

/// Milliseconds, to the microsecond.
pub fn ms(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000, ns % 1_000_000 / 1_000)
}

/// An error, signed.
pub fn percent(error: f64) -> String {
    if error.abs() < 10.0 {
        format!("{error:+.2} %")
    } else {
        format!("{error:+.0} %")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRUTH: Truth = Truth {
        lower_ns: 990_000_000,
        upper_ns: 1_010_000_000,
    };

    #[test]
    fn errors_are_percent_of_the_truth() {
        assert_eq!(percent(TRUTH.error(1_000_000_000)), "+0.00 %");
        assert_eq!(percent(TRUTH.error(0)), "-100 %");
        assert_eq!(percent(TRUTH.error(1_005_000_000)), "+0.50 %");
        assert_eq!(ms(1_234_567), "1.234");
    }

    #[test]
    fn the_truth_may_be_inside_unless_it_cannot_be() {
        assert!(TRUTH.may_be_in([1_000_000_000, 1_001_000_000]));
        assert!(TRUTH.may_be_in([1_010_000_000, 1_020_000_000]));
        assert!(!TRUTH.may_be_in([1_012_000_000, 1_020_000_000]));
        assert!(!TRUTH.may_be_in([0, 989_000_000]));
    }
}
