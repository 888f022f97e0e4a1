//! What people and programs talk to: the `chronovisor` command line and its REST API.
//!
//! A request that changes something is a message to the VMM thread and an answer; a reading goes straight from this room to
//! `accounting`. This room keeps no state of the microVM's own, and runs nothing on a vCPU's thread.

pub mod backend;
mod check;
mod cli;
pub mod client;
mod config_file;
mod console;
mod descriptors;
mod ending;
mod exit;
mod exporter;
mod figures;
pub mod fleet;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod heap;
mod host;
mod jail;
mod line;
mod log;
mod places;
pub mod prometheus;
pub mod routes;
mod run;
#[cfg(test)]
mod scratch;
pub mod server;
mod signals;
mod socket;
mod step;
mod times;
pub mod token;
mod top;

use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use cli::Command;

/// The `chronovisor` command: from the arguments to the exit status.
#[must_use]
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(|info| {
        // What is said on the screen of `top` goes with it.
        top::restore();
        let payload = info.payload();
        let text = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or(payload.downcast_ref::<&str>().copied());
        let message = text.unwrap_or("no message");
        // Want of something, in words of others' for which there is no error: of std, in a thread that has just begun
        // (sys/pal/unix/stack_overflow.rs), and the process is aborted next, whatever is caught; and of tokio, whose runtime listens
        // for signals if any part of the program does (signal/unix.rs).
        let want = [
            (
                "alternative stack",
                "start a thread",
                "the address space limit (ulimit -v)",
            ),
            (
                "failed to create UnixStream",
                "make the API's event loop",
                "the limit on open files (ulimit -n)",
            ),
        ];
        if let Some((_, what, limit)) = want.iter().find(|(text, ..)| message.contains(text)) {
            console::restore();
            vmm::unix_socket::remove_all();
            exit::say(&format!("cannot {what}: {message}; raise {limit}"));
            std::process::exit(exit::FAILED.into());
        }
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        exit::say(&format!(
            "a defect of chronovisor itself: {message} ({place}): please report it"
        ));
    }));
    let status = panic::catch_unwind(AssertUnwindSafe(command)).unwrap_or(exit::INTERNAL);
    console::restore();
    // The VMM may still run, where this thread could not go on.
    vmm::unix_socket::remove_all();
    ExitCode::from(status)
}

fn command() -> u8 {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    let result = match cli.command {
        Some(Command::Run(args)) => run::run(*args),
        Some(Command::Times(args)) => times::times(&args),
        Some(Command::Top(args)) => top::top(args),
        Some(Command::Check(args)) => check::check(&args),
        Some(Command::Exporter(args)) => exporter::export(*args),
        Some(Command::Jail(args)) => jail::jail(*args),
        None => run::serve(cli.serve),
    };
    result.unwrap_or_else(|error| {
        if error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        {
            // `chronovisor times --watch | head`: the reader has had enough, as SIGPIPE would have told us.
            return exit::by_signal(libc::SIGPIPE);
        }
        exit::say(&exit::one_line(&error));
        exit::FAILED
    })
}
