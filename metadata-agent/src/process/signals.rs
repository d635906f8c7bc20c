//! Signals that do not ask a process to end, but end it by default.
//!
//! Runbooks, logrotate and oslo's state reports send SIGHUP, SIGUSR1 and SIGUSR2 to Neutron's
//! agents, and so to this one. None of them may cost a guest its request. SIGPIPE is not among
//! them, because Rust ignores it, and neither is SIGQUIT, which asks for an immediate end. Real-
//! time signals keep their effect, because nothing sends them unasked.
//!
//! SIGUSR1 logs the state, and SIGHUP asks for the configuration to be read again. All others have
//! no effect.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};
use std::thread;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use tokio::sync::Notify;
use tracing::{info, warn};

const HARMLESS: [Signal; 10] = [
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGSTKFLT,
    // A log file at its size limit. The write fails as well.
    Signal::SIGXFSZ,
];

/// Holds the signals that ask this process to end. Its parent gets them as well, and ends it.
/// Threads inherit this.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn leave_to_parent() -> Result<(), SignalError> {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]).thread_block().map_err(SignalError::Hold)
}

/// The kernel refuses to handle signals.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignalError {
    #[error("cannot hold signals: {0}")]
    Hold(Errno),
    #[error("cannot start the thread for signals: {0}")]
    Thread(io::Error),
}

/// Harmless signals, which the kernel holds back.
#[derive(Debug)]
pub(crate) struct HeldSignals(SigSet);

/// Actions of the thread for signals. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct SignalActions(Arc<Actions>);

#[derive(Default)]
struct Actions {
    log_state: OnceLock<Box<dyn Fn() + Send + Sync>>,
    reload: Notify,
}

impl fmt::Debug for SignalActions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SignalActions")
    }
}

impl HeldSignals {
    /// Keeps harmless signals from ending this process. Threads inherit this, so it must be called
    /// before another one exists.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn hold() -> Result<Self, SignalError> {
        let signals = SigSet::from_iter(HARMLESS);
        signals.thread_block().map_err(SignalError::Hold)?;
        Ok(Self(signals))
    }

    /// Gives the signals their usual effect again, also those that are pending.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn release(self) -> Result<(), SignalError> {
        self.0.thread_unblock().map_err(SignalError::Hold)
    }

    /// Handles the held signals on a thread that takes no part in anything else. So the state is
    /// also logged while a runtime hangs.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn handle(self) -> Result<SignalActions, SignalError> {
        let actions = SignalActions::default();
        let (thread, on_thread) = (thread::Builder::new().name("md-signals".to_owned()), actions.clone());
        thread.spawn(move || self.handle_each(&on_thread)).map_err(SignalError::Thread)?;
        Ok(actions)
    }

    fn handle_each(&self, actions: &SignalActions) {
        let mut ignored = BTreeSet::new();
        loop {
            match self.0.wait() {
                Ok(Signal::SIGUSR1) => actions.log_state(),
                Ok(Signal::SIGHUP) => actions.0.reload.notify_one(),
                Ok(signal) if ignored.insert(signal) => warn!(%signal, "signal ignored"),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return warn!(%error, "cannot wait for signals; they stay ignored"),
            }
        }
    }
}

impl SignalActions {
    /// Sets what logs the state. Later calls have no effect.
    pub(crate) fn set_log_state(&self, log_state: impl Fn() + Send + Sync + 'static) {
        // Set already.
        let _ = self.0.log_state.set(Box::new(log_state));
    }

    /// Waits until SIGHUP arrives. Several that arrive meanwhile count as one.
    pub(crate) async fn reload_requested(&self) {
        self.0.reload.notified().await;
    }

    fn log_state(&self) {
        if let Some(log_state) = self.0.log_state.get() {
            log_state();
        } else {
            info!("state: components have not started");
        }
    }
}
