//! The source against servers whose every word the test chooses. The real one stands in the scenarios.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use uuid::Uuid;

use super::super::SourceState;
use super::bindings::clauses;
use super::*;
use crate::inventory::presence::{Need, Present};
use ovsdb_client::Framer;

const PATIENCE: Duration = Duration::from_mins(1);
const ONE: &str = "11111111-77c1-4e55-9d0c-2b6f4f1f0a01";
const TWO: &str = "22222222-77c1-4e55-9d0c-2b6f4f1f0a02";
const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";

/// The source, and what it says.
struct World {
    listeners: Vec<UnixListener>,
    present: watch::Sender<Presence>,
    events: mpsc::Receiver<Event>,
    state: watch::Receiver<SourceState>,
    cancel: CancellationToken,
    source: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl World {
    fn start(servers: usize, ports: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..servers).map(|number| folder.path().join(format!("{number}.sock"))).collect();
        let listeners = paths.iter().map(|path| UnixListener::bind(path).unwrap()).collect();
        let (sender, events) = mpsc::channel(64);
        let (present, presence) = watch::channel(here(ports));
        let (reporter, state) = Reporter::new(SourceKind::OvnSouthbound);
        let cancel = CancellationToken::new();
        let access = Access {
            servers: paths.into_iter().map(Remote::Unix).collect(),
            tls: TlsFiles::default(),
            patience: PATIENCE,
            longest_pause: Duration::from_secs(1),
            probe: None,
        };
        let source = tokio::spawn(run(access, presence, sender, reporter, cancel.clone()));
        Self { listeners, present, events, state, cancel, source, _folder: folder }
    }

    fn move_to(&self, ports: &[&str]) {
        self.present.send_replace(here(ports));
    }

    async fn accept(&self, server: usize) -> Peer {
        let accepted = timeout(PATIENCE, self.listeners[server].accept()).await;
        let (stream, _) = accepted.expect("it does not come").unwrap();
        Peer { stream, framer: Framer::new(1 << 20) }
    }

    /// The server to which it comes, and its connection there.
    async fn accept_any(&self) -> (usize, Peer) {
        tokio::select! {
            peer = self.accept(0) => (0, peer),
            peer = self.accept(1) => (1, peer),
        }
    }

    /// The next event: of which row, and whether it speaks of a port.
    async fn next(&mut self) -> (Uuid, bool) {
        let event = timeout(PATIENCE, self.events.recv()).await.expect("no event came").unwrap();
        (event.key.parse().unwrap(), !event.ports.is_empty())
    }

    async fn fault(&mut self, wanted: &str) {
        let wait = self.state.wait_for(|state| state.faults.values().any(|fault| fault.contains(wanted)));
        timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{wanted} did not come")).unwrap();
    }

    async fn stop(self) {
        self.cancel.cancel();
        timeout(PATIENCE, self.source).await.expect("stops when told to").unwrap();
    }
}

fn here(ports: &[&str]) -> Presence {
    let present = |id: &&str| Present {
        index: crate::ids::IfIndex(1),
        device: format!("tap{}", &id[..11]).parse().unwrap(),
        mac: None,
        port: Some(id.parse().unwrap()),
        need: Need::Identity,
    };
    ports.iter().map(present).collect()
}

/// The row of a port, under a UUID made of the port's.
fn row_of(port: &str) -> Uuid {
    Uuid::from_u128(port.parse::<Uuid>().unwrap().as_u128() + 1)
}

fn rows(action: &str, ports: &[&str]) -> Value {
    let ids = json!(["map", [["neutron:device_owner", "compute:nova"], ["neutron:device_id", INSTANCE]]]);
    let row = |port: &&str| {
        let columns = match action {
            "delete" => Value::Null,
            _ => json!({ "logical_port": port, "external_ids": ids }),
        };
        (row_of(port).to_string(), json!({ action: columns }))
    };
    json!({ "Port_Binding": ports.iter().map(row).collect::<serde_json::Map<_, _>>() })
}

/// The server's end of a connection.
struct Peer {
    stream: UnixStream,
    framer: Framer,
}

