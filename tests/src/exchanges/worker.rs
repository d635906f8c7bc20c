//! One player of a fuzzer: a guest over one family, a guest behind Neutron's haproxy, or a haproxy.
//!
//! Through Neutron's haproxy, the answers are not known, because haproxy gives some of its own.
//! Directly on the socket, the player is the haproxy. It forwards requests of all guests on the
//! same connection, and adds to each head what haproxy adds. A guest claims to be another one in
//! all lines before.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use tempfile::TempDir;

use super::corpus::{self, Names};
use super::generator::{Claims, Generator, Sender};
use super::oracle::KnownGuest;
use super::player::{Entrance, Player};
use super::{Ending, Exchange, Step, contains};
use crate::agent::Installer;
use crate::guest::Guest;
use crate::haproxy::{self, Driver, Haproxy};
use crate::nova::{SECRET, signature};
use crate::topology::Network;

/// The drivers of the two networks.
const DRIVERS: [Driver; 2] = [Driver::Dhcp, Driver::Ovn];

/// Neutron's haproxies, and the socket that they forward to. Fields are in drop order.
#[derive(Debug)]
pub(super) struct Haproxies {
    _running: Vec<Haproxy>,
    folder: TempDir,
}

impl Haproxies {
    /// Starts a haproxy on each network.
    pub(super) fn new(networks: &[Network; 2]) -> Self {
        let folder = tempfile::Builder::new().prefix("exchanges-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for a socket: {e}"));
        // haproxy runs as another user.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755))
            .unwrap_or_else(|e| panic!("open {}: {e}", folder.path().display()));
        let socket = socket_in(&folder);
        let start = |(network, driver)| Haproxy::start(network, driver, &socket);
        Self { _running: networks.iter().zip(DRIVERS).map(start).collect(), folder }
    }

    /// Has the agent serve the haproxies alone.
    pub(super) fn serve(&self, agent: Installer) -> Installer {
        agent
            .set("metadata_agent", "guest_interfaces", "none*")
            .set("metadata_agent", "serve_metadata_proxy_socket", "true")
            .set("DEFAULT", "metadata_proxy_socket", &socket_in(&self.folder).display().to_string())
            .set("DEFAULT", "metadata_proxy_user", haproxy::USER)
    }

    /// Returns a player in the place of a haproxy. The guest of this number sends the mutated
    /// requests. Two guests in a row are on the same network.
    pub(super) fn worker<'a>(&self, guests: &'a [Guest], known: &[KnownGuest], number: usize) -> Worker<'a> {
        let (guest, neighbour, stranger) = (number, number ^ 1, number ^ 2);
        let order: Vec<usize> = (0..guests.len()).map(|at| at ^ number).collect();
        let senders: Vec<Sender> = order
            .iter()
            .map(|at| Sender { mark: known[*at].mark.clone(), added: added(&guests[*at], *at) })
            .collect();
        let [own, neighbour_port, other] = [guest, neighbour, stranger].map(|at| &guests[at].port);
        let (address, victim) =
            (neighbour_port.mac.link_local().to_string(), neighbour_port.instance.to_string());
        let (network, other_network) = (own.network.to_string(), other.network.to_string());
        let names = Names::from_mark(&known[guest].mark)
            .with("{neighbour-mark}", known[neighbour].mark.as_str())
            .with("{haproxy}", &senders[0].added)
            .with("{neighbour-haproxy}", &added(&guests[neighbour], neighbour))
            .with("{neighbour-instance}", &victim)
            .with("{neighbour-signature}", &signature(SECRET, &victim))
            .with("{neighbour}", &address)
            .with("{network}", &network)
            .with("{other-network}", &other_network);
        let lines = |lines: &[(&str, &str)]| {
            lines.iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>()
        };
        let claims = Claims {
            ignored: lines(&[
                ("X-Forwarded-For", &address),
                ("x-forwarded-for", &format!("{address}, 10.0.0.6")),
                ("X-Real-IP", &address),
                ("X-Instance-ID", &victim),
                ("X-Instance-ID-Signature", &signature(SECRET, &victim)),
                ("X-Metadata-Provider", &other_network),
                ("X-Metadata-Provider-Signature", &signature(SECRET, &other_network)),
                ("Connection", "X-Forwarded-For, X-Neutron-Network-ID, X-OVN-Network-ID"),
            ]),
            refused: lines(&[
                ("X-Neutron-Network-ID", &other_network),
                ("x-neutron-network-id", &network),
                ("X-OVN-Network-ID", &other_network),
                ("X-OVN-Network-ID", ""),
                ("X-Neutron-Router-ID", &other_network),
                ("X-NEUTRON-ROUTER-ID", "x"),
            ]),
        };
        Worker {
            guest: &guests[guest],
            entrance: Entrance::Socket(socket_in(&self.folder)),
            names,
            corpus: corpus::OF_HAPROXIES,
            known: order.iter().map(|at| known[*at].clone()).collect(),
            addresses: order[1..].iter().map(|at| guests[*at].port.mac.link_local().to_string()).collect(),
            senders,
            claims,
            is_before_haproxy: false,
        }
    }
}

