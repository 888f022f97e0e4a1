//! What spoils a tickless CPU, in the emulated `nohz_full` host: each disturbance is caused, and noticed; and noticing
//! disturbs nobody.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use accounting::disturbance::{Disturbance, Findings, Watch, of_process};
use accounting::host::{CpuSet, HostCpus, run_on, tick_ns};
use accounting::reading::Source;
use rustix::process::Pid;
use rustix::thread::sched_setaffinity;
use serde_json::Value;
use tests::flat::{Guest, Program};
use tests::interrupts;
use tests::over::SetWhenDropped;
use tests::require_bed;
use tests::vm::{PATIENCE, Process, Vm, after};

/// A tickless CPU, of 1 and 2.
const CPU: u32 = 1;

/// A guest of this process, watched from it.
struct Watched {
    guest: Guest,
    watch: Watch,
    cpu: u32,
}

impl Watched {
    fn spinning_on(cpu: u32) -> Self {
        let guest = Guest::new(&Program::spin_forever(), Some(cpu)).expect("a guest");
        guest.vcpu.resume();
        let host = Arc::new(HostCpus::read().expect("sysfs"));
        let watch = Watch::new(guest.read().tid, Some(cpu), host);
        Self { guest, watch, cpu }
    }

    fn look(&mut self) -> Findings {
        let reading = self.guest.read();
        let on_cpu_ns = reading.utime_ns + reading.stime_ns;
        let findings = self
            .watch
            .look_afresh(reading.at_ns, on_cpu_ns, self.cpu, reading.modes.waiting_ns);
        findings.clone()
    }

    /// Looks every 50 ticks until `found`: what was caused takes a while to show.
    fn look_until(&mut self, what: &str, found: impl Fn(&Findings) -> bool) -> Findings {
        let begun = Instant::now();
        loop {
            let findings = self.look();
            if found(&findings) {
                return findings;
            }
            assert!(begun.elapsed() < PATIENCE, "never found: {what}; {findings:?}");
            sleep(Duration::from_nanos(50 * tick_ns()));
        }
    }

    fn look_until_tickless(&mut self) {
        let tickless = |f: &Findings| f.tick_stopped == Some(true) && f.disturbances.is_empty();
        self.look_until("a stopped tick and no disturbance", tickless);
    }
}

fn kinds(disturbances: &[Disturbance]) -> Vec<&'static str> {
    disturbances.iter().map(Disturbance::kind).collect()
}

#[test]
fn a_stopped_tick_is_known_from_one_that_runs() {
    require_bed!(nohz_full);
    Watched::spinning_on(CPU).look_until_tickless();
    let mut ticking = Watched::spinning_on(0);
    assert_eq!(ticking.look().tick_stopped, Some(false));
}

