//! The host of an attack: attackers, bystanders, and a server that is not ours for the control.

use std::fs::{self, Permissions};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use tempfile::TempDir;

use super::connections::{Behaviour, Connections};
use super::flood::{self, Flood, Link};
use super::running::Running;
use super::tcp_memory::{self, Sockstat};
use super::{Attack, Position, name};
use crate::agent::{Agent, AgentProcess, Installer};
use crate::guest::Guest;
use crate::haproxy::{self, Driver, Haproxy};
use crate::http_server::{Answer, HttpServer};
use crate::load::{Steady, Tally};
use crate::netns::Netns;
use crate::nova::{Instance, NovaStandIn};
use crate::packet_socket::PacketSocket;
use crate::router::Router;
use crate::topology::{Host, Network};
use crate::two_tenants::HOSTNAME;

/// 20 requests per second.
const INTERVAL: Duration = Duration::from_millis(50);
/// The time limit of a bystander's request. A lost SYN is sent again after one second, and then
/// only after three.
const PATIENCE: Duration = Duration::from_millis(2500);
/// The server of the control. It is in the namespace of the router or of the haproxy.
const DECOY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)), 8080);
/// Its address for link-local sources, where nothing listens.
const DECOY_IPV6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xc0, 0xffee);
const USER_DATA: &str = "/openstack/latest/user_data";
/// Connections of an attacker that wants all that it can get.
const ALL: usize = 128;
const BUSY: usize = 120;

/// The circumstances of a bystander. Each has a bystander of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Quiet,
    /// The attack hits a server that is not ours.
    Control,
    Attacked,
}

/// The experience of a bystander, and the resources in use at the end.
#[derive(Debug)]
pub struct Observation {
    pub tally: Tally,
    /// Memory of the TCP sockets in the portal, in bytes.
    pub portal_memory: u64,
    /// Growth of the memory of all TCP sockets of the machine, in pages. It includes the
    /// attackers' own.
    pub tcp_pages: u64,
    /// Connections of the host's namespace in TIME-WAIT, such as those to Nova.
    pub time_wait: u64,
}

/// A host with everyone who takes part. Fields are in drop order.
#[derive(Debug)]
pub struct Scene {
    attack: Attack,
    pub process: AgentProcess,
    pub agent: Agent,
    decoy: HttpServer,
    _haproxies: Vec<Haproxy>,
    pub nova: NovaStandIn,
    bystanders: Vec<Guest>,
    attackers: Vec<Guest>,
    /// The networks of the attackers.
    networks: Vec<Network>,
    _router: Option<Router>,
    _socket: TempDir,
    host: Host,
}

