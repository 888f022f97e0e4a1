//! One vCPU that runs a program, and what it tells.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use accounting::account::Explained;
use accounting::clock::ticks;
use accounting::host::HostCpus;
use accounting::reading::Source;
use accounting::{Account, Gtime, Reading};
use anyhow::Result;
use vcpu::{ExitHandler, Vcpu, VcpuConfig, VcpuEnd};

use super::dodge::{Dodge, Dodged};
use super::{Machine, Program, port};
use crate::kernel::Kernel;
use crate::vm::PATIENCE;

/// What happened, in the guest's order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The guest reported a figure.
    Report(Box<Report>),
    /// DONE.
    Done,
    /// The vCPU's loop ended.
    Ended(VcpuEnd),
}

/// A figure, and what was known when it was reported.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// What the guest says.
    pub value: u64,
    /// At the exit that began to tell READY, if one did.
    pub ready: Option<Mark>,
    /// At the exit that began to report.
    pub told: Mark,
    /// How the guest dodged ticks until then, if it does.
    pub dodged: Dodged,
    /// From READY to `told`, in TSC ticks, less what handling the exits between took: time in `KVM_RUN`.
    pub in_run: u64,
}

/// One exit, seen by the vCPU thread while it handled it.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// A reading made there and then.
    pub reading: Reading,
    /// The host's TSC: the last thing of READY's handling, the first of REPORT's. Between the two is `KVM_RUN` and
    /// little else.
    pub tsc: u64,
    /// What each source of guest time says of that instant.
    pub figures: Vec<Figure>,
    /// What the kernel says of the thread and of its CPU: before READY's reading, after REPORT's.
    pub kernel: Kernel,
}

/// Guest time by one source, since the vCPU thread's first stamp, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figure {
    /// Which one.
    pub source: Source,
    /// Its best guess.
    pub point: u64,
    /// Not less than this.
    pub lower: u64,
    /// Not more than this.
    pub upper: u64,
}

/// A reading, and what each of the account's sources says by itself.
fn figures(account: &Account) -> (Reading, Vec<Figure>) {
    // On the vCPU's own thread there is no writer to be outrun by.
    let Explained { reading, explain } = account.explain().expect("the thread is there, and writes nothing");
    let figures = explain.sources.iter().filter_map(|claim| {
        let bounds = claim.gtime_bounds_ns?;
        Some(Figure {
            source: claim.source,
            point: claim.gtime_ns?,
            lower: bounds.lower,
            upper: bounds.upper,
        })
    });
    (reading, figures.collect())
}

/// A program on a vCPU: held, until it is resumed.
#[derive(Debug)]
pub struct Guest {
    /// Dropped, and so stopped, before the machine.
    pub vcpu: Vcpu,
    /// The guest's TSC frequency.
    pub tsc_khz: u32,
    events: Receiver<Event>,
    _machine: Machine,
}

impl Guest {
    /// Makes a microVM of `program`, and its only vCPU, pinned to `pin`.
    ///
    /// # Errors
    /// What KVM, or the vCPU, refused.
    pub fn new(program: &Program, pin: Option<u32>) -> Result<Self> {
        Self::by(program, pin, Gtime::default())
    }

    /// As [`Guest::new`], guest time derived as `gtime` says.
    ///
    /// # Errors
    /// What KVM, or the vCPU, refused.
    pub fn by(program: &Program, pin: Option<u32>, gtime: Gtime) -> Result<Self> {
        let mut machine = Machine::new(program, 1)?;
        let (tell, events) = channel();
        let listener = Arc::new(Listener {
            tell,
            account: OnceLock::new(),
            begun: Mutex::new(Begun::new()),
        });
        let config = VcpuConfig {
            index: 0,
            pin,
            host: Arc::new(HostCpus::read()?),
            gtime,
        };
        let vcpu = Vcpu::spawn(config, machine.vcpus.remove(0), listener.clone())?;
        // The vCPU is held, so no exit comes before this.
        let _ = listener.account.set(vcpu.account().clone());
        Ok(Self {
            vcpu,
            tsc_khz: machine.tsc_khz,
            events,
            _machine: machine,
        })
    }

