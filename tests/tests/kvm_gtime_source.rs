//! `--gtime-source`: which source the readings of a guest have, on whatever host this is; and how it is said why not the
//! one that was asked for.

use accounting::Gtime;
use accounting::host::HostCpus;
use accounting::reading::Source;
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use serde_json::Value;
use tests::bed::{self, Folder};
use tests::failure::fails;
use tests::flat::{Event, Guest, Program, elf};
use tests::require_bed;
use tests::vm::{Process, Vm};

/// Where the guests run, and what this host has for them there.
struct Host {
    cpu: u32,
    tickless: bool,
    /// Why there is no source `bpf`, if so.
    no_bpf: Option<String>,
}

impl Host {
    /// Found out without `chronovisor`: BPF programs are tried on a guest of this process.
    fn find_out() -> Self {
        let cpus = HostCpus::read().expect("sysfs");
        let tickless = cpus.nohz_full.iter().flatten().next().copied();
        let cpu = tickless.or(cpus.allowed.last().copied()).expect("a CPU");
        let gtime = Gtime::prepare("bpf".parse().expect("a source"));
        let no_bpf = gtime.refused().map(str::to_owned).or_else(|| {
            let guest = Guest::by(&Program::exit_storm(10), Some(cpu), gtime).expect("a guest");
            guest.vcpu.resume();
            assert!(matches!(guest.next(), Event::Report(_)), "the guest reports its exits");
            let silent = guest.read().source != Source::Bpf;
            silent.then(|| "KVM's tracepoints have been silent so far".to_owned())
        });
        Self {
            cpu,
            tickless: tickless.is_some(),
            no_bpf,
        }
    }

    /// The best source from `first` on that is here.
    fn best(&self, first: Source) -> Source {
        let here = |source: &Source| match source {
            Source::Bpf => self.no_bpf.is_none(),
            Source::Vtime => self.tickless,
            Source::Oncpu => true,
        };
        let from_first = Source::ALL.into_iter().filter(|&source| source >= first);
        from_first.into_iter().find(here).expect("oncpu is everywhere")
    }

    /// A guest that spins here, run with `--gtime-source word`, once its readings have `source` and figures.
    fn run(&self, word: &str, source: Source) -> Vm {
        let pin = self.cpu.to_string();
        let flags = ["--pin", &pin, "--gtime-source", word];
        let mut vm = Vm::flat(&Program::spin_forever(), flags);
        // Until the guest is entered there is nothing for the programs to see.
        vm.wait_until(&format!("{word}: a reading by {}", source.name()), |vm| {
            let reading = vm.reading();
            reading.source == source && reading.gtime_ns > 0
        });
        vm
    }
}

/// Why there is no `source`, by `?explain=1`; `None` where there is.
fn unavailable(vm: &Vm, source: Source) -> Option<String> {
    let explained = vm.ask("GET", "/vcpus/0/cputime?explain=1", None).body;
    let sources = explained["explain"]["sources"].as_array().expect("a list");
    let claim = sources.iter().find(|claim| claim["source"] == source.name());
    let claim = claim.unwrap_or_else(|| panic!("{} is not among {explained}", source.name()));
    let why = claim["unavailable"].as_str().map(str::to_owned);
    assert_eq!(claim["gtime_ns"].is_null(), why.is_some(), "{claim}");
    why
}

