//! The source and its lookups against servers whose every word the test chooses. The real ones stand in the scenarios.

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
use crate::inventory::{DeviceName, SourceKind};
use crate::sources::SourceState;
use cloud::Cloud;

const PATIENCE: Duration = Duration::from_mins(1);
const HOST: &str = "hypervisor-1";
const NETWORK: NetworkId = NetworkId::new(Uuid::from_u128(7));

/// The source, and what it says.
struct World {
    cloud: Cloud,
    presence: watch::Sender<Presence>,
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

/// The guest's interface, of which nothing but name and MAC address is known.
fn interface(number: u8) -> Present {
    Present {
        device: DeviceName::tap_of(&port(number.into())),
        index: IfIndex(number.into()),
        mac: Some(format!("fe:16:3e:00:00:{number:02x}").parse().unwrap()),
        port: None,
        need: Need::Identity,
    }
}

impl World {
    async fn start(set: impl FnOnce(&mut cloud::State)) -> Self {
        let cloud = Cloud::start().await;
        cloud.set(set);
        let access = cloud.access();
        Self::of(cloud, access)
    }

    fn of(cloud: Cloud, access: NeutronAccess) -> Self {
        let (presence, present) = watch::channel(Presence::default());
        let (sender, events) = mpsc::channel(512);
        let (reporter, state) = Reporter::new(SourceKind::Neutron);
        let (lookup, questions) = Lookup::new();
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let settings = Settings { access, host: HOST.to_owned(), tasks: tasks.clone() };
        let channels = Channels { present, events: sender, reporter, questions, lookup: lookup.clone() };
        let source = tokio::spawn(run(settings, channels, cancel.clone()));
        Self { cloud, presence, events, state, lookup, cancel, source, tasks }
    }

    fn show(&self, interfaces: impl IntoIterator<Item = Present>) {
        self.presence.send_replace(interfaces.into_iter().collect());
    }

    /// The next event: of which port, and which instance it names.
    async fn next(&mut self) -> (String, Option<InstanceId>) {
        let event = timeout(PATIENCE, self.events.recv()).await.expect("no event came").unwrap();
        let tenant = event.ports.first().and_then(|facts| facts.tenant.as_ref());
        (event.key, tenant.map(|tenant| tenant.instance))
    }

    async fn until(&mut self, what: impl FnMut(&SourceState) -> bool) -> SourceState {
        timeout(PATIENCE, self.state.wait_for(what)).await.expect("it never was so").unwrap().clone()
    }

    async fn sound(&mut self) -> SourceState {
        self.until(|state| state.ready && state.faults.is_empty()).await
    }

    async fn fault(&mut self, part: &str) {
        self.until(|state| state.faults.values().any(|fault| fault.contains(part))).await;
    }

