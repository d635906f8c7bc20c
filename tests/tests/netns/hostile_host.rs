//! Hosts whose own network stack passes nothing. Guests' packets are not affected, because they
//! never enter the host's IP stack.
//!
//! Each setting is applied once before the agent starts and once while it serves, with an open
//! connection. (A path through the host's stack would fail with most of them: a default-drop INPUT
//! chain, a full connection table, or strict rp_filter alone breaks it.)

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use metadata_tests::wait::PATIENCE;
use metadata_tests::{Connection, Guest, Host, HostState, Instance, TwoTenants};
use serde_json::Value;

/// The host's own address on the first network, and a port without a listener.
const HOST_ADDRESS: [u8; 4] = [10, 0, 0, 254];
const CLOSED_PORT: u16 = 9;
/// Time to wait for a refusal that must not come.
const SOON: Duration = Duration::from_millis(400);
const DOCUMENT: &str = "/openstack/latest/meta_data.json";

/// Panics unless the host's own stack receives (or does not receive) a guest's packet. No socket
/// listens, so the stack refuses what it receives. The guest resolves the host's MAC address again.
fn assert_stack(stack: Stack, guest: &Guest) {
    guest.netns().run(&["ip", "neigh", "flush", "to", "10.0.0.254"]);
    let (patience, expected) = match stack {
        Stack::Responds => (PATIENCE, &[io::ErrorKind::ConnectionRefused][..]),
        Stack::Silent => (SOON, &[io::ErrorKind::TimedOut, io::ErrorKind::HostUnreachable][..]),
    };
    let to = SocketAddr::from((HOST_ADDRESS, CLOSED_PORT));
    let refusal = guest.dial(to, None, patience).expect_err("no listener");
    assert!(expected.contains(&refusal.kind()), "{stack:?}: {refusal}");
}

/// Asserts that both guests get their own metadata over IPv4 and over IPv6.
fn assert_served(guests: &[Guest]) {
    for guest in guests {
        for response in [guest.get(DOCUMENT), guest.get_v6(DOCUMENT)] {
            assert_eq!(response.status, 200, "{}: {}", guest.tap, response.text());
            let document: Value = serde_json::from_slice(&response.body).expect("JSON");
            assert_eq!(document["uuid"], guest.port.instance.to_string(), "{}", guest.tap);
        }
    }
}

/// The expected reachability of the host's own stack. If a setting blocks it, this proves that the
/// setting is effective.
#[derive(Clone, Copy, Debug)]
enum Stack {
    Silent,
    Responds,
}

/// Asserts that guests are served on a host with this setting, applied before the agent starts or
/// later.
fn served_despite(stack: Stack, make: impl Fn(&Host)) {
    for early in [true, false] {
        let tenants = TwoTenants::new();
        let [first, _] = &tenants.guests;
        tenants.host.netns().ip(&format!("address add 10.0.0.254/24 dev {}", tenants.networks[0].bridge));
        assert_stack(Stack::Responds, first);
        if early {
            make(&tenants.host);
        }
        let before = HostState::capture(&tenants.host);
        let agent = tenants.agent().install();
        let process = agent.start();
        let mut open: Vec<Connection<_>> =
            tenants.guests.iter().flat_map(|guest| [guest.connect(), guest.connect_v6()]).collect();
        let mut ask_all = || {
            for connection in &mut open {
                let answer = connection.request("GET", "/openstack", &[], b"").expect("an answer");
                assert_eq!(answer.status, 200, "{}", answer.text());
            }
        };
        ask_all();
        if !early {
            make(&tenants.host);
        }
        assert_stack(stack, first);
        ask_all();
        assert_served(&tenants.guests);
        // A guest that is plugged in after the setting.
        let late = tenants.networks[1].guest([10, 0, 0, 6]);
        tenants.nova.add(Instance::from_port(&late.port));
        agent.set_ports(tenants.guests.iter().chain([&late]).map(|guest| &guest.port));
        assert_served(&[late]);
        assert_eq!(process.stop().code(), Some(0));
        if early {
            before.assert_same(&HostState::capture(&tenants.host));
        }
    }
}

