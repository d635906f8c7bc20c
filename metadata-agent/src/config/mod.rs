//! The agent's configuration: Neutron's own files and option names, environment variables, and
//! flags.
//!
//! Input: [`ConfigArgs`], the environment, files. Output: [`Config`], in which every value is
//! valid, or [`ConfigErrors`], which lists everything that is wrong. [`options`] is the table of
//! options; the crate `oslo-config` reads them. Only `app` and the commands use this module. The
//! components get their settings from [`components`].

mod changes;
mod components;
mod error;
mod neutron;
pub(crate) mod notices;
pub mod options;
#[cfg(test)]
mod reference;
mod resolved;
mod rules;
mod value;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

pub(crate) use changes::RunTimeOption;
pub use error::{ConfigError, ConfigErrors};
pub use options::{Config, OPTIONS};
pub(crate) use oslo_config::Flags;
pub use oslo_config::{ConfigSource, Origin, Setting};
pub(crate) use value::{NovaEndpoint, SocketMode, UpstreamKind};

use options::spec as option;
use oslo_config::Resolver;
use oslo_config::rule::SocketPath;

/// Directory of Neutron's files.
const NEUTRON_DIR: &str = "/etc/neutron";

/// Neutron's files with options of the agent, in the order in which Neutron's services read them.
/// The last one belongs to neutron-ovn-agent, whose extension replaces the OVN metadata agent.
pub(crate) const NEUTRON_FILES: [&str; 4] =
    ["neutron.conf", "metadata_agent.ini", "neutron_ovn_metadata_agent.ini", "plugins/ml2/ovn_agent.ini"];

/// Defaults of Neutron's options that values of the agent's options refer to.
const NEUTRON_DEFAULTS: &[(&str, &str)] = &[("state_path", "/var/lib/neutron")];

/// The command line's part of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigArgs {
    /// Files and directories to read, in this order. If empty, those of [`NEUTRON_FILES`] that
    /// exist.
    pub sources: Vec<ConfigSource>,
    pub flags: Flags,
}

impl Config {
    /// Reads the configuration of this process.
    ///
    /// # Errors
    /// Every error in files, environment and flags.
    pub fn load(args: &ConfigArgs) -> Result<Self, ConfigErrors> {
        Self::load_from(args, &|var| std::env::var_os(var), Path::new(NEUTRON_DIR))
    }

    fn load_from(
        args: &ConfigArgs,
        env: &dyn Fn(&str) -> Option<OsString>,
        neutron_dir: &Path,
    ) -> Result<Self, ConfigErrors> {
        let mut resolver = Resolver::new(OPTIONS, NEUTRON_DEFAULTS, &args.flags, env);
        read_files(&mut resolver, &args.sources, neutron_dir);
        Self::resolve(resolver)
    }
}

/// Reads only the path of the admin socket, for commands that only ask the running agent. If a flag
/// or the environment sets it, no file is read. A user of the socket then needs no access to
/// Neutron's files.
///
/// # Errors
/// Errors of the option, and of the files if they were read.
pub(crate) fn admin_socket(args: &ConfigArgs) -> Result<PathBuf, ConfigErrors> {
    admin_socket_from(args, &|var| std::env::var_os(var), Path::new(NEUTRON_DIR))
}

fn admin_socket_from(
    args: &ConfigArgs,
    env: &dyn Fn(&str) -> Option<OsString>,
    neutron_dir: &Path,
) -> Result<PathBuf, ConfigErrors> {
    let mut resolver = Resolver::new(OPTIONS, NEUTRON_DEFAULTS, &args.flags, env);
    if !resolver.is_set_outside_files(&option::admin_socket) {
        read_files(&mut resolver, &args.sources, neutron_dir);
    }
    let socket = resolver.read(&option::admin_socket, &SocketPath);
    let errors = resolver.into_errors();
    match socket {
        Some(socket) if errors.is_empty() => Ok(socket),
        _ => Err(errors.into()),
    }
}

fn read_files(resolver: &mut Resolver<'_>, sources: &[ConfigSource], neutron_dir: &Path) {
    if sources.is_empty() {
        for file in NEUTRON_FILES.map(|name| neutron_dir.join(name)) {
            // If this check fails, reading reports the error.
            if file.try_exists().unwrap_or(true) {
                resolver.merge(&ConfigSource::File(file));
            }
        }
    }
    for source in sources {
        resolver.merge(source);
    }
}

#[cfg(test)]
mod tests;