    async fn until_cloud(&self, what: impl Fn(&cloud::State) -> bool) {
        let wait = async {
            while !self.cloud.set(|state| what(state)) {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, wait).await.expect("it never was asked so");
    }

    fn asked(&self) -> Vec<String> {
        self.cloud.set(|state| std::mem::take(&mut state.asked))
    }

    async fn stop(self) {
        self.cancel.cancel();
        timeout(PATIENCE, self.source).await.expect("stops when told to").unwrap();
        self.tasks.close();
        timeout(PATIENCE, self.tasks.wait()).await.expect("its connections end");
    }
}

fn said(number: u8, instance: Option<InstanceId>) -> (String, Option<InstanceId>) {
    (port(number.into()).to_string(), instance)
}

fn says(number: u8) -> (String, Option<InstanceId>) {
    said(number, Some(instance(number.into())))
}

#[tokio::test]
async fn all_of_the_host_at_the_start_page_by_page_and_then_what_is_unknown() {
    let mut world = World::start(|state| {
        state.ports = (1..=5).map(guests_port).collect();
        state.page = Some(2);
    })
    .await;
    world.show([1, 2, 4].map(interface));
    for number in [1, 2, 4] {
        assert_eq!(world.next().await, says(number));
    }
    assert_eq!(world.sound().await.ports, 3);
    let asked = world.asked();
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert!(asked.iter().all(|query| query.contains("binding:host_id=hypervisor-1")), "{asked:?}");
    assert!(asked[2].contains(&format!("marker={}", port(4))), "{asked:?}");

    world.show([1, 2, 4, 5].map(|number| match number {
        5 => interface(5),
        known => Present { port: Some(port(known.into())), need: Need::Nothing, ..interface(known) },
    }));
    assert_eq!(world.next().await, says(5));
    let asked = world.asked();
    let [query] = &asked[..] else { panic!("{asked:?}") };
    assert!(query.contains("&mac_address=fa:16:3e:00:00:05&"), "{query}");
    assert_eq!(world.cloud.set(|state| state.logins), 1);
    world.stop().await;
}

#[tokio::test]
async fn an_interface_that_goes_takes_what_was_said_of_it_along() {
    let mut world = World::start(|state| state.ports = vec![guests_port(1)]).await;
    world.show([interface(1)]);
    assert_eq!(world.next().await, says(1));
    world.cloud.set(|state| state.ports[0]["device_id"] = json!(instance(9)));
    world.show([Present { index: IfIndex(9), ..interface(1) }]);
    assert_eq!(world.next().await, said(1, None));
    assert_eq!(world.next().await, said(1, Some(instance(9))));
    world.show([]);
    assert_eq!(world.next().await, said(1, None));
    world.stop().await;
}

#[tokio::test]
async fn whatever_neutron_answers_amiss_is_a_fault_and_what_was_said_holds_until_it_is_over() {
    let mut world = World::start(|state| state.ports = vec![guests_port(1), guests_port(2)]).await;
    world.show([1, 2].map(interface));
    assert_eq!(world.next().await, says(1));
    assert_eq!(world.next().await, says(2));
    let ok = StatusCode::OK;
    let whole = json!({ "ports": [guests_port(1)] }).to_string();
    let long = format!("{{\"ports\": [], \"x\": \"{}\"}}", "x".repeat(api::MANY));
    for (status, body, fault) in [
        (StatusCode::INTERNAL_SERVER_ERROR, "{}".to_owned(), "answers 500"),
        (StatusCode::FORBIDDEN, "{}".to_owned(), "role admin or service"),
        (ok, "<html>".to_owned(), "no list of ports"),
        (ok, whole[..whole.len() / 2].to_owned(), "no list of ports"),
        (ok, "{\"ports\": 7}".to_owned(), "no list of ports"),
        (ok, long, "more than 33554432 bytes"),
    ] {
        world.cloud.set(|state| state.neutron = Some((status, body.into_bytes())));
        // Something to ask for.
        world.show([1, 2, 3].map(interface));
        world.fault(fault).await;
        assert_eq!(world.state.borrow().ports, 2);
        world.cloud.set(|state| state.neutron = None);
        world.show([1, 2].map(interface));
        world.sound().await;
        assert!(world.events.try_recv().is_err(), "nothing is told of {fault:?}");
    }
    // It is back with other data.
    world.cloud.set(|state| state.neutron = Some((StatusCode::BAD_GATEWAY, Vec::new())));
    world.show([1, 2, 3].map(interface));
    world.fault("answers 502").await;
    world.cloud.set(|state| {
        state.ports = vec![row(2, "network:dhcp", "dhcp", "10.0.0.2")];
        state.neutron = None;
    });
    let mut events = [world.next().await, world.next().await];
    events.sort();
    assert_eq!(events, [said(1, None), said(2, None)]);
    world.stop().await;
}

#[tokio::test]
async fn a_keystone_that_refuses_is_asked_ever_more_seldom_however_much_is_unknown() {
    let mut world = World::start(|state| {
        state.ports = (1..=200).map(guests_port).collect();
        state.keystone = Some(StatusCode::UNAUTHORIZED);
    })
    .await;
    let begin = Instant::now();
    world.show((1..=200).map(interface));
    let asks: Vec<_> = (0..100)
        .map(|last| {
            let lookup = world.lookup.clone();
            tokio::spawn(async move {
                lookup
                    .ask(Query {
                        scope: NetworkOrRouter::Network(NETWORK),
                        whom: Whom::Address(IpAddr::from([10, 9, 9, last]), None),
                    })
                    .await
            })
        })
        .collect();
    for ask in asks {
        assert!(ask.await.unwrap().is_err());
    }
    world.fault("neutron_password").await;
    world.until_cloud(|state| state.logins >= 4).await;
    // At least half of 0.5 s, 1 s and 2 s lie between four attempts.
    assert!(begin.elapsed() >= Duration::from_millis(1750), "{:?}", begin.elapsed());
    assert_eq!(world.asked(), [""; 0]);
    world.cloud.set(|state| state.keystone = None);
    for _ in 1..=200 {
        world.next().await;
    }
    assert_eq!(world.sound().await.ports, 200);
    assert!(world.asked().len() <= 2);
    world.stop().await;
}

#[tokio::test]
async fn a_token_that_is_refused_is_renewed_once_and_one_that_never_was_good_is_not() {
    let mut world = World::start(|state| state.ports = vec![guests_port(1), guests_port(2)]).await;
    world.show([interface(1)]);
    assert_eq!(world.next().await, says(1));
    world.cloud.set(|state| state.tokens.clear());
    world.show([1, 2].map(interface));
    assert_eq!(world.next().await, says(2));
    assert_eq!(world.cloud.set(|state| state.logins), 2);
    assert!(world.state.borrow().faults.is_empty());

    // A Neutron that takes no token at all.
    world.cloud.set(|state| {
        state.tokens.clear();
        state.neutron = Some((StatusCode::UNAUTHORIZED, Vec::new()));
        state.asked.clear();
    });
    let begin = Instant::now();
    world.show([1, 2, 3].map(interface));
    world.until_cloud(|state| state.logins >= 6).await;
    assert!(begin.elapsed() >= Duration::from_millis(1750), "{:?}", begin.elapsed());
    assert!(world.asked().len() <= 10);
    world.fault("401").await;
    world.stop().await;
}

#[tokio::test]
async fn a_neutron_that_is_not_there_at_the_start_is_found_when_it_comes() {
    let cloud = Cloud::start().await;
    let mut world = World::start(|_| {}).await;
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let settings = |url: String| {
        let endpoint = HttpUrl::parse(&url).unwrap();
        let access = NeutronAccess { auth: NeutronAuth::Nobody { endpoint }, ..cloud.access() };
        Settings { access, host: HOST.to_owned(), tasks: world.tasks.clone() }
    };
    let error = probe(&settings(format!("http://{nobody}"))).await.unwrap_err().to_string();
    assert!(error.contains("Connection refused") && error.contains(&nobody.to_string()), "{error}");
    // Without Keystone there is no token, which this Neutron does not take.
    let error = probe(&settings(cloud.url.to_string())).await.unwrap_err().to_string();
    assert!(error.contains("401"), "{error}");
    assert!(cloud.set(|state| state.tokens.insert(String::new())));
    assert_eq!(probe(&settings(cloud.url.to_string())).await.unwrap(), Reached::NoPorts);
    cloud.set(|state| state.ports = vec![guests_port(1)]);
    assert_eq!(probe(&settings(cloud.url.to_string())).await.unwrap(), Reached::Ports);
    world.sound().await;
    world.stop().await;
}

/// An authority that makes certificates for `localhost`.
struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Self(rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap())
    }

