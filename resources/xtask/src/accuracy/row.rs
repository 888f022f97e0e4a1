//! One vCPU's run, and how far each figure is from the truth.

use serde::Deserialize;

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
    pub truth: Truth,
    pub proc: Proc,
    pub sources: Vec<Source>,
}

/// What the guest knows that it burned.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Truth {
    /// The least.
    pub burned_ns: u64,
    /// The most.
    pub most_ns: u64,
    /// What entering and leaving it took.
    pub exits_ns: u64,
    /// What KVM's tracepoints say.
    pub trace_ns: Option<u64>,
}

/// What the kernel says.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Proc {
    pub gtime_ns: u64,
    /// Of the CPU, by /proc/stat.
    pub cpu_charged_ns: u64,
}

/// What one source of a reading says.
#[derive(Clone, Debug, Deserialize)]
pub struct Source {
    pub source: String,
    pub point_ns: u64,
    pub lower_ns: u64,
    pub upper_ns: u64,
}

impl Truth {
    /// What the others are held against: the trace, or the middle of what the guest knows.
    pub fn reference_ns(&self) -> u64 {
        self.trace_ns.unwrap_or(u64::midpoint(self.burned_ns, self.most_ns))
    }

    /// How far `ns` is from the reference, in percent of that.
    #[expect(clippy::cast_precision_loss, reason = "seconds in nanoseconds, to be read by people")]
    pub fn error(&self, ns: u64) -> f64 {
        let truth = self.reference_ns().max(1) as f64;
        (ns as f64 - truth) / truth * 100.0
    }

    /// Whether the truth can be in `source`'s interval.
    ///
    /// Guest time, to the kernel and so to a reading, begins where KVM has decided to enter the guest and ends where it is
    /// back. The guest's own clock sees less: what is between its last instruction and there, and there and its first.
    pub fn inside(&self, source: &Source) -> bool {
        // Two clocks, each within a part in a million of the other, and some microseconds from the reading to the mark.
        let clocks = self.most_ns / 1_000_000 + 10_000;
        source.lower_ns <= self.most_ns + self.exits_ns + clocks && self.burned_ns <= source.upper_ns + clocks
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

    /// For the terminal.
    pub fn in_one_line(&self) -> String {
        let Measured { cpu, truth, proc, .. } = &self.measured;
        let mut line = format!(
            "CPU {cpu}  {:<24} {:>10} ms  /proc gtime {:>9}",
            self.name(),
            ms(truth.reference_ns()),
            percent(truth.error(proc.gtime_ns))
        );
        for source in &self.measured.sources {
            line += &format!("  {} {:>8}", source.source, percent(truth.error(source.point_ns)));
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
        burned_ns: 990_000_000,
        most_ns: 1_010_000_000,
        exits_ns: 5_000_000,
        trace_ns: None,
    };

    fn source(lower_ns: u64, upper_ns: u64) -> Source {
        Source {
            source: "vtime".to_owned(),
            point_ns: lower_ns,
            lower_ns,
            upper_ns,
        }
    }

    #[test]
    fn errors_are_percent_of_the_truth() {
        assert_eq!(percent(TRUTH.error(1_000_000_000)), "+0.00 %");
        assert_eq!(percent(TRUTH.error(0)), "-100 %");
        assert_eq!(percent(TRUTH.error(1_005_000_000)), "+0.50 %");
        assert_eq!(ms(1_234_567), "1.234");
    }

    #[test]
    fn the_truth_is_inside_unless_it_cannot_be() {
        assert!(TRUTH.inside(&source(1_000_000_000, 1_001_000_000)));
        assert!(TRUTH.inside(&source(1_014_000_000, 1_020_000_000)));
        assert!(!TRUTH.inside(&source(1_016_000_000, 1_020_000_000)));
        assert!(!TRUTH.inside(&source(0, 989_000_000)));
    }
}
