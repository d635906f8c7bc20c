//! `metadata-agent check`: whether this host can run the agent, and what to change where it cannot. Changes nothing.
#![expect(clippy::print_stdout, reason = "a command that prints")]

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::sys::utsname::uname;
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::admin::client;
use crate::config::{Config, Host, NovaEndpoint};
use crate::rights;
use crate::sources::ovsdb;

/// Oldest kernel: `bpf_redirect_peer` came with 5.10.
const OLDEST_KERNEL: (u32, u32) = (5, 10);

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
    let mut findings =
        vec![kernel(), ipv6(), capabilities(), bpffs(&config.bpffs_dir), namespaces(), inventory(config)];
    findings.push(open_vswitch(config).await);
    for endpoint in config.nova_endpoints() {
        findings.push(nova(&endpoint, config.nova_connect_timeout).await);
    }
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

fn kernel() -> Finding {
    let release = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    finding(
        "kernel",
        match version(&release) {
            Some(version) if version >= OLDEST_KERNEL => Ok(release),
            _ => Err(format!(
                "{release}, but {}.{} or newer is needed (bpf_redirect_peer)",
                OLDEST_KERNEL.0, OLDEST_KERNEL.1
            )),
        },
    )
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn ipv6() -> Finding {
    let there = Path::new("/proc/sys/net/ipv6").exists();
    finding(
        "IPv6",
        if there {
            Ok("in the kernel".to_owned())
        } else {
            Err("not in the kernel; boot without ipv6.disable=1 (addresses may stay off by sysctl)"
                .to_owned())
        },
    )
}

fn capabilities() -> Finding {
    let held = || rights::TO_RUN.map(|(capability, _)| capability.to_string()).join(" ");
    finding(
        "capabilities",
        rights::require(&rights::TO_RUN).map(|()| held()).map_err(|error| error.to_string()),
    )
}

fn bpffs(directory: &Path) -> Finding {
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let on_bpffs = statfs(existing).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    finding(
        "BPF file system",
        if on_bpffs {
            Ok(directory.display().to_string())
        } else {
            Err(format!("{} is not on one; mount -t bpf bpf /sys/fs/bpf", directory.display()))
        },
    )
}

fn namespaces() -> Finding {
    let there = Path::new("/proc/self/ns/net").exists();
    finding(
        "network namespaces",
        if there { Ok("in the kernel".to_owned()) } else { Err("not in the kernel".to_owned()) },
    )
}

fn inventory(config: &Config) -> Finding {
    let readable = |path: &Path, read: fn(&Path) -> std::io::Result<()>| match read(path) {
        Ok(()) => Ok(path.display().to_string()),
        Err(error) => Err(format!("{}: {error}", path.display())),
    };
    let file =
        config.static_inventory.as_deref().map(|path| readable(path, |path| fs::File::open(path).map(drop)));
    let libvirt =
        config.libvirt_dir.as_deref().map(|path| readable(path, |path| fs::read_dir(path).map(drop)));
    let (known, unknown): (Vec<_>, Vec<_>) = [file, libvirt].into_iter().flatten().partition(Result::is_ok);
    let texts = |found: Vec<Result<String, String>>| {
        found.into_iter().map(|one| one.unwrap_or_else(|error| error)).collect::<Vec<_>>().join(", ")
    };
    // One source is enough to serve; a missing one may yet come.
    finding(
        "sources",
        match (known.is_empty(), unknown.is_empty()) {
            (true, true) => Err("none is configured: static_inventory or libvirt_dir".to_owned()),
            (true, false) => Err(texts(unknown)),
            (false, true) => Ok(texts(known)),
            (false, false) => Ok(format!("{} (but not {})", texts(known), texts(unknown))),
        },
    )
}

/// Its database knows instances but no projects, so it is no source of its own.
async fn open_vswitch(config: &Config) -> Finding {
    finding(
        "Open vSwitch",
        match ovsdb::probe(config.ovsdb_connection.as_ref(), ANSWER).await {
            None => Ok(format!("none here: {} are not there", ovsdb::USUAL_SOCKETS.join(", "))),
            Some((remote, Ok(()))) => Ok(format!("{remote} has its database")),
            Some((remote, Err(error))) => Err(format!("{remote} {error} (ovsdb_connection)")),
        },
    )
}

async fn nova(endpoint: &NovaEndpoint, limit: Duration) -> Finding {
    let connected = timeout(limit, async {
        match endpoint.host.clone() {
            Host::Address(address) => TcpStream::connect((address, endpoint.port)).await,
            Host::Name(name) => TcpStream::connect((name.as_str(), endpoint.port)).await,
        }
    });
    finding(
        "Nova's metadata service",
        match connected.await {
            Ok(Ok(_)) => Ok(format!("{endpoint} takes connections")),
            Ok(Err(error)) => Err(format!("{endpoint}: {error} (nova_metadata_host, nova_metadata_port)")),
            Err(_) => Err(format!("{endpoint} does not answer within {limit:?}")),
        },
    )
}

async fn other_agent(config: &Config) -> Finding {
    let answers = client::get(&config.admin_socket, "/live", ANSWER).await.is_ok();
    let socket = config.admin_socket.display();
    let detail =
        if answers { format!("one runs already, on {socket}") } else { format!("none answers on {socket}") };
    Finding { subject: "agent", ok: true, detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        for (release, version_found) in [
            ("6.18.44-fc-v669", Some((6, 18))),
            ("5.10.0-30-cloud-amd64", Some((5, 10))),
            ("5.9", Some((5, 9))),
            ("", None),
        ] {
            assert_eq!(version(release), version_found, "{release}");
        }
        assert!(version("5.9.16") < Some(OLDEST_KERNEL));
        assert!(version("10.0.1") >= Some(OLDEST_KERNEL));
    }
}