#[test]
fn a_second_task_on_the_cpu_is_noticed_while_it_is_there() {
    require_bed!(nohz_full);
    let mut watched = Watched::spinning_on(CPU);
    watched.look_until_tickless();
    let done = AtomicBool::new(false);
    let findings = std::thread::scope(|scope| {
        scope.spawn(|| {
            run_on(&CpuSet::from([CPU])).expect("the CPU is there");
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let _done = SetWhenDropped(&done);
        watched.look_until("the other task, and the tick", |f| {
            kinds(&f.disturbances).contains(&"second_task") && f.tick_stopped == Some(false)
        })
    });
    println!("{}", findings.disturbances[0]);
    assert!(
        !findings.vtime_void,
        "the kernel's accounting is as exact with the tick"
    );
    watched.look_until_tickless();
}

#[test]
fn a_cpu_timer_of_the_process_is_noticed_while_it_is_armed() {
    require_bed!(nohz_full);
    let mut watched = Watched::spinning_on(CPU);
    watched.look_until_tickless();
    let timer = CpuTimer::armed(libc::CLOCK_PROCESS_CPUTIME_ID);
    let findings = watched.look_until("the timer, and the tick", |f| {
        kinds(&f.disturbances) == ["cpu_timer"] && f.tick_stopped == Some(false)
    });
    println!("{}", findings.disturbances[0]);
    drop(timer);
    assert_eq!(of_process(), []);
    watched.look_until_tickless();
}

/// A timer on a CPU clock that does not expire while any test lasts.
struct CpuTimer(libc::timer_t);

#[expect(unsafe_code, reason = "rustix has no POSIX timers")]
impl CpuTimer {
    fn armed(clock: libc::clockid_t) -> Self {
        let mut timer = std::ptr::null_mut();
        // SAFETY: an all-zero sigevent is one; SIGEV_NONE uses no other field.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_NONE;
        // SAFETY: both pointers are to locals, which the kernel reads and writes.
        let made = unsafe { libc::timer_create(clock, &raw mut event, &raw mut timer) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        let never = libc::timespec {
            tv_sec: 1_000_000,
            tv_nsec: 0,
        };
        let time = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: never,
        };
        // SAFETY: the timer was made above; the pointer is to a local.
        let set = unsafe { libc::timer_settime(timer, 0, &raw const time, std::ptr::null_mut()) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        Self(timer)
    }
}

#[expect(unsafe_code, reason = "rustix has no POSIX timers")]
impl Drop for CpuTimer {
    fn drop(&mut self) {
        // SAFETY: made in `armed`, and deleted nowhere else.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Moves a thread of any process.
fn move_to(tid: i32, cpu: u32) {
    let mut mask = rustix::thread::CpuSet::new();
    mask.set(cpu as usize);
    sched_setaffinity(Pid::from_raw(tid), &mask).expect("root may");
}

#[test]
fn a_vcpu_moved_away_and_back_between_looks_has_lost_its_claim() {
    require_bed!(nohz_full);
    let mut watched = Watched::spinning_on(CPU);
    watched.look_until_tickless();
    let tid = watched.guest.read().tid;
    for cpu in [0, CPU] {
        move_to(tid, cpu);
        sleep(Duration::from_nanos(2 * tick_ns()));
    }
    let findings = watched.look();
    assert!(findings.vtime_void, "{findings:?}");
    assert_eq!(kinds(&findings.disturbances), ["moved_affinity"]);
}

/// The kinds in `GET /host`, and the lines that explain them.
fn disturbances(vm: &Vm) -> (Vec<String>, String) {
    let host = vm.ask("GET", "/host", None).body;
    let found = host["disturbances"].as_array().expect("a list");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    (
        found.iter().map(|d| text(&d["kind"])).collect(),
        found.iter().map(|d| text(&d["says"]) + "\n").collect(),
    )
}

/// Asks until the tick is stopped and nothing disturbs it: while a microVM starts, the kernel's own threads still run beside it.
fn await_quiet(vm: &mut Vm) {
    vm.wait_until("the tick is seen to be stopped, and nothing that disturbs it", |vm| {
        vm.reading().host_cpu.tick_stopped == Some(true) && disturbances(vm).0.is_empty()
    });
}

/// Asks until `kind` is there.
fn await_disturbance(vm: &Vm, kind: &str) -> String {
    let begun = Instant::now();
    loop {
        let (kinds, lines) = disturbances(vm);
        if kinds.iter().any(|k| k == kind) {
            print!("{lines}");
            return lines;
        }
        assert!(begun.elapsed() < PATIENCE, "{kind} never came: {kinds:?} {lines}");
    }
}

/// What `chronovisor check` says of the microVM.
fn check(vm: &Vm, flags: &[&str]) -> String {
    let socket = vm.socket().display().to_string();
    let arguments = ["check", "--api-sock", &socket];
    let (status, stdout, stderr) = Process::chronovisor(arguments.iter().chain(flags)).wait();
    assert_eq!((status.code(), &*stderr), (Some(0), ""), "{stdout}");
    stdout
}

#[test]
fn what_disturbs_a_microvm_is_named_by_check_from_its_socket() {
    require_bed!(nohz_full);
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin", "1"]);
    // A thread of the kernel's may come by at any time, and is named then.
    vm.wait_until("check says that nothing disturbs it", |vm| {
        let alone = check(vm, &[]);
        alone.contains("nothing disturbs it") && !alone.contains("warning")
    });
    let done = AtomicBool::new(false);
    let named = std::thread::scope(|scope| {
        scope.spawn(|| {
            run_on(&CpuSet::from([CPU])).expect("the CPU is there");
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let _done = SetWhenDropped(&done);
        await_disturbance(&vm, "second_task");
        check(&vm, &["--json"])
    });
    let named: Value = serde_json::from_str(&named).expect("JSON");
    let findings = named["findings"].as_array().expect("a list");
    let neighbour = findings.iter().find(|finding| finding["what"] == "neighbour");
    let neighbour = neighbour.unwrap_or_else(|| panic!("{named}"));
    assert_eq!(neighbour["verdict"], "warning");
    let says = neighbour["says"].as_str().expect("a line");
    assert!(says.starts_with("vCPU 0: another task runs on CPU 1"), "{says}");
}

#[test]
fn to_ask_for_the_host_disturbs_no_vcpu() {
    require_bed!(nohz_full);
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin", "1"]);
    await_quiet(&mut vm);
    let calls = || interrupts::count("CAL", CPU) + interrupts::count("TLB", CPU);
    // The first asks for what is read once.
    for what in ["first", "second"] {
        let before = calls();
        let host = vm.ask("GET", "/host", None).body;
        let calls = calls() - before;
        println!("{what}: {calls} function calls on CPU {CPU}");
        // A trial guest in the vCPU's process sent it 10 here, and BPF programs that are attached and detached 62. The
        // kernel's own business may send one or two.
        assert!(calls < 5, "{what}: {calls}");
        assert_eq!(host["kvm"]["runs_stock_kernels"], true, "{host}");
    }
}

#[test]
fn a_tick_that_runs_for_a_reason_that_cannot_be_seen_is_seen_itself() {
    require_bed!(nohz_full);
    let vm = Vm::flat(&Program::spin_forever(), ["--pin", "1"]);
    let pid = i32::try_from(vm.process.id()).expect("a process id");
    // MAKE_PROCESS_CPUCLOCK (include/linux/posix-timers.h), SCHED: the timer is this process's, and the tick is the other's.
    let timer = CpuTimer::armed(!pid << 3 | 2);
    let lines = await_disturbance(&vm, "tick_runs");
    assert!(lines.contains("the tick of CPU 1 runs"), "{lines}");
    drop(timer);
}

#[test]
fn a_vcpu_moved_from_outside_is_named_over_the_api_and_its_readings_claim_less() {
    require_bed!(nohz_full);
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin", "1"]);
    await_quiet(&mut vm);
    assert_eq!(vm.reading().source, Source::Vtime);
    let tid = vm.reading().tid;
    move_to(tid, 0);
    let lines = await_disturbance(&vm, "moved_affinity");
    assert!(lines.contains(&format!("thread {tid}, pinned to CPU 1")), "{lines}");
    // Each reading is held to the laws against the one before: none steps back when the source gives way.
    let moved = vm.reading();
    assert_eq!(
        (moved.source, moved.host_cpu.tick_stopped),
        (Source::Oncpu, Some(false))
    );
    let later = vm.reading();
    assert_eq!(
        later.gtime_bounds_ns.lower, moved.gtime_bounds_ns.lower,
        "nothing more is proved"
    );
    let check = check(&vm, &[]);
    let line = format!("warning affinity   vCPU 0: thread {tid}, pinned to CPU 1, was moved from outside to CPUs 0");
    assert!(
        check.contains(&line) && check.contains("start the microVM again"),
        "{check}"
    );
    let explained = vm.ask("GET", "/vcpus/0/cputime?explain=1", None).body;
    let why = explained["explain"]["sources"][1]["unavailable"].as_str();
    assert_eq!(why, Some("the vCPU thread has been moved off CPU 1"), "{explained}");
}

#[test]
fn a_limit_on_cpu_time_is_named_by_check_and_over_the_api() {
    require_bed!(nohz_full);
    let limit = "ulimit -t 100000";
    let vm = Vm::flat_after(limit, &Program::spin_forever(), ["--pin", "1"]);
    let lines = await_disturbance(&vm, "rlimit_cpu");
    assert!(lines.contains("100000 s (RLIMIT_CPU)"), "{lines}");
    let (_, check, _) = Process::spawn(after(limit, ["check"])).wait();
    assert!(
        check.contains("100000 s (RLIMIT_CPU)") && check.contains("ulimit -t unlimited"),
        "{check}"
    );
}

/// The unified hierarchy with one cgroup that has a quota: more than all CPUs can use, so that nobody is ever held back.
///
/// One that binds can hold up the host. On a CPU without a tick a task runs past its quota until the tick that another CPU
/// keeps for it, once a second (`sched_tick_remote`), and is then off its CPU until the excess is paid back: here for 1.5 s at a
/// time, with whatever it holds in the kernel, and not even SIGKILL ends it meanwhile.
struct Quota;

impl Quota {
    const MOUNT: &'static str = "/run/cgroup";
    /// CPU time, and the longest period there may be (Documentation/scheduler/sched-bwc.rst), in microseconds.
    const MAX: (u64, u64) = (1_000_000_000, 1_000_000);

    fn new() -> Self {
        use rustix::mount::{MountFlags, mount};
        fs::create_dir_all(Self::MOUNT).expect("a mount point");
        mount("none", Self::MOUNT, "cgroup2", MountFlags::empty(), None).expect("cgroup2");
        let write = |file: &str, text: &str| fs::write(format!("{}/{file}", Self::MOUNT), text).expect(file);
        write("cgroup.subtree_control", "+cpu");
        fs::create_dir_all(format!("{}/quota/inner", Self::MOUNT)).expect("cgroups");
        let (quota_us, period_us) = Self::MAX;
        write("quota/cpu.max", &format!("{quota_us} {period_us}"));
        Self
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        for cgroup in ["quota/inner", "quota"] {
            // The last process may still be on its way out: then the cgroup stays, and harms nobody.
            let _ = fs::remove_dir(format!("{}/{cgroup}", Self::MOUNT));
        }
        let _ = rustix::mount::unmount(Self::MOUNT, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_quota_on_a_cgroup_above_is_named_by_its_file() {
    require_bed!(nohz_full);
    tests::require_no_jail!("in there the file is below /sys/fs/cgroup: nohz_full_jail looks for it");
    let quota = Quota::new();
    let enter = "echo $$ > /run/cgroup/quota/inner/cgroup.procs";
    let mut vm = Vm::flat_after(enter, &Program::spin_forever(), ["--pin", "1"]);
    let lines = await_disturbance(&vm, "cfs_quota");
    assert!(
        lines.contains("/run/cgroup/quota/cpu.max allows 1000000000 us of CPU time in 1000000 us"),
        "{lines}"
    );
    let stat = fs::read_to_string("/run/cgroup/quota/cpu.stat").expect("the controller is on");
    assert!(stat.contains("\nnr_throttled 0\n"), "nobody was held back: {stat}");
    vm.process.signal(rustix::process::Signal::TERM);
    vm.process.wait();
    drop(quota);
}

#[test]
fn a_guest_with_a_timer_of_its_own_is_not_taken_for_a_tick() {
    require_bed!(nohz_full);
    let mut vm = Vm::debian("spin:60000", ["--pin", "1"]);
    vm.process.wait_for("chronovisor guest: spin");
    let (before, begun) = (interrupts::count("LOC", CPU), Instant::now());
    let timers = || interrupts::count("LOC", CPU) - before;
    // An emulated CPU that is kept waiting is sent none for a while.
    while begun.elapsed() < Duration::from_secs(2) || timers() == 0 {
        let (kinds, lines) = disturbances(&vm);
        assert!(!kinds.iter().any(|kind| kind == "tick_runs"), "{lines}");
        assert!(begun.elapsed() < PATIENCE, "the guest has no timer");
    }
    // Where they are a tenth of the host's tick or more, the count alone could not tell.
    println!(
        "{} local timer interrupts in {:?}, the guest's own; the tick's period is {} ns",
        timers(),
        begun.elapsed(),
        tick_ns()
    );
}

#[test]
fn to_look_disturbs_nobody() {
    require_bed!(nohz_full);
    let mut watched = Watched::spinning_on(CPU);
    watched.look_until_tickless();
    let calls = || interrupts::count("CAL", CPU);
    let (ticks, calls_before, begun) = (interrupts::count("LOC", CPU), calls(), Instant::now());
    let mut looks = 0_u64;
    while begun.elapsed() < Duration::from_secs(2) {
        watched.look();
        // What only a doubtful tick makes a watch read.
        fs::read("/proc/timer_list").expect("root may");
        looks += 1;
    }
    let seconds = begun.elapsed().as_secs();
    let (ticks, calls) = (interrupts::count("LOC", CPU) - ticks, calls() - calls_before);
    println!("{looks} looks in {seconds} s: {ticks} local timer interrupts, {calls} function calls on CPU {CPU}");
    // A tick that runs is HZ a second, 250 here. Under 2 % of that is stopped; a look that called would call each time.
    assert!(ticks < 10 * (seconds + 1) / 2, "{ticks}");
    assert!(calls < looks / 10, "{calls} calls in {looks} looks");
    watched.look_until_tickless();
}
