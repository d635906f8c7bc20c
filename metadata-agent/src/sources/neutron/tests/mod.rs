//! The source and its look-ups against scripted servers. Scenario tests use the real ones.

mod certificates;
mod cloud;
mod lookups;

use std::net::IpAddr;
use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use uuid::Uuid;

use super::*;
use crate::ids::{IfIndex, InstanceId, MacAddress, NetworkId, NetworkOrRouter, PortId, RouterId};
use crate::inventory::presence::{Need, Present};
use crate::inventory::{DeviceName, SourceKind, SourcePolicy};
use crate::sources::SourceState;
use cloud::Cloud;

const PATIENCE: Duration = Duration::from_mins(1);
const HOST: &str = "hypervisor-1";
const NETWORK: NetworkId = NetworkId::new(Uuid::from_u128(7));

/// The source under test, its servers and its output.
struct NeutronHarness {
    cloud: Cloud,
    presence: watch::Sender<Presence>,
    refused: broadcast::Sender<RefusedSource>,
    events: mpsc::Receiver<Event>,
    state: watch::Receiver<SourceState>,
    lookup: Lookup,
    cancel: CancellationToken,
    source: JoinHandle<()>,
    tasks: TaskTracker,
}

fn port(number: u128) -> PortId {
    PortId::new(Uuid::from_u128(number << 88 | number))
}

fn instance(number: u128) -> InstanceId {
    InstanceId::new(Uuid::from_u128(number))
}

fn guests_port(number: u8) -> Value {
    row(number.into(), "compute:nova", &instance(number.into()).to_string(), &format!("10.0.0.{number}"))
}

fn row(number: u128, owner: &str, device: &str, address: &str) -> Value {
    json!({
        "id": port(number), "device_owner": owner, "device_id": device, "project_id": "project",
        "network_id": NETWORK, "mac_address": format!("fa:16:3e:00:00:{number:02x}"),
        "fixed_ips": [{ "subnet_id": "s", "ip_address": address }], "binding:host_id": HOST,
    })
}

/// Interface of a guest, of which only name and MAC address are known.
fn interface(number: u8) -> Present {
    Present {
        device: DeviceName::from_port_id(&port(number.into())),
        index: IfIndex(number.into()),
        mac: Some(format!("fe:16:3e:00:00:{number:02x}").parse().unwrap()),
        port: None,
        need: Need::Identity,
    }
}

impl NeutronHarness {
    async fn start(set: impl FnOnce(&mut cloud::CloudState)) -> Self {
        let cloud = Cloud::start().await;
        cloud.set(set);
        let access = cloud.access();
        Self::with_access(cloud, access)
    }

    fn with_access(cloud: Cloud, access: NeutronAccess) -> Self {
        let (presence, present) = watch::channel(Presence::default());
        let (sender, events) = mpsc::channel(512);
        let (reporter, state) = Reporter::new(SourceKind::Neutron);
        let (lookup, requests) = Lookup::new();
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let settings = NeutronSettings { access, host: HOST.to_owned(), tasks: tasks.clone() };
        let refused = crate::inventory::refused::channel();
        let channels = NeutronChannels {
            present,
            refused: refused.subscribe(),
            events: sender,
            reporter,
            requests,
            lookup: lookup.clone(),
        };
        let source = tokio::spawn(run(settings, channels, cancel.clone()));
        Self { cloud, presence, refused, events, state, lookup, cancel, source, tasks }
    }

    fn show(&self, interfaces: impl IntoIterator<Item = Present>) {
        self.presence.send_replace(interfaces.into_iter().collect());
    }

    /// Returns the port and the instance of the next event.
    async fn next(&mut self) -> (String, Option<InstanceId>) {
        let event = timeout(PATIENCE, self.events.recv()).await.expect("no event came").unwrap();
        let tenant = event.ports.first().and_then(|record| record.tenant.as_ref());
        (event.key, tenant.map(|tenant| tenant.instance))
    }

    /// Reports a source that the kernel refused to the guest of this interface.
    fn refuse(&self, interface: &Present) {
        let refused = RefusedSource {
            device: interface.device.clone(),
            index: interface.index,
            vlan: None,
            port: interface.port,
            mac: "fa:16:3e:00:00:99".parse().unwrap(),
            address: [10, 0, 0, 99].into(),
        };
        self.refused.send(refused).unwrap();
    }

    async fn until(&mut self, what: impl FnMut(&SourceState) -> bool) -> SourceState {
        timeout(PATIENCE, self.state.wait_for(what))
            .await
            .expect("the state was not reached")
            .unwrap()
            .clone()
    }

