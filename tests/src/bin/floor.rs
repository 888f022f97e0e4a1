//! The floor that start-up is measured against: the shortest loop that starts a kernel and an initrd.
//!
//! `floor VMLINUX INITRD CMDLINE MIB`: one vCPU, memory below 3 GiB, in-kernel interrupt controller and timer, COM1 as a
//! place to write to, the 64-bit boot protocol (Documentation/arch/x86/boot.rst), no ACPI. Nothing is checked that the
//! kernel does not need; ends when the guest resets through the keyboard controller. The first line on stderr is
//! `CLOCK_MONOTONIC_RAW` before the first `KVM_RUN`, in nanoseconds.

#![expect(unsafe_code, reason = "memory handed to KVM")]

use std::fs::File;
use std::io::Write;

use accounting::clock::monotonic_raw_ns;
use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{Cmdline, KernelLoader, load_cmdline};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const HUGE_PAGE: usize = 2 << 20;
const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
const KERNEL: u64 = 0x10_0000;

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().collect();
    let [_, kernel, initrd, cmdline, mib] = &arguments[..] else {
        bail!("usage: floor VMLINUX INITRD CMDLINE MIB")
    };
    let size = mib.parse::<usize>()? << 20;
    let memory = memory(size)?;

    let loaded = Elf::load(&memory, None, &mut File::open(kernel)?, Some(GuestAddress(KERNEL)))?;
    let mut text = Cmdline::new(2048)?;
    text.insert_str(cmdline)?;
    load_cmdline(&memory, GuestAddress(CMDLINE), &text)?;
    let mut initrd = File::open(initrd)?;
    let initrd_size = usize::try_from(initrd.metadata()?.len())?;
    let initrd_at = (size - initrd_size) & !0xfff;
    memory.read_exact_volatile_from(GuestAddress(initrd_at as u64), &mut initrd, initrd_size)?;

    let mut params = boot_params::default();
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448;
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE)?;
    params.hdr.cmdline_size = u32::try_from(cmdline.len())?;
    params.hdr.ramdisk_image = u32::try_from(initrd_at)?;
    params.hdr.ramdisk_size = u32::try_from(initrd_size)?;
    params.e820_table[0] = boot_e820_entry {
        addr: 0,
        size: 0x9_fc00,
        r#type: 1,
    };
    params.e820_table[1] = boot_e820_entry {
        addr: KERNEL,
        size: size as u64 - KERNEL,
        r#type: 1,
    };
    params.e820_entries = 2;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(ZERO_PAGE)), &memory)?;

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.set_tss_address(0xfffb_d000)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    let region = kvm_userspace_memory_region {
        memory_size: size as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: the mapping is `size` long and lives as long as the process.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    registers(&vcpu, &memory, loaded.kernel_load.0)?;

    let mut console = std::io::stdout().lock();
    eprintln!("{}", monotonic_raw_ns());
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(0x3f8, data) => console.write_all(data).and_then(|()| console.flush())?,
            // The line status register: the transmitter is empty, always.
            VcpuExit::IoIn(0x3fd, data) => data.fill(0x60),
            VcpuExit::IoOut(0x64, [0xfe]) | VcpuExit::Shutdown => return Ok(()),
            VcpuExit::IoIn(_, data) => data.fill(0),
            VcpuExit::MmioRead(_, data) => data.fill(0xff),
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) | VcpuExit::Intr => {}
            other => bail!("{other:?}"),
        }
    }
}

/// Guest memory at a 2 MiB boundary, advised for huge pages.
fn memory(size: usize) -> Result<GuestMemoryMmap> {
    // SAFETY: a new mapping at an address of the kernel's choice touches no other.
    let reserved = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            size + HUGE_PAGE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?
    };
    let base = reserved.map_addr(|a| a.next_multiple_of(HUGE_PAGE));
    // SAFETY: inside the mapping just made; the advice changes nothing that can be seen.
    unsafe { madvise(base, size, Advice::LinuxHugepage)? };
    // SAFETY: `size` bytes from `base` are inside the mapping, which is never unmapped.
    let region =
        unsafe { MmapRegion::build_raw(base.cast(), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)? };
    let region = GuestRegionMmap::new(region, GuestAddress(0)).context("the region ends past the address space")?;
    Ok(GuestMemoryMmap::from_regions(vec![region])?)
}

/// 64-bit mode with the first GiB mapped to itself, `rsi` at the zero page.
fn registers(vcpu: &kvm_ioctls::VcpuFd, memory: &GuestMemoryMmap, entry: u64) -> Result<()> {
    for (i, descriptor) in [0u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
        .iter()
        .enumerate()
    {
        memory.write_obj(*descriptor, GuestAddress(GDT + 8 * i as u64))?;
    }
    memory.write_obj(PML4 + 0x1003, GuestAddress(PML4))?;
    memory.write_obj(PML4 + 0x2003, GuestAddress(PML4 + 0x1000))?;
    for i in 0..512u64 {
        memory.write_obj((i << 21) + 0x83, GuestAddress(PML4 + 0x2000 + 8 * i))?;
    }
    let mut sregs = vcpu.get_sregs()?;
    let flat = |selector, type_, l| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x10, 11, 1);
    [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] = [flat(0x18, 3, 0); 5];
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 31);
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5;
    sregs.cr0 = 1 << 31 | 1 << 4 | 1;
    sregs.efer = 1 << 8 | 1 << 10;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rsi, regs.rflags) = (entry, ZERO_PAGE, 2);
    vcpu.set_regs(&regs)?;
    Ok(())
}