fn socket_in(folder: &TempDir) -> PathBuf {
    folder.path().join("metadata_proxy")
}

/// Returns the lines that the haproxy of a guest adds.
fn added(guest: &Guest, number: usize) -> String {
    let name = match DRIVERS[number / 2] {
        Driver::Dhcp => "X-Neutron-Network-ID",
        Driver::Router => "X-Neutron-Router-ID",
        Driver::Ovn => "X-OVN-Network-ID",
    };
    let (network, address) = (guest.port.network, guest.port.mac.link_local());
    format!("{name}: {network}\r\nX-Forwarded-For: {address}\r\n")
}

/// A player and its exchanges.
pub(super) struct Worker<'a> {
    pub(super) guest: &'a Guest,
    pub(super) entrance: Entrance,
    /// Names in the corpus.
    pub(super) names: Names,
    /// The file with the corpus.
    corpus: &'static str,
    /// All guests, its own first.
    known: Vec<KnownGuest>,
    /// The addresses of other guests for which requests on this connection would count.
    addresses: Vec<String>,
    /// The guests that send requests on this connection, its own first.
    senders: Vec<Sender>,
    claims: Claims,
    is_before_haproxy: bool,
}

impl<'a> Worker<'a> {
    /// Returns the player of the guest with this number, over one family.
    pub(super) fn on_tap(guest: &'a Guest, target: SocketAddr, known: &[KnownGuest], number: usize) -> Self {
        let known: Vec<_> = (0..known.len()).map(|at| known[at ^ number].clone()).collect();
        let mark = &known[0].mark;
        Self {
            guest,
            entrance: Entrance::Address(target),
            names: Names::from_mark(mark),
            corpus: corpus::OF_GUESTS,
            addresses: Vec::new(),
            senders: vec![Sender { mark: mark.clone(), added: String::new() }],
            claims: Claims::default(),
            known,
            is_before_haproxy: false,
        }
    }

    /// Returns the player of a guest behind a haproxy. Without Neutron, its IPv4 address does not
    /// identify it.
    pub(super) fn through_haproxy(guest: &'a Guest, known: &[KnownGuest], number: usize) -> Self {
        let worker = Self::on_tap(guest, guest.metadata_ipv6(), known, number);
        Self { is_before_haproxy: true, ..worker }
    }

    /// Returns the exchanges of the corpus, with their titles.
    pub(super) fn corpus(&self) -> Vec<(String, Exchange)> {
        let all = corpus::read(self.corpus, &self.names).into_iter();
        all.filter_map(|(title, exchange)| Some((title, self.prepare(exchange)?))).collect()
    }

    /// Returns the exchanges of the corpus that may be mutated.
    pub(super) fn bases(&self) -> Vec<Exchange> {
        let all = self.corpus().into_iter().map(|(_, exchange)| exchange);
        all.filter(|exchange| !self.names_another_guest(exchange)).collect()
    }

    pub(super) fn generator<'b>(&'b self, seed: u64, bases: &'b [Exchange]) -> Generator<'b> {
        Generator::new(seed, &self.senders, &self.claims, bases)
    }

    /// Returns an exchange as it can be judged, or `None` if it cannot.
    pub(super) fn prepare(&self, exchange: Exchange) -> Option<Exchange> {
        if self.is_before_haproxy {
            let ending = match exchange.ending {
                // haproxy's time-outs are longer than a player waits.
                Ending::Wait => Ending::Finish,
                ending @ (Ending::Finish | Ending::Abandon | Ending::Reset) => ending,
            };
            return Some(Exchange { ending, expected: None, ..exchange });
        }
        // A mutation may have made another guest's address the last one, which counts.
        let is_clear = exchange.expected.is_some() || !self.names_another_guest(&exchange);
        is_clear.then_some(exchange)
    }

    /// Returns the player for an exchange. If its answers are known, all senders may take part.
    pub(super) fn player(&self, exchange: &Exchange) -> Player<'_> {
        let count = if exchange.expected.is_some() { self.senders.len() } else { 1 };
        let (clients, others) = self.known.split_at(count);
        let is_before_haproxy = self.is_before_haproxy;
        Player { entrance: &self.entrance, clients, others, is_before_haproxy }
    }

    fn names_another_guest(&self, exchange: &Exchange) -> bool {
        let marks = self.known[1..].iter().map(|guest| guest.mark.as_str());
        let mut texts = marks.chain(self.addresses.iter().map(String::as_str));
        texts.any(|text| {
            exchange.steps.iter().any(|step| matches!(step, Step::Send(bytes) if contains(bytes, text)))
        })
    }
}
