//! Haproxies of Neutron that are still running, with the agent in the place of Neutron's metadata
//! agent.

use std::fs::{self, Permissions};
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;

use metadata_tests::agent::Installer;
use metadata_tests::haproxy::{Driver, GROUP, Haproxy, USER};
use metadata_tests::nova::{SECRET, signature};
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Connection, Host, NovaStandIn, Response, ServedTenants, Tenant, TwoTenants, agent};
use nix::sys::signal::Signal;
use nix::unistd::Group;
use tempfile::TempDir;

const OPEN: &str = "metadata_connections_open";

/// Returns the link-local address of a guest's interface.
fn link_local(tenant: &Tenant) -> String {
    tenant.port.mac.link_local().to_string()
}

/// A folder that haproxy, which runs as the user nobody, can enter.
struct Shared(TempDir);

impl Shared {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("neutron-").tempdir().expect("a folder");
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("an open folder");
        Self(folder)
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("metadata_proxy")
    }

    /// Starts an agent that leaves all guests to their haproxies and serves these.
    fn tenants(&self, configure: impl FnOnce(Installer, &Tenant) -> Installer) -> ServedTenants {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        TwoTenants::on(host, nova, |spec| spec).serve(|installer, red, blue| {
            let installer = installer
                .port(&red.port)
                .port(&blue.port)
                .set("metadata_agent", "guest_interfaces", "none*")
                .set("metadata_agent", "serve_metadata_proxy_socket", "true")
                .set("DEFAULT", "metadata_proxy_socket", &self.socket().display().to_string())
                .set("DEFAULT", "metadata_proxy_user", USER);
            configure(installer, red)
        })
    }

    /// Sends a request as haproxy would, with the given headers.
    fn ask(&self, headers: &[(&str, &str)]) -> Response {
        let stream = UnixStream::connect(self.socket()).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("be patient");
        Connection::new(stream).request("GET", HOSTNAME, headers, b"").expect("an answer")
    }

    fn mode(&self) -> u32 {
        fs::metadata(self.socket()).expect("the socket").permissions().mode() & 0o777
    }
}

/// Each network has its own haproxy. The static file does not follow changes of addresses, so an
/// IPv4 address alone identifies nobody. `guests_elsewhere` has both families with Neutron.
#[test]
fn guests_are_distinguished_by_haproxy_and_mac_address() {
    let shared = Shared::new();
    let tenants = shared.tenants(|installer, _| installer);
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let _of_red = Haproxy::start(&red.network, Driver::Dhcp, &shared.socket());
    let _of_blue = Haproxy::start(&blue.network, Driver::Ovn, &shared.socket());
    for tenant in [red, blue] {
        assert_eq!(tenant.get(HOSTNAME).status, 404);
        let over_ipv6 = tenant.get_v6(HOSTNAME);
        assert_eq!((over_ipv6.status, over_ipv6.text()), (200, tenant.hostname().as_str()));
    }
    assert!(process.attachments().is_empty(), "the guests' packets are passed on");
    let received = nova.requests().into_iter().map(|asked| asked.header("x-forwarded-for"));
    let own = [red, blue].map(|tenant| Some(link_local(tenant)));
    assert_eq!(received.collect::<Vec<_>>(), own);
}

