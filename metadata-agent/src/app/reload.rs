//! Reads the configuration again on SIGHUP, and applies the options that can change at run time.
//!
//! An invalid configuration changes nothing. Changed options that need a restart are named each
//! time, until the restart.

use std::convert::Infallible;

use secrecy::SecretString;
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::systemd::ServiceManager;
use crate::admin::logging::LogLevel;
use crate::config::{Config, ConfigArgs, ConfigErrors, RunTimeOption};
use crate::process::blocking::blocking;
use crate::process::signals::SignalActions;

/// Values that components follow while they run.
#[derive(Clone, Debug)]
pub(super) struct LiveSettings {
    pub(super) secret: watch::Sender<SecretString>,
    /// The option `debug`.
    pub(super) debug: watch::Sender<bool>,
    /// Every option in force, as the state shows them.
    pub(super) shown: watch::Sender<Value>,
}

impl LiveSettings {
    pub(super) fn new(config: &Config) -> Self {
        let secret = watch::Sender::new(config.metadata_proxy_shared_secret.clone());
        let debug = watch::Sender::new(config.debug);
        Self { secret, debug, shown: watch::Sender::new(json!(config.settings())) }
    }
}

/// The options that changed, by name.
#[derive(Debug, Default)]
struct Reload {
    applied: Vec<&'static str>,
    needs_restart: Vec<&'static str>,
}

/// Applies changes of the configuration.
pub(super) struct Reloader {
    args: ConfigArgs,
    in_force: Config,
    log_level: LogLevel,
    live: LiveSettings,
}

impl Reloader {
    pub(super) fn new(args: &ConfigArgs, config: &Config, log_level: LogLevel, live: LiveSettings) -> Self {
        Self { args: args.clone(), in_force: config.clone(), log_level, live }
    }

    /// Reloads at each SIGHUP.
    pub(super) async fn run(mut self, signals: &SignalActions, manager: &ServiceManager) -> Infallible {
        loop {
            signals.reload_requested().await;
            manager.reloading();
            let args = self.args.clone();
            // A file on a dead file server delays nothing but the reload.
            if let Some(read) = blocking(move || Config::load(&args)).await {
                self.take(read);
            }
            manager.reloaded();
        }
    }

    fn take(&mut self, read: Result<Config, ConfigErrors>) {
        let new = match read {
            Ok(new) => new,
            Err(errors) => {
                let errors: Vec<_> = errors.0.iter().map(ToString::to_string).collect();
                let error = errors.join("; ");
                return error!(error, "cannot reload the configuration; keeping the last one");
            }
        };
        let warnings = self.in_force.warnings();
        let Reload { applied, needs_restart } = self.apply(&new);
        info!(?applied, "configuration reloaded");
        if !needs_restart.is_empty() {
            warn!(options = ?needs_restart, "changed options need a restart");
        }
        for warning in self.in_force.warnings().iter().filter(|warning| !warnings.contains(warning)) {
            warn!("{warning}");
        }
    }

    fn apply(&mut self, new: &Config) -> Reload {
        let mut reload = Reload::default();
        for changed in self.in_force.changed_options(new) {
            let Some(option) = changed.at_run_time else {
                reload.needs_restart.push(changed.name);
                continue;
            };
            self.in_force.adopt(option, new);
            match option {
                RunTimeOption::LogLevel => {
                    self.set_log_level();
                    self.live.debug.send_replace(new.debug);
                }
                RunTimeOption::SharedSecret => {
                    self.live.secret.send_replace(new.metadata_proxy_shared_secret.clone());
                }
            }
            reload.applied.push(changed.name);
        }
        self.live.shown.send_replace(json!(self.in_force.settings()));
        reload
    }

    fn set_log_level(&self) {
        match self.log_level.set(self.in_force.debug) {
            Ok(true) => {}
            Ok(false) => warn!("the option debug has no effect while RUST_LOG is set"),
            Err(error) => warn!(%error, "cannot change the log level"),
        }
    }
}
