//! Resolves the value of each option: flags override the environment, the environment overrides
//! files, and files override defaults.
//!
//! All errors are collected, so that one run shows them all. References (`$name`) are replaced only
//! in values from files. Flags and environment variables are taken literally, because a shell or a
//! unit file has already expanded them. Unknown options are ignored, since files are shared between
//! services.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::mem;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use super::error::OptionError;
use super::file::{Assignment, DEFAULT, Files};
use super::interpolate::{Lookup, Scope, expand};
use super::option::{self, OptionSpec, Table};
use super::rule::{Rejected, Rule};
use super::setting::{Origin, Setting};

/// Largest accepted file. Neutron's largest sample has 100 KB.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Values given by flags, by the option's key.
pub type Flags = BTreeMap<&'static str, String>;

/// A file or a directory of files, which must exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    File(PathBuf),
    /// Its `*.conf` files are read in the order of their names.
    Dir(PathBuf),
}

/// A value of another option that was replaced by the nearest accepted one.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// Section and name of the other option.
    pub group: &'static str,
    pub name: &'static str,
    pub origin: Origin,
    /// Key of the option that it stands in for.
    pub key: &'static str,
    /// The value that is used.
    pub value: String,
}

/// Reads options one by one and collects their errors.
pub struct Resolver<'a> {
    table: Table,
    /// Defaults of options in `DEFAULT` that the table does not have, but values may refer to.
    extra_defaults: &'static [(&'static str, &'static str)],
    flags: &'a Flags,
    env: HashMap<&'static str, OsString>,
    files: Files,
    settings: Vec<Setting>,
    fitted: Vec<Fitted>,
    errors: Vec<OptionError>,
}

impl<'a> Resolver<'a> {
    /// Creates a resolver. It reads the variables of the table's options from the environment.
    pub fn new(
        table: Table,
        extra_defaults: &'static [(&'static str, &'static str)],
        flags: &'a Flags,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Self {
        let env = table.iter().filter_map(|spec| Some((spec.key, env(&spec.env())?))).collect();
        Self {
            table,
            extra_defaults,
            flags,
            env,
            files: Files::default(),
            settings: Vec::new(),
            fitted: Vec::new(),
            errors: Vec::new(),
        }
    }

    /// Reports whether a flag or the environment sets the option, so that files do not matter to
    /// it.
    #[must_use]
    pub fn is_set_outside_files(&self, option: &OptionSpec) -> bool {
        self.flags.contains_key(option.key) || self.env.contains_key(option.key)
    }

    /// Adds a file, or the files of a directory. They override those added before.
    pub fn merge(&mut self, source: &ConfigSource) {
        match source {
            ConfigSource::File(file) => self.merge_file(file),
            ConfigSource::Dir(dir) => match conf_files(dir) {
                Ok(files) => files.iter().for_each(|file| self.merge_file(file)),
                Err(source) => self.errors.push(OptionError::Source { path: dir.clone(), source }),
            },
        }
    }

    fn merge_file(&mut self, file: &Path) {
        match read(file) {
            Ok(bytes) => {
                let errors = self.files.merge(file, &bytes).err().unwrap_or_default();
                self.errors.extend(errors.into_iter().map(OptionError::Syntax));
            }
            Err(source) => self.errors.push(OptionError::Source { path: file.to_owned(), source }),
        }
    }

    /// Reads one option. If it has an error, keeps the error and returns `None`.
    pub fn read<T>(&mut self, option: &'static OptionSpec, rule: &impl Rule<T>) -> Option<T> {
        match self.try_read(option, rule) {
            Ok((value, setting)) => {
                self.settings.push(setting);
                Some(value)
            }
            Err(error) => {
                self.errors.push(error);
                None
            }
        }
    }

    fn try_read<T>(
        &mut self,
        option: &'static OptionSpec,
        rule: &impl Rule<T>,
    ) -> Result<(T, Setting), OptionError> {
        let (written, origin) = self.written(option, rule.adds_up())?;
        let text = self.expanded(option, &written, &origin)?;
        let mut outcome = rule.read(&text).map(|value| (value, text.clone()));

        // A value that another program would accept is fitted to our limits.
        if let (Err(Rejected::NotAccepted), Origin::Fallback { group, name, path, line }) =
            (&outcome, &origin)
            && let Some(fitted) = rule.fit(&text)
        {
            outcome = rule.read(&fitted).map(|value| (value, fitted.clone()));
            let origin = Origin::File { path: path.clone(), line: *line };
            self.fitted.push(Fitted { group, name, origin, key: option.key, value: fitted });
        }

        let written = || if option.is_secret() { "(hidden)".to_owned() } else { written.join(",") };
        match outcome {
            Ok((value, text)) => {
                let secret = option.is_secret().then(|| SecretString::from(text.clone()));
                let shown = match text.as_str() {
                    "" if option.is_secret() => "(empty)".to_owned(),
                    _ if option.is_secret() => "(set)".to_owned(),
                    _ => text,
                };
                let OptionSpec { group, name, key, .. } = option;
                Ok((value, Setting { group, name, key, value: shown, origin, secret }))
            }
            Err(Rejected::NotAccepted) => Err(OptionError::Value { option, written: written(), origin }),
            Err(Rejected::Unreadable(source)) => {
                Err(OptionError::Unreadable { option, written: written(), origin, source })
            }
        }
    }

