//! Packets that are refused to a guest: attributed to its port in `status`, in the log and in the
//! metrics. Addresses that are a guest's own business are not refused.

use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::time::Duration;

use metadata_ebpf::identity::METADATA_IPV4;
use metadata_ebpf::reason::Reason;
use metadata_tests::packet_socket::PacketSocket;
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{GuestSpec, Host, NextHop, NovaStandIn, ServedTenants, Tenant, TwoTenants};
use serde_json::Value;

/// Time to wait for a response that must not come: less than the kernel's first retransmission of a
/// SYN.
const UNANSWERED: Duration = Duration::from_millis(400);
/// The log line, which occurs once for each port, reason and episode.
const LOG_LINE: &str = "guest's packets refused";

fn add_address(guest: &Tenant, address: Ipv4Addr, len: u8) {
    guest.netns().ip(&format!("address add {address}/{len} dev eth0"));
}

/// Sends a SYN from an address that the guest must not use.
fn knock(guest: &Tenant, address: Ipv4Addr) {
    let refused = guest.dial(guest.metadata_ipv4(), Some((address, 0).into()), UNANSWERED);
    assert_eq!(refused.map(drop).map_err(|error| error.kind()), Err(ErrorKind::TimedOut));
}

fn refused(tenants: &ServedTenants, guest: &Tenant) -> Value {
    tenants.attachment(guest)["refused"].clone()
}

#[test]
fn a_refused_packet_is_shown_at_its_port_and_logged_once() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, agent, red, blue, .. } = &tenants;
    assert_eq!(refused(&tenants, red), Value::Null);
    let forged = Ipv4Addr::new(10, 0, 0, 9);
    add_address(red, forged, 24);
    knock(red, forged);
    wait::until("it is logged", PATIENCE, || process.output().contains(LOG_LINE).then_some(()));

    // The state, and the page for people.
    let shown = refused(&tenants, red);
    assert_eq!(shown["packets"]["forged_address"], process.packets(Reason::ForgedAddress), "{shown}");
    let last = &shown["last"];
    assert_eq!((&last["reason"], &last["address"]), (&"forged_address".into(), &"10.0.0.9".into()));
    assert_eq!(last["mac"], red.port.mac.to_string());
    assert!(last["seconds_ago"].as_f64() < Some(60.0), "{shown}");
    assert_eq!(refused(&tenants, blue), Value::Null, "it did nothing");
    let page = String::from_utf8(agent.query("status", &[]).stdout).expect("text");
    let last = format!("last forged_address from 10.0.0.9 ({})", red.port.mac);
    assert!(page.contains("forged_address; ") && page.contains(&last), "{page}");

    // The log and the metric.
    let output = process.output();
    let line = output.lines().find(|line| line.contains(LOG_LINE)).expect("a line");
    for part in [&red.tap, "forged_address", "10.0.0.9", &red.port.mac.to_string(), "source_check"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert_eq!(process.count("metadata_attachments_refused{reason=\"forged_address\"}"), 1);
    assert_eq!(process.count("metadata_attachments_refused{reason=\"forged_mac\"}"), 0);

    // The next ones belong to the same episode, until another reason is reported.
    for _ in 0..3 {
        knock(red, forged);
    }
    red.netns().ip("link set eth0 address fa:16:3e:ba:db:ad");
    red.netns().ip(&format!(
        "neighbour replace {} lladdr {} nud permanent dev eth0",
        red.network.gateway, red.network.gateway_mac
    ));
    knock(red, forged);
    wait::until("the other reason is logged", PATIENCE, || {
        process.output().contains("forged_mac").then_some(())
    });
    assert_eq!(process.output().matches(LOG_LINE).count(), 2, "{}", process.output());
    blue.assert_hostname_served();
}

/// The next agent shows the records that the former one left in the kernel.
#[test]
fn refused_packets_survive_a_restart() {
    let ServedTenants { process, agent, nova, red, blue, host } = ServedTenants::new();
    let forged = Ipv4Addr::new(10, 0, 0, 9);
    add_address(&red, forged, 24);
    knock(&red, forged);
    process.kill9();
    let process = agent.start();
    let tenants = ServedTenants { process, agent, nova, red, blue, host };
    let shown = refused(&tenants, &tenants.red);
    assert!(shown["packets"]["forged_address"].as_u64() >= Some(1), "{shown}");
    // The kernel reports nothing within a second after its last report to the former agent.
    wait::until("the next agent logs it", PATIENCE, || {
        knock(&tenants.red, forged);
        tenants.process.output().contains(LOG_LINE).then_some(())
    });
}

/// A guest without DHCP gives itself an address of 169.254.0.0/16 (RFC 3927), and reaches the
/// metadata address on its link.
#[test]
fn a_self_assigned_address_is_the_guests_own_business() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let tenants = TwoTenants::on(host, nova, |spec| GuestSpec { next_hop: NextHop::OnLink, ..spec });
    let tenants = tenants.serve(|installer, red, blue| installer.port(&red.port).port(&blue.port));
    let ServedTenants { process, nova, red, .. } = &tenants;
    let own = Ipv4Addr::new(169, 254, 10, 20);
    red.netns().ip(&format!("address flush dev eth0\naddress add {own}/16 dev eth0"));
    let mut connection = red.connect_from((own, 0).into());
    let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
    assert_eq!(answer.text(), red.hostname());
    assert_eq!(refused(&tenants, red), Value::Null);
    assert_eq!(process.packets(Reason::ForgedAddress), 0);
    // Nova is told the port's address.
    let asked = nova.requests();
    assert_eq!(asked[0].header("x-forwarded-for").as_deref(), Some("10.0.0.5"));

    // The metadata address itself is not.
    let mac = red.port.mac.0;
    let claim = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &METADATA_IPV4, &[0; 6], &METADATA_IPV4].concat();
    PacketSocket::for_sending(red.netns(), "eth0").send(&[&[0xff; 6][..], &mac, &[8, 6], &claim].concat());
    let shown = wait::until("the claim is recorded", PATIENCE, || {
        Some(refused(&tenants, red)).filter(|shown| !shown.is_null())
    });
    assert_eq!(shown["last"]["reason"], "forged_arp", "{shown}");
}
