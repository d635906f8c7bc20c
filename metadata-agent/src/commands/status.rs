//! `metadata-agent status`: the running agent's own words, for people, scripts and probes.
#![expect(clippy::print_stdout, reason = "a command that prints")]

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyper::StatusCode;
use serde_json::Value;

use crate::admin::client;
use crate::commands::cli::StatusArgs;

/// How long the agent may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Whether it lives.
    Live,
    /// Whether it serves.
    Ready,
    /// All, as JSON.
    Json,
    /// What a person wants to know.
    Summary,
}

impl View {
    /// As the command line asks.
    #[must_use]
    pub fn of(args: &StatusArgs) -> Self {
        match (args.live, args.ready, args.json) {
            (true, _, _) => Self::Live,
            (_, true, _) => Self::Ready,
            (_, _, true) => Self::Json,
            _ => Self::Summary,
        }
    }
}

/// Asks and prints.
///
/// # Errors
/// No agent answers on the socket.
pub async fn run(socket: &Path, view: View) -> Result<ExitCode> {
    let route = match view {
        View::Live => "/live",
        View::Ready => "/ready",
        View::Json | View::Summary => "/state",
    };
    let answer = client::get(socket, route, ANSWER).await?;
    let text = String::from_utf8_lossy(&answer.body);
    match view {
        View::Live | View::Ready => {
            println!("{}", text.trim_end());
            return Ok(if answer.status == StatusCode::OK { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        _ if answer.status != StatusCode::OK => {
            bail!("the agent answers {}: {}", answer.status, text.trim_end())
        }
        View::Json => println!("{text}"),
        View::Summary => {
            let state = serde_json::from_slice(&answer.body).context("read the agent's state")?;
            print!("{}", summary(&state));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A page: how the agent is, its sources, its guests.
fn summary(state: &Value) -> String {
    let mut page = Vec::new();
    page.push(format!(
        "metadata-agent {}, process {}, up {} s",
        plain(&state["version"]),
        state["pid"],
        state["uptime_seconds"]
    ));
    page.push(match list(&state["waiting_for"]).as_slice() {
        [] => "ready".to_owned(),
        waiting => {
            format!("not ready, waiting for: {}", waiting.iter().map(plain).collect::<Vec<_>>().join(", "))
        }
    });
    for source in list(&state["sources"]) {
        let ready = if source["ready"] == true { "ready" } else { "not ready" };
        page.push(format!("source {}: {ready}, {} ports", plain(&source["source"]), source["ports"]));
        for (place, fault) in source["faults"].as_object().into_iter().flatten() {
            page.push(format!("  {place}: {}", plain(fault)));
        }
    }
    page.push(format!("attached by {}:", plain(&state["datapath"]["hook"])));
    for attachment in list(&state["attachments"]) {
        let instance = attachment["port"]["instance"].as_str();
        let instance = instance.map_or_else(|| plain(&attachment["identity"]), |id| format!("instance {id}"));
        let clients = list(&attachment["clients"]).len();
        let vlan = attachment["vlan"].as_u64().map(|vlan| format!(" VLAN {vlan}")).unwrap_or_default();
        page.push(format!("  {}{vlan}  {instance}  {clients} clients", plain(&attachment["interface"])));
    }
    for failure in list(&state["failed"]) {
        page.push(format!("  {}  not attached: {}", plain(&failure["interface"]), plain(&failure["error"])));
    }
    page.push("packets:".to_owned());
    for (reason, count) in state["datapath"]["packets"].as_object().into_iter().flatten() {
        if *count != 0 {
            page.push(format!("  {reason}  {count}"));
        }
    }
    page.join("\n") + "\n"
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_summary_names_what_is_wrong_and_who_is_served() {
        let page = summary(&json!({
            "version": "0.1.0", "pid": 7, "uptime_seconds": 5,
            "waiting_for": ["source libvirt"],
            "sources": [{"source": "libvirt", "ready": false, "ports": 0, "faults": {"/run/x": "no such directory"}}],
            "datapath": {"hook": "tcx", "packets": {"reply": 4, "vlan": 0}},
            "attachments": [
                {"interface": "tap1", "identity": "known", "port": {"instance": "i-1"}, "clients": [{}]},
                {"interface": "tap1", "vlan": 5, "identity": "known", "port": {"instance": "i-1"}, "clients": []},
                {"interface": "tap2", "vlan": null, "identity": "unknown", "port": null, "clients": []},
            ],
            "failed": [{"interface": "tap3", "error": "gone"}],
        }));
        for line in [
            "not ready, waiting for: source libvirt",
            "source libvirt: not ready, 0 ports",
            "  /run/x: no such directory",
            "  tap1  instance i-1  1 clients",
            "  tap1 VLAN 5  instance i-1  0 clients",
            "  tap2  unknown  0 clients",
            "  tap3  not attached: gone",
            "  reply  4",
        ] {
            assert!(page.lines().any(|l| l == line), "{line:?} in\n{page}");
        }
        assert!(!page.contains("vlan"), "reasons without packets are left out");
    }
}