impl Scene {
    /// Creates the scene and waits until the agent serves an attacker.
    #[must_use]
    pub fn new(attack: Attack, position: Position) -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());

        // The networks: the attackers', and the bystanders' if that is another.
        let count = attack.networks();
        let network = |number: u8| host.network_at([10, number, 0, 1].into(), 18);
        let networks: Vec<Network> = (0..count).map(network).collect();
        let other = match position {
            Position::SameNetwork | Position::SameInterface => None,
            Position::OtherNetwork | Position::Tap => Some(network(count)),
        };
        let guest = |network: &Network, last: u8| {
            let [a, b, c, _] = network.gateway.octets();
            network.guest([a, b, c, last])
        };
        let attackers: Vec<Guest> = networks
            .iter()
            .flat_map(|network| (0..attack.attackers()).map(move |number| guest(network, 66 + number)))
            .collect();
        let crowded = other.as_ref().unwrap_or(&networks[0]);
        let bystanders: Vec<Guest> = (5..8).map(|last| guest(crowded, last)).collect();
        for guest in &attackers {
            let user_data = Some(vec![b'u'; attack.answer()]);
            nova.add(Instance { user_data, ..Instance::from_port(&guest.port) });
        }
        for guest in &bystanders {
            nova.add(Instance::from_port(&guest.port));
        }

        // The agent, and the way to it.
        let socket = haproxy_folder();
        let mut installer = Agent::on(&host, &nova);
        for (group, key, value) in attack.options() {
            installer = installer.set(group, key, value);
        }
        for guest in attackers.iter().chain(&bystanders) {
            installer = installer.port(&guest.port);
        }
        let tapped: Vec<&str> = match position {
            Position::SameNetwork if !attack.is_through_haproxy() => {
                attackers.iter().chain(&bystanders).map(|guest| guest.tap.as_str()).collect()
            }
            Position::Tap => bystanders.iter().map(|guest| guest.tap.as_str()).collect(),
            Position::SameNetwork | Position::SameInterface | Position::OtherNetwork => vec!["none*"],
        };
        installer = installer.set("metadata_agent", "guest_interfaces", &tapped.join(","));
        let path = socket.path().join("metadata_proxy");
        let mut haproxies = Vec::new();
        let mut router = None;
        let served = networks.iter().chain(other.as_ref().filter(|_| position == Position::OtherNetwork));
        if attack.is_through_haproxy() {
            installer = behind_haproxies(installer, &path.display().to_string());
            haproxies.extend(served.map(|network| Haproxy::start(network, Driver::Dhcp, &path)));
        } else {
            let mut created = Router::new(&host);
            for network in served {
                installer = installer.port(&created.add(network));
            }
            if position != Position::SameNetwork {
                installer = installer.set("metadata_agent", "namespaces", created.netns().name());
            }
            router = Some(created);
        }
        let behind = haproxies.first().and_then(|haproxy| Some(haproxy.gateway()?.netns()));
        let behind = behind.or(router.as_ref().map(Router::netns));
        let decoy = decoy(behind.unwrap_or_else(|| unreachable!("one of both is there")), attack);

        let agent = installer.install();
        let process = agent.start();
        let answer = if attack.is_through_haproxy() {
            attackers[0].get_v6(HOSTNAME)
        } else {
            attackers[0].get(HOSTNAME)
        };
        assert_eq!(answer.status, 200, "{}: {}", name(&attack), answer.text());
        nova.set_mode(attack.mode());
        Self {
            attack,
            process,
            agent,
            decoy,
            _haproxies: haproxies,
            nova,
            bystanders,
            attackers,
            networks,
            _router: router,
            _socket: socket,
            host,
        }
    }

    /// Lets the bystander of this condition send requests. Each condition can be observed once.
    #[must_use]
    pub fn observe(&self, condition: Condition, requests: u32) -> Observation {
        let before = Sockstat::read(self.host.netns()).pages;
        let (bystander, attack) = match condition {
            Condition::Quiet => (&self.bystanders[0], None),
            Condition::Control => (&self.bystanders[1], Some(self.attack(&self.control()))),
            Condition::Attacked => (&self.bystanders[2], Some(self.attack(&self.service()))),
        };
        if let Some(attack) = &attack {
            attack.wait_until_effective();
        }
        let steady = Steady {
            target: self.metadata(bystander),
            path: HOSTNAME.to_owned(),
            body: Instance::from_port(&bystander.port).hostname().into_bytes(),
            interval: INTERVAL,
            requests,
            patience: PATIENCE,
        };
        let tally = steady.run(bystander.netns());
        let Sockstat { time_wait, pages } = Sockstat::read(self.host.netns());
        Observation {
            tally,
            portal_memory: tcp_memory::of_sockets(self.agent.portal()),
            tcp_pages: pages.saturating_sub(before),
            time_wait,
        }
    }

    /// Returns the agent's counts of connections and requests that it did not serve.
    pub(super) fn rejections(&self) -> String {
        let metrics = self.process.metrics();
        let counted = metrics.lines().filter(|line| {
            let kind = ["metadata_rejected", "metadata_upstream_errors", "metadata_requests_total"];
            kind.iter().any(|name| line.starts_with(name)) && !line.ends_with(" 0")
        });
        counted.collect::<Vec<_>>().join(", ")
    }

    /// Returns the metadata address that a guest uses. Without Neutron, a guest behind a haproxy is
    /// known by its link-local address alone.
    fn metadata(&self, guest: &Guest) -> SocketAddr {
        if self.attack.is_through_haproxy() { guest.metadata_ipv6() } else { guest.metadata_ipv4() }
    }

    fn service(&self) -> Target {
        let [v4, v6] = [self.attackers[0].metadata_ipv4(), self.attackers[0].metadata_ipv6()];
        Target { v4, v6, is_ours: true }
    }

    fn control(&self) -> Target {
        Target { v4: self.decoy.address(), v6: (DECOY_IPV6, 80).into(), is_ours: false }
    }

    fn attack(&self, target: &Target) -> Running {
        match self.attack {
            Attack::IdleConnections => self.connect(ALL, |_| Connections {
                target: target.v4,
                count: ALL,
                behaviour: Behaviour::Idle,
            }),
            Attack::SlowPosts => self.post_slowly(target, 100, ""),
            Attack::RefusedPosts => {
                const OTHER: &str = "X-OVN-Network-ID: 00000000-0000-4000-8000-000000000000\r\n";
                self.post_slowly(target, 300, OTHER)
            }
            Attack::Unread64k | Attack::Unread1m => self.connect(ALL, |_| Connections {
                target: target.v4,
                count: ALL,
                behaviour: Behaviour::Unread { path: USER_DATA.to_owned(), answer: self.attack.answer() },
            }),
            Attack::Trickled => self.connect(ALL, |_| Connections {
                target: target.v4,
                count: ALL,
                behaviour: Behaviour::Trickled { path: USER_DATA.to_owned(), answer: self.attack.answer() },
            }),
            Attack::Busy | Attack::Busy20ms | Attack::Busy200ms | Attack::FourBusy | Attack::FourBusy20ms => {
                self.connect(BUSY, |guest| self.busy(guest, target, BUSY))
            }
            Attack::RequestRate => self.connect(8, |guest| self.busy(guest, target, 8)),
            Attack::SynFlood => {
                let guest = &self.attackers[0];
                let frames = (0..60_000).map(|number| self.syn_from(guest, target, number)).collect();
                // The kernel of the guest knows nothing of these connections and would close them.
                guest.netns().run(&[
                    "iptables",
                    "-A",
                    "OUTPUT",
                    "-p",
                    "tcp",
                    "--tcp-flags",
                    "RST",
                    "RST",
                    "-j",
                    "DROP",
                ]);
                self.flood(frames, 0, 10_000, 10_000)
            }
            Attack::LinkLocalSyns => {
                let link = self.link(&self.attackers[0], 0);
                let syn =
                    |number| (0, flood::syn(link, flood::made_up_link_local(number), target.v6, number));
                self.flood((0..7_000).map(syn).collect(), 7_000, 220, 7_000)
            }
            Attack::LinkLocalMacs => {
                let syn = |number| {
                    let link = Link {
                        source: flood::made_up_mac(number),
                        destination: self.networks[0].gateway_mac.0,
                    };
                    let source = flood::derived_link_local(link.source);
                    (0, flood::syn(link, source, target.v6, number))
                };
                self.flood((0..7_000).map(syn).collect(), 7_000, 220, 7_000)
            }
            Attack::MadeUpIpv4 => {
                let (link, gateway) = (self.link(&self.attackers[0], 0), self.networks[0].gateway);
                let syn =
                    |number| (0, flood::syn(link, flood::made_up_ipv4(gateway, number), target.v4, number));
                self.flood((0..60_000).map(syn).collect(), 0, 10_000, 10_000)
            }
            Attack::ClientMap => {
                // In turn from each network, as many as one interface may record.
                let links = self.attackers.len();
                let syn = |number: usize| {
                    let (link, made_up) = (number % links, u32::try_from(number / links).unwrap_or(0));
                    let source = flood::made_up_ipv4(self.networks[link].gateway, made_up);
                    let frame =
                        flood::syn(self.link(&self.attackers[link], link), source, target.v4, made_up);
                    (link, frame)
                };
                let all = links * 4096;
                self.flood((0..all).map(syn).collect(), all, 220, all)
            }
        }
    }

    fn post_slowly(&self, target: &Target, count: usize, lines: &'static str) -> Running {
        let address = if target.is_ours { target.v6 } else { target.v4 };
        self.connect(count, |_| Connections { target: address, count, behaviour: Behaviour::SlowPost(lines) })
    }

    fn busy(&self, guest: &Guest, target: &Target, count: usize) -> Connections {
        let body = if target.is_ours {
            Instance::from_port(&guest.port).hostname().into_bytes()
        } else {
            decoy_body(self.attack)
        };
        Connections::busy(target.v4, count, HOSTNAME, body)
    }

    fn connect(&self, each: usize, connections: impl Fn(&Guest) -> Connections) -> Running {
        let mut running = Running::new(each * self.attackers.len());
        for guest in &self.attackers {
            let connections = connections(guest);
            // A thread starts in the namespace of the thread that spawns it.
            guest.netns().enter(|| running.spawn(move |stop, progress| connections.run(stop, &progress)));
        }
        running
    }

    fn link(&self, guest: &Guest, network: usize) -> Link {
        Link { source: guest.port.mac.0, destination: self.networks[network].gateway_mac.0 }
    }

    fn syn_from(&self, guest: &Guest, target: &Target, number: u32) -> (usize, Vec<u8>) {
        let address = guest.port.ipv4().unwrap_or(Ipv4Addr::UNSPECIFIED);
        (0, flood::syn(self.link(guest, 0), address, target.v4, number))
    }

    fn flood(&self, frames: Vec<(usize, Vec<u8>)>, at_once: usize, rate: u32, wanted: usize) -> Running {
        let open = |guest: &Guest| PacketSocket::for_sending(guest.netns(), "eth0");
        let flood = Flood { links: self.attackers.iter().map(open).collect(), frames, at_once, rate };
        let mut running = Running::new(wanted);
        running.spawn(move |stop, progress| flood.run(stop, &progress));
        running
    }
}

