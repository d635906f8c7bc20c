//! `metadata-agent status`: shows the state of the running agent, for people, scripts and probes.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyper::StatusCode;
use serde_json::Value;

use super::cli::StatusArgs;
use super::output::print;
use super::{block_on, exit_code, unusable_config};
use crate::admin::client;
use crate::config;

/// Time for the agent to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The part of the state to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    Live,
    Ready,
    /// The whole state.
    Json,
    /// A page for people.
    Summary,
}

impl View {
    fn from_args(args: &StatusArgs) -> Self {
        match (args.live, args.ready, args.json) {
            (true, _, _) => Self::Live,
            (_, true, _) => Self::Ready,
            (_, _, true) => Self::Json,
            _ => Self::Summary,
        }
    }
}

pub(super) fn run(args: &StatusArgs) -> ExitCode {
    match config::admin_socket(&args.config) {
        Ok(socket) => exit_code(block_on(show(&socket, View::from_args(args)))),
        Err(errors) => unusable_config(&errors),
    }
}

async fn show(socket: &Path, view: View) -> Result<ExitCode> {
    let route = match view {
        View::Live => "/live",
        View::Ready => "/ready",
        View::Json | View::Summary => "/state",
    };
    let response = client::get(socket, route, RESPONSE_TIMEOUT).await?;
    let text = String::from_utf8_lossy(&response.body);
    match view {
        View::Live | View::Ready => {
            print(|out| writeln!(out, "{}", text.trim_end()))?;
            return Ok(if response.status == StatusCode::OK { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        _ if response.status != StatusCode::OK => {
            bail!("the agent answers {}: {}", response.status, text.trim_end())
        }
        View::Json => print(|out| writeln!(out, "{text}"))?,
        View::Summary => {
            let state = serde_json::from_slice(&response.body).context("read the agent's state")?;
            print(|out| out.write_all(summary(&state).as_bytes()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Formats the state for people: readiness, sources, attachments, packets.
fn summary(state: &Value) -> String {
    let mut page = Vec::new();
    // Process and readiness.
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
    page.extend(data_path(&state["data_path"]));
    // Sources with their errors.
    for source in list(&state["sources"]) {
        let ready = if source["ready"] == true { "ready" } else { "not ready" };
        page.push(format!("source {}: {ready}, {} ports", plain(&source["source"]), source["ports"]));
        for (place, error) in source["faults"].as_object().into_iter().flatten() {
            page.push(format!("  {place}: {}", plain(error)));
        }
    }
    // Attachments with their clients, and interfaces without one.
    page.push(format!("attached by {}:", plain(&state["datapath"]["hook"])));
    for attachment in list(&state["attachments"]) {
        let instance = attachment["port"]["instance"].as_str();
        let instance = instance.map_or_else(|| plain(&attachment["identity"]), |id| format!("instance {id}"));
        let clients = list(&attachment["clients"]).len();
        let vlan = attachment["vlan"].as_u64().map(|vlan| format!(" VLAN {vlan}")).unwrap_or_default();
        page.push(format!("  {}{vlan}  {instance}  {clients} clients", plain(&attachment["interface"])));
        page.extend(refused(&attachment["refused"]));
    }
    for failure in list(&state["failed"]) {
        page.push(format!("  {}  not attached: {}", plain(&failure["interface"]), plain(&failure["error"])));
    }
    page.extend(namespaces(&state["namespaces"]));
    // Packet counters other than 0.
    page.push("packets:".to_owned());
    for (reason, count) in state["datapath"]["packets"].as_object().into_iter().flatten() {
        if *count != 0 {
            page.push(format!("  {reason}  {count}"));
        }
    }
    page.join("\n") + "\n"
}

/// Formats the outcome of the agent's own requests through the datapath; nothing if it sends none.
fn data_path(state: &Value) -> Option<String> {
    state.as_object()?;
    let answered = match state["last_success_seconds_ago"].as_f64() {
        Some(seconds) => format!("answered {seconds:.0} s ago"),
        None => "not answered yet".to_owned(),
    };
    let error = state["error"].as_str();
    let error = error.map(|error| format!(", {} failed since: {error}", state["failures"]));
    Some(format!("data path: {answered}{}", error.unwrap_or_default()))
}

/// Formats the namespaces of routers and DHCP servers; nothing if there are none.
fn namespaces(state: &Value) -> Vec<String> {
    let (idle, failed) = (list(&state["idle"]), list(&state["failed"]));
    let served = state["served"].as_u64().unwrap_or_default();
    if served == 0 && idle.is_empty() && failed.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![format!("namespaces: {served} served, {} idle", idle.len())];
    for (namespaces, what, key) in [(failed, "failed", "error"), (idle, "idle", "reason")] {
        let line = |one: &Value| format!("  {}  {what}: {}", plain(&one["namespace"]), plain(&one[key]));
        lines.extend(namespaces.iter().map(line));
    }
    lines
}

/// Formats the refused packets of an attachment, if there are any.
fn refused(refused: &Value) -> Option<String> {
    let packets = refused["packets"].as_object()?.iter();
    let packets: Vec<_> = packets.map(|(reason, count)| format!("{count} {reason}")).collect();
    let last = &refused["last"];
    let from = |key: &str| last[key].as_str().unwrap_or("unknown");
    Some(format!(
        "    refused: {}; last {} from {} ({}), {:.0} s ago",
        packets.join(", "),
        plain(&last["reason"]),
        from("address"),
        from("mac"),
        last["seconds_ago"].as_f64().unwrap_or_default(),
    ))
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
    fn the_summary_shows_errors_and_served_guests() {
        let page = summary(&json!({
            "version": "0.1.0", "pid": 7, "uptime_seconds": 5,
            "waiting_for": ["source libvirt"],
            "sources": [{"source": "libvirt", "ready": false, "ports": 0, "faults": {"/run/x": "no such directory"}}],
            "datapath": {"hook": "tcx", "packets": {"reply": 4, "vlan": 0}},
            "data_path": {"last_success_seconds_ago": 14.2, "failures": 2, "error": "listener: no connection"},
            "attachments": [
                {"interface": "tap1", "identity": "known", "port": {"instance": "i-1"}, "clients": [{}]},
                {"interface": "tap1", "vlan": 5, "identity": "known", "port": {"instance": "i-1"}, "clients": []},
                {"interface": "tap2", "vlan": null, "identity": "unknown", "port": null, "clients": [], "refused": null},
                {"interface": "tap4", "identity": "known", "port": {"instance": "i-4"}, "clients": [], "refused": {
                    "packets": {"forged_address": 5, "forged_mac": 2},
                    "last": {"reason": "forged_address", "mac": "fa:16:3e:00:00:05", "address": "10.0.0.9", "seconds_ago": 2.4},
                }},
            ],
            "failed": [{"interface": "tap3", "error": "gone"}],
            "namespaces": {
                "served": 1,
                "idle": [{"namespace": "qdhcp-1", "reason": "no interface tap*"}],
                "failed": [{"namespace": "qrouter-1", "error": "md-portal is gone"}],
            },
        }));
        for line in [
            "not ready, waiting for: source libvirt",
            "data path: answered 14 s ago, 2 failed since: listener: no connection",
            "source libvirt: not ready, 0 ports",
            "  /run/x: no such directory",
            "  tap1  instance i-1  1 clients",
            "  tap1 VLAN 5  instance i-1  0 clients",
            "  tap2  unknown  0 clients",
            "  tap4  instance i-4  0 clients",
            "    refused: 5 forged_address, 2 forged_mac; last forged_address from 10.0.0.9 (fa:16:3e:00:00:05), 2 s ago",
            "  tap3  not attached: gone",
            "namespaces: 1 served, 1 idle",
            "  qrouter-1  failed: md-portal is gone",
            "  qdhcp-1  idle: no interface tap*",
            "  reply  4",
        ] {
            assert!(page.lines().any(|l| l == line), "{line:?} in\n{page}");
        }
        assert!(!page.contains("vlan"), "reasons without packets are left out");
    }
}
