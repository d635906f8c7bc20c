//! The output of `check` for each source and for Nova, with the option to change.

use std::fs;
use std::os::unix::net::UnixListener;

use metadata_tests::agent::Installer;
use metadata_tests::{
    Agent, Answer, Binding, ControlPlane, Host, Mode, NovaStandIn, Ovsdb, Pki, Port, Southbound, domain,
};
use serde_json::Value;

const NEUTRON_AGENT: &str = "Neutron's metadata agent";
const NOVA: &str = "Nova's metadata service";
const SECRET: &str = "shared secret";

/// Returns the finding for a subject: true if it passed, and its text.
fn found(agent: &Agent, subject: &str) -> (bool, String) {
    let output = agent.query("check", &["--json"]);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let mut about = findings.iter().filter(|finding| finding["subject"] == subject);
    let (finding, more) = (about.next().expect("a finding of it"), about.next());
    assert!(more.is_none(), "{findings:?}");
    let is_well = finding["ok"].as_bool().expect("a boolean");
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

/// `run` would refuse to start beside Neutron's agent.
#[test]
fn check_names_an_agent_on_the_socket_for_haproxies() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let place = host.folder().join("metadata_proxy");
    let agent = Agent::on(&host, &nova).port(&port());
    let agent = agent.set("metadata_agent", "serve_metadata_proxy_socket", "true");
    let agent = agent.set("DEFAULT", "metadata_proxy_socket", &place.display().to_string()).install();
    let named = place.display().to_string();
    let subject = "socket for haproxies";
    assert_says(&agent, subject, true, &[&named, "is free"]);
    let other = UnixListener::bind(&place).expect("listen as Neutron's agent");
    assert_says(&agent, subject, false, &[&named, "stop Neutron's metadata agent"]);
    drop(other);
    assert_says(&agent, subject, true, &[&named, "is free"]);
    assert!(place.exists(), "check changes nothing");
    let process = agent.start();
    assert_says(&agent, subject, true, &[&named, "is served"]);
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn each_source_has_its_own_line() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let agent = Agent::on(&host, &nova).port(&port()).port(&port()).install();
    assert_says(&agent, "static inventory", true, &["has 2 ports"]);
    assert_says(&agent, "libvirt", true, &["has 0 Nova domains with 0 ports"]);
    assert_says(&agent, "sources", true, &["by static inventory, libvirt"]);

    domain::write(&agent.libvirt_dir(), &port());
    fs::write(agent.libvirt_dir().join("own.xml"), "<domain><name>x</name></domain>")
        .expect("write a domain");
    fs::write(agent.libvirt_dir().join("half.xml"), "<domain><na").expect("write half a domain");
    assert_says(
        &agent,
        "libvirt",
        true,
        &["1 Nova domains with 1 ports, and 1 other domains; half.xml: invalid XML"],
    );

    // A readable file is not necessarily a valid one.
    let inventory = agent.config_file().with_file_name("inventory.json");
    fs::write(&inventory, "{\"ports\": [{}]}").expect("write an inventory");
    let named = inventory.display().to_string();
    assert_says(&agent, "static inventory", false, &[&named, "missing field", "(static_inventory)"]);
    assert_says(&agent, "sources", true, &["by libvirt"]);

    domain_dir_is(&agent, false);
    assert_says(&agent, "libvirt", false, &["No such file or directory", "(libvirt_dir)"]);
    assert_says(&agent, "sources", false, &["no guest can be identified"]);
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
fn check_requests_novas_versions() {
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

/// Nova compares the signature before it looks for the instance.
#[test]
fn check_asks_nova_whether_it_accepts_the_shared_secret() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let with = |secret: &str| Agent::forwarding_to(&host, nova.address(), secret).install();
    assert_says(&with(nova.secret()), SECRET, true, &["accepts it"]);
    for wrong in ["another", ""] {
        assert_says(&with(wrong), SECRET, false, &["refuses it", "metadata_proxy_shared_secret"]);
    }
    // A Nova with service_metadata_proxy = false looks at no signature.
    nova.set_mode(Mode::Fixed(Answer::text(200, "latest\n")));
    assert_says(&with("another"), SECRET, false, &["a wrong one too", "service_metadata_proxy"]);
    for mode in [Mode::Fixed(Answer::text(404, "latest\n")), Mode::Refuse] {
        nova.set_mode(mode);
        assert_says(&with(nova.secret()), SECRET, true, &["could not be verified"]);
    }
}

#[test]
fn check_rejects_an_empty_secret_that_nova_accepts() {
    let host = Host::new();
    let nova = NovaStandIn::start_with(host.netns(), ([127, 0, 0, 1], 0).into(), "");
    let agent = Agent::forwarding_to(&host, nova.address(), "").install();
    assert_says(&agent, SECRET, false, &["accepts an empty one", "metadata_proxy_shared_secret"]);
}

/// Installs an agent without any source except these options.
fn bare(host: &Host, nova: &NovaStandIn) -> Installer {
    Agent::on(host, nova).set("metadata_agent", "libvirt_dir", "").set(
        "metadata_agent",
        "static_inventory",
        "",
    )
}

#[test]
fn ovn_and_open_vswitch_together_are_enough() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let (ovsdb, mut southbound) = (Ovsdb::start(), Southbound::start());
    let servers = format!("{},unix:/nowhere", southbound.remotes());
    let both = bare(&host, &nova)
        .set("ovs", "ovsdb_connection", &ovsdb.remote())
        .set("ovn", "ovn_sb_connection", &servers)
        .install();
    assert_says(&both, "Open vSwitch", true, &["has its database"]);
    assert_says(&both, "OVN Southbound", true, &["has its database; unix:/nowhere: cannot connect"]);
    assert_says(
        &both,
        "Neutron",
        true,
        &["none is configured", "neutron_auth_url", "neutron_endpoint_override"],
    );
    assert_says(&both, "sources", true, &["by OVN Southbound"]);

    let alone = bare(&host, &nova).set("ovs", "ovsdb_connection", &ovsdb.remote()).install();
    assert_says(&alone, "OVN Southbound", true, &["none is configured", "ovn_sb_connection"]);
    assert_says(&alone, "sources", false, &["no guest can be identified", "Neutron"]);

    let swapped = bare(&host, &nova)
        .set("ovs", "ovsdb_connection", &southbound.remotes())
        .set("ovn", "ovn_sb_connection", &ovsdb.remote())
        .install();
    assert_says(&swapped, "Open vSwitch", false, &["no database Open_vSwitch", "(ovsdb_connection)"]);
    assert_says(&swapped, "OVN Southbound", false, &["no database OVN_Southbound", "(ovn_sb_connection)"]);

    southbound.servers()[0].stop();
    assert_says(&both, "OVN Southbound", false, &["cannot connect", "(ovn_sb_connection)"]);
    assert_says(&both, "sources", false, &["no guest can be identified"]);
}

