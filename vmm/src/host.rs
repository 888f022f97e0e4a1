//! What this host's KVM is good for: whether it is there, what stands behind it, and whether a stock kernel runs on it.
//!
//! The last is found out by behaviour, not by name. A KVM without VMX or SVM behind it is a software backend: code of the
//! guest's user mode runs as it is, code of its kernel mode is emulated, and the emulator lacks instructions that every
//! distribution's kernel executes. [`kvm`] lets a guest execute those; so does [`bpf`], with BPF programs watching.
//!
//! To try disturbs: a guest's memory that goes sends an interrupt to every CPU that runs a thread of this process, and
//! programs that are attached send one to every CPU there is. So neither is called beside running vCPUs:
//! [`kvm_at_its_word`] is.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use accounting::host::HostCpus;
use accounting::reading::Source;
use accounting::{Gtime, GtimeSource};
use kvm_ioctls::Kvm;
use vcpu::setup::{self, Topology};
use vcpu::{ExitHandler, Vcpu, VcpuConfig, VcpuEnd};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{Entry, Protocol, regs};
use crate::config::HugePages;
use crate::kvm::{self, KvmError, refused};
use crate::machine::StartError;
use crate::memory::GuestMemory;

/// What this host's KVM is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmStatus {
    /// Why it cannot be used at all; one line for the user.
    pub error: Option<String>,
    /// The modules behind it: `kvm_intel`, `kvm_amd`, or another; empty where they are not told.
    pub modules: Vec<String>,
    /// Whether the kernel of a distribution runs on it; `None` where that was not tried, and its name does not tell.
    pub runs_stock_kernels: Option<bool>,
}

/// Looks at this host's KVM, and runs on it what such a kernel executes. Takes some milliseconds, half a second at most.
/// Not for a process whose vCPUs run: see the module.
#[must_use]
pub fn kvm() -> KvmStatus {
    status(|kvm, _| Some(runs_stock_kernels(kvm)))
}

/// Looks at this host's KVM without trying it: hardware is taken at its name. Disturbs no vCPU.
#[must_use]
pub fn kvm_at_its_word() -> KvmStatus {
    status(|_, modules| has_hardware(modules).then_some(true))
}

fn status(runs_stock_kernels: impl Fn(&Kvm, &[String]) -> Option<bool>) -> KvmStatus {
    let modules = backend_modules();
    match kvm::open() {
        Ok(kvm) => KvmStatus {
            runs_stock_kernels: runs_stock_kernels(&kvm, &modules),
            error: None,
            modules,
        },
        Err(error) => KvmStatus {
            runs_stock_kernels: Some(false),
            error: Some(error.to_string()),
            modules,
        },
    }
}