    /// Replaces references in the texts, and joins them.
    fn expanded(
        &self,
        option: &'static OptionSpec,
        written: &[String],
        origin: &Origin,
    ) -> Result<String, OptionError> {
        let (group, name) = match origin {
            Origin::Flag { .. } | Origin::Env { .. } => return Ok(written.join(",")),
            Origin::File { .. } | Origin::Files { .. } | Origin::Default => (option.group, option.name),
            Origin::Fallback { group, name, .. } => (*group, *name),
        };
        let texts: Result<Vec<_>, _> = written.iter().map(|text| expand(group, name, text, self)).collect();
        let origin = || origin.clone();
        match texts {
            Ok(texts) => Ok(texts.join(",")),
            Err(_) if option.is_secret() => Err(OptionError::ReferenceInSecret { option, origin: origin() }),
            Err(error) => Err(OptionError::Reference { option, error, origin: origin() }),
        }
    }

    /// Returns the text that wins, or all texts if every assignment counts.
    fn written(
        &self,
        option: &'static OptionSpec,
        adds_up: bool,
    ) -> Result<(Vec<String>, Origin), OptionError> {
        // Flag.
        if let (Some(text), Some(flag)) = (self.flags.get(option.key), option.flag()) {
            return Ok((vec![text.clone()], Origin::Flag { flag }));
        }
        // Environment.
        if let Some(value) = self.env.get(option.key) {
            let origin = Origin::Env { var: option.env() };
            return match value.to_str() {
                Some(text) => Ok((vec![text.to_owned()], origin)),
                None => Err(OptionError::NotUtf8 { option, origin }),
            };
        }
        // Files: the option itself, then those that stand in for it.
        let own = self.files.all(option.group, option.name);
        if adds_up && own.len() > 1 {
            let lines = own.iter().map(|one| (one.location.file.to_path_buf(), one.location.line)).collect();
            return Ok((own.iter().map(|one| one.text.clone()).collect(), Origin::Files { lines }));
        }
        if let Some(assignment) = own.last() {
            return Ok((vec![assignment.text.clone()], Origin::from_assignment(assignment)));
        }
        for (group, name) in option.fallbacks {
            if let Some(Assignment { text, location }) = self.files.last(group, name) {
                let (path, line) = (location.file.to_path_buf(), location.line);
                return Ok((vec![text.clone()], Origin::Fallback { group, name, path, line }));
            }
        }
        Ok((vec![option.default.to_owned()], Origin::Default))
    }

    /// Returns the assignments of all files.
    #[must_use]
    pub const fn files(&self) -> &Files {
        &self.files
    }

    /// Takes the settings of the options that were read, in that order.
    pub fn take_settings(&mut self) -> Vec<Setting> {
        mem::take(&mut self.settings)
    }

    /// Takes the values of other options that were fitted.
    pub fn take_fitted(&mut self) -> Vec<Fitted> {
        mem::take(&mut self.fitted)
    }

    /// Returns every error.
    #[must_use]
    pub fn into_errors(self) -> Vec<OptionError> {
        self.errors
    }
}

impl Scope for Resolver<'_> {
    /// Finds options of the table, whether a file sets them or not, and every other option in a
    /// file.
    fn find(&self, group: &str, name: &str) -> Lookup<'_> {
        if option::is_secret(self.table, group, name) {
            return Lookup::Secret;
        }
        if let Some(option) = option::find(self.table, group, name) {
            if let (Some(text), Some(_)) = (self.flags.get(option.key), option.flag()) {
                return Lookup::Literal(text);
            }
            if let Some(value) = self.env.get(option.key) {
                return value.to_str().map_or(Lookup::Unknown, Lookup::Literal);
            }
            let written = self.files.last(group, name).map(|assignment| assignment.text.as_str());
            return Lookup::Template(written.unwrap_or(option.default));
        }
        if let Some(assignment) = self.files.last(group, name) {
            return Lookup::Template(&assignment.text);
        }
        let extra = self.extra_defaults.iter().find(|(known, _)| group == DEFAULT && *known == name);
        extra.map_or(Lookup::Unknown, |(_, default)| Lookup::Literal(default))
    }
}