    /// A new, running one: on a nohz_full CPU where the host has one, else wherever the scheduler puts it.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn running(program: &Program) -> Self {
        let host = HostCpus::read().expect("sysfs");
        let tickless = host
            .nohz_full
            .as_ref()
            .and_then(|cpus| cpus.intersection(&host.allowed).next().copied());
        let guest = Self::new(program, tickless).unwrap_or_else(|error| panic!("{error:#}"));
        guest.vcpu.resume();
        guest
    }

    /// A reading.
    #[must_use]
    pub fn read(&self) -> Reading {
        self.vcpu.account().read()
    }

    /// What happens next.
    ///
    /// # Panics
    /// When nothing does for a long time.
    #[must_use]
    pub fn next(&self) -> Event {
        self.events.recv_timeout(PATIENCE).expect("the guest tells something")
    }
}

struct Listener {
    tell: Sender<Event>,
    account: OnceLock<Arc<Account>>,
    begun: Mutex<Begun>,
}

/// A report that the guest has not made whole yet.
struct Begun {
    ready: Option<Mark>,
    /// The figure's low half, and its mark.
    low: Option<(u32, Mark)>,
    dodge: Dodge,
    /// When the last exit's handling ended, in TSC ticks.
    left: u64,
    /// Since READY, in TSC ticks.
    in_run: u64,
}

impl Begun {
    fn new() -> Self {
        Self {
            ready: None,
            low: None,
            dodge: Dodge::new(),
            left: 0,
            in_run: 0,
        }
    }
}

impl Listener {
    fn figures(&self) -> (Reading, Vec<Figure>) {
        figures(self.account.get().expect("set before the vCPU was resumed"))
    }

    fn tell(&self, event: Event) {
        // Nobody listens once the test is over.
        let _ = self.tell.send(event);
    }
}

impl ExitHandler for Listener {
    fn io_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn io_write(&self, port: u16, data: &[u8]) {
        let tsc = ticks();
        let mut begun = self.begun.lock().expect("one vCPU");
        begun.in_run += tsc - begun.left;
        match port {
            port::READY => {
                let kernel = Kernel::read();
                let (reading, figures) = self.figures();
                let mark = Mark {
                    reading,
                    tsc,
                    figures,
                    kernel,
                };
                begun.in_run = 0;
                begun.ready.insert(mark).tsc = ticks();
            }
            port::REPORT => {
                let half = u32::from_le_bytes(data.try_into().expect("32 bits wide"));
                match begun.low.take() {
                    None => {
                        begun.dodge.slice_ended();
                        let (reading, figures) = self.figures();
                        let kernel = Kernel::read();
                        let mark = Mark {
                            reading,
                            tsc,
                            figures,
                            kernel,
                        };
                        begun.low = Some((half, mark));
                    }
                    Some((low, told)) => self.tell(Event::Report(Box::new(Report {
                        value: u64::from(half) << 32 | u64::from(low),
                        ready: begun.ready.take(),
                        told,
                        dodged: begun.dodge.dodged,
                        in_run: begun.in_run,
                    }))),
                }
            }
            port::SLEEP => {
                let us = u32::from_le_bytes(data.try_into().expect("32 bits wide"));
                std::thread::sleep(Duration::from_micros(us.into()));
            }
            port::DODGE => begun.dodge.sleep_across_the_tick(),
            port::DONE => self.tell(Event::Done),
            _ => {}
        }
        begun.left = ticks();
    }

    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _: u64, _: &[u8]) {}

    fn ended(&self, _: u32, end: VcpuEnd) {
        self.tell(Event::Ended(end));
    }
}
