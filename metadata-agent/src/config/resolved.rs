//! From what was written to a checked [`Config`]: flags win over the environment, the environment over files, files
//! over defaults.
//!
//! Every fault is collected, so that one run shows them all. References (`$name`) are replaced in values of files
//! alone: flags and environment are taken to the letter, as a shell or a unit file has had its own say there.
//! Unknown options are no fault, since the files are Neutron's. No secret is ever shown.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use nix::sys::utsname::uname;
use secrecy::ExposeSecret;
use serde::{Serialize, Serializer};

use super::ConfigArgs;
use super::fault::{ConfigFaults, Fault};
use super::interpolate::{Found, Scope, expand};
use super::neutron::{self, NeutronAccess};
use super::notices::{self, Effect, Notice};
use super::options::{self, Config, OPTIONS, OptionSpec, spec};
use super::ovsdb::OvsdbRemote;
use super::raw::{Assignment, DEFAULT, RawConfig};
use super::rule::{Rejected, Rule};
use super::value::{NovaEndpoint, Scheme, Upstream};

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
    /// Several lines of configuration files, which all count.
    Files {
        /// Each file and line.
        places: Vec<(PathBuf, usize)>,
    },
    /// Another option, in whose stead ours is, in a configuration file.
    Fallback {
        /// The other option's section.
        group: &'static str,
        /// The other option.
        name: &'static str,
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
            Self::Files { places } => places.iter().enumerate().try_for_each(|(number, (path, line))| {
                write!(f, "{}{}:{line}", if number == 0 { "" } else { ", " }, path.display())
            }),
            Self::Fallback { group, name, path, line } => {
                write!(f, "{}:{line}, [{group}] {name}", path.display())
            }
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
    /// Its name among the options of all sections.
    #[serde(skip)]
    pub key: &'static str,
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
    /// Where Nova's metadata service listens: the first that can be reached is to be used.
    pub fn nova_endpoints(&self) -> impl Iterator<Item = NovaEndpoint> {
        let (scheme, port) = (self.nova_metadata_protocol, self.nova_metadata_port);
        self.nova_metadata_host.iter().cloned().map(move |host| NovaEndpoint { scheme, host, port })
    }

    /// The servers of OVN's Southbound database, where somebody set them. Neutron's default is no sign of an OVN: without
    /// one nothing would be at that address, and something else may be.
    #[must_use]
    pub fn ovn_southbound(&self) -> Option<&[OvsdbRemote]> {
        let is_set =
            self.origin(spec::ovn_sb_connection.key).is_some_and(|origin| *origin != Origin::Default);
        is_set.then_some(&*self.ovn_sb_connection)
    }

    /// The name under which Neutron knows this host.
    #[must_use]
    pub fn host_name(&self) -> String {
        let own = || uname().map(|name| name.nodename().to_string_lossy().into_owned()).unwrap_or_default();
        self.host.clone().unwrap_or_else(own)
    }

    /// What we show to Nova that asks for a certificate.
    #[must_use]
    pub fn client_identity(&self) -> Option<ClientIdentity<'_>> {
        let (certificate, private_key) =
            (self.nova_client_cert.as_deref()?, self.nova_client_priv_key.as_deref()?);
        Some(ClientIdentity { certificate, private_key })
    }

    /// How to reach Neutron's API, if it is to be asked.
    #[must_use]
    pub fn neutron(&self) -> Option<&NeutronAccess> {
        self.neutron.as_ref()
    }

    /// Every option with its value and origin, in the order of the documentation.
    #[must_use]
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// What somebody set that has not the effect it has in Neutron.
    #[must_use]
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// Where the value of an option comes from, by its key. `None` for a key that is no option's.
    #[must_use]
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.settings.iter().find(|setting| setting.key == key).map(|setting| &setting.origin)
    }

    /// What is allowed but hardly meant.
    #[must_use]
    pub fn warnings(&self) -> Vec<ConfigWarning> {
        let https = self.nova_metadata_protocol == Scheme::Https;
        let tls = self.auth_ca_cert.is_some() || self.nova_client_cert.is_some();
        let mut warnings = Vec::new();
        if self.upstream != Upstream::Nova {
            return warnings;
        }
        if self.metadata_proxy_shared_secret.expose_secret().is_empty() && self.shared_secret_files.is_empty()
        {
            warnings.push(ConfigWarning::EmptySecret);
        }
        if https && self.nova_metadata_insecure {
            warnings.push(ConfigWarning::CertificateNotChecked);
        }
        if !https && tls {
            warnings.push(ConfigWarning::TlsUnused);
        }
        if self.neutron.is_some() && self.neutron_insecure {
            warnings.push(ConfigWarning::NeutronNotChecked);
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
    /// Keystone and Neutron without authentication.
    NeutronNotChecked,
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
            Self::NeutronNotChecked => {
                "neutron_insecure is on: Keystone's and Neutron's certificates are not checked"
            }
        })
    }
}

