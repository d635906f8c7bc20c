//! The programs' own log of each packet: the feature `trace-log`, for debugging only.
//!
//! Records arrive as `log` records, which tracing-subscriber handles like its own.

use std::time::Duration;

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::time::interval;
use tracing::{info, warn};

/// Maximum delay of a record.
const PERIOD: Duration = Duration::from_millis(50);

/// Forwards records until the process ends.
pub(super) fn follow(ebpf: &mut Ebpf) {
    let mut log = match EbpfLogger::init(ebpf) {
        Ok(log) => log,
        Err(error) => return warn!(%error, "cannot read the log of the BPF programs"),
    };
    info!("BPF programs log each metadata packet");
    tokio::spawn(async move {
        let mut tick = interval(PERIOD);
        loop {
            tick.tick().await;
            log.flush();
        }
    });
}
