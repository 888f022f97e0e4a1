//! `/dev/kvm` with flat guests: what a vCPU is charged, against what its guest measured itself.
//!
//! These want neither a nohz_full CPU nor a quiet machine: each expects of a reading what holds on any host, however
//! busy. Where the host has a nohz_full CPU the guests run there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{scope, sleep};
use std::time::Duration;

use accounting::host::HostCpus;
use accounting::reading::{Reading, Source, VcpuState};
use accounting::{Account, Gtime, laws};
use tests::flat::{Event, Guest, Machine, Program, Report};
use tests::over::SetWhenDropped;
use tests::require_bed;
use tests::vm::PATIENCE;
use vcpu::{ExitHandler, Vcpu, VcpuConfig, VcpuEnd};

const MS: u64 = 1_000_000;

/// A reading pairs its two clocks within this: the figures of two readings compare to twice as much.
const CLOCKS_NS: u64 = 300;

/// What one guest spun by its own TSC, and what it was charged meanwhile.
struct Spun {
    /// By the guest's TSC.
    ns: u64,
    /// The exit before and the one after, and what entering and leaving took: by the host's TSC.
    exits_ns: u64,
    before: Reading,
    after: Reading,
}

/// Each by a guest of its own, that nobody else reads: what is published is then what is known, with nothing of an
/// earlier reading to be put right.
fn spin(ns: u64) -> Spun {
    let tsc_khz = u64::from(Guest::new(&Program::spin_forever(), None).expect("a guest").tsc_khz);
    let guest = Guest::running(&Program::spin_for(ns * tsc_khz / MS, 1));
    let report = report(&guest);
    let ready = report.ready.expect("the guest said when it began");
    assert_eq!(laws::check_pair(&ready.reading, &report.told.reading), Ok(()));
    let exits = report.told.tsc - ready.tsc - report.value;
    let [ns, exits_ns] = [report.value, exits].map(|ticks| ticks * MS / tsc_khz);
    Spun {
        ns,
        exits_ns,
        before: ready.reading,
        after: report.told.reading,
    }
}

fn report(guest: &Guest) -> Report {
    match guest.next() {
        Event::Report(report) => *report,
        event => panic!("the guest reports, and not {event:?}"),
    }
}

#[test]
fn a_guest_that_spins_for_x_is_charged_at_least_x_and_at_most_its_exits_more() {
    require_bed!(kvm);
    for (x_ms, times) in [(1, 20), (3, 20), (10, 20), (30, 10), (100, 5), (300, 3), (1000, 3)] {
        let (mut excess_ns, mut exits_ns) = (vec![], vec![]);
        for _ in 0..times {
            let spun = spin(x_ms * MS);
            check_spun(&spun);
            excess_ns.push(spun.grown(|r| r.modes.guest_ns).saturating_sub(spun.ns));
            exits_ns.push(spun.exits_ns);
        }
        excess_ns.sort_unstable();
        exits_ns.sort_unstable();
        let (excess_ns, exits_ns) = (excess_ns[times / 2], exits_ns[times / 2]);
        println!("{x_ms:>5} ms: charged {excess_ns:>6} ns more, its exits took {exits_ns:>6} ns (medians of {times})");
    }
}

fn check_spun(spun: &Spun) {
    let Spun {
        ns,
        exits_ns,
        before,
        after,
    } = spun;
    // KVM tells the TSC's frequency in whole kHz, and within 0.5 ppm of the readings' clock: 1 ppm in all.
    let clocks_ns = ns / MS + 2 * CLOCKS_NS;
    // The guest's TSC counts on while the vCPU is preempted, and while the kernel works, inside of X. All of X is
    // inside KVM_RUN, so what was not guest time was one of these, and never the VMM's or a pause.
    let inside = spun.grown(|r| r.modes.waiting_ns + r.modes.blocked_ns + r.modes.halted_ns + r.modes.host_kernel_ns);
    let (least, most) = match after.source {
        Source::Oncpu => (spun.grown(|r| r.modes.guest_ns), spun.grown(|r| r.modes.guest_ns)),
        // The kernel's own figure is exact to its unflushed residue, some milliseconds: the bounds have to hold.
        Source::Vtime | Source::Bpf => {
            let (before, after) = (before.gtime_bounds_ns, after.gtime_bounds_ns);
            (after.lower.saturating_sub(before.upper), after.upper - before.lower)
        }
    };
    assert!(
        most + inside + clocks_ns >= *ns,
        "{ns} ns spun, {most} charged: {before:#?} {after:#?}"
    );
    let allowed = ns + exits_ns + clocks_ns;
    assert!(
        least <= allowed,
        "{ns} ns spun, exits of {exits_ns} ns, {least} charged: {before:#?} {after:#?}"
    );
}

