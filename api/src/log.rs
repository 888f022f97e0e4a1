//! Log lines: to `--log-path`, with the time; or to stderr, as a Unix tool's messages. Never a guest's output.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use anyhow::{Context, Result};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::cli::Log;

/// Starts the log, to a file or fifo, or to stderr.
///
/// # Errors
/// The file cannot be opened.
pub fn start(log: &Log) -> Result<()> {
    let to_file = log.log_path.is_some();
    let level = log
        .level
        .unwrap_or(if to_file { LevelFilter::INFO } else { LevelFilter::WARN });
    let builder = tracing_subscriber::fmt().with_max_level(level).with_ansi(false);
    match &log.log_path {
        Some(path) => {
            // A fifo opened for reading too does not wait for its reader; O_NONBLOCK: a full one loses lines, not time.
            let file = OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path);
            let file = file.with_context(|| format!("--log-path {}: cannot be opened", path.display()))?;
            builder.with_writer(Mutex::new(file)).init();
        }
        None => builder.with_writer(io::stderr).event_format(Line).init(),
    }
    Ok(())
}

/// `chronovisor: warning: message`.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            Level::INFO => "",
            _ => "debug: ",
        };
        write!(writer, "chronovisor: {level}")?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