impl Peer {
    async fn hear(&mut self) -> Value {
        loop {
            if let Some(message) = self.framer.next_message().unwrap() {
                return serde_json::from_slice(message).unwrap();
            }
            let read = timeout(PATIENCE, self.stream.read_buf(self.framer.read_buffer())).await;
            assert_ne!(read.expect("nothing to hear").unwrap(), 0, "the source hung up");
        }
    }

    async fn say(&mut self, message: &Value) {
        self.stream.write_all(message.to_string().as_bytes()).await.unwrap();
    }

    async fn answer(&mut self, request: &Value, result: Value) {
        self.say(&json!({ "id": request["id"], "result": result, "error": null })).await;
    }

    /// Hears a request and answers it.
    async fn take(&mut self, method: &str, result: Value) -> Value {
        let request = self.hear().await;
        assert_eq!(request["method"], method);
        self.answer(&request, result).await;
        request
    }

    /// The beginning of a conversation with a server that stands alone. Returns the condition.
    async fn greet(&mut self, told: Value) -> Value {
        self.take("list_dbs", json!([DATABASE])).await;
        let request = self.take("monitor_cond", told).await;
        request["params"][2]["Port_Binding"][0]["where"].clone()
    }

    async fn update(&mut self, rows: Value) {
        self.say(&json!({ "method": "update2", "params": ["metadata-agent", rows], "id": null })).await;
    }

    async fn hear_change(&mut self) -> Value {
        let request = self.hear().await;
        assert_eq!(
            (&request["method"], &request["params"][0]),
            (&json!("monitor_cond_change"), &json!(MONITOR.id))
        );
        request
    }
}

fn condition(change: &Value) -> &Value {
    &change["params"][2]["Port_Binding"][0]["where"]
}

fn clauses_of(ports: &[&str]) -> Value {
    clauses(&ports.iter().map(|port| port.parse().unwrap()).collect())
}

#[tokio::test]
async fn the_condition_follows_the_ports_one_change_at_a_time() {
    let mut world = World::start(1, &[]);
    let mut peer = world.accept(0).await;
    assert_eq!(peer.greet(json!({})).await, json!([false]));
    world.move_to(&[ONE]);
    let first = peer.hear_change().await;
    assert_eq!(condition(&first), &clauses_of(&[ONE]));
    // Not answered yet: neither of these is told to the server, only what is so afterwards.
    world.move_to(&[TWO]);
    world.move_to(&[ONE, TWO]);
    // What the change brings stands before its answer, as the server does it.
    peer.update(rows("insert", &[ONE])).await;
    assert_eq!(world.next().await, (row_of(ONE), true));
    peer.answer(&first, json!({})).await;
    let second = peer.hear_change().await;
    assert_eq!(condition(&second), &clauses_of(&[ONE, TWO]));
    peer.update(rows("insert", &[TWO])).await;
    peer.answer(&second, json!({})).await;
    assert_eq!(world.next().await, (row_of(TWO), true));

    // A row is withdrawn with its port, and not told again for being there still.
    world.move_to(&[TWO]);
    assert_eq!(world.next().await, (row_of(ONE), false));
    let third = peer.hear_change().await;
    assert_eq!(condition(&third), &clauses_of(&[TWO]));
    peer.update(rows("delete", &[ONE])).await;
    peer.answer(&third, json!({})).await;
    world.move_to(&[]);
    assert_eq!(world.next().await, (row_of(TWO), false));
    assert_eq!(condition(&peer.hear_change().await), &json!([false]));
    world.stop().await;
}

#[tokio::test]
async fn a_server_that_refuses_to_choose_is_not_asked_for_all() {
    let mut world = World::start(1, &[ONE]);
    let mut peer = world.accept(0).await;
    peer.take("list_dbs", json!([DATABASE])).await;
    let request = peer.hear().await;
    peer.say(&json!({ "id": request["id"], "result": null, "error": "unknown method" })).await;
    world.fault("monitor_cond was refused: unknown method").await;
    let mut peer = world.accept(0).await;
    peer.greet(json!({})).await;
    world.move_to(&[TWO]);
    let change = peer.hear_change().await;
    peer.say(&json!({ "id": change["id"], "result": null, "error": { "error": "unknown monitor" } })).await;
    world.fault("monitor_cond_change was refused").await;
    world.stop().await;
}

