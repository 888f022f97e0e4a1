//! The guest's processor as its user wants it, seen by a guest that asks it: `/cpu-config` over REST and from a configuration file,
//! KVM's capabilities done without, and templates on hosts that they are and are not for.

use std::arch::x86_64::__cpuid;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};
use tests::bed::{self, Folder};
use tests::client::{self, Response};
use tests::flat::{Program, elf};
use tests::require_bed;
use tests::vm::{PATIENCE, Process};

/// A server whose guest is `program`, not started.
struct Server {
    process: Process,
    folder: Folder,
}

impl Server {
    fn new(program: &Program) -> Self {
        Self::spawn(program, Command::new(bed::file("chronovisor")))
    }

    fn spawn(program: &Program, mut command: Command) -> Self {
        let folder = Folder::new();
        let kernel = folder.write("kernel", elf(program));
        command.arg("--api-sock").arg(folder.join("api.sock"));
        let server = Self {
            process: Process::spawn(command),
            folder,
        };
        let begun = Instant::now();
        while client::request(&server.socket(), "GET", "/", None).is_err() {
            assert!(begun.elapsed() < PATIENCE, "{}", server.process.stderr());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        server.put("/boot-source", &json!({ "kernel_image_path": kernel }));
        server
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("api.sock")
    }

    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Response {
        let body = body.map(Value::to_string);
        let response = client::request(&self.socket(), method, path, body.as_deref());
        response.unwrap_or_else(|e| panic!("{method} {path}: {e}; {}", self.process.stderr()))
    }

    fn put(&self, path: &str, body: &Value) {
        let response = self.ask("PUT", path, Some(body));
        assert_eq!(response.status, 204, "PUT {path} {body}: {response:?}");
    }

    fn start(&self) -> Response {
        self.ask("PUT", "/actions", Some(&json!({ "action_type": "InstanceStart" })))
    }

    /// Starts the guest and gives what it tells.
    fn told(mut self) -> [u32; 4] {
        let started = self.start();
        assert_eq!(started.status, 204, "{started:?}");
        let (status, stdout, stderr) = self.process.wait();
        assert_eq!(status.code(), Some(0), "it reset itself: {stderr}");
        words(&stdout)
    }
}

/// The line of hexadecimal digits that the guest wrote.
fn words(stdout: &str) -> [u32; 4] {
    let line = stdout.lines().find(|line| line.len() == 32);
    let line = line.unwrap_or_else(|| panic!("32 digits: {stdout:?}"));
    [0, 8, 16, 24].map(|at| u32::from_str_radix(&line[at..at + 8], 16).expect("hexadecimal"))
}

/// What a guest of `program` tells, after `cpu_config` was put.
fn told(program: &Program, cpu_config: &Value) -> [u32; 4] {
    let server = Server::new(program);
    server.put("/cpu-config", cpu_config);
    server.told()
}

/// Of leaf 1: ECX, bit 24, the TSC-Deadline timer, is cleared; EDX, bit 10, which is nobody's, is set. The former is KVM's to offer: a
/// software backend does not clear what programs in user mode find in the processor itself, SSE3 for one.
fn leaf1() -> Value {
    let tsc_deadline = format!("0b0_{}", "x".repeat(24));
    json!({ "cpuid_modifiers": [{ "leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
        { "register": "ecx", "bitmap": &tsc_deadline }, { "register": "edx", "bitmap": "0b1_xxxx_xxxx_xx" }] }] })
}

const TSC_DEADLINE: u32 = 1 << 24;
const NOBODYS: u32 = 1 << 10;

#[test]
fn bits_of_cpuid_that_a_put_cpu_config_changes_are_changed_for_the_guest() {
    require_bed!(kvm);
    let program = Program::cpuid(1, 0);
    let before = told(&program, &json!({}));
    assert_eq!(
        (before[2] & TSC_DEADLINE, before[3] & NOBODYS),
        (TSC_DEADLINE, 0),
        "{before:x?}"
    );
    let after = told(&program, &leaf1());
    let [eax, ebx, ecx, edx] = before;
    assert_eq!(
        after,
        [eax, ebx, ecx & !TSC_DEADLINE, edx | NOBODYS],
        "{before:x?} {after:x?}"
    );
}

#[test]
fn an_empty_cpu_config_takes_the_last_one_back() {
    require_bed!(kvm);
    let server = Server::new(&Program::cpuid(1, 0));
    server.put("/cpu-config", &leaf1());
    server.put("/cpu-config", &json!({}));
    let [_, _, ecx, edx] = server.told();
    assert_eq!((ecx & TSC_DEADLINE, edx & NOBODYS), (TSC_DEADLINE, 0));
}

#[test]
fn bits_of_an_msr_that_a_put_cpu_config_changes_are_changed_for_the_guest() {
    require_bed!(kvm);
    // IA32_PAT after a reset (Intel SDM vol. 3A, 12.12): a byte for each kind of memory.
    let program = Program::rdmsr(0x277);
    assert_eq!(told(&program, &json!({})), [0, 0, 0x0007_0406, 0x0007_0406]);
    // The first from 6, write-back, to 4, write-through; the second from 4 to 5, write-protected; and the last from 0 to 1.
    let bitmap = format!("0b1_{}_1_xxxx_xx0x", "x".repeat(47));
    let changed = json!({ "msr_modifiers": [{ "addr": "0x277", "bitmap": bitmap }] });
    assert_eq!(told(&program, &changed), [0, 0, 0x0107_0406, 0x0007_0504]);
}