/// The server that an attack hits.
struct Target {
    v4: SocketAddr,
    v6: SocketAddr,
    is_ours: bool,
}

/// Starts a server that is not ours and otherwise behaves like Nova.
fn decoy(gateway: &Netns, attack: Attack) -> HttpServer {
    gateway.ip(&format!("address add {}/32 dev lo", DECOY.ip()));
    let body = decoy_body(attack);
    let server = HttpServer::start(gateway, DECOY, move |_| Answer::new(200, "text/plain", body.clone()));
    server.set_mode(attack.mode());
    server
}

fn decoy_body(attack: Attack) -> Vec<u8> {
    vec![b'd'; attack.answer()]
}

/// Creates a folder that haproxy, which runs as another user, can enter.
fn haproxy_folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("hostile-").tempdir();
    let folder = folder.unwrap_or_else(|e| panic!("create a folder for a socket: {e}"));
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))
        .unwrap_or_else(|e| panic!("open {}: {e}", folder.path().display()));
    folder
}

fn behind_haproxies(installer: Installer, socket: &str) -> Installer {
    installer
        .set("metadata_agent", "serve_metadata_proxy_socket", "true")
        .set("DEFAULT", "metadata_proxy_socket", socket)
        .set("DEFAULT", "metadata_proxy_user", haproxy::USER)
}
