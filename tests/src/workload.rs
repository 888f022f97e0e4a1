//! What readings are judged by: guests that burn a known time, each in its own way, and what they say of it.

use accounting::host::HostCpus;
use accounting::reading::{Bounds, Source};
use accounting::{Gtime, GtimeSource};
use anyhow::{Result, bail, ensure};

use crate::flat::{Between, Dodged, Event, Figure, Guest, Mark, Program, Report};
use crate::kernel::Kernel;
use crate::trace::Trace;
use crate::trace::kernel::{Recording, Stay, between, guest_ticks_until};

/// Guests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name.
    pub name: &'static str,
    /// How many guests of one vCPU run at a time, all on one host CPU.
    pub guests: u32,
    /// What each does before each of its slices.
    pub between: Between,
    /// How long a slice is.
    pub slice_us: u64,
    /// How many there are.
    pub slices: u64,
}

/// Spins for 2 s, without an exit.
pub const SPIN: Workload = Workload {
    name: "spin",
    guests: 1,
    between: Between::Nothing,
    slice_us: 20_000,
    slices: 100,
};

/// 40,000 exits, one after each 50 us.
pub const STORM: Workload = Workload {
    name: "exit storm",
    guests: 1,
    between: Between::Exit,
    slice_us: 50,
    slices: 40_000,
};

/// Sleeps for 7 ms and burns for 3 ms, by turns.
pub const SLEEPER: Workload = Workload {
    name: "timer sleeper",
    guests: 1,
    between: Between::Sleep(7_000),
    slice_us: 3_000,
    slices: 300,
};

/// Two that spin for 2 s each, and have to share a CPU.
pub const SHARED: Workload = Workload {
    name: "two on one CPU",
    guests: 2,
    ..SPIN
};

/// Sleeps across each tick of the host, and burns most of the 4 ms between, so that its exits are few for what it burns.
pub const DODGER: Workload = Workload {
    name: "tick dodger",
    guests: 1,
    between: Between::Dodge,
    slice_us: 3_400,
    slices: 300,
};

/// All of them.
pub const ALL: [Workload; 5] = [SPIN, STORM, SLEEPER, SHARED, DODGER];

/// A step between two reads of the TSC that is longer is not the guest's. An iteration takes 20 to 50 ns on a processor, and
/// up to a few microseconds in an emulator; an interrupt, with the exit and the entry around it, takes more.
const GAP_NS: u64 = 10_000;

/// What one guest burned, and what was said of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Burned {
    /// By the guest's TSC: what it burned for certain.
    pub burned_ns: u64,
    /// By the guest's TSC: what it may have burned or not, in steps longer than any of its own.
    pub lost_ns: u64,
    /// When it began: nothing was burned before.
    pub ready: Mark,
    /// When it had ended.
    pub told: Mark,
    /// Wall time in `KVM_RUN`, by the host's TSC, beyond the two: what entering and leaving the guest took.
    pub exits_ns: u64,
    /// What the kernel's tracer saw, where somebody asked it and it spoke.
    pub traced: Option<Traced>,
    /// How it dodged the host's ticks, if it did.
    pub dodged: Dodged,
}

/// Guest time since the guest was ready, in nanoseconds: not less than, not more than.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traced {
    /// Between KVM's tracepoints, where `bpf` stamps.
    pub kvm: Bounds,
    /// Between the turns of the kernel's own accounting, on a CPU where it stamps.
    pub kernel: Option<Bounds>,
}

impl Burned {
    /// What the kernel counted meanwhile.
    #[must_use]
    pub fn counted(&self, figure: fn(&Kernel) -> u64) -> u64 {
        figure(&self.told.kernel) - figure(&self.ready.kernel)
    }

    /// The most that it can have burned: with all that it lost, but no more than its thread was on a CPU.
    #[must_use]
    pub fn most_ns(&self) -> u64 {
        let on_cpu = self.counted(|kernel| kernel.sched_ns);
        (self.burned_ns + self.lost_ns).min(on_cpu).max(self.burned_ns)
    }

    /// What the guest itself says that it burned.
    #[must_use]
    pub fn own(&self) -> Bounds {
        Bounds {
            lower: self.burned_ns,
            upper: self.most_ns(),
        }
    }

    /// The true guest time that `source` is to tell: by stamps at that source's own turns where there are any, by KVM's
    /// where there are only those, else what the guest says.
    #[must_use]
    pub fn truth(&self, source: Source) -> Bounds {
        match (self.traced, source) {
            (None, _) => self.own(),
            (Some(traced), Source::Bpf) => traced.kvm,
            (Some(traced), Source::Vtime | Source::Oncpu) => traced.kernel.unwrap_or(traced.kvm),
        }
    }

    /// What each source says of the time since the guest was ready: of what it had burned before, a reading at that instant
    /// knows no more than its bounds.
    #[must_use]
    pub fn grown(&self) -> Vec<Figure> {
        let pairs = self.ready.figures.iter().zip(&self.told.figures);
        pairs
            .map(|(before, told)| {
                assert_eq!(before.source, told.source, "a source came or went: {self:#?}");
                Figure {
                    source: told.source,
                    point: told.point.saturating_sub(before.point),
                    lower: told.lower.saturating_sub(before.upper),
                    upper: told.upper - before.lower,
                }
            })
            .collect()
    }
}

