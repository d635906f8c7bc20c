//! Log lines, on stderr, as text or JSON.
//!
//! RUST_LOG selects the lines. Without it, the option `debug` selects level debug or info for the
//! agent, also while it runs. Each request writes one line with the target `access` at level debug:
//! `RUST_LOG=info,access=debug` adds these lines and no others.

use std::env::VarError;
use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::reload;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Text,
    /// One JSON object per line.
    Json,
}

/// Logging cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoggingError {
    #[error("RUST_LOG is `{text}`, which cannot be parsed")]
    Filter { text: String, source: tracing_subscriber::filter::ParseError },
    #[error("RUST_LOG is not UTF-8")]
    FilterNotUtf8,
    #[error("logging is already set up")]
    Twice(#[source] TryInitError),
    #[error("the log level cannot be changed")]
    Fixed(#[source] reload::Error),
}

/// Changes the level of log lines while the agent runs.
pub(crate) struct LogLevel {
    /// RUST_LOG, which overrides the option.
    wanted: Option<String>,
    replace: ReplaceFilter,
}

type ReplaceFilter = Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>;

impl LogLevel {
    /// Applies the option `debug`. Returns false if RUST_LOG overrides it.
    ///
    /// # Errors
    /// The subscriber is gone.
    pub(crate) fn set(&self, debug: bool) -> Result<bool, LoggingError> {
        if is_set(self.wanted.as_deref()) {
            return Ok(false);
        }
        (self.replace)(filter(None, debug)?).map_err(LoggingError::Fixed)?;
        Ok(true)
    }
}

/// Sends all log lines of this process to stderr, those of libraries that use the `log` crate too.
///
/// # Errors
/// RUST_LOG cannot be parsed, or logging is already set up.
pub(crate) fn init(debug: bool, format: LogFormat) -> Result<LogLevel, LoggingError> {
    let wanted = match std::env::var("RUST_LOG") {
        Ok(text) => Some(text),
        Err(VarError::NotPresent) => None,
        Err(VarError::NotUnicode(_)) => return Err(LoggingError::FilterNotUtf8),
    };
    let filter = filter(wanted.as_deref(), debug)?;
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (subscriber, replace) = subscriber(filter, format, colours, std::io::stderr);
    subscriber.try_init().map_err(LoggingError::Twice)?;
    Ok(LogLevel { wanted, replace })
}

/// An empty RUST_LOG counts as none.
fn is_set(wanted: Option<&str>) -> bool {
    wanted.is_some_and(|text| !text.is_empty())
}

/// Creates the filter.
fn filter(wanted: Option<&str>, debug: bool) -> Result<EnvFilter, LoggingError> {
    let text = match wanted {
        Some(text) if is_set(wanted) => text,
        // Debug lines of libraries are left out: one line per packet of each connection hides ours.
        // netlink_proto warns of every message that arrives after its reader is gone; the agent
        // itself reports lost messages.
        _ if debug => "info,netlink_proto=error,metadata_agent=debug,access=debug",
        _ => "info,netlink_proto=error",
    };
    EnvFilter::try_new(text).map_err(|source| LoggingError::Filter { text: text.to_owned(), source })
}

fn subscriber<W>(
    filter: EnvFilter,
    format: LogFormat,
    colours: bool,
    writer: W,
) -> (Box<dyn Subscriber + Send + Sync>, ReplaceFilter)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    // The report of a line that cannot be written would go to stderr too, and panic.
    let lines = lines.log_internal_errors(false);
    match format {
        LogFormat::Text => {
            // The type of the handle depends on everything before it.
            let lines = lines.with_ansi(colours).with_filter_reloading();
            let handle = lines.reload_handle();
            (Box::new(lines.finish()), Box::new(move |filter| handle.reload(filter)))
        }
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true).with_filter_reloading();
            let handle = lines.reload_handle();
            (Box::new(lines.finish()), Box::new(move |filter| handle.reload(filter)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(wanted: Option<&str>, debug: bool, format: LogFormat) -> Vec<String> {
        let lines = Lines::default();
        let writer = lines.clone();
        let (subscriber, _) =
            subscriber(filter(wanted, debug).unwrap(), format, false, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(port = 7, "own-info");
            tracing::debug!("own-debug");
            tracing::debug!(target: "access", "access-line");
            tracing::debug!(target: "hyper", "library-debug");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn words(wanted: Option<&str>, debug: bool) -> Vec<String> {
        let lines = logged(wanted, debug, LogFormat::Text);
        let words = ["own-info", "own-debug", "access-line", "library-debug"];
        words
            .iter()
            .filter(|word| lines.iter().any(|l| l.contains(*word)))
            .map(|word| (*word).to_owned())
            .collect()
    }

    #[test]
    fn rust_log_overrides_debug_overrides_info() {
        assert_eq!(words(None, false), ["own-info"]);
        assert_eq!(words(Some(""), false), ["own-info"]);
        assert_eq!(words(None, true), ["own-info", "own-debug", "access-line"]);
        assert_eq!(words(Some("warn,access=debug"), true), ["access-line"]);
        assert_eq!(words(Some("debug"), false), ["own-info", "own-debug", "access-line", "library-debug"]);
    }

    #[test]
    fn the_level_can_change_while_lines_are_written() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let lines = Lines::default();
            let writer = lines.clone();
            let (subscriber, replace) =
                subscriber(filter(None, false).unwrap(), format, false, move || writer.clone());
            let level = LogLevel { wanted: None, replace };
            tracing::subscriber::with_default(subscriber, || {
                for debug in [false, true, false] {
                    assert!(level.set(debug).unwrap());
                    tracing::debug!("own-debug");
                }
            });
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }

    #[test]
    fn rust_log_keeps_its_level() {
        let level = LogLevel { wanted: Some("warn".to_owned()), replace: Box::new(|_| unreachable!()) };
        assert!(!level.set(true).unwrap());
    }

    #[test]
    fn json_lines_hold_fields_at_the_top() {
        let lines = logged(None, false, LogFormat::Json);
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(
            (&line["message"], &line["port"], &line["level"]),
            (&"own-info".into(), &7.into(), &"INFO".into())
        );
    }

    #[test]
    fn an_invalid_filter_is_an_error() {
        let error = filter(Some("metadata_agent=loud"), false).unwrap_err();
        assert_eq!(error.to_string(), "RUST_LOG is `metadata_agent=loud`, which cannot be parsed");
    }
}
