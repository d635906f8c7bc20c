//! The description of an option: its names, default and documentation, and where it may be set.

/// The description of one option.
#[derive(Debug)]
pub struct OptionSpec {
    /// Section in files.
    pub group: &'static str,
    /// Name in files.
    pub name: &'static str,
    /// Name among the options of all sections. With dashes it is the flag.
    pub key: &'static str,
    /// Start of the environment variable's name.
    pub env_prefix: &'static str,
    /// Options in files, by section and name, that stand in for this one if it is not set. Earlier
    /// ones win.
    pub fallbacks: &'static [(&'static str, &'static str)],
    /// Default, as it would be written in a file.
    pub default: &'static str,
    pub doc: &'static str,
    pub access: Access,
    /// Description of the accepted values.
    pub accepts: fn() -> String,
}

/// Ways to set an option besides files and the environment, and its visibility.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// No flag.
    File,
    /// A flag with a value.
    Flag,
    /// A flag whose value may be left out.
    Toggle,
    /// No flag, because the process list shows flags. The value is never shown.
    Secret,
}

impl OptionSpec {
    /// Returns the environment variable that sets the option.
    #[must_use]
    pub fn env(&self) -> String {
        format!("{}{}", self.env_prefix, self.key.to_ascii_uppercase())
    }

    /// Returns the flag that sets the option, without its dashes.
    #[must_use]
    pub fn flag(&self) -> Option<String> {
        let flag = match self.access {
            Access::Flag | Access::Toggle => true,
            Access::File | Access::Secret => false,
        };
        flag.then(|| self.key.replace('_', "-"))
    }

    /// Returns the sections and names under which files may set the option. Earlier ones win.
    pub fn places(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        std::iter::once((self.group, self.name)).chain(self.fallbacks.iter().copied())
    }

    /// Reports whether the value must not be shown.
    #[must_use]
    pub fn is_secret(&self) -> bool {
        self.access == Access::Secret
    }
}

/// A table of options, in the order of the documentation.
pub type Table = &'static [&'static OptionSpec];

/// Finds an option by its folded group and its name.
#[must_use]
pub fn find(table: Table, group: &str, name: &str) -> Option<&'static OptionSpec> {
    table.iter().copied().find(|spec| spec.group == group && spec.name == name)
}

/// Reports whether the value that files give to this folded section and name must not be shown.
#[must_use]
pub fn is_secret(table: Table, group: &str, name: &str) -> bool {
    table.iter().any(|spec| spec.is_secret() && spec.places().any(|place| place == (group, name)))
}
