//! Look-ups of remote ports.

use super::*;

fn address(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

/// MAC address of the port.
fn mac(number: u8) -> MacAddress {
    format!("fa:16:3e:00:00:{number:02x}").parse().unwrap()
}

fn on_network(last: u8, mac: impl Into<Option<MacAddress>>) -> LookupQuery {
    LookupQuery {
        scope: NetworkOrRouter::Network(NETWORK),
        target: PortSelector::Ip(address(last), mac.into()),
    }
}

fn behind(router: RouterId, last: u8, mac: impl Into<Option<MacAddress>>) -> LookupQuery {
    LookupQuery {
        scope: NetworkOrRouter::Router(router),
        target: PortSelector::Ip(address(last), mac.into()),
    }
}

impl NeutronHarness {
    async fn find(&self, query: LookupQuery) -> LookupResult {
        self.lookup.find(query).await.unwrap()
    }

    async fn instance(&self, query: LookupQuery) -> InstanceId {
        let LookupResult::Instance(found) = self.find(query).await else { panic!("no instance: {query:?}") };
        found.instance
    }

    fn spawn_find(&self, query: LookupQuery) -> JoinHandle<LookupResult> {
        let lookup = self.lookup.clone();
        tokio::spawn(async move { lookup.find(query).await.unwrap() })
    }

    /// Starts the source and waits for its first request.
    async fn started(set: impl FnOnce(&mut cloud::CloudState)) -> Self {
        let source = Self::start(set).await;
        source.show([]);
        source.until_cloud(|state| state.asked.len() == 1).await;
        source.asked();
        source
    }
}

#[tokio::test]
async fn a_confirmed_result_is_cached_until_an_event() {
    let source = NeutronHarness::started(|state| {
        state.ports = vec![
            guests_port(1),
            guests_port(2),
            row(3, "compute:nova", &instance(3).to_string(), "10.0.0.2"),
        ];
        state.ports.push(row(4, "Octavia", "x", "10.0.0.4"));
    })
    .await;
    for ask in (0..50).map(|_| source.spawn_find(on_network(1, mac(1)))).collect::<Vec<_>>() {
        let LookupResult::Instance(found) = ask.await.unwrap() else { panic!("an instance") };
        assert_eq!((found.instance, found.port, found.network), (instance(1), port(1), NETWORK));
        assert_eq!((found.project.as_str(), &found.fixed_ips[..]), ("project", &[address(1)][..]));
    }
    assert_eq!(source.asked().len(), 1);
    for (last, want) in
        [(2, LookupResult::Ambiguous), (4, LookupResult::NotAnInstance), (9, LookupResult::NotFound)]
    {
        for _ in 0..3 {
            assert_eq!(source.find(on_network(last, None)).await, want);
        }
        assert_eq!(source.asked().len(), 1);
    }
    let elsewhere = NetworkOrRouter::Network(NetworkId::new(Uuid::from_u128(8)));
    assert_eq!(
        source.find(LookupQuery { scope: elsewhere, ..on_network(1, mac(1)) }).await,
        LookupResult::NotFound
    );
    let by_mac = LookupQuery { target: PortSelector::Mac(mac(2)), ..on_network(2, None) };
    assert_eq!(source.instance(by_mac).await, instance(2));
    source.asked();

    source.cloud.set(|state| state.ports[0]["device_id"] = json!(instance(9)));
    assert_eq!(source.instance(on_network(1, mac(1))).await, instance(1));
    source.lookup.forget(port(1)).await;
    assert_eq!(source.instance(on_network(1, mac(1))).await, instance(9));
    assert_eq!(source.asked().len(), 1);
    source.stop().await;
}

#[tokio::test]
async fn an_address_that_moved_to_another_port_is_found_at_once() {
    let source = NeutronHarness::started(|state| state.ports = vec![guests_port(1), guests_port(2)]).await;
    // Without a MAC address, each look-up causes a query. With another port's, nothing is found.
    for query in [Some(mac(1)), None].map(|mac| on_network(1, mac)) {
        assert_eq!(source.instance(query).await, instance(1));
    }
    for stranger in [mac(2), mac(7)] {
        assert_eq!(source.find(on_network(1, stranger)).await, LookupResult::NotFound, "{stranger}");
    }
    source.cloud.set(|state| {
        state.ports[0]["fixed_ips"][0]["ip_address"] = json!("10.0.0.2");
        state.ports[1]["fixed_ips"][0]["ip_address"] = json!("10.0.0.1");
    });
    assert_eq!(source.instance(on_network(1, None)).await, instance(2));
    assert_eq!(source.instance(on_network(2, None)).await, instance(1));
    assert_eq!(source.instance(on_network(2, mac(1))).await, instance(1));
    assert_eq!(source.find(on_network(1, mac(7))).await, LookupResult::NotFound);
    source.stop().await;
}

#[tokio::test]
async fn a_requester_that_arrives_later_gets_a_later_result() {
    let response_permits = Arc::new(Semaphore::new(0));
    let source = NeutronHarness::started(|state| state.ports = vec![guests_port(1)]).await;
    source.cloud.set(|state| state.response_permits = Some(Arc::clone(&response_permits)));
    let early = source.spawn_find(on_network(1, None));
    source.until_cloud(|state| state.asked.len() == 1).await;
    source.cloud.set(|state| state.ports[0]["device_id"] = json!(instance(9)));
    let late = [source.spawn_find(on_network(1, None)), source.spawn_find(on_network(1, None))];
    response_permits.add_permits(12);
    assert!(matches!(early.await.unwrap(), LookupResult::Instance(found) if found.instance == instance(1)));
    for late in late {
        assert!(
            matches!(late.await.unwrap(), LookupResult::Instance(found) if found.instance == instance(9))
        );
    }
    source.stop().await;
}

#[tokio::test]
async fn queries_wait_for_their_turn_and_abandoned_ones_are_dropped() {
    let response_permits = Arc::new(Semaphore::new(0));
    let source = NeutronHarness::started(|state| state.ports = (1..=60).map(guests_port).collect()).await;
    source.cloud.set(|state| state.response_permits = Some(Arc::clone(&response_permits)));
    let mut asks: Vec<_> =
        (1..=60).map(|number| source.spawn_find(on_network(number, mac(number)))).collect();
    source.until_cloud(|state| state.asked.len() == lookup::CONCURRENT).await;
    for leaving in asks.drain(30..) {
        leaving.abort();
        assert!(leaving.await.unwrap_err().is_cancelled());
    }
    response_permits.add_permits(60);
    for (number, ask) in (1..).zip(asks) {
        assert!(
            matches!(ask.await.unwrap(), LookupResult::Instance(found) if found.instance == instance(number))
        );
    }
    // Those that waited shared a request.
    let asked = source.asked();
    assert_eq!(asked.len(), lookup::CONCURRENT + 1, "{asked:?}");
    assert_eq!(asked.last().unwrap().matches("&fixed_ips=").count(), 30 - lookup::CONCURRENT);
    source.stop().await;
}

/// A tenant decides how many subports its trunks and how many pairs its ports have. Neighbours that
/// share a request with them are found all the same.
#[tokio::test]
async fn a_port_with_much_detail_leaves_its_neighbours_alone() {
    let response_permits = Arc::new(Semaphore::new(0));
    let source = NeutronHarness::started(|state| state.ports = (1..=60).map(guests_port).collect()).await;
    let subports: Vec<_> = (0..50_000)
        .map(|number| json!({ "port_id": port(number), "segmentation_id": 7, "segmentation_type": "vlan" }))
        .collect();
    source.cloud.set(|state| {
        state.ports[39]["trunk_details"] = json!({ "trunk_id": "t", "sub_ports": subports });
        state.response_permits = Some(Arc::clone(&response_permits));
    });
    let asks: Vec<_> = (1..=60).map(|number| source.spawn_find(on_network(number, mac(number)))).collect();
    source.until_cloud(|state| state.asked.len() == lookup::CONCURRENT).await;
    response_permits.add_permits(60);
    for (number, ask) in (1..).zip(asks) {
        let found = ask.await.unwrap();
        assert!(matches!(found, LookupResult::Instance(found) if found.instance == instance(number)));
    }
    let asked = source.asked();
    assert!(asked.len() < 60, "some share a request: {asked:?}");
    source.stop().await;
}

/// Each query is answered by its own address, also if others in the request are not found.
#[tokio::test]
async fn look_ups_behind_one_router_share_requests() {
    let router = RouterId::new(Uuid::from_u128(77));
    let response_permits = Arc::new(Semaphore::new(0));
    let source = NeutronHarness::started(|state| {
        state.ports = (1..=60).map(guests_port).collect();
        state.ports.push(row(99, "network:router_interface", &router.to_string(), "10.0.0.254"));
    })
    .await;
    source.cloud.set(|state| state.response_permits = Some(Arc::clone(&response_permits)));
    let other = on_network(1, None).scope;
    let first: Vec<_> =
        (100..).take(lookup::CONCURRENT).map(|last| source.spawn_find(on_network(last, None))).collect();
    source.until_cloud(|state| state.asked.len() == lookup::CONCURRENT).await;
    source.asked();
    // A neighbour's address with a guest's own MAC address, and an address of no port.
    let mut asks = vec![
        (source.spawn_find(behind(router, 2, mac(1))), None),
        (source.spawn_find(behind(router, 90, None)), None),
    ];
    asks.extend((1..=60).map(|number| {
        (source.spawn_find(behind(router, number, mac(number))), Some(instance(number.into())))
    }));
    asks.push((
        source.spawn_find(LookupQuery { scope: other, ..behind(router, 60, mac(60)) }),
        Some(instance(60)),
    ));
    // The queries arrive before the first response.
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
    response_permits.add_permits(200);
    for (ask, want) in asks {
        match (ask.await.unwrap(), want) {
            (LookupResult::Instance(found), Some(want)) => assert_eq!(found.instance, want),
            (found, want) => assert_eq!((found, want), (LookupResult::NotFound, None)),
        }
    }
    for ask in first {
        assert_eq!(ask.await.unwrap(), LookupResult::NotFound);
    }
    // Two batches behind the router, each with the query for its networks, and one on the network.
    let asked = source.asked();
    assert_eq!(asked.len(), 5, "{asked:?}");
    source.stop().await;
}

#[tokio::test]
async fn an_address_behind_a_router_is_searched_in_its_networks() {
    let router = RouterId::new(Uuid::from_u128(77));
    let mut interface_port = row(50, "network:router_interface", &router.to_string(), "10.0.0.254");
    let mut foreign = guests_port(1);
    foreign["id"] = json!(port(60));
    foreign["network_id"] = json!(NetworkId::new(Uuid::from_u128(8)));
    interface_port["binding:host_id"] = json!("");
    let ports = vec![guests_port(1), guests_port(2), foreign, interface_port];
    let source = NeutronHarness::started(|state| state.ports = ports).await;
    assert_eq!(source.instance(behind(router, 1, mac(1))).await, instance(1));
    let asked = source.asked();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked[0].contains("device_owner=network:ha_router_replicated_interface"), "{asked:?}");
    // The router's networks are cached now.
    assert_eq!(source.instance(behind(router, 2, mac(2))).await, instance(2));
    assert_eq!(source.asked().len(), 1);
    let elsewhere = behind(RouterId::new(Uuid::nil()), 1, mac(1));
    assert_eq!(source.find(elsewhere).await, LookupResult::NotFound);
    source.stop().await;
}

#[tokio::test]
async fn an_outdated_network_of_a_router_is_not_used() {
    let router = RouterId::new(Uuid::from_u128(77));
    let new = NetworkId::new(Uuid::from_u128(8));
    let interface_port = row(50, "network:router_interface", &router.to_string(), "10.0.0.254");
    let mut guest = guests_port(2);
    guest["network_id"] = json!(new);
    guest["fixed_ips"][0]["ip_address"] = json!("10.0.0.1");
    let source =
        NeutronHarness::started(|state| state.ports = vec![guests_port(1), guest, interface_port]).await;
    assert_eq!(source.instance(behind(router, 1, mac(1))).await, instance(1));
    source.cloud.set(|state| state.ports[2]["network_id"] = json!(new));
    for mac in [Some(mac(2)), None] {
        assert_eq!(source.instance(behind(router, 1, mac)).await, instance(2), "{mac:?}");
    }
    assert_eq!(source.find(behind(router, 1, mac(7))).await, LookupResult::NotFound);
    source.stop().await;
}