impl Spun {
    fn grown(&self, figure: fn(&Reading) -> u64) -> u64 {
        figure(&self.after) - figure(&self.before)
    }
}

#[test]
fn a_reading_in_mid_run_advances_with_no_transition_at_all() {
    require_bed!(kvm);
    let guest = Guest::running(&Program::spin_forever());
    let first = await_state(&guest, VcpuState::Guest);
    sleep(Duration::from_millis(100));
    let second = guest.read();
    assert_eq!(laws::check_pair(&first, &second), Ok(()));
    assert_eq!((first.exits.total, second.exits.total), (0, 0));
    let grown = |figure: fn(&Reading) -> u64| figure(&second) - figure(&first);
    assert!(grown(|r| r.elapsed_ns) >= 100 * MS);
    assert!(grown(|r| r.modes.guest_ns) > 0);
    // The slice is the same one, so it grew by all of the time between, but for what the clocks' pairs differ.
    assert!(grown(|r| r.pending.delta_ns).abs_diff(grown(|r| r.elapsed_ns)) <= 2 * CLOCKS_NS);
}

#[test]
fn a_halted_guest_is_halted_while_it_sleeps_and_after() {
    require_bed!(kvm);
    let guest = Guest::running(&Program::halt());
    let first = await_state(&guest, VcpuState::Halted);
    sleep(Duration::from_millis(500));
    let asleep = guest.read();
    // KVM counts a halt when it ends. A kick ends it.
    guest.vcpu.pause();
    let awake = guest.read();
    for later in [&asleep, &awake] {
        assert_eq!(laws::check_pair(&first, later), Ok(()));
        let halted = later.modes.halted_ns - first.modes.halted_ns;
        let elapsed = asleep.elapsed_ns - first.elapsed_ns;
        assert!(halted * 100 >= elapsed * 95, "{halted} of {elapsed} ns: {later:#?}");
    }
}

#[test]
fn a_paused_guest_is_charged_nothing_but_the_pause() {
    require_bed!(kvm);
    let guest = Guest::running(&Program::spin_forever());
    await_state(&guest, VcpuState::Guest);
    for _ in 0..20 {
        guest.vcpu.pause();
        await_sleep(&guest);
        let first = guest.read();
        sleep(Duration::from_millis(10));
        let second = guest.read();
        assert_eq!((first.state, second.state), (VcpuState::Paused, VcpuState::Paused));
        let grown = |figure: fn(&Reading) -> u64| figure(&second) - figure(&first);
        let other = grown(|r| r.elapsed_ns) - grown(|r| r.modes.paused_ns);
        assert!(other <= 2 * CLOCKS_NS, "{first:#?} {second:#?}");
        assert_eq!(first.exits.total, second.exits.total);
        guest.vcpu.resume();
    }
}

#[test]
fn exits_are_counted_as_the_guest_counts_them() {
    require_bed!(kvm);
    let guest = Guest::running(&Program::exit_storm(5_000));
    let Report { value: count, told, .. } = report(&guest);
    let reading = told.reading;
    // The reading is made while the first exit of the report is handled: complete are those of the storm.
    assert_eq!((count, reading.exits.by_reason["io"].count), (5_000, 5_000));
    assert_eq!(reading.exits.total, 5_000);
    assert!(reading.exits.by_reason["io"].vmm_ns > 0);
    assert_eq!(guest.next(), Event::Done);
}

