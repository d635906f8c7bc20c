//! Servers of the Southbound database that fail, restart or cannot be trusted.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;

use metadata_agent::ids::InstanceId;
use metadata_tests::ovsdb::server::Server;
use metadata_tests::pki::Pair;
use metadata_tests::wait::PATIENCE;
use metadata_tests::{Guest, Host, Ovsdb, Pki, Port, Southbound};
use serde_json::json;
use uuid::Uuid;

use super::relay::Relay;
use super::{READY, World};

/// A member without a majority is not used.
#[test]
fn another_cluster_member_takes_over_unless_partitioned() {
    let mut southbound = Southbound::cluster(3);
    let relays: Vec<_> = southbound.servers().iter().map(Relay::before).collect();
    let remotes: Vec<_> = relays.iter().map(Relay::remote).collect();
    let world = World::new(&remotes.join(","));
    let [first, second] = [5, 6].map(|last| world.guest(last));
    southbound.bind(&first.port);
    world.assert_served(&first);
    let speaks_of = |guest: &Guest| {
        let id = guest.port.id.to_string();
        let found: Vec<_> = (0..3).filter(|index| relays[*index].recorded().contains(&id)).collect();
        found
    };
    let [used] = speaks_of(&first)[..] else {
        panic!("expected exactly one member: {:?}", speaks_of(&first))
    };
    southbound.servers()[used].stop();
    southbound.bind(&second.port);
    world.assert_served(&second);
    let [next] = speaks_of(&second)[..] else {
        panic!("expected exactly one member: {:?}", speaks_of(&second))
    };
    assert_ne!(next, used);
    world.until_sound();

    // One of three members is left, which cannot learn anything new.
    let third = (0..3).find(|index| *index != used && *index != next).expect("a third");
    southbound.servers()[third].stop();
    world.until_fault("server is disconnected from its cluster");
    for guest in [&first, &second] {
        world.assert_served(guest);
    }
    southbound.servers()[third].start(None);
    world.until_sound();
}

/// A server that returns with other data is not believed alone.
#[test]
fn a_restarted_southbound_server_does_not_disturb_guests() {
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
    // A removed interface takes its row with it, with or without a server.
    world.network.host().netns().ip(&format!("link del {}", leaves.tap));
    world.source("dropped the row", |state| state["ports"] == 1);

    southbound.servers()[0].replace();
    southbound.servers()[0].start(None);
    world.assert_refused(&stays, "unknown");
    let other = Port { instance: InstanceId::new(Uuid::new_v4()), ..stays.port.clone() };
    southbound.bind(&other);
    world.assert_refused(&stays, "disputed");
    world.until_sound();
}

/// Answers the first message of the next client with these bytes and disconnects.
fn answer_next(listener: &UnixListener, answer: &[u8]) {
    let (mut stream, _) = listener.accept().expect("the agent connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("a deadline");
    stream.set_write_timeout(Some(PATIENCE)).expect("a deadline");
    assert!(stream.read(&mut [0; 1024]).expect("its request") > 0);
    // The client may disconnect before it has read everything.
    let _hung_up = stream.write_all(answer);
}

#[test]
fn a_server_that_sends_garbage_is_a_cheap_error() {
    let mut southbound = Southbound::start();
    let world = World::new(&southbound.remotes());
    let guest = world.guest(5);
    southbound.bind(&guest.port);
    world.assert_served(&guest);
    let before = peak_memory(world.process.pid());
    let socket = southbound.servers()[0].socket();
    southbound.servers()[0].stop();
    fs::remove_file(&socket).expect("remove the server's socket");
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
    assert!(grown < 32 << 20, "the agent grew by {grown} bytes");
    world.assert_served(&guest);
    drop(impostor);
    fs::remove_file(&socket).expect("remove the impostor\'s socket");
    southbound.servers()[0].start(None);
    world.until_sound();
    world.assert_served(&guest);
}

/// Returns the peak memory of a process.
fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    kilobytes * 1024
}

/// The server's certificate must be signed by the authority.
#[test]
fn tls_verifies_the_server_and_rereads_its_files() {
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

    // The server verifies our own certificate as well.
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
