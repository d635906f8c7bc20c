//! Guests that reach the metadata addresses on their link find the legacy path after the agent,
//! although their neighbour tables have the MAC address of the programs.

use metadata_agent::ids::MacAddress;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_tests::two_tenants::{ADDRESS, assert_served};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, AgentProcess, Host, Instance, Legacy, Network, NextHop, NovaStandIn, Router, TwoTenants, legacy,
};

const METADATA: [&str; 2] = ["169.254.169.254", "fe80::a9fe:a9fe"];

/// Two tenants whose guests reach 169.254.169.254 on their link, as they always do
/// fe80::a9fe:a9fe.
struct OnLink {
    tenants: TwoTenants,
    _legacies: [Legacy; 2],
    agent: Agent,
    process: AgentProcess,
}

impl OnLink {
    fn served_by(attach_mode: &str) -> Self {
        let mut tenants = TwoTenants::new();
        for (guest, network) in tenants.guests.iter_mut().zip(&tenants.networks) {
            let mut spec = network.spec(ADDRESS);
            spec.next_hop = NextHop::OnLink;
            tenants.nova.add(Instance::from_port(&spec.port));
            *guest = network.plug(spec);
        }
        let legacies = tenants.networks.each_ref().map(Network::legacy);
        let agent = tenants.agent().set("metadata_agent", "attach_mode", attach_mode).install();
        let process = agent.start();
        tenants.assert_served();
        for guest in &tenants.guests {
            guest.get_v6("/");
            for address in METADATA {
                let known = guest.neighbour(address);
                assert_eq!(known.as_deref(), Some(&*MacAddress(METADATA_MAC).to_string()), "{address}");
            }
        }
        Self { tenants, _legacies: legacies, agent, process }
    }
}

/// Waits without traffic of the guest, so its own checks of the entry do not help.
fn assert_legacy_path_is_known(tenants: &TwoTenants) {
    for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
        for address in METADATA {
            wait::until("the guest knows the legacy path", PATIENCE, || {
                (guest.neighbour(address)? == network.gateway_mac.to_string()).then_some(())
            });
        }
        let greeting = format!("{}{}", legacy::GREETING, network.id);
        assert_eq!(guest.get("/").text(), greeting);
        assert_eq!(guest.get_v6("/").text(), greeting);
    }
}

#[test]
fn a_stop_leads_guests_on_the_link_to_the_legacy_path() {
    for mode in ["tcx", "clsact"] {
        let OnLink { tenants, process, _legacies, .. } = OnLink::served_by(mode);
        assert_eq!(process.stop().code(), Some(0), "{mode}");
        assert_legacy_path_is_known(&tenants);
    }
}

#[test]
fn detach_leads_guests_on_the_link_to_the_legacy_path() {
    let OnLink { tenants, process, agent, _legacies } = OnLink::served_by("tcx");
    process.kill9();
    agent.detach();
    assert_legacy_path_is_known(&tenants);
}

/// The DHCP server's own interface has the metadata address.
#[test]
fn a_stop_leads_guests_behind_a_dhcp_server_to_it() {
    for mode in ["tcx", "clsact"] {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let network = host.network();
        let mut spec = network.spec(ADDRESS);
        spec.next_hop = NextHop::OnLink;
        nova.add(Instance::from_port(&spec.port));
        let guest = network.plug(spec);
        let server = Router::dhcp(&network);
        let agent = Agent::on(&host, &nova).only_in(server.netns().name()).port(&guest.port);
        let process = agent.set("metadata_agent", "attach_mode", mode).install().start();
        wait::until("its interface is attached", PATIENCE, || {
            process.state()["attachments"].as_array().filter(|all| all.len() == 1).map(|_| ())
        });
        assert_served(&guest);
        let known = || guest.neighbour(METADATA[0]);
        assert_eq!(known(), Some(MacAddress(METADATA_MAC).to_string()), "{mode}");
        assert_eq!(process.stop().code(), Some(0), "{mode}");
        wait::until("the guest knows the DHCP server", PATIENCE, || {
            (known()? == network.gateway_mac.to_string()).then_some(())
        });
    }
}