#[test]
fn no_kick_is_lost_in_a_thousand() {
    require_bed!(kvm);
    let guest = Guest::running(&Program::spin_forever());
    for i in 0..1_000 {
        // Sometimes on its way into the guest, sometimes long in it.
        sleep(Duration::from_micros(i % 7 * 20));
        guest.vcpu.pause();
        assert_eq!(guest.read().state, VcpuState::Paused);
        guest.vcpu.resume();
    }
}

#[test]
fn a_kick_reaches_a_guest_that_does_nothing_but_exit() {
    require_bed!(kvm);
    let guest = Guest::running(&Program::exit_storm(0));
    for _ in 0..1_000 {
        guest.vcpu.pause();
        let (first, second) = (guest.read(), guest.read());
        assert_eq!(
            (first.state, first.exits.total),
            (VcpuState::Paused, second.exits.total)
        );
        guest.vcpu.resume();
    }
}

#[test]
fn a_vcpu_stops_wherever_it_is_and_its_account_stands_still() {
    require_bed!(kvm);
    for (i, program) in (0..100).zip(
        [Program::spin_forever(), Program::exit_storm(0), Program::halt()]
            .iter()
            .cycle(),
    ) {
        let mut guest = Guest::running(program);
        sleep(Duration::from_micros(i * 20));
        guest.vcpu.stop();
        assert_eq!(guest.next(), Event::Ended(VcpuEnd::Stopped));
        let end = guest.read();
        assert_eq!((end.state, &end), (VcpuState::Exited, &guest.read()));
        // Told after its end, it has nothing to say; nobody hangs.
        guest.vcpu.pause();
        guest.vcpu.resume();
    }
}

#[test]
fn a_vcpu_never_resumed_stops_too_and_was_paused_all_its_life() {
    require_bed!(kvm);
    let mut guest = Guest::new(&Program::spin_forever(), None).expect("a guest");
    guest.vcpu.pause();
    guest.vcpu.stop();
    let end = guest.read();
    assert_eq!((end.exits.total, end.modes.guest_ns), (0, 0));
}

#[test]
fn every_reading_sums_and_none_steps_back_whatever_happens_to_the_guest() {
    require_bed!(kvm);
    for program in [
        Program::spin_forever(),
        Program::exit_storm(0),
        Program::halt(),
        Program::spin_for(100_000, 0),
    ] {
        let guest = Guest::running(&program);
        let over = AtomicBool::new(false);
        let account: &Account = guest.vcpu.account();
        let reader = || {
            let mut last = account.read();
            while !over.load(Ordering::Relaxed) {
                let reading = account.read();
                assert_eq!(laws::check_pair(&last, &reading), Ok(()), "{last:#?} {reading:#?}");
                last = reading;
            }
        };
        scope(|scope| {
            let _over = SetWhenDropped(&over);
            scope.spawn(reader);
            scope.spawn(reader);
            for i in 0..40 {
                sleep(Duration::from_millis(i % 5));
                guest.vcpu.pause();
                sleep(Duration::from_millis(i % 3));
                guest.vcpu.resume();
            }
        });
    }
}

#[test]
fn a_triple_fault_ends_the_vcpu_with_its_own_word() {
    require_bed!(kvm);
    let guest = Guest::running(&Program::triple_fault());
    assert_eq!(guest.next(), Event::Ended(VcpuEnd::TripleFault));
}

/// Sends each vCPU's end on; panics at a port exit, if it is to.
struct Ends {
    tell: Mutex<Sender<(u32, VcpuEnd)>>,
    panics: bool,
}

impl ExitHandler for Ends {
    fn io_read(&self, _: u16, _: &mut [u8]) {}
    fn io_write(&self, _: u16, _: &[u8]) {
        assert!(!self.panics, "a device of this test panics, as it should");
    }
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn ended(&self, index: u32, end: VcpuEnd) {
        self.tell
            .lock()
            .expect("whole")
            .send((index, end))
            .expect("the test listens");
    }
}

