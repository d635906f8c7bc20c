//! The threads of an attack.

use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::wait::{self, PATIENCE};

/// The time after which an attack ends by itself.
pub(super) const LIMIT: Duration = Duration::from_secs(90);

/// An attack that runs until it is dropped.
#[derive(Debug)]
pub(super) struct Running {
    stop: CancellationToken,
    threads: Vec<JoinHandle<()>>,
    progress: Progress,
    /// The progress at which the attack has its full effect.
    wanted: usize,
}

/// The number of connections that are in their place, or of packets that were sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Arc<AtomicUsize>);

impl Progress {
    pub fn add(&self, count: usize) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

impl Running {
    pub fn new(wanted: usize) -> Self {
        Self { stop: CancellationToken::new(), threads: Vec::new(), progress: Progress::default(), wanted }
    }

    /// Starts a thread. It must end soon after its token is cancelled, and after [`LIMIT`].
    pub fn spawn(&mut self, run: impl FnOnce(&CancellationToken, Progress) + Send + 'static) {
        let (stop, progress) = (self.stop.clone(), self.progress.clone());
        self.threads.push(thread::spawn(move || run(&stop, progress)));
    }

    /// Waits until the attack has its full effect.
    pub fn wait_until_effective(&self) {
        wait::until("the attack is in its place", PATIENCE, || {
            (self.progress.0.load(Ordering::Relaxed) >= self.wanted).then_some(())
        });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            if let Err(panicked) = thread.join()
                && !thread::panicking()
            {
                panic::resume_unwind(panicked);
            }
        }
    }
}
