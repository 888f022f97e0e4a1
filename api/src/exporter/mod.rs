//! `chronovisor exporter`: all microVMs of a machine on one page for Prometheus, by one process.
//!
//! ```text
//!   Prometheus --GET /metrics--> serve --> round: look for sockets, ask all of them at once
//!                                            |        each until the deadline, and no longer
//!                                            |   scrape: one socket's answer, checked by parse
//!                                            v
//!                                          page: families merged, a `socket` label in each sample
//! ```
//!
//! Nothing is asked unless somebody asks for the page, and nothing is kept between two of them but when each socket was last
//! good (`memory`). What a socket answers is checked line by line before any of it is passed on, so a socket that is no
//! microVM's, or one that lies, costs the page nothing but its own samples.
//!
//! It reads, and changes nothing; but it has to be allowed to open the sockets, which are their owners' alone.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod memory;
mod page;
mod parse;
mod process;
mod round;
mod scrape;
mod serve;
#[cfg(test)]
mod tests;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::Log;
use crate::fleet::{Fleet, Pattern};
use crate::{exit, log};
use round::Rounds;

/// Loopback, unless told otherwise. Prometheus's list of exporters' ports has given away all from 9100 to 9999
/// (<https://github.com/prometheus/prometheus/wiki/Default-port-allocations>): this one is above them, and in nobody's way that is
/// known. It is to be entered there when this program is published.
const DEFAULT_LISTEN: &str = "127.0.0.1:10177";

/// What to read of it, for `--help`.
pub const HELP: &str = "\
Each sample has a label \"socket\", the path it was read from, beside the microVM's own \"id\".
chronovisor_up is 0 for a microVM that did not answer in time, or is gone;
chronovisor_last_good_scrape_age_seconds tells since when.

Sockets have mode 0600: run this as the user who runs the microVMs, or as root.

Examples:
  chronovisor exporter
  chronovisor exporter --sockets '/srv/vms/*/api.socket' --sockets /run/chronovisor
  curl -s http://127.0.0.1:10177/metrics

SIGTERM or Ctrl-C ends it, with status 0.";

/// The command line of `chronovisor exporter`.
#[derive(Args, Debug)]
pub struct Exporter {
    /// Serve on this address: whoever can reach it may read the figures, and change nothing
    #[arg(long, value_name = "ADDR:PORT", default_value = DEFAULT_LISTEN)]
    listen: SocketAddr,
    /// The microVMs: a glob of API sockets (quote it), a directory of them, or one; may be given again. Looked for anew at each scrape
    /// [default: /run/chronovisor.socket and /run/chronovisor/*.socket]
    #[arg(long, value_name = "PATTERN")]
    sockets: Vec<Pattern>,
    /// Longest wait for any of them, in milliseconds; less where Prometheus says that it waits for less
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    timeout: u64,
    /// How long a microVM that has gone is still told of, in seconds
    #[arg(long, value_name = "S", default_value_t = 300)]
    forget: u64,
    /// The log.
    #[command(flatten)]
    log: Log,
}

/// Serves until a signal ends it.
///
/// # Errors
/// The address cannot be listened on, the log not written.
pub fn export(args: Exporter) -> Result<u8> {
    log::start(&args.log, "exporter")?;
    // One a socket is open during a scrape. Where the limit cannot be raised, sockets beyond it fail by themselves.
    if let Err(error) = crate::descriptors::raise_limit() {
        tracing::debug!("the limit of open descriptors stays as it is: {error}");
    }
    process::keep_off_tickless_cpus();
    let listen = || {
        let listener = TcpListener::bind(args.listen)?;
        listener.set_nonblocking(true)?;
        Ok::<_, std::io::Error>((listener.local_addr()?, listener))
    };
    let (address, listener) = listen().with_context(|| {
        format!(
            "--listen {}: cannot listen there: choose another address or port",
            args.listen
        )
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Directories are read there, one look at a time.
        .max_blocking_threads(2)
        .build()
        .context("the runtime cannot be started")?;
    let rounds = Rounds::new(
        Fleet::new(args.sockets),
        Duration::from_millis(args.timeout),
        Duration::from_secs(args.forget),
    );
    let ended = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be waited for")?;
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be waited for")?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        exit::say(&format!("serving http://{address}/metrics"));
        let stop = async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        };
        serve::serve(listener, Arc::new(rounds), stop).await;
        Ok(0)
    });
    // A look at a file system that hangs is not waited for.
    runtime.shutdown_background();
    ended
}
