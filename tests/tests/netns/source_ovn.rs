//! Guests whose instance the agent learns from Open vSwitch's database, and whose project from OVN's Southbound database.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use metadata_agent::ids::InstanceId;
use metadata_tests::nova::Instance;
use metadata_tests::ovsdb::server::Server;
use metadata_tests::pki::Pair;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, AgentProcess, Guest, Host, Network, NovaStandIn, Ovsdb, Pki, Plug, Port, Southbound,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

const HOSTNAME: &str = "/latest/meta-data/hostname";
const READY: &str = "metadata_source_ready{source=\"ovn_southbound\"}";

/// A host whose agent has nothing but Open vSwitch and OVN to learn from.
struct World {
    process: AgentProcess,
    nova: NovaStandIn,
    network: Network,
    ovsdb: Ovsdb,
}

impl World {
    /// With these servers of the Southbound database.
    fn new(servers: &str) -> Self {
        let (host, ovsdb) = (Host::new(), Ovsdb::start());
        let remote = ovsdb.remote();
        Self::on(&host, ovsdb, &[("ovs", "ovsdb_connection", &remote), ("ovn", "ovn_sb_connection", servers)])
    }

    fn on(host: &Host, ovsdb: Ovsdb, options: &[(&str, &str, &str)]) -> Self {
        let nova = NovaStandIn::start(host.netns());
        let agent = Agent::on(host, &nova).set("metadata_agent", "identity_hold", "0.2").set(
            "ovn",
            "ovsdb_retry_max_interval",
            "1",
        );
        let agent = options.iter().fold(agent, |agent, (group, key, value)| agent.set(group, key, value));
        // It is not ready before the Southbound database was read, and some tests are about just that.
        let process = agent.install().spawn(&[]);
        wait::until("the agent tells its state", PATIENCE, || process.try_admin("/state").ok());
        Self { process, nova, network: host.network(), ovsdb }
    }

    /// A guest that Nova knows, plugged into Open vSwitch.
    fn guest(&self, last: u8) -> Guest {
        let guest = self.unplugged(last);
        self.ovsdb.plug(&guest.port, Plug::Direct);
        guest
    }

    /// A guest that Nova knows, and as yet no database.
    fn unplugged(&self, last: u8) -> Guest {
        let guest = self.network.guest([10, 0, 0, last]);
        self.nova.add(Instance::of(&guest.port));
        guest
    }

    /// Plugs a port into Open vSwitch as a guest's is, but of no instance.
    fn plug_without_instance(&self, port: &Port) {
        let ids = [
            ("iface-id", port.id.to_string()),
            ("iface-status", "active".to_owned()),
            ("attached-mac", port.mac.to_string()),
        ];
        self.ovsdb.insert(&port.tap(), &ids, &[]);
    }

    fn attachment(&self, guest: &Guest) -> Value {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        let untagged = |one: &Value| one["interface"] == *guest.tap && one["vlan"].is_null();
        attachments.into_iter().find(untagged).unwrap_or_default()
    }

    /// The attachment of a VLAN on a guest's interface.
    fn vlan(&self, guest: &Guest, tag: u16) -> Option<Value> {
        let state = self.process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        attachments.into_iter().find(|one| one["interface"] == *guest.tap && one["vlan"] == tag)
    }

    /// How the source is, once that is as wanted.
    fn source(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = wait::poll(PATIENCE, || {
            let state = self.process.state();
            let sources = state["sources"].as_array()?;
            last = sources.iter().find(|one| one["source"] == "ovn_southbound")?.clone();
            wanted(&last).then(|| last.clone())
        });
        found.unwrap_or_else(|| panic!("the source never {what}: {last}\n{}", self.process.output()))
    }

    fn until_sound(&self) -> Value {
        self.source("was sound", |state| state["ready"] == true && state["faults"] == json!({}))
    }

    /// Waits until what is wrong with a server has these words in it.
    fn until_fault(&self, wanted: &str) {
        self.source(wanted, |state| state["faults"].to_string().contains(wanted));
    }

