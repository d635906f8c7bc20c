//! A guest's identity follows from its interface only, not from addresses, ports or headers that it
//! sends.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use metadata_agent::ids::MacAddress;
use metadata_ebpf::reason::Reason;
use metadata_tests::nova::{SECRET, signature};
use metadata_tests::two_tenants::{ADDRESS, HOSTNAME};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Port, ServedTenants, Tenant};

/// Time to wait for a response that must not come: less than the kernel's first retransmission of a
/// SYN.
const UNANSWERED: Duration = Duration::from_millis(400);
/// An address that the guest does not have.
const FORGED_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);
/// A MAC address that the guest does not have.
const FORGED_MAC: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0xba, 0xdb, 0xad]);

/// Both use the same source address and port at the same time.
#[test]
fn guests_with_equal_address_and_port_get_their_own_answers() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let source = SocketAddr::from((ADDRESS, 40_000));
    let (mut of_red, mut of_blue) = (red.connect_from(source), blue.connect_from(source));
    let (begin, end) = (format!("GET {HOSTNAME} "), "HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    for _ in 0..3 {
        of_red.send(&begin).expect("half a request");
        of_blue.send(&begin).expect("half a request");
        of_red.send(end).expect("the other half");
        of_blue.send(end).expect("the other half");
        assert_eq!(of_blue.receive().expect("an answer").text(), blue.hostname());
        assert_eq!(of_red.receive().expect("an answer").text(), red.hostname());
    }

    assert_eq!(process.count("metadata_connections_open"), 2);
    let asked = nova.requests();
    assert_eq!(asked.len(), 6);
    assert!(asked.iter().all(|request| request.header("x-forwarded-for").as_deref() == Some("10.0.0.5")));
    let attachments = [tenants.attachment(red), tenants.attachment(blue)];
    for (attachment, guest) in attachments.iter().zip([red, blue]) {
        let clients = attachment["clients"].as_array().expect("clients");
        assert_eq!(clients.len(), 1, "{attachment}");
        assert_eq!(clients[0]["address"], "10.0.0.5");
        assert_eq!(clients[0]["mac"], guest.port.mac.to_string());
        assert_eq!(attachment["port"]["instance"], guest.port.instance.to_string());
    }
    assert_ne!(attachments[0]["attachment"], attachments[1]["attachment"]);
}

fn checked_by(source_check: &str) -> ServedTenants {
    ServedTenants::with(|installer, red, blue| {
        installer.port(&red.port).port(&blue.port).set("metadata_agent", "source_check", source_check)
    })
}

/// Requests the host name from an address that the guest does not have.
fn get_from_forged_address(guest: &Tenant, patience: Duration) -> Result<String, ErrorKind> {
    guest.netns().ip(&format!("address add {FORGED_ADDRESS}/24 dev eth0"));
    get_from(guest, (FORGED_ADDRESS, 0).into(), patience)
}

/// Requests the host name from a MAC address that the guest does not have.
fn get_from_forged_mac(guest: &Tenant, patience: Duration) -> Result<String, ErrorKind> {
    // A new MAC address makes the kernel forget its neighbours.
    guest.netns().ip(&format!(
        "link set eth0 address {FORGED_MAC}\n\
         neighbour replace {} lladdr {} nud permanent dev eth0",
        guest.network.gateway, guest.network.gateway_mac
    ));
    get_from(guest, (ADDRESS, 0).into(), patience)
}

/// Gives up unless it is connected within `patience`.
fn get_from(guest: &Tenant, source: SocketAddr, patience: Duration) -> Result<String, ErrorKind> {
    let connected = guest.dial(guest.metadata_ipv4(), Some(source), patience);
    let mut connection = connected.map_err(|e| e.kind())?;
    connection.stream().set_read_timeout(Some(PATIENCE)).expect("be patient again");
    let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer on the open connection");
    Ok(answer.text().to_owned())
}

#[test]
fn a_forged_source_address_is_dropped_and_counted() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let legacy = red.network.legacy();
    assert_eq!(get_from_forged_address(red, UNANSWERED), Err(ErrorKind::TimedOut));
    assert!(process.packets(Reason::ForgedAddress) >= 1);
    assert_eq!((nova.requests().len(), legacy.requests().len()), (0, 0));
    red.assert_hostname_served();
    blue.assert_hostname_served();
}

/// Of an allowed address pair with a prefix, every address is accepted and its neighbours are not.
#[test]
fn only_addresses_in_the_allowed_prefix_are_the_guests_own() {
    let tenants = ServedTenants::with(|installer, red, blue| {
        let allowed_addresses = vec!["10.0.0.96/28".parse().expect("a prefix")];
        installer.port(&Port { allowed_addresses, ..red.port.clone() }).port(&blue.port)
    });
    let ServedTenants { process, agent, nova, red, blue, .. } = &tenants;
    let [below, first, last, above] = [95, 96, 111, 112].map(|octet| Ipv4Addr::new(10, 0, 0, octet));
    for guest in [red, blue] {
        for address in [below, first, last, above] {
            guest.netns().ip(&format!("address add {address}/24 dev eth0"));
        }
    }
    let get = |guest, address: Ipv4Addr, patience| get_from(guest, (address, 0).into(), patience);
    for address in [first, last] {
        assert_eq!(get(red, address, PATIENCE), Ok(red.hostname()), "{address}");
    }
    assert_eq!(process.packets(Reason::ForgedAddress), 0);
    for (guest, address) in [(red, below), (red, above), (blue, first), (blue, last)] {
        let forged = process.packets(Reason::ForgedAddress);
        assert_eq!(get(guest, address, UNANSWERED), Err(ErrorKind::TimedOut), "{address}");
        assert!(process.packets(Reason::ForgedAddress) > forged, "{address}");
    }
    let asked = nova.requests();
    assert_eq!(asked.len(), 2);
    assert!(asked.iter().all(|request| request.header("x-forwarded-for").as_deref() == Some("10.0.0.5")));

    agent.set_ports([&red.port, &blue.port]);
    // Only connects: the policy may change between a connection and its first request.
    let connect = || red.dial(red.metadata_ipv4(), Some((first, 0).into()), UNANSWERED);
    wait::until("it is no longer allowed", PATIENCE, || connect().is_err().then_some(()));
    red.assert_hostname_served();
    blue.assert_hostname_served();
}

