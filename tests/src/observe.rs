//! The network state of a host, so that a test can assert that it has been restored.
//!
//! A state is a set of lines, one per fact: a link, a qdisc, a filter, a TCX program, a route, a
//! permanent neighbour, a namespace, a pin. Facts that change by themselves (counters, learnt
//! neighbours, lifetimes, carriers) are left out.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::fs;
use std::path::Path;

use aya::programs::{SchedClassifier, TcAttachType};

use crate::netns::{self, Netns};
use crate::topology::Host;

/// The facts about one host at one moment.
#[derive(Clone, PartialEq, Eq)]
pub struct HostState {
    facts: BTreeSet<String>,
}

impl HostState {
    /// Captures a host of the rig and the namespaces named after it.
    #[must_use]
    pub fn capture(host: &Host) -> Self {
        let own = host.netns().name();
        Self::look(host.netns(), host.bpffs(), |name| name.starts_with(own))
    }

    /// Captures the machine itself and those named namespaces for which `ours` returns true. Other
    /// namespaces come and go.
    #[must_use]
    pub fn machine(ours: impl Fn(&str) -> bool) -> Self {
        Self::look(&Netns::machine(), Path::new("/sys/fs/bpf"), ours)
    }

    fn look(netns: &Netns, bpffs: &Path, ours: impl Fn(&str) -> bool) -> Self {
        let mut facts = BTreeSet::new();
        let links = links(netns);
        for link in &links {
            facts.insert(format!("link {link}"));
            let name = link.split(' ').next().unwrap_or_default();
            for direction in ["ingress", "egress"] {
                // A link without a clsact or ingress qdisc has no filters; tc reports this as an
                // error.
                let filters = netns.command("tc").args(["filter", "show", "dev", name, direction]).output();
                let filters = filters.unwrap_or_else(|e| panic!("run tc: {e}"));
                // All filters of a qdisc are listed under the parent that the last one was added
                // with, `ffff:` or `ingress` (net/sched/cls_api.c, tc_new_tfilter,
                // `block->classid`).
                let filters = String::from_utf8_lossy(&filters.stdout);
                let filters = filters.replace("filter parent ffff: ", "filter ");
                let filters = filters.replace("filter ingress ", "filter ");
                insert(&mut facts, &format!("filter {name} {direction}"), &filters);
            }
            for (direction, attach) in [("ingress", TcAttachType::Ingress), ("egress", TcAttachType::Egress)]
            {
                // Kernels before 6.6 do not have TCX, so nothing is attached by it.
                if let Ok((_, programs)) = netns.enter(|| SchedClassifier::query_tcx(name, attach)) {
                    for program in programs {
                        facts.insert(format!(
                            "tcx {name} {direction} {}",
                            program.name_as_str().unwrap_or("without a name")
                        ));
                    }
                }
            }
        }
        insert(&mut facts, "qdisc", &netns.run(&["tc", "qdisc", "show"]));
        insert(&mut facts, "route", &netns.run(&["ip", "-4", "route", "show", "table", "all"]));
        insert(&mut facts, "route", &netns.run(&["ip", "-6", "route", "show", "table", "all"]));
        insert(&mut facts, "rule", &netns.run(&["ip", "-4", "rule", "show"]));
        insert(&mut facts, "rule", &netns.run(&["ip", "-6", "rule", "show"]));
        insert(&mut facts, "neighbour", &netns.run(&["ip", "neigh", "show", "nud", "permanent"]));
        insert(&mut facts, "neighbour proxy", &netns.run(&["ip", "neigh", "show", "proxy"]));
        facts.extend(
            netns::names().into_iter().filter(|name| ours(name)).map(|name| format!("namespace {name}")),
        );
        pins(bpffs, &mut facts);
        Self { facts }
    }

    /// Lists facts that only `self` has with a minus and facts that only `later` has with a plus.
    /// The result is empty if both are equal.
    #[must_use]
    pub fn diff(&self, later: &Self) -> String {
        let gone = self.facts.difference(&later.facts).map(|fact| ('-', fact));
        let new = later.facts.difference(&self.facts).map(|fact| ('+', fact));
        gone.chain(new).fold(String::new(), |mut text, (sign, fact)| {
            writeln!(text, "{sign} {fact}")
                .unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
            text
        })
    }

    /// Panics with the differences if there are any.
    pub fn assert_same(&self, later: &Self) {
        let diff = self.diff(later);
        assert!(diff.is_empty(), "the host is not as it was:\n{diff}");
    }
}

impl fmt::Debug for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(&self.facts).finish()
    }
}

/// Returns one line per link. It begins with the name and omits what changes by itself.
fn links(netns: &Netns) -> Vec<String> {
    let json = netns.run(&["ip", "-json", "-details", "link", "show"]);
    let links: Vec<serde_json::Value> =
        serde_json::from_str(&json).unwrap_or_else(|e| panic!("links of {}: {e}\n{json}", netns.name()));
    let text = |value: &serde_json::Value| value.as_str().unwrap_or("-").to_owned();
    let line = |link: &serde_json::Value| {
        let up = link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
        format!(
            "{} index={} kind={} master={} address={} mtu={} promiscuity={} {}",
            text(&link["ifname"]),
            link["ifindex"],
            text(&link["linkinfo"]["info_kind"]),
            text(&link["master"]),
            text(&link["address"]),
            link["mtu"],
            link["promiscuity"],
            if up { "up" } else { "down" },
        )
    };
    links.iter().map(line).collect()
}

fn insert(facts: &mut BTreeSet<String>, kind: &str, listing: &str) {
    for line in listing.lines() {
        // A lifetime counts down. It stands last, before the preference.
        let line = line.split(" expires ").next().unwrap_or_default().trim_end();
        // A bridge loses its carrier some time after its last port is removed.
        let line = line.replace(" linkdown", "");
        facts.insert(format!("{kind} {line}"));
    }
}

fn pins(folder: &Path, facts: &mut BTreeSet<String>) {
    // Without a BPF file system there are no pins.
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        facts.insert(format!("pin {}", path.display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            pins(&path, facts);
        }
    }
}