#[tokio::test]
async fn while_there_is_no_server_rows_hold_for_ports_that_stay() {
    let mut world = World::start(1, &[ONE, TWO]);
    let mut peer = world.accept(0).await;
    assert_eq!(peer.greet(rows("initial", &[ONE, TWO])).await, clauses_of(&[ONE, TWO]));
    for port in [ONE, TWO] {
        assert_eq!(world.next().await, (row_of(port), true));
    }
    drop(peer);
    world.fault("server closed the connection").await;
    let mut peer = world.accept(0).await;
    // It is asked, and says nothing yet.
    world.move_to(&[TWO]);
    assert_eq!(world.next().await, (row_of(ONE), false));
    // Back again, it is not what was told of it then, but what will be.
    world.move_to(&[ONE, TWO]);
    assert_eq!(peer.greet(rows("initial", &[TWO])).await, clauses_of(&[ONE, TWO]));
    peer.update(rows("insert", &[ONE])).await;
    assert_eq!(world.next().await, (row_of(ONE), true));
    world.stop().await;
}

#[tokio::test]
async fn the_next_member_has_its_turn_when_one_is_lost_or_cut_off() {
    let mut world = World::start(2, &[ONE]);
    let (first, mut peer) = world.accept_any().await;
    peer.take("list_dbs", json!(["_Server", DATABASE])).await;
    let itself = |connected: bool| json!({ "Database": { Uuid::nil().to_string(): { "initial": { "model": "clustered", "connected": connected } } } });
    let position = |index: u64| json!([{ "rows": [{ "cid": ["uuid", INSTANCE], "index": index }] }]);
    let asked = peer.take("monitor_cond", itself(true)).await;
    assert_eq!(asked["params"][2]["Database"][0]["where"], json!([["name", "==", DATABASE]]));
    peer.take("transact", position(7)).await;
    peer.take("monitor_cond", rows("initial", &[ONE])).await;
    assert_eq!(world.next().await, (row_of(ONE), true));

    let cut_off = json!({ "Database": { Uuid::nil().to_string(): { "modify": { "connected": false } } } });
    peer.say(&json!({ "method": "update2", "params": ["server", cut_off], "id": null })).await;
    let mut next = world.accept(1 - first).await;
    next.take("list_dbs", json!(["_Server", DATABASE])).await;
    next.take("monitor_cond", itself(true)).await;
    next.take("transact", position(6)).await;
    next.take("monitor_cond", rows("initial", &[])).await;
    world.fault("server is behind its cluster: log index 6, another member had 7").await;
    world.fault("server is disconnected from its cluster").await;
    assert!(world.events.try_recv().is_err(), "what a member says that is behind counts for nothing");

    let mut back = world.accept(first).await;
    back.take("list_dbs", json!(["_Server", DATABASE])).await;
    back.take("monitor_cond", itself(true)).await;
    back.take("transact", position(8)).await;
    back.take("monitor_cond", rows("initial", &[])).await;
    assert_eq!(world.next().await, (row_of(ONE), false));
    world.stop().await;
}

#[tokio::test]
async fn news_without_an_answer_are_not_hoarded() {
    let mut world = World::start(1, &[ONE]);
    let mut peer = world.accept(0).await;
    peer.take("list_dbs", json!(["_Server", DATABASE])).await;
    for _ in 0..=16 {
        peer.say(&json!({ "method": "update2", "params": ["server", {}], "id": null })).await;
    }
    world.fault("server sends updates instead of a reply").await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_probe_silence_may_last() {
    let mut world = World::start(1, &[ONE]);
    let mut peer = world.accept(0).await;
    peer.greet(json!({})).await;
    world.state.wait_for(|state| state.ready).await.unwrap();
    sleep(Duration::from_hours(24)).await;
    peer.update(rows("insert", &[ONE])).await;
    assert_eq!(world.next().await, (row_of(ONE), true));
    world.stop().await;
}
