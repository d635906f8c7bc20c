//! The source against a scripted server. Scenario tests use the real one.

use std::path::PathBuf;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::super::SourceState;
use super::*;
use ovsdb_client::{FIRST_PAUSE, Framer};
use uuid::Uuid;

const LIMIT: Duration = Duration::from_mins(1);
const ROW: Uuid = Uuid::from_u128(1);
const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";

/// The source under test, its server and its output.
struct OvsdbHarness {
    listener: UnixListener,
    remote: String,
    events: mpsc::Receiver<Event>,
    state: watch::Receiver<SourceState>,
    cancel: CancellationToken,
    source: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl OvsdbHarness {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path: PathBuf = folder.path().join("db.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, events) = mpsc::channel(64);
        let (reporter, state) = Reporter::new(SourceKind::Ovsdb);
        let cancel = CancellationToken::new();
        let remote = Remote::Unix(path);
        let shown = remote.to_string();
        let access = OvsdbAccess { connection: Some(remote), tls: TlsFiles::default(), timeout: LIMIT };
        let source = tokio::spawn(run(access, sender, reporter, cancel.clone()));
        Self { listener, remote: shown, events, state, cancel, source, _folder: folder }
    }

    async fn accept(&self) -> OvsdbPeer {
        let (stream, _) =
            timeout(LIMIT, self.listener.accept()).await.expect("the source did not connect").unwrap();
        OvsdbPeer { stream, framer: Framer::new(1 << 20) }
    }

    /// Returns the row and the instance of the next event.
    async fn next(&mut self) -> (String, Option<String>) {
        let event = timeout(LIMIT, self.events.recv()).await.expect("no event came").unwrap();
        let instance = event.ports.first().and_then(|record| record.tenant.as_ref());
        (event.key, instance.map(|tenant| tenant.instance.to_string()))
    }

    /// Waits for an error of the server, and returns it.
    async fn fault(&mut self) -> String {
        let remote = self.remote.clone();
        let wait = self.state.wait_for(|state| state.faults.contains_key(&remote));
        timeout(LIMIT, wait).await.expect("no error was reported").unwrap().faults[&remote].clone()
    }

    async fn recovered(&mut self) -> SourceState {
        let wait = self.state.wait_for(|state| state.ready && state.faults.is_empty());
        timeout(LIMIT, wait).await.expect("the source did not recover").unwrap().clone()
    }

    async fn stop(self) {
        self.cancel.cancel();
        timeout(LIMIT, self.source).await.expect("the source did not stop").unwrap();
    }
}

/// The server's end of a connection.
struct OvsdbPeer {
    stream: UnixStream,
    framer: Framer,
}

impl OvsdbPeer {
    async fn receive(&mut self) -> Value {
        loop {
            if let Some(message) = self.framer.next_message().unwrap() {
                return serde_json::from_slice(message).unwrap();
            }
            let read = timeout(3 * LIMIT, self.stream.read_buf(self.framer.read_buffer())).await;
            assert_ne!(
                read.expect("no message was received").unwrap(),
                0,
                "the source closed the connection"
            );
        }
    }

    async fn send(&mut self, message: &Value) {
        self.send_raw(message.to_string().as_bytes()).await;
    }

    async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn reply(&mut self, method: &str, result: Value, error: Value) {
        let request = self.receive().await;
        assert_eq!(request["method"], method);
        self.send(&json!({ "id": request["id"], "result": result, "error": error })).await;
    }

    /// Replies to the first requests of a connection, with these rows of `Interface`.
    async fn handshake(&mut self, rows: Value) {
        self.reply("list_dbs", json!(["_Server", DATABASE]), Value::Null).await;
        self.reply("monitor_cond", json!({ "Interface": rows }), Value::Null).await;
    }

