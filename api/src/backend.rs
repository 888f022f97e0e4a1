//! What the API needs of a microVM, and no more: actions go to the VMM thread as messages, readings do not go there at all.
//!
//! The trait is the seam at which the REST surface is tested without KVM.

use accounting::disturbance::Disturbance;
use accounting::reading::Histograms;
use accounting::{Explained, Reading};
use vmm::requests::Requests;
use vmm::{Action, ActionError, Reply, VmmHandle};

/// Called with the answer to an action, on the VMM thread: it must not block.
pub type Answer = Box<dyn FnOnce(Result<Reply, ActionError>) + Send>;

/// A microVM, as the API sees it.
pub trait Backend: Send + Sync + 'static {
    /// Hands `action` to the VMM thread. An `answer` dropped without being called means that the microVM has ended.
    fn send(&self, action: Action, answer: Answer);

    /// The microVM's name; empty where it has none.
    fn id(&self) -> &str {
        ""
    }

    /// Where requests are counted, if anywhere.
    fn requests(&self) -> Option<&Requests> {
        None
    }

    /// How many vCPUs can be read: none before the start.
    fn vcpus(&self) -> usize;

    /// A reading of vCPU `index`, the running slice included; `None` where there is no such vCPU. Takes about as long as
    /// a few system calls, and never enters the VMM thread.
    fn read(&self, index: usize) -> Option<Reading>;

    /// As [`Backend::read`], and what the reading was made of. `None` too where nothing more can be said of the vCPU.
    fn explain(&self, index: usize) -> Option<Explained>;

    /// How long vCPU `index`'s stays in `KVM_RUN` and the handling of its exits took; `None` where there is no such vCPU.
    fn histograms(&self, index: usize) -> Option<Histograms>;

    /// What disturbs vCPU `index`, looked for now: see [`Account::disturbances`](accounting::Account::disturbances).
    fn disturbances(&self, index: usize) -> Vec<Disturbance>;
}

impl Backend for VmmHandle {
    fn send(&self, action: Action, answer: Answer) {
        Self::send(self, action, answer);
    }

    fn id(&self) -> &str {
        Self::id(self)
    }

    fn requests(&self) -> Option<&Requests> {
        Some(Self::requests(self))
    }

    fn vcpus(&self) -> usize {
        self.accounts().get().map_or(0, Vec::len)
    }

    fn read(&self, index: usize) -> Option<Reading> {
        Some(self.accounts().get()?.get(index)?.read())
    }

    fn explain(&self, index: usize) -> Option<Explained> {
        self.accounts().get()?.get(index)?.explain()
    }

    fn histograms(&self, index: usize) -> Option<Histograms> {
        Some(self.accounts().get()?.get(index)?.histograms())
    }

    fn disturbances(&self, index: usize) -> Vec<Disturbance> {
        let account = self.accounts().get().and_then(|accounts| accounts.get(index));
        account.map_or_else(Vec::new, |account| account.disturbances())
    }
}

