//! What `check` says of each source and of Nova, and what to change.

#![expect(clippy::expect_used, reason = "helpers of tests fail the test")]

use std::fs;

use metadata_tests::{Agent, Host, Mode, NovaStandIn, Port, domain, privileged};
use serde_json::Value;

const NOVA: &str = "Nova's metadata service";

/// What it finds of a subject: whether that is well, and the words about it.
fn found(agent: &Agent, subject: &str) -> (bool, String) {
    let output = agent.ask("check", &["--json"]);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let mut about = findings.iter().filter(|finding| finding["subject"] == subject);
    let (finding, more) = (about.next().expect("a finding of it"), about.next());
    assert!(more.is_none(), "{findings:?}");
    let is_well = finding["ok"].as_bool().expect("whether it is well");
    let all_well = findings.iter().all(|finding| finding["ok"] == true);
    assert_eq!(output.status.code(), Some(i32::from(!all_well)));
    (is_well, finding["detail"].as_str().expect("a text").to_owned())
}

#[track_caller]
fn assert_says(agent: &Agent, subject: &str, is_well: bool, words: &[&str]) {
    let (well, detail) = found(agent, subject);
    assert!(well == is_well && words.iter().all(|word| detail.contains(word)), "{subject}: {well} {detail}");
}

fn port() -> Port {
    let network = metadata_agent::ids::NetworkId::new(uuid::Uuid::new_v4());
    Port::new(network, [10, 0, 0, 5].into())
}

#[test]
fn each_source_has_a_line_of_its_own() {
    if !privileged() {
        return;
    }
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let agent = Agent::on(&host, &nova).port(&port()).port(&port()).install();
    assert_says(&agent, "static inventory", true, &["has 2 ports"]);
    assert_says(&agent, "libvirt", true, &["has 0 domains of Nova's with 0 ports"]);
    assert_says(&agent, "sources", true, &["by static inventory, libvirt"]);

    domain::write(&agent.libvirt_dir(), &port());
    fs::write(agent.libvirt_dir().join("own.xml"), "<domain><name>x</name></domain>")
        .expect("write a domain");
    fs::write(agent.libvirt_dir().join("half.xml"), "<domain><na").expect("write half a domain");
    assert_says(
        &agent,
        "libvirt",
        true,
        &["1 domains of Nova's with 1 ports, and 1 others; half.xml is not XML"],
    );

    // A file that opens is not one that can be used.
    let inventory = agent.config_file().with_file_name("inventory.json");
    fs::write(&inventory, "{\"ports\": [{}]}").expect("write an inventory");
    let named = inventory.display().to_string();
    assert_says(&agent, "static inventory", false, &[&named, "missing field", "(static_inventory)"]);
    assert_says(&agent, "sources", true, &["by libvirt"]);

    domain_dir_is(&agent, false);
    assert_says(&agent, "libvirt", true, &["is not there", "libvirt_dir"]);
    assert_says(&agent, "sources", false, &["no guest can be known"]);
    fs::write(agent.libvirt_dir(), "").expect("write a file in its place");
    assert_says(&agent, "libvirt", false, &["Not a directory", "(libvirt_dir)"]);
    fs::remove_file(agent.libvirt_dir()).expect("remove it");
    domain_dir_is(&agent, true);
    assert_says(&agent, "sources", true, &["by libvirt"]);
}

fn domain_dir_is(agent: &Agent, there: bool) {
    let folder = agent.libvirt_dir();
    if there { fs::create_dir(&folder) } else { fs::remove_dir_all(&folder) }
        .expect("make or remove a folder");
}

#[test]
fn nova_is_asked_for_its_versions_and_not_only_connected_to() {
    if !privileged() {
        return;
    }
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let agent = Agent::on(&host, &nova).install();
    assert_says(&agent, NOVA, true, &["lists its versions"]);
    let tls = Agent::on(&host, &nova).set("DEFAULT", "nova_metadata_protocol", "https").install();
    assert_says(&tls, NOVA, false, &["no TLS", "nova_metadata_protocol = http"]);
    nova.set_mode(Mode::Hold);
    let hasty = Agent::on(&host, &nova).set("metadata_agent", "nova_connect_timeout", "0.2").install();
    assert_says(&hasty, NOVA, false, &["does not answer within 200ms", "firewall"]);
    nova.set_mode(Mode::Refuse);
    assert_says(&agent, NOVA, false, &["cannot connect", "start it"]);
}
