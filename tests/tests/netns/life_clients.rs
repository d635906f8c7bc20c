//! The kernel's record of each client: `/state` shows it, and it is removed in time.

use std::collections::BTreeMap;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use metadata_agent::datapath::{AttachMode, Clock, Datapath};
use metadata_agent::ids::IfIndex;
use metadata_ebpf::abi::{AttachmentState, Client, ClientKey, names};
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use metadata_tests::two_tenants::ADDRESS;
use metadata_tests::{Guest, Host, TwoTenants};
use nix::net::if_::if_nametoindex;

const LONG: Duration = Duration::from_hours(1);

fn map(host: &Host, name: &str) -> Map {
    let map = MapData::from_pin(host.bpffs().join("metadata").join(name));
    Map::HashMap(map.unwrap_or_else(|e| unreachable!("open {name}: {e}")))
}

fn clients(host: &Host) -> BTreeMap<[u8; 16], Client> {
    let clients = HashMap::<_, ClientKey, Client>::try_from(map(host, names::CLIENTS)).expect("MD_CLIENTS");
    clients.iter().map(|entry| entry.expect("an entry")).map(|(key, client)| (key.identity, client)).collect()
}

/// Returns the number of clients that counts towards an attachment's quota.
fn counted(host: &Host, attachment: u64) -> u64 {
    let attachments =
        HashMap::<_, u32, AttachmentState>::try_from(map(host, names::ATTACHMENTS)).expect("MD_ATTACH");
    attachments.get(&u32::try_from(attachment).expect("an id"), 0).expect("its state").clients
}

fn identity(attachment: u64) -> [u8; 16] {
    let id = u32::try_from(attachment).ok().and_then(AttachmentId::new).expect("an id");
    ClientAddress::ipv4(id, ADDRESS).identity()
}

#[test]
fn a_client_is_recorded_and_shown() {
    let tenants = TwoTenants::new();
    let process = tenants.agent().install().start();
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
        let key = identity(ids[&guest.tap]);
        let (before, after) = (recorded[&key], now[&key]);
        assert_eq!(after.network, network.id.octets());
        assert_eq!((after.guest_mac, after.metadata_mac), (guest.port.mac.0, network.gateway_mac.0));
        assert_eq!(after.connections, connections);
        assert_eq!(after.first_seen_ns, before.first_seen_ns);
        assert!(began < before.first_seen_ns && before.first_seen_ns <= before.last_seen_ns);
        assert!(after.last_seen_ns >= before.last_seen_ns);
        assert!(connections == 1 || after.last_seen_ns > between, "{after:?}");
        assert_eq!(counted(&tenants.host, ids[&guest.tap]), 1);
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
fn idle_clients_and_clients_of_lost_interfaces_are_removed() {
    let tenants = TwoTenants::new();
    let host = &tenants.host;
    let agent = tenants.agent().install();
    let process = agent.start();
    tenants.assert_served();
    let ids = tenants.guests.each_ref().map(|guest| process.attachments()[&guest.tap]);
    process.kill9();

    // Sweeps as the next agent would, with another idle limit.
    host.netns().enter(|| {
        let pins = host.bpffs().join("metadata");
        let mut datapath = Datapath::open(&pins, AttachMode::Auto).expect("adopt the datapath");
        let index = |guest: &Guest| IfIndex(if_nametoindex(guest.tap.as_str()).expect("its index"));
        for (guest, id) in tenants.guests.iter().zip(ids) {
            let adopted =
                datapath.adopt(index(guest), &guest.tap).expect("look for it").expect("an attachment");
            assert_eq!(u64::from(adopted.get()), id);
        }
        assert!(datapath.is_adopted());
        assert_eq!(datapath.sweep(LONG).expect("sweep"), 0);
        assert_eq!(clients(host).len(), 2);
        assert_eq!(ids.map(|id| counted(host, id)), [1, 1]);

        // One is removed with its interface, however recent it is.
        datapath.detach(index(&tenants.guests[0])).expect("detach");
        assert_eq!(datapath.sweep(LONG).expect("sweep"), 1);
        assert!(clients(host).keys().eq([&identity(ids[1])]));
        assert_eq!(counted(host, ids[1]), 1);

        // The other is removed when it is idle.
        assert_eq!(datapath.sweep(Duration::ZERO).expect("sweep"), 1);
        assert!(clients(host).is_empty());
        assert_eq!(counted(host, ids[1]), 0);
    });
}
