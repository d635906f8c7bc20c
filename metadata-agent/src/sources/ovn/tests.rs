//! The source against scripted servers. Scenario tests use the real ones.

use serde_json::{Value, json};
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

const LIMIT: Duration = Duration::from_mins(1);
const ONE: &str = "11111111-77c1-4e55-9d0c-2b6f4f1f0a01";
const TWO: &str = "22222222-77c1-4e55-9d0c-2b6f4f1f0a02";
const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";

/// The source under test, its servers and its output.
struct OvnHarness {
    listeners: Vec<UnixListener>,
    present: watch::Sender<Presence>,
    events: mpsc::Receiver<Event>,
    state: watch::Receiver<SourceState>,
    cancel: CancellationToken,
    source: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl OvnHarness {
    fn start(servers: usize, ports: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..servers).map(|number| folder.path().join(format!("{number}.sock"))).collect();
        let listeners = paths.iter().map(|path| UnixListener::bind(path).unwrap()).collect();
        let (sender, events) = mpsc::channel(64);
        let (present, presence) = watch::channel(presence_of(ports));
        let (reporter, state) = Reporter::new(SourceKind::OvnSouthbound);
        let cancel = CancellationToken::new();
        let access = OvnAccess {
            servers: paths.into_iter().map(Remote::Unix).collect(),
            tls: TlsFiles::default(),
            timeout: LIMIT,
            longest_pause: Duration::from_secs(1),
            probe_interval: None,
        };
        let source = tokio::spawn(run(access, presence, sender, reporter, cancel.clone()));
        Self { listeners, present, events, state, cancel, source, _folder: folder }
    }

    fn set_ports(&self, ports: &[&str]) {
        self.present.send_replace(presence_of(ports));
    }

    async fn accept(&self, server: usize) -> SouthboundPeer {
        let accepted = timeout(LIMIT, self.listeners[server].accept()).await;
        let (stream, _) = accepted.expect("the source did not connect").unwrap();
        SouthboundPeer { stream, framer: Framer::new(1 << 20) }
    }

    /// Returns the server that was chosen, and the connection.
    async fn accept_any(&self) -> (usize, SouthboundPeer) {
        tokio::select! {
            peer = self.accept(0) => (0, peer),
            peer = self.accept(1) => (1, peer),
        }
    }

    /// Returns the row of the next event, and whether the event has a port.
    async fn next(&mut self) -> (Uuid, bool) {
        let event = timeout(LIMIT, self.events.recv()).await.expect("no event came").unwrap();
        (event.key.parse().unwrap(), !event.ports.is_empty())
    }

    async fn fault(&mut self, wanted: &str) {
        let wait = self.state.wait_for(|state| state.faults.values().any(|fault| fault.contains(wanted)));
        timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("{wanted} was not reported")).unwrap();
    }

    async fn stop(self) {
        self.cancel.cancel();
        timeout(LIMIT, self.source).await.expect("the source did not stop").unwrap();
    }
}

fn presence_of(ports: &[&str]) -> Presence {
    let present = |id: &&str| Present {
        index: crate::ids::IfIndex(1),
        device: format!("tap{}", &id[..11]).parse().unwrap(),
        mac: None,
        port: Some(id.parse().unwrap()),
        need: Need::Identity,
    };
    ports.iter().map(present).collect()
}

/// Returns the row's UUID, derived from the port's.
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
struct SouthboundPeer {
    stream: UnixStream,
    framer: Framer,
}

impl SouthboundPeer {
    async fn receive(&mut self) -> Value {
        loop {
            if let Some(message) = self.framer.next_message().unwrap() {
                return serde_json::from_slice(message).unwrap();
            }
            let read = timeout(LIMIT, self.stream.read_buf(self.framer.read_buffer())).await;
            assert_ne!(
                read.expect("no message was received").unwrap(),
                0,
                "the source closed the connection"
            );
        }
    }

    async fn send(&mut self, message: &Value) {
        self.stream.write_all(message.to_string().as_bytes()).await.unwrap();
    }

    async fn reply(&mut self, request: &Value, result: Value) {
        self.send(&json!({ "id": request["id"], "result": result, "error": null })).await;
    }