#[test]
fn a_forged_source_mac_is_dropped_and_counted() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let legacy = red.network.legacy();
    assert_eq!(get_from_forged_mac(red, UNANSWERED), Err(ErrorKind::TimedOut));
    assert!(process.packets(Reason::ForgedMac) >= 1);
    assert_eq!((nova.requests().len(), legacy.requests().len()), (0, 0));
    blue.assert_hostname_served();
}

#[test]
fn with_mac_check_another_address_is_still_the_same_guest() {
    let tenants = checked_by("mac");
    let ServedTenants { process, nova, red, .. } = &tenants;
    assert_eq!(get_from_forged_address(red, PATIENCE), Ok(red.hostname()));
    // Nova gets the address of the port, whatever address the guest uses.
    assert_eq!(nova.requests()[0].header("x-forwarded-for").as_deref(), Some("10.0.0.5"));
    assert_eq!(get_from_forged_mac(red, UNANSWERED), Err(ErrorKind::TimedOut));
    assert_eq!(process.packets(Reason::ForgedAddress), 0);
    assert!(process.packets(Reason::ForgedMac) >= 1);
}

#[test]
fn without_source_check_the_interface_identifies_the_guest() {
    let tenants = checked_by("off");
    let ServedTenants { process, red, blue, .. } = &tenants;
    assert_eq!(get_from_forged_address(red, PATIENCE), Ok(red.hostname()));
    assert_eq!(get_from_forged_mac(red, PATIENCE), Ok(red.hostname()));
    let forged = process.packets(Reason::ForgedAddress) + process.packets(Reason::ForgedMac);
    assert_eq!(forged, 0);
    blue.assert_hostname_served();
}

/// Returns headers with which a guest could impersonate the victim if it knew everything, even the
/// secret.
fn claims_of(victim: &Tenant) -> Vec<(&'static str, String)> {
    let instance = victim.port.instance.to_string();
    vec![
        ("X-Instance-ID-Signature", signature(SECRET, &instance)),
        ("X-Instance-ID", instance),
        ("X-Tenant-ID", victim.port.project.to_string()),
        ("X-Forwarded-For", "10.0.0.66".to_owned()),
        ("X-Metadata-Provider", victim.network.id.to_string()),
        ("X-Metadata-Provider-Signature", signature(SECRET, &victim.network.id.to_string())),
        ("X-Neutron-Network-ID", victim.network.id.to_string()),
        ("X-Neutron-Router-ID", victim.network.id.to_string()),
        ("X-OVN-Network-ID", victim.network.id.to_string()),
        ("X-Real-IP", "10.0.0.66".to_owned()),
        ("Forwarded", "for=10.0.0.66".to_owned()),
        ("Cookie", "a=b".to_owned()),
        ("Authorization", "Basic YTpi".to_owned()),
        ("Connection", "X-Instance-ID, X-Tenant-ID, X-Instance-ID-Signature".to_owned()),
    ]
}

#[test]
fn guest_headers_change_nothing_in_the_request_to_nova() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    let claims = claims_of(blue);
    let lower: Vec<(String, &str)> =
        claims.iter().map(|(name, value)| (name.to_lowercase(), value.as_str())).collect();
    let canonical: Vec<(&str, &str)> = claims.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let lower: Vec<(&str, &str)> = lower.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let twice = [canonical.clone(), lower.clone(), canonical.clone()].concat();
    let own = [
        ("accept", "*/*".to_owned()),
        ("host", nova.address().to_string()),
        ("x-forwarded-for", "10.0.0.5".to_owned()),
        ("x-instance-id", red.port.instance.to_string()),
        ("x-instance-id-signature", signature(SECRET, &red.port.instance.to_string())),
        ("x-tenant-id", red.port.project.to_string()),
    ];
    let own = own.map(|(name, value)| (name.to_owned(), value));

    for headers in [&canonical, &lower, &twice] {
        let answer = red.connect().request("GET", HOSTNAME, headers, b"").expect("an answer");
        assert_eq!((answer.status, answer.text()), (200, red.hostname().as_str()));
        let asked = nova.requests().pop().expect("a request");
        let mut received = asked.headers;
        received.sort();
        assert_eq!(received, own);
    }

    let mut connection = red.connect();
    let head = "POST /openstack/2013-10-17/password HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
                Trailer: X-Instance-ID\r\nContent-Type: text/plain\r\n\r\n";
    let trailer = format!("1\r\np\r\n0\r\nX-Instance-ID: {}\r\n\r\n", blue.port.instance);
    connection.send([head, trailer.as_str()].concat()).expect("a request with a trailer");
    assert_eq!(connection.receive().expect("an answer").status, 200);
    let mut received = nova.requests().pop().expect("a request").headers;
    received.retain(|header| !own.contains(header));
    received.sort();
    let of_a_post = [("connection", "close"), ("content-length", "1"), ("content-type", "text/plain")];
    assert_eq!(received, of_a_post.map(|(name, value)| (name.to_owned(), value.to_owned())));
    assert_eq!(nova.password(blue.port.instance), None);
}
