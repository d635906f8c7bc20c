//! Real guests on real tap devices against the legacy path: a bridge, and 169.254.169.254 as an address in a
//! namespace of its own, as Neutron's DHCP agent has it.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "helpers of tests print and panic as tests do")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use metadata_agent::ids::MacAddress;
use metadata_tests::vm::scenario::{Transfer, cloud_init_boot, small_vm_transfer};
use metadata_tests::vm::{self, Answer, CloudVm, Lease, Nic, Offloads, Route, numbered_lines};
use nix::sched::{CloneFlags, setns};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PREFIX: u8 = 24;
const GUEST_MAC: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 5]);
const SERVER_MAC: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 2]);
const MIB: usize = 1 << 20;

#[test]
fn a_small_guest_moves_a_mebibyte_each_way_with_offloads() {
    transfer(Offloads::On, Route::OnLink);
}

#[test]
fn a_small_guest_moves_a_mebibyte_each_way_without_offloads() {
    transfer(Offloads::Off, Route::Gateway(SERVER, SERVER_MAC));
}

fn transfer(offloads: Offloads, route: Route) {
    if !able() {
        return;
    }
    let network = Network::new();
    // Not what the guest sends, or an echo would pass for a download.
    let download: Vec<u8> = numbered_lines(MIB).into_iter().rev().collect();
    let server = Server::start(&network, HashMap::from([("/download", download.clone())]));

    let nic = Nic { tap: Network::TAP, mac: GUEST_MAC, offloads };
    let wanted = Transfer { upload: "/upload", upload_length: MIB, download: "/download" };
    let done = small_vm_transfer(&network.host(), &nic, (GUEST, PREFIX), route, &wanted).unwrap();

    assert_eq!(done.offloads, offloads);
    assert_eq!(done.upload, Answer::new(200, b"taken\n"));
    assert_eq!(done.download, Answer::new(200, &download));
    let requests = server.requests();
    let seen: Vec<_> = requests.iter().map(|request| (request.line.as_str(), request.body.len())).collect();
    assert_eq!(seen, [("POST /upload HTTP/1.1", MIB), ("GET /download HTTP/1.1", 0)]);
    assert!(requests[0].body == numbered_lines(MIB), "the body arrived changed");
}

#[test]
fn a_small_guest_tells_an_error_status_from_no_answer() {
    if !able() {
        return;
    }
    let network = Network::new();
    let nic = Nic { tap: Network::TAP, mac: GUEST_MAC, offloads: Offloads::On };
    let mut guest = vm::SmallVm::boot(&network.host(), &nic, (GUEST, PREFIX), Route::OnLink).unwrap();

    let refused = guest.get("/").unwrap_err();
    assert!(format!("{refused:#}").contains("Connection refused"), "{refused:#}");
    let server = Server::start(&network, HashMap::new());
    assert_eq!(guest.get("/nothing").unwrap(), Answer::new(404, b""));
    drop(server);
}

#[test]
fn cloud_init_configures_a_guest_from_the_openstack_tree() {
    if !able() {
        return;
    }
    let network = Network::new();
    let server = Server::start(&network, openstack_tree());
    let nic = Nic { tap: Network::TAP, mac: GUEST_MAC, offloads: Offloads::On };
    let lease =
        Lease { mac: GUEST_MAC, address: GUEST, prefix: PREFIX, gateway: SERVER, metadata_via: SERVER };

    let report =
        cloud_init_boot(&network.host(), &nic, &network.server(), Network::SERVER_DEVICE, &lease).unwrap();

    let requests: Vec<_> = server.requests().into_iter().map(|request| request.line).collect();
    assert!(report.status.contains("status: done"), "{report:?}\n{requests:#?}");
    assert!(report.status.contains("DataSourceOpenStack"), "{report:?}");
    assert_eq!(report.hostname, "forge");
    assert_eq!(report.instance_id, INSTANCE);
    assert_eq!(report.authorized_keys, SSH_KEY);
    assert_eq!(report.user_data_effect, "written by user data");
    for path in ["/openstack/2018-08-27/meta_data.json", "/latest/meta-data/"] {
        assert!(requests.iter().any(|line| *line == format!("GET {path} HTTP/1.1")), "{path}: {requests:#?}");
    }
}

const INSTANCE: &str = "6f1d6a50-7a2d-4a10-9d51-0c6d6ac2f0b7";
const SSH_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f forge";

fn openstack_tree() -> HashMap<&'static str, Vec<u8>> {
    let meta_data = serde_json::json!({
        "uuid": INSTANCE, "name": "forge", "hostname": "forge", "availability_zone": "nova",
        "launch_index": 0, "project_id": "acme", "devices": [], "public_keys": { "forge": SSH_KEY },
    });
    let network_data = serde_json::json!({
        "links": [{ "id": "tap0", "type": "ovs", "mtu": 1500, "ethernet_mac_address": GUEST_MAC }],
        "networks": [{ "id": "network0", "link": "tap0", "type": "ipv4_dhcp" }],
        "services": [],
    });
    let user_data = format!("#cloud-config\nruncmd:\n  - echo written by user data >{}\n", CloudVm::EFFECT);
    HashMap::from([
        ("/openstack", b"2012-08-10\n2018-08-27\nlatest".to_vec()),
        ("/openstack/2018-08-27/meta_data.json", meta_data.to_string().into_bytes()),
        ("/openstack/2018-08-27/network_data.json", network_data.to_string().into_bytes()),
        ("/openstack/2018-08-27/user_data", user_data.into_bytes()),
        ("/openstack/2018-08-27/vendor_data.json", b"{}".to_vec()),
        ("/openstack/2018-08-27/vendor_data2.json", b"{}".to_vec()),
        ("/latest/meta-data/", b"hostname\ninstance-id".to_vec()),
        ("/latest/meta-data/hostname", b"forge".to_vec()),
        ("/latest/meta-data/instance-id", b"i-00000001".to_vec()),
    ])
}

