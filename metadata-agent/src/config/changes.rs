//! Differences between the configuration in force and one that was read again.

use oslo_config::{Origin, Setting};

use super::options::{Config, spec};

/// An option whose value has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChangedOption {
    pub name: &'static str,
    /// `None` if only a restart applies the change.
    pub at_run_time: Option<RunTimeOption>,
}

/// The options that can change while the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunTimeOption {
    /// `debug`
    LogLevel,
    /// `metadata_proxy_shared_secret`
    SharedSecret,
}

impl RunTimeOption {
    fn from_key(key: &str) -> Option<Self> {
        [Self::LogLevel, Self::SharedSecret].into_iter().find(|option| option.key() == key)
    }

    fn key(self) -> &'static str {
        match self {
            Self::LogLevel => spec::debug.key,
            Self::SharedSecret => spec::metadata_proxy_shared_secret.key,
        }
    }
}

impl Config {
    /// Lists the options that have another effect in `new`, in the order of the documentation.
    pub(crate) fn changed_options(&self, new: &Self) -> Vec<ChangedOption> {
        let pairs = self.settings.iter().zip(&new.settings);
        let changed = pairs.filter(|(old, new)| !has_effect_of(old, new));
        changed
            .map(|(_, new)| ChangedOption { name: new.key, at_run_time: RunTimeOption::from_key(new.key) })
            .collect()
    }

    /// Takes the value of an option from another configuration.
    pub(crate) fn adopt(&mut self, option: RunTimeOption, new: &Self) {
        match option {
            RunTimeOption::LogLevel => self.debug = new.debug,
            RunTimeOption::SharedSecret => {
                self.metadata_proxy_shared_secret.clone_from(&new.metadata_proxy_shared_secret);
            }
        }
        for (own, new) in self.settings.iter_mut().zip(&new.settings) {
            if own.key == option.key() {
                own.clone_from(new);
            }
        }
    }
}

/// Of some options it also matters whether they are set at all.
fn has_effect_of(old: &Setting, new: &Setting) -> bool {
    let depends_on_origin = [spec::libvirt_dir.key, spec::ovn_sb_connection.key].contains(&old.key);
    let is_set = |setting: &Setting| setting.origin != Origin::Default;
    old.has_value_of(new) && (!depends_on_origin || is_set(old) == is_set(new))
}
