//! The metrics of one microVM.
//!
//! Every metric of a vCPU but its histograms is taken from one [`Reading`], so that within one scrape the modes sum to the
//! elapsed time, utime is host_user and guest, and the guest time is within its bounds, to the nanosecond. The histograms are
//! of one instant too, some microseconds later.
//!
//! A vCPU has every series from its first scrape on, zeros included: a rate needs a first value, and a mode or an exit reason
//! that shows up later would lose its first increase. `chronovisor_host_cpu` is the exception, its labels being what it tells:
//! a vCPU that is moved, or is not pinned, leaves the series of one CPU for that of another.

use accounting::Reading;
use accounting::reading::{Bucket, Histogram, Histograms, Mode, Modes, Source, VcpuState};
use accounting::vtime::ExitReason;

use super::text::{Family, Kind, Label, Seconds, Text};

macro_rules! families {
    ($($(#[$doc:meta])* $constant:ident: $kind:ident $name:literal, $help:expr;)*) => {
        $($(#[$doc])* const $constant: Family = Family { name: $name, kind: Kind::$kind, help: $help };)*

        /// All of them, in the order in which they are written.
        pub const FAMILIES: &[Family] = &[$($constant),*];
    };
}

families! {
    BUILD: Gauge "chronovisor_build_info",
        "Which program runs the microVM; always 1.";
    VCPUS: Gauge "chronovisor_vcpus",
        "vCPUs that the microVM has; 0 before it is started.";
    ELAPSED: Counter "chronovisor_vcpu_elapsed_seconds_total",
        "Time since the vCPU thread's first stamp: exactly the sum of chronovisor_vcpu_seconds_total over its modes.";
    MODES: Counter "chronovisor_vcpu_seconds_total",
        "Where the vCPU's time went. The modes are disjoint, and sum to the time elapsed.";
    LOWER: Gauge "chronovisor_vcpu_guest_seconds_lower",
        "The true guest time is not less than this.";
    UPPER: Gauge "chronovisor_vcpu_guest_seconds_upper",
        "The true guest time is not more than this.";
    UTIME: Counter "chronovisor_vcpu_utime_seconds_total",
        "User time as Linux has it: modes host_user and guest. It contains gtime: never add the two.";
    STIME: Counter "chronovisor_vcpu_stime_seconds_total",
        "System time as Linux has it: mode host_kernel.";
    GTIME: Counter "chronovisor_vcpu_gtime_seconds_total",
        "Guest time as Linux has it: mode guest. It is contained in utime.";
    EXITS: Counter "chronovisor_vcpu_exits_total",
        "Completed exits from KVM_RUN, by reason.";
    EXIT_TIME: Counter "chronovisor_vcpu_exit_vmm_seconds_total",
        "Time the VMM took to handle exits, from leaving KVM_RUN to entering it again, by reason.";
    RUN: Histogram "chronovisor_vcpu_run_duration_seconds",
        "How long stays in KVM_RUN took, whatever the guest, the kernel and the scheduler did meanwhile.";
    VMM: Histogram "chronovisor_vcpu_vmm_duration_seconds",
        "How long the VMM's handling of exits took.";
    STATE: Gauge "chronovisor_vcpu_state",
        "1 for what the vCPU is doing, 0 for what it is not.";
    SOURCE: Gauge "chronovisor_vcpu_guest_source",
        "1 for what guest time is derived from, 0 for what it is not.";
    HOST_CPU: Gauge "chronovisor_host_cpu",
        "Where the vCPU is, and what that CPU is; always 1. tick_stopped is unknown where the host does not let us tell.";
}

/// One vCPU's figures.
#[derive(Clone, Debug)]
pub struct Vcpu {
    /// Its time.
    pub reading: Reading,
    /// Its histograms.
    pub histograms: Histograms,
}

/// The metrics of the microVM `id` that has these vCPUs: none before its start.
#[must_use]
pub fn write(id: &str, vcpus: &[Vcpu]) -> String {
    // A vCPU takes 11 KiB and the id some hundred and twenty times.
    let mut text = Text::with_capacity(1024 + vcpus.len() * (11 << 10) + vcpus.len() * 120 * id.len());
    let mut out = Writer { text: &mut text, id };
    out.text.family(&BUILD);
    let version = env!("CARGO_PKG_VERSION");
    let firecracker_api = crate::routes::FIRECRACKER_API;
    let labels: [Label; 3] = [
        ("id", &id),
        ("version", &version),
        ("firecracker_api", &firecracker_api),
    ];
    out.text.sample(BUILD.name, "", &labels, 1);
    out.text.family(&VCPUS);
    out.text.sample(VCPUS.name, "", &[("id", &id)], vcpus.len());
    if !vcpus.is_empty() {
        out.times(vcpus);
        out.exits(vcpus);
        out.what_it_does(vcpus);
    }
    text.finish()
}

struct Writer<'a> {
    text: &'a mut Text,
    id: &'a str,
}

impl Writer<'_> {
    /// A family with one sample a vCPU.
    fn one(&mut self, family: &Family, vcpus: &[Vcpu], ns: impl Fn(&Reading) -> u64) {
        self.text.family(family);
        for Vcpu { reading, .. } in vcpus {
            let labels: [Label; 2] = [("id", &self.id), ("vcpu", &reading.index)];
            self.text.sample(family.name, "", &labels, Seconds(ns(reading)));
        }
    }

    /// A family with a sample for each of `values`, told apart by `label`, and of each vCPU.
    fn each<'v, T: Copy + 'v, V: std::fmt::Display>(
        &mut self,
        family: &Family,
        vcpus: &[Vcpu],
        (label, values): (&str, &'v [T]),
        show: impl Fn(&Reading, T) -> (&'static str, V),
    ) {
        self.text.family(family);
        for Vcpu { reading, .. } in vcpus {
            for &value in values {
                let (name, shown) = show(reading, value);
                let labels: [Label; 3] = [("id", &self.id), ("vcpu", &reading.index), (label, &name)];
                self.text.sample(family.name, "", &labels, shown);
            }
        }
    }

    fn times(&mut self, vcpus: &[Vcpu]) {
        self.one(&ELAPSED, vcpus, |r| r.elapsed_ns);
        self.each(&MODES, vcpus, ("mode", &Modes::ALL), |r, mode| {
            (mode_name(mode), Seconds(r.modes.to_array()[mode as usize]))
        });
        self.one(&LOWER, vcpus, |r| r.gtime_bounds_ns.lower);
        self.one(&UPPER, vcpus, |r| r.gtime_bounds_ns.upper);
        self.one(&UTIME, vcpus, |r| r.utime_ns);
        self.one(&STIME, vcpus, |r| r.stime_ns);
        self.one(&GTIME, vcpus, |r| r.gtime_ns);
    }

    fn exits(&mut self, vcpus: &[Vcpu]) {
        let reasons = ("reason", &ExitReason::ALL[..]);
        let of = |r: &Reading, reason: ExitReason| r.exits.by_reason.get(reason.name()).copied().unwrap_or_default();
        self.each(&EXITS, vcpus, reasons, |r, reason| (reason.name(), of(r, reason).count));
        self.each(&EXIT_TIME, vcpus, reasons, |r, reason| {
            (reason.name(), Seconds(of(r, reason).vmm_ns))
        });
        self.histogram(&RUN, vcpus, |histograms| &histograms.run);
        self.histogram(&VMM, vcpus, |histograms| &histograms.vmm);
    }

    /// Ours count what is in each bucket; Prometheus's, what is in it and in all before it.
    fn histogram(&mut self, family: &Family, vcpus: &[Vcpu], of: impl Fn(&Histograms) -> &Histogram) {
        self.text.family(family);
        for Vcpu { reading, histograms } in vcpus {
            let Histogram { count, sum_ns, buckets } = of(histograms);
            let mut below = 0;
            for Bucket { le_ns, count } in buckets {
                below += count;
                // The last has no edge of its own: it is the +Inf below.
                if let Some(le_ns) = le_ns {
                    self.bucket(family, reading.index, &Seconds(*le_ns), below);
                }
            }
            self.bucket(family, reading.index, &"+Inf", below);
            let labels: [Label; 2] = [("id", &self.id), ("vcpu", &reading.index)];
            self.text.sample(family.name, "_sum", &labels, Seconds(*sum_ns));
            self.text.sample(family.name, "_count", &labels, count);
        }
    }

    fn bucket(&mut self, family: &Family, vcpu: u32, le: &dyn std::fmt::Display, below: u64) {
        let labels: [Label; 3] = [("id", &self.id), ("vcpu", &vcpu), ("le", le)];
        self.text.sample(family.name, "_bucket", &labels, below);
    }

    fn what_it_does(&mut self, vcpus: &[Vcpu]) {
        self.each(&STATE, vcpus, ("state", &STATES), |r, state| {
            (state_name(state), u8::from(r.state == state))
        });
        self.each(&SOURCE, vcpus, ("source", &Source::ALL), |r, source| {
            (source.name(), u8::from(r.source == source))
        });
        self.text.family(&HOST_CPU);
        for Vcpu { reading, .. } in vcpus {
            let host = reading.host_cpu;
            let tick_stopped = match host.tick_stopped {
                Some(true) => "true",
                Some(false) => "false",
                None => "unknown",
            };
            let labels: [Label; 6] = [
                ("id", &self.id),
                ("cpu", &host.cpu),
                ("vcpu", &reading.index),
                ("nohz_full", &host.nohz_full),
                ("isolated", &host.isolated),
                ("tick_stopped", &tick_stopped),
            ];
            self.text.sample(HOST_CPU.name, "", &labels, 1);
        }
    }
}

/// As in a reading's `pending.mode`.
fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Guest => "guest",
        Mode::HostUser => "host_user",
        Mode::HostKernel => "host_kernel",
        Mode::Halted => "halted",
        Mode::Waiting => "waiting",
        Mode::Blocked => "blocked",
        Mode::Paused => "paused",
    }
}

const STATES: [VcpuState; 7] = [
    VcpuState::Guest,
    VcpuState::Vmm,
    VcpuState::Halted,
    VcpuState::Waiting,
    VcpuState::Blocked,
    VcpuState::Paused,
    VcpuState::Exited,
];

/// As in a reading's `state`.
fn state_name(state: VcpuState) -> &'static str {
    match state {
        VcpuState::Guest => "guest",
        VcpuState::Vmm => "vmm",
        VcpuState::Halted => "halted",
        VcpuState::Waiting => "waiting",
        VcpuState::Blocked => "blocked",
        VcpuState::Paused => "paused",
        VcpuState::Exited => "exited",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use accounting::reading::{Bounds, ExitTotals, Exits};
    use accounting::vtime::BUCKETS;
    use proptest::prelude::*;

    use super::super::text::ns_of;
    use super::*;
    use crate::backend::fake;

    fn vcpu(reading: Reading) -> Vcpu {
        let mut run = [0; BUCKETS];
        (run[0], run[20], run[BUCKETS - 1]) = (2, 3, 4);
        let histograms = Histograms {
            index: reading.index,
            run: Histogram::new(&run, 300_000_000_001),
            vmm: Histogram::new(&[1; BUCKETS], 5),
        };
        Vcpu { reading, histograms }
    }

    fn with_exits(mut reading: Reading) -> Reading {
        let io = ExitTotals {
            count: 7,
            vmm_ns: 22_956_403,
        };
        reading.exits = Exits {
            total: 7,
            by_reason: BTreeMap::from([("io".to_owned(), io)]),
        };
        reading
    }

    #[test]
    fn the_text_is_this_one() {
        let text = write("vm-1", &[vcpu(with_exits(fake::reading(0)))]);
        let golden = include_str!("golden.txt").replace("VERSION", env!("CARGO_PKG_VERSION"));
        assert_eq!(text, golden, "\n{text}");
    }

    #[test]
    fn before_the_start_there_is_the_program_and_no_vcpu() {
        let text = write("a\"\\\n", &[]);
        let samples: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let version = env!("CARGO_PKG_VERSION");
        let build = format!(r#"chronovisor_build_info{{id="a\"\\\n",version="{version}",firecracker_api="1.14.0"}} 1"#);
        assert_eq!(samples, [build.as_str(), r#"chronovisor_vcpus{id="a\"\\\n"} 0"#]);
    }

    #[test]
    fn each_family_is_written_once_whole_and_in_its_order() {
        let vcpus = [0, 1].map(|index| vcpu(fake::reading(index)));
        let text = write("vm", &vcpus);
        let heads: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let expected: Vec<_> = FAMILIES
            .iter()
            .map(|family| format!("{} {}", family.name, family.kind.name()))
            .collect();
        assert_eq!(heads, expected);
        for family in FAMILIES {
            let safe = |c: char| c != '\\' && c != '\n';
            assert!(
                family.help.ends_with('.') && family.help.chars().all(safe),
                "{family:?}"
            );
        }
    }

    #[test]
    fn names_of_modes_and_states_are_those_of_a_reading() {
        let name = |value: serde_json::Value| value.as_str().unwrap().to_owned();
        for mode in Modes::ALL {
            assert_eq!(name(serde_json::to_value(mode).unwrap()), mode_name(mode));
        }
        for state in STATES {
            assert_eq!(name(serde_json::to_value(state).unwrap()), state_name(state));
        }
    }

    #[test]
    fn a_histograms_buckets_hold_all_below_their_edge() {
        let text = write("vm", &[vcpu(fake::reading(0))]);
        let values: Vec<u64> = text
            .lines()
            .filter(|line| line.starts_with("chronovisor_vcpu_run_duration_seconds_bucket"))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
            .collect();
        let mut expected = vec![2; 20];
        expected.extend([5; BUCKETS - 21]);
        expected.push(9);
        assert_eq!(values, expected);
        assert!(text.contains("_run_duration_seconds_count{id=\"vm\",vcpu=\"0\"} 9\n"));
    }

    #[test]
    fn the_longest_text_is_shorter_than_readers_take() {
        let mut reading = with_exits(fake::reading(0));
        reading.modes = Modes::from_array([u64::MAX; Modes::COUNT]);
        let vcpus = vec![vcpu(reading); usize::from(vmm::config::MAX_VCPUS)];
        let length = write(&"i".repeat(64), &vcpus).len();
        assert!(length < super::super::MAX_BYTES, "{length}");
    }

    proptest! {
        /// What is written, not what was given: read back from the text, the figures obey the laws of a reading.
        #[test]
        fn the_modes_sum_to_the_time_elapsed_to_the_nanosecond(
            modes in prop::array::uniform7(0..u64::MAX / 8),
            lower in 0..u64::MAX / 8, wide in 0..u64::MAX / 8,
        ) {
            let modes = Modes::from_array(modes);
            let mut reading = fake::reading(3);
            reading.elapsed_ns = modes.sum_ns();
            (reading.utime_ns, reading.stime_ns) = (modes.host_user_ns + modes.guest_ns, modes.host_kernel_ns);
            (reading.modes, reading.gtime_ns) = (modes, modes.guest_ns);
            reading.gtime_bounds_ns = Bounds { lower, upper: lower + wide };
            let text = write("vm", &[vcpu(reading)]);
            let of = |start: &str| -> Vec<u64> {
                let lines = text.lines().filter_map(|line| line.strip_prefix(start));
                lines.map(|line| ns_of(line.rsplit_once(' ').unwrap().1).unwrap()).collect()
            };
            let elapsed = of("chronovisor_vcpu_elapsed_seconds_total{")[0];
            let by_mode = of("chronovisor_vcpu_seconds_total{");
            prop_assert_eq!(by_mode.len(), Modes::COUNT);
            prop_assert_eq!(by_mode.iter().sum::<u64>(), elapsed);
            let user = of("chronovisor_vcpu_utime_seconds_total{")[0];
            prop_assert_eq!(user, by_mode[Mode::Guest as usize] + by_mode[Mode::HostUser as usize]);
            prop_assert_eq!(of("chronovisor_vcpu_guest_seconds_lower{")[0], lower);
            prop_assert_eq!(of("chronovisor_vcpu_guest_seconds_upper{")[0], lower + wide);
        }
    }
}