#[test]
fn a_guest_behind_haproxy_cannot_impersonate_another() {
    let shared = Shared::new();
    let tenants = shared.tenants(|installer, _| installer);
    let ServedTenants { nova, red, blue, .. } = &tenants;
    let _of_red = Haproxy::start(&red.network, Driver::Dhcp, &shared.socket());
    let _of_blue = Haproxy::start(&blue.network, Driver::Ovn, &shared.socket());

    let victim = blue.port.instance.to_string();
    let (signed, network) = (signature(SECRET, &victim), blue.network.id.to_string());
    let claims = [
        ("X-Forwarded-For", "10.0.0.66"),
        ("x-forwarded-for", "10.0.0.67, 10.0.0.5"),
        ("X-Neutron-Network-ID", &network),
        ("X-Neutron-Router-ID", &network),
        ("X-Metadata-Provider", &network),
        ("X-Metadata-Provider-Signature", &signed),
        ("X-Instance-ID", &victim),
        ("X-Instance-ID-Signature", &signed),
    ];
    let answer = red.connect_v6().request("GET", HOSTNAME, &claims, b"").expect("an answer");
    assert_eq!((answer.status, answer.text()), (200, red.hostname().as_str()));
    let mut received = nova.requests().pop().expect("a request").headers;
    received.sort();
    let own = red.port.instance.to_string();
    let want = [
        ("accept", "*/*"),
        ("host", &nova.address().to_string()),
        ("x-forwarded-for", &link_local(red)),
        ("x-instance-id", &own),
        ("x-instance-id-signature", &signature(SECRET, &own)),
        ("x-tenant-id", &red.port.project.to_string()),
    ];
    assert_eq!(received, want.map(|(name, value)| (name.to_owned(), value.to_owned())));

    // Each driver's haproxy deletes headers that the other's passes on. Such a request identifies
    // no client.
    let own_network = red.network.id.to_string();
    for claim in ["X-Neutron-Network-ID", "X-Neutron-Router-ID", "X-OVN-Network-ID"] {
        let answer =
            blue.connect_v6().request("GET", HOSTNAME, &[(claim, &own_network)], b"").expect("an answer");
        assert_eq!(answer.status, 400, "{claim}");
    }
    let answer = red.connect_v6().request("GET", HOSTNAME, &[("X-OVN-Network-ID", &network)], b"");
    assert_eq!(answer.expect("an answer").status, 400);
    assert_eq!(blue.get_v6(HOSTNAME).text(), blue.hostname());
}

#[test]
fn a_password_in_pieces_arrives_complete() {
    let shared = Shared::new();
    let tenants = shared.tenants(|installer, _| installer);
    let ServedTenants { nova, red, .. } = &tenants;
    let _haproxy = Haproxy::start(&red.network, Driver::Dhcp, &shared.socket());
    let mut connection = red.connect_v6();
    let head =
        "POST /openstack/2013-10-17/password HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 6\r\n\r\n";
    for piece in [head, "sec", "ret"] {
        connection.send(piece).expect("a piece");
    }
    assert_eq!(connection.receive().expect("an answer").status, 200);
    assert_eq!(nova.password(red.port.instance).as_deref(), Some(&b"secret"[..]));
}

#[test]
fn an_unknown_client_gets_404_and_an_ambiguous_one_400() {
    let shared = Shared::new();
    let tenants = shared.tenants(|installer, _| installer);
    let ServedTenants { nova, red, blue, .. } = &tenants;
    let of_red = Haproxy::start(&red.network, Driver::Dhcp, &shared.socket());
    let stranger = red.network.guest([10, 0, 0, 6]);
    assert_eq!(stranger.get(HOSTNAME).status, 404);
    assert_eq!(stranger.get_v6(HOSTNAME).status, 404);
    // No source of this agent knows the networks of a router.
    let _of_blue = Haproxy::start(&blue.network, Driver::Router, &shared.socket());
    assert_eq!(blue.get(HOSTNAME).status, 404);

    let network = red.network.id.to_string();
    let own = link_local(red);
    let from = [("X-Forwarded-For", own.as_str()), ("X-Neutron-Network-ID", &network)];
    assert_eq!(shared.ask(&from).text(), red.hostname());
    assert_eq!(shared.ask(&[&from[..], &[("X-Neutron-Router-ID", &network)]].concat()).status, 400);
    assert_eq!(shared.ask(&from[..1]).status, 400);
    assert_eq!(shared.ask(&from[1..]).status, 400);
    assert_eq!(nova.requests().len(), 1);
    drop(of_red);
}