/// Drops everything except on the loopback interface, where this host's Nova is.
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

/// Sets `key` of all present and future interfaces.
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

/// Fills the namespace's connection table up to the machine's limit with connections that may not
/// be dropped early.
fn fill_connection_table(host: &Host) {
    // Connections are tracked only if a rule needs them. The agent's own connections to Nova would
    // be tracked as well, so they are exempt here.
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
    // Existing entries of the loopback interface keep the last few out.
    let filled = host.netns().command("conntrack").arg("-R").arg(&file).output();
    filled.expect("run conntrack");
    let count = host.netns().run(&["conntrack", "-C"]);
    assert!(count.trim().parse::<u32>().expect("a number") >= limit, "{count} of {limit}");
}

#[test]
fn a_bridge_that_calls_a_dropping_firewall() {
    served_despite(Stack::Silent, |host| {
        for tables in ["iptables", "ip6tables", "arptables"] {
            host.netns().sysctl(&format!("bridge/bridge-nf-call-{tables}"), "1");
        }
        drop_by_default(host);
    });
}

#[test]
fn a_firewall_that_drops_by_default() {
    served_despite(Stack::Silent, drop_by_default);
}

#[test]
fn a_full_connection_table() {
    served_despite(Stack::Silent, fill_connection_table);
}

#[test]
fn a_strict_reverse_path_filter() {
    served_despite(Stack::Silent, |host| {
        // The route back to the guests is not the way on which they arrive.
        host.netns()
            .ip("link add elsewhere type bridge\nlink set elsewhere up\nroute add 10.0.0.0/28 dev elsewhere");
        sysctl_everywhere(host, "ipv4", "rp_filter", "1");
    });
}

#[test]
fn ipv6_disabled_on_all_interfaces() {
    served_despite(Stack::Responds, |host| sysctl_everywhere(host, "ipv6", "disable_ipv6", "1"));
}

#[test]
fn arp_replies_disabled() {
    served_despite(Stack::Silent, |host| {
        sysctl_everywhere(host, "ipv4", "arp_ignore", "8");
        sysctl_everywhere(host, "ipv4", "arp_filter", "1");
        sysctl_everywhere(host, "ipv4", "arp_announce", "2");
    });
}

#[test]
fn forwarding_off_and_on() {
    for value in ["0", "1"] {
        served_despite(Stack::Responds, |host| {
            sysctl_everywhere(host, "ipv4", "forwarding", value);
            sysctl_everywhere(host, "ipv6", "forwarding", value);
        });
    }
}

#[test]
fn blackhole_routes() {
    served_despite(Stack::Silent, |host| {
        host.netns().ip("route add blackhole 169.254.0.0/16\n\
             route add blackhole 10.0.0.0/25\n\
             route add blackhole fd64::/14\n\
             rule add iif md-portal prohibit");
        host.netns().run(&["ip", "-6", "rule", "add", "iif", "md-portal", "prohibit"]);
    });
}

/// Simulates a portal that was created while new namespaces start without IPv6
/// (`ipv6.disable_ipv6=1`, or `net.core.devconf_inherit_init_net` with
/// `net.ipv6.conf.default.disable_ipv6`). The next agent enables IPv6.
#[test]
fn a_portal_without_ipv6() {
    for is_without_link in [false, true] {
        let tenants = TwoTenants::new();
        let before = HostState::capture(&tenants.host);
        let agent = tenants.agent().install();
        let process = agent.start();
        assert_served(&tenants.guests);
        process.kill9();
        let off = "for setting in all default lo md0; do\n\
                   echo 1 > /proc/sys/net/ipv6/conf/$setting/disable_ipv6 || exit\n\
                   done";
        tenants.host.netns().run(&["ip", "netns", "exec", agent.portal(), "sh", "-c", off]);
        if is_without_link {
            tenants.host.netns().ip("link del md-portal");
        }
        let process = agent.start();
        assert_served(&tenants.guests);
        assert_eq!(process.stop().code(), Some(0));
        before.assert_same(&HostState::capture(&tenants.host));
    }
}
