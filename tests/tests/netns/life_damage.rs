//! Damage from outside: other software changes what the agent made on the host. The agent repairs
//! and counts it, and is not ready meanwhile. If it cannot repair it, it steps aside.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use metadata_tests::two_tenants::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, AgentProcess, Connection, Guest, Host, HostState, Network, Routed, TwoTenants, legacy,
};

/// Runs a command in the portal.
fn in_portal(host: &Host, agent: &Agent, command: &str) {
    host.netns().run(&["ip", "netns", "exec", agent.portal(), "sh", "-c", command]);
}

/// Does damage, and waits until it is counted, logged and repaired. The guest is served then, and
/// its open connection goes on.
fn assert_repaired(
    process: &AgentProcess,
    guest: &Guest,
    (kind, found): (&str, &str),
    damage: impl FnOnce(),
) {
    let mut open = guest.connect();
    let mut ask = |when: &str| {
        let answer = open.request("GET", "/openstack", &[], b"");
        let answer = answer.unwrap_or_else(|e| panic!("{found}: {when}: {e}\n{}", process.output()));
        assert_eq!(answer.status, 200, "{found}: {when}: {}", answer.text());
    };
    ask("before");
    let series = format!("metadata_damage_total{{kind=\"{kind}\"}}");
    let (count, logged) = (process.metric(&series), process.output().matches(found).count());
    damage();
    wait::poll(PATIENCE, || (process.metric(&series) > count).then_some(()))
        .unwrap_or_else(|| panic!("{found}: not noticed\n{}", process.output()));
    process.wait_ready();
    assert_served(guest);
    ask("after");
    let is_logged = || (process.output().matches(found).count() > logged).then_some(());
    wait::poll(PATIENCE, is_logged).unwrap_or_else(|| panic!("{found}: no log\n{}", process.output()));
}

#[test]
fn changed_links_of_the_portal_are_repaired() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).install();
        let before = HostState::capture(&tenants.host);
        let process = agent.start();
        let [guest, _] = &tenants.guests;
        let elsewhere = format!("link set md-portal netns {}", guest.netns().name());
        for (found, command) in [
            ("md-portal is down", "link set md-portal down"),
            ("the MTU of md-portal is 600", "link set md-portal mtu 600"),
            ("md-portal is gone", "link del md-portal"),
            ("md-portal is gone", "link set md-portal down\nlink set md-portal name lost"),
            ("md-portal is gone", &elsewhere),
            ("md-portal belongs to a bridge", "link add b0 type bridge\nlink set md-portal master b0"),
        ] {
            assert_repaired(&process, guest, ("link", found), || tenants.host.netns().ip(command));
        }
        tenants.host.netns().ip("link del b0");
        for (found, command) in [
            ("md0 is down", "ip link set md0 down"),
            ("md0 has another MAC address", "ip link set md0 address 02:00:00:00:00:99"),
            ("lo is down", "ip link set lo down"),
            ("md-portal is gone", "ip link del md0"),
        ] {
            assert_repaired(&process, guest, ("link", found), || in_portal(&tenants.host, &agent, command));
        }
        tenants.assert_served();
        assert_eq!(process.stop().code(), Some(0), "{mode}");
        before.assert_same(&HostState::capture(&tenants.host));
    }
}

