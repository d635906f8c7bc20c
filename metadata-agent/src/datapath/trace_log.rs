//! The programs' own log, packet by packet: the feature `trace-log`, for debugging alone.
//!
//! Records arrive as `log` records, which tracing-subscriber takes for its own.

use std::time::Duration;

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::time::interval;
use tracing::{info, warn};

/// How late a record may be.
const PERIOD: Duration = Duration::from_millis(50);

/// Hands records on until the process ends.
pub(super) fn follow(ebpf: &mut Ebpf) {
    let mut log = match EbpfLogger::init(ebpf) {
        Ok(log) => log,
        Err(error) => return warn!(%error, "no log of the programs"),
    };
    info!("the programs log each metadata packet");
    tokio::spawn(async move {
        let mut tick = interval(PERIOD);
        loop {
            tick.tick().await;
            log.flush();
        }
    });
}
