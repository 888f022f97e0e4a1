//! From the command line to a running guest, and from the guest's end to an exit status.
//!
//! The order matters, so that a failure leaves nothing behind: signals are blocked before there is any thread; sockets are
//! bound before the guest starts, as their errors are the user's to fix; the terminal is made raw once the guest runs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use accounting::GtimeSource;
use anyhow::{Context, Result};
use vmm::config::{BootSource, HugePages, MachineConfig};
use vmm::{Action, ActionError, Options, Vmm, VmmHandle};

use crate::cli::{Run, Serve};
use crate::console::{self, Typing};
use crate::exit::{self, Asked, OnReboot};
use crate::routes::Limits;
use crate::server::{Listeners, Server};
use crate::socket::{self, SocketFile};
use crate::{config_file, log, signals};

/// What both modes come down to.
struct Plan {
    id: String,
    unix: Option<PathBuf>,
    tcp: Option<SocketAddr>,
    limits: Limits,
    /// What to configure, and then to start at once; `None`: the API's clients do both.
    configure: Option<Vec<Action>>,
    gtime_source: GtimeSource,
    /// Puts what is wrong with that in its user's words.
    in_words: fn(&ActionError) -> String,
    on_reboot: OnReboot,
}

/// `chronovisor run`.
///
/// # Errors
/// What failed before the guest ran.
pub fn run(args: Run) -> Result<u8> {
    log::start(&args.log)?;
    let machine = MachineConfig {
        vcpu_count: args.cpus,
        mem_size_mib: args.mem,
        huge_pages: HugePages::Transparent,
        ..MachineConfig::default()
    };
    let boot = BootSource {
        kernel_image_path: args.kernel,
        boot_args: Some(args.cmdline),
        initrd_path: args.initrd,
    };
    launch(Plan {
        id: args.id,
        unix: args.api_sock,
        tcp: args.api_listen,
        limits: Limits::default(),
        configure: Some(vec![
            Action::PutMachineConfig(machine),
            Action::PutBootSource(boot),
            Action::SetPinning(args.pin),
        ]),
        gtime_source: args.gtime.source,
        in_words: by_flag,
        on_reboot: OnReboot::Report,
    })
}

/// Server mode.
///
/// # Errors
/// What failed before the guest ran.
pub fn serve(args: Serve) -> Result<u8> {
    log::start(&args.log)?;
    for flag in args.ignored.noticeable() {
        tracing::warn!("{flag} has no effect here");
    }
    let configure = match &args.config_file {
        None => None,
        Some(path) => {
            let config = config_file::read(path).with_context(|| format!("--config-file {}", path.display()))?;
            let machine = config.machine_config.map(Action::PutMachineConfig);
            Some(
                machine
                    .into_iter()
                    .chain(config.boot_source.map(Action::PutBootSource))
                    .collect(),
            )
        }
    };
    launch(Plan {
        id: args.id,
        unix: (!args.no_api).then_some(args.api_sock),
        tcp: args.api_listen,
        limits: Limits {
            body_bytes: args.http_api_max_payload_size,
            ..Limits::default()
        },
        configure,
        gtime_source: args.gtime.source,
        in_words: ToString::to_string,
        on_reboot: OnReboot::Succeed,
    })
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
    let blocked = signals::block().context("the signals that end it cannot be blocked")?;
    let (unix, socket_file) = plan.unix.as_deref().map(socket::bind).transpose()?.unzip();
    let tcp = plan.tcp.map(socket::bind_tcp).transpose()?;
    let (typing, console) = console::open().context("the guest's console cannot be opened")?;
    let options = Options {
        id: plan.id,
        console,
        gtime_source: plan.gtime_source,
    };
    let (vmm, handle) = Vmm::spawn(options).context("the VMM's thread cannot be started")?;
    let session = Arc::new(Session {
        handle: handle.clone(),
        typing: Mutex::new(Some(typing)),
        asked: OnceLock::new(),
        socket_file: socket_file.as_ref().map_or_else(Weak::new, Arc::downgrade),
    });
    signals::watch(blocked, {
        let session = session.clone();
        move |signal| session.stop(Asked::Signal(signal))
    })
    .context("the thread that waits for signals cannot be started")?;

    // A guest given on the command line is started before the API is served: nobody configures it in between.
    if let Some(actions) = plan.configure {
        for action in actions.into_iter().chain([Action::Start]) {
            handle
                .request(action)
                .map_err(|error| anyhow::Error::msg((plan.in_words)(&error)))?;
        }
        session.open_console();
    }
    let server = if unix.is_some() || tcp.is_some() {
        let started = {
            let session = session.clone();
            move || session.open_console()
        };
        let listeners = Listeners { unix, tcp };
        let server = Server::spawn(listeners, Arc::new(handle), plan.limits, started);
        Some(server.context("the API's thread cannot be started")?)
    } else {
        None
    };

    let end = vmm.join();
    drop(server);
    drop(socket_file);
    console::restore();
    let (status, word) = exit::of(&end, session.asked.get().map(|&(asked, _)| asked), plan.on_reboot);
    exit::say(&word);
    Ok(status)
}

/// What the threads that may end the microVM, or attach to it, share.
struct Session {
    handle: VmmHandle,
    /// Taken when the guest starts.
    typing: Mutex<Option<Typing>>,
    /// Who asked for the end first, and when.
    asked: OnceLock<(Asked, Instant)>,
    /// Weak: the file goes with [`launch`], on every way out of it.
    socket_file: Weak<SocketFile>,
}

/// How long after a request to end another one means that the first is not obeyed. Service managers send several at once.
const PATIENCE: Duration = Duration::from_secs(1);

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

    /// Ends the microVM; or, asked again when that has had no effect, this process.
    fn stop(&self, asked: Asked) {
        let Err((asked, now)) = self.asked.set((asked, Instant::now())) else {
            return self.handle.send(Action::Stop, |_| {});
        };
        if self.asked.get().is_some_and(|&(_, first)| now - first < PATIENCE) {
            return;
        }
        console::restore();
        if let Some(file) = self.socket_file.upgrade() {
            file.remove();
        }
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