    fn assert_served(&self, guest: &Guest) {
        self.assert_served_as(guest, &guest.port);
    }

    fn assert_served_as(&self, guest: &Guest, port: &Port) {
        let mut last = Value::Null;
        let known = wait::poll(PATIENCE, || {
            last = self.attachment(guest);
            (last["identity"] == "known" && last["port"]["instance"] == port.instance.to_string())
                .then_some(())
        });
        known.unwrap_or_else(|| panic!("{} never was known: {last}\n{}", guest.tap, self.process.output()));
        let answer = guest.get(HOSTNAME);
        assert_eq!((answer.status, answer.text()), (200, Instance::of(port).hostname().as_str()));
    }

    fn assert_refused(&self, guest: &Guest, identity: &str) {
        let mut last = Value::Null;
        let refused = wait::poll(PATIENCE, || {
            last = self.attachment(guest);
            (last["identity"] == identity).then_some(())
        });
        refused.unwrap_or_else(|| {
            panic!("{} never was {identity}: {last}\n{}", guest.tap, self.process.output())
        });
        assert_eq!(guest.get(HOSTNAME).status, 503);
    }
}

/// A socket before a server's, which keeps what the server says.
struct Relay {
    folder: TempDir,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Relay {
    fn before(server: &Server) -> Self {
        let folder = tempfile::Builder::new().prefix("relay-").tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("sock")).expect("a socket");
        let (server, said) = (server.socket(), Arc::<Mutex<Vec<u8>>>::default());
        let kept = Arc::clone(&said);
        // Ends with the test's process: nothing but the socket is left of it, and that goes with the folder.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // Without the server, the client finds out by the end of its connection.
                let Ok(server) = UnixStream::connect(&server) else { continue };
                let (client2, server2) =
                    (client.try_clone().expect("a second handle"), server.try_clone().expect("another"));
                thread::spawn(move || pass(&client, &server, |_| ()));
                let kept = Arc::clone(&kept);
                thread::spawn(move || {
                    pass(&server2, &client2, |bytes| lock(&kept).extend_from_slice(bytes));
                });
            }
        });
        Self { folder, said }
    }

    fn remote(&self) -> String {
        format!("unix:{}", self.folder.path().join("sock").display())
    }

    fn said(&self) -> String {
        String::from_utf8(lock(&self.said).clone()).expect("JSON")
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> std::sync::MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pass(mut from: &UnixStream, mut to: &UnixStream, mut seen: impl FnMut(&[u8])) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        seen(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        // The other direction may have been first.
        let _already_down = stream.shutdown(Shutdown::Both);
    }
}

#[test]
fn a_guest_is_served_from_open_vswitch_and_ovn_alone() {
    let southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.guest(5);
    world.assert_refused(&guest, "unknown");
    // On no chassis, as between the hosts of a migration.
    southbound.bind(&guest.port);
    world.assert_served(&guest);
    let port = world.attachment(&guest)["port"].clone();
    assert_eq!(port["network"], guest.port.network.to_string());
    assert_eq!(port["fixed_ips"], json!(["10.0.0.5"]));
    let state = world.until_sound();
    assert_eq!((&state["ports"], &state["ignored"]), (&json!(1), &json!(0)));

    southbound.unbind(&guest.port);
    world.assert_refused(&guest, "unknown");
    southbound.bind(&guest.port);
    world.assert_served(&guest);

    // A VLAN on the port is served as the same instance's, as long as it is there.
    let vlan = Port::new(guest.port.network, [10, 0, 1, 5].into());
    southbound.bind_subport(&vlan, &guest.port, 7);
    let seated = wait::until("the VLAN is attached", PATIENCE, || world.vlan(&guest, 7));
    assert_eq!(seated["port"]["id"], vlan.id.to_string());
    assert_eq!(seated["port"]["instance"], guest.port.instance.to_string());
    assert_eq!(seated["port"]["fixed_ips"], json!(["10.0.1.5"]));
    world.assert_served(&guest);
    southbound.unbind(&vlan);
    wait::until("the VLAN is let go", PATIENCE, || world.vlan(&guest, 7).is_none().then_some(()));
    world.assert_served(&guest);

    // A row that cannot be understood is nobody's, and no other's fault.
    let other = world.guest(6);
    southbound.bind(&other.port);
    world.assert_served(&other);
    southbound.set_external_ids(&guest.port, &[("neutron:device_id", "vm1")]);
    world.until_fault("neutron:device_id: `vm1` is not a UUID");
    world.assert_refused(&guest, "unknown");
    world.assert_served(&other);
    southbound.set_external_ids(&guest.port, &[("neutron:device_id", &guest.port.instance.to_string())]);
    world.assert_served(&guest);
    world.until_sound();
}

