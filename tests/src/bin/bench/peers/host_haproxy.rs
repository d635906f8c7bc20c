//! `host-haproxy`: one haproxy in the host's namespace that identifies each instance by its source
//! address, with the configuration of neutron/agent/l2/extensions/metadata. Guests have those
//! addresses themselves, so the flows that would translate them cost nothing here. The requesting
//! instances are in the middle of the list.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};

use metadata_ebpf::identity::{METADATA_IPV4, METADATA_PORT};
use metadata_tests::haproxy::USER;
use metadata_tests::{Haproxy, Netns, Port};

use super::super::upstream::{Cable, Upstream, open_ports};
use super::{Caller, Crowd, Peer, haproxy};

/// 100.64.0.0/10. Each instance has four of its addresses.
const PROVIDER: u32 = u32::from_be_bytes([100, 64, 0, 0]);

/// Fields are in drop order.
pub struct HostHaproxy {
    haproxy: Haproxy,
    guests: Vec<Netns>,
    _host: Netns,
}

impl HostHaproxy {
    pub fn start(upstream: &Upstream, crowd: Crowd, others: usize) -> Self {
        let host = Netns::new("provider");
        host.ip("address add 169.254.169.254/32 dev lo");
        let server = upstream.cable(&host).to_string();
        let first = others / 2;
        let guests = (0..crowd.guests).map(|guest| plug(&host, guest, first + guest)).collect();
        let haproxy = Haproxy::serve(&host, &rendered(others + crowd.guests, &server));
        Self { haproxy, guests, _host: host }
    }
}

impl Peer for HostHaproxy {
    fn callers(&self) -> Vec<Caller<'_>> {
        let target: SocketAddr = (METADATA_IPV4, METADATA_PORT).into();
        self.guests.iter().map(|netns| Caller { netns, target, instance: None, signed: "" }).collect()
    }

    fn processes(&self) -> Vec<u32> {
        vec![self.haproxy.pid()]
    }
}

fn address(instance: usize, host: u32) -> Ipv4Addr {
    Ipv4Addr::from(PROVIDER + 4 * u32::try_from(instance).unwrap_or(u32::MAX / 8) + host)
}

fn plug(host: &Netns, guest: usize, instance: usize) -> Netns {
    let netns = Netns::new("guest");
    let number = u32::try_from(instance).unwrap_or(u32::MAX);
    let cable = Cable { number, addresses: [address(instance, 1), address(instance, 2)] };
    cable.lay((host, &format!("guest{guest}")), (&netns, "eth0"));
    netns.ip(&format!("route add 169.254.169.254 via {}", address(instance, 1)));
    open_ports(&netns);
    netns
}

fn rendered(instances: usize, server: &str) -> String {
    let (mut acls, mut uses, mut backends) = (String::new(), String::new(), String::new());
    let network = metadata_agent::ids::NetworkId::new(uuid::Uuid::new_v4());
    for number in 0..instances {
        let ip = address(number, 2);
        let port = Port::new(network, ip);
        let name = format!("{}_{ip}", port.instance);
        let written = writeln!(acls, "    acl instance_{name} src {ip}")
            .and_then(|()| writeln!(uses, "    use_backend backend_{name} if instance_{name}"))
            .and_then(|()| {
                let identity = haproxy::identity(&port);
                writeln!(
                    backends,
                    "\nbackend backend_{name}\n    mode http\n    balance roundrobin\n    retries 3\n    \
                     option redispatch\n    timeout http-request 30s\n    timeout connect 30s\n    \
                     timeout server 30s\n    {identity}\n    server metasrv {server}"
                )
            });
        written.unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
    }
    format!(
        "
global
    log         /dev/log local0 debug
    log-tag     haproxy-metadata-proxy-host_metadata_proxy
    user        {USER}
    group       nogroup
    maxconn     1024
    daemon

frontend public
    bind            *:80 name clear
    mode            http
    log             global
    option          httplog
    option          dontlognull
    maxconn         1024
    timeout http-request    30s
    timeout connect         30s
    timeout client          32s
    timeout server          32s
    timeout http-keep-alive 30s

    monitor-uri     /monitoruri
    stats uri       /admin/stats
{acls}
{uses}
{backends}"
    )
}