    async fn update(&mut self, rows: Value) {
        let params = json!(["metadata-agent", { "Interface": rows }]);
        self.send(&json!({ "method": "update2", "params": params, "id": null })).await;
    }
}

fn guest(row: Uuid, action: &str, instance: &str) -> Value {
    let ids = json!(["map", [["vm-uuid", instance]]]);
    json!({ row.to_string(): { action: { "name": "tap0", "external_ids": ids } } })
}

fn event(row: Uuid, instance: Option<&str>) -> (String, Option<String>) {
    (row.to_string(), instance.map(str::to_owned))
}

#[tokio::test]
async fn an_invalid_message_ends_the_connection_and_rows_stay_valid() {
    let mut world = OvsdbHarness::start();
    let mut peer = world.accept().await;
    peer.handshake(guest(ROW, "initial", INSTANCE)).await;
    assert_eq!(world.next().await, event(ROW, Some(INSTANCE)));
    assert_eq!(world.recovered().await.ports, 1);

    let update =
        |updates: Value| json!({ "method": "update2", "params": ["metadata-agent", updates], "id": null });
    for (invalid, wanted) in [
        ("HTTP/1.1 400 Bad Request\r\n".to_owned(), "message starts with 'H' instead of '{'"),
        ("{\"method\":}".to_owned(), "message is not JSON-RPC"),
        ("{\"method\": 7}".to_owned(), "message is not JSON-RPC"),
        (
            json!({ "method": "update2", "params": [], "id": null }).to_string(),
            "an update of a requested monitor",
        ),
        (update(json!({ "Queue": {} })).to_string(), "\"Queue\" was not requested"),
        (update(guest(ROW, "insert", INSTANCE)).to_string(), "was not requested"),
        (update(json!({ "Interface": guest(ROW, "insert", INSTANCE) })).to_string(), "cannot insert row"),
        (
            update(json!({ "Interface": { Uuid::nil().to_string(): { "delete": null } } })).to_string(),
            "cannot delete row",
        ),
        (
            json!({ "method": "monitor_canceled", "params": ["metadata-agent"], "id": null }).to_string(),
            "server cancelled the monitor",
        ),
    ] {
        peer.send_raw(invalid.as_bytes()).await;
        let fault = world.fault().await;
        assert!(fault.contains(wanted), "{invalid}: {fault}");
        peer = world.accept().await;
        peer.handshake(guest(ROW, "initial", INSTANCE)).await;
        assert_eq!(world.recovered().await.ports, 1);
    }
    // An incomplete message.
    peer.send_raw(b"{\"method\": \"upd").await;
    drop(peer);
    assert_eq!(world.fault().await, "server closed the connection");
    assert!(world.events.try_recv().is_err(), "nothing was withdrawn or sent twice");
    world.stop().await;
}

#[tokio::test]
async fn a_deleted_row_is_withdrawn_before_other_events() {
    let mut world = OvsdbHarness::start();
    let mut peer = world.accept().await;
    peer.handshake(guest(ROW, "initial", INSTANCE)).await;
    assert_eq!(world.next().await, event(ROW, Some(INSTANCE)));
    drop(peer);
    let mut peer = world.accept().await;
    // Sorts before the other.
    let other = "00000000-5e0b-4f0e-8a44-0d4e6c7b1f10";
    peer.handshake(guest(Uuid::nil(), "initial", other)).await;
    assert_eq!(world.next().await, event(ROW, None));
    assert_eq!(world.next().await, event(Uuid::nil(), Some(other)));
    assert_eq!(world.recovered().await.ports, 1);
    world.stop().await;
}

#[tokio::test]
async fn an_invalid_row_is_withdrawn_and_does_not_affect_others() {
    let mut world = OvsdbHarness::start();
    let mut peer = world.accept().await;
    peer.handshake(guest(ROW, "initial", INSTANCE)).await;
    assert_eq!(world.next().await, event(ROW, Some(INSTANCE)));
    let other = Uuid::from_u128(2);
    peer.update(guest(other, "insert", INSTANCE)).await;
    assert_eq!(world.next().await, event(other, Some(INSTANCE)));
    peer.update(guest(ROW, "modify", "none")).await;
    assert_eq!(world.next().await, event(ROW, None));
    let state = timeout(LIMIT, world.state.wait_for(|state| !state.faults.is_empty())).await;
    let state = state.expect("no error was reported").unwrap().clone();
    assert_eq!((state.ready, state.ports, state.fault().unwrap().0), (true, 1, "tap0"));
    peer.update(guest(ROW, "modify", INSTANCE)).await;
    assert_eq!(world.next().await, event(ROW, Some(INSTANCE)));
    world.recovered().await;
    world.stop().await;
}

#[tokio::test]
async fn a_server_without_monitor_cond_is_monitored() {
    let mut world = OvsdbHarness::start();
    let mut peer = world.accept().await;
    peer.reply("list_dbs", json!([DATABASE]), Value::Null).await;
    peer.reply("monitor_cond", Value::Null, json!("unknown method")).await;
    peer.reply("monitor", json!({ "Interface": guest(ROW, "new", INSTANCE) }), Value::Null).await;
    assert_eq!(world.next().await, event(ROW, Some(INSTANCE)));
    let gone = json!({ "Interface": { ROW.to_string(): { "old": {} } } });
    peer.send(&json!({ "method": "update", "params": ["metadata-agent", gone], "id": null })).await;
    assert_eq!(world.next().await, event(ROW, None));
    world.stop().await;
}

#[tokio::test]
async fn a_missing_database_or_table_is_reported() {
    let mut world = OvsdbHarness::start();
    let mut peer = world.accept().await;
    peer.reply("list_dbs", json!(["OVN_Southbound"]), Value::Null).await;
    assert_eq!(world.fault().await, "no database Open_vSwitch; the server has [\"OVN_Southbound\"]");
    let mut peer = world.accept().await;
    peer.reply("list_dbs", json!([DATABASE]), Value::Null).await;
    let error = json!({ "error": "syntax error", "details": "no table named Interface" });
    peer.reply("monitor_cond", Value::Null, error).await;
    let remote = world.remote.clone();
    let refused = world.state.wait_for(|state| state.faults[&remote].contains("no table named Interface"));
    assert!(!timeout(LIMIT, refused).await.expect("no error was reported").unwrap().ready);
    world.stop().await;
}

#[tokio::test]
async fn an_endless_message_is_rejected() {
    let mut world = OvsdbHarness::start();
    let mut peer = world.accept().await;
    peer.reply("list_dbs", json!([DATABASE]), Value::Null).await;
    peer.receive().await;
    peer.send_raw(b"{\"result\": \"").await;
    let megabyte = vec![b'x'; 1 << 20];
    let mut sent = 0;
    while peer.stream.write_all(&megabyte).await.is_ok() {
        sent += 1;
        assert!(sent < 100, "the whole message was accepted");
    }
    assert_eq!(world.fault().await, format!("message is longer than {MAX_MESSAGE_BYTES} bytes"));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_probed_and_then_given_up() {
    let mut world = OvsdbHarness::start();
    let mut peer = world.accept().await;
    peer.handshake(json!({})).await;
    world.recovered().await;
    peer.send(&json!({ "method": "echo", "params": ["hello"], "id": "probe" })).await;
    assert_eq!(peer.receive().await, json!({ "id": "probe", "result": ["hello"], "error": null }));
    peer.send(&json!({ "method": "steal", "params": [], "id": 7 })).await;
    assert_eq!(peer.receive().await, json!({ "id": 7, "result": null, "error": "unknown method" }));
    for _ in 0..3 {
        let echo = peer.receive().await;
        assert_eq!(echo["method"], "echo");
        peer.send(&json!({ "id": echo["id"], "result": [], "error": null })).await;
    }
    peer.receive().await;
    let waited = Instant::now();
    // No more replies.
    let remote = world.remote.clone();
    let lost =
        timeout(Duration::from_mins(1), world.state.wait_for(|state| state.faults.contains_key(&remote)));
    assert_eq!(
        lost.await.expect("the source waits forever").unwrap().faults[&remote],
        "no response for 20 s"
    );
    assert!(waited.elapsed() <= Duration::from_secs(11));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_to_their_limit() {
    let began = Instant::now();
    let mut world = OvsdbHarness::start();
    let mut gaps = Vec::new();
    let mut last = began;
    for _ in 0..12 {
        drop(world.accept().await);
        gaps.push(last.elapsed());
        last = Instant::now();
    }
    world.fault().await;
    assert!(gaps[1] <= FIRST_PAUSE, "{gaps:?}");
    assert!(gaps[10] >= LONGEST_PAUSE / 2 && gaps[10] <= LONGEST_PAUSE, "{gaps:?}");
    world.stop().await;
}

/// A server that was killed leaves its socket, and its successor may have another one.
#[tokio::test(start_paused = true)]
async fn another_usual_socket_takes_over() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["first", "second"].map(|name| folder.path().join(name));
    let (sender, mut events) = mpsc::channel(64);
    let (reporter, mut state) = Reporter::new(SourceKind::Ovsdb);
    let access = OvsdbAccess { connection: None, tls: TlsFiles::default(), timeout: LIMIT };
    let rows = RowTracker::new(SourceKind::Ovsdb, sender, reporter);
    let source = tokio::spawn(read_rows(access, UsualSockets::new(&paths), rows));
    let accept = async |listener: &UnixListener| {
        let (stream, _) = timeout(LIMIT, listener.accept()).await.expect("no connection").unwrap();
        OvsdbPeer { stream, framer: Framer::new(1 << 20) }
    };
    // No socket is not an error.
    let none = timeout(LIMIT, state.wait_for(|state| state.ready)).await.unwrap().unwrap().clone();
    assert!(none.faults.is_empty(), "{none:?}");

    let first = UnixListener::bind(&paths[0]).unwrap();
    let mut peer = accept(&first).await;
    peer.handshake(guest(ROW, "initial", INSTANCE)).await;
    assert_eq!(timeout(LIMIT, events.recv()).await.unwrap().unwrap().key, ROW.to_string());
    drop((peer, first));
    assert!(paths[0].exists());
    let second = UnixListener::bind(&paths[1]).unwrap();
    let mut peer = accept(&second).await;
    peer.handshake(guest(ROW, "initial", INSTANCE)).await;
    timeout(LIMIT, state.wait_for(|state| state.faults.is_empty())).await.unwrap().unwrap();
    source.abort();
}
