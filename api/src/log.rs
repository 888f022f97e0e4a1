//! Log lines: to a file or fifo, as Firecracker writes them; or to stderr, as a Unix tool's messages. Never a guest's output.
//!
//! What `--log-path` and its companions set, `PUT /logger` may change before the guest starts, as often as it likes.
//!
//! ```text
//! 2018-11-07T05:34:25.180751Z [anonymous-instance:vmm:INFO:vmm/src/lifecycle.rs:310] what happened
//!                              --id               thread  --show-level, --show-log-origin
//! ```

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, Result};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use vmm::config::{Level, Logger};
use vmm::log::{LogError, LogSink, append_to};

use crate::cli::Log;

/// Which lines are logged.
#[derive(Clone, Debug)]
struct Wanted {
    level: LevelFilter,
    /// The beginning of the module's path.
    module: Option<String>,
}

impl<S: Subscriber> Layer<S> for Wanted {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        let of_module = |module: &String| metadata.target().starts_with(module.as_str());
        if *metadata.level() <= self.level && self.module.as_ref().is_none_or(of_module) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }
}

/// Where they go, and what they look like.
#[derive(Debug, Default)]
struct Place {
    /// stderr, where there is none.
    file: Option<File>,
    id: String,
    show_level: bool,
    show_origin: bool,
}

type Shared = Arc<RwLock<Place>>;

/// Starts the log, as the command line says.
///
/// # Errors
/// The file cannot be opened.
pub fn start(log: &Log, id: &str) -> Result<LogSink> {
    let file = log
        .log_path
        .as_deref()
        .map(|path| append_to(path).with_context(|| format!("--log-path {}: cannot be opened", path.display())));
    let file = file.transpose()?;
    let level = log.level.unwrap_or(if file.is_some() {
        LevelFilter::INFO
    } else {
        LevelFilter::WARN
    });
    seccomp::log_to(file.as_ref().map(AsFd::as_fd), id);
    let place = Arc::new(RwLock::new(Place {
        file,
        id: id.to_owned(),
        show_level: log.show_level,
        show_origin: log.show_log_origin,
    }));
    let module = log.module.clone();
    let (wanted, handle) = reload::Layer::new(Wanted { level, module });
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        // A line that cannot be written is lost. Told on stderr, each would be two; and where that is what cannot be written, whoever
        // has something to log would panic.
        .log_internal_errors(false)
        .with_writer(Out(Arc::clone(&place)))
        .event_format(Line(Arc::clone(&place)));
    tracing_subscriber::registry().with(wanted).with(lines).init();
    Ok(LogSink::new(move |logger| configure(logger, &place, &handle)))
}

fn configure<S>(logger: &Logger, place: &Shared, wanted: &reload::Handle<Wanted, S>) -> Result<(), LogError> {
    let file = logger.log_path.as_deref().map(append_to).transpose()?;
    let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(file) = file {
        // First: the old one is closed by what follows.
        seccomp::log_to(Some(file.as_fd()), &place.id);
        place.file = Some(file);
    }
    place.show_level = logger.show_level.unwrap_or(place.show_level);
    place.show_origin = logger.show_log_origin.unwrap_or(place.show_origin);
    drop(place);
    let changed = wanted.modify(|wanted| {
        wanted.level = filter(logger.level.unwrap_or_default());
        wanted.module = logger.module.clone().or(wanted.module.take());
    });
    changed.map_err(|error| LogError(io::Error::other(error)))
}

/// The level's filter.
pub fn filter(level: Level) -> LevelFilter {
    match level {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warning => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    }
}

/// Writes lines where they go now.
struct Out(Shared);

impl<'a> MakeWriter<'a> for Out {
    type Writer = Lines<'a>;

    fn make_writer(&'a self) -> Lines<'a> {
        Lines(&self.0)
    }
}

struct Lines<'a>(&'a Shared);

impl Write for Lines<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let place = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match &place.file {
            Some(file) => (&*file).write(line),
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `chronovisor: warning: message` on stderr, else Firecracker's.
struct Line(Shared);

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let place = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let metadata = event.metadata();
        if place.file.is_some() {
            SystemTime.format_time(&mut writer)?;
            let thread = std::thread::current();
            write!(writer, " [{}:{}", place.id, thread.name().unwrap_or("-"))?;
            if place.show_level {
                write!(writer, ":{}", metadata.level())?;
            }
            if let (true, Some(file), Some(line)) = (place.show_origin, metadata.file(), metadata.line()) {
                write!(writer, ":{file}:{line}")?;
            }
            write!(writer, "] ")?;
        } else {
            let level = match *metadata.level() {
                tracing::Level::ERROR => "error: ",
                tracing::Level::WARN => "warning: ",
                tracing::Level::INFO => "",
                _ => "debug: ",
            };
            write!(writer, "chronovisor: {level}")?;
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn the_log_is_written_where_and_as_it_was_asked_for_last() {
        let scratch = Scratch::new();
        let path = scratch.path("log");
        let place = Shared::default();
        let (wanted, handle) = reload::Layer::new(Wanted {
            level: LevelFilter::OFF,
            module: None,
        });
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(Out(Arc::clone(&place)))
            .event_format(Line(Arc::clone(&place)));
        let subscriber = tracing_subscriber::registry().with(wanted).with(lines);
        let ask = |json: serde_json::Value| configure(&serde_json::from_value(json).unwrap(), &place, &handle);
        tracing::subscriber::with_default(subscriber, || {
            ask(serde_json::json!({ "log_path": path })).unwrap();
            tracing::info!("plain");
            tracing::debug!("not wanted");
            ask(serde_json::json!({ "level": "Debug", "show_level": true, "show_log_origin": true })).unwrap();
            tracing::debug!("with all");
            ask(serde_json::json!({ "module": "elsewhere" })).unwrap();
            tracing::error!("from here");
            let refused = ask(serde_json::json!({ "log_path": "/nowhere/log" })).unwrap_err();
            assert!(
                refused.to_string().starts_with("Failed to open target file: "),
                "{refused}"
            );
        });
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].ends_with("] plain") && !lines[0].contains("INFO"), "{text}");
        assert!(lines[1].contains(":DEBUG:api/src/log.rs:"), "{text}");
    }
}
