//! The floor under `start` and `boot`: the shortest loop that boots a Linux kernel on KVM, to hold Chronovisor against.
//!
//! `floor KERNEL INITRD CMDLINE MEM_MIB CPU`: one thread, which reads an ELF vmlinux and its initrd into guest memory
//! (aligned to 2 MiB and advised for huge pages, as Chronovisor's is), enters it by the 64-bit boot protocol, and runs
//! it on host CPU `CPU`. There is no check of any input, no API, no accounting, no second thread. What there is, the guest
//! would be slower without: a UART that is real, since Linux checks, and the same ACPI tables, since the guest would look
//! for hardware of the time before them, and take its ticks from the PIT, for longer than Chronovisor takes to boot it.
//!
//! Before the first `KVM_RUN` it prints the time, `CLOCK_MONOTONIC_RAW` in nanoseconds, on standard error. It ends when the
//! guest resets itself.

use std::fs::File;
use std::io::{Seek, SeekFrom, stdout};
use std::os::unix::fs::FileExt;

use accounting::clock::monotonic_raw_ns;
use anyhow::{Context, Result, bail};
use kvm_ioctls::{Kvm, VcpuExit};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use rustix::thread::{CpuSet, sched_setaffinity};
use vcpu::setup::{self, Topology};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vm_superio::{Serial, Trigger};
use vmm::boot::{Entry, Protocol, regs};
use vmm::config::HugePages;
use vmm::layout::{
    ACPI_TABLES_END, CMDLINE, COM1_IRQ, COM1_LEN, COM1_PORT, HIGH_MEMORY_START, I8042_COMMAND, LOW_MEMORY_END,
    PM1A_CONTROL, PM1A_EVENT, ZERO_PAGE,
};
use vmm::memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

const COM1_LAST: u16 = COM1_PORT + COM1_LEN - 1;
/// What Linux writes to the keyboard controller to be reset.
const RESET: u8 = 0xfe;
/// The PM1 control register with its lowest bit set: the kernel has the hardware (ACPI 6.5, 4.8.3.2).
const SCI_EN: [u8; 4] = [1, 0, 0, 0];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, cmdline, mem_mib, cpu] = arguments.as_slice() else {
        bail!("usage: floor KERNEL INITRD CMDLINE MEM_MIB CPU");
    };
    let memory = GuestMemory::new(mem_mib.parse()?, HugePages::Transparent)?;
    let entry = load(kernel, initrd, cmdline, &memory)?;
    regs::write_tables(memory.view(), entry)?;

    let kvm = Kvm::new().context("open /dev/kvm")?;
    let vm = vmm::kvm::create_vm(&kvm, &memory, false)?;
    let interrupt = EventFd::new(libc::EFD_NONBLOCK)?;
    vm.register_irqfd(&interrupt, COM1_IRQ)?;
    let mut serial = Serial::new(Interrupt(interrupt), stdout());
    let mut vcpu = vm.create_vcpu(0)?;
    let topology = Topology { vcpus: 1, smt: false };
    setup::apply(&vcpu, &setup::cpuid::supported(&kvm)?, topology, 0)?;
    regs::set(&vcpu, entry)?;
    let mut only = CpuSet::new();
    only.set(cpu.parse()?);
    sched_setaffinity(None, &only)?;

    eprintln!("{}", monotonic_raw_ns());
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port @ COM1_PORT..=COM1_LAST, &[byte])) => {
                let _ = serial.write(register(port), byte);
            }
            Ok(VcpuExit::IoIn(port @ COM1_PORT..=COM1_LAST, [byte])) => *byte = serial.read(register(port)),
            Ok(VcpuExit::IoOut(I8042_COMMAND, &[RESET])) => return Ok(()),
            // No event is pending or can be enabled; ACPI mode is on.
            Ok(VcpuExit::IoIn(PM1A_EVENT..PM1A_CONTROL, data)) => data.fill(0),
            Ok(VcpuExit::IoIn(PM1A_CONTROL, data)) => data.copy_from_slice(&SCI_EN[..data.len()]),
            // Nobody is there: all ones, and writes are swallowed.
            Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
            Err(error) if error.errno() == libc::EINTR => {}
            end => bail!("the guest ended: {end:?}"),
        }
    }
}

fn register(port: u16) -> u8 {
    u8::try_from(port - COM1_PORT).expect("one of COM1_LEN")
}

/// Reads both files into guest memory, and tells the kernel of what it must know: command line, initrd, memory.
fn load(kernel: &str, initrd: &str, cmdline: &str, memory: &GuestMemory) -> Result<Entry> {
    let view = memory.view();
    let address = load_elf(kernel, view).with_context(|| format!("load {kernel}"))?;
    let mut file = File::open(initrd).with_context(|| format!("open {initrd}"))?;
    let len = file.metadata()?.len();
    let start = (memory.low_end() - len) / 4096 * 4096;
    view.read_exact_volatile_from(GuestAddress(start), &mut file, usize::try_from(len)?)?;
    view.write_slice(format!("{cmdline}\0").as_bytes(), GuestAddress(CMDLINE))?;

    let mut page = boot_params {
        acpi_rsdp_addr: vmm::acpi::write(view, 1, &[])?,
        ..Default::default()
    };
    page.hdr.boot_flag = 0xaa55;
    page.hdr.header = u32::from_le_bytes(*b"HdrS");
    page.hdr.type_of_loader = 0xff; // none of the registered ones
    page.hdr.kernel_alignment = 2 << 20;
    page.hdr.cmd_line_ptr = u32::try_from(CMDLINE)?;
    page.hdr.cmdline_size = u32::try_from(cmdline.len())?;
    (page.hdr.ramdisk_image, page.hdr.ramdisk_size) = (u32::try_from(start)?, u32::try_from(len)?);
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let map = [
        (0, LOW_MEMORY_END, RAM),
        (LOW_MEMORY_END, ACPI_TABLES_END, RESERVED),
        (HIGH_MEMORY_START, memory.low_end(), RAM),
    ];
    for (slot, (start, end, r#type)) in page.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: start,
            size: end - start,
            r#type,
        };
    }
    page.e820_entries = 3;
    view.write_obj(page, GuestAddress(ZERO_PAGE))?;
    Ok(Entry {
        address,
        protocol: Protocol::Linux64,
        operating_system: true,
    })
}

/// Reads each loadable segment to where it belongs, and says where the kernel is entered. Offsets: the ELF-64 object
/// file format, figures 2 and 6.
fn load_elf(path: &str, memory: &impl GuestMemoryBackend) -> Result<u64> {
    const LOAD: u64 = 1;
    let mut file = File::open(path)?;
    let word = |at: u64| -> Result<u64> {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_le_bytes(bytes))
    };
    let (entry, table, count) = (word(24)?, word(32)?, word(56)? & 0xffff);
    let mut segments = Vec::new();
    for at in (0..count).map(|index| table + index * 56) {
        if word(at)? & 0xffff_ffff == LOAD {
            segments.push((word(at + 8)?, word(at + 24)?, word(at + 32)?));
        }
    }
    for (offset, address, len) in segments {
        file.seek(SeekFrom::Start(offset))?;
        memory.read_exact_volatile_from(GuestAddress(address), &mut file, usize::try_from(len)?)?;
    }
    Ok(entry)
}

/// An edge on the UART's interrupt line.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}
