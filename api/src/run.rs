//! From the command line to a running guest, and from the guest's end to an exit status.
//!
//! The order matters, so that a failure leaves nothing behind: signals are blocked before there is any thread; sockets are
//! bound before the guest starts, as their errors are the user's to fix; the terminal is made raw once the guest runs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use accounting::GtimeSource;
use anyhow::{Context, Result};
use rustix::time::ClockId;
use seccomp::{Given, Policy, Role};
use vmm::config::{BootSource, Entropy, HugePages, MachineConfig, Metrics};
use vmm::log::LogSink;
use vmm::mmds::data::DEFAULT_LIMIT_BYTES;
use vmm::{Action, ActionError, End, Options, Reply, Unstarted, VmmHandle};

use crate::cli::{Run, Seccomp, Serve, StartTimes, Tcp};
use crate::console::{self, Typing};
use crate::ending::{Asked, Deed, Ending};
use crate::exit::{self, OnReboot};
use crate::jail::handover;
use crate::routes::Limits;
use crate::server::{Listeners, Server};
use crate::socket::{self, Reach};
use crate::step::Step;
use crate::token::Token;
use crate::{config_file, descriptors, heap, log, signals};

/// What both modes come down to.
struct Plan {
    id: String,
    unix: Option<PathBuf>,
    tcp: Tcp,
    limits: Limits,
    configure: Configure,
    gtime_source: GtimeSource,
    log: LogSink,
    mmds_limit_bytes: usize,
    policy: Policy,
    started: StartTimes,
    /// Puts what is wrong with that in its user's words.
    in_words: fn(&ActionError) -> String,
    on_reboot: OnReboot,
}

/// What is done before the API is served.
enum Configure {
    /// All there is to do, and the start.
    AndStart(Vec<Step>),
    /// Some of it: the API's clients do the rest.
    Only(Vec<Step>),
}

/// `chronovisor run`.
///
/// # Errors
/// What failed before the guest ran.
pub fn run(args: Run) -> Result<u8> {
    let log = log::start(&args.log, &args.id)?;
    let policy = policy(&args.seccomp)?;
    let machine = MachineConfig {
        vcpu_count: args.cpus,
        mem_size_mib: args.mem,
        huge_pages: HugePages::Transparent,
        ..MachineConfig::default()
    };
    let names_root = args.cmdline.split_whitespace().any(|word| word.starts_with("root="));
    let boot = BootSource {
        kernel_image_path: args.kernel,
        boot_args: Some(args.cmdline),
        initrd_path: args.initrd,
    };
    let mut steps = vec![
        Step::new("", Action::PutMachineConfig(machine)),
        Step::new("", Action::PutBootSource(boot)),
        Step::new("", Action::SetPinning(args.pin)),
    ];
    for (index, disk) in args.disk.into_iter().enumerate() {
        let drive = disk.drive(index, index == 0 && !names_root);
        steps.push(Step::new("--disk", Action::PutDrive(drive)));
    }
    for (index, net) in args.net.into_iter().enumerate() {
        steps.push(Step::new("--net", Action::PutInterface(net.interface(index))));
    }
    steps.extend(args.vsock.map(|vsock| Step::new("--vsock", Action::PutVsock(vsock))));
    steps.extend(
        args.rng
            .then(|| Step::new("--rng", Action::PutEntropy(Entropy::default()))),
    );
    launch(Plan {
        id: args.id,
        unix: args.api_sock,
        tcp: args.tcp,
        limits: Limits::default(),
        configure: Configure::AndStart(steps),
        gtime_source: args.gtime.source,
        log,
        mmds_limit_bytes: DEFAULT_LIMIT_BYTES,
        policy,
        started: StartTimes::default(),
        in_words: by_flag,
        on_reboot: OnReboot::Report,
    })
}