/// Reads a file, which may be a pipe.
fn read(file: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(file)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 1 MiB"));
    }
    Ok(bytes)
}

/// Returns the files that the shell pattern `*.conf` matches in a directory, sorted.
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
mod tests {
    use super::super::option::Access;
    use super::super::rule::{AnyPath, Number, Secret};
    use super::*;
    use secrecy::ExposeSecret;

    const fn option(name: &'static str, default: &'static str, access: Access) -> OptionSpec {
        OptionSpec {
            group: DEFAULT,
            name,
            key: name,
            env_prefix: "TEST_",
            fallbacks: &[("old", "port")],
            default,
            doc: "",
            access,
            accepts: || "a value".to_owned(),
        }
    }

    static PORT: OptionSpec = option("port", "1", Access::Flag);
    static PATH: OptionSpec = OptionSpec { fallbacks: &[], ..option("path", "$home/x", Access::File) };
    static PASSWORD: OptionSpec = OptionSpec { fallbacks: &[], ..option("password", "", Access::Secret) };
    static TABLE: Table = &[&PORT, &PATH, &PASSWORD];

    fn port(file: &str, env: Option<&str>, flag: Option<&str>) -> (Option<u16>, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.conf");
        std::fs::write(&path, file).unwrap();
        let flags = flag.into_iter().map(|text| ("port", text.to_owned())).collect();
        let env = |name: &str| env.filter(|_| name == "TEST_PORT").map(OsString::from);
        let mut resolver = Resolver::new(TABLE, &[], &flags, &env);
        resolver.merge(&ConfigSource::Dir(folder.path().to_owned()));
        let value = resolver.read(&PORT, &Number(1..=100));
        let origin_or_errors = match resolver.take_settings().first() {
            Some(setting) => setting.origin.to_string(),
            None => resolver.into_errors().iter().map(ToString::to_string).collect(),
        };
        (value, origin_or_errors.replace(path.to_str().unwrap(), "a.conf"))
    }

    #[test]
    fn flag_overrides_environment_overrides_file() {
        let file = "[DEFAULT]\nport = 2\n[old]\nport = 3\n";
        assert_eq!(port(file, Some("4"), Some("5")), (Some(5), "--port".to_owned()));
        assert_eq!(port(file, Some("4"), None), (Some(4), "environment TEST_PORT".to_owned()));
        assert_eq!(port(file, None, None), (Some(2), "a.conf:2".to_owned()));
        assert_eq!(port("[old]\nport = 3\n", None, None), (Some(3), "a.conf:2, [old] port".to_owned()));
        assert_eq!(port("", None, None), (Some(1), "default".to_owned()));
        let error = "port: \"900\" is not accepted (--port); accepted is a value".to_owned();
        assert_eq!(port(file, None, Some("900")), (None, error));
    }

    #[test]
    fn references_reach_extra_defaults_but_no_secret() {
        let flags = Flags::new();
        let env = |name: &str| (name == "TEST_PASSWORD").then(|| OsString::from("hunter2"));
        let mut resolver = Resolver::new(TABLE, &[("home", "/srv")], &flags, &env);
        assert_eq!(resolver.read(&PATH, &AnyPath), Some(PathBuf::from("/srv/x")));
        let password = resolver.read(&PASSWORD, &Secret).unwrap();
        assert_eq!(password.expose_secret(), "hunter2");
        assert_eq!(resolver.take_settings()[1].value, "(set)");
        assert!(matches!(resolver.find(DEFAULT, "password"), Lookup::Secret));
    }

    #[test]
    fn every_unreadable_source_is_an_error() {
        let flags = Flags::new();
        let mut resolver = Resolver::new(TABLE, &[], &flags, &|_| None);
        resolver.merge(&ConfigSource::File("/nonexistent/a".into()));
        resolver.merge(&ConfigSource::Dir("/nonexistent".into()));
        let folder = tempfile::tempdir().unwrap();
        let (full, over) = (folder.path().join("full"), folder.path().join("over"));
        std::fs::write(&full, "#".repeat(1024 * 1024)).unwrap();
        std::fs::write(&over, "#".repeat(1024 * 1024 + 1)).unwrap();
        resolver.merge(&ConfigSource::File(full));
        resolver.merge(&ConfigSource::File(over.clone()));
        let errors = resolver.into_errors();
        assert_eq!(errors.len(), 3);
        let wanted = format!("cannot read configuration {}: it is longer than 1 MiB", over.display());
        assert_eq!(errors[2].to_string(), wanted);
    }
}