#[test]
fn open_vswitch_has_its_own_tls_files() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let pki = Pki::new(&host.folder().join("pki"));
    let (server, ours, file) =
        (pki.sign("server"), pki.sign("agent"), |path: &std::path::Path| path.display().to_string());
    let _ovsdb = Ovsdb::start_with(host.netns(), |prepared| {
        prepared.set(format!("--private-key={}", server.key.display()));
        prepared.set(format!("--certificate={}", server.certificate.display()));
        prepared.set(format!("--ca-cert={}", pki.authority().display()));
        prepared.set("--remote=pssl:6640:127.0.0.1".to_owned());
    });
    let over_tls = || bare(&host, &nova).set("ovs", "ovsdb_connection", "ssl:127.0.0.1:6640");
    let agent = over_tls()
        .set("ovs", "ssl_key_file", &file(&ours.key))
        .set("ovs", "ssl_cert_file", &file(&ours.certificate))
        .set("ovs", "ssl_ca_cert_file", &file(&pki.authority()))
        .install();
    assert_says(&agent, "Open vSwitch", true, &["ssl:127.0.0.1:6640 has its database"]);
    assert_says(
        &over_tls().install(),
        "Open vSwitch",
        false,
        &["requires CA certificates", "ssl_ca_cert_file"],
    );
}

#[test]
fn neutron_alone_is_enough_if_it_knows_this_host() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let mut plane = ControlPlane::start(&host);
    let network = plane.create_network("10.0.0.0/24");
    let device = port().instance.to_string();
    let binding = Binding { owner: "compute:nova", device: &device, host: "hypervisor-1" };
    let _bound = plane.create_port(network, &port(), &binding);
    let on = |name: &str, password: &str| {
        let agent = bare(&host, &nova).set("DEFAULT", "host", name);
        let options = plane.password_options().map(|(key, value)| match key {
            "neutron_password" => (key, password.to_owned()),
            _ => (key, value),
        });
        options.iter().fold(agent, |agent, (key, value)| agent.set("metadata_agent", key, value)).install()
    };
    let password = metadata_tests::control_plane::PASSWORD;
    let agent = on("hypervisor-1", password);
    assert_says(&agent, "Neutron", true, &["has ports of host hypervisor-1"]);
    assert_says(&agent, "sources", true, &["by Neutron"]);
    let other = on("hypervisor-2", password);
    assert_says(
        &other,
        "Neutron",
        true,
        &["no port of host hypervisor-2", "binding:host_id", "admin or service"],
    );
    let wrong = on("hypervisor-1", "wrong");
    assert_says(&wrong, "Neutron", false, &["401"]);
    plane.neutron.stop();
    assert_says(&agent, "Neutron", false, &["http://127.0.0.1:9696", "cannot send request"]);
    assert_says(&agent, "sources", false, &["no guest can be identified"]);
}

/// With `upstream = neutron-agent`, Nova is not probed.
#[test]
fn check_probes_the_socket_of_neutrons_agent() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let socket = host.folder().join("metadata_proxy");
    let path = socket.display().to_string();
    let agent = Agent::on(&host, &nova)
        .set("metadata_agent", "upstream", "neutron-agent")
        .set("DEFAULT", "metadata_proxy_socket", &path)
        .install();
    assert_says(&agent, NEUTRON_AGENT, false, &[&path, "No such file", "neutron_agent_socket"]);
    let listener = UnixListener::bind(&socket).expect("listen");
    assert_says(&agent, NEUTRON_AGENT, true, &[&path, "takes connections"]);
    drop(listener);
    assert_says(&agent, NEUTRON_AGENT, false, &["refused", "start it"]);
}
