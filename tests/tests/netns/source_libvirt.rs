//! Guests whose instance, project and port the agent learns from the files of a real libvirtd.

use std::fs;
use std::net::Ipv4Addr;
use std::thread;

use metadata_agent::ids::NetworkId;
use metadata_tests::libvirt::{Libvirt, NovaMetadata};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{AgentProcess, Host, NovaStandIn, Port};
use serde_json::Value;

/// A host whose agent has libvirt as its only source.
struct World {
    process: AgentProcess,
    libvirt: Libvirt,
    _nova: NovaStandIn,
    host: Host,
}

impl World {
    /// The agent starts first: libvirt's folder does not exist yet.
    fn new() -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let (folder, state) = Libvirt::prepare();
        let agent = metadata_tests::Agent::on(&host, &nova)
            .set("metadata_agent", "libvirt_dir", &state.display().to_string())
            .set("metadata_agent", "static_inventory", "")
            .install();
        let process = agent.spawn(&[]);
        let libvirt = Libvirt::start(&host, folder);
        process.wait_ready();
        Self { process, libvirt, _nova: nova, host }
    }

    /// Creates a port with its tap, as Nova and os-vif leave it before the domain starts.
    fn port(&self, last: u8) -> Port {
        let port = Port::new(NetworkId::new(uuid::Uuid::new_v4()), Ipv4Addr::new(10, 0, 0, last));
        self.plug(&port);
        port
    }

    /// Creates the tap on the host to which the port moves.
    fn plug(&self, port: &Port) {
        self.host.tap(&port.tap());
        self.until(port, "unknown");
    }

    fn attachment(&self, port: &Port) -> Value {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        attachments.into_iter().find(|one| one["interface"] == port.tap()).unwrap_or_default()
    }

    fn until(&self, port: &Port, identity: &str) -> Value {
        let mut last = Value::Null;
        let found = wait::poll(PATIENCE, || {
            last = self.attachment(port);
            (last["identity"] == identity).then(|| last.clone())
        });
        found.unwrap_or_else(|| {
            panic!("{} did not become {identity}: {last}\n{}", port.tap(), self.process.output())
        })
    }

    /// `owner` is the port with the expected instance and project.
    fn until_known(&self, port: &Port, owner: &Port) -> Value {
        let attachment = self.until(port, "known");
        let identity = &attachment["port"];
        assert_eq!(
            (&identity["instance"], &identity["project"]),
            (&owner.instance.to_string().into(), &owner.project.to_string().into()),
            "{attachment}"
        );
        assert_eq!(identity["mac"], port.mac.to_string(), "{attachment}");
        attachment
    }

    fn source(&self) -> Value {
        let state = self.process.state();
        let sources = state["sources"].as_array().expect("sources").clone();
        sources.into_iter().find(|one| one["source"] == "libvirt").expect("the source libvirt")
    }
}

#[test]
fn a_domain_its_interfaces_and_its_end_are_followed() {
    let world = World::new();
    let [first, more, old] = [5, 6, 7].map(|last| world.port(last));
    world.libvirt.create(&first, NovaMetadata::V1_1);
    let known = world.until_known(&first, &first);
    assert_eq!(known["port"]["id"], first.id.to_string());
    world.libvirt.create(&old, NovaMetadata::V1_0);
    world.until_known(&old, &old);

    world.libvirt.attach(&first, &more);
    world.until_known(&more, &first);
    world.libvirt.detach(&first, &more);
    world.until(&more, "unknown");
    world.until_known(&first, &first);

    world.libvirt.destroy(&first);
    world.until(&first, "unknown");
    world.until_known(&old, &old);
    let source = world.source();
    assert_eq!((&source["ports"], &source["faults"]), (&1.into(), &serde_json::json!({})), "{source}");
}

/// Its files stay while it is away, so guests do not notice.
#[test]
fn a_restarted_libvirtd_does_not_disturb_guests() {
    let mut world = World::new();
    let [stays, later] = [5, 6].map(|last| world.port(last));
    world.libvirt.create(&stays, NovaMetadata::V1_1);
    world.until_known(&stays, &stays);
    world.libvirt.stop();
    world.until_known(&stays, &stays);
    world.libvirt.restart(&world.host);
    world.until_known(&stays, &stays);

    // It still owns its domains.
    world.libvirt.create(&later, NovaMetadata::V1_1);
    world.until_known(&later, &later);
    world.libvirt.destroy(&stays);
    world.until(&stays, "unknown");
    world.until_known(&later, &later);
    let source = world.source();
    assert_eq!((&source["ports"], &source["faults"]), (&1.into(), &serde_json::json!({})), "{source}");
}

/// A domain that left is unknown, and one that arrives is known.
#[test]
fn outgoing_and_incoming_migrations_are_followed() {
    let world = World::new();
    let port = world.port(5);
    world.libvirt.create(&port, NovaMetadata::V1_1);
    world.until_known(&port, &port);
    world.libvirt.send(&port);
    world.until(&port, "unknown");
    world.libvirt.receive(&port);
    world.until_known(&port, &port);

    // An interrupted libvirtd leaves a file that was not renamed. Another program leaves half a
    // file.
    let file = |name: &str| world.libvirt.state_dir().join(name);
    let name = format!("instance-{}", &port.instance.to_string()[..8]);
    let real = fs::read_to_string(file(&format!("{name}.xml"))).expect("the file of libvirtd");
    let other = world.port(6);
    let text = [
        (port.instance.to_string(), other.instance.to_string()),
        (port.id.to_string(), other.id.to_string()),
        (port.mac.to_string(), other.mac.to_string()),
        (port.tap(), other.tap()),
    ]
    .iter()
    .fold(real, |text, (own, others)| text.replace(own, others));
    assert!(text.contains("<domstatus state='paused' reason="), "the domain is incoming: {text}");
    fs::write(file("incoming.xml.new"), &text).expect("write a file");
    let half = &text[..text.len() / 2];
    fs::write(file("incoming.xml"), half).expect("write half a file");
    wait::until("the incomplete file is reported", PATIENCE, || {
        world.source()["faults"]["incoming.xml"].is_string().then_some(())
    });
    world.until_known(&port, &port);
    world.until(&other, "unknown");
    fs::rename(file("incoming.xml.new"), file("incoming.xml")).expect("put the whole in its place");
    let known = world.until(&other, "known");
    assert_eq!(known["port"]["instance"], other.instance.to_string());
    fs::remove_file(file("incoming.xml")).expect("end it");
    world.until(&other, "unknown");
}

#[test]
fn a_migrating_domain_moves_from_one_host_to_the_other() {
    let (here, there) = thread::scope(|scope| {
        let there = scope.spawn(World::new);
        (World::new(), there.join().expect("another host"))
    });
    let [port, other] = [5, 6].map(|last| here.port(last));
    here.libvirt.create(&other, NovaMetadata::V1_1);
    here.libvirt.run(&port, NovaMetadata::V1_1);
    here.until_known(&port, &port);
    there.plug(&port);

    here.libvirt.migrate(&port, &there.libvirt);
    here.until(&port, "unknown");
    there.until_known(&port, &port);
    here.until_known(&other, &other);

    there.libvirt.migrate(&port, &here.libvirt);
    there.until(&port, "unknown");
    here.until_known(&port, &port);
    for (world, ports) in [(&here, 2), (&there, 0)] {
        let source = world.source();
        assert_eq!(
            (&source["ports"], &source["faults"]),
            (&ports.into(), &serde_json::json!({})),
            "{source}"
        );
    }
}
