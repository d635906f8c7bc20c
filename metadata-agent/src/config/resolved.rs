//! From what was written to a checked [`Config`]: flags win over the environment, the environment over files, files
//! over defaults.
//!
//! Every fault is collected, so that one run shows them all. References (`$name`) are replaced in values of files
//! alone: flags and environment are taken to the letter, as a shell or a unit file has had its own say there.
//! Unknown options are no fault, since the files are Neutron's. No secret is ever shown.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use secrecy::ExposeSecret;
use serde::{Serialize, Serializer};

use super::ConfigArgs;
use super::interpolate::{Found, InterpolationError, Scope, expand};
use super::options::{self, Config, OPTIONS, OptionSpec};
use super::raw::{DEFAULT, Place, RawConfig, SyntaxFault};
use super::rule::{Rejected, Rule};
use super::value::{NovaEndpoint, Scheme};

/// Neutron's options that Neutron's files refer to in the values of ours, with their defaults.
const NEUTRON_DEFAULTS: [(&str, &str); 1] = [("state_path", "/var/lib/neutron")];

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag {
        /// The flag, without its dashes.
        flag: String,
    },
    /// The environment.
    Env {
        /// The variable.
        var: String,
    },
    /// A configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag { flag } => write!(f, "--{flag}"),
            Self::Env { var } => write!(f, "environment {var}"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An option's value as text, and where it comes from.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// The section.
    pub group: &'static str,
    /// The option.
    pub name: &'static str,
    /// The value after references were replaced. Of a secret: whether there is one.
    pub value: String,
    /// Its origin.
    pub origin: Origin,
}

/// A certificate and its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientIdentity<'a> {
    /// The certificate, PEM.
    pub certificate: &'a Path,
    /// The private key, PEM.
    pub private_key: &'a Path,
}

impl Config {
    /// Where Nova's metadata service listens.
    #[must_use]
    pub fn nova_endpoint(&self) -> NovaEndpoint {
        NovaEndpoint {
            scheme: self.nova_metadata_protocol,
            host: self.nova_metadata_host.clone(),
            port: self.nova_metadata_port,
        }
    }

    /// What we show to Nova that asks for a certificate.
    #[must_use]
    pub fn client_identity(&self) -> Option<ClientIdentity<'_>> {
        let (certificate, private_key) =
            (self.nova_client_cert.as_deref()?, self.nova_client_priv_key.as_deref()?);
        Some(ClientIdentity { certificate, private_key })
    }

    /// Every option with its value and origin, in the order of the documentation.
    #[must_use]
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// Where the value of an option comes from. `None` for a name that is no option's.
    #[must_use]
    pub fn origin(&self, name: &str) -> Option<&Origin> {
        self.settings.iter().find(|setting| setting.name == name).map(|setting| &setting.origin)
    }

    /// What is allowed but hardly meant.
    #[must_use]
    pub fn warnings(&self) -> Vec<ConfigWarning> {
        let https = self.nova_metadata_protocol == Scheme::Https;
        let tls = self.auth_ca_cert.is_some() || self.nova_client_cert.is_some();
        let mut warnings = Vec::new();
        if self.metadata_proxy_shared_secret.expose_secret().is_empty() {
            warnings.push(ConfigWarning::EmptySecret);
        }
        if https && self.nova_metadata_insecure {
            warnings.push(ConfigWarning::CertificateNotChecked);
        }
        if !https && tls {
            warnings.push(ConfigWarning::TlsUnused);
        }
        warnings
    }
}

/// What is allowed but hardly meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigWarning {
    /// Instance ids are signed with an empty key.
    EmptySecret,
    /// TLS without authentication.
    CertificateNotChecked,
    /// Certificates without TLS.
    TlsUnused,
}

impl fmt::Display for ConfigWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EmptySecret => {
                "metadata_proxy_shared_secret is empty: whoever reaches Nova can sign for any instance"
            }
            Self::CertificateNotChecked => "nova_metadata_insecure is on: Nova's certificate is not checked",
            Self::TlsUnused => {
                "auth_ca_cert and nova_client_cert have no effect while nova_metadata_protocol is http"
            }
        })
    }
}

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

/// Reads the options one by one.
pub(super) struct Resolver<'a> {
    args: &'a ConfigArgs,
    env: HashMap<&'static str, OsString>,
    raw: RawConfig,
    pub(super) settings: Vec<Setting>,
    faults: Vec<Fault>,
}

impl<'a> Resolver<'a> {
    /// Takes the variables that are ours out of the environment.
    pub(super) fn new(args: &'a ConfigArgs, env: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let env = OPTIONS.iter().filter_map(|spec| Some((spec.name, env(&spec.env())?))).collect();
        Self { args, env, raw: RawConfig::default(), settings: Vec::new(), faults: Vec::new() }
    }

    /// Whether flag or environment set an option, so that files do not matter to it.
    pub(super) fn is_set_outside_files(&self, option: &OptionSpec) -> bool {
        self.args.flags.contains_key(option.name) || self.env.contains_key(option.name)
    }

