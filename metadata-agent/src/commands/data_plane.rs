//! `metadata-agent data-plane`: the process that answers guests. `run` starts it.

use std::process::ExitCode;

use anyhow::Result;

use super::exit_code;
use crate::admin::logging::{self, LogFormat};
use crate::data_plane::DataPlaneProcess;
use crate::process::signals;

pub(super) fn run() -> ExitCode {
    exit_code(serve().map(|()| ExitCode::SUCCESS))
}

fn serve() -> Result<()> {
    // A service manager or a terminal signals all processes. The parent ends this one in order.
    signals::leave_to_parent()?;
    let process = DataPlaneProcess::receive()?;
    let log = process.log_settings();
    let level = logging::init(log.debug, if log.json { LogFormat::Json } else { LogFormat::Text })?;
    process.serve(move |debug| {
        if let Err(error) = level.set(debug) {
            tracing::warn!(%error, "cannot change the log level");
        }
    })
}