#[test]
fn no_row_but_those_of_this_hosts_ports_ever_comes() {
    let mut southbound = Southbound::start();
    let relay = Relay::before(&southbound.servers()[0]);
    let somebody = Port::new(metadata_agent::ids::NetworkId::new(Uuid::new_v4()), [10, 0, 0, 9].into());
    let mut foreign = southbound.bind_foreign(&somebody, 2_000);
    let world = World::new(&relay.remote());
    world.until_sound();
    assert!(!relay.said().contains("logical_port"), "a row came though no port is here");

    let [first, second] = [5, 6].map(|last| world.guest(last));
    for guest in [&first, &second] {
        southbound.bind(&guest.port);
        world.assert_served(guest);
    }
    foreign.extend(southbound.bind_foreign(&somebody, 100));
    world.network.host().netns().ip(&format!("link del {}", second.tap));
    world.source("let the row go", |state| state["ports"] == 1);
    // The condition changed, and still nobody else's rows are in it.
    foreign.extend(southbound.bind_foreign(&somebody, 100));
    southbound.set_external_ids(&first.port, &[("neutron:device_id", &Uuid::new_v4().to_string())]);
    world.assert_refused(&first, "disputed");
    let said = relay.said();
    for guest in [&first, &second] {
        assert!(said.contains(&guest.port.id.to_string()));
    }
    let strangers = foreign.iter().filter(|port| said.contains(&port.to_string())).count();
    assert_eq!((strangers, foreign.len()), (0, 2_200));
    assert!(said.len() < 16 * 1024, "{} bytes came: {said}", said.len());
}

#[test]
fn a_port_that_is_no_instances_is_left_to_the_host_until_it_becomes_one() {
    let southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.unplugged(5);
    let tap = Port::new(guest.port.network, [10, 0, 0, 6].into());
    world.network.host().tap(&tap.tap());
    for port in [&guest.port, &tap] {
        world.plug_without_instance(port);
    }
    let both = [guest.tap.clone(), tap.tap()];
    world.process.wait_for_attachments(both.iter().map(String::as_str));
    for port in [&guest.port, &tap] {
        southbound.bind(port);
        southbound.set_external_ids(port, &[("neutron:device_owner", "network:dhcp")]);
    }
    world.process.wait_for_attachments([]);
    southbound.set_external_ids(&tap, &[("neutron:device_owner", "compute:az1")]);
    world.process.wait_for_attachments([tap.tap().as_str()]);
    southbound.set_external_ids(&guest.port, &[("neutron:device_owner", "compute:nova")]);
    world.process.wait_for_attachments(both.iter().map(String::as_str));
    world.assert_served(&guest);
}

#[test]
fn a_port_of_which_the_two_databases_disagree_is_nobodys() {
    let southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.guest(5);
    let other = Port { instance: InstanceId::new(Uuid::new_v4()), ..guest.port.clone() };
    world.nova.add(Instance::of(&other));
    southbound.bind(&other);
    world.assert_refused(&guest, "disputed");
    southbound.set_external_ids(&guest.port, &[("neutron:device_id", &guest.port.instance.to_string())]);
    world.assert_served(&guest);
    southbound.set_external_ids(&guest.port, &[("neutron:device_owner", "network:dhcp")]);
    world.assert_refused(&guest, "disputed");
}

