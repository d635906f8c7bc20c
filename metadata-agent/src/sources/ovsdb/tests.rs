//! The source against a server whose every word the test chooses. The real one stands in the scenarios.

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

const PATIENCE: Duration = Duration::from_mins(1);
const ROW: Uuid = Uuid::from_u128(1);
const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";

/// The source, and what it says.
struct World {
    listener: UnixListener,
    remote: String,
    events: mpsc::Receiver<Event>,
    state: watch::Receiver<SourceState>,
    cancel: CancellationToken,
    source: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl World {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path: PathBuf = folder.path().join("db.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, events) = mpsc::channel(64);
        let (reporter, state) = Reporter::new(SourceKind::Ovsdb);
        let cancel = CancellationToken::new();
        let remote = Remote::Unix(path);
        let shown = remote.to_string();
        let access = Access { connection: Some(remote), tls: TlsFiles::default(), patience: PATIENCE };
        let source = tokio::spawn(run(access, sender, reporter, cancel.clone()));
        Self { listener, remote: shown, events, state, cancel, source, _folder: folder }
    }

    async fn accept(&self) -> Peer {
        let (stream, _) = timeout(PATIENCE, self.listener.accept()).await.expect("it comes back").unwrap();
        Peer { stream, framer: Framer::new(1 << 20) }
    }

    /// The next event: of which row, and which instance it names.
    async fn next(&mut self) -> (String, Option<String>) {
        let event = timeout(PATIENCE, self.events.recv()).await.expect("no event came").unwrap();
        let instance = event.ports.first().and_then(|facts| facts.tenant.as_ref());
        (event.key, instance.map(|tenant| tenant.instance.to_string()))
    }

    /// Waits until the server is at fault, and returns how.
    async fn fault(&mut self) -> String {
        let remote = self.remote.clone();
        let wait = self.state.wait_for(|state| state.faults.contains_key(&remote));
        timeout(PATIENCE, wait).await.expect("no fault came").unwrap().faults[&remote].clone()
    }

    async fn sound(&mut self) -> SourceState {
        let wait = self.state.wait_for(|state| state.ready && state.faults.is_empty());
        timeout(PATIENCE, wait).await.expect("never sound").unwrap().clone()
    }

    async fn stop(self) {
        self.cancel.cancel();
        timeout(PATIENCE, self.source).await.expect("stops when told to").unwrap();
    }
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
            let read = timeout(3 * PATIENCE, self.stream.read_buf(self.framer.read_buffer())).await;
            assert_ne!(read.expect("nothing to hear").unwrap(), 0, "the source hung up");
        }
    }

    async fn say(&mut self, message: &Value) {
        self.say_raw(message.to_string().as_bytes()).await;
    }

    async fn say_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn answer(&mut self, method: &str, result: Value, error: Value) {
        let request = self.hear().await;
        assert_eq!(request["method"], method);
        self.say(&json!({ "id": request["id"], "result": result, "error": error })).await;
    }

    /// The beginning of every conversation, with these rows of `Interface`.
    async fn greet(&mut self, rows: Value) {
        self.answer("list_dbs", json!(["_Server", DATABASE]), Value::Null).await;
        self.answer("monitor_cond", json!({ "Interface": rows }), Value::Null).await;
    }

    async fn update(&mut self, rows: Value) {
        let params = json!(["metadata-agent", { "Interface": rows }]);
        self.say(&json!({ "method": "update2", "params": params, "id": null })).await;
    }
}

fn guest(row: Uuid, action: &str, instance: &str) -> Value {
    let ids = json!(["map", [["vm-uuid", instance]]]);
    json!({ row.to_string(): { action: { "name": "tap0", "external_ids": ids } } })
}

fn said(row: Uuid, instance: Option<&str>) -> (String, Option<String>) {
    (row.to_string(), instance.map(str::to_owned))
}

#[tokio::test]
async fn whatever_cannot_be_understood_ends_the_connection_and_what_was_said_holds() {
    let mut world = World::start();
    let mut peer = world.accept().await;
    peer.greet(guest(ROW, "initial", INSTANCE)).await;
    assert_eq!(world.next().await, said(ROW, Some(INSTANCE)));
    assert_eq!(world.sound().await.ports, 1);

    let update =
        |updates: Value| json!({ "method": "update2", "params": ["metadata-agent", updates], "id": null });
    for (garbage, wanted) in [
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
        peer.say_raw(garbage.as_bytes()).await;
        let fault = world.fault().await;
        assert!(fault.contains(wanted), "{garbage}: {fault}");
        peer = world.accept().await;
        peer.greet(guest(ROW, "initial", INSTANCE)).await;
        assert_eq!(world.sound().await.ports, 1);
    }
    // Half a message.
    peer.say_raw(b"{\"method\": \"upd").await;
    drop(peer);
    assert_eq!(world.fault().await, "server closed the connection");
    assert!(world.events.try_recv().is_err(), "nothing was withdrawn, nor said twice");
    world.stop().await;
}

