//! One call of an OpenStack API.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::http::Connection;
use crate::topology::Host;
use crate::wait;

/// Limit for one call, and for a busy service. Each call creates a token and has it verified.
const PATIENCE: Duration = Duration::from_mins(3);

/// The response of an API.
pub(super) struct Answer {
    /// The header `X-Subject-Token`.
    pub(super) token: Option<String>,
    /// The body, or `null` if there is none.
    pub(super) body: Value,
}

/// Calls an API and panics with the response unless it is a success. A service answers 503 for a
/// moment after it, or its Keystone, has restarted.
pub(super) fn call(
    host: &Host,
    address: (IpAddr, u16),
    method: &str,
    path: &str,
    token: Option<&str>,
    body: &Value,
) -> Answer {
    let mut headers = vec![("Connection", "close"), ("Content-Type", "application/json")];
    headers.extend(token.map(|token| ("X-Auth-Token", token)));
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let mut last = None;
    let answer = wait::poll(PATIENCE, || {
        let stream = host.netns().enter(|| TcpStream::connect_timeout(&SocketAddr::from(address), PATIENCE));
        let stream = stream.unwrap_or_else(|e| panic!("{method} {path}: connect to {address:?}: {e}"));
        for set in [TcpStream::set_read_timeout, TcpStream::set_write_timeout] {
            set(&stream, Some(PATIENCE)).unwrap_or_else(|e| panic!("set a time-out: {e}"));
        }
        let answer = Connection::new(stream).request(method, path, &headers, body.as_bytes());
        let answer = answer.unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        let done = (answer.status != 503).then(|| answer.clone());
        last = Some(answer);
        done
    });
    let Some(answer) = answer.or(last) else { panic!("{method} {path} could not be called") };
    let text = String::from_utf8_lossy(&answer.body);
    assert!((200..300).contains(&answer.status), "{method} {path} {body}: {} {text}", answer.status);
    let token = answer.header("x-subject-token").map(str::to_owned);
    let body = if text.is_empty() { Value::Null } else { answer_of(path, &text) };
    Answer { token, body }
}

fn answer_of(path: &str, text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{path}: {e}: {text}"))
}
