//! `metadata-agent check`: whether this host can run the agent, and what to change where it cannot. Changes nothing.
//!
//! A file a subject; each returns its findings.
#![expect(clippy::print_stdout, reason = "a command that prints")]

mod host;
mod nova;
mod sources;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::admin::client;
use crate::config::Config;

/// How long another agent may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// One question and its answer.
#[derive(Debug, Serialize)]
struct Finding {
    subject: &'static str,
    ok: bool,
    detail: String,
}

/// Looks, prints, and exits with 0 if nothing is missing.
///
/// # Errors
/// Output cannot be written as JSON.
pub async fn run(config: &Config, json: bool) -> Result<ExitCode> {
    let mut findings = host::look(config);
    findings.extend(sources::look(config).await);
    findings.extend(nova::look(config).await);
    findings.push(other_agent(config).await);
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
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        for finding in &findings {
            println!(
                "{}  {}: {}",
                if finding.ok { "ok     " } else { "MISSING" },
                finding.subject,
                finding.detail
            );
        }
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
    let answers = client::get(&config.admin_socket, "/live", ANSWER).await.is_ok();
    let socket = config.admin_socket.display();
    let detail =
        if answers { format!("one runs already, on {socket}") } else { format!("none answers on {socket}") };
    Finding { subject: "agent", ok: true, detail }
}