#[test]
fn another_member_of_the_cluster_takes_over_and_one_that_is_cut_off_does_not() {
    let mut southbound = Southbound::cluster(3);
    let relays: Vec<_> = southbound.servers().iter().map(Relay::before).collect();
    let remotes: Vec<_> = relays.iter().map(Relay::remote).collect();
    let world = World::new(&remotes.join(","));
    let [first, second] = [5, 6].map(|last| world.guest(last));
    southbound.bind(&first.port);
    world.assert_served(&first);
    let speaks_of = |guest: &Guest| {
        let id = guest.port.id.to_string();
        let found: Vec<_> = (0..3).filter(|index| relays[*index].said().contains(&id)).collect();
        found
    };
    let [used] = speaks_of(&first)[..] else { panic!("of one member: {:?}", speaks_of(&first)) };
    southbound.servers()[used].stop();
    southbound.bind(&second.port);
    world.assert_served(&second);
    let [next] = speaks_of(&second)[..] else { panic!("of one member: {:?}", speaks_of(&second)) };
    assert_ne!(next, used);
    world.until_sound();

    // Of three one is left, which can know nothing new.
    let third = (0..3).find(|index| *index != used && *index != next).expect("a third");
    southbound.servers()[third].stop();
    world.until_fault("server is disconnected from its cluster");
    for guest in [&first, &second] {
        world.assert_served(guest);
    }
    southbound.servers()[third].start(None);
    world.until_sound();
}

#[test]
fn guests_do_not_notice_a_server_that_restarts_and_one_that_knows_other_things_is_not_believed_alone() {
    let mut southbound = Southbound::start();
    let remotes = southbound.remotes();
    southbound.servers()[0].stop();
    let world = World::new(&remotes);
    let [stays, leaves] = [5, 6].map(|last| world.guest(last));
    world.until_fault("cannot connect");
    assert!(world.process.metric(READY) < 0.5);
    world.assert_refused(&stays, "unknown");
    southbound.servers()[0].start(None);
    for guest in [&stays, &leaves] {
        southbound.bind(&guest.port);
        world.assert_served(guest);
    }
    southbound.servers()[0].stop();
    world.until_fault("cannot connect");
    for guest in [&stays, &leaves] {
        world.assert_served(guest);
    }
    // An interface that goes takes its row along, server or not.
    world.network.host().netns().ip(&format!("link del {}", leaves.tap));
    world.source("let the row go", |state| state["ports"] == 1);

    southbound.servers()[0].replace();
    southbound.servers()[0].start(None);
    world.assert_refused(&stays, "unknown");
    let other = Port { instance: InstanceId::new(Uuid::new_v4()), ..stays.port.clone() };
    southbound.bind(&other);
    world.assert_refused(&stays, "disputed");
    world.until_sound();
}

/// Answers the first words of the next client with this, and breaks off.
fn answer_next(listener: &UnixListener, answer: &[u8]) {
    let (mut stream, _) = listener.accept().expect("the agent comes");
    stream.set_read_timeout(Some(PATIENCE)).expect("a deadline");
    stream.set_write_timeout(Some(PATIENCE)).expect("a deadline");
    assert!(stream.read(&mut [0; 1024]).expect("its request") > 0);
    // It may hang up before it has heard all.
    let _hung_up = stream.write_all(answer);
}

#[test]
fn a_server_of_garbage_is_a_fault_and_costs_little() {
    let mut southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.guest(5);
    southbound.bind(&guest.port);
    world.assert_served(&guest);
    let before = peak_memory(world.process.pid());
    let socket = southbound.servers()[0].socket();
    southbound.servers()[0].stop();
    fs::remove_file(&socket).expect("remove what the server left");
    let impostor = UnixListener::bind(&socket).expect("take the server's place");
    let mut endless = b"{\"id\": 1, \"result\": \"".to_vec();
    endless.resize(100 << 20, b'x');
    let no_database = json!({ "id": 1, "result": ["Open_vSwitch"], "error": null }).to_string();
    for (answer, wanted) in [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".as_slice(), "message starts with 'H'"),
        (b"{\"id\":}", "message is not JSON-RPC"),
        (b"{\"id\": 1, \"result\": [\"OVN_South", "server closed the connection"),
        (no_database.as_bytes(), "no database OVN_Southbound"),
        (&endless, "message is longer than 8388608 bytes"),
    ] {
        answer_next(&impostor, answer);
        world.until_fault(wanted);
    }
    let grown = peak_memory(world.process.pid()) - before;
    assert!(grown < 32 << 20, "{grown} bytes for nothing");
    world.assert_served(&guest);
    drop(impostor);
    fs::remove_file(&socket).expect("leave the server's place");
    southbound.servers()[0].start(None);
    world.until_sound();
    world.assert_served(&guest);
}

