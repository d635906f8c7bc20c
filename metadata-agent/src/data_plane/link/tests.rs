//! Takes the place of a data plane that a guest has taken over.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, watch};

use super::*;
use crate::data_plane::messages::{LogSettings, UserId};
use crate::data_plane::{ClientEntry, ClientTable, LastBeat, Listeners};
use crate::ids::{InstanceId, MacAddress, NetworkOrRouter};
use crate::proxy::metrics::MetricsTotals;
use crate::proxy::{
    ClientDirectory as _, ClientIdentity, ClientLookup, ClientQuery, Endpoint, LookupFuture, LookupState,
    NameLookup, NameLookupFuture, ProxyConfig, Scheme, SocketConnector, SocketFuture, UpstreamConfig,
};
use crate::secrets::Signer;

const NOVA: &str = "nova.example";
const NOVA_PORT: u16 = 8775;
const MAC: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);

/// The host behind the control process. Notes what was asked of it.
#[derive(Debug, Default)]
struct Host(Mutex<Vec<String>>);

impl Host {
    fn note(&self, asked: String) {
        self.0.lock().unwrap().push(asked);
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl ClientLookup for Host {
    fn find<'a>(&'a self, query: &'a ClientQuery) -> LookupFuture<'a> {
        self.note(format!("client {}", query.address));
        Box::pin(std::future::ready(LookupOutcome::NotAnInstance))
    }
}

impl NameLookup for Host {
    fn look_up<'a>(&'a self, host: &'a str, port: u16) -> NameLookupFuture<'a> {
        self.note(format!("name {host}:{port}"));
        Box::pin(std::future::ready(Ok(vec![([192, 0, 2, 1], port).into()])))
    }
}

impl SocketConnector for Host {
    fn connect<'a>(&'a self, path: &'a Path) -> SocketFuture<'a> {
        self.note(format!("socket {}", path.display()));
        Box::pin(async { Ok(tokio::net::UnixStream::pair()?.0) })
    }
}

fn attachment(id: u32) -> AttachmentId {
    AttachmentId::new(id).unwrap()
}

fn network(digit: u8) -> NetworkOrRouter {
    let id = format!("{digit}{digit}111111-1111-4111-8111-111111111111");
    NetworkOrRouter::Network(id.parse().unwrap())
}

fn instance(digit: u8) -> InstanceId {
    format!("{digit}{digit}222222-2222-4222-8222-222222222222").parse().unwrap()
}

fn known(signer: &Signer, digit: u8) -> ClientEntry {
    let instance = instance(digit);
    let identity =
        ClientIdentity::new(instance, &"acme".parse().unwrap(), Vec::new(), signer.sign(&instance));
    ClientEntry::Known(Arc::new(identity))
}

struct Scene {
    host: Arc<Host>,
    plan: Arc<Plan>,
    signer: Signer,
    sender: Sender,
    receiver: Receiver,
    link: Link,
    /// As the data plane gets it.
    listener: Option<OwnedFd>,
}

impl Scene {
    /// Serves Nova at [`NOVA`] and Neutron's agent at /run/neutron/metadata.
    async fn new(haproxies: bool) -> Self {
        let (host, signer) = (Arc::new(Host::default()), Signer::new("secret".into()));
        // The kernel keeps the port of a socket only if it was chosen.
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let listener = TcpListener::bind(free).unwrap();
        let endpoints = vec![
            Endpoint::new(Scheme::Http, NOVA, NOVA_PORT).unwrap(),
            Endpoint::socket(Path::new("/run/neutron/metadata")),
        ];
        let plan = Arc::new(Plan {
            log: LogSettings { debug: false, json: false },
            debug: watch::channel(false).1,
            user: UserId { user: 1, group: 1 },
            workers: None,
            proxy: ProxyConfig::default(),
            upstream: UpstreamConfig::new(endpoints),
            heartbeat_stale_after: Duration::from_secs(2),
            haproxy_users: None,
            heartbeat: tempfile::tempfile().unwrap().into(),
            listeners: Listeners::new(listener, 1),
            haproxies: haproxies.then(|| watch::channel(None).1),
            table: Arc::new(ClientTable::new(signer.status())),
            lookup: host.clone(),
            names: host.clone(),
            sockets: host.clone(),
            signer: Some(signer.clone()),
            tls: None,
            metrics: MetricsTotals::register(&mut Registry::default()),
            last_beat: LastBeat::default(),
            resumed: Arc::new(Notify::new()),
        });
        let (ours, theirs) = UnixStream::pair().unwrap();
        let settings = plan.settings(tempfile::tempfile().unwrap().into()).unwrap();
        let link = Link::start(ours, settings, &plan).unwrap();
        let (sender, mut receiver) = Connection::new(theirs, 1 << 20).split().unwrap();
        let mut settings: Message<Settings> = receiver.receive().await.unwrap();
        assert_eq!(settings.descriptors.len(), 3);
        let listener = settings.descriptors.pop_front();
        Self { host, plan, signer, sender, receiver, link, listener }
    }

    async fn report(&mut self, report: Report) {
        self.sender.send(&Message::new(report, [])).await.unwrap();
    }

    async fn call(&mut self, query: Query) -> (Answer, bool) {
        self.report(Report::Call { call: 7, query }).await;
        loop {
            let message: Message<Order> = self.receiver.receive().await.unwrap();
            if let Order::Answer { call: 7, answer } = message.body {
                return (answer, !message.descriptors.is_empty());
            }
        }
    }

    /// Receives orders until one changes entries, and returns a table with these.
    async fn entries(&mut self) -> ClientTable {
        let table = ClientTable::new(Arc::default());
        loop {
            let message: Message<Order> = self.receiver.receive().await.unwrap();
            if let Order::Entries(records) = message.body {
                table.apply(records.into_changes());
                return table;
            }
        }
    }
}

fn client(scope: NetworkOrRouter, mac: Option<MacAddress>) -> Query {
    Query::Client(ClientQuery { scope, address: [10, 0, 0, 5].into(), mac })
}

/// It cannot get the signature of an instance that is not behind this host's own attachments.
#[tokio::test]
async fn only_clients_of_shared_attachments_are_looked_up() {
    let mut scene = Scene::new(false).await;
    let table = Arc::clone(&scene.plan.table);
    table.apply([(attachment(1), Some(ClientEntry::Shared(network(1))))].into());
    for (query, is_answered) in [
        (client(network(1), Some(MAC)), true),
        (client(network(2), Some(MAC)), false),
        (client(network(1), None), false),
    ] {
        let answer = scene.call(query).await;
        let found = matches!(answer, (Answer::Client(LookupOutcome::NotAnInstance), false));
        let refused = matches!(answer, (Answer::Client(LookupOutcome::Unavailable), false));
        assert_eq!((found, refused), (is_answered, !is_answered), "{answer:?}");
        assert_eq!(scene.host.asked().len(), usize::from(is_answered));
    }
    table.apply([(attachment(1), None)].into());
    scene.call(client(network(1), Some(MAC))).await;
    assert!(scene.host.asked().is_empty(), "the attachment is gone");
}

/// Each connection may have one call.
#[test]
fn slow_calls_of_all_guests_leave_room_for_another() {
    let (ports, groups) = (2000, 64);
    assert!(ProxyConfig::default().most_connections(ports, groups) < CALLS);
}

#[tokio::test]
async fn haproxies_clients_are_looked_up_only_if_served() {
    let mut scene = Scene::new(true).await;
    let answer = scene.call(client(network(3), None)).await;
    assert!(matches!(answer.0, Answer::Client(LookupOutcome::NotAnInstance)), "{answer:?}");
}

#[tokio::test]
async fn only_the_names_and_sockets_of_endpoints_are_used() {
    let mut scene = Scene::new(false).await;
    let name = |host: &str, port| Query::Name { host: host.to_owned(), port };
    let socket = |path: &str| Query::Socket { path: PathBuf::from(path) };
    for (query, asked) in [
        (name(NOVA, NOVA_PORT), Some("name nova.example:8775")),
        (name(NOVA, 22), None),
        (name("secret-in-a-name.attacker.example", NOVA_PORT), None),
        (socket("/run/neutron/metadata"), Some("socket /run/neutron/metadata")),
        (socket("/run/libvirt/libvirt-sock"), None),
        (socket("/run/neutron/../neutron/metadata"), None),
    ] {
        let (answer, has_descriptor) = scene.call(query).await;
        assert_eq!(matches!(answer, Answer::Failed(_)), asked.is_none(), "{answer:?}");
        assert_eq!(has_descriptor, asked.is_some_and(|asked| asked.starts_with("socket")));
        assert_eq!(scene.host.asked(), Vec::from_iter(asked.map(str::to_owned)));
    }
}

#[tokio::test]
async fn what_cannot_be_read_ends_the_link() {
    let mut scene = Scene::new(false).await;
    scene.report(Report::Serving).await;
    assert!(matches!(scene.link.event().await, Event::Serving));
    let path = PathBuf::from("x".repeat(LONGEST_REPORT));
    scene.report(Report::Call { call: 1, query: Query::Socket { path } }).await;
    let event = scene.link.event().await;
    assert!(matches!(event, Event::Ended(IpcError::TooLong { .. })), "{event:?}");
    assert!(scene.host.asked().is_empty());
}

/// It has the same socket as the control process, and can close it for both.
#[tokio::test]
async fn a_listener_that_was_shut_down_listens_for_the_next_one() {
    let mut scene = Scene::new(false).await;
    let listener = TcpListener::from(scene.listener.take().unwrap());
    let address = listener.local_addr().unwrap();
    std::net::TcpStream::connect(address).unwrap();
    socket2::SockRef::from(&listener).shutdown(std::net::Shutdown::Both).unwrap();
    std::net::TcpStream::connect(address).unwrap_err();
    let next = scene.plan.settings(tempfile::tempfile().unwrap().into()).unwrap().descriptor().unwrap();
    std::net::TcpStream::connect(address).unwrap();
    assert_eq!(TcpListener::from(next).local_addr().unwrap(), address);
}

/// It can lie about what Nova accepts. That changes which secret is tried first, and no signature.
#[tokio::test]
async fn reports_about_secrets_choose_among_those_in_force() {
    let mut scene = Scene::new(false).await;
    scene.signer.replace(vec!["a".into(), "b".into()]);
    for (generation, secret, preferred) in [(9, 1, 0), (1, 1, 1), (1, 700, 700)] {
        scene.report(Report::Preferred { generation, secret }).await;
        // Answers come in the order of reports.
        scene.call(client(network(1), None)).await;
        assert_eq!(scene.signer.status().preferred(1), preferred);
    }
    let signatures = scene.signer.sign(&instance(1));
    assert_eq!(signatures.first(&scene.signer.status()).0, 0, "there is no such secret");
}

/// A data plane that does not read gets the latest state once it does, and delays no one.
#[tokio::test]
async fn changes_are_sent_once_with_their_latest_state() {
    let mut scene = Scene::new(false).await;
    let table = Arc::clone(&scene.plan.table);
    let lookup = |table: &ClientTable, id| table.lookup(&ClientAddress::ipv4(attachment(id), [10, 0, 0, 5]));
    for digit in 1..=9 {
        let unknown = ClientEntry::Unknown { since: std::time::Instant::now() };
        table.apply(
            [(attachment(1), Some(known(&scene.signer, digit))), (attachment(2), Some(unknown))].into(),
        );
    }
    table.apply([(attachment(2), None)].into());
    let copy = scene.entries().await;
    let LookupState::Known(identity) = lookup(&copy, 1) else { panic!("{:?}", lookup(&copy, 1)) };
    assert_eq!(identity.instance(), Some(instance(9)));
    assert!(matches!(lookup(&copy, 2), LookupState::Gone));
    assert!(matches!(lookup(&copy, 3), LookupState::Pending { .. }));
    table.apply([(attachment(3), Some(ClientEntry::Shared(network(1))))].into());
    assert!(matches!(lookup(&scene.entries().await, 3), LookupState::Shared(scope) if scope == network(1)));
}

/// A data plane that is started later gets everything, and learns which attachments are gone.
#[tokio::test]
async fn another_data_plane_gets_the_whole_table() {
    let scene = Scene::new(false).await;
    let table = Arc::clone(&scene.plan.table);
    table.apply((1..=600).map(|id| (attachment(id), Some(known(&scene.signer, 1)))).collect());
    table.apply([(attachment(7), None)].into());
    let (feed, copy) = (table.feed(), ClientTable::new(Arc::default()));
    let state = |id| copy.lookup(&ClientAddress::ipv4(attachment(id), [10, 0, 0, 5]));
    while (1..=600).any(|id| matches!(state(id), LookupState::Pending { .. })) {
        let bytes = postcard::to_allocvec(&feed.next().await).unwrap();
        let records: crate::data_plane::EntryRecords = postcard::from_bytes(&bytes).unwrap();
        copy.apply(records.into_changes());
    }
    assert!(matches!(state(7), LookupState::Gone));
    assert!(matches!(state(600), LookupState::Known(_)));
}
