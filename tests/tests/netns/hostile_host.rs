//! Hosts whose own network lets nothing through: guests' packets meet none of it, as they never enter the host's IP stack.
//!
//! Each setting is made once before the agent starts and once while it serves, with a connection open. (The path through
//! the host's stack would survive few: a default-drop INPUT, a full connection table, or strict rp_filter alone ends it.)

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use metadata_tests::wait::PATIENCE;
use metadata_tests::{Connection, Guest, Host, HostState, Instance, Twins};
use serde_json::Value;

/// An address of the host's own on the first network, and a port where nobody listens.
const HOST_ADDRESS: [u8; 4] = [10, 0, 0, 254];
const CLOSED_PORT: u16 = 9;
/// How long it is waited for a refusal that does not come.
const SOON: Duration = Duration::from_millis(400);
const DOCUMENT: &str = "/openstack/latest/meta_data.json";

/// Panics unless the host's own stack hears a guest, or does not: nobody listens, so what it hears it refuses. The guest asks
/// for its MAC address anew.
fn assert_stack(stack: Stack, guest: &Guest) {
    guest.netns().run(&["ip", "neigh", "flush", "to", "10.0.0.254"]);
    let (patience, expected) = match stack {
        Stack::Hears => (PATIENCE, &[io::ErrorKind::ConnectionRefused][..]),
        Stack::Deaf => (SOON, &[io::ErrorKind::TimedOut, io::ErrorKind::HostUnreachable][..]),
    };
    let to = SocketAddr::from((HOST_ADDRESS, CLOSED_PORT));
    let refusal = guest.dial(to, None, patience).expect_err("nobody listens");
    assert!(expected.contains(&refusal.kind()), "{stack:?}: {refusal}");
}

/// Both guests get their own metadata over IPv4 and over IPv6.
fn assert_served(guests: &[Guest]) {
    for guest in guests {
        for response in [guest.get(DOCUMENT), guest.get_v6(DOCUMENT)] {
            assert_eq!(response.status, 200, "{}: {}", guest.tap, response.text());
            let document: Value = serde_json::from_slice(&response.body).expect("JSON");
            assert_eq!(document["uuid"], guest.port.instance.to_string(), "{}", guest.tap);
        }
    }
}

/// Whether the host's own stack hears guests. Where a setting makes it deaf, that shows that the setting is really made.
#[derive(Clone, Copy, Debug)]
enum Stack {
    Deaf,
    Hears,
}

/// Guests are served on a host with this setting, made before the agent starts or later.
fn served_despite(stack: Stack, make: impl Fn(&Host)) {
    for early in [true, false] {
        let twins = Twins::new();
        let [first, _] = &twins.guests;
        twins.host.netns().ip(&format!("address add 10.0.0.254/24 dev {}", twins.networks[0].bridge));
        assert_stack(Stack::Hears, first);
        if early {
            make(&twins.host);
        }
        let before = HostState::capture(&twins.host);
        let agent = twins.agent().install();
        let process = agent.start();
        let mut open: Vec<Connection<_>> =
            twins.guests.iter().flat_map(|guest| [guest.connect(), guest.connect_v6()]).collect();
        let mut ask_all = || {
            for connection in &mut open {
                let answer = connection.request("GET", "/openstack", &[], b"").expect("an answer");
                assert_eq!(answer.status, 200, "{}", answer.text());
            }
        };
        ask_all();
        if !early {
            make(&twins.host);
        }
        assert_stack(stack, first);
        ask_all();
        assert_served(&twins.guests);
        // One that is plugged into such a host.
        let late = twins.networks[1].guest([10, 0, 0, 6]);
        twins.nova.add(Instance::of(&late.port));
        agent.set_ports(twins.guests.iter().chain([&late]).map(|guest| &guest.port));
        assert_served(&[late]);
        assert_eq!(process.stop().code(), Some(0));
        if early {
            before.assert_same(&HostState::capture(&twins.host));
        }
    }
}

/// Drops what is not on the loopback interface, where this host's Nova is.
fn drop_by_default(host: &Host) {
    for iptables in ["iptables", "ip6tables"] {
        for rule in [
            "-A INPUT -i lo -j ACCEPT",
            "-A OUTPUT -o lo -j ACCEPT",
            "-P INPUT DROP",
            "-P OUTPUT DROP",
            "-P FORWARD DROP",
            "-t raw -A PREROUTING ! -i lo -j DROP",
        ] {
            let words: Vec<&str> = std::iter::once(iptables).chain(rule.split(' ')).collect();
            host.netns().run(&words);
        }
    }
}