/// The most memory that a process ever had in use.
fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    kilobytes * 1024
}

#[test]
fn over_tls_a_server_is_believed_by_its_authority_and_files_are_read_anew() {
    let (host, folder) = (Host::new(), tempfile::tempdir().expect("a folder"));
    let (ours, foreign) = (Pki::new(&folder.path().join("ours")), Pki::new(&folder.path().join("foreign")));
    let listen = |port: u16, pair: &Pair, server: &mut Server| {
        server.set(format!("--remote=pssl:{port}:127.0.0.1"));
        server.set(format!("--private-key={}", pair.key.display()));
        server.set(format!("--certificate={}", pair.certificate.display()));
        server.set(format!("--ca-cert={}", ours.authority().display()));
    };
    let us = ours.sign("agent");
    let ovs = ours.sign("switch");
    let ovsdb = Ovsdb::start_with(host.netns(), |server| listen(6640, &ovs, server));
    let sb = ours.sign_expired("southbound");
    let mut southbound = Southbound::start_with(host.netns(), |server| listen(6642, &sb, server));
    let text = |path: &Path| path.display().to_string();
    let (key, certificate, authority) = (text(&us.key), text(&us.certificate), text(&ours.authority()));
    let world = World::on(
        &host,
        ovsdb,
        &[
            ("ovs", "ovsdb_connection", "ssl:127.0.0.1:6640"),
            ("ovs", "ssl_key_file", &key),
            ("ovs", "ssl_cert_file", &certificate),
            ("ovs", "ssl_ca_cert_file", &authority),
            ("ovn", "ovn_sb_connection", "ssl:127.0.0.1:6642"),
            ("ovn", "ovn_sb_private_key", &key),
            ("ovn", "ovn_sb_certificate", &certificate),
            ("ovn", "ovn_sb_ca_cert", &authority),
        ],
    );
    let guest = world.guest(5);
    southbound.bind(&guest.port);
    world.until_fault("invalid peer certificate: Expired");
    world.assert_refused(&guest, "unknown");

    let mut restart_as = |pair: &Pair| {
        let server = &mut southbound.servers()[0];
        server.stop();
        for (from, to) in [(&pair.certificate, &sb.certificate), (&pair.key, &sb.key)] {
            if from != to {
                fs::copy(from, to).expect("replace a file");
            }
        }
        server.start(Some(host.netns()));
    };
    restart_as(&foreign.sign("southbound"));
    world.until_fault("UnknownIssuer");
    world.assert_refused(&guest, "unknown");
    restart_as(&ours.sign("right"));
    world.until_sound();
    world.assert_served(&guest);

    // Our own certificate, too, is one that the server must believe.
    let kept = fs::read(&us.certificate).expect("our certificate");
    let impostor = foreign.sign("agent");
    let our_key = fs::read(&us.key).expect("our key");
    fs::copy(&impostor.certificate, &us.certificate).expect("replace it");
    fs::copy(&impostor.key, &us.key).expect("replace its key");
    restart_as(&ours.sign("right"));
    world.until_fault("received fatal alert");
    fs::remove_file(&us.certificate).expect("remove our certificate");
    world.until_fault("cannot read");
    fs::write(&us.key, our_key).expect("put our key back");
    fs::write(&us.certificate, kept).expect("put our certificate back");
    world.until_sound();
    world.assert_served(&guest);
}