#[test]
fn thirty_two_vcpus_run_pause_and_stop_each_with_its_own_end() {
    require_bed!(kvm);
    let mut machine = Machine::new(&Program::spin_forever(), 32).expect("a machine");
    let (tell, ends) = channel();
    let handler = Arc::new(Ends {
        tell: Mutex::new(tell),
        panics: false,
    });
    let host = Arc::new(HostCpus::read().expect("sysfs"));
    let mut vcpus: Vec<Vcpu> = (0..)
        .zip(machine.vcpus.drain(..))
        .map(|(index, fd)| {
            let config = VcpuConfig {
                index,
                pin: None,
                host: host.clone(),
                gtime: Gtime::default(),
            };
            Vcpu::spawn(config, fd, handler.clone()).expect("a vCPU")
        })
        .collect();
    vcpus.iter().for_each(Vcpu::resume);
    vcpus.iter().for_each(Vcpu::pause);
    assert!(
        vcpus
            .iter()
            .all(|vcpu| vcpu.account().read().state == VcpuState::Paused)
    );
    vcpus.iter().for_each(Vcpu::resume);
    vcpus.iter_mut().for_each(Vcpu::stop);
    let mut ends: Vec<_> = ends.try_iter().collect();
    ends.sort_unstable_by_key(|(index, _)| *index);
    assert_eq!(ends, (0..32).map(|index| (index, VcpuEnd::Stopped)).collect::<Vec<_>>());
}

#[test]
fn a_device_that_panics_ends_its_vcpu_and_hangs_nobody() {
    require_bed!(kvm);
    let mut machine = Machine::new(&Program::exit_storm(0), 1).expect("a machine");
    let (tell, ends) = channel();
    let handler = Arc::new(Ends {
        tell: Mutex::new(tell),
        panics: true,
    });
    let config = VcpuConfig {
        index: 0,
        pin: None,
        host: Arc::new(HostCpus::read().expect("sysfs")),
        gtime: Gtime::default(),
    };
    let vcpu = Vcpu::spawn(config, machine.vcpus.remove(0), handler).expect("a vCPU");
    vcpu.resume();
    assert_eq!(ends.recv_timeout(PATIENCE), Ok((0, VcpuEnd::Panicked)));
    vcpu.pause();
    assert_eq!(vcpu.account().read().state, VcpuState::Exited);
}

#[test]
fn a_vcpu_that_cannot_be_pinned_says_where() {
    require_bed!(kvm);
    let mut machine = Machine::new(&Program::halt(), 1).expect("a machine");
    let (tell, _ends) = channel();
    let handler = Arc::new(Ends {
        tell: Mutex::new(tell),
        panics: false,
    });
    let config = VcpuConfig {
        index: 0,
        pin: Some(4096),
        host: Arc::new(HostCpus::default()),
        gtime: Gtime::default(),
    };
    let error = Vcpu::spawn(config, machine.vcpus.remove(0), handler).expect_err("there is no such CPU");
    assert!(
        error.to_string().starts_with("cannot pin vCPU 0 to host CPU 4096: "),
        "{error}"
    );
}

/// The first reading in `state`: an error of the guest, or of the host, if it takes long.
fn await_state(guest: &Guest, state: VcpuState) -> Reading {
    let begun = std::time::Instant::now();
    loop {
        let reading = guest.read();
        if reading.state == state {
            return reading;
        }
        assert!(begun.elapsed() < PATIENCE, "never {state:?}: {reading:#?}");
        sleep(Duration::from_micros(100));
    }
}

/// Waits until the vCPU's thread sleeps. One that is held has some instructions to go until then, and they cost CPU
/// time, which is not the pause's.
fn await_sleep(guest: &Guest) {
    let active_ns = || {
        let reading = guest.read();
        reading.elapsed_ns - reading.modes.paused_ns
    };
    let begun = std::time::Instant::now();
    loop {
        let before = active_ns();
        sleep(Duration::from_millis(2));
        if active_ns() - before <= 2 * CLOCKS_NS {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "the thread never sleeps");
    }
}
