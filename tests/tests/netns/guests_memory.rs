//! Kernel memory that a guest can tie up in the portal.

use std::io::Read as _;
use std::net::{Shutdown, TcpStream};
use std::process::Command;

use metadata_agent::net::portal::SOCKET_MEMORY;
use metadata_agent::proxy::{LARGE_BUFFER_PLACES, LARGE_SEND_BUFFER};
use metadata_tests::agent::Installer;
use metadata_tests::nova::Instance;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Connection, Guest, Host, NovaStandIn};
use socket2::{Domain, Socket, Type};

const USER_DATA: &str = "/openstack/latest/user_data";
const OPEN: &str = "metadata_connections_open";
const OK: &str = "metadata_requests_total{code=\"200\"}";

/// A guest with user data of this size, and its agent.
struct World {
    process: AgentProcess,
    agent: Agent,
    guest: Guest,
    nova: NovaStandIn,
    host: Host,
}

impl World {
    fn new(user_data: usize, configure: impl FnOnce(Installer) -> Installer) -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let guest = host.network().guest([10, 0, 0, 5]);
        let user_data = Some(vec![b'x'; user_data]);
        nova.add(Instance { user_data, ..Instance::from_port(&guest.port) });
        let agent = configure(Agent::on(&host, &nova).port(&guest.port)).install();
        let process = agent.start();
        Self { process, agent, guest, nova, host }
    }

    /// Returns what `ss` prints about the guest's connections in the portal, a line for each.
    fn sockets(&self, options: &str) -> Vec<String> {
        let mut ss = Command::new("ip");
        ss.args(["netns", "exec", self.agent.portal(), "ss", "-HOn", options]);
        let output = ss.output().expect("run ss");
        assert!(output.status.success(), "{ss:?}: {}", String::from_utf8_lossy(&output.stderr));
        let listed = String::from_utf8(output.stdout).expect("text");
        listed.lines().map(str::to_owned).collect()
    }

    /// Returns the limit of the receive buffer of each connection to Nova.
    fn nova_limits(&self) -> Vec<usize> {
        let port = self.nova.address().port().to_string();
        let listed = self.host.netns().run(&["ss", "-HOntm", "dport", "=", &port]);
        listed.lines().map(|line| skmem(line, "rb")).collect()
    }

    /// Returns the bytes of kernel memory in the buffers of each connection.
    fn socket_memory(&self) -> Vec<usize> {
        self.sockets("-tm").iter().map(|line| buffers(line)).collect()
    }
}

/// Returns the memory that the fields r (receive queue) and w (send queue) of `skmem` show.
fn buffers(line: &str) -> usize {
    skmem(line, "r") + skmem(line, "w")
}

fn skmem(line: &str, name: &str) -> usize {
    let (_, skmem) = line.split_once("skmem:(").unwrap_or_else(|| panic!("no skmem in {line}"));
    let mut fields = skmem.split([',', ')']);
    let value = fields.find_map(|field| field.strip_prefix(name)?.parse::<usize>().ok());
    value.unwrap_or_else(|| panic!("no {name} in {line}"))
}

/// On each connection the guest reads long responses, for which buffers may grow. Then it asks for
/// more and stops reading.
#[test]
fn a_guest_that_stops_reading_ties_up_bounded_memory() {
    const MIB: usize = 1 << 20;
    const CONNECTIONS: usize = LARGE_BUFFER_PLACES + 6;
    let world = World::new(MIB, |agent| agent.set("metadata_agent", "requests_per_guest", "128"));
    let request = format!("GET {USER_DATA} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut connection = world.guest.connect();
        for _ in 0..2 {
            let answer = connection.request("GET", USER_DATA, &[], b"").expect("an answer");
            assert_eq!((answer.status, answer.body.len()), (200, MIB));
        }
        connection.send(request.repeat(400)).expect("400 requests");
        held.push(connection);
    }
    // Wait until no buffer grows any more: the requests that are not read yet, and the responses.
    let mut before = Vec::new();
    let memory = wait::until("the guest's connections are blocked", PATIENCE, || {
        let now = world.socket_memory();
        let is_full = now.len() == CONNECTIONS && now.iter().all(|bytes| *bytes > 64 << 10) && now == before;
        before.clone_from(&now);
        is_full.then_some(now)
    });
    let large = memory.iter().filter(|bytes| **bytes > SOCKET_MEMORY);
    // One guest gets two thirds of the places.
    let places = LARGE_BUFFER_PLACES * 2 / 3;
    assert!(large.clone().count() <= places, "{memory:?} exceed {SOCKET_MEMORY}");
    let most = SOCKET_MEMORY + 2 * LARGE_SEND_BUFFER;
    assert!(large.max().is_none_or(|bytes| *bytes <= most), "{memory:?} exceed {most}");
    drop(held);
}