#[test]
fn changed_ipv6_state_of_the_portal_is_repaired() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    let before = HostState::capture(&tenants.host);
    let process = agent.start();
    let [guest, _] = &tenants.guests;
    let local = "ip -6 route del local fd6d::a9fe:a9fe dev lo table local";
    let other_mac = "ip -6 neigh replace fe80::1 lladdr 02:00:00:00:00:01 dev md0 nud permanent";
    for (kind, found, command) in [
        ("address", "fd6d::a9fe:a9fe is gone", "ip -6 address del fd6d::a9fe:a9fe/128 dev lo"),
        ("route", "the local route of fd6d::a9fe:a9fe is gone", local),
        ("route", "route fd64::/14 via fe80::1", "ip -6 route del fd64::/14"),
        ("route", "BlackHole fd64::/16", "ip -6 route add blackhole fd64::/16"),
        ("route", "Prohibit ::/0", "ip -6 route add prohibit ::/0 table local"),
        ("neighbour", "neighbour fe80::1 of md0", other_mac),
        ("neighbour", "neighbour fe80::1 of md0", "ip -6 neigh del fe80::1 dev md0"),
        ("rule", "rule 1 was added", "ip -6 rule add pref 1 prohibit"),
        ("rule", "rule 32766 is gone", "ip -6 rule del pref 32766"),
        (
            "sysctl",
            "net.ipv6/conf/all/disable_ipv6 is 1",
            "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
        ),
        (
            "sysctl",
            "net.ipv6/conf/md0/disable_ipv6 is 1",
            "echo 1 > /proc/sys/net/ipv6/conf/md0/disable_ipv6",
        ),
        ("sysctl", "net.ipv4/tcp_mtu_probing is 0", "echo 0 > /proc/sys/net/ipv4/tcp_mtu_probing"),
    ] {
        assert_repaired(&process, guest, (kind, found), || in_portal(&tenants.host, &agent, command));
    }
    let name = ("namespace", "the portal's namespace has no name");
    let remove_name = || drop(tenants.host.netns().run(&["ip", "netns", "del", agent.portal()]));
    assert_repaired(&process, guest, name, remove_name);
    in_portal(&tenants.host, &agent, "ip link show md0");
    assert_eq!(process.stop().code(), Some(0));
    before.assert_same(&HostState::capture(&tenants.host));
}

/// Makes one attempt with a short limit.
fn try_get(guest: &Guest) -> io::Result<String> {
    let mut connection = guest.dial(guest.metadata_ipv4(), None, Duration::from_millis(300))?;
    Ok(connection.request("GET", "/", &[("Connection", "close")], b"")?.text().to_owned())
}

#[test]
fn the_hosts_own_path_serves_while_a_repair_fails() {
    let tenants = TwoTenants::new();
    let _legacies = tenants.networks.each_ref().map(Network::legacy);
    let agent = tenants.agent().install();
    let process = agent.start();
    tenants.assert_served();
    // Another link has the name of the portal's, but is not it. The agent would be faster.
    process.freeze();
    tenants.host.netns().ip("link add blocker type bridge\n\
         link del md-portal\n\
         link property add dev blocker altname md-portal");
    process.thaw();
    for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
        let served = wait::until("the host's own path serves", PATIENCE, || try_get(guest).ok());
        assert_eq!(served, format!("{}{}", legacy::GREETING, network.id), "{}", process.output());
    }
    let ready = process.admin("/ready");
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains("repair of portal: md-portal is gone\n"), "{}", ready.text());
    assert_eq!(process.admin("/live").status, 200, "a restart would not help");
    assert_eq!(agent.query("status", &["--ready"]).status.code(), Some(1));
    assert!(process.metric("metadata_damage_unrepaired") > 0.0);
    assert_eq!(process.output().matches("cannot repair portal; retrying").count(), 1, "{}", process.output());

    tenants.host.netns().ip("link property del dev blocker altname md-portal");
    process.wait_ready();
    tenants.assert_served();
    assert!(process.metric("metadata_damage_unrepaired") < 1.0);
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn removed_files_of_sockets_are_bound_again() {
    let tenants = TwoTenants::new();
    let socket = tenants.host.folder().join("metadata_proxy");
    let agent = tenants
        .agent()
        .set("metadata_agent", "serve_metadata_proxy_socket", "true")
        .set("DEFAULT", "metadata_proxy_socket", &socket.display().to_string())
        .install();
    let process = agent.start();
    for (number, path) in [&agent.admin_socket(), &socket].into_iter().enumerate() {
        let mode = fs::metadata(path).expect("the socket").mode();
        fs::remove_file(path).expect("remove the socket");
        let answer = wait::until("the socket answers", PATIENCE, || {
            let stream = UnixStream::connect(path).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).ok()?;
            Connection::new(stream).request("GET", "/", &[("Connection", "close")], b"").ok()
        });
        assert!(answer.status >= 400, "{}", answer.text());
        assert_eq!(fs::metadata(path).expect("the socket").mode(), mode, "{}", path.display());
        let count = f64::from(u32::try_from(number + 1).expect("small"));
        let series = "metadata_damage_total{kind=\"socket\"}";
        wait::until("it is counted", PATIENCE, || (process.metric(series) >= count).then_some(()));
    }
    process.wait_ready();
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
    assert!(!agent.admin_socket().exists() && !socket.exists(), "the new files are removed");
}

