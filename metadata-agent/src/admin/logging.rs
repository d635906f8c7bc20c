//! Log lines, on stderr, as text or JSON.
//!
//! RUST_LOG selects the lines. Without it, the option `debug` selects level debug or info for the
//! agent. Each request writes one line with the target `access` at level debug:
//! `RUST_LOG=info,access=debug` adds these lines and no others.

use std::env::VarError;
use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
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
}

/// Sends all log lines of this process to stderr, those of libraries that use the `log` crate too.
///
/// # Errors
/// RUST_LOG cannot be parsed, or logging is already set up.
pub(crate) fn init(debug: bool, format: LogFormat) -> Result<(), LoggingError> {
    let wanted = match std::env::var("RUST_LOG") {
        Ok(text) => Some(text),
        Err(VarError::NotPresent) => None,
        Err(VarError::NotUnicode(_)) => return Err(LoggingError::FilterNotUtf8),
    };
    let filter = filter(wanted.as_deref(), debug)?;
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    subscriber(filter, format, colours, std::io::stderr).try_init().map_err(LoggingError::Twice)
}

/// Creates the filter. An empty RUST_LOG counts as none.
fn filter(wanted: Option<&str>, debug: bool) -> Result<EnvFilter, LoggingError> {
    let text = match wanted {
        Some(text) if !text.is_empty() => text,
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
) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    // The report of a line that cannot be written would go to stderr too, and panic.
    let lines = lines.log_internal_errors(false);
    match format {
        LogFormat::Text => Box::new(lines.with_ansi(colours).finish()),
        LogFormat::Json => Box::new(lines.json().flatten_event(true).finish()),
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
        let subscriber = subscriber(filter(wanted, debug).unwrap(), format, false, move || writer.clone());
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
