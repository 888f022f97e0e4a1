//! What readings are judged by: guests that burn a known time, each in its own way, and what they say of it.

use accounting::{Gtime, GtimeSource};
use anyhow::{Result, bail, ensure};

use crate::flat::{Between, Dodged, Event, Guest, Mark, Program, Report};
use crate::kernel::Kernel;
use crate::trace::{self, Trace};

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

/// Sleeps across each tick of the host, and burns three quarters of what is between.
pub const DODGER: Workload = Workload {
    name: "tick dodger",
    guests: 1,
    between: Between::Dodge,
    slice_us: 3_000,
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
    /// Guest time by KVM's tracepoints, stamped by the TSC, where somebody traced them.
    pub trace_ns: Option<u64>,
    /// How it dodged the host's ticks, if it did.
    pub dodged: Dodged,
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
}

/// Runs the guests of `workload` at a time, each pinned to `cpu`, and gives what each says.
///
/// # Errors
/// What KVM refused, or a guest that does something else than it should.
pub fn run(workload: &Workload, cpu: u32) -> Result<Vec<Burned>> {
    run_guests(workload, cpu, &|_| None)
}

/// As [`run`], with KVM's tracepoints recorded where that can be done: it costs each exit some more.
///
/// # Errors
/// As [`run`], and a recording that cannot be read.
pub fn run_traced(workload: &Workload, cpu: u32) -> Result<Vec<Burned>> {
    // Without root, or without tracefs, there is no trace, and that is that.
    run_guests(workload, cpu, &|tid| Trace::start(tid).ok())
}

fn run_guests(workload: &Workload, cpu: u32, trace: &dyn Fn(i32) -> Option<Trace>) -> Result<Vec<Burned>> {
    let tsc_khz = u64::from(Guest::new(&Program::spin_forever(), Some(cpu))?.tsc_khz);
    let ticks = |ns: u64| ns * tsc_khz / 1_000_000;
    let program = Program::burn(
        ticks(workload.slice_us * 1_000),
        workload.slices,
        workload.between,
        ticks(GAP_NS),
    );
    let gtime = Gtime::prepare(GtimeSource::Auto);
    let guests = (0..workload.guests)
        .map(|_| {
            let guest = Guest::by(&program, Some(cpu), gtime.clone())?;
            let trace = trace(guest.read().tid);
            Ok((guest, trace))
        })
        .collect::<Result<Vec<_>>>()?;
    guests.iter().for_each(|(guest, _)| guest.vcpu.resume());
    guests
        .into_iter()
        .map(|(guest, trace)| burned(&guest, trace, tsc_khz))
        .collect()
}

fn burned(guest: &Guest, trace: Option<Trace>, tsc_khz: u64) -> Result<Burned> {
    let report = || -> Result<Report> {
        match guest.next() {
            Event::Report(report) => Ok(*report),
            event => bail!("a guest should have reported, but: {event:?}"),
        }
    };
    let ns = |ticks: u64| u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(tsc_khz));
    let (burned, lost) = (report()?, report()?);
    ensure!(guest.next() == Event::Done, "a guest that has reported is done");
    // It spins now, which is nobody's to measure.
    guest.vcpu.pause();
    let traced = match trace {
        Some(trace) => truth_by_trace(&trace.stop()?, burned.told.tsc),
        None => None,
    };
    let Some(ready) = burned.ready else {
        bail!("a guest reported before it was ready")
    };
    Ok(Burned {
        burned_ns: ns(burned.value)?,
        lost_ns: ns(lost.value)?,
        exits_ns: ns(burned.in_run.saturating_sub(burned.value + lost.value))?,
        trace_ns: traced.map(ns).transpose()?,
        ready,
        told: burned.told,
        dodged: burned.dodged,
    })
}

/// Guest time until `told`, in TSC ticks. `None` where the tracepoints stay silent, as a software backend's do.
fn truth_by_trace(events: &[trace::Event], told: u64) -> Option<u64> {
    let guest = trace::guest_ticks_until(events, told);
    (guest > 0).then_some(guest)
}
