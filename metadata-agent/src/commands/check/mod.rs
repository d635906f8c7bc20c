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
use crate::net::socket_file::{self, SocketFileError};

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
    let other_agent = client::get(&config.admin_socket, "/live", RESPONSE_TIMEOUT).await.is_ok();
    findings.push(agent(config, other_agent));
    findings.extend(haproxy_socket(config, other_agent));
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

fn agent(config: &Config, answers: bool) -> Finding {
    let socket = config.admin_socket.display();
    let detail = if answers {
        format!("an agent runs already, on {socket}")
    } else {
        format!("no agent answers on {socket}")
    };
    Finding { subject: "agent", ok: true, detail }
}

/// Checks that the socket for haproxies is free. If an agent of this configuration runs, it is that
/// agent's.
fn haproxy_socket(config: &Config, agent_runs: bool) -> Option<Finding> {
    let path = &config.metadata_proxy_socket;
    if !config.serve_metadata_proxy_socket {
        return None;
    }
    let place = path.display();
    let outcome = match socket_file::is_available(path) {
        Err(SocketFileError::AnotherAgent { .. }) if agent_runs => Ok(format!("{place} is served")),
        Err(SocketFileError::AnotherAgent { .. }) => {
            Err(format!("another process answers on {place}; stop Neutron's metadata agent"))
        }
        Err(error) => Err(format!("{error} (metadata_proxy_socket)")),
        Ok(()) => Ok(format!("{place} is free")),
    };
    Some(finding("socket for haproxies", outcome))
}
