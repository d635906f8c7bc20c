//! Real guests behind the agent: a virtio device on a tap of kind tun, as Nova plugs it, with and
//! without offloads.

use std::fs;
use std::thread;
use std::time::Duration;

use metadata_agent::ids::{InstanceId, VlanId};
use metadata_ebpf::reason::Reason;
use metadata_tests::nova::signature;
use metadata_tests::vm::{
    self, Answer, CloudReport, CloudVm, Dhcp, Offloads, SmallVm, domain_xml, numbered_lines,
};
use metadata_tests::{
    Agent, Guest, Host, Instance, Mode, NextHop, NovaStandIn, Port, Recorded, Subport, http_server, wait,
};
use serde_json::{Value, json};

/// The address of every guest here.
const GUEST: [u8; 4] = [10, 0, 0, 5];
const META_DATA: &str = "/openstack/latest/meta_data.json";
const USER_DATA: &str = "/openstack/latest/user_data";
const PASSWORD: &str = "/openstack/latest/password";
const MIB: usize = 1 << 20;
/// Longer than the guest's own limit.
const CLOUD_BOOT: Duration = Duration::from_mins(4);

#[test]
fn a_small_guest_moves_a_mebibyte_each_way_with_offloads() {
    transfer(Offloads::On, NextHop::OnLink);
}

#[test]
fn a_small_guest_moves_a_mebibyte_each_way_without_offloads() {
    transfer(Offloads::Off, NextHop::Gateway);
}

fn transfer(offloads: Offloads, next_hop: NextHop) {
    vm::prepare().unwrap();
    let host = Host::new();
    let network = host.network();
    let port = Port::new(network.id, GUEST.into());
    let nova = NovaStandIn::start(host.netns());
    // Differs from what the guest sends, or an echo would pass for a download.
    let document: Vec<u8> = numbered_lines(MIB).into_iter().rev().collect();
    nova.add(Instance { user_data: Some(document.clone()), ..Instance::from_port(&port) });
    let agent = Agent::on(&host, &nova)
        .port(&port)
        .set("metadata_agent", "guest_link_kinds", "tun")
        .set("metadata_agent", "request_body_limit", &MIB.to_string())
        .install();
    let _serving = agent.start();

    let mut guest = SmallVm::boot(&network, &port, offloads, next_hop).unwrap();
    assert_eq!(guest.offloads().unwrap(), offloads);
    assert_eq!(guest.get(USER_DATA).unwrap(), Answer::new(200, &document));
    nova.set_mode(Mode::Fixed(http_server::Answer::text(200, "taken")));
    assert_eq!(guest.post(PASSWORD, MIB).unwrap(), Answer::new(200, b"taken"));

    let requests = nova.requests();
    let lines: Vec<_> = requests.iter().map(|r| (r.method.as_str(), r.path.as_str())).collect();
    assert_eq!(lines, [("GET", USER_DATA), ("POST", PASSWORD)]);
    for request in &requests {
        assert_eq!(identity(request), identity_of(&port));
    }
    assert!(requests[1].body == numbered_lines(MIB), "the body arrived changed");
}

/// The guest's own kernel adds the tags. A request through the subport is from the same instance
/// with the subport's address.
#[test]
fn only_a_known_trunk_subport_is_served_as_its_instance() {
    vm::prepare().unwrap();
    let host = Host::new();
    let network = host.network();
    let subport = Subport::new(VlanId::try_from(5_u64).unwrap(), host.network().id, [10, 5, 0, 7].into());
    let port = Port { subports: vec![subport.clone()], ..Port::new(network.id, GUEST.into()) };
    let nova = NovaStandIn::start(host.netns());
    let document = numbered_lines(MIB);
    nova.add(Instance { user_data: Some(document.clone()), ..Instance::from_port(&port) });
    let agent =
        Agent::on(&host, &nova).port(&port).set("metadata_agent", "guest_link_kinds", "tun").install();
    let process = agent.start();
    let mut guest = SmallVm::boot(&network, &port, Offloads::On, NextHop::OnLink).unwrap();

    let vlan = |id: u16, address: &str| {
        format!(
            "ip link add link eth0 name eth0.{id} type vlan id {id} && ip link set eth0.{id} address {} up && \
             ip address add {address}/24 dev eth0.{id} && ip route replace 169.254.169.254 dev eth0.{id}",
            subport.mac
        )
    };
    guest.run(&vlan(5, "10.5.0.7")).unwrap();
    assert_eq!(guest.get(USER_DATA).unwrap(), Answer::new(200, &document));
    let asked = nova.requests();
    let from_subport = Port { fixed_ips: subport.fixed_ips.clone(), ..port.clone() };
    assert_eq!(identity(asked.last().unwrap()), identity_of(&from_subport));
    let state = process.state();
    let attachments = state["attachments"].as_array().unwrap();
    let attached = attachments.iter().find(|attachment| attachment["vlan"] == 5).unwrap();
    assert_eq!(attached["port"]["id"], subport.id.to_string());
    assert_eq!(attached["clients"][0]["address"], "10.5.0.7");

    // The same guest with a tag of no subport, and then without a tag.
    guest.run("ip link del eth0.5").unwrap();
    guest.run(&vlan(6, "10.5.0.7")).unwrap();
    guest.run("ping -c 1 -W 1 169.254.169.254").unwrap_err();
    assert!(process.packets(Reason::Vlan) > 0);
    guest.run("ip link del eth0.6 && ip route replace 169.254.169.254 dev eth0").unwrap();
    assert_eq!(guest.get(META_DATA).unwrap().status, 200);
    assert_eq!(identity(nova.requests().last().unwrap()), identity_of(&port));

    agent.set_ports([&Port { subports: Vec::new(), ..port.clone() }]);
    wait::until("the subport is detached", wait::PATIENCE, || {
        (process.state()["attachments"].as_array()?.len() == 1).then_some(())
    });
}

