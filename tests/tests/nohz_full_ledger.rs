//! The ledger on a tickless CPU, in the emulated `nohz_full` host: flat guests on the isolated CPU, read over the API, held
//! against what the kernel itself says.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use accounting::host::tick_ns;
use accounting::probe::parse_stat;
use accounting::reading::{Source, VcpuState};
use tests::flat::Program;
use tests::interrupts;
use tests::require_bed;
use tests::vm::Vm;

/// The isolated CPU: `nohz_full=1,2 isolcpus=1,2`.
const CPU: u32 = 1;

fn flat(program: &Program) -> Vm {
    Vm::flat(program, ["--pin", &CPU.to_string()])
}

#[test]
fn a_guest_that_spins_on_a_tickless_cpu_is_charged_as_guest_while_read_and_its_tick_stays_stopped() {
    require_bed!(nohz_full);
    let mut vm = flat(&Program::spin_forever());
    vm.wait_until("the guest spins", |vm| vm.reading().modes.guest_ns > 200_000_000);

    let stat = format!("/proc/{}/task/{}/stat", vm.process.id(), vm.reading().tid);
    let (ticks_before, begun, first) = (interrupts::count("LOC", CPU), Instant::now(), vm.reading());
    let mut last = first.clone();
    let mut readings = 0;
    while begun.elapsed() < Duration::from_secs(2) {
        last = vm.reading();
        let text = fs::read(&stat).expect("the thread is there");
        let after = vm.reading();
        readings += 2;
        assert_eq!((last.source, last.state), (Source::Vtime, VcpuState::Guest));
        // The kernel's figure is of an instant between the two readings. It is rounded down by up to 10 ms and may lack
        // a tick of 4 ms: 30 ms leave room for both, and for what the two readings' own bounds allow.
        let kernel = parse_stat(&text).expect("the kernel's text").guest_time_clk * 10_000_000;
        assert!(
            last.gtime_ns <= kernel + 30_000_000,
            "{} ns, the kernel's {kernel} ns",
            last.gtime_ns
        );
        assert!(
            kernel <= after.gtime_ns + 30_000_000,
            "{} ns, the kernel's {kernel} ns",
            after.gtime_ns
        );
        sleep(Duration::from_millis(10));
    }
    let seconds = begun.elapsed().as_secs_f64();
    let ticks = interrupts::count("LOC", CPU) - ticks_before;

    let hz = 1e9 / f64::from(u32::try_from(tick_ns()).expect("less than 4 s"));
    println!("{readings} readings in {seconds:.2} s; {ticks} local timer interrupts at {hz} Hz");
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let share = ticks as f64 / (hz * seconds);
    assert!(share < 0.02, "the tick ran: {ticks} interrupts");

    let guest = last.modes.guest_ns - first.modes.guest_ns;
    let on_cpu = last.utime_ns + last.stime_ns - first.utime_ns - first.stime_ns;
    println!("guest {guest} ns of {on_cpu} ns on the CPU");
    assert!(guest * 100 >= on_cpu * 98, "guest {guest} ns of {on_cpu} ns on the CPU");
    assert_eq!(last.exits.total, first.exits.total, "nothing took it out of the guest");
    assert_eq!(last.host_cpu.tick_stopped, Some(true), "{last:?}");
}

#[test]
fn a_guest_that_halts_is_charged_as_halted_while_it_halts() {
    require_bed!(nohz_full);
    let mut vm = flat(&Program::halt());
    vm.wait_until("the guest halts", |vm| vm.reading().state == VcpuState::Halted);
    let (begun, first) = (Instant::now(), vm.reading());
    let mut last = first.clone();
    while begun.elapsed() < Duration::from_secs(2) {
        last = vm.reading();
        sleep(Duration::from_millis(10));
    }
    let (halted, elapsed) = (
        last.modes.halted_ns - first.modes.halted_ns,
        last.elapsed_ns - first.elapsed_ns,
    );
    println!("halted {halted} ns of {elapsed} ns");
    assert!(
        halted * 100 >= elapsed * 95,
        "halted {halted} ns of {elapsed} ns: {last:?}"
    );
}

#[test]
fn a_guest_that_exits_all_the_time_never_makes_a_reading_step_back() {
    require_bed!(nohz_full);
    let mut vm = flat(&Program::exit_storm(u64::MAX));
    vm.wait_until("the guest exits", |vm| vm.reading().exits.total > 1_000);
    // Each is held against the one before by Vm::reading.
    let first = vm.reading();
    for _ in 0..500 {
        let _ = vm.reading();
    }
    let last = vm.reading();
    let exits = last.exits.by_reason["io"].count - first.exits.by_reason["io"].count;
    println!("{exits} exits in {} ns", last.elapsed_ns - first.elapsed_ns);
    assert!(exits > 0 && last.modes.host_user_ns > first.modes.host_user_ns);
}
