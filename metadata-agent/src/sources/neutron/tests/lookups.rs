//! Who has an address elsewhere.

use super::*;

fn address(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

/// The port's.
fn mac(number: u8) -> MacAddress {
    format!("fa:16:3e:00:00:{number:02x}").parse().unwrap()
}

fn on_network(last: u8, mac: impl Into<Option<MacAddress>>) -> Query {
    Query { scope: NetworkOrRouter::Network(NETWORK), whom: Whom::Address(address(last), mac.into()) }
}

fn behind(router: RouterId, last: u8, mac: impl Into<Option<MacAddress>>) -> Query {
    Query { scope: NetworkOrRouter::Router(router), whom: Whom::Address(address(last), mac.into()) }
}

impl World {
    async fn who(&self, query: Query) -> Answer {
        self.lookup.ask(query).await.unwrap()
    }

    async fn instance(&self, query: Query) -> InstanceId {
        let Answer::Instance(found) = self.who(query).await else { panic!("no instance: {query:?}") };
        found.instance
    }

    fn ask(&self, query: Query) -> JoinHandle<Answer> {
        let lookup = self.lookup.clone();
        tokio::spawn(async move { lookup.ask(query).await.unwrap() })
    }

    /// Past the questions of the start.
    async fn knowing(set: impl FnOnce(&mut cloud::State)) -> Self {
        let world = Self::start(set).await;
        world.until_cloud(|state| state.asked.len() == 1).await;
        world.asked();
        world
    }
}

#[tokio::test]
async fn a_guest_with_its_ports_mac_address_is_looked_up_once_for_all_who_ask_and_again_after_an_event() {
    let world = World::knowing(|state| {
        state.ports = vec![
            guests_port(1),
            guests_port(2),
            row(3, "compute:nova", &instance(3).to_string(), "10.0.0.2"),
        ];
        state.ports.push(row(4, "Octavia", "x", "10.0.0.4"));
    })
    .await;
    for ask in (0..50).map(|_| world.ask(on_network(1, mac(1)))).collect::<Vec<_>>() {
        let Answer::Instance(found) = ask.await.unwrap() else { panic!("an instance") };
        assert_eq!((found.instance, found.port, found.network), (instance(1), port(1), NETWORK));
        assert_eq!((found.project.as_str(), &found.fixed_ips[..]), ("project", &[address(1)][..]));
    }
    assert_eq!(world.asked().len(), 1);
    for (last, want) in [(2, Answer::Ambiguous), (4, Answer::NotAnInstance), (9, Answer::NotFound)] {
        for _ in 0..3 {
            assert_eq!(world.who(on_network(last, None)).await, want);
        }
        assert_eq!(world.asked().len(), 1);
    }
    let elsewhere = NetworkOrRouter::Network(NetworkId::new(Uuid::from_u128(8)));
    assert_eq!(world.who(Query { scope: elsewhere, ..on_network(1, mac(1)) }).await, Answer::NotFound);
    let by_mac = Query { whom: Whom::Mac(mac(2)), ..on_network(2, None) };
    assert_eq!(world.instance(by_mac).await, instance(2));
    world.asked();

    world.cloud.set(|state| state.ports[0]["device_id"] = json!(instance(9)));
    assert_eq!(world.instance(on_network(1, mac(1))).await, instance(1));
    world.lookup.forget(port(1)).await;
    assert_eq!(world.instance(on_network(1, mac(1))).await, instance(9));
    assert_eq!(world.asked().len(), 1);
    world.stop().await;
}

#[tokio::test]
async fn an_address_that_passes_to_another_port_is_the_others_from_its_first_question_on() {
    let world = World::knowing(|state| state.ports = vec![guests_port(1), guests_port(2)]).await;
    // What does not tell of a move between ports asks each time: no MAC address, or one that is no port's.
    let strange = [None, Some(mac(7))];
    for query in [Some(mac(1)), None, Some(mac(7))].map(|mac| on_network(1, mac)) {
        assert_eq!(world.instance(query).await, instance(1));
    }
    world.cloud.set(|state| {
        state.ports[0]["fixed_ips"][0]["ip_address"] = json!("10.0.0.2");
        state.ports[1]["fixed_ips"][0]["ip_address"] = json!("10.0.0.1");
    });
    for mac in strange.into_iter().chain([Some(mac(2))]) {
        assert_eq!(world.instance(on_network(1, mac)).await, instance(2));
        assert_eq!(world.instance(on_network(2, mac)).await, instance(1));
    }
    world.stop().await;
}

#[tokio::test]
async fn who_comes_after_a_question_was_put_has_the_answer_to_a_later_one() {
    let way_back = Arc::new(Semaphore::new(0));
    let world = World::knowing(|state| state.ports = vec![guests_port(1)]).await;
    world.cloud.set(|state| state.way_back = Some(Arc::clone(&way_back)));
    let early = world.ask(on_network(1, None));
    world.until_cloud(|state| state.asked.len() == 1).await;
    world.cloud.set(|state| state.ports[0]["device_id"] = json!(instance(9)));
    let late = [world.ask(on_network(1, None)), world.ask(on_network(1, None))];
    way_back.add_permits(12);
    assert!(matches!(early.await.unwrap(), Answer::Instance(found) if found.instance == instance(1)));
    for late in late {
        assert!(matches!(late.await.unwrap(), Answer::Instance(found) if found.instance == instance(9)));
    }
    world.stop().await;
}

#[tokio::test]
async fn more_guests_than_questions_under_way_wait_their_turn_and_those_who_leave_ask_nothing() {
    let way_back = Arc::new(Semaphore::new(0));
    let world = World::knowing(|state| state.ports = (1..=60).map(guests_port).collect()).await;
    world.cloud.set(|state| state.way_back = Some(Arc::clone(&way_back)));
    let mut asks: Vec<_> = (1..=60).map(|number| world.ask(on_network(number, mac(number)))).collect();
    world.until_cloud(|state| state.asked.len() == lookup::AT_ONCE).await;
    for leaving in asks.drain(30..) {
        leaving.abort();
        assert!(leaving.await.unwrap_err().is_cancelled());
    }
    way_back.add_permits(60);
    for (number, ask) in (1..).zip(asks) {
        assert!(matches!(ask.await.unwrap(), Answer::Instance(found) if found.instance == instance(number)));
    }
    assert_eq!(world.asked().len(), 30);
    world.stop().await;
}

#[tokio::test]
async fn behind_a_router_an_address_is_looked_up_in_its_networks_alone() {
    let router = RouterId::new(Uuid::from_u128(77));
    let mut interface_port = row(50, "network:router_interface", &router.to_string(), "10.0.0.254");
    let mut foreign = guests_port(1);
    foreign["id"] = json!(port(60));
    foreign["network_id"] = json!(NetworkId::new(Uuid::from_u128(8)));
    interface_port["binding:host_id"] = json!("");
    let ports = vec![guests_port(1), guests_port(2), foreign, interface_port];
    let world = World::knowing(|state| state.ports = ports).await;
    assert_eq!(world.instance(behind(router, 1, mac(1))).await, instance(1));
    let asked = world.asked();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked[0].contains("device_owner=network:ha_router_replicated_interface"), "{asked:?}");
    // The router's networks are known by now.
    assert_eq!(world.instance(behind(router, 2, mac(2))).await, instance(2));
    assert_eq!(world.asked().len(), 1);
    let elsewhere = behind(RouterId::new(Uuid::nil()), 1, mac(1));
    assert_eq!(world.who(elsewhere).await, Answer::NotFound);
    world.stop().await;
}

#[tokio::test]
async fn a_network_that_a_router_had_a_while_ago_is_not_where_its_guests_are() {
    let router = RouterId::new(Uuid::from_u128(77));
    let new = NetworkId::new(Uuid::from_u128(8));
    let interface_port = row(50, "network:router_interface", &router.to_string(), "10.0.0.254");
    let mut guest = guests_port(2);
    guest["network_id"] = json!(new);
    guest["fixed_ips"][0]["ip_address"] = json!("10.0.0.1");
    let world = World::knowing(|state| state.ports = vec![guests_port(1), guest, interface_port]).await;
    assert_eq!(world.instance(behind(router, 1, mac(1))).await, instance(1));
    world.cloud.set(|state| state.ports[2]["network_id"] = json!(new));
    for mac in [Some(mac(2)), Some(mac(7)), None] {
        assert_eq!(world.instance(behind(router, 1, mac)).await, instance(2), "{mac:?}");
    }
    world.stop().await;
}
