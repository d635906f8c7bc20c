//! What there is to know of an option besides its value's type: its names, its default, where it may be set.

/// One option.
#[derive(Debug)]
pub struct OptionSpec {
    /// The section of the configuration files.
    pub group: &'static str,
    /// The name in files.
    pub name: &'static str,
    /// The name among the options of all sections. With dashes it is the flag.
    pub key: &'static str,
    /// Options of files, by section and name, that count where this one is not set, the first of them before the next.
    pub fallbacks: &'static [(&'static str, &'static str)],
    /// The value where nobody sets one, as it would stand in a file.
    pub default: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// Where it may be set, and whether it may be shown.
    pub access: Access,
    /// What its rule accepts.
    pub accepts: fn() -> String,
}

/// Where an option may be set besides files and environment, and whether it may be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// In files and environment alone.
    File,
    /// By a flag, too.
    Flag,
    /// By a flag that needs no value, too.
    Toggle,
    /// Like [`Access::File`], since the process list shows flags; and never shown.
    Secret,
}

impl OptionSpec {
    /// The environment variable that sets it.
    #[must_use]
    pub fn env(&self) -> String {
        format!("METADATA_AGENT_{}", self.key.to_ascii_uppercase())
    }

    /// The flag that sets it, without the leading dashes.
    #[must_use]
    pub fn flag(&self) -> Option<String> {
        let flag = match self.access {
            Access::Flag | Access::Toggle => true,
            Access::File | Access::Secret => false,
        };
        flag.then(|| self.key.replace('_', "-"))
    }

    /// Where it may stand in a file, by section and name, the one that wins first.
    pub fn places(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        std::iter::once((self.group, self.name)).chain(self.fallbacks.iter().copied())
    }

    /// Whether its value must not be shown.
    #[must_use]
    pub fn is_secret(&self) -> bool {
        self.access == Access::Secret
    }
}

/// A table of options, in the order of the documentation.
pub type Table = &'static [&'static OptionSpec];

/// Finds an option by its group, folded, and its name.
#[must_use]
pub fn find(table: Table, group: &str, name: &str) -> Option<&'static OptionSpec> {
    table.iter().copied().find(|spec| spec.group == group && spec.name == name)
}

/// Whether what stands in a file under this section, folded, and name must not be shown.
#[must_use]
pub fn is_secret(table: Table, group: &str, name: &str) -> bool {
    table.iter().any(|spec| spec.is_secret() && spec.places().any(|place| place == (group, name)))
}