/// Whether this machine can run guests; says so when it cannot, and fails where that is demanded.
fn able() -> bool {
    let missing = vm::missing();
    if !missing.is_empty() {
        assert!(std::env::var_os("REQUIRE_PRIVILEGED").is_none(), "cannot run guests without {missing:?}");
        println!("SKIP cannot run guests without {missing:?}");
        return false;
    }
    vm::prepare().unwrap();
    true
}

/// Two namespaces: the host's with a bridge and a tap on it, and the metadata server's behind a veth.
struct Network {
    host: String,
    server: String,
}

impl Network {
    const TAP: &'static str = "tap0";
    const SERVER_DEVICE: &'static str = "port0";

    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("md-vm-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let network = Self { host: format!("{name}-h"), server: format!("{name}-s") };
        let Self { host, server } = &network;
        for namespace in [host, server] {
            ip(&format!("netns add {namespace}"));
            ip(&format!("-n {namespace} link set lo up"));
        }
        ip(&format!("-n {host} link add bridge0 type bridge"));
        ip(&format!("-n {host} tuntap add {} mode tap", Self::TAP));
        ip(&format!("-n {host} link add veth0 type veth peer name {} netns {server}", Self::SERVER_DEVICE));
        for device in [Self::TAP, "veth0"] {
            ip(&format!("-n {host} link set {device} master bridge0 up"));
        }
        ip(&format!("-n {host} link set bridge0 up"));
        ip(&format!("-n {server} link set {} address {SERVER_MAC} up", Self::SERVER_DEVICE));
        for address in [format!("{SERVER}/{PREFIX}"), "169.254.169.254/32".to_owned()] {
            ip(&format!("-n {server} address add {address} dev {}", Self::SERVER_DEVICE));
        }
        network
    }

    fn host(&self) -> impl Fn(&str) -> Command {
        inside(&self.host)
    }

    fn server(&self) -> impl Fn(&str) -> Command {
        inside(&self.server)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in [&self.host, &self.server] {
            // Fails only when the construction did not come so far, and that has been told.
            let _ = Command::new("ip").args(["netns", "delete", namespace]).status();
        }
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn inside(namespace: &str) -> impl Fn(&str) -> Command {
    let namespace = namespace.to_owned();
    move |program| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespace, program]);
        command
    }
}

/// A request as it came in.
#[derive(Clone)]
struct Request {
    line: String,
    body: Vec<u8>,
}

/// The stand-in for the metadata service: GET answers from a table, POST takes anything.
struct Server {
    listener: Arc<TcpListener>,
    requests: Arc<Mutex<Vec<Request>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(network: &Network, tree: HashMap<&'static str, Vec<u8>>) -> Self {
        let namespace = File::open(format!("/run/netns/{}", network.server)).unwrap();
        let bound = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            TcpListener::bind("169.254.169.254:80").unwrap()
        });
        let listener = Arc::new(bound.join().unwrap());
        let requests = Arc::<Mutex<Vec<Request>>>::default();
        let thread = std::thread::spawn({
            let (listener, requests) = (Arc::clone(&listener), Arc::clone(&requests));
            move || {
                // One at a time: so few bytes never wait long for each other.
                while let Ok((connection, _)) = listener.accept() {
                    // A guest that goes away amid a request is the guest's affair; the test sees what is missing.
                    let _ = serve(&connection, &tree, &requests);
                }
            }
        });
        Self { listener, requests, thread: Some(thread) }
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        socket2::SockRef::from(&*self.listener).shutdown(std::net::Shutdown::Both).unwrap();
        let ended = self.thread.take().unwrap().join();
        assert!(std::thread::panicking() || ended.is_ok(), "the server panicked");
    }
}

fn serve(
    connection: &TcpStream,
    tree: &HashMap<&str, Vec<u8>>,
    requests: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let limit = Some(Duration::from_secs(20));
    connection.set_read_timeout(limit)?;
    connection.set_write_timeout(limit)?;
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let line = line.trim_end().to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        match header.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().unwrap();
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;

    // Before the answer, so that who has the answer finds the request.
    requests.lock().unwrap().push(Request { line: line.clone(), body });

    let (status, answer) = match line.split(' ').collect::<Vec<_>>()[..] {
        ["POST", _, _] => ("200 OK", &b"taken\n"[..]),
        [_, path, _] if tree.contains_key(path) => ("200 OK", &tree[path][..]),
        _ => ("404 Not Found", &b"nothing here\n"[..]),
    };
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", answer.len());
    let mut connection = connection;
    connection.write_all(head.as_bytes())?;
    connection.write_all(answer)
}