    /// A server whose certificate is good until the end of this year.
    fn server(&self, year: i32) -> Arc<rustls::ServerConfig> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2019, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 12, 31);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        Arc::new(config)
    }

    /// Its own certificate as a file.
    fn file(&self, folder: &std::path::Path) -> std::path::PathBuf {
        let file = folder.join("ca.pem");
        std::fs::write(&file, self.0.pem()).unwrap();
        file
    }
}

const PAST: i32 = 2020;
const FUTURE: i32 = 4000;

#[tokio::test]
async fn a_certificate_that_expires_stops_what_is_new_until_it_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let (good, expired) = (authority.server(FUTURE), authority.server(PAST));
    let cloud = Cloud::start_tls(Arc::clone(&good)).await;
    cloud.set(|state| state.ports = vec![guests_port(1)]);
    let access =
        NeutronAccess { authorities: Some(authority.file(folder.path())), insecure: false, ..cloud.access() };
    let mut world = World::of(cloud, access);
    world.show([interface(1)]);
    assert_eq!(world.next().await, says(1));
    world.sound().await;

    world.cloud.set(|state| {
        state.tls = Some(expired);
        state.ports = vec![guests_port(1), guests_port(2)];
    });
    world.show([interface(1), interface(2)]);
    world.fault("invalid peer certificate: Expired").await;
    let told = world.state.borrow().faults.clone();
    assert!(told.values().all(|fault| !fault.contains("verified at")), "each attempt looks alike: {told:?}");
    assert!(world.events.try_recv().is_err(), "what was said holds, and nothing new is");

    world.cloud.set(|state| state.tls = Some(good));
    assert_eq!(world.next().await, says(2));
    world.sound().await;
    world.stop().await;
}

#[tokio::test]
async fn an_expired_certificate_is_a_fault_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let file = authority.file(folder.path());
    let cloud = Cloud::start_tls(authority.server(PAST)).await;
    let access = NeutronAccess { authorities: Some(file.clone()), insecure: false, ..cloud.access() };
    let mut settings = Settings { access, host: HOST.to_owned(), tasks: TaskTracker::new() };
    let error = probe(&settings).await.unwrap_err().to_string();
    assert!(error.contains("certificate") && error.contains("xpired"), "{error}");
    std::fs::write(&file, "").unwrap();
    let error = probe(&settings).await.unwrap_err().to_string();
    assert!(error.contains("no certificate in"), "{error}");
    settings.access.authorities = Some("/nowhere".into());
    let error = probe(&settings).await.unwrap_err().to_string();
    assert!(error.contains("/nowhere"), "{error}");
}