    async fn recovered(&mut self) -> SourceState {
        self.until(|state| state.ready && state.faults.is_empty()).await
    }

    async fn fault(&mut self, part: &str) {
        self.until(|state| state.faults.values().any(|fault| fault.contains(part))).await;
    }

    async fn until_cloud(&self, what: impl Fn(&cloud::CloudState) -> bool) {
        let wait = async {
            while !self.cloud.set(|state| what(state)) {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, wait).await.expect("the requests were not sent");
    }

    fn asked(&self) -> Vec<String> {
        self.cloud.set(|state| std::mem::take(&mut state.asked))
    }

    async fn stop(self) {
        self.cancel.cancel();
        timeout(PATIENCE, self.source).await.expect("the source did not stop").unwrap();
        self.tasks.close();
        timeout(PATIENCE, self.tasks.wait()).await.expect("connections did not end");
    }
}

fn event(number: u8, instance: Option<InstanceId>) -> (String, Option<InstanceId>) {
    (port(number.into()).to_string(), instance)
}

fn reported(number: u8) -> (String, Option<InstanceId>) {
    event(number, Some(instance(number.into())))
}

#[tokio::test]
async fn all_ports_of_the_host_are_requested_first_in_pages() {
    let mut source = NeutronHarness::start(|state| {
        state.ports = (1..=5).map(guests_port).collect();
        state.page = Some(2);
    })
    .await;
    source.show([1, 2, 4].map(interface));
    for number in [1, 2, 4] {
        assert_eq!(source.next().await, reported(number));
    }
    assert_eq!(source.recovered().await.ports, 3);
    let asked = source.asked();
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert!(asked.iter().all(|query| query.contains("binding:host_id=hypervisor-1")), "{asked:?}");
    assert!(asked[2].contains(&format!("marker={}", port(4))), "{asked:?}");

    source.show([1, 2, 4, 5].map(|number| match number {
        5 => interface(5),
        known => Present { port: Some(port(known.into())), need: Need::Nothing, ..interface(known) },
    }));
    assert_eq!(source.next().await, reported(5));
    let asked = source.asked();
    let [query] = &asked[..] else { panic!("{asked:?}") };
    assert!(query.contains(&format!("&id={}&", port(5))), "{query}");
    assert_eq!(source.cloud.set(|state| state.logins), 1);
    source.stop().await;
}

/// A tenant's trunks must not keep the other ports of a response from being identified.
#[tokio::test]
async fn a_large_trunk_leaves_the_other_ports_of_the_host_alone() {
    let subports: Vec<_> = (1_000..4_000)
        .map(|number| json!({ "port_id": port(number), "segmentation_id": number, "segmentation_type": "vlan" }))
        .collect();
    let mut source = NeutronHarness::start(|_| {}).await;
    source.show([]);
    source.until_cloud(|state| state.asked.len() == 1).await;
    source.cloud.set(|state| {
        state.ports = (1..=12).map(guests_port).collect();
        for parent in &mut state.ports[1..] {
            parent["trunk_details"] = json!({ "trunk_id": "t", "sub_ports": subports });
        }
    });
    source.show((1..=12).map(interface));
    let mut events = BTreeMap::new();
    while !events.contains_key(&reported(1).0) {
        events.extend([source.next().await]);
    }
    assert_eq!(events[&reported(1).0], reported(1).1);
    source.stop().await;
}

#[tokio::test]
async fn the_port_of_a_removed_interface_is_withdrawn() {
    let mut source = NeutronHarness::start(|state| state.ports = vec![guests_port(1)]).await;
    source.show([interface(1)]);
    assert_eq!(source.next().await, reported(1));
    source.cloud.set(|state| state.ports[0]["device_id"] = json!(instance(9)));
    source.show([Present { index: IfIndex(9), ..interface(1) }]);
    assert_eq!(source.next().await, event(1, None));
    assert_eq!(source.next().await, event(1, Some(instance(9))));
    source.show([]);
    assert_eq!(source.next().await, event(1, None));
    source.stop().await;
}

/// The guest has an address that Neutron gave it after the first response.
#[tokio::test]
async fn a_refused_source_makes_the_source_ask_again() {
    let mut source = NeutronHarness::start(|state| state.ports = vec![guests_port(1)]).await;
    source.show([interface(1)]);
    assert_eq!(source.next().await, reported(1));
    let known = Present { port: Some(port(1)), need: Need::Nothing, ..interface(1) };
    source.show([known.clone()]);
    source.recovered().await;
    source.asked();

    source.cloud.set(|state| {
        state.ports[0]["fixed_ips"] = json!([{ "ip_address": "10.0.0.99" }]);
        state.ports[0]["allowed_address_pairs"] = json!([]);
    });
    source.refuse(&known);
    let event = timeout(PATIENCE, source.events.recv()).await.expect("no event came").unwrap();
    let allowed = &event.ports[0].addressing.allowed_sources;
    let own = "fa:16:3e:00:00:01".parse().unwrap();
    let address: IpAddr = "10.0.0.99".parse().unwrap();
    assert_eq!(allowed, &Some(SourcePolicy::secured(own, &[address], [])));
    let asked = source.asked();
    let [query] = &asked[..] else { panic!("{asked:?}") };
    assert!(query.contains(&format!("&id={}&", port(1))), "{query}");
    assert!(query.contains("&fields=port_security_enabled"), "{query}");
    source.stop().await;
}

/// The interface of a port appears after the response about the host, in which the port belonged to
/// another instance.
#[tokio::test]
async fn a_later_interface_gets_the_present_owner_of_its_port() {
    let mut source = NeutronHarness::start(|state| state.ports = [1, 2, 3].map(guests_port).into()).await;
    source.show([]);
    source.until_cloud(|state| state.asked.len() == 1).await;
    source.recovered().await;
    source.asked();
    // One port was given to another instance, one was deleted, and one is on another host.
    source.cloud.set(|state| {
        state.ports[0]["device_id"] = json!(instance(9));
        state.ports[2]["binding:host_id"] = json!("hypervisor-2");
        state.ports[2]["device_id"] = json!("");
        state.ports.remove(1);
    });
    source.show([1, 2, 3].map(interface));
    let mut events = [source.next().await, source.next().await];
    events.sort();
    assert_eq!(events, [event(1, Some(instance(9))), event(3, None)]);
    let first = source.asked().swap_remove(0);
    for number in [1, 2, 3] {
        assert!(first.contains(&format!("&id={}&", port(number))), "{first}");
    }
    source.stop().await;
}

#[tokio::test]
async fn an_invalid_response_is_an_error_and_ports_stay_valid() {
    let mut source = NeutronHarness::start(|state| state.ports = vec![guests_port(1), guests_port(2)]).await;
    source.show([1, 2].map(interface));
    assert_eq!(source.next().await, reported(1));
    assert_eq!(source.next().await, reported(2));
    let ok = StatusCode::OK;
    let whole = json!({ "ports": [guests_port(1)] }).to_string();
    let long = format!("{{\"ports\": [], \"x\": \"{}\"}}", "x".repeat(api::HOST_PORTS_LIMIT));
    for (status, body, fault) in [
        (StatusCode::INTERNAL_SERVER_ERROR, "{}".to_owned(), "failed with 500"),
        (StatusCode::FORBIDDEN, "{}".to_owned(), "role admin or service"),
        (ok, "<html>".to_owned(), "not a list of ports"),
        (ok, whole[..whole.len() / 2].to_owned(), "not a list of ports"),
        (ok, "{\"ports\": 7}".to_owned(), "not a list of ports"),
        (ok, long, "longer than 33554432 bytes"),
    ] {
        source.cloud.set(|state| state.neutron = Some((status, body.into_bytes())));
        // A reason for a request.
        source.show([1, 2, 3].map(interface));
        source.fault(fault).await;
        assert_eq!(source.state.borrow().ports, 2);
        source.cloud.set(|state| state.neutron = None);
        source.show([1, 2].map(interface));
        source.recovered().await;
        assert!(source.events.try_recv().is_err(), "no event is sent after {fault:?}");
    }
    // Neutron returns with other data.
    source.cloud.set(|state| state.neutron = Some((StatusCode::BAD_GATEWAY, Vec::new())));
    source.show([1, 2, 3].map(interface));
    source.fault("failed with 502").await;
    source.cloud.set(|state| {
        state.ports = vec![row(2, "network:dhcp", "dhcp", "10.0.0.2")];
        state.neutron = None;
    });
    let mut events = [source.next().await, source.next().await];
    events.sort();
    assert_eq!(events, [event(1, None), event(2, None)]);
    source.stop().await;
}

#[tokio::test]
async fn a_keystone_that_rejects_is_queried_with_growing_pauses() {
    let mut source = NeutronHarness::start(|state| {
        state.ports = (1..=200).map(guests_port).collect();
        state.keystone = Some(StatusCode::UNAUTHORIZED);
    })
    .await;
    let begin = Instant::now();
    source.show((1..=200).map(interface));
    let asks: Vec<_> = (0..100)
        .map(|last| {
            let lookup = source.lookup.clone();
            tokio::spawn(async move {
                lookup
                    .find(LookupQuery {
                        scope: NetworkOrRouter::Network(NETWORK),
                        target: PortSelector::Ip(IpAddr::from([10, 9, 9, last]), None),
                    })
                    .await
            })
        })
        .collect();
    for ask in asks {
        assert!(ask.await.unwrap().is_err());
    }
    source.fault("neutron_password").await;
    source.until_cloud(|state| state.logins >= 4).await;
    // At least half of 0.5 s, 1 s and 2 s lie between four attempts.
    assert!(begin.elapsed() >= Duration::from_millis(1750), "{:?}", begin.elapsed());
    assert_eq!(source.asked(), [""; 0]);
    source.cloud.set(|state| state.keystone = None);
    for _ in 1..=200 {
        source.next().await;
    }
    assert_eq!(source.recovered().await.ports, 200);
    assert!(source.asked().len() <= 2);
    source.stop().await;
}

#[tokio::test]
async fn a_rejected_token_is_renewed_only_if_it_was_accepted_before() {
    let mut source = NeutronHarness::start(|state| state.ports = vec![guests_port(1), guests_port(2)]).await;
    source.show([interface(1)]);
    assert_eq!(source.next().await, reported(1));
    source.cloud.set(|state| state.tokens.clear());
    source.show([1, 2].map(interface));
    assert_eq!(source.next().await, reported(2));
    assert_eq!(source.cloud.set(|state| state.logins), 2);
    assert!(source.state.borrow().faults.is_empty());

    // A Neutron that rejects every token.
    source.cloud.set(|state| {
        state.tokens.clear();
        state.neutron = Some((StatusCode::UNAUTHORIZED, Vec::new()));
        state.asked.clear();
    });
    let begin = Instant::now();
    source.show([1, 2, 3].map(interface));
    source.until_cloud(|state| state.logins >= 6).await;
    assert!(begin.elapsed() >= Duration::from_millis(1750), "{:?}", begin.elapsed());
    assert!(source.asked().len() <= 10);
    source.fault("401").await;
    source.stop().await;
}

#[tokio::test]
async fn an_unreachable_neutron_is_an_error_until_it_is_reachable() {
    let cloud = Cloud::start().await;
    let mut source = NeutronHarness::start(|_| {}).await;
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let settings = |url: String| {
        let endpoint = HttpUrl::parse(&url).unwrap();
        let access = NeutronAccess { auth: NeutronAuth::NoAuth { endpoint }, ..cloud.access() };
        NeutronSettings { access, host: HOST.to_owned(), tasks: source.tasks.clone() }
    };
    let error = probe(&settings(format!("http://{closed}"))).await.unwrap_err().to_string();
    assert!(error.contains("Connection refused") && error.contains(&closed.to_string()), "{error}");
    // This Neutron rejects requests without a token.
    let error = probe(&settings(cloud.url.to_string())).await.unwrap_err().to_string();
    assert!(error.contains("401"), "{error}");
    assert!(cloud.set(|state| state.tokens.insert(String::new())));
    assert_eq!(probe(&settings(cloud.url.to_string())).await.unwrap(), NeutronProbe::NoPorts);
    cloud.set(|state| state.ports = vec![guests_port(1)]);
    assert_eq!(probe(&settings(cloud.url.to_string())).await.unwrap(), NeutronProbe::Ports);
    source.show([]);
    source.recovered().await;
    source.stop().await;
}

/// The catalog leads to a place where nothing listens, until Neutron is registered elsewhere.
#[tokio::test(start_paused = true)]
async fn an_endpoint_that_moves_in_the_catalog_is_found() {
    let mut source = NeutronHarness::start(|state| {
        state.ports = vec![guests_port(1)];
        state.endpoint = Some("http://127.0.0.1:1".to_owned());
    })
    .await;
    source.show([interface(1)]);
    source.fault("cannot send request").await;
    source.cloud.set(|state| state.endpoint = None);
    let began = Instant::now();
    let found = source.state.wait_for(|state| state.ready && state.faults.is_empty());
    drop(timeout(Duration::from_mins(10), found).await.expect("the new endpoint is not found").unwrap());
    assert_eq!(source.next().await, reported(1));
    assert!(began.elapsed() <= Duration::from_mins(6), "{:?}", began.elapsed());
    assert_eq!(source.cloud.set(|state| state.logins), 2, "a failing Neutron costs Keystone little");
    source.stop().await;
}