/// Server mode.
///
/// # Errors
/// What failed before the guest ran.
pub fn serve(args: Serve) -> Result<u8> {
    let log = log::start(&args.log, &args.id)?;
    let policy = policy(&args.seccomp)?;
    for flag in args.ignored.noticeable() {
        tracing::warn!("{flag} has no effect here");
    }
    let metrics = args.metrics_path.map(|metrics_path| {
        let name = format!("--metrics-path {}", metrics_path.display());
        Step::new(name, Action::PutMetrics(Metrics { metrics_path }))
    });
    let metadata = args.metadata.as_deref().map(metadata).transpose()?;
    let first = metrics.into_iter().chain(metadata);
    let configure = match &args.config_file {
        None => Configure::Only(first.collect()),
        Some(path) => {
            let name = format!("--config-file {}", path.display());
            let steps = config_file::read(path).with_context(|| name.clone())?;
            let named = steps
                .into_iter()
                .map(|step| Step::new(format!("{name}: {}", step.name), step.action));
            Configure::AndStart(first.chain(named).collect())
        }
    };
    launch(Plan {
        id: args.id,
        unix: (!args.no_api).then_some(args.api_sock),
        tcp: args.tcp,
        limits: Limits {
            body_bytes: args.http_api_max_payload_size,
            ..Limits::default()
        },
        configure,
        gtime_source: args.gtime.source,
        log,
        mmds_limit_bytes: args.mmds_size_limit.unwrap_or(args.http_api_max_payload_size),
        policy,
        started: args.started,
        in_words: ToString::to_string,
        on_reboot: OnReboot::Succeed,
    })
}

/// `--no-seccomp` and `--seccomp-filter`.
fn policy(args: &Seccomp) -> Result<Policy> {
    Ok(match &args.seccomp_filter {
        _ if args.no_seccomp => Policy::None,
        None => Policy::Shipped,
        Some(path) => {
            let name = || format!("--seccomp-filter {}", path.display());
            let json = config_file::read_json(path).with_context(name)?;
            Policy::Given(Given::from_json(&json).with_context(name)?)
        }
    })
}

/// `--metadata`.
fn metadata(path: &Path) -> Result<Step> {
    let name = format!("--metadata {}", path.display());
    let text = config_file::read_json(path).with_context(|| name.clone())?;
    let document = serde_json::from_slice(&text).with_context(|| format!("{name}: is not JSON"))?;
    Ok(Step::new(name, Action::PutMmds(document)))
}

/// The VMM speaks of fields of the API; who typed `run` knows its flags.
fn by_flag(error: &ActionError) -> String {
    let flag = |word: &str| {
        let name = word.trim_end_matches([',', ';', ':']);
        let flag = match name {
            "mem_size_mib" => "--mem",
            "vcpu_count" => "--cpus",
            _ => name,
        };
        format!("{flag}{}", &word[name.len()..])
    };
    let line = error.to_string();
    line.split(' ').map(flag).collect::<Vec<_>>().join(" ")
}

