//! Tests of the whole way from files, environment and flags to a [`Config`].

mod changes;
mod errors;
mod notices;
mod precedence;

use std::collections::BTreeMap;
use std::fs;

use tempfile::TempDir;

use super::resolved::ConfigWarning;
use super::value::IpVersion;
use super::*;

const SECRET: &str = "hunter2-xyzzy";

/// A host with its files, environment and flags.
struct TestHost {
    dir: TempDir,
    args: ConfigArgs,
    env: BTreeMap<String, OsString>,
}

impl TestHost {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), args: ConfigArgs::default(), env: BTreeMap::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file in Neutron's directory.
    fn write(self, name: &str, text: impl AsRef<[u8]>) -> Self {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
        self
    }

    fn source(mut self, source: ConfigSource) -> Self {
        self.args.sources.push(source);
        self
    }

    fn file(self, name: &str, text: impl AsRef<[u8]>) -> Self {
        let path = self.path(name);
        self.write(name, text).source(ConfigSource::File(path))
    }

    fn env(mut self, var: &str, value: impl Into<OsString>) -> Self {
        self.env.insert(var.to_owned(), value.into());
        self
    }

    fn flag(mut self, name: &'static str, value: &str) -> Self {
        self.args.flags.insert(name, value.to_owned());
        self
    }

    fn load(&self) -> Result<Config, ConfigErrors> {
        Config::load_from(&self.args, &|var| self.env.get(var).cloned(), self.dir.path())
    }

    fn errors(&self) -> Vec<String> {
        let errors = self.load().unwrap_err();
        errors
            .0
            .iter()
            .map(|error| error.to_string().replace(self.dir.path().to_str().unwrap(), ""))
            .collect()
    }

    fn admin_socket(&self) -> Result<PathBuf, ConfigErrors> {
        admin_socket_from(&self.args, &|var| self.env.get(var).cloned(), self.dir.path())
    }
}

fn endpoints(config: &Config) -> Vec<String> {
    config.nova_endpoints().map(|endpoint| endpoint.to_string()).collect()
}