/// Why guest time cannot be had from BPF programs at KVM's tracepoints.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoBpf {
    /// There is no KVM.
    #[error("there is no KVM to watch: {0}")]
    NoKvm(#[from] KvmError),
    /// The programs could not be attached; why, in the words of [`Gtime::refused`].
    #[error("{0}")]
    NotAttached(String),
    /// They are attached, and nothing could be shown to them.
    #[error("not tried, as the guest to try it with could not be made: {0}")]
    NotTried(#[from] StartError),
    /// A guest ran, and they saw nothing of it.
    #[error("KVM's tracepoints stay silent on this host")]
    Silent,
}

/// Finds out whether guest time can be had from BPF programs, by having them watch a guest. As long as it takes (as
/// [`kvm`]), they run at every vCPU's exits on this host.
///
/// # Errors
/// See [`NoBpf`].
pub fn bpf() -> Result<(), NoBpf> {
    let kvm = kvm::open()?;
    let gtime = Gtime::prepare(GtimeSource::From(Source::Bpf));
    if let Some(why) = gtime.refused() {
        return Err(NoBpf::NotAttached(why.to_owned()));
    }
    match run_probe(&kvm, gtime)?.source {
        Source::Bpf => Ok(()),
        Source::Vtime | Source::Oncpu => Err(NoBpf::Silent),
    }
}

/// The KVM backends that are loaded, by module name.
pub(crate) fn backend_modules() -> Vec<String> {
    let names = std::fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let mut modules: Vec<_> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    modules.sort();
    modules
}

/// Whether one of `modules` drives VMX or SVM.
pub(crate) fn has_hardware(modules: &[String]) -> bool {
    modules
        .iter()
        .any(|module| module == "kvm_intel" || module == "kvm_amd")
}

/// `modules` for a sentence.
pub(crate) fn name(modules: &[String]) -> String {
    if modules.is_empty() {
        "no known module".into()
    } else {
        modules.join(", ")
    }
}

/// Where the probe lies in its guest: above everything in [`crate::layout`] that is used here.
const CODE: u64 = 0x3_0000;
const IDT: u64 = 0x3_1000;
const HANDLER: u64 = 0x3_2000;
/// Zeros, aligned for cmpxchg16b and xrstor.
const SCRATCH: u64 = 0x3_3000;
/// The port the probe ends at: 0x80 is for such codes on a PC.
const DONE: u16 = 0x80;
/// Vector of int3, and an interrupt gate's type and presence (Intel SDM volume 3A, 6.14.1).
const BREAKPOINT: u64 = 3;
const GATE: u64 = 0x8e00;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
/// Enough for a thousand emulated instructions on a busy host, and no wait to speak of.
const PATIENCE: Duration = Duration::from_millis(500);

/// Whether a guest comes through what such kernels execute.
pub(crate) fn runs_stock_kernels(kvm: &Kvm) -> bool {
    match run_probe(kvm, Gtime::default()) {
        Ok(Probed { ran, .. }) => ran,
        Err(error) => {
            tracing::debug!("the probe guest could not be made: {error}");
            false
        }
    }
}

/// What became of the probe guest.
struct Probed {
    /// Whether all of it ran.
    ran: bool,
    /// What its guest time was derived from.
    source: Source,
}

/// Runs what stock kernels execute, at their privilege, its guest time derived as `gtime` says.
fn run_probe(kvm: &Kvm, gtime: Gtime) -> Result<Probed, StartError> {
    let host = |what| move |source| StartError::Host { what, source };
    let supported = setup::cpuid::supported(kvm).map_err(refused("say which CPUID it supports"))?;
    let has = |function, index, of: fn(&kvm_bindings::kvm_cpuid_entry2) -> u32, bit: u32| {
        let mut leaves = supported.as_slice().iter();
        leaves.any(|leaf| leaf.function == function && leaf.index == index && of(leaf) & (1 << bit) != 0)
    };
    // CPUID leaves 1 and 7: Intel SDM volume 2A, CPUID.
    let (cx16, xsave) = (has(1, 0, |leaf| leaf.ecx, 13), has(1, 0, |leaf| leaf.ecx, 26));
    let smap = has(7, 0, |leaf| leaf.ebx, 20);

    let memory = GuestMemory::new(1, HugePages::None)?;
    let entry = Entry {
        address: CODE,
        protocol: Protocol::Linux64,
        operating_system: false,
    };
    regs::write_tables(memory.view(), entry)?;
    // The gate's offset fits 32 bits; its selector is that of the code that runs.
    let gate = (HANDLER & 0xffff) | 0x10 << 16 | GATE << 32 | (HANDLER >> 16) << 48;
    let parts: [(&[u8], u64); 3] = [
        (&code(cx16, smap, xsave), CODE),
        (&gate.to_le_bytes(), IDT + BREAKPOINT * 16),
        (&IRETQ, HANDLER),
    ];
    for (bytes, at) in parts {
        let written = memory.view().write_slice(bytes, GuestAddress(at));
        written.map_err(|e| host("write the probe guest")(std::io::Error::other(e)))?;
    }

    let vm = kvm::create_vm(kvm, &memory, false)?;
    let fd = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
    setup::apply(&fd, &supported, Topology { vcpus: 1, smt: false }, 0)?;
    regs::set(&fd, entry).map_err(refused("set registers"))?;
    let mut sregs = fd.get_sregs().map_err(refused("read registers"))?;
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
    sregs.cr4 |= if xsave { CR4_OSFXSR | CR4_OSXSAVE } else { 0 };
    fd.set_sregs(&sregs).map_err(refused("set registers"))?;
    let mut general = fd.get_regs().map_err(refused("read registers"))?;
    general.rdi = SCRATCH;
    fd.set_regs(&general).map_err(refused("set registers"))?;

    let (tell, told) = channel();
    let cpus = Arc::new(HostCpus::read().map_err(host("read the host's CPUs"))?);
    let vcpu = Vcpu::spawn(
        VcpuConfig {
            index: 0,
            pin: None,
            host: cpus,
            gtime,
        },
        fd,
        Arc::new(Probe(tell)),
    )?;
    vcpu.resume();
    let ran = told.recv_timeout(PATIENCE).unwrap_or(false);
    let source = vcpu.account().read().source;
    // Kicked out of KVM_RUN, wherever it is, before its memory goes.
    drop(vcpu);
    Ok(Probed { ran, source })
}

const IRETQ: [u8; 2] = [0x48, 0xcf];

fn code(cx16: bool, smap: bool, xsave: bool) -> Vec<u8> {
    let mut code = Vec::new();
    if cx16 {
        code.extend([0xf0, 0x48, 0x0f, 0xc7, 0x0f]); // lock cmpxchg16b [rdi]
    }
    code.push(0xcc); // int3
    if smap {
        code.extend([0x0f, 0x01, 0xca]); // clac
    }
    if xsave {
        code.extend([0x31, 0xc0, 0x31, 0xd2]); // xor eax, eax; xor edx, edx
        code.extend([0x0f, 0xae, 0x2f]); // xrstor [rdi]
    }
    code.extend([0xe6, 0x80]); // out 0x80, al
    code.extend([0xeb, 0xfe]); // jmp to itself
    code
}

/// Hears whether the probe came through.
struct Probe(Sender<bool>);

impl ExitHandler for Probe {
    fn io_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn io_write(&self, port: u16, _data: &[u8]) {
        let _ = self.0.send(port == DONE);
    }
    fn mmio_read(&self, _addr: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _addr: u64, _data: &[u8]) {}
    fn ended(&self, _index: u32, end: VcpuEnd) {
        tracing::debug!("the probe guest ended: {end:?}");
        let _ = self.0.send(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_comes_to_an_end_and_agrees_with_hardware() {
        let status = kvm();
        match &status.error {
            Some(error) => assert!(status.runs_stock_kernels == Some(false) && !error.contains('\n')),
            // Hardware runs every instruction there is. The converse is not ours to promise.
            None => assert!(
                status.runs_stock_kernels == Some(true) || !has_hardware(&status.modules),
                "{status:?}"
            ),
        }
    }

    #[test]
    fn what_is_said_without_trying_is_borne_out_by_trying() {
        let (word, tried) = (kvm_at_its_word(), kvm());
        assert_eq!(word.error.is_some(), tried.error.is_some(), "{word:?} {tried:?}");
        assert!(tried.runs_stock_kernels.is_some(), "{tried:?}");
        if word.runs_stock_kernels.is_some() {
            assert_eq!(word.runs_stock_kernels, tried.runs_stock_kernels, "{word:?}");
        }
    }

    #[test]
    fn why_there_is_no_bpf_is_what_was_found_out() {
        let failed = StartError::Host {
            what: "write the probe guest",
            source: std::io::Error::from_raw_os_error(12),
        };
        let said = NoBpf::from(failed).to_string();
        assert!(
            said.contains("cannot write the probe guest: ") && !said.contains("silent"),
            "{said}"
        );
        // Whichever it is here: in one line.
        if let Err(why) = bpf() {
            assert!(!why.to_string().contains('\n'), "{why}");
        }
    }

    #[test]
    fn only_hardware_backends_count_as_such() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(has_hardware(&names(&["kvm_amd"])) && has_hardware(&names(&["kvm_intel"])));
        assert!(!has_hardware(&names(&["kvm_pvm"])) && !has_hardware(&[]));
        assert_eq!(name(&names(&["kvm_pvm"])), "kvm_pvm");
    }
}