/// Hides the BPF file system.
fn mount(kind: &str, path: &Path) {
    let status = Command::new("mount").args(["-t", kind, kind]).arg(path).status();
    assert!(status.expect("run mount").success());
}

fn unmount(path: &Path) {
    assert!(Command::new("umount").arg(path).status().expect("run umount").success());
}

#[test]
fn a_hidden_bpf_file_system_is_noticed() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    let before = HostState::capture(&tenants.host);
    let process = agent.start();
    let attachments = process.attachments();
    // A file system that cannot have pins.
    mount("tmpfs", tenants.host.bpffs());
    let waiting = || process.admin("/ready").text().starts_with("repair of pins: ").then_some(());
    wait::until("the agent is not ready", PATIENCE, waiting);
    tenants.assert_served();
    unmount(tenants.host.bpffs());
    process.wait_ready();
    assert!(process.metric("metadata_damage_total{kind=\"pins\"}") > 0.0);

    // One that can: the pins move there, and the next agent finds them.
    mount("bpf", tenants.host.bpffs());
    let link = || agent.pins().join("portal").exists().then_some(());
    wait::until("the pins are there", PATIENCE, link);
    tenants.assert_served();
    process.kill9();
    let process = agent.start();
    assert_eq!(process.attachments(), attachments, "{}", process.output());
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
    unmount(tenants.host.bpffs());
    if agent.pins().exists() {
        fs::remove_dir(agent.pins()).expect("nothing is left in the directory");
    }
    before.assert_same(&HostState::capture(&tenants.host));
}

#[test]
fn changed_uplinks_of_a_namespace_are_repaired() {
    let scene = Routed::new();
    let agent = scene.agent().install();
    let process = agent.start();
    assert_served(&scene.guest);
    let router = scene.router.netns();
    let inode = fs::metadata(format!("/run/netns/{}", router.name())).expect("the namespace").ino();
    let inner = format!("md{inode}");
    let outer = || router.ip("link set md-portal down");
    assert_repaired(&process, &scene.guest, ("link", "md-portal is down"), outer);
    let flush = format!("ip -6 route flush dev {inner} via fe80::1");
    for (kind, found, command) in [
        ("link", format!("{inner} is down"), format!("ip link set {inner} down")),
        ("route", "via fe80::1".to_owned(), flush),
        ("neighbour", format!("of {inner} is gone"), format!("ip -6 neigh del fe80::1 dev {inner}")),
    ] {
        let damage = || in_portal(&scene.host, &agent, &command);
        assert_repaired(&process, &scene.guest, (kind, &found), damage);
    }
    // The uplink is created again, so the open connection ends.
    let count = process.metric("metadata_damage_total{kind=\"link\"}");
    in_portal(&scene.host, &agent, &format!("ip link set {inner} down && ip link set {inner} name lost"));
    wait::until("the damage is found", PATIENCE, || {
        (process.metric("metadata_damage_total{kind=\"link\"}") > count).then_some(())
    });
    wait::until("the guest is served", PATIENCE, || {
        let mut connection = scene.guest.dial(scene.guest.metadata_ipv4(), None, Duration::from_millis(300));
        let answer = connection.as_mut().ok()?.request("GET", "/openstack", &[], b"").ok()?;
        (answer.status == 200).then_some(())
    });
    process.wait_ready();
    assert_served(&scene.guest);
    assert_eq!(process.stop().code(), Some(0));
}