fn launch(plan: Plan) -> Result<u8> {
    seccomp::choose(plan.policy);
    // The first question for the time asks where the vDSO is, by calls that no role may make: prctl(2), and open(2) before Linux 6.4.
    let _ = accounting::clock::monotonic_raw_ns();
    handover::take();
    signals::ignore_file_size_limit();
    let blocked = signals::block().context("the signals that end it cannot be blocked")?;
    let served = plan.unix.is_some() || plan.tcp.api_listen.is_some();
    let server = served
        .then(Server::spawn)
        .transpose()
        .context("the API's thread cannot be started")?;
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!("the limit on open files stays what it is: {error}; a guest may run out of connections");
    }
    let unix = plan.unix.as_deref().map(socket::bind).transpose()?;
    let token = plan.tcp.api_token_file.as_deref().map(Token::read).transpose()?;
    // Only with a token, as the command line has it.
    let reach = if plan.tcp.api_listen_anywhere && token.is_some() {
        Reach::Anywhere
    } else {
        Reach::Loopback
    };
    let tcp = plan
        .tcp
        .api_listen
        .map(|address| socket::bind_tcp(address, reach))
        .transpose()?;
    let (typing, console) = console::open().context("the guest's console cannot be opened")?;
    let options = Options {
        id: plan.id,
        console,
        gtime_source: plan.gtime_source,
        log: plan.log,
        mmds_limit_bytes: plan.mmds_limit_bytes,
    };
    let (vmm, handle) = Unstarted::new(options).context("the VMM cannot be made")?;
    let session = Arc::new(Session {
        handle: handle.clone(),
        typing: Mutex::new(Some(typing)),
        ending: Mutex::default(),
    });
    // A guest given on the command line is started before the API is served: nobody configures it in between. Otherwise the API
    // comes first, for whoever spawned this waits for it: requests wait for the VMM's thread.
    let (steps, start) = match plan.configure {
        Configure::AndStart(steps) => (steps, true),
        Configure::Only(steps) => (steps, false),
    };
    let held = if let Some(server) = &server {
        let (listeners, backend) = (Listeners { unix, tcp, token }, Arc::new(handle.clone()));
        let session = session.clone();
        let started = move || session.open_console();
        let opened = if start || !steps.is_empty() {
            server.hold(listeners, backend, plan.limits, started).map(Some)
        } else {
            server.open(listeners, backend, plan.limits, started).map(|()| None)
        };
        opened.context("the API cannot be served")?
    } else {
        None
    };
    if served && held.is_none() {
        report_start(&handle, plan.started);
    }
    signals::watch(blocked, {
        let session = session.clone();
        move |signal| session.stop(Asked::Signal(signal))
    })
    .context("the thread that waits for signals cannot be started")?;
    // What can fail for want of anything has been done by now: nothing leaves the VMM behind that starts here.
    let vmm = vmm.start().context("the VMM's thread cannot be started")?;
    seccomp::enter(Role::Vmm)?;

    let steps = steps.into_iter().chain(start.then(|| Step::new("", Action::Start)));
    let done = carry_out(steps, |action| handle.request(action), plan.in_words)?;
    if done == Done::All {
        if start {
            session.open_console();
            heap::trim();
        }
        if let Some(held) = held {
            held.serve();
            report_start(&handle, plan.started);
        }
    }

    let end = vmm.join();
    drop(server);
    console::restore();
    match end {
        // No guest of it ever ran.
        End::KvmError(line) if handle.accounts().get().is_none() => Err(anyhow::Error::msg(line)),
        end => {
            let (status, word) = exit::of(&end, session.asked(), plan.on_reboot);
            exit::say(&word);
            Ok(status)
        }
    }
}

/// How far the steps came.
#[derive(Debug, PartialEq, Eq)]
enum Done {
    /// To the last one.
    All,
    /// To the microVM's end, which came before.
    ToTheEnd,
}

/// Has `request` do `steps`, one after the other. Refusals are put `in_words`.
fn carry_out(
    steps: impl IntoIterator<Item = Step>,
    request: impl Fn(Action) -> Result<Reply, ActionError>,
    in_words: fn(&ActionError) -> String,
) -> Result<Done> {
    for Step { name, action } in steps {
        match request(action) {
            Ok(_) => {}
            // A signal, or the VMM could not go on: its end says which.
            Err(ActionError::Ended) => return Ok(Done::ToTheEnd),
            Err(refusal) => return Err(anyhow::Error::msg(Step::in_words(&name, &in_words(&refusal)))),
        }
    }
    Ok(Done::All)
}

/// Tells the metrics how long it took until the API was served: nothing where the jailer has not said when it began.
fn report_start(handle: &VmmHandle, started: StartTimes) {
    let us = |clock| {
        let time = rustix::time::clock_gettime(clock);
        u64::try_from(time.tv_sec * 1_000_000 + time.tv_nsec / 1000).unwrap_or(0)
    };
    let since = |clock, begin| us(clock).saturating_sub(begin);
    let wall_us = started.start_time_us.map(|begin| since(ClockId::Monotonic, begin));
    let parent_us = started.parent_cpu_time_us.unwrap_or(0);
    let cpu_us = started
        .start_time_cpu_us
        .map(|begin| since(ClockId::ProcessCPUTime, begin) + parent_us);
    handle
        .requests()
        .served_after(wall_us.unwrap_or(0), cpu_us.unwrap_or(0));
}

