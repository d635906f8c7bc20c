//! Checks of the sources: one finding for each, and one for all together.

use std::io::ErrorKind;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use super::{Finding, finding};
use crate::config::{Config, UpstreamKind};
use crate::sources::libvirt::DomainDirectory;
use crate::sources::neutron::NeutronProbe;
use crate::sources::{libvirt, neutron, ovn, ovsdb, static_file};

/// Time for a server to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The result of one source.
struct Source {
    subject: &'static str,
    state: Availability,
    /// Provides everything that Nova needs.
    suffices: bool,
}

enum Availability {
    /// The source can be read. The text says what was found.
    Works(String),
    /// The source is not on this host. The text says where it was searched.
    Absent(String),
    /// The source is configured or present but cannot be read. The text says what to change.
    Broken(String),
}

pub(super) async fn check(config: &Config) -> Vec<Finding> {
    let (open_vswitch, southbound, neutron) =
        tokio::join!(open_vswitch(config), southbound(config), neutron(config));
    // OVN looks up ports by their ids, which come from Open vSwitch.
    let suffices = matches!(open_vswitch.state, Availability::Works(_));
    let southbound = Source { suffices, ..southbound };
    findings(vec![static_file(config), libvirt(config), open_vswitch, southbound, neutron])
}

/// Combines the results. One working source is enough to serve, and an absent one may still appear.
fn findings(sources: Vec<Source>) -> Vec<Finding> {
    let enough = |source: &Source| source.suffices && matches!(source.state, Availability::Works(_));
    let names = |sources: &[Source], which: &dyn Fn(&Source) -> bool| {
        let names: Vec<_> = sources.iter().filter(|one| which(one)).map(|one| one.subject).collect();
        names.join(", ")
    };
    let all = if sources.iter().any(enough) {
        Ok(format!("guests can be identified by {}", names(&sources, &enough)))
    } else {
        let possible = names(&sources, &|source| source.suffices);
        Err(format!("no guest can be identified; one of these must work: {possible}"))
    };
    let mut findings: Vec<_> = sources
        .into_iter()
        .map(|source| {
            let outcome = match source.state {
                Availability::Works(detail) | Availability::Absent(detail) => Ok(detail),
                Availability::Broken(detail) => Err(detail),
            };
            finding(source.subject, outcome)
        })
        .collect();
    findings.push(finding("sources", all));
    findings
}

fn static_file(config: &Config) -> Source {
    let state = match &config.static_inventory {
        None => Availability::Absent("none is configured (static_inventory)".to_owned()),
        Some(path) => match static_file::probe(path) {
            Ok(ports) => Availability::Works(format!("{} has {ports} ports", path.display())),
            Err(error) => Availability::Broken(format!("{}: {error} (static_inventory)", path.display())),
        },
    };
    Source { subject: "static inventory", state, suffices: true }
}

fn libvirt(config: &Config) -> Source {
    let state = match config.libvirt() {
        None => Availability::Absent("none is configured (libvirt_dir)".to_owned()),
        Some(directory) => libvirt_in(&directory),
    };
    Source { subject: "libvirt", state, suffices: true }
}

fn libvirt_in(directory: &DomainDirectory) -> Availability {
    let place = directory.path.display();
    match libvirt::probe(&directory.path) {
        Ok(summary) => {
            let libvirt::DomainSummary { domains, ports, others, errors } = summary;
            let others = (others > 0).then(|| format!(", and {others} other domains"));
            let errors = errors.iter().map(|(name, error)| format!("; {name}: {error}"));
            let more: String = others.into_iter().chain(errors).collect();
            Availability::Works(format!("{place} has {domains} Nova domains with {ports} ports{more}"))
        }
        Err(error) if error.kind() == ErrorKind::NotFound && !directory.is_configured => {
            Availability::Absent(format!(
                "{place} is not there; if libvirt runs domains here, set libvirt_dir to where it keeps their state"
            ))
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Availability::Broken(format!("{place}: {error}; let the agent's user read it"))
        }
        Err(error) => Availability::Broken(format!("{place}: {error} (libvirt_dir)")),
    }
}

/// Checks Open vSwitch. Its database has instances and networks but no projects. Nova needs the
/// project, while Neutron's agent looks it up.
async fn open_vswitch(config: &Config) -> Source {
    let access = config.open_vswitch();
    let access = ovsdb::OvsdbAccess { timeout: access.timeout.min(RESPONSE_TIMEOUT), ..access };
    let state = match access.probe().await {
        None => Availability::Absent(format!("none here: {} are not there", ovsdb::USUAL_SOCKETS.join(", "))),
        Some((remote, Ok(()))) => Availability::Works(format!("{remote} has its database")),
        Some((remote, Err(error))) => Availability::Broken(format!("{remote}: {error} (ovsdb_connection)")),
    };
    Source { subject: "Open vSwitch", state, suffices: config.upstream != UpstreamKind::Nova }
}

/// Checks OVN's servers. One that answers is enough; the finding lists all.
async fn southbound(config: &Config) -> Source {
    let state = match config.ovn() {
        None => Availability::Absent("none is configured (ovn_sb_connection)".to_owned()),
        Some(access) => {
            let access = ovn::OvnAccess { timeout: access.timeout.min(RESPONSE_TIMEOUT), ..access };
            let answers = access.probe().await;
            let works = answers.iter().any(|(_, answer)| answer.is_ok());
            let each = answers.iter().map(|(server, answer)| match answer {
                Ok(()) => format!("{server} has its database"),
                Err(error) => format!("{server}: {error}"),
            });
            let each = each.collect::<Vec<_>>().join("; ");
            if works {
                Availability::Works(each)
            } else {
                Availability::Broken(format!("{each} (ovn_sb_connection)"))
            }
        }
    };
    Source { subject: "OVN Southbound", state, suffices: true }
}

async fn neutron(config: &Config) -> Source {
    let state = match config.neutron_source(TaskTracker::new()) {
        None => Availability::Absent(
            "none is configured (neutron_auth_url, or neutron_auth_type = none and neutron_endpoint_override)"
                .to_owned(),
        ),
        Some(settings) => match neutron::probe(&settings).await {
            Ok(NeutronProbe::Ports) => Availability::Works(format!("it has ports of host {}", settings.host)),
            Ok(NeutronProbe::NoPorts) => Availability::Works(format!(
                "it answers, but has no port of host {}; if there are guests, correct host to what Neutron has in \
                 binding:host_id, or give its user the role admin or service",
                settings.host
            )),
            Err(error) => Availability::Broken(error.to_string()),
        },
    };
    Source { subject: "Neutron", state, suffices: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(subject: &'static str, suffices: bool, state: fn(String) -> Availability) -> Source {
        Source { subject, state: state(String::new()), suffices }
    }

    fn wrong(sources: Vec<Source>) -> Vec<&'static str> {
        findings(sources).into_iter().filter(|finding| !finding.ok).map(|finding| finding.subject).collect()
    }

    #[test]
    fn one_working_source_is_enough_and_broken_ones_are_shown() {
        use Availability::{Absent, Broken, Works};
        let none: [&str; 0] = [];
        assert_eq!(wrong(vec![source("a", true, Works), source("b", true, Absent)]), none);
        assert_eq!(wrong(vec![source("a", true, Works), source("b", true, Broken)]), ["b"]);
        assert_eq!(wrong(vec![source("a", true, Absent), source("b", false, Works)]), ["sources"]);
        assert_eq!(wrong(vec![source("a", true, Broken)]), ["a", "sources"]);
    }
}