/// Otherwise a guest could hold the larger buffers with idle connections.
#[test]
fn an_idle_connection_gives_its_larger_buffer_back() {
    let world = World::new(1 << 20, |agent| agent);
    let mut connection = world.guest.connect();
    // The limit of the send queue.
    let limit = || skmem(&world.sockets("-tm")[0], "tb");
    let usual = limit();
    wait::until("the connection has a larger buffer", PATIENCE, || {
        let answer = connection.request("GET", USER_DATA, &[], b"").expect("an answer");
        assert_eq!((answer.status, answer.body.len()), (200, 1 << 20));
        (limit() > usual).then_some(())
    });
    // Long before the connection itself is idle for too long.
    wait::until("the buffer is the usual one", PATIENCE / 3, || (limit() == usual).then_some(()));
    assert_eq!(world.process.count(OPEN), 1, "the connection is still open");
}

/// Otherwise a guest could have larger buffers towards Nova on all of its connections.
#[test]
fn larger_buffers_towards_nova_need_a_place_for_each_request() {
    let world = World::new(1 << 20, |agent| agent);
    let mut long = world.guest.connect();
    for _ in 0..2 {
        let answer = long.request("GET", USER_DATA, &[], b"").expect("an answer");
        assert_eq!((answer.status, answer.body.len()), (200, 1 << 20));
    }
    let large = world.nova_limits();
    assert_eq!(large.len(), 1, "the connection is kept");
    let short = world.guest.connect().request("GET", "/openstack", &[], b"").expect("an answer");
    assert_eq!(short.status, 200);
    let usual = world.nova_limits();
    assert!(usual.len() == 1 && usual[0] < large[0], "{usual:?}, before {large:?}");
}

/// Connects with a receive window that holds no whole response, and sends a request.
fn ask_without_reading(guest: &Guest) -> TcpStream {
    let stream = guest.netns().enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a small buffer");
        socket.connect_timeout(&guest.metadata_ipv4().into(), PATIENCE).expect("a connection");
        TcpStream::from(socket)
    });
    stream.set_read_timeout(Some(PATIENCE)).expect("be patient");
    let mut connection = Connection::new(stream.try_clone().expect("another handle"));
    let request = format!("GET {USER_DATA} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n");
    connection.send(request).expect("a request");
    stream.shutdown(Shutdown::Write).expect("no more requests");
    stream
}

/// Otherwise a guest could leave any number of unread responses in the kernel.
#[test]
fn an_unread_response_keeps_its_connection_counted() {
    let world = World::new(64 << 10, |agent| agent);
    let mut stream = ask_without_reading(&world.guest);
    wait::until("the agent has sent everything", PATIENCE, || {
        let is_sent = world.sockets("-ta").iter().any(|line| line.contains("LAST-ACK"));
        (is_sent && world.process.count(OK) == 1).then_some(())
    });
    assert_eq!(world.process.count(OPEN), 1);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("the whole response");
    assert!(answer.len() > 64 << 10, "{}", answer.len());
    wait::until("the connection is closed", PATIENCE, || (world.process.count(OPEN) == 0).then_some(()));
}

#[test]
fn an_unread_response_is_dropped_after_the_write_timeout() {
    let world = World::new(64 << 10, |agent| agent.set("metadata_agent", "guest_write_timeout", "1"));
    let stream = ask_without_reading(&world.guest);
    wait::until("the response is sent", PATIENCE, || (world.process.count(OK) == 1).then_some(()));
    wait::until("nothing is left of it", PATIENCE, || {
        let sockets = world.sockets("-ta");
        let is_gone = !sockets.iter().any(|line| !line.contains("LISTEN"));
        (is_gone && world.process.count(OPEN) == 0).then_some(())
    });
    drop(stream);
}