/// What the threads that may end the microVM, or attach to it, share.
struct Session {
    handle: VmmHandle,
    /// Taken when the guest starts.
    typing: Mutex<Option<Typing>>,
    /// Who has asked for an end.
    ending: Mutex<Ending>,
}

impl Session {
    /// The guest runs: what is typed goes to it.
    fn open_console(self: &Arc<Self>) {
        let typing = self.typing.lock().unwrap_or_else(PoisonError::into_inner).take();
        let session = self.clone();
        let opened = typing.map(|typing| typing.start(move || session.stop(Asked::Escape)));
        if let Some(Err(error)) = opened {
            tracing::warn!("nothing typed here reaches the guest: {error}");
        }
    }

    /// Does what `asked` wants: see [`Ending`].
    fn stop(&self, asked: Asked) {
        let deed = self
            .ending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ask(asked, Instant::now());
        match deed {
            Deed::AskGuest => self.handle.send(Action::ShutDown, |reply| {
                if let Ok(Reply::GuestAsked) = reply {
                    exit::say(
                        "SIGTERM: the guest is asked to shut down, by Ctrl-Alt-Del; another SIGTERM ends it at once",
                    );
                }
            }),
            Deed::Stop => self.handle.send(Action::Stop, |_| {}),
            Deed::Wait => {}
            Deed::Exit => self.exit(asked),
        }
    }

    fn asked(&self) -> Option<Asked> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).asked()
    }

    /// Ends this process.
    fn exit(&self, asked: Asked) {
        console::restore();
        vmm::unix_socket::remove_all();
        exit::say("ended without the VMM, which did not answer");
        let status = match asked {
            Asked::Signal(signal) => exit::by_signal(signal),
            Asked::Escape => exit::INTERNAL,
        };
        std::process::exit(status.into());
    }
}

#[cfg(test)]
mod tests {
    use vmm::memory::MemoryError;

    use super::*;

    #[test]
    fn a_microvm_that_ends_between_two_steps_is_no_refusal() {
        let steps = || [Action::GetInfo, Action::GetConfig, Action::Start].map(|action| Step::new("step", action));
        let words = |error: &ActionError| format!("no: {error}");
        let answered = |to_config: fn() -> Result<Reply, ActionError>| {
            let request = |action| match action {
                Action::GetInfo => Ok(Reply::Done),
                Action::GetConfig => to_config(),
                action => panic!("{action:?} comes after the last one"),
            };
            carry_out(steps(), request, words)
        };
        assert_eq!(answered(|| Err(ActionError::Ended)).unwrap(), Done::ToTheEnd);
        let refused = answered(|| Err(ActionError::NoKernel)).unwrap_err().to_string();
        assert!(
            refused.contains("step") && refused.contains("no: Cannot start"),
            "{refused}"
        );
        assert_eq!(carry_out(steps(), |_| Ok(Reply::Done), words).unwrap(), Done::All);
    }

    #[test]
    fn who_typed_flags_is_told_of_flags() {
        let refusal = |error: MemoryError| by_flag(&ActionError::Start(error.into()));
        let too_much = refusal(MemoryError::MoreThanHost {
            asked_mib: 2049,
            host_mib: 2048,
        });
        assert_eq!(
            too_much,
            "2049 MiB of guest memory are more than this host's 2048 MiB: lower --mem"
        );
        let source = std::io::ErrorKind::OutOfMemory.into();
        let refused = refusal(MemoryError::Map { mib: 64, source });
        assert!(refused.contains("; lower --mem, or raise"), "{refused}");
    }
}
