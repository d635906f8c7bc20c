//! One case: the fields that a thief chooses, and what it receives.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use fastrand::Rng;
use metadata_agent::ids::MacAddress;
use metadata_tests::nova::{SECRET, signature};
use metadata_tests::raw_tcp::{Claim, RawStream};
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::{Connection, Guest, Instance};

use super::cloud::{Cloud, Mode, Thief};

/// Time for a handshake. Forged packets get no answer.
const HANDSHAKE: Duration = Duration::from_millis(300);
/// Time for each read.
const ANSWER: Duration = Duration::from_secs(4);
/// A MAC address that no guest has.
const NOBODY: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0xba, 0xdb, 0xad]);
/// An interface identifier that is not derived from a MAC address.
const PRIVACY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x9c1f, 0x55aa, 0x7d2, 0x4e31);
/// The source port of the first case. Victims use ports of this range too.
const FIRST_PORT: usize = 30_000;
const PASSWORD: &str = "/openstack/2013-10-17/password";

/// How the requests of a case share their connection.
#[derive(Clone, Copy, Debug)]
enum Exchange {
    /// All at once.
    Pipelined,
    /// Each after the response to the one before.
    Reused,
    /// The bytes are sent in two pieces.
    InPieces,
}

/// How a request ends.
#[derive(Clone, Copy, Debug)]
enum Body {
    None,
    Counted,
    Chunked,
    /// The trailer claims to be the victim.
    Trailer,
    /// The length covers only a part. The rest is a request in the victim's name.
    Short,
    /// Both framings at once.
    Ambiguous,
    /// A body where none belongs.
    OnGet,
}

/// The fields that a thief chooses.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) thief: usize,
    pub(super) claim: Claim,
    exchange: Exchange,
    requests: Vec<(Body, String)>,
}

/// The result of one case, as the thief sees it.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// A text of another guest's metadata.
    pub(super) foreign: Option<String>,
    /// Its own metadata arrived.
    pub(super) is_served: bool,
    /// The first line of the first response, or the reason why there is none.
    pub(super) first_line: String,
}

impl Case {
    /// Generates a case from its number.
    pub(super) fn generate(number: usize, cloud: &Cloud) -> Self {
        let rng = &mut Rng::with_seed(number as u64);
        let thief = number % cloud.thieves.len();
        let (own, victim) = (&cloud.thieves[thief], &cloud.victims[rng.usize(..cloud.victims.len())]);
        let claim = loop {
            let claim = claim(rng, &own.guest, victim, number);
            if !is_beyond_detection(cloud, own, claim) {
                break claim;
            }
        };
        let exchange = pick(rng, &[Exchange::Pipelined, Exchange::Reused, Exchange::InPieces]);
        let count = rng.usize(1..=3);
        let requests = (1..=count).map(|one| request(rng, &own.guest, victim, one == count)).collect();
        Self { thief, claim, exchange, requests }
    }

    /// Sends the requests and reads all that comes back.
    pub(super) fn run(&self, cloud: &Cloud) -> Outcome {
        let Thief { guest, gateway, .. } = &cloud.thieves[self.thief];
        let stream = RawStream::connect(guest.netns(), "eth0", self.claim, *gateway, HANDSHAKE);
        let mut stream = match stream {
            Ok(stream) => stream,
            Err(error) => return Outcome { first_line: error.to_string(), ..Outcome::default() },
        };
        stream.set_patience(ANSWER);
        let mut connection = Connection::new(stream);
        // A refusal may end the connection at any point.
        drop(self.exchange(&mut connection));
        let received = String::from_utf8_lossy(connection.stream().received()).into_owned();
        let foreign = cloud.secrets_of_others(self.thief).find(|secret| received.contains(secret));
        let instance = Instance::from_port(&guest.port);
        let first_line = received.lines().next().unwrap_or("no response").to_owned();
        Outcome { foreign, is_served: received.contains(&instance.name), first_line }
    }

    fn exchange(&self, connection: &mut Connection<RawStream>) -> io::Result<()> {
        match self.exchange {
            Exchange::Pipelined => connection.send(self.text())?,
            Exchange::Reused => {
                for (_, request) in &self.requests {
                    connection.send(request)?;
                    connection.receive()?;
                }
            }
            Exchange::InPieces => {
                let text = self.text();
                let (one, other) = text.split_at(text.len() / 2);
                connection.send(one)?;
                connection.send(other)?;
            }
        }
        connection.receive_rest().map(drop)
    }

    fn text(&self) -> String {
        self.requests.iter().map(|(_, request)| request.as_str()).collect()
    }
}

/// Returns true for the one lie that a shared link cannot show: all that identifies a guest there
/// is a neighbour's. Behind a haproxy that is the address, else MAC address and address. Only the
/// port security of the network prevents it, which the rig does not have.
fn is_beyond_detection(cloud: &Cloud, thief: &Thief, claim: Claim) -> bool {
    let is_neighbour = |guest: &&Guest| guest.port.network == thief.guest.port.network;
    let has_all = |guest: &Guest| {
        let has_address =
            guest.port.fixed_ips.contains(&claim.address) || claim.address == guest.port.mac.link_local();
        has_address && (cloud.mode == Mode::Haproxies || guest.port.mac == claim.mac)
    };
    thief.is_shared && cloud.victims.iter().filter(is_neighbour).any(has_all)
}