    /// Receives a request and replies.
    async fn serve(&mut self, method: &str, result: Value) -> Value {
        let request = self.receive().await;
        assert_eq!(request["method"], method);
        self.reply(&request, result).await;
        request
    }

    /// Replies to the first requests as a standalone server. Returns the condition.
    async fn handshake(&mut self, rows: Value) -> Value {
        self.serve("list_dbs", json!([DATABASE])).await;
        let request = self.serve("monitor_cond", rows).await;
        request["params"][2]["Port_Binding"][0]["where"].clone()
    }

    async fn update(&mut self, rows: Value) {
        self.send(&json!({ "method": "update2", "params": ["metadata-agent", rows], "id": null })).await;
    }

    async fn receive_change(&mut self) -> Value {
        let request = self.receive().await;
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
    let mut source = OvnHarness::start(1, &[]);
    let mut peer = source.accept(0).await;
    assert_eq!(peer.handshake(json!({})).await, json!([false]));
    source.set_ports(&[ONE]);
    let first = peer.receive_change().await;
    assert_eq!(condition(&first), &clauses_of(&[ONE]));
    // While a change is in progress, only the final ports are sent afterwards.
    source.set_ports(&[TWO]);
    source.set_ports(&[ONE, TWO]);
    // A server sends the updates caused by a change before its reply.
    peer.update(rows("insert", &[ONE])).await;
    assert_eq!(source.next().await, (row_of(ONE), true));
    peer.reply(&first, json!({})).await;
    let second = peer.receive_change().await;
    assert_eq!(condition(&second), &clauses_of(&[ONE, TWO]));
    peer.update(rows("insert", &[TWO])).await;
    peer.reply(&second, json!({})).await;
    assert_eq!(source.next().await, (row_of(TWO), true));

    // A row is withdrawn with its port, and not sent again while it still exists.
    source.set_ports(&[TWO]);
    assert_eq!(source.next().await, (row_of(ONE), false));
    let third = peer.receive_change().await;
    assert_eq!(condition(&third), &clauses_of(&[TWO]));
    peer.update(rows("delete", &[ONE])).await;
    peer.reply(&third, json!({})).await;
    source.set_ports(&[]);
    assert_eq!(source.next().await, (row_of(TWO), false));
    assert_eq!(condition(&peer.receive_change().await), &json!([false]));
    source.stop().await;
}

#[tokio::test]
async fn all_rows_are_never_requested_from_a_server() {
    let mut source = OvnHarness::start(1, &[ONE]);
    let mut peer = source.accept(0).await;
    peer.serve("list_dbs", json!([DATABASE])).await;
    let request = peer.receive().await;
    peer.send(&json!({ "id": request["id"], "result": null, "error": "unknown method" })).await;
    source.fault("monitor_cond was refused: unknown method").await;
    let mut peer = source.accept(0).await;
    peer.handshake(json!({})).await;
    source.set_ports(&[TWO]);
    let change = peer.receive_change().await;
    peer.send(&json!({ "id": change["id"], "result": null, "error": { "error": "unknown monitor" } })).await;
    source.fault("monitor_cond_change was refused").await;
    source.stop().await;
}

/// OVN before 22.09 has no column `port_security`. Then nothing says which sources are allowed.
#[tokio::test]
async fn an_older_database_is_read_without_port_security() {
    let mut source = OvnHarness::start(1, &[ONE]);
    let mut peer = source.accept(0).await;
    peer.serve("list_dbs", json!([DATABASE])).await;
    let request = peer.receive().await;
    assert!(request.to_string().contains("port_security"), "{request}");
    let details = "port_security is not a valid column name";
    let refused = json!({ "error": "syntax error", "details": details });
    peer.send(&json!({ "id": request["id"], "result": null, "error": refused })).await;
    let again = peer.serve("monitor_cond", rows("initial", &[ONE])).await;
    assert!(!again.to_string().contains("port_security"), "{again}");
    assert_eq!(again["params"][2]["Port_Binding"][0]["where"], clauses_of(&[ONE]));
    let event = timeout(LIMIT, source.events.recv()).await.expect("no event came").unwrap();
    assert_eq!(event.ports[0].addressing.allowed_sources, None);
    source.stop().await;
}

#[tokio::test]
async fn without_a_server_rows_stay_valid_for_ports_that_stay() {
    let mut source = OvnHarness::start(1, &[ONE, TWO]);
    let mut peer = source.accept(0).await;
    assert_eq!(peer.handshake(rows("initial", &[ONE, TWO])).await, clauses_of(&[ONE, TWO]));
    for port in [ONE, TWO] {
        assert_eq!(source.next().await, (row_of(port), true));
    }
    drop(peer);
    source.fault("server closed the connection").await;
    let mut peer = source.accept(0).await;
    // The server has not replied yet.
    source.set_ports(&[TWO]);
    assert_eq!(source.next().await, (row_of(ONE), false));
    // The returned port is reported only after a server has sent its row.
    source.set_ports(&[ONE, TWO]);
    assert_eq!(peer.handshake(rows("initial", &[TWO])).await, clauses_of(&[ONE, TWO]));
    peer.update(rows("insert", &[ONE])).await;
    assert_eq!(source.next().await, (row_of(ONE), true));
    source.stop().await;
}

#[tokio::test]
async fn the_next_member_is_used_after_a_disconnection() {
    let mut source = OvnHarness::start(2, &[ONE]);
    let (first, mut peer) = source.accept_any().await;
    peer.serve("list_dbs", json!(["_Server", DATABASE])).await;
    let state = |connected: bool| json!({ "Database": { Uuid::nil().to_string(): { "initial": { "model": "clustered", "connected": connected } } } });
    let position = |index: u64| json!([{ "rows": [{ "cid": ["uuid", INSTANCE], "index": index }] }]);
    let asked = peer.serve("monitor_cond", state(true)).await;
    assert_eq!(asked["params"][2]["Database"][0]["where"], json!([["name", "==", DATABASE]]));
    peer.serve("transact", position(7)).await;
    peer.serve("monitor_cond", rows("initial", &[ONE])).await;
    assert_eq!(source.next().await, (row_of(ONE), true));

    let disconnected =
        json!({ "Database": { Uuid::nil().to_string(): { "modify": { "connected": false } } } });
    peer.send(&json!({ "method": "update2", "params": ["server", disconnected], "id": null })).await;
    let mut next = source.accept(1 - first).await;
    next.serve("list_dbs", json!(["_Server", DATABASE])).await;
    next.serve("monitor_cond", state(true)).await;
    next.serve("transact", position(6)).await;
    next.serve("monitor_cond", rows("initial", &[])).await;
    source.fault("server is behind its cluster: log index 6, another member had 7").await;
    source.fault("server is disconnected from its cluster").await;
    assert!(source.events.try_recv().is_err(), "rows of a member that is behind are ignored");

    let mut back = source.accept(first).await;
    back.serve("list_dbs", json!(["_Server", DATABASE])).await;
    back.serve("monitor_cond", state(true)).await;
    back.serve("transact", position(8)).await;
    back.serve("monitor_cond", rows("initial", &[])).await;
    assert_eq!(source.next().await, (row_of(ONE), false));
    source.stop().await;
}

#[tokio::test]
async fn updates_without_a_reply_are_not_accumulated() {
    let mut source = OvnHarness::start(1, &[ONE]);
    let mut peer = source.accept(0).await;
    peer.serve("list_dbs", json!(["_Server", DATABASE])).await;
    for _ in 0..=16 {
        peer.send(&json!({ "method": "update2", "params": ["server", {}], "id": null })).await;
    }
    source.fault("server sends updates instead of a reply").await;
    source.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_probes_a_server_may_be_silent() {
    let mut source = OvnHarness::start(1, &[ONE]);
    let mut peer = source.accept(0).await;
    peer.handshake(json!({})).await;
    source.state.wait_for(|state| state.ready).await.unwrap();
    sleep(Duration::from_hours(24)).await;
    peer.update(rows("insert", &[ONE])).await;
    assert_eq!(source.next().await, (row_of(ONE), true));
    source.stop().await;
}