#[test]
fn a_small_guest_distinguishes_an_error_from_no_answer() {
    vm::prepare().unwrap();
    let host = Host::new();
    let network = host.network();
    let port = Port::new(network.id, GUEST.into());
    let nova = NovaStandIn::start(host.netns());
    nova.add(Instance::from_port(&port));
    let agent =
        Agent::on(&host, &nova).port(&port).set("metadata_agent", "guest_link_kinds", "tun").install();
    let mut guest = SmallVm::boot(&network, &port, Offloads::On, NextHop::OnLink).unwrap();

    let refused = guest.get(META_DATA).unwrap_err();
    assert!(format!("{refused:#}").contains("No route to host"), "{refused:#}");

    let _serving = agent.start();
    assert_eq!(guest.get("/openstack/latest/nothing").unwrap().status, 404);
    assert_eq!(guest.post(PASSWORD, 65_537).unwrap().status, 413);
}

#[test]
fn cloud_init_configures_a_guest_from_its_own_metadata() {
    vm::prepare().unwrap();
    let host = Host::new();
    let (network, other_network) = (host.network(), host.network());
    let port = Port::new(network.id, GUEST.into());
    let neighbour = other_network.guest(GUEST);
    let nova = NovaStandIn::start(host.netns());
    let effect = format!("written for {}", port.instance);
    let instance = Instance {
        user_data: Some(
            format!("#cloud-config\nruncmd:\n  - echo {effect} >{}\n", CloudVm::EFFECT).into_bytes(),
        ),
        ..Instance::from_port(&port)
    };
    nova.add(instance.clone());
    nova.add(Instance::from_port(&neighbour.port));
    // The static inventory knows one guest, libvirt the other.
    let agent = Agent::on(&host, &nova).port(&neighbour.port).install();
    let domain = agent.libvirt_dir().join("instance-00000001.xml");
    fs::write(&domain, domain_xml(&port)).unwrap();
    let _serving = agent.start();
    // Packets that we pass on would be answered here.
    let legacy = network.legacy();
    let _dhcp = Dhcp::serve(legacy.netns(), &network, &port).unwrap();

    let report = thread::scope(|scope| {
        let vm = scope.spawn(|| CloudVm::start(&network, &port)?.report());
        ask_along(&nova, port.instance, &neighbour, || vm.is_finished());
        vm.join().unwrap()
    })
    .unwrap();

    let requests: Vec<_> =
        nova.requests().into_iter().filter(|request| names(request, port.instance)).collect();
    let paths: Vec<_> = requests.iter().map(|request| request.path.as_str()).collect();
    let CloudReport { status, hostname, instance_id, authorized_keys, user_data_effect, log } = report;
    assert!(status.contains("status: done"), "{status}\n{log}\n{paths:#?}");
    assert!(status.contains("DataSourceOpenStack"), "{status}");
    assert_eq!(hostname, instance.name);
    assert_eq!(instance_id, port.instance.to_string());
    assert_eq!(Some(authorized_keys), instance.key.map(|(_, text)| text));
    assert_eq!(user_data_effect, effect);

    assert!((25..=35).contains(&paths.len()), "{} requests: {paths:#?}", paths.len());
    for path in ["/openstack/2018-08-27/meta_data.json", "/latest/meta-data/public-keys/0/openssh-key"] {
        assert!(paths.contains(&path), "{path} is not among {paths:#?}");
    }
    for request in &requests {
        assert_eq!(request.method, "GET");
        assert_eq!(identity(request), identity_of(&port));
    }
    let strays: Vec<_> = legacy.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(strays, [""; 0], "the guest also reached the legacy path");
}

/// For each of this instance's requests at Nova, the neighbour sends one as well and must get its
/// own metadata.
fn ask_along(nova: &NovaStandIn, instance: InstanceId, neighbour: &Guest, ended: impl Fn() -> bool) {
    let mut seen = nova.subscribe();
    let mut asked = 0;
    wait::until("the guest has powered off", CLOUD_BOOT, || {
        while let Ok(request) = seen.try_recv() {
            if names(&request, instance) {
                let answer: Value = serde_json::from_slice(&neighbour.get(META_DATA).body).unwrap();
                assert_eq!(answer["uuid"], json!(neighbour.port.instance));
                asked += 1;
            }
        }
        ended().then_some(())
    });
    assert!(asked > 0, "the guest sent no request while its neighbour waited");
}

fn names(request: &Recorded, instance: InstanceId) -> bool {
    request.header("x-instance-id") == Some(instance.to_string())
}

/// Returns the headers that identify the client to Nova, sorted by name.
fn identity(request: &Recorded) -> Vec<(String, String)> {
    let mut headers: Vec<_> =
        request.headers.iter().filter(|(name, _)| name.starts_with("x-")).cloned().collect();
    headers.sort();
    headers
}

/// Returns their expected values.
fn identity_of(port: &Port) -> Vec<(String, String)> {
    let instance = port.instance.to_string();
    let signature = signature(metadata_tests::nova::SECRET, &instance);
    let address = port.ipv4().unwrap().to_string();
    let headers = [
        ("x-forwarded-for", address),
        ("x-instance-id", instance),
        ("x-instance-id-signature", signature),
        ("x-tenant-id", port.project.to_string()),
    ];
    headers.map(|(name, value)| (name.to_owned(), value)).into()
}