fn claim(rng: &mut Rng, own: &Guest, victim: &Guest, number: usize) -> Claim {
    let ipv4 = |guest: &Guest| IpAddr::from(guest.port.ipv4().expect("an IPv4 address"));
    let [a, b, c, _] = own.port.ipv4().expect("an IPv4 address").octets();
    let (own_mac, own_link_local) = (own.port.mac, own.port.mac.link_local().into());
    let addresses = [
        ipv4(own),
        ipv4(own),
        ipv4(own),
        own_link_local,
        own_link_local,
        own_link_local,
        ipv4(victim),
        victim.port.mac.link_local().into(),
        Ipv4Addr::new(a, b, c, 77).into(),
        PRIVACY.into(),
    ];
    let tag = if rng.u8(..) < 16 { Some(pick(rng, &[7, 4094, 0xa000])) } else { None };
    Claim {
        mac: pick(
            rng,
            &[own_mac, own_mac, own_mac, own_mac, own_mac, victim.port.mac, victim.port.mac, NOBODY],
        ),
        address: pick(rng, &addresses),
        port: u16::try_from(FIRST_PORT + number).expect("a port"),
        tag,
        options: if rng.u8(..) < 16 { &[1, 1, 1, 0] } else { &[] },
    }
}

/// Writes a request whose every part may name the victim. Its query names the sender.
fn request(rng: &mut Rng, own: &Guest, victim: &Guest, is_last: bool) -> (Body, String) {
    let body = pick(
        rng,
        &[
            Body::None,
            Body::None,
            Body::None,
            Body::None,
            Body::None,
            Body::Counted,
            Body::Chunked,
            Body::Trailer,
            Body::Short,
            Body::Ambiguous,
            Body::OnGet,
        ],
    );
    let address = victim.port.ipv4().expect("an IPv4 address");
    let origin =
        pick(rng, &["", "", "", "http://169.254.169.254", "http://[fe80::a9fe:a9fe]", "http://nova"]);
    let host = pick(
        rng,
        &[
            "169.254.169.254".to_owned(),
            "[fe80::a9fe:a9fe]".to_owned(),
            address.to_string(),
            "nova:8775".to_owned(),
        ],
    );
    let (method, path) = match body {
        Body::None | Body::OnGet => {
            ("GET", pick(rng, &[HOSTNAME, "/openstack/latest/meta_data.json", "/latest/user-data", PASSWORD]))
        }
        Body::Counted | Body::Chunked | Body::Trailer | Body::Short | Body::Ambiguous => ("POST", PASSWORD),
    };
    let sender = own.port.instance;
    let mut text = format!("{method} {origin}{path}?by={sender} HTTP/1.1\r\nHost: {host}\r\n");
    for (name, value) in claims_of(victim) {
        if rng.u8(..) < 40 {
            let name = if rng.bool() { name.to_lowercase() } else { name.to_owned() };
            text.extend([&name, ": ", &value, "\r\n"]);
        }
    }
    if is_last {
        text.push_str("Connection: close\r\n");
    }
    let smuggled = format!(
        "GET {HOSTNAME}?by={sender} HTTP/1.1\r\nHost: x\r\nX-Instance-ID: {}\r\n\r\n",
        victim.port.instance
    );
    let length = smuggled.len();
    let end = match body {
        Body::None => "\r\n".to_owned(),
        Body::Counted | Body::OnGet => format!("Content-Length: {length}\r\n\r\n{smuggled}"),
        Body::Chunked => format!("Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n{smuggled}\r\n0\r\n\r\n"),
        Body::Trailer => format!(
            "Transfer-Encoding: chunked\r\nTrailer: X-Instance-ID\r\n\r\n1\r\np\r\n0\r\nX-Instance-ID: {}\r\n\r\n",
            victim.port.instance
        ),
        Body::Short => format!("Content-Length: 1\r\n\r\np{smuggled}"),
        Body::Ambiguous => {
            format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}")
        }
    };
    text.push_str(&end);
    (body, text)
}

/// Returns headers with which a thief could pass for the victim if it knew everything, even the
/// secret.
fn claims_of(victim: &Guest) -> [(&'static str, String); 12] {
    let (instance, network) = (victim.port.instance.to_string(), victim.port.network.to_string());
    let address = victim.port.ipv4().expect("an IPv4 address").to_string();
    [
        ("X-Instance-ID-Signature", signature(SECRET, &instance)),
        ("X-Instance-ID", instance),
        ("X-Tenant-ID", victim.port.project.to_string()),
        ("X-Forwarded-For", address.clone()),
        ("X-Real-IP", address.clone()),
        ("Forwarded", format!("for={address}")),
        ("X-Metadata-Provider-Signature", signature(SECRET, &network)),
        ("X-Metadata-Provider", network.clone()),
        ("X-Neutron-Network-ID", network.clone()),
        ("X-Neutron-Router-ID", network.clone()),
        ("X-OVN-Network-ID", network),
        ("Connection", "X-Instance-ID, X-Forwarded-For".to_owned()),
    ]
}

fn pick<T: Clone>(rng: &mut Rng, values: &[T]) -> T {
    values[rng.usize(..values.len())].clone()
}
