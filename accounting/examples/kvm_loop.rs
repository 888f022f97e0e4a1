//! Accounts for a KVM loop that is not Chronovisor's: what a monitor has to add to its own to be read at any moment.
//!
//! The guest, in real mode, spins ten times for 2^27 ticks of the TSC and tells each time by a port. Meanwhile another
//! thread reads where its vCPU's time goes, the slice still running included. It runs on any `/dev/kvm`:
//!
//! ```console
//! $ cargo run --package accounting --example kvm_loop
//! ```
#![expect(unsafe_code, reason = "handing memory to KVM is unsafe in kvm-ioctls")]

use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use accounting::host::HostCpus;
use accounting::vtime::{ExitReason, VtimeWriter};
use accounting::{Account, Gtime, Open, Reading};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

type Failure = Box<dyn Error + Send + Sync>;

/// The guest's code, loaded and entered at [`ADDRESS`].
const GUEST: [u8; 25] = [
    0xb3, 0x0a, //                   mov   $10, %bl
    // slice:
    0x0f, 0x31, //                   rdtsc
    0x66, 0x89, 0xc6, //             mov   %eax, %esi
    // spin:
    0x0f, 0x31, //                   rdtsc
    0x66, 0x29, 0xf0, //             sub   %esi, %eax
    0x66, 0xc1, 0xe8, 0x1b, //       shr   $27, %eax
    0x74, 0xf5, //                   jz    spin
    0xe6, 0x10, //                   out   %al, $0x10
    0xfe, 0xcb, //                   dec   %bl
    0x75, 0xea, //                   jnz   slice
    0xf4, //                         hlt
];
const ADDRESS: u64 = 0x1000;

/// Guest memory: a page, and on a page's boundary.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

fn main() -> Result<(), Failure> {
    for reading in readings()? {
        println!(
            "{:9.3} ms: {:?}, guest {:9.3} ms in [{:.3}, {:.3}] by {:?}, VMM {:.3} ms, {} exits",
            ms(reading.elapsed_ns),
            reading.state,
            ms(reading.gtime_ns),
            ms(reading.gtime_bounds_ns.lower),
            ms(reading.gtime_bounds_ns.upper),
            reading.source,
            ms(reading.modes.host_user_ns),
            reading.exits.total,
        );
    }
    Ok(())
}

/// Runs the guest, and reads its account every 100 ms, and once more when it has ended.
pub fn readings() -> Result<Vec<Reading>, Failure> {
    let (tell, told) = channel();
    let vcpu = thread::spawn(move || run(&tell));
    let mut readings = Vec::new();
    // None comes if the vCPU could not be made: join() then says why.
    if let Ok(account) = told.recv() {
        while !vcpu.is_finished() {
            readings.push(account.read());
            thread::sleep(Duration::from_millis(100));
        }
        readings.push(account.read());
    }
    vcpu.join().expect("the vCPU thread does not panic")?;
    Ok(readings)
}

/// The vCPU's thread: a KVM loop as any other, and the lines that account for it, marked `//+`.
fn run(tell: &Sender<Arc<Account>>) -> Result<(), Failure> {
    let mut page = Box::new(Page([0; 4096]));
    page.0[..GUEST.len()].copy_from_slice(&GUEST);
    let vm = Kvm::new()?.create_vm()?;
    let region = kvm_userspace_memory_region {
        guest_phys_addr: ADDRESS,
        memory_size: 4096,
        userspace_addr: (&raw mut page.0) as u64,
        ..Default::default()
    };
    // SAFETY: the page outlives the VM and its vCPU: what was made last is dropped first.
    unsafe { vm.set_user_memory_region(region)? };
    let mut fd = vm.create_vcpu(0)?;
    let mut sregs = fd.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0); // real mode, as a vCPU is made
    fd.set_sregs(&sregs)?;
    let mut regs = fd.get_regs()?;
    (regs.rip, regs.rflags) = (ADDRESS, 2);
    fd.set_regs(&regs)?;

    let (mut writer, account) = open()?; //+
    let _ = tell.send(account.clone()); //+
    writer.resume(); //+
    let mut handled = None; //+
    let ended = loop {
        writer.guest_enter(handled); //+
        let exit = fd.run();
        writer.guest_exit(); //+
        match exit {
            Ok(VcpuExit::IoOut(0x10, _)) => handled = Some(ExitReason::Io), //+
            Ok(VcpuExit::Hlt) => break Ok(()),
            Ok(other) => break Err(format!("the guest left with {other:?}").into()),
            Err(error) => break Err(error.into()),
        }
    };
    account.close(writer); //+
    ended
}

/// Opens the account of the calling thread, the vCPU's. A monitor that pins its vCPUs, or asks KVM for their statistics, says
/// so, and is told more.
fn open() -> Result<(VtimeWriter, Arc<Account>), Failure> {
    Ok(Account::open(Open {
        index: 0,
        kvm_stats: None,
        pinned: None,
        host: Arc::new(HostCpus::read()?),
        gtime: Gtime::default(),
    })?)
}

#[expect(clippy::cast_precision_loss, reason = "to be read by people")]
fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}
