//! Blocking work beside the runtime.

use std::panic;

use tokio::task;

/// Runs blocking work, such as file operations, on a thread for such work. `None` only if the
/// runtime is shutting down.
///
/// A file on a dead file server may block for ever. If the future is dropped, the work goes on, but
/// nothing waits for it: neither this task nor the end of the process.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(lost) => match lost.try_into_panic() {
            Ok(cause) => panic::resume_unwind(cause),
            Err(_cancelled) => None,
        },
    }
}