/// The recordings of one run.
///
/// A tracepoint runs its probes in the order in which they were registered: one recording that is begun before the BPF
/// programs are attached, and one after, have their stamps between theirs.
#[derive(Default)]
struct Recordings {
    before: Option<Trace>,
    after: Option<Trace>,
    kernel: Option<Recording>,
}

impl Recordings {
    /// What was recorded from `ready` to `told`, of the thread whose marks they are. `None` where the tracepoints stay silent, as a software
    /// backend's do.
    fn of(&self, ready: &Mark, told: &Mark, tsc_khz: u64) -> Result<Option<Traced>> {
        let tid = told.reading.tid;
        let (Some(before), Some(after)) = (&self.before, &self.after) else {
            return Ok(None);
        };
        let kvm = between(&before.stop(tid)?, &after.stop(tid)?)?;
        if kvm.is_empty() {
            return Ok(None);
        }
        let grown = |stays: &[Stay]| -> Result<Bounds> {
            // Both are in the middle of an exit's handling: the thread is not in the guest.
            let [from, to] = [ready.tsc, told.tsc].map(|tsc| guest_ticks_until(stays, [tsc, tsc]));
            let (least, most) = (ns_of(to[0] - from[1], tsc_khz)?, ns_of(to[1] - from[0], tsc_khz)?);
            // A stamp of the programs is rounded down to a nanosecond, and 2 more a stay are the kernel's
            // (Documentation/core-api/timekeeping.rst, ktime_get_mono_fast_ns: not quite monotone at an update). KVM tells the
            // TSC's frequency in whole kHz, and within 0.5 ppm of the readings' clock.
            let clocks = 3 * stays.len() as u64 + most / 1_000_000 + 1_000;
            Ok(Bounds {
                lower: least.saturating_sub(clocks),
                upper: most + clocks,
            })
        };
        let kernel = match &self.kernel {
            Some(recording) => Some(grown(&recording.stop(tid)?)?),
            None => None,
        };
        Ok(Some(Traced {
            kvm: grown(&kvm)?,
            kernel,
        }))
    }
}

/// `ticks` in nanoseconds.
fn ns_of(ticks: u64, tsc_khz: u64) -> Result<u64> {
    Ok(u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(tsc_khz))?)
}

/// Runs the guests of `workload` at a time, each pinned to `cpu`, and gives what each says.
///
/// # Errors
/// What KVM refused, or a guest that does something else than it should.
pub fn run(workload: &Workload, cpu: u32) -> Result<Vec<Burned>> {
    run_guests(workload, cpu, false)
}

/// As [`run`], recorded by the kernel's tracer where that can be done: it costs each exit some more.
///
/// # Errors
/// As [`run`], and a recording that cannot be read.
pub fn run_traced(workload: &Workload, cpu: u32) -> Result<Vec<Burned>> {
    run_guests(workload, cpu, true)
}

fn run_guests(workload: &Workload, cpu: u32, traced: bool) -> Result<Vec<Burned>> {
    let tsc_khz = u64::from(Guest::new(&Program::spin_forever(), Some(cpu))?.tsc_khz);
    let ticks = |ns: u64| ns * tsc_khz / 1_000_000;
    let program = Program::burn(
        ticks(workload.slice_us * 1_000),
        workload.slices,
        workload.between,
        ticks(GAP_NS),
    );
    let mut recordings = Recordings::default();
    if traced {
        // Without root, or without tracefs, there is no trace, and that is that.
        recordings.before = Trace::start_for_children().ok();
    }
    let gtime = Gtime::prepare(GtimeSource::Auto);
    let guests = (0..workload.guests)
        .map(|_| Guest::by(&program, Some(cpu), gtime.clone()))
        .collect::<Result<Vec<_>>>()?;
    if recordings.before.is_some() {
        let tids: Vec<_> = guests.iter().map(|guest| guest.read().tid).collect();
        recordings.after = Some(Trace::start(&tids)?);
        if HostCpus::read()?.is_nohz_full(cpu) {
            recordings.kernel = Some(Recording::start(&tids)?);
        }
    }
    guests.iter().for_each(|guest| guest.vcpu.resume());
    let told = guests.iter().map(told).collect::<Result<Vec<_>>>()?;
    told.into_iter()
        .map(|[burned, lost]| {
            let Some(ready) = burned.ready else {
                bail!("a guest reported before it was ready")
            };
            Ok(Burned {
                burned_ns: ns_of(burned.value, tsc_khz)?,
                lost_ns: ns_of(lost.value, tsc_khz)?,
                exits_ns: ns_of(burned.in_run.saturating_sub(burned.value + lost.value), tsc_khz)?,
                traced: recordings.of(&ready, &burned.told, tsc_khz)?,
                ready,
                told: burned.told,
                dodged: burned.dodged,
            })
        })
        .collect()
}

/// What a guest reports: what it burned, and what it lost.
fn told(guest: &Guest) -> Result<[Report; 2]> {
    let report = || match guest.next() {
        Event::Report(report) => Ok(*report),
        event => bail!("a guest should have reported, but: {event:?}"),
    };
    let reports = [report()?, report()?];
    ensure!(guest.next() == Event::Done, "a guest that has reported is done");
    // It spins now, which is nobody's to measure.
    guest.vcpu.pause();
    Ok(reports)
}
