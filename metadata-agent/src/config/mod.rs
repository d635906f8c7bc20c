//! Configuration: Neutron's own files and option names, the environment, and flags.
//!
//! In: [`ConfigArgs`], the environment, files. Out: [`Config`], in which every value is valid, or [`ConfigFaults`],
//! which lists everything that is wrong. The table in [`options`] is the one place that names an option.
//!
//! raw (what files say) -> interpolate -> resolver (which text wins) -> rule (text to value) -> options -> resolved (what
//! the values mean together).

mod components;
pub mod fault;
pub mod interpolate;
mod neutron;
pub mod notice;
mod notices;
pub mod options;
pub mod raw;
pub mod resolved;
mod resolver;
pub mod rule;
mod rules;
pub mod setting;
pub mod spec;
pub mod value;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

pub use fault::{ConfigFaults, Fault};
pub use notice::{Effect, Notice};
pub use options::{Config, OPTIONS};
pub use resolved::ConfigWarning;
pub use resolver::Flags;
pub use setting::{Origin, Setting};
pub use spec::{Access, OptionSpec};
pub use value::{IpVersion, NovaEndpoint, SocketMode, Upstream};

use options::spec as option;
use resolver::Resolver;
use rule::SocketPath;

/// Where Neutron keeps its files.
const NEUTRON_DIR: &str = "/etc/neutron";

/// Neutron's files that hold our options, in the order in which its services read them.
pub const NEUTRON_FILES: [&str; 3] = ["neutron.conf", "metadata_agent.ini", "neutron_ovn_metadata_agent.ini"];

/// What the command line says about the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigArgs {
    /// Files and directories to read, in their order. If empty: those of [`NEUTRON_FILES`] that exist.
    pub sources: Vec<ConfigSource>,
    /// Values given by flags, by the option's key.
    pub flags: Flags,
}

/// A file, or a directory of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// A file, which must exist.
    File(PathBuf),
    /// A directory, which must exist. Its `*.conf` are read in the order of their names.
    Dir(PathBuf),
}

impl Config {
    /// Reads the configuration of this process.
    ///
    /// # Errors
    /// All faults, of files, environment and flags.
    pub fn load(args: &ConfigArgs) -> Result<Self, ConfigFaults> {
        Self::load_from(args, &|var| std::env::var_os(var), Path::new(NEUTRON_DIR))
    }

    fn load_from(
        args: &ConfigArgs,
        env: &dyn Fn(&str) -> Option<OsString>,
        neutron_dir: &Path,
    ) -> Result<Self, ConfigFaults> {
        let mut resolver = Resolver::new(OPTIONS, &args.flags, env);
        read_files(&mut resolver, &args.sources, neutron_dir);
        Self::of(resolver)
    }
}

/// The admin socket alone, for commands that only ask the running agent. Where flag or environment name it, no file
/// is read, so that whoever may use the socket needs no right to read Neutron's files.
///
/// # Errors
/// Faults of the files, if they matter, or of the option.
pub fn admin_socket(args: &ConfigArgs) -> Result<PathBuf, ConfigFaults> {
    admin_socket_from(args, &|var| std::env::var_os(var), Path::new(NEUTRON_DIR))
}

fn admin_socket_from(
    args: &ConfigArgs,
    env: &dyn Fn(&str) -> Option<OsString>,
    neutron_dir: &Path,
) -> Result<PathBuf, ConfigFaults> {
    let mut resolver = Resolver::new(OPTIONS, &args.flags, env);
    if !resolver.is_set_outside_files(&option::admin_socket) {
        read_files(&mut resolver, &args.sources, neutron_dir);
    }
    resolver.finish_with(&option::admin_socket, &SocketPath)
}

fn read_files(resolver: &mut Resolver<'_>, sources: &[ConfigSource], neutron_dir: &Path) {
    if sources.is_empty() {
        for file in NEUTRON_FILES.map(|name| neutron_dir.join(name)) {
            // What cannot even be looked up is reported when it is read.
            if file.try_exists().unwrap_or(true) {
                resolver.merge(&file);
            }
        }
    }
    for source in sources {
        match source {
            ConfigSource::File(file) => resolver.merge(file),
            ConfigSource::Dir(dir) => match conf_files(dir) {
                Ok(files) => files.iter().for_each(|file| resolver.merge(file)),
                Err(source) => resolver.fault(Fault::Source { path: dir.clone(), source }),
            },
        }
    }
}

/// What the shell pattern `*.conf` yields in a directory, sorted.
fn conf_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        let name_bytes = name.as_encoded_bytes();
        if name_bytes.ends_with(b".conf") && !name_bytes.starts_with(b".") {
            files.push(dir.join(name));
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests;
