//! From what was written to the value of each option: flags win over the environment, the environment over files, files
//! over defaults.
//!
//! Every fault is collected, so that one run shows them all. References (`$name`) are replaced in values of files
//! alone: flags and environment are taken to the letter, as a shell or a unit file has had its own say there.
//! Unknown options are no fault, since the files are Neutron's. No secret is ever shown.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::mem;
use std::path::Path;

use super::fault::{ConfigFaults, Fault};
use super::interpolate::{Found, Scope, expand};
use super::notice::{Effect, Notice};
use super::raw::{Assignment, DEFAULT, RawConfig};
use super::rule::{Rejected, Rule};
use super::setting::{Origin, Setting};
use super::spec::{self, OptionSpec, Table};

/// Neutron's options that Neutron's files refer to in the values of ours, with their defaults.
const NEUTRON_DEFAULTS: [(&str, &str); 1] = [("state_path", "/var/lib/neutron")];

/// Values given by flags, by the option's key.
pub type Flags = BTreeMap<&'static str, String>;

/// Reads the options one by one.
pub(super) struct Resolver<'a> {
    table: Table,
    flags: &'a Flags,
    env: HashMap<&'static str, OsString>,
    raw: RawConfig,
    settings: Vec<Setting>,
    notices: Vec<Notice>,
    faults: Vec<Fault>,
}

impl<'a> Resolver<'a> {
    /// Takes the variables that are ours out of the environment.
    pub(super) fn new(table: Table, flags: &'a Flags, env: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let env = table.iter().filter_map(|spec| Some((spec.key, env(&spec.env())?))).collect();
        Self {
            table,
            flags,
            env,
            raw: RawConfig::default(),
            settings: Vec::new(),
            notices: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Whether flag or environment set an option, so that files do not matter to it.
    pub(super) fn is_set_outside_files(&self, option: &OptionSpec) -> bool {
        self.flags.contains_key(option.key) || self.env.contains_key(option.key)
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
        if let (Some(text), Some(flag)) = (self.flags.get(option.key), option.flag()) {
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
            return Ok((vec![assignment.text.clone()], Origin::of(assignment)));
        }
        for (group, name) in option.fallbacks {
            if let Some(Assignment { text, place }) = self.raw.last(group, name) {
                let (path, line) = (place.file.to_path_buf(), place.line);
                return Ok((vec![text.clone()], Origin::Fallback { group, name, path, line }));
            }
        }
        Ok((vec![option.default.to_owned()], Origin::Default))
    }

    /// What stands in the files.
    pub(super) const fn files(&self) -> &RawConfig {
        &self.raw
    }

    /// Keeps what is worth a line in the log.
    pub(super) fn note(&mut self, notices: Vec<Notice>) {
        self.notices.extend(notices);
    }

    /// The options that were read, in their order; once.
    pub(super) fn take_settings(&mut self) -> Vec<Setting> {
        mem::take(&mut self.settings)
    }

    /// What is worth a line in the log, unless there was a fault anywhere.
    pub(super) fn finish(self) -> Result<Vec<Notice>, ConfigFaults> {
        if self.faults.is_empty() { Ok(self.notices) } else { Err(self.into_faults()) }
    }

    /// Everything that is wrong.
    pub(super) fn into_faults(self) -> ConfigFaults {
        ConfigFaults(self.faults)
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

impl Scope for Resolver<'_> {
    /// Every option that stands in a file can be referred to, whether we know it or not, and every one we know.
    fn find(&self, group: &str, name: &str) -> Found<'_> {
        if spec::is_secret(self.table, group, name) {
            return Found::Secret;
        }
        if let Some(option) = spec::find(self.table, group, name) {
            if let (Some(text), Some(_)) = (self.flags.get(option.key), option.flag()) {
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