#[test]
fn readings_are_by_the_source_asked_for_or_the_next_and_say_why() {
    require_bed!(kvm);
    tests::require_no_jail!("BPF takes capabilities that a jail has not");
    let host = Host::find_out();
    for (word, first) in [
        ("auto", Source::Bpf),
        ("bpf", Source::Bpf),
        ("vtime", Source::Vtime),
        ("oncpu", Source::Oncpu),
    ] {
        let source = host.best(first);
        println!("{word}: {} (bpf: {:?})", source.name(), host.no_bpf);
        let vm = host.run(word, source);
        let no_bpf = match first {
            Source::Bpf => host.no_bpf.clone(),
            Source::Vtime | Source::Oncpu => Some("it was not asked for".to_owned()),
        };
        assert_eq!(unavailable(&vm, Source::Bpf), no_bpf, "{word}");
        let no_vtime = format!("the host was not booted with nohz_full= naming CPU {}", host.cpu);
        let no_vtime = (!host.tickless).then_some(no_vtime);
        assert_eq!(unavailable(&vm, Source::Vtime), no_vtime, "{word}");
        assert_eq!(unavailable(&vm, Source::Oncpu), None, "{word}");
    }
}

#[test]
fn a_word_that_is_no_source_is_refused_with_those_that_are() {
    require_bed!(kvm);
    let folder = Folder::new();
    let kernel = folder.write("kernel", elf(&Program::spin_forever()));
    let kernel = kernel.display().to_string();
    for word in ["tsc", "BPF", ""] {
        let arguments = ["run", "--kernel", &kernel, "--gtime-source", word];
        fails(&arguments, 2, &["--gtime-source", "use auto, bpf, vtime or oncpu"]);
    }
}

/// Runs `test` where the processes it starts lack what BPF takes. A thread's bounding set is its own, and of root's
/// capabilities a process has those in the bounding set of the thread that started it (capabilities(7)).
fn without_bpf_privilege(test: impl FnOnce() + Send) {
    let begin = || {
        for capability in [CapabilitySet::BPF, CapabilitySet::PERFMON, CapabilitySet::SYS_ADMIN] {
            match remove_capability_from_bounding_set(capability) {
                // EINVAL: a kernel that does not know the capability, as before Linux 5.8.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        test();
        Ok(())
    };
    let done = std::thread::scope(|scope| scope.spawn(begin).join());
    match done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
        Ok(()) => {}
        Err(why) => bed::skipped("kvm", &format!("capabilities cannot be dropped: {why}")),
    }
}

/// What is said where the privilege lacks.
const NO_PRIVILEGE: &str = "it takes root in the initial user namespace, or CAP_BPF and CAP_PERFMON";

#[test]
fn without_the_privilege_auto_takes_the_next_source_and_says_what_lacks() {
    require_bed!(kvm);
    tests::require_no_jail!("BPF takes capabilities that a jail has not");
    let host = Host::find_out();
    without_bpf_privilege(|| {
        let next = host.best(Source::Vtime);
        let auto = host.run("auto", next);
        let why = unavailable(&auto, Source::Bpf).expect("it has no privilege");
        assert!(why.contains(NO_PRIVILEGE), "{why}");
        assert!(!auto.process.stderr().contains("bpf"), "{}", auto.process.stderr());
        let (_, check, _) = Process::chronovisor(["check", "--json"]).wait();
        let check: Value = serde_json::from_str(&check).expect("JSON");
        let findings = check["findings"].as_array().expect("a list");
        let bpf = findings.iter().find(|finding| finding["what"] == "bpf");
        let says = bpf.and_then(|bpf| bpf["says"].as_str()).unwrap_or_default();
        assert!(says.starts_with("not here: ") && says.contains(NO_PRIVILEGE), "{check}");
    });
}

#[test]
fn source_bpf_asked_for_by_name_without_the_privilege_starts_with_a_warning() {
    require_bed!(kvm);
    tests::require_no_jail!("BPF takes capabilities that a jail has not");
    let host = Host::find_out();
    without_bpf_privilege(|| {
        let mut vm = host.run("bpf", host.best(Source::Vtime));
        vm.process.wait_for_error("guest time is not derived from bpf: cannot ");
        vm.process.wait_for_error(NO_PRIVILEGE);
        let stderr = vm.process.stderr();
        let warnings = stderr.lines().filter(|line| line.contains("not derived from bpf"));
        assert_eq!(warnings.count(), 1, "{stderr}");
    });
}
