//! cloud-init's own probe finds the metadata service, whether its request or the port's identity
//! comes first.

use metadata_tests::cloud_init::CloudInit;
use metadata_tests::two_tenants::ADDRESS;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Guest, Host, Instance, NovaStandIn};

const IPV6: &str = "http://[fe80::a9fe:a9fe%25eth0]/openstack";
const IPV4: &str = "http://169.254.169.254/openstack";

/// A guest on an attached tap that no source has identified yet.
struct Scene {
    process: AgentProcess,
    agent: Agent,
    guest: Guest,
    _nova: NovaStandIn,
}

fn scene(hold_seconds: &str) -> Scene {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let guest = host.network().guest(ADDRESS);
    nova.add(Instance::from_port(&guest.port));
    let agent = Agent::on(&host, &nova).set("metadata_agent", "identity_hold", hold_seconds).install();
    let process = agent.start();
    process.wait_for_attachments([guest.tap.as_str()]);
    Scene { process, agent, guest, _nova: nova }
}

impl Scene {
    fn report_port(&self) {
        self.agent.set_ports([&self.guest.port]);
    }

    fn wait_known(&self) {
        wait::until("the guest is known", PATIENCE, || {
            (self.process.state()["attachments"][0]["identity"] == "known").then_some(())
        });
    }
}

#[test]
fn a_port_identified_before_boot_is_found_over_ipv6() {
    let scene = scene("5");
    scene.report_port();
    scene.wait_known();
    // The guest's own address must be usable, or IPv4 wins.
    assert_eq!(scene.guest.get_v6("/openstack").status, 200);
    let (url, versions) = CloudInit::prepare().probe(&scene.guest, -1).join().expect("the probe ends");
    assert_eq!(url, IPV6);
    assert!(versions.lines().any(|line| line == "latest"), "{versions}");
}

#[test]
fn a_port_identified_while_requests_are_held_is_found_at_once() {
    let scene = scene("5");
    let probe = CloudInit::prepare().probe(&scene.guest, -1);
    wait::until("both families ask", PATIENCE, || {
        (scene.process.count("metadata_connections_open") == 2).then_some(())
    });
    scene.report_port();
    let (url, versions) = probe.join().expect("the probe ends");
    assert!([IPV4, IPV6].contains(&url.as_str()), "{url}");
    assert!(versions.lines().any(|line| line == "latest"), "{versions}");
}

/// Both families were answered with 503 before the port became known.
#[test]
fn a_port_identified_after_two_refusals_is_found_by_a_retry() {
    let scene = scene("0.1");
    let probe = CloudInit::prepare().probe(&scene.guest, 60);
    wait::until("both families were answered with 503", PATIENCE, || {
        (scene.process.count("metadata_requests_total{code=\"503\"}") >= 2).then_some(())
    });
    scene.report_port();
    let (url, _) = probe.join().expect("the probe ends");
    assert!([IPV4, IPV6].contains(&url.as_str()), "{url}");
}

#[test]
fn without_an_agent_nothing_is_found() {
    let guest = Host::new().network().guest(ADDRESS);
    let (url, _) = CloudInit::prepare().probe(&guest, -1).join().expect("the probe ends");
    assert_eq!(url, "", "no response is expected");
}
