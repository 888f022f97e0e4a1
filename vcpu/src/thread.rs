//! The vCPU's thread: what it does before, between and after `KVM_RUN`, and the handle others have on it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use accounting::host::{CpuSet, mask, run_on};
use accounting::vtime::{ExitReason, VtimeWriter};
use accounting::{Account, Open};
use kvm_ioctls::VcpuFd;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::sched_setaffinity;
use seccomp::Role;

use crate::exit::{Next, handle};
use crate::kick::{self, Gate, Want};
use crate::others::OfVcpu;
use crate::run_page::RunPage;
use crate::{ExitHandler, VcpuConfig, VcpuEnd, VcpuError, signal, stats};

/// A vCPU thread, seen from outside. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Vcpu {
    account: Arc<Account>,
    gate: Arc<Gate>,
    page: Arc<RunPage>,
    /// `None` once joined.
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread, pinned and paused: [`Vcpu::resume`] sets it running. `fd` has its registers, CPUID, MSRs and
    /// LAPIC set.
    ///
    /// # Errors
    /// See [`VcpuError`].
    pub fn spawn<H: ExitHandler>(config: VcpuConfig, fd: VcpuFd, handler: Arc<H>) -> Result<Self, VcpuError> {
        let index = config.index;
        let prepare = |what| move |source| VcpuError::Prepare { index, what, source };
        signal::install().map_err(prepare("install the signal handler that takes it out of the guest"))?;
        let page = Arc::new(RunPage::map(&fd).map_err(prepare("map kvm_run"))?);
        let gate = Arc::new(Gate::new());
        let (opened, account) = mpsc::sync_channel(1);
        let body = {
            let (page, gate) = (page.clone(), gate.clone());
            move || {
                let _of_vcpu = OfVcpu::here();
                match open(config, &fd) {
                    Ok((writer, account)) => {
                        let _ = opened.send(Ok(account.clone()));
                        Runner {
                            index,
                            fd,
                            page,
                            gate,
                            handler,
                            writer,
                            account,
                        }
                        .run_to_the_end();
                    }
                    Err(error) => {
                        let _ = opened.send(Err(error));
                    }
                }
            }
        };
        let thread = crate::stack::thread(format!("vcpu{index}"))
            .spawn(body)
            .map_err(|source| VcpuError::Spawn { index, source })?;
        let gone = |_| VcpuError::Spawn {
            index,
            source: io::Error::other("it panicked"),
        };
        let account = account.recv().map_err(gone)??;
        Ok(Self {
            account,
            gate,
            page,
            thread: Some(thread),
        })
    }

    /// Its account.
    #[must_use]
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Takes the vCPU out of the guest and holds it. Returns when it is held, has ended, or was told something else
    /// meanwhile.
    pub fn pause(&self) {
        self.tell(Want::Hold);
        self.gate.wait_held();
    }

    /// Lets it run (again).
    pub fn resume(&self) {
        // One that is not held is running, or will look once more before it holds.
        self.gate.want(Want::Run);
    }

    /// Pins the thread to `cpu`, running or held, wherever it was. It is not taken out of the guest for it: the kernel
    /// moves it, and this returns once it has left all other CPUs. Whoever reads its account waits meanwhile, and the next
    /// reading is by what the CPU allows.
    ///
    /// # Errors
    /// What `sched_setaffinity` says, and then it is where it was: `EINVAL` where the CPU cannot be had. `ESRCH` where the
    /// vCPU has ended.
    pub fn pin(&self, cpu: u32) -> io::Result<()> {
        self.put(Some(cpu), &CpuSet::from([cpu]))
    }

    /// Leaves the thread to the scheduler, among `cpus`.
    ///
    /// # Errors
    /// As [`Vcpu::pin`].
    pub fn unpin(&self, cpus: &CpuSet) -> io::Result<()> {
        self.put(None, cpus)
    }

    fn put(&self, pinned: Option<u32>, cpus: &CpuSet) -> io::Result<()> {
        let mask = mask(cpus)?;
        self.account.put(pinned, || {
            let tid = Pid::from_raw(self.account.tid());
            let put = self.gate.while_there(|| sched_setaffinity(tid, &mask));
            Ok(put.unwrap_or(Err(Errno::SRCH))?)
        })
    }

    /// Ends its loop and joins the thread.
    pub fn stop(&mut self) {
        self.tell(Want::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic was reported where it happened, and to ExitHandler::ended.
            let _ = thread.join();
        }
    }

    fn tell(&self, want: Want) {
        if let (true, Some(thread)) = (self.gate.want(want), &self.thread) {
            kick::kick(&self.page, thread);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the thread does before anything counts: pinned first, since the account's baselines are those of the CPU it
/// will run on.
fn open(config: VcpuConfig, fd: &VcpuFd) -> Result<(VtimeWriter, Arc<Account>), VcpuError> {
    let VcpuConfig {
        index,
        pin,
        host,
        gtime,
    } = config;
    if let Some(cpu) = pin {
        run_on(&CpuSet::from([cpu])).map_err(|source| VcpuError::Pin { index, cpu, source })?;
    }
    let prepare = |what| move |source| VcpuError::Prepare { index, what, source };
    signal::mask().map_err(prepare("set the signal mask"))?;
    let kvm_stats = stats::open(fd).map_err(prepare("open KVM's statistics"))?;
    let opened = Account::open(Open {
        index,
        kvm_stats,
        pinned: pin,
        host,
        gtime,
    })
    .map_err(|source| VcpuError::Account { index, source })?;
    // Last: what comes before asks for more than a running vCPU may.
    seccomp::enter(Role::Vcpu).map_err(prepare("confine the thread"))?;
    Ok(opened)
}

/// All that the thread owns.
struct Runner<H: ExitHandler> {
    index: u32,
    fd: VcpuFd,
    page: Arc<RunPage>,
    gate: Arc<Gate>,
    handler: Arc<H>,
    writer: VtimeWriter,
    account: Arc<Account>,
}

/// Tells that the vCPU has ended, even while a panic goes by: others wait for it.
struct Farewell<H: ExitHandler> {
    index: u32,
    gate: Arc<Gate>,
    handler: Arc<H>,
    end: VcpuEnd,
}

impl<H: ExitHandler> Drop for Farewell<H> {
    fn drop(&mut self) {
        self.gate.end();
        self.handler.ended(self.index, self.end);
    }
}

impl<H: ExitHandler> Runner<H> {
    fn run_to_the_end(mut self) {
        let (gate, handler) = (self.gate.clone(), self.handler.clone());
        let mut farewell = Farewell {
            index: self.index,
            gate,
            handler,
            end: VcpuEnd::Panicked,
        };
        // Nothing of the vCPU is used after a panic but its account, and each stamp leaves that whole.
        let end = catch_unwind(AssertUnwindSafe(|| self.run()));
        self.account.close(self.writer);
        farewell.end = end.unwrap_or(VcpuEnd::Panicked);
    }

    /// The loop. Each turn of the outer one is held first, then running.
    fn run(&mut self) -> VcpuEnd {
        loop {
            match self.gate.hold() {
                Want::Stop => return VcpuEnd::Stopped,
                Want::Run | Want::Hold => self.writer.resume(),
            }
            if let Some(end) = self.run_until_told() {
                return end;
            }
            // Tells a guest with a KVM clock that it was held, so that its watchdogs forgive it
            // (Documentation/virt/kvm/api.rst, KVM_KVMCLOCK_CTRL). One without answers EINVAL, and needs no telling.
            let _ = self.fd.kvmclock_ctrl();
            self.writer.pause(Some(ExitReason::Interrupted));
        }
    }

    /// The exit path. `None` when the vCPU is to be held.
    fn run_until_told(&mut self) -> Option<VcpuEnd> {
        let mut handled = None;
        loop {
            self.writer.guest_enter(handled);
            let exit = self.fd.run();
            self.writer.guest_exit();
            match handle(&*self.handler, exit, &self.page) {
                Next::Enter(reason) => handled = Some(reason),
                Next::Look => {
                    kick::clear(&self.page);
                    match self.gate.look() {
                        Want::Run => handled = Some(ExitReason::Interrupted),
                        Want::Hold => return None,
                        Want::Stop => return Some(VcpuEnd::Stopped),
                    }
                }
                Next::End(end) => return Some(self.located(end)),
            }
        }
    }

    /// `end`, with the instruction pointer where it has a place for one.
    fn located(&self, mut end: VcpuEnd) -> VcpuEnd {
        if let VcpuEnd::InternalError { rip, .. } = &mut end {
            *rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        }
        end
    }
}
