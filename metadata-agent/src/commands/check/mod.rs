//! `metadata-agent check`: checks if this host can run the agent, and names what to change. Changes
//! nothing.
//!
//! One file per subject; each returns its findings.

mod host;
mod nova;
mod sources;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::cli::CheckArgs;
use super::output::print;
use super::{block_on, with_config};
use crate::admin::client;
use crate::config::Config;

/// Time for another agent to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The result of one check.
#[derive(Debug, Serialize)]
struct Finding {
    subject: &'static str,
    ok: bool,
    detail: String,
}

pub(super) fn run(args: &CheckArgs) -> ExitCode {
    with_config(&args.config, |config| block_on(check(config, args.json)))
}

/// Runs all checks and prints their findings.
async fn check(config: &Config, json: bool) -> Result<ExitCode> {
    let mut findings = host::check(config);
    findings.extend(sources::check(config).await);
    findings.extend(nova::check(config).await);
    findings.push(other_agent(config).await);
    // Warnings and notes fail no check.
    findings.extend(config.warnings().iter().map(|warning| Finding {
        subject: "configuration",
        ok: true,
        detail: format!("warning: {warning}"),
    }));
    findings.extend(config.notices().iter().map(|notice| Finding {
        subject: "configuration",
        ok: true,
        detail: format!("note: {notice}"),
    }));
    if json {
        let json = serde_json::to_string_pretty(&findings)?;
        print(|out| writeln!(out, "{json}"))?;
    } else {
        print(|out| {
            findings.iter().try_for_each(|Finding { subject, ok, detail }| {
                writeln!(out, "{}  {subject}: {detail}", if *ok { "ok     " } else { "MISSING" })
            })
        })?;
    }
    Ok(if findings.iter().all(|finding| finding.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn finding(subject: &'static str, outcome: Result<String, String>) -> Finding {
    match outcome {
        Ok(detail) => Finding { subject, ok: true, detail },
        Err(detail) => Finding { subject, ok: false, detail },
    }
}

async fn other_agent(config: &Config) -> Finding {
    let answers = client::get(&config.admin_socket, "/live", RESPONSE_TIMEOUT).await.is_ok();
    let socket = config.admin_socket.display();
    let detail = if answers {
        format!("an agent runs already, on {socket}")
    } else {
        format!("no agent answers on {socket}")
    };
    Finding { subject: "agent", ok: true, detail }
}