/// A microVM of thin air: its lifecycle is the real one, over a machine that is not there; its readings are made up.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fake {
    use accounting::account::{Explanation, ProbeValues, SourceClaim};
    use accounting::reading::{Bounds, Exits, Histogram, HostCpu, Mode, Modes, Pending, Source, VcpuState};
    use vmm::RunState;
    use vmm::config::{BootSource, MachineConfig};
    use vmm::fake::FakeVm;

    use super::*;

    /// A reading with a figure in it.
    pub(crate) fn reading(index: u32) -> Reading {
        Reading {
            index,
            tid: 4242,
            state: VcpuState::Guest,
            at_ns: 123_456_789_012,
            elapsed_ns: 5_000_000_000,
            utime_ns: 4_900_000_000,
            stime_ns: 60_000_000,
            gtime_ns: 4_890_000_000,
            modes: Modes {
                guest_ns: 4_890_000_000,
                host_user_ns: 10_000_000,
                host_kernel_ns: 60_000_000,
                halted_ns: 40_000_000,
                ..Modes::default()
            },
            pending: Pending {
                mode: Mode::Guest,
                delta_ns: 812_345,
            },
            gtime_bounds_ns: Bounds {
                lower: 4_889_000_000,
                upper: 4_891_000_000,
            },
            source: Source::Vtime,
            exits: Exits::default(),
            host_cpu: HostCpu {
                cpu: 3,
                pinned: false,
                nohz_full: true,
                isolated: true,
                tick_stopped: Some(true),
            },
        }
    }

    /// See the module.
    #[derive(Debug)]
    pub(crate) struct Fake(FakeVm);

    impl Fake {
        /// In `state`, with two vCPUs.
        #[cfg_attr(not(test), expect(dead_code, reason = "the tests' alone"))]
        pub(crate) fn new(state: RunState) -> Self {
            let fake = Self(FakeVm::new());
            let config = MachineConfig {
                vcpu_count: 2,
                ..MachineConfig::default()
            };
            fake.0.act(Action::PutMachineConfig(config)).unwrap();
            let boot = BootSource {
                kernel_image_path: "/vmlinux".into(),
                boot_args: None,
                initrd_path: None,
            };
            if state != RunState::NotStarted {
                fake.0.act(Action::PutBootSource(boot)).unwrap();
                fake.0.act(Action::Start).unwrap();
            }
            if state == RunState::Paused {
                fake.0.act(Action::Pause).unwrap();
            }
            fake
        }

        /// Over `vm`.
        #[cfg(feature = "fuzzing")]
        pub(crate) fn of(vm: FakeVm) -> Self {
            Self(vm)
        }
    }

    impl Backend for Fake {
        fn send(&self, action: Action, answer: Answer) {
            answer(self.0.act(action));
        }

        fn id(&self) -> &str {
            "fake"
        }

        fn vcpus(&self) -> usize {
            match (self.0.act(Action::GetInfo), self.0.act(Action::GetMachineConfig)) {
                (Ok(Reply::Info(info)), Ok(Reply::MachineConfig(config))) if info.state != RunState::NotStarted => {
                    config.vcpu_count.into()
                }
                _ => 0,
            }
        }

        fn read(&self, index: usize) -> Option<Reading> {
            (index < self.vcpus()).then(|| reading(u32::try_from(index).unwrap()))
        }

        fn histograms(&self, index: usize) -> Option<Histograms> {
            let one = |of| Histogram::new(&std::array::from_fn(|i| u64::from(i == of)), 1u64 << of);
            (index < self.vcpus()).then(|| Histograms {
                index: u32::try_from(index).unwrap(),
                run: one(20),
                vmm: one(5),
            })
        }

        fn disturbances(&self, index: usize) -> Vec<Disturbance> {
            let tickless = false;
            let (tid, pinned, allowed) = (4242, 3, "0-3".to_owned());
            let moved = Disturbance::MovedAffinity {
                tid,
                pinned,
                allowed,
                tickless,
            };
            if index == 1 { vec![moved] } else { Vec::new() }
        }

        fn explain(&self, index: usize) -> Option<Explained> {
            let probes = ProbeValues {
                sched_ns: 4_960_000_000,
                virt_ns: None,
                prof_ns: None,
                stat_guest_time_clk: 489,
                stat_processor: 3,
                run_delay_ns: 0,
                halt_wait_ns: Some(40_000_000),
                halt_poll_ns: Some(0),
                blocking: Some(false),
            };
            let claim = SourceClaim {
                source: Source::Vtime,
                gtime_ns: None,
                gtime_bounds_ns: None,
                unavailable: Some("the vCPU is not pinned to one host CPU".to_owned()),
            };
            Some(Explained {
                reading: self.read(index)?,
                explain: Explanation {
                    sources: vec![claim],
                    probes,
                    probes_at_first_stamp: probes,
                },
            })
        }
    }
}
