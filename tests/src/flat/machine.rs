//! A flat guest's microVM: a page of code, identity-mapped pages, vCPUs that start in it.
#![allow(unsafe_code, reason = "handing guest memory to KVM is unsafe in kvm-ioctls")]

use anyhow::{Context, Result};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vcpu::setup::{self, Topology};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::Program;

/// One 2 MiB page, which holds all of it.
const SIZE: usize = 2 << 20;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PD: u64 = 0x4000;
/// The task state segment: for its I/O permission bitmap, which allows all ports. Some backends do not keep IOPL 3.
const TSS: u64 = 0x5000;
const TSS_SIZE: u16 = 104;
const IO_BITMAP_SIZE: u16 = 0x2000;
const CODE: u64 = 0x1_0000;

/// The microVM, its vCPUs about to run the program.
#[derive(Debug)]
pub struct Machine {
    /// One for each vCPU; all start at the program's start.
    pub vcpus: Vec<VcpuFd>,
    /// The guest's TSC frequency: as KVM knows it, within a part in a million.
    pub tsc_khz: u32,
    /// Dropped after the vCPUs, and before the memory it was given.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Machine {
    /// A microVM of `vcpus` vCPUs.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn new(program: &Program, vcpus: u32) -> Result<Self> {
        let kvm = Kvm::new().context("open /dev/kvm")?;
        let vm = kvm.create_vm().context("create a VM")?;
        // HLT is then KVM's to handle, as it is for a Linux guest.
        vm.create_irq_chip().context("create the interrupt controller")?;
        let memory = memory(program)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SIZE as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        };
        // SAFETY: the memory is mapped for as long as the VM is there: `Machine` drops it last.
        unsafe { vm.set_user_memory_region(region) }.context("give the VM its memory")?;
        let cpuid = setup::cpuid::supported(&kvm).context("ask for the CPUID")?;
        let topology = Topology { vcpus, smt: false };
        let vcpus: Vec<_> = (0..vcpus)
            .map(|index| {
                let fd = vm.create_vcpu(index.into()).context("create a vCPU")?;
                setup::apply(&fd, &cpuid, topology, index)?;
                registers(&fd, program.ring)?;
                Ok(fd)
            })
            .collect::<Result<_>>()?;
        let tsc_khz = vcpus[0].get_tsc_khz().context("ask for the TSC's frequency")?;
        Ok(Self {
            vcpus,
            tsc_khz,
            _vm: vm,
            _memory: memory,
        })
    }
}

fn memory(program: &Program) -> Result<GuestMemoryMmap> {
    /// Present, writable, user, accessed, dirty.
    const ENTRY: u64 = 0x67;
    const LARGE_PAGE: u64 = 0x80;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).context("map guest memory")?;
    for (table, entry) in [(PML4, PDPT | ENTRY), (PDPT, PD | ENTRY), (PD, LARGE_PAGE | ENTRY)] {
        memory.write_obj(entry, GuestAddress(table))?;
    }
    // The bitmap's offset is the segment's last field; a clear bit allows a port (Intel SDM vol. 1, 19.5.2).
    memory.write_obj(TSS_SIZE, GuestAddress(TSS + 102))?;
    memory.write_slice(&program.code, GuestAddress(CODE))?;
    Ok(memory)
}

/// Long mode, as far from any table in memory as it gets: segments live in the hidden registers only.
fn registers(fd: &VcpuFd, ring: u8) -> Result<()> {
    const CR0: u64 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    const CR4: u64 = 0x20; // PAE
    const EFER: u64 = 0xd01; // NXE, LMA, LME, SCE
    const RFLAGS: u64 = 0x3202; // IOPL 3, IF, and bit 1, which is always set
    let mut sregs = fd.get_sregs()?;
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        dpl: ring,
        ..Default::default()
    };
    let (code, data) = if ring == 3 { (0x33, 0x2b) } else { (0x10, 0x18) };
    sregs.cs = kvm_segment {
        selector: code,
        type_: 11,
        l: 1,
        ..flat
    };
    let data = kvm_segment {
        selector: data,
        type_: 3,
        db: 1,
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    let limit = u32::from(TSS_SIZE + IO_BITMAP_SIZE);
    sregs.tr = kvm_segment {
        base: TSS,
        limit,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    fd.set_sregs(&sregs).context("set the system registers")?;
    let mut regs = fd.get_regs()?;
    (regs.rip, regs.rflags) = (CODE, RFLAGS);
    fd.set_regs(&regs).context("set the registers")?;
    // With an in-kernel interrupt controller all but the first would wait for a SIPI that nobody sends.
    let runnable = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    fd.set_mp_state(runnable).context("make a vCPU runnable")
}
