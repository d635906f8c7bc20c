//! Errors of the configuration. Each names its option, its origin and the accepted values. None
//! shows a secret.

use std::fmt;
use std::path::PathBuf;

use oslo_config::{OptionError, Origin};

/// One error of the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    Option(#[from] OptionError),
    /// Only one option of a pair is set.
    #[error("{present} is set ({origin}) but {missing} is not; accepted is both or neither")]
    Unpaired { present: &'static str, missing: &'static str, origin: Origin },
    /// The agent would serve the socket to which it sends its own requests.
    #[error(
        "serve_metadata_proxy_socket is on and neutron_agent_socket ({origin}) is metadata_proxy_socket, {}: \
         the agent would send requests to itself; accepted are two sockets",
        path.display()
    )]
    SameSocket { path: PathBuf, origin: Origin },
    /// An option is set without another that it needs.
    #[error("{present} is set ({origin}) but {missing}, which it needs, is not")]
    Incomplete { present: &'static str, missing: &'static str, origin: Origin },
}

/// Every error of the configuration.
#[derive(Debug)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl From<Vec<OptionError>> for ConfigErrors {
    fn from(errors: Vec<OptionError>) -> Self {
        Self(errors.into_iter().map(ConfigError::Option).collect())
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration is not usable:")?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for ConfigErrors {}
