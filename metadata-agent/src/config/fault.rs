//! What can be wrong with the configuration. Every fault names its option, its place and what is accepted; none shows a
//! secret.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::interpolate::InterpolationError;
use super::raw::SyntaxFault;
use super::setting::Origin;
use super::spec::OptionSpec;

/// One thing wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A line is no oslo.config syntax.
    #[error(transparent)]
    Syntax(SyntaxFault),
    /// A configuration file or directory cannot be read.
    #[error("cannot read configuration {}: {source}", path.display())]
    Source {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A value is none that the option accepts.
    #[error("{}: {written:?} is not accepted ({origin}); accepted is {}", option.name, (option.accepts)())]
    Value {
        /// The option.
        option: &'static OptionSpec,
        /// The value as written, before references are replaced.
        written: String,
        /// Where.
        origin: Origin,
    },
    /// A file that an option names cannot be read.
    #[error("{}: cannot read {written:?} ({origin}): {source}; accepted is {}", option.name, (option.accepts)())]
    Unreadable {
        /// The option.
        option: &'static OptionSpec,
        /// The path as written, before references are replaced.
        written: String,
        /// Where.
        origin: Origin,
        /// What the system said.
        source: io::Error,
    },
    /// A reference in a value cannot be replaced.
    #[error("{}: {error} ({origin})", option.name)]
    Reference {
        /// The option.
        option: &'static OptionSpec,
        /// The reference.
        error: InterpolationError,
        /// Where.
        origin: Origin,
    },
    /// A reference in a secret cannot be replaced. What it refers to may be part of the secret.
    #[error(
        "{}: its value (hidden) has a `$` that refers to no usable option ({origin}); accepted is {}, \
         with each dollar sign written `$$`",
        option.name,
        (option.accepts)()
    )]
    ReferenceInSecret {
        /// The option.
        option: &'static OptionSpec,
        /// Where.
        origin: Origin,
    },
    /// A value in the environment is no text.
    #[error("{}: the value (hidden) is not UTF-8 ({origin}); accepted is {}", option.name, (option.accepts)())]
    NotUtf8 {
        /// The option.
        option: &'static OptionSpec,
        /// Where.
        origin: Origin,
    },
    /// One half of a pair.
    #[error("{present} is set ({origin}) but {missing} is not; accepted is both or neither")]
    Unpaired {
        /// What is there.
        present: &'static str,
        /// What is missing.
        missing: &'static str,
        /// Where the present half is set.
        origin: Origin,
    },
    /// We would serve the socket that we ask on.
    #[error(
        "serve_metadata_proxy_socket is on and neutron_agent_socket ({origin}) is metadata_proxy_socket, {}: the agent \
         would ask itself; accepted are two sockets",
        path.display()
    )]
    SameSocket {
        /// The socket.
        path: PathBuf,
        /// Where neutron_agent_socket is set.
        origin: Origin,
    },
    /// An option that makes no sense without another.
    #[error("{present} is set ({origin}) but {missing}, which it needs, is not")]
    Incomplete {
        /// What is there.
        present: &'static str,
        /// What is missing.
        missing: &'static str,
        /// Where the present one is set.
        origin: Origin,
    },
}

/// Everything that is wrong with the configuration.
#[derive(Debug)]
pub struct ConfigFaults(pub Vec<Fault>);

impl fmt::Display for ConfigFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration is not usable:")?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for ConfigFaults {}
