//! Signals that do not ask a process to end, but end it by default.
//!
//! Runbooks, logrotate and oslo's state reports send SIGHUP, SIGUSR1 and SIGUSR2 to Neutron's
//! agents, and so to this one. None of them may cost a guest its request. SIGPIPE is not among
//! them, because Rust ignores it, and neither is SIGQUIT, which asks for an immediate end. Real-
//! time signals keep their effect, because nothing sends them unasked.

use std::collections::BTreeSet;
use std::io;
use std::thread;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use tracing::warn;

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

/// Keeps every signal that [`HeldSignals`] holds from ending this process, and those that ask it to
/// end: its parent gets them too. Threads inherit this.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn leave_to_parent() -> Result<(), SignalError> {
    let signals = HARMLESS.into_iter().chain([Signal::SIGTERM, Signal::SIGINT]);
    signals.collect::<SigSet>().thread_block().map_err(SignalError::Hold)
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

    /// Logs each held signal once, from a thread that takes no part in anything else.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn log(self) -> Result<(), SignalError> {
        let logging = thread::Builder::new().name("md-signals".to_owned());
        logging.spawn(move || self.log_each()).map_err(SignalError::Thread)?;
        Ok(())
    }

    fn log_each(&self) {
        let mut logged = BTreeSet::new();
        loop {
            match self.0.wait() {
                Ok(signal) if logged.insert(signal) => {
                    warn!(%signal, "signal ignored; a changed configuration needs a restart");
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return warn!(%error, "cannot wait for signals; they stay ignored"),
            }
        }
    }
}