#[test]
fn the_socket_mode_decides_who_may_connect() {
    for (mode, user, bits, status) in [
        ("user", USER, 0o644, 503),
        ("group", USER, 0o664, 503),
        ("all", "", 0o666, 200),
        ("deduce", "root", 0o644, 503),
        ("deduce", USER, 0o666, 200),
    ] {
        let shared = Shared::new();
        let tenants = shared.tenants(|installer, _| {
            installer.set("DEFAULT", "metadata_proxy_socket_mode", mode).set(
                "DEFAULT",
                "metadata_proxy_user",
                user,
            )
        });
        let ServedTenants { process, red, .. } = &tenants;
        assert_eq!(shared.mode(), bits, "{mode} {user:?}");
        let warned = process.output().contains("every user of this host can use the socket");
        assert_eq!(warned, mode == "all", "{}", process.output());
        let _haproxy = Haproxy::start(&red.network, Driver::Dhcp, &shared.socket());
        assert_eq!(red.get_v6(HOSTNAME).status, status, "{mode} {user:?}");
    }
}

/// The shipped unit grants no CAP_CHOWN, so the agent gives the socket only to a group it is in.
#[test]
fn a_group_of_the_agent_gets_the_socket() {
    for mode in ["group", "deduce"] {
        let shared = Shared::new();
        let script = shared.0.path().join("agent-in-group");
        let binary = agent::binary().display().to_string();
        let text = format!(
            "#!/bin/sh\nexec setpriv --groups {GROUP} --inh-caps=-all \
             --bounding-set=-all,+sys_admin,+net_admin,+net_bind_service,+setuid,+setgid \
             {binary} \"$@\"\n"
        );
        fs::write(&script, text).expect("write a script");
        fs::set_permissions(&script, Permissions::from_mode(0o755)).expect("make it executable");
        let tenants = shared.tenants(|installer, _| {
            let installer = installer.binary(script).set("DEFAULT", "metadata_proxy_group", GROUP);
            installer.set("DEFAULT", "metadata_proxy_socket_mode", mode)
        });
        let red = &tenants.red;
        let group = Group::from_name(GROUP).expect("the groups").expect("the group").gid;
        let socket = fs::metadata(shared.socket()).expect("the socket");
        assert_eq!((shared.mode(), socket.gid()), (0o664, group.as_raw()), "{mode}");
        let _haproxy = Haproxy::start(&red.network, Driver::Dhcp, &shared.socket());
        assert_eq!(red.get_v6(HOSTNAME).text(), red.hostname(), "{mode}");
        assert_eq!(read_as("daemon", &shared, red), None, "{mode}");
    }
}

/// Returns the hostname document that a process of this user reads through the socket.
fn read_as(user: &str, shared: &Shared, guest: &Tenant) -> Option<String> {
    let (address, network) = (link_local(guest), guest.network.id);
    let output = Command::new("setpriv")
        .args(["--reuid", user, "--clear-groups", "curl", "--silent", "--max-time", "5", "--unix-socket"])
        .arg(shared.socket())
        .args(["-H", &format!("X-Forwarded-For: {address}")])
        .args(["-H", &format!("X-Neutron-Network-ID: {network}")])
        .arg(format!("http://localhost{HOSTNAME}"))
        .output()
        .expect("run curl");
    output.status.success().then(|| String::from_utf8(output.stdout).expect("text"))
}

#[test]
fn only_root_and_haproxys_user_can_read_through_the_socket() {
    // Without the option, haproxy runs as the user of Neutron's agents.
    let cases = [("root", &["root"][..]), ("daemon", &["root", "daemon"]), ("", &["root", "neutron"])];
    for (haproxy_user, may_read) in cases {
        let shared = Shared::new();
        let tenants =
            shared.tenants(|installer, _| installer.set("DEFAULT", "metadata_proxy_user", haproxy_user));
        let ServedTenants { process, red, .. } = &tenants;
        for user in ["root", "daemon", "nobody", "neutron"] {
            let want = may_read.contains(&user).then(|| red.hostname());
            assert_eq!(read_as(user, &shared, red), want, "{user} with haproxy as {haproxy_user:?}");
        }
        // For root alone, the mode of the file rejects the others already.
        let rejected = process.count("metadata_rejected_connections_total{reason=\"haproxy_user\"}");
        assert_eq!(rejected, if haproxy_user == "root" { 0 } else { 2 }, "{}", process.output());
    }
}