/// Reads the options one by one.
pub(super) struct Resolver<'a> {
    args: &'a ConfigArgs,
    env: HashMap<&'static str, OsString>,
    raw: RawConfig,
    pub(super) settings: Vec<Setting>,
    pub(super) notices: Vec<Notice>,
    faults: Vec<Fault>,
}

impl<'a> Resolver<'a> {
    /// Takes the variables that are ours out of the environment.
    pub(super) fn new(args: &'a ConfigArgs, env: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let env = OPTIONS.iter().filter_map(|spec| Some((spec.key, env(&spec.env())?))).collect();
        Self {
            args,
            env,
            raw: RawConfig::default(),
            settings: Vec::new(),
            notices: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Whether flag or environment set an option, so that files do not matter to it.
    pub(super) fn is_set_outside_files(&self, option: &OptionSpec) -> bool {
        self.args.flags.contains_key(option.key) || self.env.contains_key(option.key)
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

    fn try_read<T>(
        &mut self,
        option: &'static OptionSpec,
        rule: &impl Rule<T>,
    ) -> Result<(T, Setting), Fault> {
        let (written, origin) = self.written(option, rule.adds_up())?;
        let text = self.expanded(option, &written, &origin)?;
        let mut outcome = rule.read(&text).map(|value| (value, text.clone()));
        if let (Err(Rejected::NotAccepted), Origin::Fallback { group, name, path, line }) =
            (&outcome, &origin)
            && let Some(fitted) = rule.fit(&text)
        {
            outcome = rule.read(&fitted).map(|value| (value, fitted.clone()));
            let effect = Effect::Fitted { key: option.key, value: fitted };
            let origin = Origin::File { path: path.clone(), line: *line };
            self.notices.push(Notice { group, name, origin, effect });
        }
        let written = || if option.is_secret() { "(hidden)".to_owned() } else { written.join(",") };
        match outcome {
            Ok((value, text)) => {
                let shown = match text.as_str() {
                    "" if option.is_secret() => "(empty)".to_owned(),
                    _ if option.is_secret() => "(set)".to_owned(),
                    _ => text,
                };
                let OptionSpec { group, name, key, .. } = option;
                Ok((value, Setting { group, name, key, value: shown, origin }))
            }
            Err(Rejected::NotAccepted) => Err(Fault::Value { option, written: written(), origin }),
            Err(Rejected::Unreadable(source)) => {
                Err(Fault::Unreadable { option, written: written(), origin, source })
            }
        }
    }

    /// The text after references are replaced.
    fn expanded(
        &self,
        option: &'static OptionSpec,
        written: &[String],
        origin: &Origin,
    ) -> Result<String, Fault> {
        let (group, name) = match origin {
            Origin::Flag { .. } | Origin::Env { .. } => return Ok(written.join(",")),
            Origin::File { .. } | Origin::Files { .. } | Origin::Default => (option.group, option.name),
            Origin::Fallback { group, name, .. } => (*group, *name),
        };
        let texts: Result<Vec<_>, _> = written.iter().map(|text| expand(group, name, text, self)).collect();
        let origin = || origin.clone();
        match texts {
            Ok(texts) => Ok(texts.join(",")),
            Err(_) if option.is_secret() => Err(Fault::ReferenceInSecret { option, origin: origin() }),
            Err(error) => Err(Fault::Reference { option, error, origin: origin() }),
        }
    }

    /// The text that wins; several if all that files say adds up.
    fn written(&self, option: &'static OptionSpec, adds_up: bool) -> Result<(Vec<String>, Origin), Fault> {
        if let (Some(text), Some(flag)) = (self.args.flags.get(option.key), option.flag()) {
            return Ok((vec![text.clone()], Origin::Flag { flag }));
        }
        if let Some(value) = self.env.get(option.key) {
            let origin = Origin::Env { var: option.env() };
            return match value.to_str() {
                Some(text) => Ok((vec![text.to_owned()], origin)),
                None => Err(Fault::NotUtf8 { option, origin }),
            };
        }
        let own = self.raw.all(option.group, option.name);
        if adds_up && own.len() > 1 {
            let places = own.iter().map(|one| (one.place.file.to_path_buf(), one.place.line)).collect();
            return Ok((own.iter().map(|one| one.text.clone()).collect(), Origin::Files { places }));
        }
        if let Some(assignment) = own.last() {
            return Ok((vec![assignment.text.clone()], origin_of(assignment)));
        }
        for (group, name) in option.fallbacks {
            if let Some(Assignment { text, place }) = self.raw.last(group, name) {
                let (path, line) = (place.file.to_path_buf(), place.line);
                return Ok((vec![text.clone()], Origin::Fallback { group, name, path, line }));
            }
        }
        Ok((vec![option.default.to_owned()], Origin::Default))
    }

    /// The configuration, unless there was a fault anywhere.
    pub(super) fn finish(mut self) -> Result<Config, ConfigFaults> {
        let config = Config::read(&mut self);
        match config {
            Some(mut config) => {
                self.notices.extend(notices::of(&self.raw, &config));
                config.notices = self.notices;
                self.faults.extend(unpaired(&config));
                self.faults.extend(same_socket(&config));
                match neutron::access(&config) {
                    Ok(access) => config.neutron = access,
                    Err(fault) => self.faults.push(fault),
                }
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

/// Where an assignment stands.
pub(super) fn origin_of(assignment: &Assignment) -> Origin {
    Origin::File { path: assignment.place.file.to_path_buf(), line: assignment.place.line }
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

/// One socket cannot have us at both its ends.
fn same_socket(config: &Config) -> Option<Fault> {
    let asks = config.upstream != Upstream::Nova;
    let same = config.neutron_agent_socket == config.metadata_proxy_socket;
    (config.serve_metadata_proxy_socket && asks && same).then(|| {
        let origin = config.origin("neutron_agent_socket").cloned().unwrap_or(Origin::Default);
        Fault::SameSocket { path: config.neutron_agent_socket.clone(), origin }
    })
}

impl Scope for Resolver<'_> {
    /// Every option that stands in a file can be referred to, whether we know it or not, and every one we know.
    fn find(&self, group: &str, name: &str) -> Found<'_> {
        if options::is_secret(group, name) {
            return Found::Secret;
        }
        if let Some(option) = options::find(group, name) {
            if let (Some(text), Some(_)) = (self.args.flags.get(option.key), option.flag()) {
                return Found::Literal(text);
            }
            if let Some(value) = self.env.get(option.key) {
                return value.to_str().map_or(Found::Unknown, Found::Literal);
            }
            let written = self.raw.last(group, name).map(|assignment| assignment.text.as_str());
            return Found::Template(written.unwrap_or(option.default));
        }
        if let Some(assignment) = self.raw.last(group, name) {
            return Found::Template(&assignment.text);
        }
        let neutron = NEUTRON_DEFAULTS.iter().find(|(known, _)| group == DEFAULT && *known == name);
        neutron.map_or(Found::Unknown, |(_, default)| Found::Literal(default))
    }
}