    /// Merges a file over those before it.
    pub(super) fn merge(&mut self, file: &Path) {
        match std::fs::read(file) {
            Ok(bytes) => {
                let faults = self.raw.merge(file, &bytes).err().unwrap_or_default();
                self.faults.extend(faults.into_iter().map(Fault::Syntax));
            }
            Err(source) => self.fault(Fault::Source { path: file.to_owned(), source }),
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    /// Reads one option; a fault is kept, and the value is `None`.
    pub(super) fn read<T>(&mut self, option: &'static OptionSpec, rule: &impl Rule<T>) -> Option<T> {
        match self.try_read(option, rule) {
            Ok((value, setting)) => {
                self.settings.push(setting);
                Some(value)
            }
            Err(fault) => {
                self.faults.push(fault);
                None
            }
        }
    }

    fn try_read<T>(&self, option: &'static OptionSpec, rule: &impl Rule<T>) -> Result<(T, Setting), Fault> {
        let (written, origin) = self.written(option)?;
        let text = match origin {
            Origin::File { .. } => match expand(option.group, option.name, written, self) {
                Ok(text) => text,
                Err(_) if option.is_secret() => return Err(Fault::ReferenceInSecret { option, origin }),
                Err(error) => return Err(Fault::Reference { option, error, origin }),
            },
            Origin::Flag { .. } | Origin::Env { .. } | Origin::Default => written.to_owned(),
        };
        let written = || if option.is_secret() { "(hidden)".to_owned() } else { written.to_owned() };
        match rule.read(&text) {
            Ok(value) => {
                let value_shown = match text.as_str() {
                    "" if option.is_secret() => "(empty)".to_owned(),
                    _ if option.is_secret() => "(set)".to_owned(),
                    _ => text,
                };
                let setting = Setting { group: option.group, name: option.name, value: value_shown, origin };
                Ok((value, setting))
            }
            Err(Rejected::NotAccepted) => Err(Fault::Value { option, written: written(), origin }),
            Err(Rejected::Unreadable(source)) => {
                Err(Fault::Unreadable { option, written: written(), origin, source })
            }
        }
    }

    /// The text that wins.
    fn written(&self, option: &'static OptionSpec) -> Result<(&str, Origin), Fault> {
        if let (Some(text), Some(flag)) = (self.args.flags.get(option.name), option.flag()) {
            return Ok((text, Origin::Flag { flag }));
        }
        if let Some(value) = self.env.get(option.name) {
            let origin = Origin::Env { var: option.env() };
            return match value.to_str() {
                Some(text) => Ok((text, origin)),
                None => Err(Fault::NotUtf8 { option, origin }),
            };
        }
        Ok(match self.raw.last(option.group, option.name) {
            Some(assignment) => {
                let Place { file, line } = &assignment.place;
                (&assignment.text, Origin::File { path: file.to_path_buf(), line: *line })
            }
            None => (option.default, Origin::Default),
        })
    }

    /// The configuration, unless there was a fault anywhere.
    pub(super) fn finish(mut self) -> Result<Config, ConfigFaults> {
        let config = Config::read(&mut self);
        match config {
            Some(config) => {
                self.faults.extend(unpaired(&config));
                if self.faults.is_empty() { Ok(config) } else { Err(ConfigFaults(self.faults)) }
            }
            None => Err(ConfigFaults(self.faults)),
        }
    }

    /// One option alone.
    pub(super) fn finish_with<T>(
        mut self,
        option: &'static OptionSpec,
        rule: &impl Rule<T>,
    ) -> Result<T, ConfigFaults> {
        match self.read(option, rule) {
            Some(value) if self.faults.is_empty() => Ok(value),
            _ => Err(ConfigFaults(self.faults)),
        }
    }
}

/// The certificate and its key stand or fall together.
fn unpaired(config: &Config) -> Option<Fault> {
    let (cert, key) = ("nova_client_cert", "nova_client_priv_key");
    let (present, missing) = match (&config.nova_client_cert, &config.nova_client_priv_key) {
        (Some(_), None) => (cert, key),
        (None, Some(_)) => (key, cert),
        (Some(_), Some(_)) | (None, None) => return None,
    };
    let origin = config.origin(present).cloned().unwrap_or(Origin::Default);
    Some(Fault::Unpaired { present, missing, origin })
}

impl Scope for Resolver<'_> {
    /// Every option that stands in a file can be referred to, whether we know it or not, and every one we know.
    fn find(&self, group: &str, name: &str) -> Found<'_> {
        let option = options::find(group, name);
        if option.is_some_and(OptionSpec::is_secret) {
            return Found::Secret;
        }
        if let Some(option) = option {
            return match self.written(option) {
                Ok((text, Origin::File { .. })) => Found::Template(text),
                Ok((text, Origin::Flag { .. } | Origin::Env { .. } | Origin::Default)) => {
                    Found::Literal(text)
                }
                Err(_) => Found::Unknown,
            };
        }
        if let Some(assignment) = self.raw.last(group, name) {
            return Found::Template(&assignment.text);
        }
        let neutron = NEUTRON_DEFAULTS.iter().find(|(known, _)| group == DEFAULT && *known == name);
        neutron.map_or(Found::Unknown, |(_, default)| Found::Literal(default))
    }
}
