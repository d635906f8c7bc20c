//! The kernel's statistics about each client, which `/state` shows, and the end of an interface.

use std::collections::BTreeMap;

use aya::maps::xdp::DevMapHash;
use aya::maps::{HashMap, Map, MapData};
use metadata_agent::datapath::Clock;
use metadata_ebpf::abi::{AttachmentState, Client, ClientKey, Refusals, names};
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use metadata_tests::two_tenants::ADDRESS;
use metadata_tests::{AgentProcess, Guest, Host, TwoTenants};

fn pinned(host: &Host, name: &str) -> MapData {
    let map = MapData::from_pin(host.bpffs().join("metadata").join(name));
    map.unwrap_or_else(|e| unreachable!("open {name}: {e}"))
}

fn clients(host: &Host) -> BTreeMap<[u8; 16], Client> {
    let map = Map::LruHashMap(pinned(host, names::CLIENTS));
    let clients = HashMap::<_, ClientKey, Client>::try_from(map).expect("MD_CLIENTS");
    clients.iter().map(|entry| entry.expect("an entry")).map(|(key, client)| (key.identity, client)).collect()
}

/// Returns the attachments that have a state and a record of refused packets, and those that have
/// an interface.
fn attachments(host: &Host) -> (Vec<u32>, Vec<u32>) {
    let map = Map::HashMap(pinned(host, names::ATTACHMENTS));
    let states = HashMap::<_, u32, AttachmentState>::try_from(map).expect("MD_ATTACH");
    let devices = DevMapHash::try_from(Map::DevMapHash(pinned(host, names::DEVICES))).expect("MD_DEVICES");
    let mut ids = (states.keys().flatten().collect::<Vec<_>>(), devices.keys().flatten().collect::<Vec<_>>());
    ids.0.sort_unstable();
    ids.1.sort_unstable();
    let refusals = HashMap::<_, u32, Refusals>::try_from(Map::HashMap(pinned(host, names::REFUSALS)));
    let mut refusals: Vec<_> = refusals.expect("MD_REFUSALS").keys().flatten().collect();
    refusals.sort_unstable();
    assert_eq!(refusals, ids.0);
    ids
}

fn identity(attachment: u64, guest: &Guest) -> [u8; 16] {
    let id = u32::try_from(attachment).ok().and_then(AttachmentId::new).expect("an id");
    ClientAddress::from_ipv4(id, ADDRESS, guest.port.mac.0).identity()
}

#[test]
fn a_client_is_recorded_and_shown() {
    let tenants = TwoTenants::new();
    let process = tenants.agent().without_probes().install().start();
    let began = Clock::now_ns();
    tenants.assert_served();
    let ids = process.attachments();
    let recorded = clients(&tenants.host);
    assert_eq!(recorded.len(), 2, "two guests with one address are two clients");
    // Two more connections for one of them.
    let [first, second] = &tenants.guests;
    let between = Clock::now_ns();
    for _ in 0..2 {
        metadata_tests::two_tenants::assert_served(first);
    }
    let now = clients(&tenants.host);
    for (guest, network, connections) in [(first, &tenants.networks[0], 3), (second, &tenants.networks[1], 1)]
    {
        let key = identity(ids[&guest.tap], guest);
        let (before, after) = (recorded[&key], now[&key]);
        assert_eq!(after.network, network.id.octets());
        assert_eq!((after.guest_mac, after.metadata_mac), (guest.port.mac.0, network.gateway_mac.0));
        assert_eq!(after.connections, connections);
        assert_eq!(after.first_seen_ns, before.first_seen_ns);
        assert!(began < before.first_seen_ns && before.first_seen_ns <= before.last_seen_ns);
        assert!(after.last_seen_ns >= before.last_seen_ns);
        assert!(connections == 1 || after.last_seen_ns > between, "{after:?}");
    }

    let state = process.state();
    for (guest, network, connections) in [(first, &tenants.networks[0], 3), (second, &tenants.networks[1], 1)]
    {
        let attachments = state["attachments"].as_array().expect("attachments");
        let shown = attachments.iter().find(|shown| shown["interface"] == *guest.tap).expect("the guest's");
        assert_eq!(shown["port"]["network"], network.id.to_string());
        assert_eq!(shown["clients"].as_array().expect("clients").len(), 1);
        let client = &shown["clients"][0];
        assert_eq!(client["address"], "10.0.0.5");
        assert_eq!(client["mac"], guest.port.mac.to_string());
        assert_eq!(client["metadata_mac"], network.gateway_mac.to_string());
        assert_eq!(client["connections"], connections);
        let seconds = |key: &str| client[key].as_f64().expect("seconds");
        assert!(seconds("last_seen_seconds_ago") <= seconds("first_seen_seconds_ago"), "{client}");
        assert!(seconds("first_seen_seconds_ago") < 60.0, "{client}");
    }
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn nothing_is_left_of_a_gone_interface_or_an_earlier_agent() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().without_probes().install();
    let process = agent.start();
    let ids = |process: &AgentProcess| {
        process.attachments().into_values().map(|id| u32::try_from(id).expect("an id")).collect::<Vec<_>>()
    };
    let sorted = |mut ids: Vec<u32>| {
        ids.sort_unstable();
        (ids.clone(), ids)
    };
    assert_eq!(attachments(&tenants.host), sorted(ids(&process)));

    // Adopted, with the same ids.
    let before = ids(&process);
    process.kill9();
    let process = agent.start();
    assert_eq!(ids(&process), before);
    assert_eq!(attachments(&tenants.host), sorted(before));

    // The kernel removes the interface by itself, and the agent the rest.
    let TwoTenants { guests: [first, second], nova: _nova, networks: _networks, host } = tenants;
    drop(first);
    process.wait_for_attachments([second.tap.as_str()]);
    assert_eq!(attachments(&host), sorted(ids(&process)));
    assert_eq!(process.stop().code(), Some(0));
}