/// Sets `key` of every interface there is, and of those to come.
fn sysctl_everywhere(host: &Host, family: &str, key: &str, value: &str) {
    let folder = format!("/proc/sys/net/{family}/conf");
    let list = || -> Vec<String> {
        let entries = fs::read_dir(&folder).expect("list interfaces").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    for interface in host.netns().enter(list).into_iter().filter(|name| name != "lo") {
        host.netns().sysctl(&format!("{family}/conf/{interface}/{key}"), value);
    }
}

/// Fills the namespace's connection table up to the machine's limit with connections that may not be dropped early.
fn fill_connection_table(host: &Host) {
    // Connections are only tracked where a rule asks for them. The agent's own to Nova are the host's like any other, so here
    // they are exempt.
    for iptables in ["iptables", "ip6tables"] {
        for rule in [
            "-t raw -A OUTPUT -o lo -j NOTRACK",
            "-t raw -A PREROUTING -i lo -j NOTRACK",
            "-A INPUT -m conntrack --ctstate NEW -j ACCEPT",
        ] {
            host.netns().run(&std::iter::once(iptables).chain(rule.split(' ')).collect::<Vec<_>>());
        }
    }
    let limit = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").expect("the limit");
    let limit: u32 = limit.trim().parse().expect("a number");
    let mut entries = String::new();
    for number in 0..limit {
        let [_, b, c, d] = number.to_be_bytes();
        writeln!(
            entries,
            "-I -p tcp -s 10.{b}.{c}.{d} -d 192.0.2.1 --sport 1000 --dport 80 --state ESTABLISHED \
             -u ASSURED,SEEN_REPLY -t 600"
        )
        .expect("write to a String");
    }
    let file = host.folder().join("connections");
    fs::write(&file, entries).expect("write the connections");
    // Those that are there already, of the loopback interface, keep the last few out.
    let filled = host.netns().command("conntrack").arg("-R").arg(&file).output();
    filled.expect("run conntrack");
    let count = host.netns().run(&["conntrack", "-C"]);
    assert!(count.trim().parse::<u32>().expect("a number") >= limit, "{count} of {limit}");
}

#[test]
fn a_bridge_that_calls_a_firewall_which_drops() {
    served_despite(Stack::Deaf, |host| {
        for tables in ["iptables", "ip6tables", "arptables"] {
            host.netns().sysctl(&format!("bridge/bridge-nf-call-{tables}"), "1");
        }
        drop_by_default(host);
    });
}

#[test]
fn a_firewall_that_drops_by_default() {
    served_despite(Stack::Deaf, drop_by_default);
}

#[test]
fn a_full_connection_table() {
    served_despite(Stack::Deaf, fill_connection_table);
}

#[test]
fn a_strict_reverse_path_filter() {
    served_despite(Stack::Deaf, |host| {
        // The way back to the guests is not the way they come by.
        host.netns()
            .ip("link add elsewhere type bridge\nlink set elsewhere up\nroute add 10.0.0.0/28 dev elsewhere");
        sysctl_everywhere(host, "ipv4", "rp_filter", "1");
    });
}

#[test]
fn ipv6_disabled_on_all_interfaces() {
    served_despite(Stack::Hears, |host| sysctl_everywhere(host, "ipv6", "disable_ipv6", "1"));
}

#[test]
fn arp_that_answers_nobody() {
    served_despite(Stack::Deaf, |host| {
        sysctl_everywhere(host, "ipv4", "arp_ignore", "8");
        sysctl_everywhere(host, "ipv4", "arp_filter", "1");
        sysctl_everywhere(host, "ipv4", "arp_announce", "2");
    });
}

#[test]
fn forwarding_off_and_on() {
    for value in ["0", "1"] {
        served_despite(Stack::Hears, |host| {
            sysctl_everywhere(host, "ipv4", "forwarding", value);
            sysctl_everywhere(host, "ipv6", "forwarding", value);
        });
    }
}

#[test]
fn routes_that_lead_nowhere() {
    served_despite(Stack::Deaf, |host| {
        host.netns().ip("route add blackhole 169.254.0.0/16\n\
             route add blackhole 10.0.0.0/25\n\
             route add blackhole fd6d::/16\n\
             rule add iif md-portal prohibit");
        host.netns().run(&["ip", "-6", "rule", "add", "iif", "md-portal", "prohibit"]);
    });
}

/// What a portal is like that was made where new namespaces come without IPv6 (`ipv6.disable_ipv6=1`, or
/// `net.core.devconf_inherit_init_net` with `net.ipv6.conf.default.disable_ipv6`): its next agent switches it on.
#[test]
fn a_portal_without_ipv6() {
    for is_without_link in [false, true] {
        let twins = Twins::new();
        let before = HostState::capture(&twins.host);
        let agent = twins.agent().install();
        let process = agent.start();
        assert_served(&twins.guests);
        process.kill9();
        let off = "for setting in all default lo md0; do\n\
                   echo 1 > /proc/sys/net/ipv6/conf/$setting/disable_ipv6 || exit\n\
                   done";
        twins.host.netns().run(&["ip", "netns", "exec", agent.portal(), "sh", "-c", off]);
        if is_without_link {
            twins.host.netns().ip("link del md-portal");
        }
        let process = agent.start();
        assert_served(&twins.guests);
        assert_eq!(process.stop().code(), Some(0));
        before.assert_same(&HostState::capture(&twins.host));
    }
}
