//! A running machine: guest memory, devices, vCPUs, and the VM that joins them.
//!
//! Building one either succeeds whole or leaves nothing behind: what was made is dropped in the reverse order of its making,
//! vCPU threads first.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use accounting::host::{CpuSet, HostCpus, run_on};
use accounting::{Account, Gtime, GtimeSource};
use kvm_ioctls::{Kvm, VmFd};
use serde_json::json;
use vcpu::pin::{self, PinError};
use vcpu::setup::{self, Processor, ProcessorError, SetupError, Topology};
use vcpu::{Vcpu, VcpuConfig, VcpuError};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{self, AcpiError};
use crate::affinity::{self, AffinityError, Place};
use crate::attach::{self, AttachError, Attached};
use crate::boot::{self, BootError};
use crate::config::{BootSource, Devices, MachineConfig, Pinning, Serial};
use crate::console::Redirect;
use crate::devices::i8042::KeysUnread;
use crate::devices::ring::OutputRing;
use crate::devices::virtio::DeviceEvents;
use crate::devices::virtio::mmio::Transport;
use crate::devices::virtio::net::Taps;
use crate::devices::{Bus, I8042, MachineEvent, Notifier, Pm, SerialPort};
use crate::host;
use crate::kvm::{self, CallError, KvmError, refused};
use crate::layout::{COM1_IRQ, KEYBOARD_IRQ};
use crate::log::LogSink;
use crate::memory::{GuestMemory, MemoryError};
use crate::metrics::{self, Counters};
use crate::mmds::SharedMmds;
use crate::mmds::config::MmdsConfig;

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The host has no usable KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A stock kernel on a KVM that cannot run one. Said before it is tried: an emulated kernel may take minutes to fail.
    #[error(
        "this host's KVM ({backend}) is a software backend that cannot run the kernel {}; use a host with VMX or SVM, \
         or the emulated one that `cargo xtask demo` builds",
        kernel.display()
    )]
    SoftwareBackend {
        /// The modules behind it.
        backend: String,
        /// The kernel.
        kernel: PathBuf,
    },
    /// KVM refused a call.
    #[error(transparent)]
    Call(#[from] CallError),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The boot source cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device cannot be had.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// COM1's output cannot go there.
    #[error("cannot open {} for the serial port's output: {source}; check the path and its permissions", path.display())]
    Serial {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The vCPUs cannot be pinned as asked.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A vCPU's registers could not be set.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The processor cannot be had as it is wanted.
    #[error(transparent)]
    Cpu(#[from] ProcessorError),
    /// A vCPU's thread could not be started.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Something of the process's own.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What a machine is built from.
#[derive(Clone, Debug)]
pub struct Plan {
    /// vCPUs and memory.
    pub machine: MachineConfig,
    /// The kernel.
    pub boot: BootSource,
    /// What the guest's processor is made from.
    pub cpu: Processor,
    /// virtio devices.
    pub devices: Devices,
    /// The taps that are attached to already.
    pub taps: Taps,
    /// Where COM1's output goes, if not to the console.
    pub serial: Option<Serial>,
    /// The metadata service, and who reaches it.
    pub mmds: Option<(MmdsConfig, SharedMmds)>,
    /// Host CPUs for the vCPUs.
    pub pinning: Pinning,
}

/// What lives longer than a machine: the ends of it that the VMM thread holds.
#[derive(Debug)]
pub struct Surroundings {
    /// The host's CPUs, read before any thread of ours was confined to some of them.
    pub cpus: Arc<HostCpus>,
    /// What the vCPUs' guest time is to be derived from.
    pub gtime_source: GtimeSource,
    /// Where output goes.
    pub ring: Arc<OutputRing>,
    /// COM1.
    pub serial: Arc<SerialPort>,
    /// Where events go.
    pub events: Sender<MachineEvent>,
    /// Announces them.
    pub wake: EventFd,
    /// Where COM1's output can be made to go.
    pub(crate) redirect: Redirect,
    /// Where the log goes.
    pub log: LogSink,
}

/// The machine. Its vCPUs are stopped when it is dropped.
#[derive(Debug)]
pub struct Machine {
    // Dropped from top to bottom: the threads use all that follows.
    vcpus: Vec<Vcpu>,
    bus: Arc<Bus>,
    ring: Arc<OutputRing>,
    /// Read before any thread was confined to some of them.
    cpus: Arc<HostCpus>,
    attached: Attached,
    _vm: VmFd,
    _memory: Arc<GuestMemory>,
}

impl Machine {
    /// Builds the machine; its vCPUs are held. Beside it, what the user should know.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn build(plan: &Plan, around: &Surroundings) -> Result<(Self, Vec<String>), StartError> {
        let failed = |what| move |source| StartError::Host { what, source };
        let cpus = &around.cpus;
        let vcpus = plan.machine.vcpu_count;
        let choice = pin::choose(cpus, &plan.pinning, usize::from(vcpus))?;
        let kvm = kvm::open_without(|capability| plan.cpu.does_without(capability))?;
        plan.cpu.check(&kvm)?;
        let mut supported = setup::cpuid::supported(&kvm).map_err(refused("say which CPUID it supports"))?;
        let cpu_warnings = plan.cpu.change_cpuid(&mut supported)?;

        let memory = Arc::new(GuestMemory::new(plan.machine.mem_size_mib, plan.machine.huge_pages)?);
        let (attached, virtio) = attach::build(&plan.devices, &plan.taps, &memory)?;
        if let Some((config, service)) = &plan.mmds {
            attached.set_mmds(config, service).map_err(AttachError::from)?;
        }
        let windows = attach::windows(virtio.len());
        let rsdp = acpi::write(memory.view(), vcpus, &windows)?;
        let added = attach::command_line(&plan.devices, &windows);
        let entry = boot::load(&plan.boot, &added, &memory, rsdp)?;
        boot::regs::write_tables(memory.view(), entry)?;
        if entry.operating_system {
            check_backend(&kvm, &plan.boot)?;
        }

        let vm = kvm::create_vm(&kvm, &memory, plan.machine.track_dirty_pages)?;
        let eventfd = failed("make an eventfd");
        let bus = Arc::new(Bus {
            serial: Arc::clone(&around.serial),
            i8042: I8042::new().map_err(&eventfd)?,
            pm: Pm::default(),
            virtio,
            notifier: Notifier::new(around.events.clone(), around.wake.try_clone().map_err(&eventfd)?),
        });
        vm.register_irqfd(bus.serial.interrupt(), COM1_IRQ)
            .map_err(refused("connect COM1's interrupt"))?;
        vm.register_irqfd(bus.i8042.interrupt(), KEYBOARD_IRQ)
            .map_err(refused("connect the keyboard's interrupt"))?;
        attach::connect(&vm, &bus.virtio)?;

        let topology = Topology {
            vcpus: u32::from(vcpus),
            smt: plan.machine.smt,
        };
        let fds = (0..u32::from(vcpus))
            .map(|index| {
                let fd = vm.create_vcpu(u64::from(index)).map_err(refused("create a vCPU"))?;
                setup::apply(&fd, &supported, topology, index)?;
                plan.cpu.change_msrs(&fd, index)?;
                if index == 0 {
                    boot::regs::set(&fd, entry).map_err(refused("set the first vCPU's registers"))?;
                }
                Ok(fd)
            })
            .collect::<Result<Vec<_>, StartError>>()?;

        let gtime = Gtime::prepare(around.gtime_source);
        let refused = gtime
            .refused()
            .map(|why| format!("guest time is not derived from bpf: {why}"));

        // A vCPU that is not pinned inherits this thread's affinity: for that moment it is what the process was given. Afterwards
        // everything but vCPUs keeps off the vCPUs' CPUs.
        run_on(&cpus.affinity).map_err(failed("set the affinity of the VMM thread"))?;
        let pinned: CpuSet = choice.cpus.iter().flatten().copied().collect();
        let spawned = (0..)
            .zip(fds)
            .zip(&choice.cpus)
            .map(|((index, fd), &pin)| {
                Vcpu::spawn(
                    VcpuConfig {
                        index,
                        pin,
                        host: Arc::clone(cpus),
                        gtime: gtime.clone(),
                    },
                    fd,
                    Arc::clone(&bus),
                )
            })
            .collect::<Result<Vec<_>, VcpuError>>();
        confine(&attached, &cpus.housekeeping(&pinned)).map_err(failed("keep other threads off the vCPUs' CPUs"))?;

        let machine = Self {
            vcpus: spawned?,
            bus,
            ring: Arc::clone(&around.ring),
            cpus: Arc::clone(cpus),
            attached,
            _vm: vm,
            _memory: memory,
        };
        let warnings = choice.warnings.iter().map(ToString::to_string).chain(refused);
        Ok((machine, warnings.chain(cpu_warnings).collect()))
    }

    /// The vCPUs' accounts, in order.
    #[must_use]
    pub fn accounts(&self) -> Vec<Arc<Account>> {
        self.vcpus.iter().map(|vcpu| Arc::clone(vcpu.account())).collect()
    }

    /// The devices' sides of the event loop.
    #[must_use]
    pub fn device_events(&self) -> Vec<DeviceEvents> {
        self.bus.virtio.iter().map(Transport::events).collect()
    }

    /// The devices, by what they are.
    #[must_use]
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Puts vCPU `index` on `place`. Says what the user should know.
    ///
    /// # Errors
    /// See [`AffinityError`].
    pub fn put(&self, index: u32, place: Place) -> Result<Option<String>, AffinityError> {
        let confine = |cpus: &CpuSet| confine(&self.attached, cpus);
        let warning = affinity::put(&self.cpus, &self.vcpus, index, place, confine)?;
        Ok(warning.map(|warning| warning.to_string()))
    }

    /// Sets every vCPU running.
    pub fn resume(&self) {
        self.attached.set_held(false);
        self.vcpus.iter().for_each(Vcpu::resume);
    }

    /// Holds every vCPU; returns when all are held.
    pub fn pause(&self) {
        // One may be waiting for the console, which this thread empties.
        self.ring.let_pass(true);
        self.vcpus.iter().for_each(Vcpu::pause);
        self.attached.set_held(true);
        self.ring.let_pass(false);
    }

    /// Presses Ctrl-Alt-Del.
    ///
    /// # Errors
    /// The guest has not read the last ones.
    pub fn ctrl_alt_del(&self) -> Result<(), KeysUnread> {
        self.bus.i8042.ctrl_alt_del()
    }

    /// Whether the guest has a driver for the keyboard.
    #[must_use]
    pub fn hears_keys(&self) -> bool {
        self.bus.i8042.has_driver()
    }

    /// What its devices and vCPUs counted so far.
    #[must_use]
    pub fn metrics(&self) -> Counters {
        let mut counters = self.attached.metrics();
        let readings: Vec<_> = self.vcpus.iter().map(|vcpu| vcpu.account().read()).collect();
        counters.insert("vcpu".to_owned(), metrics::of_vcpus(&readings));
        let events: u64 = self.bus.virtio.iter().map(Transport::event_count).sum();
        counters.insert("vmm".to_owned(), json!({ "device_events": events }));
        counters
    }
}

/// Confines everything but vCPUs to `cpus`: threads of this process, and what works for its devices.
fn confine(attached: &Attached, cpus: &CpuSet) -> std::io::Result<()> {
    // First: a worker that starts meanwhile starts there.
    attached.confine_workers(cpus);
    vcpu::confine_others(cpus)
}

/// Hardware is taken at its name; anything else has to show what it can.
fn check_backend(kvm: &Kvm, boot: &BootSource) -> Result<(), StartError> {
    let modules = host::backend_modules();
    if host::has_hardware(&modules) || host::runs_stock_kernels(kvm) {
        return Ok(());
    }
    Err(StartError::SoftwareBackend {
        backend: host::name(&modules),
        kernel: boot.kernel_image_path.clone(),
    })
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.ring.let_pass(true);
        self.vcpus.iter_mut().for_each(Vcpu::stop);
    }
}
