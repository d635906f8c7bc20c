//! An interrupted bench stops after its current run and removes everything that it has set up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, ensure};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Handles SIGINT and SIGTERM from now on.
pub fn listen() -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        ASKED.store(true, Ordering::Release);
    });
    Ok(())
}

/// Returns an error if the bench was interrupted. Called between two runs.
pub fn check() -> anyhow::Result<()> {
    ensure!(!ASKED.load(Ordering::Acquire), "interrupted: no report");
    Ok(())
}