#[tokio::test]
async fn a_row_that_is_not_there_any_more_is_withdrawn_first() {
    let mut world = World::start();
    let mut peer = world.accept().await;
    peer.greet(guest(ROW, "initial", INSTANCE)).await;
    assert_eq!(world.next().await, said(ROW, Some(INSTANCE)));
    drop(peer);
    let mut peer = world.accept().await;
    // Sorts before the other.
    let other = "00000000-5e0b-4f0e-8a44-0d4e6c7b1f10";
    peer.greet(guest(Uuid::nil(), "initial", other)).await;
    assert_eq!(world.next().await, said(ROW, None));
    assert_eq!(world.next().await, said(Uuid::nil(), Some(other)));
    assert_eq!(world.sound().await.ports, 1);
    world.stop().await;
}

#[tokio::test]
async fn a_row_that_cannot_be_understood_withdraws_what_it_said_and_touches_no_other() {
    let mut world = World::start();
    let mut peer = world.accept().await;
    peer.greet(guest(ROW, "initial", INSTANCE)).await;
    assert_eq!(world.next().await, said(ROW, Some(INSTANCE)));
    let other = Uuid::from_u128(2);
    peer.update(guest(other, "insert", INSTANCE)).await;
    assert_eq!(world.next().await, said(other, Some(INSTANCE)));
    peer.update(guest(ROW, "modify", "none")).await;
    assert_eq!(world.next().await, said(ROW, None));
    let state = timeout(PATIENCE, world.state.wait_for(|state| !state.faults.is_empty())).await;
    let state = state.expect("no fault came").unwrap().clone();
    assert_eq!((state.ready, state.ports, state.fault().unwrap().0), (true, 1, "tap0"));
    peer.update(guest(ROW, "modify", INSTANCE)).await;
    assert_eq!(world.next().await, said(ROW, Some(INSTANCE)));
    world.sound().await;
    world.stop().await;
}

#[tokio::test]
async fn an_old_server_is_monitored_in_the_old_way() {
    let mut world = World::start();
    let mut peer = world.accept().await;
    peer.answer("list_dbs", json!([DATABASE]), Value::Null).await;
    peer.answer("monitor_cond", Value::Null, json!("unknown method")).await;
    peer.answer("monitor", json!({ "Interface": guest(ROW, "new", INSTANCE) }), Value::Null).await;
    assert_eq!(world.next().await, said(ROW, Some(INSTANCE)));
    let gone = json!({ "Interface": { ROW.to_string(): { "old": {} } } });
    peer.say(&json!({ "method": "update", "params": ["metadata-agent", gone], "id": null })).await;
    assert_eq!(world.next().await, said(ROW, None));
    world.stop().await;
}

#[tokio::test]
async fn a_server_without_the_database_or_with_another_schema_says_so() {
    let mut world = World::start();
    let mut peer = world.accept().await;
    peer.answer("list_dbs", json!(["OVN_Southbound"]), Value::Null).await;
    assert_eq!(world.fault().await, "no database Open_vSwitch; the server has [\"OVN_Southbound\"]");
    let mut peer = world.accept().await;
    peer.answer("list_dbs", json!([DATABASE]), Value::Null).await;
    let error = json!({ "error": "syntax error", "details": "no table named Interface" });
    peer.answer("monitor_cond", Value::Null, error).await;
    let remote = world.remote.clone();
    let refused = world.state.wait_for(|state| state.faults[&remote].contains("no table named Interface"));
    assert!(!timeout(PATIENCE, refused).await.expect("no fault came").unwrap().ready);
    world.stop().await;
}

#[tokio::test]
async fn an_endless_message_is_an_error_and_not_memory() {
    let mut world = World::start();
    let mut peer = world.accept().await;
    peer.answer("list_dbs", json!([DATABASE]), Value::Null).await;
    peer.hear().await;
    peer.say_raw(b"{\"result\": \"").await;
    let megabyte = vec![b'x'; 1 << 20];
    let mut sent = 0;
    while peer.stream.write_all(&megabyte).await.is_ok() {
        sent += 1;
        assert!(sent < 100, "all of it was taken");
    }
    assert_eq!(world.fault().await, format!("message is longer than {MAX_MESSAGE_BYTES} bytes"));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn silence_is_broken_by_an_echo_and_ends_without_an_answer() {
    let mut world = World::start();
    let mut peer = world.accept().await;
    peer.greet(json!({})).await;
    world.sound().await;
    peer.say(&json!({ "method": "echo", "params": ["hello"], "id": "probe" })).await;
    assert_eq!(peer.hear().await, json!({ "id": "probe", "result": ["hello"], "error": null }));
    peer.say(&json!({ "method": "steal", "params": [], "id": 7 })).await;
    assert_eq!(peer.hear().await, json!({ "id": 7, "result": null, "error": "unknown method" }));
    for _ in 0..3 {
        let echo = peer.hear().await;
        assert_eq!(echo["method"], "echo");
        peer.say(&json!({ "id": echo["id"], "result": [], "error": null })).await;
    }
    peer.hear().await;
    let waited = Instant::now();
    // Nothing is answered any more.
    let remote = world.remote.clone();
    let lost =
        timeout(Duration::from_mins(1), world.state.wait_for(|state| state.faults.contains_key(&remote)));
    assert_eq!(lost.await.expect("it waits for ever").unwrap().faults[&remote], "no response for 20 s");
    assert!(waited.elapsed() <= Duration::from_secs(11));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_to_their_limit() {
    let began = Instant::now();
    let mut world = World::start();
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