/// Guests of one network keep the bodies of their requests back, which haproxy forwards as they
/// come.
#[test]
fn slow_posts_behind_one_haproxy_leave_the_others_room() {
    let shared = Shared::new();
    let tenants = shared.tenants(|installer, _| installer.set("metadata_agent", "connections", "64"));
    let ServedTenants { process, red, blue, .. } = &tenants;
    let _of_red = Haproxy::start(&red.network, Driver::Dhcp, &shared.socket());
    let _of_blue = Haproxy::start(&blue.network, Driver::Dhcp, &shared.socket());
    let held: Vec<_> = (0..100)
        .map(|_| {
            let mut connection = red.connect_v6();
            let head = "POST /openstack/2013-10-17/password HTTP/1.1\r\nHost: 169.254.169.254\r\n\
                        Content-Length: 6\r\n\r\n";
            connection.send(head).expect("a head");
            connection
        })
        .collect();
    let refused = || process.count("metadata_rejected_requests_total{reason=\"group_connections\"}");
    wait::until("the network has its share", PATIENCE, || {
        (process.count(OPEN) + refused() >= 100 && refused() > 0).then_some(())
    });
    for _ in 0..20 {
        assert_eq!(blue.get_v6(HOSTNAME).text(), blue.hostname());
    }
    drop(held);
}

/// More silent connections than may wait for a head, as if haproxies had stopped.
#[test]
fn haproxies_without_a_request_leave_the_others_room() {
    let shared = Shared::new();
    let tenants = shared.tenants(|installer, _| {
        installer.set("metadata_agent", "keep_alive_timeout", "600").set(
            "metadata_agent",
            "request_head_timeout",
            "600",
        )
    });
    let ServedTenants { red, .. } = &tenants;
    let _haproxy = Haproxy::start(&red.network, Driver::Dhcp, &shared.socket());
    let silent = [(); 100].map(|()| UnixStream::connect(shared.socket()).expect("a connection"));
    assert_eq!(red.get_v6(HOSTNAME).text(), red.hostname());
    for mut stream in silent {
        stream.set_read_timeout(Some(PATIENCE)).expect("be patient");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    }
}

#[test]
fn a_stale_socket_is_replaced_and_our_own_is_removed() {
    let shared = Shared::new();
    drop(UnixListener::bind(shared.socket()).expect("a stale socket"));
    assert!(fs::metadata(shared.socket()).expect("the file").file_type().is_socket());
    let tenants = shared.tenants(|installer, _| installer);
    let ServedTenants { process, red, .. } = &tenants;
    let network = red.network.id.to_string();
    let own = link_local(red);
    let from = [("X-Forwarded-For", own.as_str()), ("X-Neutron-Network-ID", network.as_str())];
    assert_eq!(shared.ask(&from).text(), red.hostname());
    process.signal(Signal::SIGTERM);
    assert!(process.wait_exit(PATIENCE).success());
    assert!(!shared.socket().exists());
}

#[test]
fn a_running_agent_keeps_its_socket() {
    let shared = Shared::new();
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let agent = metadata_tests::Agent::on(&host, &nova)
        .set("metadata_agent", "serve_metadata_proxy_socket", "true")
        .set("DEFAULT", "metadata_proxy_socket", &shared.socket().display().to_string())
        .install();
    let neutrons = UnixListener::bind(shared.socket()).expect("Neutron's own agent");
    let process = agent.spawn(&[]);
    assert!(!process.wait_exit(PATIENCE).success());
    let log = process.output();
    let clear = format!("another agent answers on {}; stop it first", shared.socket().display());
    assert!(log.contains(&clear), "{log}");
    assert!(shared.socket().exists());
    drop(neutrons);
}

#[test]
fn datapath_and_haproxy_guests_are_served_side_by_side() {
    let shared = Shared::new();
    let tenants =
        shared.tenants(|installer, red| installer.set("metadata_agent", "guest_interfaces", &red.tap));
    let _haproxy = Haproxy::start(&tenants.blue.network, Driver::Dhcp, &shared.socket());
    tenants.process.wait_for_attachments([tenants.red.tap.as_str()]);
    tenants.red.assert_hostname_served();
    assert_eq!(tenants.blue.get_v6(HOSTNAME).text(), tenants.blue.hostname());
}
