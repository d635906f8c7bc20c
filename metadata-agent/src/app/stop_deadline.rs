//! A last resort: ends the process if it does not end in order in time.
//!
//! An orderly stop needs the main thread. If a system call blocks there, such as the read of a file
//! on a dead file server, the process would stay until it is killed.

use std::process;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};
use tokio::runtime::Runtime;
use tokio::time::sleep;
use tracing::error;

use super::StopSignals;

/// Time for an orderly stop after requests in flight have ended. The unit and the DaemonSet grant
/// 30 s for both.
const ORDERLY_STOP: Duration = Duration::from_secs(18);

/// Ends the process, `drain_timeout` and 18 s after a signal. To be called on the main thread, with
/// a runtime whose threads exist already.
///
/// Programs and maps then stay, as after a crash: they let packets pass, and the next agent adopts
/// them.
pub(super) fn enforce(other_runtime: &Runtime, drain_timeout: Duration) -> Result<()> {
    let _on_other_runtime = other_runtime.enter();
    let mut signals = StopSignals::watch()?;
    // The kernel prefers the main thread for a signal, and leaves it there while a call blocks.
    let handled = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    handled.thread_block().context("leave signals to other threads")?;
    other_runtime.spawn(async move {
        signals.received().await;
        sleep(drain_timeout + ORDERLY_STOP).await;
        error!("the stop timed out; exiting as after a crash");
        process::exit(1);
    });
    Ok(())
}