#[test]
fn the_configuration_that_a_microvm_tells_makes_one_with_the_same_processor() {
    require_bed!(kvm);
    let server = Server::new(&Program::cpuid(1, 0));
    server.put("/cpu-config", &leaf1());
    let told = server.ask("GET", "/vm/config", None).body;
    let file = server.folder.write("again.json", told.to_string());
    let mut again = Process::chronovisor(["--no-api".into(), "--config-file".into(), file]);
    let (status, stdout, stderr) = again.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    let again = words(&stdout);
    assert_eq!((again[2] & TSC_DEADLINE, again[3] & NOBODYS), (0, NOBODYS));
    assert_eq!(server.told(), again);
}

/// `chronovisor` on a kernel whose KVM answers that it has no capability `number`.
#[expect(unsafe_code, reason = "a filter of system calls has to be in place before exec")]
fn without_capability(number: u32) -> Command {
    const KVM_CHECK_EXTENSION: u32 = 0xae03;
    let instruction = |code: u32, jt, jf, k| libc::sock_filter {
        code: u16::try_from(code).expect("instructions have codes of 16 bits"),
        jt,
        jf,
        k,
    };
    // Offsets into seccomp_data: the call's number, and the low halves of its second and third argument.
    let load = |offset| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let unless = |k, skip| instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, k);
    let answer = |k| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let mut filter = [
        load(0),
        unless(u32::try_from(libc::SYS_ioctl).expect("a call's number"), 5),
        load(24),
        unless(KVM_CHECK_EXTENSION, 3),
        load(32),
        unless(number, 1),
        // An error of 0 is an answer of 0: KVM has none.
        answer(libc::SECCOMP_RET_ERRNO),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let mut command = Command::new(bed::file("chronovisor"));
    let install = move || {
        let program = libc::sock_fprog {
            len: 8,
            filter: filter.as_mut_ptr(),
        };
        // SAFETY: both only read their arguments; `program` and the filter that it points to live until they return.
        let refused = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
        };
        if refused {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes two system calls, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(install) };
    command
}

#[test]
fn a_capability_that_cpu_config_does_without_need_not_be_there() {
    require_bed!(kvm);
    const KVM_CAP_MP_STATE: u32 = 14;
    let server = Server::spawn(&Program::cpuid(0, 0), without_capability(KVM_CAP_MP_STATE));
    let refused = server.start();
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(
        refused.fault().contains("this host's KVM has no KVM_CAP_MP_STATE"),
        "{refused:?}"
    );
    // Another one is not this one.
    server.put("/cpu-config", &json!({ "kvm_capabilities": ["!25"] }));
    assert_eq!(server.start().status, 400);
    server.put("/cpu-config", &json!({ "kvm_capabilities": ["!14"] }));
    let vendor = server.told();
    assert_ne!(vendor[1], 0, "the guest ran: {vendor:x?}");
}

#[test]
fn a_capability_that_cpu_config_asks_for_has_to_be_there() {
    require_bed!(kvm);
    let server = Server::new(&Program::cpuid(0, 0));
    server.put("/cpu-config", &json!({ "kvm_capabilities": ["123456"] }));
    let refused = server.start();
    assert!(refused.fault().contains("KVM lacks capability 123456"), "{refused:?}");
    // KVM_CAP_USER_MEMORY.
    server.put("/cpu-config", &json!({ "kvm_capabilities": ["3"] }));
    server.told();
}

/// Whether this host's CPU is Intel's.
fn is_intel() -> bool {
    __cpuid(0).ebx == u32::from_le_bytes(*b"Genu")
}

#[test]
fn a_template_for_another_vendors_cpu_is_refused_at_the_start_with_both_named() {
    require_bed!(kvm);
    let (template, vendor) = if is_intel() {
        ("T2A", "AuthenticAMD")
    } else {
        ("T2", "GenuineIntel")
    };
    let server = Server::new(&Program::cpuid(0, 0));
    let machine = |template: &str| json!({ "vcpu_count": 1, "mem_size_mib": 16, "cpu_template": template });
    server.put("/machine-config", &machine(template));
    assert_eq!(
        server.ask("GET", "/machine-config", None).body["cpu_template"],
        template
    );
    let refused = server.start();
    assert_eq!(refused.status, 400, "{refused:?}");
    let says = format!("{template} is for {vendor}, and this host's CPU is ");
    assert!(refused.fault().contains(&says), "{refused:?}");
    // It can be taken back, and the same microVM started.
    server.put("/machine-config", &machine("None"));
    server.told();
}

#[test]
fn a_template_takes_from_the_guest_what_its_processor_lacks_on_hosts_that_it_is_for() {
    require_bed!(kvm);
    let templates: &[&str] = if is_intel() {
        &["T2", "T2CL", "C3", "T2S"]
    } else {
        &["T2A"]
    };
    let mut started = Vec::new();
    for template in templates {
        let server = Server::new(&Program::cpuid(7, 0));
        server.put(
            "/machine-config",
            &json!({ "vcpu_count": 1, "mem_size_mib": 16, "cpu_template": template }),
        );
        let response = server.start();
        if response.status == 400 {
            assert!(response.fault().contains(" CPU template. "), "{response:?}");
            continue;
        }
        let mut process = server.process;
        let [_, ebx, ecx, _] = words(&process.wait().1);
        // RDSEED, ADX, CLFLUSHOPT, CLWB, AVX512F; and all of ECX.
        assert_eq!(
            (ebx & (1 << 16 | 1 << 18 | 1 << 19 | 1 << 23 | 1 << 24), ecx),
            (0, 0),
            "{template}"
        );
        started.push(template);
    }
    if started.is_empty() {
        return bed::skipped("kvm", "this host's CPU is of no template's models");
    }
    println!("started: {started:?}");
}
